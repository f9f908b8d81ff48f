"""Tasks are deterministic, their answers are right, and no test question reaches training."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import (
    ALL_FAMILIES,
    FAMILIES,
    GRADES,
    HELD_OUT_FAMILY,
    SPLITS,
    Task,
    generate,
    is_correct,
    split_of,
    task_at,
)

CELLS = [(family, grade) for family in ALL_FAMILIES for grade in GRADES]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CLOSING = {"(": ")", "[": "]", "{": "}"}


def _operands(prompt: str, pattern: str) -> list[str]:
    """The operands of a prompt; the capital that begins an English word is none."""
    return re.findall(pattern, prompt)


def _word(prompt: str) -> str:
    """The longest run of capitals, not followed by lower case: the word a question is about."""
    return max(_operands(prompt, r"[A-Z]+(?![a-z])"), key=len)


def _solve_sum(prompt: str) -> str:
    a, b = (int(number) for number in _operands(prompt, r"\d+"))
    return str(a + b)


def _solve_difference(prompt: str) -> str:
    a, b = (int(number) for number in _operands(prompt, r"\d+"))
    return str(abs(a - b))


def _solve_largest(prompt: str) -> str:
    return max(_operands(prompt, r"\d+"), key=int)


def _solve_count(prompt: str) -> str:
    runs = _operands(prompt, r"(?<![a-z])[A-Z]+(?![A-Za-z])")
    word = max(runs, key=len)
    letters = [run for run in runs if len(run) == 1 and run != "I"] or [
        run for run in runs if len(run) == 1
    ]
    return str(word.count(letters[0]))


def _solve_pick(prompt: str) -> str:
    word, place = _word(prompt), int(_operands(prompt, r"\d")[0])
    return word[place - 1] if " left" in prompt else word[-place]


def _solve_lookup(prompt: str) -> str:
    rows = re.findall(r"([A-Z][a-z]+) has ([a-z]+)", prompt)
    by_person = {who: what for who, what in rows if who != "Who"}
    asked = re.search(r"[Ww]hat does ([A-Z][a-z]+) have", prompt)
    if asked:
        return by_person[asked[1]]
    asked = re.search(r"[Ww]ho has ([a-z]+)", prompt)
    assert asked
    return next(who for who, what in by_person.items() if what == asked[1])


def _solve_follow(prompt: str) -> str:
    values = dict(re.findall(r"([A-Z])=([A-Z0-9])", prompt))
    name = _operands(re.sub(r"[A-Z]=[A-Z0-9]", "", prompt), r"\b[A-Z]\b")[-1]
    while not name.isdigit():
        name = values[name]
    return name


def _solve_brackets(prompt: str) -> str:
    opened: list[str] = []
    for symbol in _operands(prompt, r"[()\[\]{}]"):
        if symbol in CLOSING:
            opened.append(CLOSING[symbol])
        else:
            assert opened.pop() == symbol, "the given brackets must be closed in order"
    return "".join(reversed(opened))


def _solve_shift(prompt: str) -> str:
    step = int(_operands(prompt, r"\d")[0])
    return "".join(LETTERS[(LETTERS.index(letter) + step) % 26] for letter in _word(prompt))


SOLVERS = {
    "add": _solve_sum,
    "subtract": _solve_difference,
    "largest": _solve_largest,
    "reverse": lambda prompt: "".join(reversed(_word(prompt))),
    "sort": lambda prompt: "".join(sorted(_word(prompt))),
    "count": _solve_count,
    "pick": _solve_pick,
    "shift": _solve_shift,
    "lookup": _solve_lookup,
    "follow": _solve_follow,
    "brackets": _solve_brackets,
    "dedupe": lambda prompt: "".join(sorted(set(_word(prompt)), key=_word(prompt).index)),
}


@pytest.mark.parametrize(("family", "grade"), CELLS)
def test_answers_follow_from_the_prompt(family: str, grade: int) -> None:
    """A solver that reads nothing but the prompt arrives at the answer that the task states."""
    rng = Random(5)
    for _ in range(100):
        task = generate(rng, family, grade, "train")
        assert task.answer == SOLVERS[family](task.prompt), task


@given(seed=st.integers(), index=st.integers(0), split=st.sampled_from(SPLITS))
@settings(max_examples=settings.default.max_examples // 2)
def test_the_stream_is_a_pure_function(seed: int, index: int, split: str) -> None:
    """The same seed, index and split give the same task, whatever was drawn in between."""
    first = task_at(seed, index, split)  # type: ignore[arg-type] # drawn from SPLITS
    Random(seed).random()
    assert first == task_at(seed, index, split)  # type: ignore[arg-type] # drawn from SPLITS


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_no_question_is_in_two_splits(family: str) -> None:
    """What is asked decides the split, so not even a rephrased test question is trained on."""
    rng = Random(7)
    answers_by_split = {
        split: {
            _content(generate(rng, family, grade, split)) for grade in GRADES for _ in range(150)
        }
        for split in SPLITS
    }
    for split, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert answers_by_split[split].isdisjoint(answers_by_split[other])


def _content(task: Task) -> tuple[str, ...]:
    """What a prompt asks, without its wording: operands, in any order, and the answer."""
    pattern = r"\d+|[A-Z]+(?![a-z])|[()\[\]{}]|[A-Z][a-z]+ has [a-z]+|left|right"
    operands = _operands(task.prompt.replace("I have", "").replace("I get", ""), pattern)
    asked = _operands(task.prompt, r"[Ww]ho has [a-z]+|does [A-Z][a-z]+ have")
    ordered = operands if task.family == "brackets" else sorted(operands)
    return (*ordered, *(question.lower() for question in asked), task.answer)


def test_the_shares_of_the_splits_are_as_stated() -> None:
    """About a tenth of all questions is kept for tests and a twentieth for validation."""
    splits = [split_of("add", str(index)) for index in range(10_000)]
    assert splits.count("test") == pytest.approx(1000, abs=150)
    assert splits.count("validation") == pytest.approx(470, abs=100)


def test_swapped_operands_are_the_same_question() -> None:
    """3 + 5 in training and 5 + 3 in the test would be a leak."""
    family = FAMILIES["add"]
    rng = Random(3)
    for _ in range(200):
        operands = family.draw(rng, 2)
        a, b = operands.operands["a"], operands.operands["b"]
        assert operands.content == " ".join(sorted((a, b), key=int))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_phrased_in_many_ways(family: str) -> None:
    """At least eight different wordings, none of them twice."""
    templates = ALL_FAMILIES[family].templates
    assert len(templates) >= 8
    assert len(set(templates)) == len(templates)


def test_the_held_out_family_is_not_trained() -> None:
    """No stream of training tasks contains it."""
    assert HELD_OUT_FAMILY.name not in FAMILIES
    drawn = {task_at(0, index, "train").family for index in islice(range(10_000), 2000)}
    assert drawn == set(FAMILIES)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_higher_grades_are_longer(family: str) -> None:
    """On average each grade's question and answer have at least the length of the grade before."""
    rng = Random(11)
    lengths = []
    for grade in GRADES:
        tasks = [generate(rng, family, grade, "train") for _ in range(200)]
        lengths.append(sum(len(task.prompt) + len(task.answer) for task in tasks))
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("DCBA", True),
        (" DCBA\n", True),
        ("DCBA.", False),
        ("dcba", False),
        ("DCB", False),
        ("", False),
    ],
)
def test_only_the_exact_answer_is_correct(text: str, correct: bool) -> None:
    """White space around the answer is forgiven, nothing else is."""
    assert is_correct(Task("reverse", 1, "Reverse ABCD.", "DCBA"), text) is correct


def test_unknown_cells_are_refused() -> None:
    """A family, grade or split that does not exist is an error, not another task."""
    with pytest.raises(KeyError):
        generate(Random(0), "poetry", 1, "train")
    with pytest.raises(ValueError, match="grade"):
        generate(Random(0), "add", 5, "train")
    with pytest.raises(ValueError, match="split"):
        generate(Random(0), "add", 1, "holdout")  # type: ignore[arg-type] # on purpose
