"""Tasks in plain English with graded difficulty and exact answers.

The bundled pair of models is trained and evaluated on them; later evaluations of routing use them.
Owns: the list of families, which one is held out of training, drawing and judging a task.
Does not know: models, tokenizers, chat templates.
Fails: `KeyError` for an unknown family, `ValueError` for an unknown grade or split.

Everything is a pure function of its arguments and of the `random.Random` handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sage_fed.tasks.contexts import BRACKETS, FOLLOW, LOOKUP
from sage_fed.tasks.core import GRADES, SPLITS, Family, Split, Task, split_of
from sage_fed.tasks.numbers import ADD, LARGEST, SUBTRACT
from sage_fed.tasks.strings import COUNT, DEDUPE, PICK, REVERSE, SHIFT, SORT

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "GRADES",
    "HELD_OUT_FAMILY",
    "SPLITS",
    "Family",
    "Split",
    "Task",
    "generate",
    "is_correct",
    "split_of",
    "task_at",
]

_TRAINED = (
    ADD, SUBTRACT, LARGEST, REVERSE, SORT, COUNT, PICK, SHIFT, LOOKUP, FOLLOW, BRACKETS,
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _TRAINED}
"""The families that the models are trained on, by name."""

HELD_OUT_FAMILY: Family = DEDUPE
"""Never trained on, in any split: what a model does with a kind of question it has never seen."""

ALL_FAMILIES: dict[str, Family] = {**FAMILIES, DEDUPE.name: DEDUPE}


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
    rng = Random(f"{seed} {index} {split}")  # noqa: S311 - reproducible, not secret
    return generate(rng, rng.choice(families), rng.choice(grades), split)


def is_correct(task: Task, text: str) -> bool:
    """Whether a reply is the exact answer, white space around it aside."""
    return text.strip() == task.answer
