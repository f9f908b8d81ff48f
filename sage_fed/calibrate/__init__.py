"""Measures what a token costs on this device, and writes it down as a rate card.

`plan` says which steps are timed, `measure` times them through the executor, `derive` makes
prices of the times (pure), `conditions` reads the machine, `report` and `plot` draw it up,
`store` writes the files, `calibrator` runs all of them for one caller at a time.
"""

from sage_fed.calibrate.calibrator import Calibrator, Site
from sage_fed.calibrate.measurement import FULL, QUICK, Pace

__all__ = ["FULL", "QUICK", "Calibrator", "Pace", "Site"]
