"""Families about a context given in the prompt: look up, follow names, close brackets.

Owns: their operands, exact answers and wordings.
Does not know: splits (they come from the content) or how a tokenizer cuts names.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sage_fed.tasks.core import Family, Instance
from sage_fed.tasks.strings import LETTERS

_PEOPLE = ("Ana", "Bo", "Cy", "Dan", "Eva", "Finn", "Gus", "Hal", "Ivy", "Jo")
_COLOURS = ("red", "blue", "green", "pink", "gold", "black", "white", "grey", "brown", "tan")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _draw_lookup(rng: Random, grade: int) -> Instance:
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


def _draw_follow(rng: Random, grade: int) -> Instance:
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


def _draw_brackets(rng: Random, grade: int) -> Instance:
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


LOOKUP = Family(
    "lookup",
    _draw_lookup,
    (
        "{table}. {ask}",
        "{ask} {table}.",
        "We know: {table}. {ask}",
        "{table}. Now {ask_plain}",
        "Look: {table}. {ask}",
        "If {table}, {ask_plain}",
        "{table}. Tell me: {ask_plain}",
        "Read this. {table}. {ask}",
    ),
)

FOLLOW = Family(
    "follow",
    _draw_follow,
    (
        "{listed}. What is {name}?",
        "If {listed}, what is {name}?",
        "We know: {listed}. What is {name}?",
        "{listed}. Find {name}.",
        "Look: {listed}. Which number is {name}?",
        "{listed}. Give the number {name}.",
        "What is {name} if {listed}?",
        "Read this. {listed}. Tell me {name}.",
    ),
)

BRACKETS = Family(
    "brackets",
    _draw_brackets,
    (
        "Close the brackets: {text}",
        "Close {text}",
        "Which brackets close {text}",
        "Write the brackets that close {text}",
        "What is needed to close {text}",
        "These brackets are open: {text} Close them.",
        "Give the brackets that are left to close: {text}",
        "Find the brackets that close {text}",
    ),
)
