"""An executor over two fake engines, and a stream read to its end: what its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fake_engine import WAIT_S, Clock, FakeEngine

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.device import Ended, Executor, SequenceSpec
from sage_fed.device.tier_loading import TierSetup
from sage_fed.steps import SampledToken, StepReport


class Observer:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.statuses: list[TierStatus] = []

    def step_done(self, report: StepReport) -> None:
        """Keep it."""
        self.reports.append(report)

    def tier_changed(self, status: TierStatus) -> None:
        """Keep it."""
        self.statuses.append(status)


class Rig:
    """A started executor over two fake engines that share a clock."""

    def __init__(
        self,
        *,
        pipelined: bool = False,
        num_parts: int = 1,
        reload_s: float = 3600.0,
        **setup: int,
    ) -> None:
        self.clock = Clock()
        self.engines = {
            tier: FakeEngine(clock=self.clock, pipelined=pipelined, num_parts=num_parts)
            for tier in TIER_ROLES
        }
        self.observer = Observer()
        self.executor = Executor(
            {tier: TierSetup(self._loader(tier), **setup) for tier in TIER_ROLES},
            observers=[self.observer],
            reload_s=reload_s,
            clock=self.clock,
        )

    def _loader(self, tier: Tier) -> Callable[[Callable[[float], None]], FakeEngine]:
        return lambda _progress: self.engines[tier]

    def gate(self, tier: Tier) -> FakeEngine:
        """Shut the gate of the tier's engine."""
        self.engines[tier].shut()
        return self.engines[tier]


@asynccontextmanager
async def serving(rig: Rig) -> AsyncIterator[Executor]:
    """Serve both tiers until the block is left; then nothing is left running."""
    await rig.executor.start()
    for tier in TIER_ROLES:
        assert TierState.READY is (await rig.executor.loaded(tier)).state
    try:
        async with asyncio.timeout(WAIT_S):
            yield rig.executor
    finally:
        for engine in rig.engines.values():
            if engine.gate is not None:
                engine.let_pass(10_000)
        await rig.executor.stop(0.0)
    assert 0 == rig.executor.num_live


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens since the last look, at least one, in order."""

    drawn: tuple[SampledToken, ...]


class Listener:
    """A submitted sequence, and what came of it."""

    def __init__(self, executor: Executor, spec: SequenceSpec) -> None:
        self.spec = spec
        self._unread: list[SampledToken] = []
        self._changed = asyncio.Event()
        self.ending = executor.submit(spec, self._take)
        self.ending.add_done_callback(lambda _: self._changed.set())

    def _take(self, tokens: Sequence[SampledToken]) -> None:
        self._unread += tokens
        self._changed.set()

    async def next(self) -> Tokens | Ended:
        """Wait for more; the ending comes after the last token."""
        while not self._unread and not self.ending.done():
            self._changed.clear()
            await self._changed.wait()
        if self._unread:
            drawn, self._unread = tuple(self._unread), []
            return Tokens(drawn)
        return self.ending.result()

    async def wait_ended(self) -> Ended:
        """Wait for the ending without reading."""
        return await asyncio.shield(self.ending)


def submit(executor: Executor, spec: SequenceSpec) -> Listener:
    """Have a sequence run; raises where it is refused."""
    return Listener(executor, spec)


async def read(stream: Listener) -> tuple[list[int], Ended]:
    """A sequence's tokens and its ending."""
    tokens: list[int] = []
    while isinstance(news := await stream.next(), Tokens):
        tokens += [d.token_id for d in news.drawn]
    return tokens, news
