"""The findings as a page of Markdown: the note's tables, then what the note did not have.

Owns wording and layout. Every figure and verdict comes from the findings by rule. Pure.

The findings and what follows from them as plain JSON values, derived figures included.

Pure. A key, once written, keeps its meaning: results of several versions are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sage_fed import __version__
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.inertia.analysis import Analysis, Conclusion, Fit, conclusions, precision_answer
from sage_fed.inertia.experiment import Findings, Method, Point, Run

_GB = 1e9


def markdown(findings: Findings, analysis: Analysis) -> str:
    """The whole report."""
    return "\n".join(_lines(findings, analysis)) + "\n"


def worklog(findings: Findings, analysis: Analysis) -> str:
    """One line for a log: the first pair of the engine, else of the reference."""
    rows = sorted(analysis.slowdowns, key=lambda row: row.method is not Method.ENGINE)
    plan = findings.plan
    names = f"{plan.tactical.name} and {plan.strategic.name}"
    if not rows:
        return f"{findings.date[:10]}: size inertia of {names} on {findings.machine}: no pair ran"
    row = rows[0]
    small, large = (
        _point(findings, row.method, row.precision, tier, row.batch).hundred_s
        for tier in TIER_ROLES
    )
    return (
        f"{findings.date[:10]}: size inertia of {names} on {findings.machine}: "
        f"{row.method.value}, {row.precision}, batch {row.batch}: {small:.3g} s and {large:.3g} s "
        f"per 100 tokens, slowdown {row.slowdown:.2f} of a linear {row.parameter_ratio:.2f} "
        f"(efficiency {row.efficiency:.0%})"
    )


def _lines(findings: Findings, analysis: Analysis) -> Iterator[str]:
    plan = findings.plan
    yield f"# Size inertia: {plan.tactical.name} and {plan.strategic.name}"
    yield ""
    yield f"{findings.date}, {findings.machine}; {findings.software}."
    yield (
        f"Prompt {plan.prompt_tokens} random ids, {plan.new_tokens} new tokens, greedy, "
        f"{_repeats(plan.repeats)} after a warm-up; one model loaded at a time."
    )
    yield _conditions(findings)
    yield ""
    yield f"Worklog: {worklog(findings, analysis)}"
    for method, precision in dict.fromkeys((r.method, r.precision) for r in findings.runs):
        yield from _pair(findings, analysis, method, precision)
    yield from _slowdowns(analysis)
    yield from _rooflines(analysis)
    yield from _fits(analysis.fits)
    yield from _conclusions(findings, analysis)


def _pair(findings: Findings, analysis: Analysis, method: Method, precision: str) -> Iterator[str]:
    """The note's table of one method and precision, at the first batch size."""
    runs = {
        run.tier: run for run in findings.runs if (run.method, run.precision) == (method, precision)
    }
    batch = findings.plan.batches[0]
    yield from ("", f"## {method.value}, {precision}, batch {batch}", "")
    failed = [run for run in runs.values() if run.failure]
    for run in failed:
        yield f"- {run.tier.name}: not measured: {run.failure}"
    done = {tier: run for tier, run in runs.items() if run.points}
    if failed and done:
        yield ""
    if not done:
        return
    rows = [
        ("parameters", *(_count(run.parameters) for run in done.values())),
        ("load time", *(f"{run.load_s:.2f} s" for run in done.values())),
        ("seconds per 100 tokens", *(f"{_at(r, batch).hundred_s:.2f} s" for r in done.values())),
        ("tokens per second", *(f"{_at(r, batch).tokens_per_s:.2f}" for r in done.values())),
        ("weights", *(_size(run.weight_bytes) for run in done.values())),
        ("memory of the GPU", *(_size(run.memory_bytes) for run in done.values())),
        ("peak on the host while loading", *(_size(run.peak_host_bytes) for run in done.values())),
        ("spread", *(_spread(_at(run, batch).spread) for run in done.values())),
    ]
    yield from _table(("", *(tier.name for tier in done)), rows)
    row = analysis.slowdown(method, precision, batch)
    if row is not None:
        yield ""
        yield (
            f"Slowdown {row.slowdown:.2f}; linear expectation {row.parameter_ratio:.2f} "
            f"(parameters), {row.bytes_ratio:.2f} (bytes read a step); "
            f"efficiency {row.efficiency:.0%}."
        )


def _slowdowns(analysis: Analysis) -> Iterator[str]:
    yield from ("", "## Slowdown", "")
    if not analysis.slowdowns:
        yield "No pair was measured."
        return
    yield "Efficiency is the slowdown over the parameter ratio, as the note defines it."
    yield ""
    yield from _table(
        ("method", "precision", "batch", "slowdown", "of a decode step", "linear", "efficiency",
         "spread"),
        (
            (
                row.method.value, row.precision, str(row.batch), f"{row.slowdown:.2f}",
                f"{row.step_slowdown:.2f}", f"{row.parameter_ratio:.2f}",
                f"{row.efficiency:.0%}", _spread(row.spread),
            )
            for row in analysis.slowdowns
        ),
    )  # fmt: skip


