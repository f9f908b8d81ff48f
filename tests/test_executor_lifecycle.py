"""The executor's life: loading in order, stopping, and the thread that must not die silently."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from executor_rig import Listener, Tokens, submit
from fake_engine import WAIT_S, Clock, FakeEngine, entered, reference, spec

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.device import EndReason, Executor, TierSetup
from sage_fed.device import executor as executor_module
from sage_fed.device.messages import Inbox, Submit
from sage_fed.errors import ModelLoadError, TierUnavailable
from sage_fed.steps import StepReport

T, S = Tier.TACTICAL, Tier.STRATEGIC
Load = Callable[[Callable[[float], None]], FakeEngine]


class States:
    """Keeps what it hears of tiers."""

    def __init__(self) -> None:
        self.heard: list[TierStatus] = []

    def step_done(self, report: StepReport) -> None:
        """Steps are not of interest here."""

    def tier_changed(self, status: TierStatus) -> None:
        """Keep it."""
        self.heard.append(status)


def build(tactical: Load, strategic: Load, *observers: States) -> Executor:
    # Strategic is named first on purpose: the order of loading is by depth.
    setups = {S: TierSetup(strategic), T: TierSetup(tactical)}
    return Executor(setups, observers=observers, clock=Clock())


def at_once(engine: FakeEngine) -> Load:
    return lambda _progress: engine


async def tokens_of(stream: Listener) -> list[int]:
    tokens: list[int] = []
    while isinstance(news := await stream.next(), Tokens):
        tokens += [d.token_id for d in news.drawn]
    return tokens


async def reason_of(stream: Listener) -> EndReason:
    async with asyncio.timeout(WAIT_S):
        return (await stream.wait_ended()).reason


async def test_tactical_serves_while_strategic_loads() -> None:
    """The small model answers before the big one is there, whose progress is told."""
    go = threading.Event()
    half = asyncio.Event()
    loop = asyncio.get_running_loop()
    states = States()

    def slowly(progress: Callable[[float], None]) -> FakeEngine:
        progress(0.5)
        loop.call_soon_threadsafe(half.set)
        assert go.wait(WAIT_S)
        return FakeEngine()

    executor = build(at_once(FakeEngine()), slowly, states)
    with pytest.raises(TierUnavailable):
        submit(executor, spec(0))
    await executor.start()
    assert TierState.READY is (await executor.loaded(T)).state
    await half.wait()
    assert reference(spec(0)) == await tokens_of(submit(executor, spec(0)))
    assert (TierState.LOADING, 0.5) == (
        executor.status(S).state,
        executor.status(S).load_progress,
    )
    assert TierState.LOADING is executor.load(S).state
    assert executor.defaults(T) is not None
    assert executor.defaults(S) is None
    with pytest.raises(TierUnavailable) as refused:
        submit(executor, spec(1, S))
    assert refused.value.retry_after_s
    go.set()
    assert TierState.READY is (await executor.loaded(S)).state
    assert reference(spec(1, S)) == await tokens_of(submit(executor, spec(1, S)))
    await executor.stop(0.0)
    assert [TierState.READY, TierState.DRAINING] == [
        status.state for status in states.heard if status.tier is T
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModelLoadError("GPT2LMHeadModel is not supported"), "GPT2LMHeadModel"),
        (OSError("/secret/path"), "the daemon's log"),
    ],
)
async def test_a_model_that_does_not_load_fails_its_tier_only(error: Exception, text: str) -> None:
    """The status says why in the client's words, and the other tier is loaded and served."""

    def fails(_progress: Callable[[float], None]) -> FakeEngine:
        raise error

    executor = build(fails, at_once(FakeEngine()))
    await executor.start()
    status = await executor.loaded(T)
    assert TierState.FAILED is status.state
    assert text in status.message
    assert "secret" not in status.message
    assert TierState.READY is (await executor.loaded(S)).state
    assert reference(spec(1, S)) == await tokens_of(submit(executor, spec(1, S)))
    await executor.stop(0.0)
    assert TierState.FAILED is executor.status(T).state


