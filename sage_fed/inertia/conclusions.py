"""Which of the published note's conclusions these measurements bear out: rules, no opinions.

Owns the note's claims and figures (2025-11-05, Jetson AGX Thor, fp16, `generate`, batch 1), and
the rule by which each is judged. Pure; a claim that was not tested is said to be that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.inertia.analysis import Analysis, Fit, Slowdown
from sage_fed.inertia.figures import Findings, Method, Run

NOTE_SLOWDOWN = 6.59
NOTE_CPU_SLOWDOWN = 8.46
NOTE_LOAD_RATIO = 272.76 / 2.99
NOTE_MEMORY_RATIO = 15.25 / 1.00
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


@dataclass(frozen=True, slots=True)
class Conclusion:
    """A claim, the verdict and the figures that it rests on."""

    claim: str
    verdict: str
    because: str


def conclusions(findings: Findings, analysis: Analysis) -> tuple[Conclusion, ...]:
    """The note's claims, in its order, each judged."""
    singles = [row for row in analysis.slowdowns if row.batch == 1]
    return (
        _less_than_linear(analysis.slowdowns),
        _published_ratio(findings, singles),
        _property_of_the_pair(analysis.slowdowns),
        _memory(findings),
        _load_time(findings),
    )


def precision_answer(analysis: Analysis) -> Conclusion:
    """The note's open question: does the scale change with precision?"""
    question = "does the scale change with precision?"
    rows = [r for r in analysis.slowdowns if r.batch == 1 and r.method is Method.ENGINE]
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
    shares = _overhead_shares(analysis.fits)
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


def _published_ratio(findings: Findings, singles: Sequence[Slowdown]) -> Conclusion:
    on_cpu = findings.plan.device == "cpu"
    published = NOTE_CPU_SLOWDOWN if on_cpu else NOTE_SLOWDOWN
    where = "CPU (its 0.5B estimated)" if on_cpu else "GPU"
    claim = f"a token of the larger model costs {published} of the smaller one's ({where})"
    reference = [row for row in singles if row.method is Method.REFERENCE]
    if not reference:
        return Conclusion(claim, UNTESTED, "the published method was not run")
    row = reference[0]
    if not _like_the_note(row):
        return Conclusion(
            claim, UNTESTED, f"this pair's parameter ratio is {row.parameter_ratio:.2f}, not 14"
        )
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


def _memory(findings: Findings) -> Conclusion:
    """Of weights: bytes are counted, so one repeat is enough."""
    claim = "memory grows with the parameters"
    pairs = _run_pairs(findings)
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


def _load_time(findings: Findings) -> Conclusion:
    claim = f"the larger model takes {NOTE_LOAD_RATIO:.0f} times as long to load"
    pairs = _run_pairs(findings)
    if not pairs:
        return Conclusion(claim, UNTESTED, "no pair was measured")
    small, large = pairs[0]
    parameters = large.parameters / small.parameters
    if abs(parameters / NOTE_PARAMETER_RATIO - 1) > _PAIR_LIKE:
        return Conclusion(
            claim, UNTESTED, f"this pair's parameter ratio is {parameters:.2f}, not 14"
        )
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


def _run_pairs(findings: Findings) -> list[tuple[Run, Run]]:
    done = {(run.method, run.precision, run.tier): run for run in findings.runs if run.points}
    return [
        (small, done[method, precision, Tier.STRATEGIC])
        for (method, precision, tier), small in done.items()
        if tier == Tier.TACTICAL and (method, precision, Tier.STRATEGIC) in done
    ]


def _like_the_note(row: Slowdown) -> bool:
    return abs(row.parameter_ratio / NOTE_PARAMETER_RATIO - 1) <= _PAIR_LIKE


def _told(row: Slowdown) -> str:
    return f"{row.slowdown:.2f} ({row.method.value} {row.precision}, batch {row.batch})"


def _overhead_shares(fits: Sequence[Fit]) -> str:
    """What of the smaller model's step is overhead, for each precision of the engine alone."""
    engine = [f for f in fits if f.method is Method.ENGINE and len(f.precisions) == 1]
    return ", ".join(f"{f.small_share:.0%} ({f.precisions[0]})" for f in engine)
