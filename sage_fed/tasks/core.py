"""The shape of a task and of a family of tasks, and which split an instance belongs to.

Owns: `Task`, `Instance`, `Family`, and the hash that sorts instances into train, validation, test.
Does not know: any particular family, models, tokenizers.
Fails: `ValueError` for a grade or a split that does not exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
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


def split_of(family: str, content: str) -> Split:
    """The split that owns a question: about 85 % train, 5 % validation, 10 % test."""
    bucket = hashlib.blake2b(f"{family}|{content}".encode(), digest_size=1).digest()[0]
    if bucket < _NUM_TEST_BUCKETS:
        return "test"
    if bucket < _NUM_TEST_BUCKETS + _NUM_VALIDATION_BUCKETS:
        return "validation"
    return "train"
