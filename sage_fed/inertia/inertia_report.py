"""The findings as a page of Markdown, the note's tables first, and as plain JSON values.

Owns wording and layout; every figure and verdict comes from the findings by rule. Pure. A key of
the JSON, once written, keeps its meaning: results of several versions are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sage_fed import __version__
from sage_fed.core import to_plain
from sage_fed.inertia.analysis import Analysis, Conclusion
from sage_fed.inertia.experiment import Findings, Method, Point, Run

_GB = 1e9


def markdown(findings: Findings, analysis: Analysis) -> str:
    """Return the whole report."""
    return "\n".join(_lines(findings, analysis)) + "\n"


def record(findings: Findings, analysis: Analysis) -> dict[str, Any]:
    """Return everything as JSON values, derived figures included."""
    plain: dict[str, Any] = {
        "report": "inertia",
        "version": __version__,
        **to_plain(findings),
        "software": findings.software,
        "worklog": worklog(findings, analysis),
        **to_plain(analysis),
    }
    for run, known in zip(plain["runs"], findings.runs, strict=True):
        for point, of in zip(run["points"], known.points, strict=True):
            point |= {"hundred_s": of.hundred_s, "tokens_per_s": of.tokens_per_s}
    return plain


def worklog(findings: Findings, analysis: Analysis) -> str:
    """Return one line for a log: the first pair of the engine, else of the reference."""
    rows = sorted(analysis.slowdowns, key=lambda row: row.method is not Method.ENGINE)
    plan = findings.plan
    names = f"{plan.tactical.name} and {plan.strategic.name}"
    head = f"{findings.date[:10]}: size inertia of {names} on {findings.machine}: "
    if not rows:
        return f"{head}no pair ran"
    row = rows[0]
    way = (row.method, row.precision)
    small, large = (
        _at(run, row.batch).hundred_s for run in findings.runs if (run.method, run.precision) == way
    )
    return (
        f"{head}{row.method.value}, {row.precision}, batch {row.batch}: {small:.3g} s and "
        f"{large:.3g} s per 100 tokens, slowdown {row.slowdown:.2f} of a linear "
        f"{row.parameter_ratio:.2f} (efficiency {row.efficiency:.0%})"
    )


def _lines(findings: Findings, analysis: Analysis) -> Iterator[str]:
    plan = findings.plan
    yield f"# Size inertia: {plan.tactical.name} and {plan.strategic.name}"
    yield ""
    yield f"{findings.date}, {findings.machine}; {findings.software}."
    repeats = f"medians of {plan.repeats} repeats"
    if plan.repeats == 1:
        repeats = "one repeat, whose spread is unknown,"
    yield (
        f"Prompt {plan.prompt_tokens} random ids, {plan.new_tokens} new tokens, greedy, "
        f"{repeats} after a warm-up; one model loaded at a time."
    )
    threads = "" if findings.threads is None else f"Both methods used {findings.threads} threads. "
    yield (
        f"{threads}`sage-fed calibrate` may find another ratio: it times the daemon's engines, "
        "with the threads, precisions and batches of its settings; here each model runs alone, "
        "without a daemon."
    )
    yield ""
    yield f"Worklog: {worklog(findings, analysis)}"
    for method, precision in dict.fromkeys((r.method, r.precision) for r in findings.runs):
        yield from _pair(findings, analysis, method, precision)
    yield from _tables(analysis)
    yield from ("", "## The note's conclusions", "")
    yield from map(_told, analysis.conclusions)
    yield from ("", "## The note's open question", "")
    yield _told(analysis.precision)


def _pair(findings: Findings, analysis: Analysis, method: Method, precision: str) -> Iterator[str]:
    """Yield the note's table of one method and precision, at the first batch size."""
    runs = [run for run in findings.runs if (run.method, run.precision) == (method, precision)]
    batch = findings.plan.batches[0]
    yield from ("", f"## {method.value}, {precision}, batch {batch}", "")
    failed = [run for run in runs if run.failure]
    for run in failed:
        yield f"- {run.tier.name}: not measured: {run.failure}"
    done = [run for run in runs if run.points]
    if failed and done:
        yield ""
    if not done:
        return
    points = [_at(run, batch) for run in done]
    yield from _table(
        ("", *(run.tier.name for run in done)),
        [
            ("parameters", *(_count(run.parameters) for run in done)),
            ("load time", *(f"{run.load_s:.2f} s" for run in done)),
            ("seconds per 100 tokens", *(f"{point.hundred_s:.2f} s" for point in points)),
            ("tokens per second", *(f"{point.tokens_per_s:.2f}" for point in points)),
            ("weights", *(_size(run.weight_bytes) for run in done)),
            ("memory of the GPU", *(_size(run.memory_bytes) for run in done)),
            ("peak on the host while loading", *(_size(run.peak_host_bytes) for run in done)),
            ("spread", *(_spread(point.spread) for point in points)),
        ],
    )
    for row in analysis.slowdowns:
        if (row.method, row.precision, row.batch) == (method, precision, batch):
            yield ""
            yield (
                f"Slowdown {row.slowdown:.2f}; linear expectation {row.parameter_ratio:.2f} "
                f"(parameters), {row.bytes_ratio:.2f} (bytes read a step); "
                f"efficiency {row.efficiency:.0%}."
            )


