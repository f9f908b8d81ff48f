"""The steps that are on the device: launched, and not yet landed.

Owns their order, which is the device's, and the time that each took. Knows no scheduler.
Fails as the engines do, in `launch` or in `land`.

A step's time is the device's own where it has a clock: then the steps of both tiers, one behind
the other, are each charged what they took, and the host's work beside them costs nothing. Where
it has none, the time is from the launch, or from the landing before it if that came later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.steps import Drawn, Engine, Flight, Step


@dataclass(frozen=True, slots=True)
class Airborne:
    """A step in flight; `launched_s` is when its launch began, on the executor's clock.

    `overlaps` says that its engine may still be at work: the host can use the time.
    """

    step: Step
    flight: Flight
    launched_s: float
    overlaps: bool


class Flights:
    """Steps of any tier in the order of their launches."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._airborne: deque[Airborne] = deque()
        self._landed_s = clock()

    def __len__(self) -> int:
        return len(self._airborne)

    @property
    def full(self) -> bool:
        """Whether one has to land before the next launch: one waits behind another, or is done."""
        return len(self._airborne) > 1 or not self._airborne[-1].overlaps

    @property
    def next_to_land(self) -> Step:
        """The oldest step in flight; there is one."""
        return self._airborne[0].step

    def launch(self, engine: Engine, step: Step) -> None:
        """Put a step behind the others; whatever the launch raises, it is not in flight."""
        launched_s = self._clock()
        flight = engine.launch(step)
        self._airborne.append(Airborne(step, flight, launched_s, engine.pipelined))

    def land(self) -> tuple[tuple[Drawn, ...], float]:
        """Wait for the oldest step: what it drew, and the seconds that it took.

        Whatever this raises, the step is not in flight any more.
        """
        airborne = self._airborne.popleft()
        before_s = self._landed_s
        try:
            drawn = airborne.flight.land()
        finally:
            self._landed_s = self._clock()
        device_s = airborne.flight.device_s
        if device_s is None:
            device_s = self._landed_s - max(airborne.launched_s, before_s)
        return drawn, device_s

    def drop(self, tier: Tier) -> None:
        """Forget the flights of a tier whose engine is broken."""
        self._airborne = deque(a for a in self._airborne if a.step.tier is not tier)