async def test_a_stop_abandons_a_load() -> None:
    """The next report of progress ends it, and the engine that was made is closed."""
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()
    go = threading.Event()
    abandoned: list[str] = []
    tactical = FakeEngine()

    def slowly(progress: Callable[[float], None]) -> FakeEngine:
        loop.call_soon_threadsafe(reached.set)
        assert go.wait(WAIT_S)
        try:
            progress(0.9)
        except Exception as error:
            abandoned.append(type(error).__name__)
            raise
        return FakeEngine()

    executor = build(at_once(tactical), slowly)
    await executor.start()
    await reached.wait()
    stopping = asyncio.create_task(executor.stop(0.0))
    await executor.loaded(S)
    loop.call_soon(go.set)
    await stopping
    assert ["LoadAbandoned"] == abandoned
    assert tactical.closed


async def test_an_engine_that_comes_too_late_is_closed() -> None:
    """A load that does not report cannot be stopped; its engine is not leaked."""
    go = threading.Event()
    late = FakeEngine()

    def slowly(_progress: Callable[[float], None]) -> FakeEngine:
        assert go.wait(WAIT_S)
        return late

    executor = build(at_once(FakeEngine()), slowly)
    await executor.start()
    await executor.loaded(T)
    stopping = asyncio.create_task(executor.stop(0.0))
    assert executor._device
    await asyncio.wrap_future(executor._device.exited)
    go.set()
    await stopping
    assert late.closed


def gated() -> FakeEngine:
    return FakeEngine(gate=threading.Semaphore(0))


async def started(tactical: FakeEngine, strategic: FakeEngine) -> Executor:
    executor = build(at_once(tactical), at_once(strategic))
    await executor.start()
    for tier in TIER_ROLES:
        await executor.loaded(tier)
    return executor


async def test_a_stop_ends_every_stream_once() -> None:
    """Running, waiting and still in the inbox: each ends with SHUTDOWN, and nothing is admitted."""
    engine = gated()
    executor = await started(engine, FakeEngine())
    streams = [submit(executor, spec(i, new=100)) for i in range(30)]
    await entered(engine)
    streams += [submit(executor, spec(i, new=100)) for i in range(30, 40)]
    stopping = asyncio.create_task(executor.stop(0.0))
    await asyncio.sleep(0)
    with pytest.raises(TierUnavailable):
        submit(executor, spec(99))
    engine.let_pass(10_000)
    await stopping
    assert [EndReason.SHUTDOWN] * 40 == [await reason_of(stream) for stream in streams]
    assert 0 == executor.num_live
    assert engine.closed
    await executor.stop(0.0)


async def test_a_stop_lets_streams_end_within_the_grace() -> None:
    """What runs when the stop comes is delivered whole."""
    engine = gated()
    executor = await started(engine, FakeEngine())
    stream = submit(executor, spec(0, new=20))
    stopping = asyncio.create_task(executor.stop(WAIT_S))
    await asyncio.sleep(0)
    assert TierState.DRAINING is executor.status(T).state
    assert TierState.DRAINING is executor.load(T).state
    engine.let_pass(1000)
    await stopping
    assert reference(spec(0, new=20)) == await tokens_of(stream)
    assert EndReason.LENGTH is await reason_of(stream)


async def test_a_second_stop_cuts_the_grace_short() -> None:
    """An impatient operator does not wait for the first grace."""
    engine = FakeEngine(num_blocks=70_000, max_context_tokens=1_000_000)
    executor = await started(engine, FakeEngine())
    stream = submit(executor, spec(0, new=900_000))
    first = asyncio.create_task(executor.stop(3600.0))
    assert isinstance(await stream.next(), Tokens)
    await executor.stop(0.0)
    await first
    assert EndReason.SHUTDOWN is await reason_of(stream)