def _rooflines(analysis: Analysis) -> Iterator[str]:
    yield from ("", "## Beside the roofline", "")
    yield (
        "A decode step reads every weight once and each sequence's keys and values; "
        "the limit is those bytes over the read bandwidth measured beside the model."
    )
    yield ""
    yield from _table(
        ("method", "precision", "tier", "batch", "MB a step", "step", "limit", "share"),
        (
            (
                row.method.value, row.precision, row.tier.name, str(row.batch),
                f"{row.num_bytes / 1e6:.1f}", f"{row.step_s * 1e3:.2f} ms",
                f"{row.limit_s * 1e3:.2f} ms", f"{row.share:.0%}",
            )
            for row in analysis.rooflines
        ),
    )  # fmt: skip


def _fits(fits: Sequence[Fit]) -> Iterator[str]:
    yield from ("", "## What is not bandwidth", "")
    yield (
        "`t = overhead x layers + bytes / rate` through the decode steps of one sequence; "
        "the published pair gives 496 us a layer and 118 GB/s."
    )
    yield ""
    if not fits:
        yield "Nothing to fit: it takes both models, of different bytes a layer, at batch 1."
        return
    yield from _table(
        ("method", "precision", "overhead a layer", "rate", "of the smaller model's step",
         "largest error"),
        (
            (
                fit.method.value, ", ".join(fit.precisions),
                "0 (held)" if fit.clamped else f"{fit.overhead_s * 1e6:.1f} us",
                f"{fit.bytes_per_s / _GB:.1f} GB/s", f"{fit.small_share:.0%}", f"{fit.error:.0%}",
            )
            for fit in fits
        ),
    )  # fmt: skip


def _conclusions(findings: Findings, analysis: Analysis) -> Iterator[str]:
    yield from ("", "## The note's conclusions", "")
    for conclusion in conclusions(findings, analysis):
        yield _told(conclusion)
    yield from ("", "## The note's open question", "")
    yield _told(precision_answer(analysis))


def _told(conclusion: Conclusion) -> str:
    return f"- {conclusion.claim}: **{conclusion.verdict}**. {conclusion.because}."


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    return f"{num_bytes / _GB:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"{spread:.1%}"


def _repeats(repeats: int) -> str:
    if repeats == 1:
        return "one repeat, whose spread is unknown,"
    return f"medians of {repeats} repeats"


def _conditions(findings: Findings) -> str:
    """Why another of our measurements may say otherwise of the same pair."""
    threads = "" if findings.threads is None else f"Both methods used {findings.threads} threads. "
    return (
        f"{threads}`sage-fed calibrate` may find another ratio: it times the daemon's engines, "
        "with the threads, precisions and batches of its settings; here each model runs alone, "
        "without a daemon."
    )


def _at(run: Run, batch: int) -> Point:
    point = run.point(batch)
    assert point is not None, "a run that was measured has every batch of the plan"
    return point


def _point(findings: Findings, method: Method, precision: str, tier: Tier, batch: int) -> Point:
    keys = (method, precision, tier)
    run = next(r for r in findings.runs if (r.method, r.precision, r.tier) == keys)
    return _at(run, batch)


def record(findings: Findings, analysis: Analysis) -> dict[str, Any]:
    """Everything, in the report's order."""
    plan = findings.plan
    return {
        "report": "inertia",
        "version": __version__,
        "date": findings.date,
        "machine": findings.machine,
        "software": findings.software,
        "threads": findings.threads,
        "plan": asdict(plan),
        "worklog": worklog(findings, analysis),
        "runs": [_run(run) for run in findings.runs],
        "slowdowns": [
            {
                **asdict(row),
                "method": row.method.value,
                "efficiency": row.efficiency,
            }
            for row in analysis.slowdowns
        ],
        "rooflines": [
            {
                **asdict(row),
                "method": row.method.value,
                "tier": row.tier.name,
                "share": row.share,
            }
            for row in analysis.rooflines
        ],
        "fits": [{**asdict(fit), "method": fit.method.value} for fit in analysis.fits],
        "conclusions": [asdict(found) for found in conclusions(findings, analysis)],
        "precision": asdict(precision_answer(analysis)),
    }


def _run(run: Run) -> dict[str, Any]:
    points = [
        {**asdict(point), "hundred_s": point.hundred_s, "tokens_per_s": point.tokens_per_s}
        for point in run.points
    ]
    return {
        **asdict(run), "method": run.method.value, "tier": run.tier.name, "points": points,
    }  # fmt: skip
