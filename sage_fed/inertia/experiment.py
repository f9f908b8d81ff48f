"""The published experiment: load each model of a pair by each method, and time it.

Owns what is measured (`Plan`), in which order, and the figures (`Findings`): times are seconds,
sizes bytes. One model is loaded at a time, so that the larger one has the memory to itself; both
methods compute every token of a batch, greedily, and no token ends a text.
A model that cannot be loaded or run leaves its reason behind, and the others are measured.
Fails with `ModelLoadError` where there is nothing to measure: no such device or checkpoint.
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import gc
import importlib.metadata
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from sage_fed.core import TIER_ROLES, Sampling, Tier
from sage_fed.engine import (
    EngineOptions,
    begin_host_peak,
    describe_device,
    generate,
    host_peak_bytes,
    load_engine,
    locate,
    memory_used_bytes,
    read_bandwidth_bytes_per_s,
    read_spec,
)
from sage_fed.engine.reference import ReferenceModel
from sage_fed.errors import DeviceOutOfMemory, ModelLoadError
from sage_fed.steps import BLOCK_SIZE

_WARM_TOKENS = 3
_SPECIAL_IDS = 256
"""The lowest ids are special tokens and bytes in many tokenizers."""


class Method(enum.Enum):
    """What runs the model: `transformers` and its `generate`, as was published, or our engine."""

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
        """Versions of what ran."""
        return "; ".join(dict.fromkeys(run.software for run in self.runs if run.software))


Progress = Callable[[int, str, float | None], None]
"""Is told the number of the plan's run, from 0, what it does, and which share of it is loaded."""

_Told = Callable[[str, float | None], None]


def measure(plan: Plan, progress: Progress, each: Callable[[Findings], None]) -> Findings:
    """Measure every run of the plan; blocks, for minutes where the models are large.

    `each` gets the findings so far after every run: what is interrupted is not all lost.

    Raises:
        ModelLoadError: the device is absent, or a checkpoint is none.
    """
    device = describe_device(plan.device)
    specs = (read_spec(locate(ref.model, ref.revision)) for ref in (plan.tactical, plan.strategic))
    vocab_size = min(spec.vocab_size for spec in specs)
    threads = f", {device.threads} threads" if device.threads else ""
    findings = Findings(
        plan=plan,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        machine=f"{device.name}{threads}",
        runs=(),
        threads=device.threads or None,
    )
    for index, way in enumerate(plan.runs):
        run = _run(plan, way, vocab_size, functools.partial(progress, index))
        findings = replace(findings, runs=(*findings.runs, run))
        each(findings)
    return findings


def _run(plan: Plan, way: tuple[Method, str, Tier], vocab_size: int, told: _Told) -> Run:
    """Load, time and free one model."""
    method, precision, tier = way
    gc.collect()  # the model before this one
    before_bytes = memory_used_bytes(plan.device)
    peak_known = begin_host_peak()
    subject: _Subject | None = None
    try:
        told("loading", 0.0)
        if method is Method.REFERENCE:
            subject = _load_reference(plan, precision, tier)
        else:
            subject = _load_engine(plan, precision, tier, lambda share: told("loading", share))
        peak_bytes = host_peak_bytes() if peak_known else None
        after_bytes = memory_used_bytes(plan.device)
        grown_bytes = None
        if before_bytes is not None and after_bytes is not None:
            grown_bytes = after_bytes - before_bytes
        return replace(
            subject.run,
            memory_bytes=grown_bytes,
            peak_host_bytes=peak_bytes,
            points=tuple(_point(plan, subject, b, vocab_size, told) for b in plan.batches),
            bandwidth_bytes_per_s=read_bandwidth_bytes_per_s(plan.device),
        )
    except (ModelLoadError, DeviceOutOfMemory) as error:
        told(f"failed: {error.message}", None)
        return Run(method, precision, tier, failure=error.message)
    finally:
        if subject is not None:
            subject.close()


def _point(plan: Plan, subject: _Subject, batch: int, vocab_size: int, told: _Told) -> Point:
    """Time one batch size: a short warm-up, then the repeats."""
    ids = range(min(_SPECIAL_IDS, vocab_size // 2), vocab_size)

    def prompts(seed: int) -> Sequence[Sequence[int]]:
        """Return random ids, the same for both models and every method."""
        source = random.Random(f"{seed} {batch}")  # noqa: S311 - nothing secret
        return [source.choices(ids, k=plan.prompt_tokens) for _ in range(batch)]

    subject.generate(prompts(0), min(_WARM_TOKENS, plan.new_tokens))
    totals: list[float] = []
    steps: list[float] = []
    for repeat in range(1, plan.repeats + 1):
        told(f"batch {batch}, {repeat} of {plan.repeats}", None)
        drawn = prompts(repeat)
        began = time.perf_counter()
        stamps = subject.generate(drawn, plan.new_tokens)
        totals.append(time.perf_counter() - began)
        steps.append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
    total_s = median(totals)
    spread = (max(totals) - min(totals)) / total_s if len(totals) > 1 else None
    return Point(batch, plan.new_tokens, total_s, median(steps), spread)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A loaded model: `run` says which, without points and measured memory.

    `generate` decodes prompts of one length greedily, and returns the seconds at which each token
    of the whole batch came.
    """

    run: Run
    generate: Callable[[Sequence[Sequence[int]], int], list[float]]
    close: Callable[[], None]


def _load_reference(plan: Plan, precision: str, tier: Tier) -> _Subject:
    """Load a model by the published method: `transformers` and its `generate`."""
    ref = plan.model(tier)
    model = ReferenceModel(ref.model, ref.revision, plan.device, precision)
    run = Run(Method.REFERENCE, precision, tier, **asdict(model.info))
    return _Subject(run, model.generate, model.close)


def _load_engine(
    plan: Plan, precision: str, tier: Tier, progress: Callable[[float], None]
) -> _Subject:
    """Load a model by the engine, alone: its steps, without scheduler and daemon."""
    ref = plan.model(tier)
    spec = read_spec(locate(ref.model, ref.revision))
    blocks_each = -(-(plan.prompt_tokens + plan.new_tokens) // BLOCK_SIZE)
    context = blocks_each * BLOCK_SIZE
    token_bytes = spec.num_layers * spec.kv_width * (4 if precision == "fp32" else 2)
    options = EngineOptions(
        model=ref.model,
        revision=ref.revision,
        kv_cache_bytes=max(plan.batches) * context * token_bytes,
        device=plan.device,
        precision=precision,
        max_context_tokens=min(context, spec.max_position),
    )
    engine = load_engine(options, progress)

    def stamps(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
        return list(generate(engine, prompts, Sampling(), new_tokens, tier=tier).at_s)

    info = engine.info
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("sage-fed", "torch"))
    run = Run(
        Method.ENGINE,
        info.precision,
        tier,
        parameters=info.parameters,
        num_layers=spec.num_layers,
        weight_bytes=info.weight_bytes,
        step_bytes=info.step_bytes,
        kv_token_bytes=info.kv_token_bytes,
        load_s=info.load_s,
        software=f"{', '.join(versions)}, {info.kernels} kernels",
    )
    return _Subject(run, stamps, engine.close)
