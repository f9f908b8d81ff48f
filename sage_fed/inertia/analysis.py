"""What the times mean: slowdowns, the roofline, a fit, and which of the note's claims hold.

Pure. Two limits of a decode step are told apart by `t = overhead x layers + bytes / rate`: what a
layer costs however small it is (launches, synchronisation, small operations), and the reading of
weights, keys and values. The published pair, put into it, gives 0.496 ms a layer and 118 GB/s.

Owns the note's claims and figures (2025-11-05, Jetson AGX Thor, fp16, `generate`, batch 1), and
the rule by which each is judged; a claim that was not tested is said to be that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.inertia.experiment import Findings, Method, Plan, Point, Run


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How much slower the strategic model is, by one method at one precision and batch.

    `slowdown` compares seconds per 100 tokens, as was published, `step_slowdown` decode steps.
    `parameter_ratio` is the linear expectation, `efficiency` the slowdown as a share of it: 1 is
    "twice the size, twice the time";
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
    efficiency: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the repeats say that the slowdown is; both ends its value after a single one."""
        factor = 1 + (self.spread or 0.0)
        return self.slowdown / factor, self.slowdown * factor


@dataclass(frozen=True, slots=True)
class Roofline:
    """One decode step beside what the device's memory allows; `share` is of the read bandwidth."""

    method: Method
    precision: str
    tier: Tier
    batch: int
    num_bytes: float
    step_s: float
    limit_s: float
    share: float


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
class Conclusion:
    """A claim, the verdict and the figures that it rests on."""

    claim: str
    verdict: str
    because: str


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that follows from the findings.

    `conclusions` judge the note's claims in its order, `precision` answers its open question.
    """

    slowdowns: tuple[Slowdown, ...]
    rooflines: tuple[Roofline, ...]
    fits: tuple[Fit, ...]
    conclusions: tuple[Conclusion, ...]
    precision: Conclusion


def analyse(findings: Findings) -> Analysis:
    """Compare every pair of runs that was measured, and judge the note's claims by them."""
    plan = findings.plan
    pairs = _pairs(findings.runs)
    slowdowns = [_slowdown(plan, *pair, batch) for pair in pairs for batch in plan.batches]
    rows = tuple(row for row in slowdowns if row is not None)
    fits = [_fit(plan, pair) for pair in pairs]
    engine = [run for pair in pairs for run in pair if run.method is Method.ENGINE]
    if len({run.precision for run in engine}) > 1:
        fits.append(_fit(plan, engine))
    known_fits = tuple(fit for fit in fits if fit is not None)
    return Analysis(
        slowdowns=rows,
        rooflines=tuple(
            _roofline(plan, run, point) for run in findings.runs for point in run.points
        ),
        fits=known_fits,
        conclusions=(
            _less_than_linear(rows),
            _published_ratio(plan, [row for row in rows if row.batch == 1]),
            _property_of_the_pair(rows),
            _memory(pairs),
            _load_time(pairs),
        ),
        precision=_precision(rows, known_fits),
    )


