"""Drills: training conversations that ask many small questions about one context at once.

Owns: four of them, for the families whose answers are one or two tokens long.
Does not know: how often they are drawn, tokens, models.

Why: retrieval by name, by place and counting are learnt from the number of answers seen, and an
ordinary question spends 35 tokens on one. After 280,000 conversations without drills a model of
0.44 M parameters still guessed in `follow`, `lookup`, `pick` and `count`. With a third of 190,000
more being drills it learnt `pick`; the other three it did not, nor did the strategic model with
9,000 dense drills: kept here because a negative result is one.

A drill's answer is a list of key and value in random order. Only values carry loss, and of these
only those whose question belongs to training: a drill gives no test answer away. Dense drills give
the list several times, each time in another order: copying a value from one's own earlier list is
the easy step towards finding it in the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from tasks import (
    FAMILIES,
    GRADES,
    count_content,
    follow_content,
    lookup_content,
    pick_content,
    split_of,
)


@dataclass(frozen=True, slots=True)
class Drill:
    """A prompt, and what its answer lists: rows of key, value and the content of the question."""

    prompt: str
    family: str
    rows: tuple[tuple[str, str, str], ...]
    mark: str

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """The answer in pieces of text, each with whether it carries loss."""
        pieces: list[tuple[str, bool]] = []
        for key, value, content in self.rows:
            pieces += [(key + self.mark, False), (value, split_of(self.family, content) == "train")]
        return pieces


def _drill(
    rng: Random, prompt: str, family: str, rows: Sequence[tuple[str, str, str]], mark: str = ""
) -> Drill:
    """From rows of key, value and the content of the question about them."""
    shuffled = list(rows)
    rng.shuffle(shuffled)
    return Drill(prompt, family, tuple(shuffled), mark)


def _follow(rng: Random, grade: int) -> Drill:
    listed = FAMILIES["follow"].draw(rng, grade).operands["listed"]
    values = dict(re.findall(r"(\w)=(\w)", listed))

    def resolve(name: str) -> str:
        return name if name.isdigit() else resolve(values[name])

    rows = [(name, resolve(name), follow_content(name, listed)) for name in values]
    return _drill(rng, f"{listed}. Give them all.", "follow", rows)


def _lookup(rng: Random, grade: int) -> Drill:
    table = FAMILIES["lookup"].draw(rng, grade).operands["table"]
    people = re.findall(r"(\w+) has (\w+)", table)
    if rng.random() < 0.5:
        rows = [
            (who, what, lookup_content(people, f"What does {who} have?")) for who, what in people
        ]
        prompt = f"{table}. What does each have?"
    else:
        rows = [(what, who, lookup_content(people, f"Who has {what}?")) for who, what in people]
        prompt = f"{table}. Who has each?"
    return _drill(rng, prompt, "lookup", rows, ":")


def _pick(rng: Random, grade: int) -> Drill:
    operands = FAMILIES["pick"].draw(rng, grade).operands
    word, side = operands["word"], operands["side"]
    letters = word if side == "left" else word[::-1]
    rows = [
        (str(place), letter, pick_content(side, str(place), word))
        for place, letter in enumerate(letters[:9], start=1)
    ]
    return _drill(rng, f"Number the letters of {word} from the {side}.", "pick", rows)


def _count(rng: Random, grade: int) -> Drill:
    word = FAMILIES["count"].draw(rng, grade).operands["word"]
    rows = [
        (letter, str(word.count(letter)), count_content(letter, word))
        for letter in sorted(set(word))
    ]
    return _drill(rng, f"Count each letter in {word}.", "count", rows)


_DRILLS: tuple[Callable[[Random, int], Drill], ...] = (_follow, _lookup, _pick, _count)


def draw_drill(rng: Random, grade_weights: Sequence[float]) -> Drill:
    """A drill of a random kind at a random grade."""
    return rng.choice(_DRILLS)(rng, rng.choices(GRADES, grade_weights)[0])


_DENSE_KINDS = (_follow, _follow, _lookup, _lookup, _count)
_NUM_LISTS = 3


def draw_dense_drill(rng: Random, grade_weights: Sequence[float]) -> Drill:
    """A drill, more often about retrieval, that lists its answers several times."""
    drill = rng.choice(_DENSE_KINDS)(rng, rng.choices(GRADES, grade_weights)[0])
    rows = list(drill.rows)
    for _ in range(_NUM_LISTS - 1):
        rows += rng.sample(drill.rows, len(drill.rows))
    return replace(drill, rows=tuple(rows))
