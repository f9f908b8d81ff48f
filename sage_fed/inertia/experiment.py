"""What is measured of a pair, in words that measuring, comparing and reporting share.

Times are seconds, sizes bytes. Fails never.

Loads each model of a pair by each method and times it.

Owns the order: one model at a time, so that the larger one has the memory to itself.
A model that cannot be loaded or run leaves its reason behind, and the others are measured.
Fails with `ModelLoadError` where there is nothing to measure: no such device or checkpoint.

A model that is loaded to be timed: by the engine, or by the published method.

Owns: how a batch is decoded by each, and what each says of itself. Both compute every token of
the batch, greedily, and no token ends a text.
Fails: `ModelLoadError` from the constructors, `DeviceOutOfMemory` from `generate`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import gc
import importlib.metadata
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from sage_fed.core import TIER_ROLES, Sampling, Tier
from sage_fed.engine import (
    EngineOptions,
    begin_host_peak,
    describe_device,
    host_peak_bytes,
    load_engine,
    locate,
    memory_used_bytes,
    read_bandwidth_bytes_per_s,
    read_spec,
)
from sage_fed.engine.reference import ReferenceModel
from sage_fed.errors import DeviceOutOfMemory, ModelLoadError
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step


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


_WARM_TOKENS = 3
_SPECIAL_IDS = 256
"""The lowest ids are special tokens and bytes in many tokenizers."""


class Progress(Protocol):
    """Who is told what is going on."""

    def __call__(self, run: int, text: str, share: float | None) -> None:
        """`run` counts the plan's runs from 0; `share` of it is loaded, None where unknown."""


def measure(plan: Plan, progress: Progress, each: Callable[[Findings], None]) -> Findings:
    """Measure every run of the plan; blocks, for minutes where the models are large.

    `each` gets the findings so far after every run: what is interrupted is not all lost.

    Raises:
        ModelLoadError: the device is absent, or a checkpoint is none.
    """
    device = describe_device(plan.device)
    vocab = min(
        read_spec(locate(ref.model, ref.revision)).vocab_size
        for ref in (plan.tactical, plan.strategic)
    )
    bench = _Bench(plan, vocab, progress)
    threads = f", {device.threads} threads" if device.threads else ""
    findings = Findings(
        plan=plan,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        machine=f"{device.name}{threads}",
        runs=(),
        threads=device.threads or None,
    )
    for index, way in enumerate(plan.runs):
        findings = dataclasses.replace(findings, runs=(*findings.runs, bench.run(index, *way)))
        each(findings)
    return findings


