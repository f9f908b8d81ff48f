"""From times to what they mean: slowdowns, the roofline, and a fit of what is not bandwidth.

Pure. Two limits of a decode step are told apart by `t = overhead x layers + bytes / rate`: what a
layer costs however small it is (launches, synchronisation, small operations), and the reading of
weights, keys and values. The published pair, put into it, gives 0.496 ms a layer and 118 GB/s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.inertia.figures import Findings, Method, Plan, Run


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How much slower the strategic model is, by one method at one precision and batch.

    `slowdown` compares seconds per 100 tokens, as was published, `step_slowdown` decode steps.
    `parameter_ratio` is the linear expectation; `efficiency` the slowdown as a share of it;
    `spread` what the repeats leave uncertain of it, as a share; None after a single one.
    """

    method: Method
    precision: str
    batch: int
    slowdown: float
    step_slowdown: float
    parameter_ratio: float
    bytes_ratio: float
    spread: float | None

    @property
    def efficiency(self) -> float:
        """Measured slowdown over parameter ratio: 1 is "twice the size, twice the time"."""
        return self.slowdown / self.parameter_ratio

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the repeats say that the slowdown is; both ends its value after a single one."""
        factor = 1 + (self.spread or 0.0)
        return self.slowdown / factor, self.slowdown * factor


@dataclass(frozen=True, slots=True)
class Roofline:
    """One decode step beside what the device's memory allows."""

    method: Method
    precision: str
    tier: Tier
    batch: int
    num_bytes: float
    step_s: float
    limit_s: float

    @property
    def share(self) -> float:
        """Of the measured read bandwidth."""
        return self.limit_s / self.step_s


@dataclass(frozen=True, slots=True)
class Fit:
    """`t = overhead_s x layers + bytes / bytes_per_s` through decode steps of one sequence.

    `error` is the largest distance of a point, as a share of its time. `clamped`: the best
    overhead would be negative, so the rate alone was fitted. `small_share` is the overhead's
    share of the tactical model's step at the first precision.
    """

    method: Method
    precisions: tuple[str, ...]
    overhead_s: float
    bytes_per_s: float
    error: float
    clamped: bool
    small_share: float


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that follows from the findings by arithmetic."""

    slowdowns: tuple[Slowdown, ...]
    rooflines: tuple[Roofline, ...]
    fits: tuple[Fit, ...]

    def slowdown(self, method: Method, precision: str, batch: int) -> Slowdown | None:
        """One row, if both its models were measured."""
        keys = (method, precision, batch)
        return next((s for s in self.slowdowns if (s.method, s.precision, s.batch) == keys), None)


def analyse(findings: Findings) -> Analysis:
    """Compare every pair of runs that was measured."""
    plan = findings.plan
    pairs = list(_pairs(findings.runs))
    fits = [_fit(plan, (small, large)) for small, large in pairs]
    engine = [run for pair in pairs for run in pair if run.method is Method.ENGINE]
    if len({run.precision for run in engine}) > 1:
        fits.append(_fit(plan, engine))
    return Analysis(
        slowdowns=tuple(
            row
            for small, large in pairs
            for batch in plan.batches
            if (row := _slowdown(plan, small, large, batch)) is not None
        ),
        rooflines=tuple(
            Roofline(
                run.method, run.precision, run.tier, point.batch, num_bytes, point.step_s,
                num_bytes / run.bandwidth_bytes_per_s,
            )
            for run in findings.runs
            for point in run.points
            for num_bytes in (run.bytes_per_step(point.batch, plan.context_tokens),)
        ),
        fits=tuple(fit for fit in fits if fit is not None),
    )  # fmt: skip


def _pairs(runs: Iterable[Run]) -> Iterable[tuple[Run, Run]]:
    """Tactical and strategic runs of one method and precision that both have points."""
    done = {(r.method, r.precision, r.tier): r for r in runs if r.points}
    for (method, precision, tier), small in done.items():
        large = done.get((method, precision, Tier.STRATEGIC))
        if tier == Tier.TACTICAL and large is not None:
            yield small, large


def _slowdown(plan: Plan, small: Run, large: Run, batch: int) -> Slowdown | None:
    a, b = small.point(batch), large.point(batch)
    if a is None or b is None:
        return None
    context = plan.context_tokens
    return Slowdown(
        method=small.method,
        precision=small.precision,
        batch=batch,
        slowdown=b.total_s / a.total_s,
        step_slowdown=b.step_s / a.step_s,
        parameter_ratio=large.parameters / small.parameters,
        bytes_ratio=large.bytes_per_step(batch, context) / small.bytes_per_step(batch, context),
        spread=None if a.spread is None or b.spread is None else math.hypot(a.spread, b.spread),
    )


def _fit(plan: Plan, runs: Iterable[Run]) -> Fit | None:
    runs = tuple(runs)
    points = [
        (run.num_layers, run.bytes_per_step(1, plan.context_tokens), point.step_s)
        for run in runs
        if (point := run.point(1)) is not None
    ]
    found = fit(points)
    if found is None:
        return None
    overhead_s, bytes_per_s, clamped = found
    error = max(
        abs(overhead_s * layers + nbytes / bytes_per_s - step_s) / step_s
        for layers, nbytes, step_s in points
    )
    precisions = tuple(dict.fromkeys(run.precision for run in runs))
    small_layers, _, small_s = points[0]
    share = overhead_s * small_layers / small_s
    return Fit(runs[0].method, precisions, overhead_s, bytes_per_s, error, clamped, share)


def fit(points: Iterable[tuple[int, float, float]]) -> tuple[float, float, bool] | None:
    """Least squares of relative errors through (layers, bytes, seconds).

    Returns overhead seconds a layer, bytes a second, and whether the overhead had to be held at
    0; None where the points do not determine them.
    """
    rows = [(layers / step_s, nbytes / step_s) for layers, nbytes, step_s in points]
    if len(rows) < 2:
        return None
    ll = sum(x * x for x, _ in rows)
    bb = sum(y * y for _, y in rows)
    lb = sum(x * y for x, y in rows)
    l1, b1 = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = ll * bb - lb * lb
    if determinant <= 1e-9 * ll * bb:  # the same bytes a layer in all of them
        return None
    overhead_s = (l1 * bb - b1 * lb) / determinant
    per_byte = (b1 * ll - l1 * lb) / determinant
    if per_byte <= 0:
        return None
    if overhead_s < 0:
        return 0.0, bb / b1, True
    return overhead_s, 1 / per_byte, False
