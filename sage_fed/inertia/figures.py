"""What is measured of a pair, in words that measuring, comparing and reporting share.

Times are seconds, sizes bytes. Fails never.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sage_fed.core import TIER_ROLES, Tier


class Method(enum.Enum):
    """Who runs the model: `transformers` and its `generate`, as was published, or our engine."""

    REFERENCE = "reference"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A checkpoint: a directory, or a hub id with `revision`, a commit."""

    model: str
    name: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `reference_precision` None leaves the reference out."""

    tactical: ModelRef
    strategic: ModelRef
    device: str
    precisions: tuple[str, ...]
    reference_precision: str | None
    batches: tuple[int, ...]
    prompt_tokens: int = 32
    new_tokens: int = 100
    repeats: int = 3

    def model(self, tier: Tier) -> ModelRef:
        """The tier's checkpoint."""
        return self.tactical if tier == Tier.TACTICAL else self.strategic

    @property
    def runs(self) -> tuple[tuple[Method, str, Tier], ...]:
        """Every load of a model, in order; the two of a precision follow each other."""
        ways = [(Method.ENGINE, precision) for precision in self.precisions]
        if self.reference_precision is not None:
            ways.insert(0, (Method.REFERENCE, self.reference_precision))
        return tuple((method, precision, tier) for method, precision in ways for tier in TIER_ROLES)

    @property
    def context_tokens(self) -> float:
        """What a decode step attends to, on average."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True, slots=True)
class Point:
    """One batch size of one model, medians over the repeats.

    `total_s` is from the prompts to the last of `new_tokens` tokens of each sequence, `step_s`
    one decode step; `spread` is the width of the repeats' `total_s` over their median, None where
    a single repeat leaves it unknown.
    """

    batch: int
    new_tokens: int
    total_s: float
    step_s: float
    spread: float | None

    @property
    def hundred_s(self) -> float:
        """Seconds per 100 tokens of each sequence."""
        return 100 * self.total_s / self.new_tokens

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, prompts included in the time."""
        return self.batch * self.new_tokens / self.total_s


@dataclass(frozen=True, slots=True)
class Run:
    """One model loaded and timed by one method at one precision; `failure` says why it was not.

    `memory_bytes` is what a GPU holds more than before the load, `peak_host_bytes` the most that
    the process had resident on the host meanwhile; None where they cannot be known.
    `bandwidth_bytes_per_s` is the device's, measured beside the model.
    """

    method: Method
    precision: str
    tier: Tier
    failure: str = ""
    parameters: int = 0
    num_layers: int = 0
    weight_bytes: int = 0
    step_bytes: int = 0
    kv_token_bytes: int = 0
    load_s: float = 0.0
    memory_bytes: int | None = None
    peak_host_bytes: int | None = None
    bandwidth_bytes_per_s: float = 0.0
    software: str = ""
    points: tuple[Point, ...] = ()

    def point(self, batch: int) -> Point | None:
        """The point of a batch size, if it was measured."""
        return next((point for point in self.points if point.batch == batch), None)

    def bytes_per_step(self, batch: int, context_tokens: float) -> float:
        """What one decode step has to read: every weight once, each sequence's keys and values."""
        return self.step_bytes + batch * context_tokens * self.kv_token_bytes


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured; `date` is ISO 8601, `machine` the device's own name.

    `threads` are those of both methods on a CPU; None on a GPU.
    """

    plan: Plan
    date: str
    machine: str
    runs: tuple[Run, ...]
    threads: int | None = None

    @property
    def software(self) -> str:
        """Versions of whoever ran."""
        return "; ".join(dict.fromkeys(run.software for run in self.runs if run.software))
