"""Tasks in plain English with graded difficulty and exact answers.

The bundled pair of models is trained and evaluated on them; later evaluations of routing use them.
Owns: the families (about numbers, about strings of capital letters, about a context given in the
prompt), their wordings and exact answers; which family is held out of training; the hash that
sorts questions into train, validation and test.
Does not know: models, tokenizers, chat templates.
Fails: `KeyError` for an unknown family, `ValueError` for an unknown grade or split.

Everything is a pure function of its arguments and of the `random.Random` handed in.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
GRADES: tuple[int, ...] = (1, 2, 3, 4)

# Of 256 hash values, how many go to each split that is not training.
_NUM_TEST_BUCKETS = 26
_NUM_VALIDATION_BUCKETS = 12


@dataclass(frozen=True, slots=True)
class Task:
    """One question with its one exact answer."""

    family: str
    grade: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Instance:
    """The operands of a question before it is phrased.

    `content` is the canonical form of what is asked: two instances that are the same question up to
    wording (3 + 5 and 5 + 3) have the same content, and therefore fall into the same split.
    """

    operands: Mapping[str, str]
    answer: str
    content: str


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of question: how to draw an instance at a grade, and many ways to phrase it."""

    name: str
    draw: Callable[[Random, int], Instance]
    templates: tuple[str, ...]

    def task(self, rng: Random, grade: int, split: Split) -> Task:
        """Draw one task whose content belongs to `split`.

        Rejection on the content's hash: no wording, seed or order of calls can put a test question
        into training.
        """
        if grade not in GRADES:
            raise ValueError(f"grade must be one of {GRADES}, not {grade}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
        while True:
            instance = self.draw(rng, grade)
            if split_of(self.name, instance.content) == split:
                break
        prompt = rng.choice(self.templates).format(**instance.operands)
        return Task(self.name, grade, prompt, instance.answer)


def _family(*templates: str) -> Callable[[Callable[[Random, int], Instance]], Family]:
    """Make a family, with the function's name and these wordings, of a function that draws."""
    return lambda draw: Family(draw.__name__, draw, templates)


def split_of(family: str, content: str) -> Split:
    """The split that owns a question: about 85 % train, 5 % validation, 10 % test."""
    bucket = hashlib.blake2b(f"{family}|{content}".encode(), digest_size=1).digest()[0]
    if bucket < _NUM_TEST_BUCKETS:
        return "test"
    if bucket < _NUM_TEST_BUCKETS + _NUM_VALIDATION_BUCKETS:
        return "validation"
    return "train"


def _number(rng: Random, num_digits: int) -> int:
    """A number with exactly `num_digits` digits."""
    return rng.randrange(10 ** (num_digits - 1), 10**num_digits)


@_family(
    "What is {a} plus {b}?",
    "What is {a}+{b}?",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "Find the sum of {a} and {b}.",
    "{a}+{b}=",
    "How much is {a} plus {b}?",
    "Give the sum of {a} and {b}.",
    "Put {a} and {b} together. What is the sum?",
    "I have {a} and get {b} more. How many is that?",
)
def add(rng: Random, grade: int) -> Instance:
    if grade == 1:
        a, b = _number(rng, 2), rng.randrange(1, 10)
        if rng.random() < 0.5:
            a, b = b, a
    else:
        a, b = _number(rng, grade), _number(rng, grade)
    content = f"{min(a, b)} {max(a, b)}"
    return Instance({"a": str(a), "b": str(b)}, str(a + b), content)


@_family(
    "What is {a} minus {b}?",
    "What is {a}-{b}?",
    "Take {b} from {a}.",
    "Take {b} away from {a}. What is left?",
    "Find {a} minus {b}.",
    "{a}-{b}=",
    "How much is {a} minus {b}?",
    "How much more than {b} is {a}?",
    "Give the difference of {a} and {b}.",
    "I have {a} and give {b} away. How many are left?",
)
def subtract(rng: Random, grade: int) -> Instance:
    a, b = (
        (_number(rng, 2), rng.randrange(1, 10))
        if grade == 1
        else (_number(rng, grade), _number(rng, grade))
    )
    a, b = max(a, b), min(a, b)
    return Instance({"a": str(a), "b": str(b)}, str(a - b), f"{a} {b}")


@_family(
    "Which number is the largest: {numbers}?",
    "Which is the largest of {numbers}?",
    "Find the largest number of {numbers}.",
    "Give the largest number in this list: {numbers}.",
    "What is the largest of {numbers}?",
    "The numbers are {numbers}. Which is the largest?",
    "Of the numbers {numbers}, which is the biggest?",
    "Write the biggest number: {numbers}.",
)
def largest(rng: Random, grade: int) -> Instance:
    num_numbers, num_digits = ((2, 2), (2, 3), (3, 3), (5, 4))[grade - 1]
    numbers = {_number(rng, num_digits)}
    while len(numbers) < num_numbers:
        # Half of the numbers share their leading digits with an earlier one: otherwise the first
        # digit alone would decide almost always.
        other = _number(rng, num_digits)
        if rng.random() < 0.5:
            tail = 10 ** rng.randrange(1, num_digits)
            other = rng.choice(sorted(numbers)) // tail * tail + other % tail
        numbers.add(other)
    shuffled = sorted(numbers)
    content = " ".join(str(number) for number in shuffled)
    rng.shuffle(shuffled)
    listed = ", ".join(str(number) for number in shuffled)
    return Instance({"numbers": listed}, str(max(numbers)), content)


LETTERS = string.ascii_uppercase


def _word(rng: Random, span: tuple[int, int], letters: Sequence[str] = LETTERS) -> str:
    """A word whose length lies in `span`, both ends included."""
    return "".join(rng.choices(letters, k=rng.randint(*span)))


@_family(
    "Reverse {word}.",
    "Reverse the letters of {word}.",
    "Write {word} backwards.",
    "Write the letters of {word} backwards.",
    "What is {word} backwards?",
    "Turn {word} around.",
    "Spell {word} backwards.",
    "Give {word} from the last letter to the first.",
    "How do you write {word} backwards?",
)
def reverse(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((2, 4), (5, 6), (7, 9), (10, 14))[grade - 1])
    return Instance({"word": word}, word[::-1], word)


@_family(
    "Sort {word}.",
    "Sort the letters of {word}.",
    "Put the letters of {word} in order.",
    "Put {word} in order.",
    "Write the letters of {word} in order.",
    "Give the letters of {word} in order.",
    "Order the letters of {word} from first to last.",
    "What is {word} with the letters in order?",
    "How do you write {word} sorted?",
)
def sort(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((2, 3), (4, 5), (6, 8), (9, 12))[grade - 1])
    return Instance({"word": word}, "".join(sorted(word)), word)


@_family(
    "How many {letter} are in {word}?",
    "How many {letter} does {word} have?",
    "Count the letter {letter} in {word}.",
    "How many times does {letter} appear in {word}?",
    "How many letters of {word} are {letter}?",
    "In {word}, how many times is {letter} used?",
    "Find how many {letter} there are in {word}.",
    "What is the number of {letter} in {word}?",
)
def count(rng: Random, grade: int) -> Instance:
    letters = rng.sample(LETTERS, 3)
    word = _word(rng, ((3, 5), (6, 8), (9, 12), (13, 18))[grade - 1], letters)
    operands = {"word": word, "letter": letters[0]}
    return Instance(operands, str(word.count(letters[0])), count_content(letters[0], word))


def count_content(letter: str, word: str) -> str:
    """What a count asks."""
    return f"{letter} {word}"


@_family(
    "What is letter {place} from the {side} of {word}?",
    "Which letter is number {place} from the {side} in {word}?",
    "Give letter {place} from the {side} in {word}.",
    "Find letter {place} of {word}, from the {side}.",
    "In {word}, which letter is number {place} from the {side}?",
    "Count from the {side} of {word}. What is letter {place}?",
    "Take letter {place} from the {side} of {word}.",
    "From the {side}, what is letter {place} in {word}?",
)
def pick(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((3, 4), (5, 6), (7, 9), (10, 14))[grade - 1])
    # Places stay below ten: a place is one digit, like the words for it.
    place = rng.randint(1, min(len(word), 9))
    side = rng.choice(("left", "right"))
    answer = word[place - 1] if side == "left" else word[-place]
    operands = {"word": word, "place": str(place), "side": side}
    return Instance(operands, answer, pick_content(side, str(place), word))


def pick_content(side: str, place: str, word: str) -> str:
    """What a pick asks."""
    return f"{side} {place} {word}"


@_family(
    "Shift {word} by {step}.",
    "Shift each letter of {word} by {step}.",
    "Move each letter of {word} by {step}.",
    "Move the letters of {word} forward by {step}.",
    "What is {word} shifted by {step}?",
    "Write {word} with each letter shifted by {step}.",
    "Step each letter of {word} forward {step} times.",
    "Give {word} with each letter moved forward by {step}.",
)
def shift(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((1, 2), (3, 4), (3, 5), (5, 8))[grade - 1])
    step = rng.randint(1, (1, 1, 3, 5)[grade - 1])
    shifted = "".join(LETTERS[(LETTERS.index(letter) + step) % 26] for letter in word)
    return Instance({"word": word, "step": str(step)}, shifted, f"{step} {word}")


@_family(
    "Write {word} without repeated letters.",
    "Write each letter of {word} once.",
    "Give the letters of {word}, each of them once.",
    "Take the repeated letters out of {word}.",
    "Which letters does {word} have? Write each one once.",
    "What is {word} without repeated letters?",
    "Remove the repeats from {word}.",
    "Keep the first of each letter in {word}.",
)
def dedupe(rng: Random, grade: int) -> Instance:
    letters = rng.sample(LETTERS, grade + 1)
    word = _word(rng, ((3, 4), (5, 6), (7, 9), (10, 14))[grade - 1], letters)
    return Instance({"word": word}, "".join(dict.fromkeys(word)), word)


_PEOPLE = ("Ana", "Bo", "Cy", "Dan", "Eva", "Finn", "Gus", "Hal", "Ivy", "Jo")
_COLOURS = ("red", "blue", "green", "pink", "gold", "black", "white", "grey", "brown", "tan")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@_family(
    "{table}. {ask}",
    "{ask} {table}.",
    "We know: {table}. {ask}",
    "{table}. Now {ask_plain}",
    "Look: {table}. {ask}",
    "If {table}, {ask_plain}",
    "{table}. Tell me: {ask_plain}",
    "Read this. {table}. {ask}",
)
def lookup(rng: Random, grade: int) -> Instance:
    num_rows = rng.randint(*((2, 2), (3, 4), (5, 6), (7, 8))[grade - 1])
    people = rng.sample(_PEOPLE, num_rows)
    colours = rng.sample(_COLOURS, num_rows)
    rows = list(zip(people, colours, strict=True))
    person, colour = rng.choice(rows)
    table = ", ".join(f"{who} has {what}" for who, what in rows)
    if rng.random() < 0.5:
        ask, ask_plain, answer = f"Who has {colour}?", f"who has {colour}?", person
    else:
        ask, ask_plain, answer = f"What does {person} have?", f"what does {person} have?", colour
    operands = {"table": table, "ask": ask, "ask_plain": ask_plain}
    return Instance(operands, answer, lookup_content(rows, ask))


def lookup_content(rows: Sequence[tuple[str, str]], ask: str) -> str:
    """What a lookup asks: the order of the table's rows does not matter."""
    return f"{sorted(rows)} {ask}"


@_family(
    "{listed}. What is {name}?",
    "If {listed}, what is {name}?",
    "We know: {listed}. What is {name}?",
    "{listed}. Find {name}.",
    "Look: {listed}. Which number is {name}?",
    "{listed}. Give the number {name}.",
    "What is {name} if {listed}?",
    "Read this. {listed}. Tell me {name}.",
)
def follow(rng: Random, grade: int) -> Instance:
    num_names, num_hops = ((3, 0), (4, 1), (6, 2), (8, 3))[grade - 1]
    names = rng.sample(LETTERS, num_names)
    digits = rng.sample("0123456789", num_names - num_hops)
    chain, others = names[: num_hops + 1], names[num_hops + 1 :]
    values = {chain[0]: digits[0]}
    values.update(zip(chain[1:], chain, strict=False))
    values.update(zip(others, digits[1:], strict=True))
    # Every name is given before it is used, except at the last grade.
    order = sorted(names)
    rng.shuffle(order)
    if grade < 4:
        slots = sorted(order.index(name) for name in chain)
        for slot, name in zip(slots, chain, strict=True):
            order[slot] = name
    listed = ", ".join(f"{name}={values[name]}" for name in order)
    return Instance(
        {"listed": listed, "name": chain[-1]}, digits[0], follow_content(chain[-1], listed)
    )


def follow_content(name: str, listed: str) -> str:
    """What a question about a name asks."""
    return f"{name} {listed}"


@_family(
    "Close the brackets: {text}",
    "Close {text}",
    "Which brackets close {text}",
    "Write the brackets that close {text}",
    "What is needed to close {text}",
    "These brackets are open: {text} Close them.",
    "Give the brackets that are left to close: {text}",
    "Find the brackets that close {text}",
)
def brackets(rng: Random, grade: int) -> Instance:
    num_symbols = rng.randint(*((2, 4), (5, 7), (8, 11), (12, 16))[grade - 1])
    min_open = (1, 2, 3, 4)[grade - 1]
    while True:
        opened: list[str] = []
        text = ""
        for _ in range(num_symbols):
            if opened and rng.random() < 0.35:
                text += _CLOSING[opened.pop()]
            else:
                opened.append(rng.choice(tuple(_CLOSING)))
                text += opened[-1]
        if len(opened) >= min_open:
            return Instance({"text": text}, "".join(_CLOSING[b] for b in reversed(opened)), text)


_TRAINED = (
    add, subtract, largest, reverse, sort, count, pick, shift, lookup, follow, brackets,
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _TRAINED}
"""The families that the models are trained on, by name."""

HELD_OUT_FAMILY: Family = dedupe
"""Never trained on, in any split: what a model does with a kind of question it has never seen."""

ALL_FAMILIES: dict[str, Family] = {**FAMILIES, dedupe.name: dedupe}


def generate(rng: Random, family: str, grade: int, split: Split) -> Task:
    """Draw one task of a family at a grade (1 easy to 4 hard) from a split."""
    return ALL_FAMILIES[family].task(rng, grade, split)


def task_at(
    seed: int,
    index: int,
    split: Split,
    families: Sequence[str] = tuple(FAMILIES),
    grades: Sequence[int] = GRADES,
) -> Task:
    """The task at a place in an endless stream: the same for the same arguments, always."""
    rng = Random(f"{seed} {index} {split}")
    return generate(rng, rng.choice(families), rng.choice(grades), split)


def is_correct(task: Task, text: str) -> bool:
    """Whether a reply is the exact answer, white space around it aside."""
    return text.strip() == task.answer
