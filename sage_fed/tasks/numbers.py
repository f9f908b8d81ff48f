"""Families about numbers: addition, subtraction, the largest of several.

Owns: their operands, exact answers and wordings.
Does not know: splits (they come from the content) or how a tokenizer cuts digits.
"""

from __future__ import annotations

from random import Random

from sage_fed.tasks.core import Family, Instance


def _number(rng: Random, num_digits: int) -> int:
    """A number with exactly `num_digits` digits."""
    return rng.randrange(10 ** (num_digits - 1), 10**num_digits)


def _draw_add(rng: Random, grade: int) -> Instance:
    if grade == 1:
        a, b = _number(rng, 2), rng.randrange(1, 10)
        if rng.random() < 0.5:
            a, b = b, a
    else:
        a, b = _number(rng, grade), _number(rng, grade)
    content = f"{min(a, b)} {max(a, b)}"
    return Instance({"a": str(a), "b": str(b)}, str(a + b), content)


def _draw_subtract(rng: Random, grade: int) -> Instance:
    a, b = (
        (_number(rng, 2), rng.randrange(1, 10))
        if grade == 1
        else (_number(rng, grade), _number(rng, grade))
    )
    a, b = max(a, b), min(a, b)
    return Instance({"a": str(a), "b": str(b)}, str(a - b), f"{a} {b}")


def _draw_largest(rng: Random, grade: int) -> Instance:
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


ADD = Family(
    "add",
    _draw_add,
    (
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
    ),
)

SUBTRACT = Family(
    "subtract",
    _draw_subtract,
    (
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
    ),
)

LARGEST = Family(
    "largest",
    _draw_largest,
    (
        "Which number is the largest: {numbers}?",
        "Which is the largest of {numbers}?",
        "Find the largest number of {numbers}.",
        "Give the largest number in this list: {numbers}.",
        "What is the largest of {numbers}?",
        "The numbers are {numbers}. Which is the largest?",
        "Of the numbers {numbers}, which is the biggest?",
        "Write the biggest number: {numbers}.",
    ),
)
