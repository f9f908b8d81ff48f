"""How late the event loop is: what everything that comes to it has to wait.

A timer, twenty times a second, and how much later than it was due it ran. A turn of the loop that
takes long, or a thread that keeps the interpreter's lock or the processor from it, all look the
same here, and to a client; the loop's own processor time tells them apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from sage_fed.metrics.series import Factory

INTERVAL_S = 0.05

LAG = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_MAX_SAMPLES = 1000
"""Of one delay: 50 s of it."""


class LoopMetrics:
    """Samples the loop that it runs on.

    Args:
        make: makes the series.
        sleep: seconds that the loop is asked to wait.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        make: Factory,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep = sleep
        self._clock = clock
        self._lag = make.histogram(
            "event_loop_lag_seconds",
            "What comes to the event loop waits for its turn, sampled twenty times a second.",
            LAG,
        )
        self._cpu = make.counter(
            "event_loop_cpu_seconds_total",
            "CPU time of the event loop's thread; one a second is all.",
        )

    async def watch(self) -> None:
        """Sample until cancelled."""
        cpu_s = time.thread_time()
        while True:
            due_s = self._clock() + INTERVAL_S
            await self._sleep(INTERVAL_S)
            lag_s = max(self._clock() - due_s, 0.0)
            # Those samples count, too, that were due while it was late: one of a second's delay
            # would else be one of twenty a second, and not all of them.
            for _ in range(_MAX_SAMPLES):
                self._lag.observe(lag_s)
                lag_s -= INTERVAL_S
                if lag_s <= 0:
                    break
            before_s, cpu_s = cpu_s, time.thread_time()
            self._cpu.inc(cpu_s - before_s)