def _tables(analysis: Analysis) -> Iterator[str]:
    yield from ("", "## Slowdown", "")
    if analysis.slowdowns:
        yield "Efficiency is the slowdown over the parameter ratio, as the note defines it."
        yield ""
        yield from _table(
            ("method", "precision", "batch", "slowdown", "of a decode step", "linear",
             "efficiency", "spread"),
            [
                (row.method.value, row.precision, str(row.batch), f"{row.slowdown:.2f}",
                 f"{row.step_slowdown:.2f}", f"{row.parameter_ratio:.2f}",
                 f"{row.efficiency:.0%}", _spread(row.spread))
                for row in analysis.slowdowns
            ],
        )  # fmt: skip
    else:
        yield "No pair was measured."
    yield from ("", "## Beside the roofline", "")
    yield (
        "A decode step reads every weight once and each sequence's keys and values; "
        "the limit is those bytes over the read bandwidth measured beside the model."
    )
    yield ""
    yield from _table(
        ("method", "precision", "tier", "batch", "MB a step", "step", "limit", "share"),
        [
            (row.method.value, row.precision, row.tier.name, str(row.batch),
             f"{row.num_bytes / 1e6:.1f}", f"{row.step_s * 1e3:.2f} ms",
             f"{row.limit_s * 1e3:.2f} ms", f"{row.share:.0%}")
            for row in analysis.rooflines
        ],
    )  # fmt: skip
    yield from ("", "## What is not bandwidth", "")
    yield (
        "`t = overhead x layers + bytes / rate` through the decode steps of one sequence; "
        "the published pair gives 496 us a layer and 118 GB/s."
    )
    yield ""
    if not analysis.fits:
        yield "Nothing to fit: it takes both models, of different bytes a layer, at batch 1."
        return
    yield from _table(
        ("method", "precision", "overhead a layer", "rate", "of the smaller model's step",
         "largest error"),
        [
            (fit.method.value, ", ".join(fit.precisions),
             "0 (held)" if fit.clamped else f"{fit.overhead_s * 1e6:.1f} us",
             f"{fit.bytes_per_s / _GB:.1f} GB/s", f"{fit.small_share:.0%}", f"{fit.error:.0%}")
            for fit in analysis.fits
        ],
    )  # fmt: skip


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


def _at(run: Run, batch: int) -> Point:
    point = run.point(batch)
    assert point is not None, "a run that was measured has every batch of the plan"
    return point
