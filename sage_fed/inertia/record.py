"""The findings and what follows from them as plain JSON values, derived figures included.

Pure. A key, once written, keeps its meaning: results of several versions are compared.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sage_fed import __version__
from sage_fed.inertia.analysis import Analysis
from sage_fed.inertia.conclusions import conclusions, precision_answer
from sage_fed.inertia.figures import Findings, Run
from sage_fed.inertia.report import worklog


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