async def test_a_device_that_hangs_does_not_hang_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The streams are ended without it, and what it says later is not heard."""
    monkeypatch.setattr(executor_module, "_EXIT_S", 0.05)
    engine = gated()
    executor = await started(engine, FakeEngine())
    stream = submit(executor, spec(0))
    await entered(engine)
    await executor.stop(0.0)
    assert EndReason.SHUTDOWN is await reason_of(stream)
    engine.let_pass(1000)
    assert executor._device
    await asyncio.wrap_future(executor._device.exited)
    assert [] == await tokens_of(stream)


async def test_a_thread_that_dies_says_so() -> None:
    """Our own bug on the device's thread ends all streams FAILED and fails both tiers."""
    engine = gated()
    executor = await started(engine, FakeEngine())
    streams = [submit(executor, spec(i, new=50)) for i in range(20)]
    streams.append(submit(executor, spec(20, S)))
    await entered(engine)
    assert executor._device

    def bug(_now: float) -> None:
        raise KeyError("a bug")

    executor._device._scheduler.next_step = bug  # type: ignore[method-assign,assignment]
    engine.let_pass(1000)
    assert {EndReason.FAILED} == {await reason_of(stream) for stream in streams}
    delivered = [len(await tokens_of(stream)) for stream in streams]
    assert delivered == [(await stream.wait_ended()).output_tokens for stream in streams]
    assert sum(delivered) > 0
    assert {TierState.FAILED} == {executor.status(tier).state for tier in TIER_ROLES}
    with pytest.raises(TierUnavailable):
        submit(executor, spec(99))
    await executor.stop(0.0)
    assert engine.closed


class Late:
    """A strategic load that goes on when it is let, tells its progress, and gives `engine`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.engine = FakeEngine()
        self.reports: list[float] = []

    def __call__(self, progress: Callable[[float], None]) -> FakeEngine:
        """Wait, then load."""
        assert self.go.wait(WAIT_S)
        for fraction in self.reports:
            progress(fraction)
        return self.engine


async def busy_with_tactical(tactical: FakeEngine, late: Late) -> tuple[Executor, Listener]:
    """An executor whose thread is in a tactical step while strategic still loads."""
    executor = build(at_once(tactical), late)
    await executor.start()
    await executor.loaded(T)
    stream = submit(executor, spec(0))
    await entered(tactical)
    return executor, stream


async def let_load(executor: Executor, late: Late) -> None:
    """Let the load end; whatever it posts has been posted then."""
    late.go.set()
    await asyncio.wrap_future(executor._loaders[0].exited)


async def test_an_engine_that_comes_with_the_stop_is_closed() -> None:
    """The thread finds both messages when its step is done, the stop first."""
    tactical, late = gated(), Late()
    executor, stream = await busy_with_tactical(tactical, late)
    stopping = asyncio.create_task(executor.stop(0.0))
    await asyncio.to_thread(executor._loaders[0]._abandoned.wait, WAIT_S)
    await let_load(executor, late)
    tactical.let_pass(100)
    await stopping
    assert EndReason.SHUTDOWN is await reason_of(stream)
    assert late.engine.closed


def dies(_step: object) -> None:
    raise SystemExit("not an error of the engine's")


@pytest.mark.parametrize("unread", [True, False])
async def test_an_engine_that_comes_to_a_dead_thread_is_closed(unread: bool) -> None:
    """Found in the inbox or refused by it, it is not leaked, and FAILED stays FAILED."""
    tactical, late = gated(), Late()
    late.reports = [0.7]
    tactical.fail = dies
    executor, stream = await busy_with_tactical(tactical, late)
    assert executor._device
    if unread:
        await let_load(executor, late)
    tactical.let_pass(100)
    await asyncio.wrap_future(executor._device.exited)
    if not unread:
        await let_load(executor, late)
    assert EndReason.FAILED is await reason_of(stream)
    await executor.stop(0.0)
    assert late.engine.closed
    assert {TierState.FAILED} == {executor.status(tier).state for tier in TIER_ROLES}


def test_the_count_has_what_is_under_way() -> None:
    """What was submitted after the thread last looked is not forgotten when it reports."""
    inbox = Inbox()
    inbox.post(Submit(spec(0), 0.0))
    assert 1 == len(inbox.take(wait=True))
    inbox.post(Submit(spec(1), 0.0))
    inbox.note_waiting(T, 1)
    assert 2 == inbox.waiting(T)
    inbox.post(Submit(spec(2), 0.0))
    assert 3 == inbox.waiting(T)
