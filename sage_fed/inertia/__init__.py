"""How much slower the larger model of a pair is, by whom it is run, and why.

`measure` loads and times both models, one after another, by the published method and by the
engine; `analyse` compares (pure); `markdown` and `record` write it up. No job is served by it.
"""

from sage_fed.inertia.analysis import Analysis, analyse
from sage_fed.inertia.experiment import Findings, ModelRef, Plan, Point, Run, measure
from sage_fed.inertia.inertia_report import markdown, record

__all__ = [
    "Analysis",
    "Findings",
    "ModelRef",
    "Plan",
    "Point",
    "Run",
    "analyse",
    "markdown",
    "measure",
    "record",
]
