"""Families about strings of capital letters: reverse, sort, count, pick, shift, and `dedupe`.

Owns: their operands, exact answers and wordings.
Does not know: that `dedupe` is the family kept out of training (see the package's `__init__`).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random

from sage_fed.tasks.core import Family, Instance

LETTERS = string.ascii_uppercase


def _word(rng: Random, span: tuple[int, int], letters: Sequence[str] = LETTERS) -> str:
    """A word whose length lies in `span`, both ends included."""
    return "".join(rng.choices(letters, k=rng.randint(*span)))


def _draw_reverse(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((2, 4), (5, 6), (7, 9), (10, 14))[grade - 1])
    return Instance({"word": word}, word[::-1], word)


def _draw_sort(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((2, 3), (4, 5), (6, 8), (9, 12))[grade - 1])
    return Instance({"word": word}, "".join(sorted(word)), word)


def _draw_count(rng: Random, grade: int) -> Instance:
    letters = rng.sample(LETTERS, 3)
    word = _word(rng, ((3, 5), (6, 8), (9, 12), (13, 18))[grade - 1], letters)
    operands = {"word": word, "letter": letters[0]}
    return Instance(operands, str(word.count(letters[0])), count_content(letters[0], word))


def count_content(letter: str, word: str) -> str:
    """What a count asks."""
    return f"{letter} {word}"


def _draw_pick(rng: Random, grade: int) -> Instance:
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


def _draw_shift(rng: Random, grade: int) -> Instance:
    word = _word(rng, ((1, 2), (3, 4), (3, 5), (5, 8))[grade - 1])
    step = rng.randint(1, (1, 1, 3, 5)[grade - 1])
    shifted = "".join(LETTERS[(LETTERS.index(letter) + step) % 26] for letter in word)
    return Instance({"word": word, "step": str(step)}, shifted, f"{step} {word}")


def _draw_dedupe(rng: Random, grade: int) -> Instance:
    letters = rng.sample(LETTERS, grade + 1)
    word = _word(rng, ((3, 4), (5, 6), (7, 9), (10, 14))[grade - 1], letters)
    return Instance({"word": word}, "".join(dict.fromkeys(word)), word)


REVERSE = Family(
    "reverse",
    _draw_reverse,
    (
        "Reverse {word}.",
        "Reverse the letters of {word}.",
        "Write {word} backwards.",
        "Write the letters of {word} backwards.",
        "What is {word} backwards?",
        "Turn {word} around.",
        "Spell {word} backwards.",
        "Give {word} from the last letter to the first.",
        "How do you write {word} backwards?",
    ),
)

SORT = Family(
    "sort",
    _draw_sort,
    (
        "Sort {word}.",
        "Sort the letters of {word}.",
        "Put the letters of {word} in order.",
        "Put {word} in order.",
        "Write the letters of {word} in order.",
        "Give the letters of {word} in order.",
        "Order the letters of {word} from first to last.",
        "What is {word} with the letters in order?",
        "How do you write {word} sorted?",
    ),
)

COUNT = Family(
    "count",
    _draw_count,
    (
        "How many {letter} are in {word}?",
        "How many {letter} does {word} have?",
        "Count the letter {letter} in {word}.",
        "How many times does {letter} appear in {word}?",
        "How many letters of {word} are {letter}?",
        "In {word}, how many times is {letter} used?",
        "Find how many {letter} there are in {word}.",
        "What is the number of {letter} in {word}?",
    ),
)

PICK = Family(
    "pick",
    _draw_pick,
    (
        "What is letter {place} from the {side} of {word}?",
        "Which letter is number {place} from the {side} in {word}?",
        "Give letter {place} from the {side} in {word}.",
        "Find letter {place} of {word}, from the {side}.",
        "In {word}, which letter is number {place} from the {side}?",
        "Count from the {side} of {word}. What is letter {place}?",
        "Take letter {place} from the {side} of {word}.",
        "From the {side}, what is letter {place} in {word}?",
    ),
)

SHIFT = Family(
    "shift",
    _draw_shift,
    (
        "Shift {word} by {step}.",
        "Shift each letter of {word} by {step}.",
        "Move each letter of {word} by {step}.",
        "Move the letters of {word} forward by {step}.",
        "What is {word} shifted by {step}?",
        "Write {word} with each letter shifted by {step}.",
        "Step each letter of {word} forward {step} times.",
        "Give {word} with each letter moved forward by {step}.",
    ),
)

DEDUPE = Family(
    "dedupe",
    _draw_dedupe,
    (
        "Write {word} without repeated letters.",
        "Write each letter of {word} once.",
        "Give the letters of {word}, each of them once.",
        "Take the repeated letters out of {word}.",
        "Which letters does {word} have? Write each one once.",
        "What is {word} without repeated letters?",
        "Remove the repeats from {word}.",
        "Keep the first of each letter in {word}.",
    ),
)
