"""The steps that are on the device: launched, and not yet landed.

Owns their order, which is the device's, and the time that each took. Knows no scheduler.
Fails as the engines do, in `launch`, in `resume` or in `land`.

A step's time is the device's own where it has a clock: then the steps of both tiers, one behind
the other, are each charged what they took, and the host's work beside them costs nothing. Where
it has none, the time is from the launch, or from the landing before it if that came later; of a
step that paused, the time of its parts, without what ran in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from sage_fed.core import Tier
from sage_fed.steps import Engine, InFlightStep, SampledToken, Step


@dataclass(frozen=True, slots=True)
class Airborne:
    """A step in flight; `launched_s` is when its launch, or its last part, began.

    On the executor's clock. `overlaps` says that its engine may still be at work: the host can
    use the time. `before_s` is what the parts before the last one took.
    """

    step: Step
    flight: InFlightStep
    launched_s: float
    overlaps: bool
    before_s: float = 0.0


class Flights:
    """Steps of any tier in the order of their launches, and one that is paused beside them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._airborne: deque[Airborne] = deque()
        self._paused: Airborne | None = None
        self._landed_s = clock()

    def __len__(self) -> int:
        """How many can land."""
        return len(self._airborne)

    @property
    def full(self) -> bool:
        """Whether one has to land before the next launch: one waits behind another, or is done."""
        return len(self._airborne) > 1 or not self._airborne[-1].overlaps

    @property
    def next_to_land(self) -> Step:
        """The oldest step in flight; there is one."""
        return self._airborne[0].step

    def launch(self, engine: Engine, step: Step, pause_after_s: float | None = None) -> None:
        """Put a step behind the others; whatever the launch raises, it is not in flight."""
        launched_s = self._clock()
        flight = engine.launch(step, pause_after_s)
        self._take_off(Airborne(step, flight, launched_s, engine.pipelined))

    def resume(self, pause_after_s: float | None) -> None:
        """Go on with the paused step; whatever this raises, it is not in flight any more."""
        paused, self._paused = self._paused, None
        assert paused is not None
        resumed = replace(paused, launched_s=self._clock())
        resumed.flight.resume(pause_after_s)
        self._take_off(resumed)

    @property
    def paused(self) -> Step | None:
        """The step that waits to be resumed."""
        return self._paused.step if self._paused else None

    @property
    def paused_s(self) -> float:
        """Seconds that the paused step has taken so far; 0 where there is none."""
        return self._paused.before_s if self._paused else 0.0

    def land(self) -> tuple[tuple[SampledToken, ...], float]:
        """Wait for the oldest step: what it drew, and the seconds that it took.

        Whatever this raises, the step is not in flight any more.
        """
        airborne = self._airborne.popleft()
        earlier_s = self._landed_s
        try:
            drawn = airborne.flight.wait()
        finally:
            self._landed_s = self._clock()
        device_s = airborne.flight.device_s
        if device_s is None:
            last_s = self._landed_s - max(airborne.launched_s, earlier_s)
            device_s = airborne.before_s + last_s
        return drawn, device_s

    def drop(self, tier: Tier) -> None:
        """Forget the flights of a tier whose engine is broken."""
        self._airborne = deque(a for a in self._airborne if a.step.tier is not tier)
        if self._paused and self._paused.step.tier is tier:
            self._paused = None

    def _take_off(self, airborne: Airborne) -> None:
        if not airborne.flight.paused:
            self._airborne.append(airborne)
            return
        assert self._paused is None, "one step is paused at a time"
        part_s = self._clock() - airborne.launched_s
        self._paused = replace(airborne, before_s=airborne.before_s + part_s)