class _Bench:
    """The plan, and who is told."""

    def __init__(self, plan: Plan, vocab: int, progress: Progress) -> None:
        self._plan = plan
        self._ids = range(min(_SPECIAL_IDS, vocab // 2), vocab)
        self._progress = progress

    def run(self, index: int, method: Method, precision: str, tier: Tier) -> Run:
        """Load, time and free one model."""
        device = self._plan.device
        gc.collect()  # the model before this one
        before_bytes = memory_used_bytes(device)
        peak_known = begin_host_peak()
        subject: Subject | None = None
        try:
            self._progress(index, "loading", 0.0)
            subject = load(
                self._plan, method, precision, tier,
                lambda share: self._progress(index, "loading", share),
            )  # fmt: skip
            peak_bytes = host_peak_bytes() if peak_known else None
            after_bytes = memory_used_bytes(device)
            return dataclasses.replace(
                subject.describe(),
                memory_bytes=_grown(before_bytes, after_bytes),
                peak_host_bytes=peak_bytes,
                points=tuple(self._point(index, subject, b) for b in self._plan.batches),
                bandwidth_bytes_per_s=read_bandwidth_bytes_per_s(device),
            )
        except (ModelLoadError, DeviceOutOfMemory) as error:
            self._progress(index, f"failed: {error.message}", None)
            return Run(method, precision, tier, failure=error.message)
        finally:
            if subject is not None:
                subject.close()

    def _point(self, index: int, subject: Subject, batch: int) -> Point:
        """One batch size: a short warm-up, then the repeats."""
        plan = self._plan
        subject.generate(self._prompts(batch, 0), min(_WARM_TOKENS, plan.new_tokens))
        totals: list[float] = []
        steps: list[float] = []
        for repeat in range(plan.repeats):
            self._progress(index, f"batch {batch}, {repeat + 1} of {plan.repeats}", None)
            prompts = self._prompts(batch, repeat + 1)
            began = time.perf_counter()
            stamps = subject.generate(prompts, plan.new_tokens)
            totals.append(time.perf_counter() - began)
            steps.append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
        total_s = median(totals)
        spread = (max(totals) - min(totals)) / total_s if len(totals) > 1 else None
        return Point(batch, plan.new_tokens, total_s, median(steps), spread)

    def _prompts(self, batch: int, seed: int) -> Sequence[Sequence[int]]:
        """Random ids, the same for both models and every method."""
        source = random.Random(f"{seed} {batch}")  # noqa: S311 - nothing secret
        return [source.choices(self._ids, k=self._plan.prompt_tokens) for _ in range(batch)]


def _grown(before_bytes: int | None, after_bytes: int | None) -> int | None:
    return None if before_bytes is None or after_bytes is None else after_bytes - before_bytes


_GREEDY = Sampling(temperature=0.0)


class Subject(Protocol):
    """A loaded model, whoever runs it."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Decode greedily; seconds at which each token of the whole batch came."""

    def describe(self) -> Run:
        """Who it is, without points and measured memory."""

    def close(self) -> None:
        """Free its memory."""


def load(
    plan: Plan, method: Method, precision: str, tier: Tier, progress: Callable[[float], None]
) -> Subject:
    """Load one model; `progress` gets the loaded share where it is known."""
    if method is Method.REFERENCE:
        return ReferenceSubject(plan, precision, tier)
    return EngineSubject(plan, precision, tier, progress)


class ReferenceSubject:
    """`transformers` and its `generate`."""

    def __init__(self, plan: Plan, precision: str, tier: Tier) -> None:
        ref = plan.model(tier)
        self._model = ReferenceModel(ref.model, ref.revision, plan.device, precision)
        self._identity = (Method.REFERENCE, precision, tier)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """One static batch."""
        return self._model.generate(prompts, new_tokens)

    def describe(self) -> Run:
        """What `transformers` loaded."""
        info = self._model.info
        return Run(
            *self._identity,
            parameters=info.parameters,
            num_layers=info.num_layers,
            weight_bytes=info.weight_bytes,
            step_bytes=info.step_bytes,
            kv_token_bytes=info.kv_token_bytes,
            load_s=info.load_s,
            software=info.software,
        )

    def close(self) -> None:
        """Free its memory."""
        self._model.close()


class EngineSubject:
    """This engine, alone: its steps, without scheduler and daemon."""

    def __init__(
        self, plan: Plan, precision: str, tier: Tier, progress: Callable[[float], None]
    ) -> None:
        ref = plan.model(tier)
        spec = read_spec(locate(ref.model, ref.revision))
        self._blocks_each = -(-(plan.prompt_tokens + plan.new_tokens) // BLOCK_SIZE)
        context = self._blocks_each * BLOCK_SIZE
        itemsize = 4 if precision == "fp32" else 2
        tokens = max(plan.batches) * context
        options = EngineOptions(
            model=ref.model,
            revision=ref.revision,
            kv_cache_bytes=tokens * spec.num_layers * spec.kv_width * itemsize,
            device=plan.device,
            precision=precision,
            max_context_tokens=min(context, spec.max_position),
        )
        self._engine = load_engine(options, progress)
        self._tier = tier
        self._num_layers = spec.num_layers

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        """Every prompt in one step, then one token of each sequence a step."""
        began = time.perf_counter()
        each = self._blocks_each
        blocks = [tuple(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        fed = [tuple(prompt) for prompt in prompts]
        start = 0
        stamps: list[float] = []
        for index in range(new_tokens):
            draw = Draw(_GREEDY, index)
            chunks = (Chunk(i, start, tokens, blocks[i], draw) for i, tokens in enumerate(fed))
            drawn = self._engine.run(Step(self._tier, tuple(chunks)))
            stamps.append(time.perf_counter() - began)
            start += len(fed[0])
            fed = [(one.token_id,) for one in drawn]
        return stamps

    def describe(self) -> Run:
        """What the engine says of itself."""
        info = self._engine.info
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("sage-fed", "torch"))
        return Run(
            Method.ENGINE,
            info.precision,
            self._tier,
            parameters=info.parameters,
            num_layers=self._num_layers,
            weight_bytes=info.weight_bytes,
            step_bytes=info.step_bytes,
            kv_token_bytes=info.kv_token_bytes,
            load_s=info.load_s,
            software=f"{', '.join(versions)}, {info.kernels} kernels",
        )

    def close(self) -> None:
        """Free its memory."""
        self._engine.close()