def _pairs(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Return the tactical and strategic runs of one method and precision that have points."""
    done = {(run.method, run.precision, run.tier): run for run in runs if run.points}
    return [
        (small, done[method, precision, Tier.STRATEGIC])
        for (method, precision, tier), small in done.items()
        if tier == Tier.TACTICAL and (method, precision, Tier.STRATEGIC) in done
    ]


def _slowdown(plan: Plan, small: Run, large: Run, batch: int) -> Slowdown | None:
    a, b = small.point(batch), large.point(batch)
    if a is None or b is None:
        return None
    context = plan.context_tokens
    slowdown, parameter_ratio = b.total_s / a.total_s, large.parameters / small.parameters
    return Slowdown(
        method=small.method,
        precision=small.precision,
        batch=batch,
        slowdown=slowdown,
        step_slowdown=b.step_s / a.step_s,
        parameter_ratio=parameter_ratio,
        bytes_ratio=large.bytes_per_step(batch, context) / small.bytes_per_step(batch, context),
        spread=None if a.spread is None or b.spread is None else math.hypot(a.spread, b.spread),
        efficiency=slowdown / parameter_ratio,
    )


def _roofline(plan: Plan, run: Run, point: Point) -> Roofline:
    num_bytes = run.bytes_per_step(point.batch, plan.context_tokens)
    limit_s = num_bytes / run.bandwidth_bytes_per_s
    return Roofline(
        *(run.method, run.precision, run.tier, point.batch),
        *(num_bytes, point.step_s, limit_s, limit_s / point.step_s),
    )


def _fit(plan: Plan, runs: Sequence[Run]) -> Fit | None:
    points = [
        (run.num_layers, run.bytes_per_step(1, plan.context_tokens), point.step_s)
        for run in runs
        if (point := run.point(1)) is not None
    ]
    found = fit(points)
    if found is None:
        return None
    overhead_s, bytes_per_s, clamped = found
    small_layers, _, small_s = points[0]
    return Fit(
        method=runs[0].method,
        precisions=tuple(dict.fromkeys(run.precision for run in runs)),
        overhead_s=overhead_s,
        bytes_per_s=bytes_per_s,
        error=max(
            abs(overhead_s * layers + num_bytes / bytes_per_s - step_s) / step_s
            for layers, num_bytes, step_s in points
        ),
        clamped=clamped,
        small_share=overhead_s * small_layers / small_s,
    )


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


NOTE_SLOWDOWN = 6.59
NOTE_CPU_SLOWDOWN = 8.46
NOTE_LOAD_RATIO = 272.76 / 2.99
NOTE_PARAMETER_RATIO = 14.0

_SAME = 0.10
"""Figures this close are called the same; more where the measurement itself is less certain."""
_PROPORTIONAL = 0.15
"""Scales and layers that stay in more bits than the rest move a ratio of bytes by this much."""
_PAIR_LIKE = 0.25
"""How far a pair's parameter ratio may be from the note's (nominal 14, counted 15.4)."""
_SMALLEST_CHANGE = 0.05
_NOISY = 0.25
"""A spread beyond this is a machine that was busy with something else: it proves no sameness.

A difference that is greater than all that the repeats leave uncertain is one all the same.
"""

HOLDS, FAILS, PARTLY, UNTESTED = "holds", "does not hold", "holds in part", "not tested"
UNCERTAIN = "too noisy to say"
PROVISIONAL = "one repeat: spread unknown, no verdict"


def _precision(rows: Sequence[Slowdown], fits: Sequence[Fit]) -> Conclusion:
    question = "does the scale change with precision?"
    rows = [row for row in rows if row.batch == 1 and row.method is Method.ENGINE]
    if len(rows) < 2:
        return Conclusion(question, UNTESTED, "fewer than two precisions of the engine measured")
    values = [row.slowdown for row in rows]
    change = max(values) / min(values) - 1
    listed = ", ".join(f"{row.slowdown:.2f} ({row.precision})" for row in rows)
    spread = _spread(rows)
    if spread is None:
        return Conclusion(question, PROVISIONAL, listed)
    noise = max(_SMALLEST_CHANGE, spread)
    if not _apart(rows):
        if spread > _NOISY:
            return Conclusion(question, UNCERTAIN, f"{listed}, with a spread of up to {spread:.0%}")
        if change <= noise:
            why = f"{listed}: {change:.0%} apart, within the {noise:.0%} of uncertainty"
            return Conclusion(question, "no", why)
    elif change <= _SMALLEST_CHANGE:
        why = f"{listed}: {change:.0%} apart, which is next to nothing"
        return Conclusion(question, "no", why)
    first, last = rows[0], rows[-1]
    falls = last.slowdown < first.slowdown
    why = f"{listed}: it {'falls' if falls else 'rises'} from {first.precision} to {last.precision}"
    shares = _overhead_shares(fits)
    if shares:
        why += f"; overhead of layers is, by fit, {shares} of the smaller model's step"
    return Conclusion(question, "yes", why)


def _less_than_linear(rows: Sequence[Slowdown]) -> Conclusion:
    claim = "the larger model is slower by less than its parameter ratio"
    if not rows:
        return Conclusion(claim, UNTESTED, "no pair was measured")
    below = [row for row in rows if row.bounds[1] < row.parameter_ratio]
    unsure = [row for row in rows if row not in below and (row.spread or 0.0) > _NOISY]
    low, high = min(r.efficiency for r in rows), max(r.efficiency for r in rows)
    because = (
        f"efficiency {low:.0%} to {high:.0%} (the note: 47 % on its GPU, 60 % on its CPU), "
        f"below 1 in {len(below)} of {len(rows)} cases"
    )
    if unsure:
        because += f", {UNCERTAIN} in {len(unsure)}"
    if _spread(rows) is None:
        verdict = PROVISIONAL
    elif len(below) == len(rows):
        verdict = HOLDS
    elif below:
        verdict = PARTLY
    else:
        verdict = UNCERTAIN if unsure else FAILS
    return Conclusion(claim, verdict, because)


def _published_ratio(plan: Plan, singles: Sequence[Slowdown]) -> Conclusion:
    on_cpu = plan.device == "cpu"
    published = NOTE_CPU_SLOWDOWN if on_cpu else NOTE_SLOWDOWN
    where = "CPU (its 0.5B estimated)" if on_cpu else "GPU"
    claim = f"a token of the larger model costs {published} of the smaller one's ({where})"
    reference = [row for row in singles if row.method is Method.REFERENCE]
    if not reference:
        return Conclusion(claim, UNTESTED, "the published method was not run")
    row = reference[0]
    if why := _unlike_the_note(row.parameter_ratio):
        return Conclusion(claim, UNTESTED, why)
    near = abs(row.slowdown / published - 1) <= max(_SAME, row.spread or 0.0)
    verdict = _unless_unsure(HOLDS if near else FAILS, row.spread)
    others = ", ".join(f"{s.slowdown:.2f} ({s.precision})" for s in singles if s is not row)
    because = f"{row.slowdown:.2f} by the published method in {row.precision}"
    because += f"; by this engine {others}" if others else ""
    return Conclusion(claim, verdict, because)


def _property_of_the_pair(rows: Sequence[Slowdown]) -> Conclusion:
    claim = "the slowdown is a property of the two models"
    if len(rows) < 2:
        return Conclusion(claim, UNTESTED, "it was measured one way only")
    low = min(rows, key=lambda row: row.slowdown)
    high = max(rows, key=lambda row: row.slowdown)
    spread = _spread((low, high))
    change = high.slowdown / low.slowdown - 1
    because = f"from {_told(low)} to {_told(high)} on one device"
    if spread is not None and change > _SAME and _apart(rows):
        return Conclusion(claim, FAILS, because)
    same = change <= max(_SAME, spread or 0.0)
    return Conclusion(claim, _unless_unsure(HOLDS if same else FAILS, spread), because)


def _memory(pairs: Sequence[tuple[Run, Run]]) -> Conclusion:
    """Of weights: bytes are counted, so one repeat is enough."""
    claim = "memory grows with the parameters"
    if not pairs:
        return Conclusion(claim, UNTESTED, "no pair was measured")
    growth = [
        (large.weight_bytes / small.weight_bytes, large.parameters / small.parameters, small)
        for small, large in pairs
    ]
    holds = all(abs(grown / parameters - 1) <= _PROPORTIONAL for grown, parameters, _ in growth)
    listed = ", ".join(f"{grown:.2f} ({r.method.value} {r.precision})" for grown, _, r in growth)
    because = (
        f"the larger model has {growth[0][1]:.2f} times the parameters, and its weights take this "
        f"many times the bytes: {listed}; within {_PROPORTIONAL:.0%} counts as the same"
    )
    return Conclusion(claim, HOLDS if holds else FAILS, because)


def _load_time(pairs: Sequence[tuple[Run, Run]]) -> Conclusion:
    claim = f"the larger model takes {NOTE_LOAD_RATIO:.0f} times as long to load"
    if not pairs:
        return Conclusion(claim, UNTESTED, "no pair was measured")
    small, large = pairs[0]
    parameters = large.parameters / small.parameters
    if why := _unlike_the_note(parameters):
        return Conclusion(claim, UNTESTED, why)
    ratios = [(large.load_s / small.load_s, small) for small, large in pairs]
    listed = ", ".join(f"{ratio:.1f} ({r.method.value} {r.precision})" for ratio, r in ratios)
    because = f"{listed}; parameters {parameters:.1f}; each model is loaded once"
    return Conclusion(claim, PROVISIONAL, because)


def _spread(rows: Sequence[Slowdown]) -> float | None:
    """The largest one; None where one is unknown."""
    known = [row.spread for row in rows if row.spread is not None]
    return max(known) if len(known) == len(rows) else None


def _apart(rows: Sequence[Slowdown]) -> bool:
    """Whether two of them differ by more than all that the repeats leave uncertain."""
    return max(row.bounds[0] for row in rows) > min(row.bounds[1] for row in rows)


def _unless_unsure(verdict: str, spread: float | None) -> str:
    """The verdict, if the repeats can carry it."""
    if spread is None:
        return PROVISIONAL
    return UNCERTAIN if spread > _NOISY else verdict


def _unlike_the_note(parameter_ratio: float) -> str:
    """Return why a pair is not held against the note's figures; "" where its sizes are alike."""
    if abs(parameter_ratio / NOTE_PARAMETER_RATIO - 1) <= _PAIR_LIKE:
        return ""
    return f"this pair's parameter ratio is {parameter_ratio:.2f}, not 14"


def _told(row: Slowdown) -> str:
    return f"{row.slowdown:.2f} ({row.method.value} {row.precision}, batch {row.batch})"


def _overhead_shares(fits: Sequence[Fit]) -> str:
    """What of the smaller model's step is overhead, for each precision of the engine alone."""
    engine = [f for f in fits if f.method is Method.ENGINE and len(f.precisions) == 1]
    return ", ".join(f"{f.small_share:.0%} ({f.precisions[0]})" for f in engine)
