"""How much slower the larger model of a pair is, by whom it is run, and why.

`measure` loads and times both models, one after another, by the published method and by the
engine; `analyse` compares (pure); `markdown` and `record` write it up. It serves nobody.
"""

from sage_fed.inertia.analysis import Analysis, analyse
from sage_fed.inertia.figures import Findings, ModelRef, Plan, Point, Run
from sage_fed.inertia.measure import measure
from sage_fed.inertia.record import record
from sage_fed.inertia.report import markdown

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
