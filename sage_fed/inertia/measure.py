"""Loads each model of a pair by each method and times it.

Owns the order: one model at a time, so that the larger one has the memory to itself.
A model that cannot be loaded or run leaves its reason behind, and the others are measured.
Fails with `ModelLoadError` where there is nothing to measure: no such device or checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from sage_fed.core import Tier
from sage_fed.engine import (
    begin_host_peak,
    describe_device,
    host_peak_bytes,
    locate,
    memory_used_bytes,
    read_bandwidth_bytes_per_s,
    read_spec,
)
from sage_fed.errors import DeviceOutOfMemory, ModelLoadError
from sage_fed.inertia.figures import Findings, Method, Plan, Point, Run
from sage_fed.inertia.subjects import Subject, load

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
