"""A job's one ending, whatever breaks: real books, a real executor, an engine on cue."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest
from fake_engine import WAIT_S, FakeEngine, entered
from holds import asked, entries_of
from hypothesis import given
from hypothesis import strategies as st
from surroundings import MODELS

from sage_fed.cards.rate_card import RateCard, charge
from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    Answer,
    Delta,
    EntryKind,
    Event,
    Finished,
    JobSpec,
    Logprob,
    Mode,
    Phase,
    PhaseTokens,
    Price,
    Prompt,
    Route,
    SamplingRequest,
    Stage,
    StageTiming,
    Started,
    StopReason,
    Tier,
    Timing,
    TokenOrigin,
    Usage,
)
from sage_fed.device import Ended, EndReason, Executor, TokenWeights
from sage_fed.device.tier_loading import TierSetup
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    DeviceOutOfMemory,
    HoldClosed,
    Internal,
    InvalidField,
    LedgerDown,
    QueueFull,
    RateLimited,
    RequestIdConflict,
    TierUnavailable,
)
from sage_fed.jobs import admission
from sage_fed.jobs.admission import Admission, Encoder
from sage_fed.jobs.broker import Broker, Job, Services, timing_of
from sage_fed.jobs.outgoing import OutgoingStream, SequenceText
from sage_fed.jobs.results import Result, most_answer_bytes, payload_hashes
from sage_fed.ledger import AccountTerms, Ledger, LedgerOptions, Retention, check
from sage_fed.metrics import Metrics
from sage_fed.routing import RoutingPolicy
from sage_fed.settings import LimitSettings
from sage_fed.steps import Engine, Step
from sage_fed.text import Tokenizer, write_padded_tokenizer
from sage_fed.v1 import inference_pb2
from sage_fed.wire.codec import encode
from sage_fed.workers import Workers

GRANTED_UATP = 10_000 * UATP_PER_ATP
CARD = RateCard.load()
PROMPT = (10, 11, 12, 13, 14)


def job(new: int = 4, **fields: Any) -> JobSpec:  # noqa: ANN401 - of many types
    """A tactical job of `new` tokens."""
    sampling = {"max_new_tokens": new, "ignore_eos": True, "seed": 3, **fields.pop("sampling", {})}
    account = fields.pop("account", "local")
    values = {"requested": Tier.TACTICAL, "prompt": Prompt(token_ids=PROMPT), **fields}
    return JobSpec(account, sampling=SamplingRequest(**sampling), **values)


class Rig:
    """A broker and everything under it; `deaths` are of the ledger."""

    def __init__(
        self, broker: Broker, executor: Executor, ledger: Ledger, metrics: Metrics, path: Path
    ) -> None:
        self.broker = broker
        self.executor = executor
        self.ledger = ledger
        self.metrics = metrics
        self.path = path
        self.deaths: list[BaseException] = []
        self.engines: dict[Tier, FakeEngine] = {}

    def gate(self, tier: Tier = Tier.TACTICAL) -> FakeEngine:
        """Shut the gate of the tier's engine."""
        self.engines[tier].shut()
        return self.engines[tier]

    async def submit(self, spec: JobSpec) -> OutgoingStream:
        """Submit a job that arrives now."""
        return await self.broker.submit(spec, time.monotonic())

    async def run(self, spec: JobSpec) -> list[Event]:
        """Submit a job and read it to its end."""
        return await read(await self.submit(spec))

    async def settled(self) -> None:
        """Wait until no job is left, then see that nothing is held on any side."""
        async with asyncio.timeout(WAIT_S):
            await self.broker.wait_empty()
            while self.executor.num_live:  # noqa: ASYNC110 - the executor tells nobody
                await asyncio.sleep(0)
        assert () == self.broker.running()
        for tier in TIER_ROLES:
            assert 0 == self.executor.load(tier).kv_tokens_used
        if self.ledger.alive:
            assert 0 == await self.ledger.held_total_uatp()
            report = check(self.path)
            assert ((), 0) == (report.violations, report.open_holds)

    async def spent_uatp(self) -> int:
        """What the account has paid; the rest is its balance."""
        budget = await self.ledger.budget("local")
        assert GRANTED_UATP == budget.balance_uatp + budget.discharged_uatp
        return budget.discharged_uatp

    def counted(self, name: str, **labels: str) -> float | None:
        """A series' value."""
        return self.metrics.registry.get_sample_value(f"sage_fed_{name}", labels)


async def read(stream: OutgoingStream) -> list[Event]:
    """Read a stream to its end, or to its error, and leave it."""
    try:
        async with asyncio.timeout(WAIT_S):
            return [event async for event in stream]
    finally:
        stream.cancel()


def finished_of(events: list[Event]) -> Finished:
    """The last event, which is the ending."""
    assert isinstance(events[-1], Finished)
    return events[-1]


@contextlib.asynccontextmanager
async def rig(
    tmp_path: Path,
    *,
    max_waiting: int = 8,
    hold_ttl_s: float = 600,
    max_account_jobs: int = 0,
    retention: Retention | None = None,
    real: Mapping[Tier, Engine] | None = None,
    granted_uatp: int = GRANTED_UATP,
    speculates: bool = True,
) -> AsyncIterator[Rig]:
    """Serve both tiers until the block is left, by fake engines or by `real`; then all is settled.

    Those are closed with it.
    """
    path = tmp_path / "ledger.db"
    deaths: list[BaseException] = []
    metrics = Metrics()
    ledger = await Ledger(
        path,
        options=LedgerOptions(retention or Retention(), answer_timeout_s=WAIT_S),
        on_death=deaths.append,
    ).open()
    for account in ("local", "robot"):
        await ledger.ensure_account(
            account, AccountTerms(capacity_uatp=granted_uatp, initial_uatp=granted_uatp)
        )
    engines = {tier: FakeEngine() for tier in TIER_ROLES}

    def loader(tier: Tier) -> Callable[[Callable[[float], None]], Engine]:
        return lambda _progress: (real or engines)[tier]

    executor = Executor(
        {tier: TierSetup(loader(tier), max_waiting=max_waiting) for tier in TIER_ROLES},
        observers=[metrics],
    )
    tokenizer = Tokenizer.load(MODELS / "demo-tactical")
    with Workers(max_calls=512, max_size=4_000_000) as workers:
        async with asyncio.timeout(2 * WAIT_S), asyncio.TaskGroup() as tasks:
            await executor.start()
            for tier in TIER_ROLES:
                await executor.loaded(tier)
            asked = Admission(
                Encoder(dict.fromkeys(TIER_ROLES, tokenizer), workers),
                executor,
                CARD,
                policy=RoutingPolicy(),
                default_new_tokens=16,
                max_jobs=16,
                max_account_jobs=lambda _: max_account_jobs,
                speculates=speculates,
            )
            broker = Broker(
                tasks,
                Services(asked, ledger, executor, metrics, workers, hold_ttl_s=hold_ttl_s),
            )
            made = Rig(broker, executor, ledger, metrics, path)
            made.engines, made.deaths = engines, deaths
            try:
                yield made
                await made.settled()
            finally:
                for engine in engines.values():
                    if engine.gate is not None:
                        engine.let_pass(1_000_000)
                await executor.stop(0.0)
    await ledger.close()


async def test_a_job_is_charged_what_it_made(tmp_path: Path) -> None:
    """Hold, stream, settle: the price is the card's for the usage, computed by hand."""
    async with rig(tmp_path) as r:
        events = await r.run(job(new=4))
        started, finished = events[0], finished_of(events)
        assert isinstance(started, Started)
        assert 5 * 50_000 + 4 * 1_000_000 == started.held_uatp
        assert Usage.single(Tier.TACTICAL, 5, 0, 4) == finished.usage
        assert 4_250_000 == finished.price.charged_uatp
        assert 4_250_000 == await r.spent_uatp()
        assert GRANTED_UATP - 4_250_000 == finished.balance_uatp


async def test_a_prompt_that_is_found_again_is_charged_as_cached(tmp_path: Path) -> None:
    """The hold is for the whole prompt, the charge for what was there by the cached price."""
    async with rig(tmp_path) as r:
        prompt = Prompt(token_ids=tuple(range(10, 50)))
        first, second = [await r.run(job(prompt=prompt)) for _ in range(2)]
        assert [Usage.single(Tier.TACTICAL, 40, cached, 4) for cached in (0, 32)] == [
            finished_of(events).usage for events in (first, second)
        ]
        price = finished_of(second).price
        assert (6_000_000, 8 * 50_000 + 32 * 5_000 + 4_000_000) == (
            price.held_uatp,
            price.charged_uatp,
        )
        assert 32.0 == r.counted("tokens_total", tier="tactical", type="cached", outcome="finished")
        assert 80.0 == r.counted("prefix_cache_queried_tokens_total", tier="tactical")
        assert 32.0 == r.counted("prefix_cache_hit_tokens_total", tier="tactical")


async def test_a_sequence_carries_its_account_and_prices(tmp_path: Path) -> None:
    """The scheduler is fair by what the card in force says, and caches per account."""
    async with rig(tmp_path) as r:
        engine = r.gate(Tier.STRATEGIC)
        stream = await r.submit(job(requested=Tier.STRATEGIC))
        await entered(engine)
        (live,) = r.executor._live.values()
        assert "local" == live.spec.account
        assert TokenWeights(329_500, 32_950, 6_590_000) == live.spec.weights
        engine.let_pass(100)
        await read(stream)


async def test_device_time_adds_up(tmp_path: Path) -> None:
    """What the jobs were told they took is what the device was busy, cancelled ones included."""
    async with rig(tmp_path) as r:
        streams = [await r.submit(job(new=30, prompt=Prompt(token_ids=(i,)))) for i in range(4)]
        leaving = await r.submit(job(new=300))
        async for event in leaving:
            if isinstance(event, Delta):
                leaving.cancel()
        told_s = [finished_of(await read(stream)).timing.device_s for stream in streams]
        await r.settled()
        counted = [
            r.counted("device_seconds_total", tier="tactical", outcome=outcome)
            for outcome in ("finished", "aborted", "failed")
        ]
        assert pytest.approx(sum(told_s)) == counted[0]
        assert counted[1]
        assert 0.0 == counted[2]
        busy_s = [
            r.counted("engine_step_seconds_sum", tier="tactical", kind=kind)
            for kind in ("prefill", "decode", "mixed")
        ]
        assert pytest.approx(sum(filter(None, busy_s))) == sum(filter(None, counted))


async def test_an_engine_that_breaks_in_mid_job_costs_nothing(tmp_path: Path) -> None:
    """The stream ends UNAVAILABLE, the hold is given back, the work counts as wasted."""
    async with rig(tmp_path) as r:
        steps = 0

        def third(_step: Step) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                raise RuntimeError("a broken device")

        r.engines[Tier.TACTICAL].fail = third
        stream = await r.submit(job(new=50))
        with pytest.raises(TierUnavailable, match="nothing was charged"):
            await read(stream)
        await r.settled()
        assert 0 == await r.spent_uatp()
        assert 1.0 == r.counted(
            "requests_total", tier="tactical", outcome="failed", code="tier_unavailable"
        )
        assert 2.0 == r.counted("tokens_total", tier="tactical", type="output", outcome="failed")
        assert r.counted("device_seconds_total", tier="tactical", outcome="failed")
        # The other tier goes on.
        assert finished_of(await r.run(job(requested=Tier.STRATEGIC)))


async def test_a_job_without_memory_costs_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED for the one that does not fit, a normal ending for the next."""
    async with rig(tmp_path) as r:

        def full(_step: Step) -> None:
            raise DeviceOutOfMemory("no memory")

        r.engines[Tier.TACTICAL].fail = full
        stream = await r.submit(job())
        with pytest.raises(DeviceOutOfMemory):
            await read(stream)
        await r.settled()
        assert 0 == await r.spent_uatp()
        r.engines[Tier.TACTICAL].fail = None
        assert StopReason.LENGTH is finished_of(await r.run(job())).stop_reason


async def test_a_bug_of_ours_in_mid_job_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """INTERNAL with an id; the hold is given back and the sequence leaves the device."""
    async with rig(tmp_path) as r:
        engine = r.gate()

        def bug(_self: SequenceText, _token_ids: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(SequenceText, "push", bug)
            stream = await r.submit(job(new=400))
            engine.let_pass()
            with pytest.raises(Internal) as error:
                await read(stream)
        engine.let_pass(3)  # far less than 400: it was cancelled
        await r.settled()
        assert 0 == await r.spent_uatp()
    assert error.value.error_id in caplog.text


async def test_a_bug_between_hold_and_work_gives_the_hold_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays reserved for a job that never came to the device."""
    async with rig(tmp_path) as r:

        def bug(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Admission, "sequence", bug)
        with pytest.raises(Internal):
            await r.submit(job())
        await r.settled()
        assert 0 == await r.spent_uatp()


async def test_books_that_die_end_the_job_without_a_price(tmp_path: Path) -> None:
    """No Finished is sent for what could not be written; at the next start it costs nothing."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        stream = await r.submit(job(new=2))

        def disk(*_: object) -> None:
            raise apsw.IOError

        with pytest.raises(LedgerDown):
            await r.ledger._ask(disk)
        engine.let_pass(10)
        with pytest.raises(LedgerDown):
            await read(stream)
        assert 1 == len(r.deaths)
        with pytest.raises(LedgerDown):
            await r.submit(job())
        assert 2.0 == r.counted("tokens_total", tier="tactical", type="output", outcome="failed")
    assert 1 == check(r.path).open_holds
    again = await Ledger(r.path).open()
    assert GRANTED_UATP == (await again.budget("local")).balance_uatp
    await again.close()


async def test_a_hold_that_expired_under_a_job_is_not_charged(tmp_path: Path) -> None:
    """The client is told that the job ended badly, and pays nothing."""
    async with rig(tmp_path, hold_ttl_s=1e-6) as r:
        engine = r.gate()
        stream = await r.submit(job(new=2))
        assert 1 == len(await r.ledger.expire_due())
        engine.let_pass(10)
        with pytest.raises(HoldClosed):
            await read(stream)
        await r.settled()
        assert 0 == await r.spent_uatp()


async def test_upkeep_leaves_the_hold_of_a_job_that_runs(tmp_path: Path) -> None:
    """However old it is: only a hold that no job stands behind is given back."""
    async with rig(tmp_path, hold_ttl_s=1e-6) as r:
        engine = r.gate()
        stream = await r.submit(job(new=2))
        await r.ledger.hold(*asked("leaked", "local", 7, CARD.version, "tactical", ttl_s=1e-6))
        assert 1 == r.broker.num_jobs
        assert [False, True] == [r.broker.has_rivals(name) for name in ("local", "another")]
        assert ("leaked",) == await r.ledger.expire_due(r.broker.job_ids())
        engine.let_pass(10)
        finished = finished_of(await read(stream))
        assert 2 == finished.usage.output_tokens
        await r.settled()
        assert frozenset() == r.broker.job_ids()
        assert finished.price.charged_uatp == await r.spent_uatp()


async def test_a_job_that_waits_is_aborted_for_nothing(tmp_path: Path) -> None:
    """Nothing was done, so nothing is charged; the ending says why."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        first = await r.submit(job(new=2))
        await entered(engine)
        waiting = await r.submit(job(new=2))
        (_, second) = sorted(r.broker.running(), key=lambda running: -running.age_s)
        assert ("local", Tier.TACTICAL, 5, 0, 5 * 50_000 + 2 * 1_000_000) == (
            second.account, second.tier, second.prompt_tokens, second.output_tokens,
            second.held_uatp,
        )  # fmt: skip
        assert r.broker.abort(second.job_id)
        engine.let_pass(10)
        finished = finished_of(await read(waiting))
        assert StopReason.ABORTED is finished.stop_reason
        assert (Usage(0, 0, 0), 0) == (finished.usage, finished.price.charged_uatp)
        price = finished_of(await read(first)).price.charged_uatp
        assert price == await r.spent_uatp()
        assert not r.broker.abort(second.job_id)


async def test_a_cancelled_job_is_charged_for_what_it_delivered(tmp_path: Path) -> None:
    """Tokens that come after the cancellation are neither delivered nor charged."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        stream = await r.submit(job(new=400, client_request_id="one"))
        engine.let_pass(2)
        seen = 0
        async for event in stream:
            if isinstance(event, Delta):
                seen = event.output_tokens
            if seen == 2:
                break
        stream.cancel()
        stream.cancel()
        engine.let_pass(5)
        await r.settled()
        price = charge(CARD, Usage.single(Tier.TACTICAL, 5, 0, 2))
        assert price == await r.spent_uatp()
        again = await r.run(job(new=400, client_request_id="one"))
        assert StopReason.CANCELLED is finished_of(again).stop_reason
        assert price == finished_of(again).price.charged_uatp
        assert price == await r.spent_uatp()


async def test_a_cancel_beside_the_natural_end_never_calls_a_part_the_whole(
    tmp_path: Path,
) -> None:
    """Where tokens were dropped the ending says CANCELLED, also if the sequence had ended."""
    async with rig(tmp_path) as r:
        stream = await r.submit(job(new=6, client_request_id="one"))
        # The device finishes while the loop does nothing: tokens and ending come in one parcel.
        steps = r.engines[Tier.TACTICAL].steps
        while len(steps) < 6 or r.executor.load(Tier.TACTICAL).running:
            time.sleep(0.001)  # noqa: ASYNC251 - it is the loop that has to stand still
        stream.cancel()
        await r.settled()
        again = await r.run(job(new=6, client_request_id="one"))
        finished = finished_of(again)
        whole = finished.usage.output_tokens == 6
        assert whole == (finished.stop_reason is StopReason.LENGTH)
        assert finished.price.charged_uatp == await r.spent_uatp()


async def _stopped(r: Rig, reason: StopReason) -> None:
    """Wait until the one job has been asked to stop for this reason."""
    (running,) = r.broker.running()
    delivery = r.broker._jobs[running.job_id]._delivery
    while delivery.stop_reason is not reason:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.001)


async def test_the_device_stops_after_a_stop_string(tmp_path: Path) -> None:
    """What comes behind it is not charged, so it must not be computed either."""
    async with rig(tmp_path) as r:
        whole, _ = _output(await r.run(job(new=8)))
        engine = r.gate()
        done = len(engine.steps)
        stream = await r.submit(job(new=400, sampling={"stop": (whole[4:6],)}))
        engine.let_pass(8)
        await _stopped(r, StopReason.STOP_STRING)
        engine.let_pass(1000)
        finished = finished_of(await read(stream))
        assert StopReason.STOP_STRING is finished.stop_reason
        await r.settled()
        # The step that the gate held, and one that was built before the cancel was read.
        assert len(engine.steps) - done <= 8 + 2


async def test_a_stop_token_is_of_every_tier_that_may_serve(tmp_path: Path) -> None:
    """An id that only one tier's vocabulary has is for jobs that name that tier and stay there."""
    larger = tmp_path / "larger"
    larger.mkdir()
    write_padded_tokenizer(MODELS / "demo-tactical", larger, 600)
    async with rig(tmp_path) as r:
        encoder = r.broker._admission.encoder
        encoder.tokenizers = {**encoder.tokenizers, Tier.STRATEGIC: Tokenizer.load(larger)}
        sampling = {"stop_token_ids": (1, 550)}
        await r.run(job(requested=Tier.STRATEGIC, sampling=sampling))
        for fields in (
            {"requested": Tier.TACTICAL},
            {"requested": None},
            {"requested": Tier.STRATEGIC, "allow_downgrade": True},
        ):
            with pytest.raises(InvalidField) as refusal:
                await r.run(job(sampling=sampling, **fields))
            assert "job.sampling.stop_token_ids[1]" == refusal.value.field


async def test_a_job_is_charged_by_the_card_that_it_was_held_by(tmp_path: Path) -> None:
    """A dearer card that comes into force meanwhile is for the jobs after it."""
    dear = replace(
        CARD,
        version="dear",
        lines={
            tier: {phase: replace(rate, uatp=7 * rate.uatp) for phase, rate in rates.items()}
            for tier, rates in CARD.lines.items()
        },
    )
    async with rig(tmp_path) as r:
        engine = r.gate()
        stream = await r.submit(job(new=4))
        r.broker._admission.use(dear)
        engine.let_pass(10)
        finished = finished_of(await read(stream))
        assert (CARD.version, 4_250_000) == (
            finished.price.rate_card,
            finished.price.charged_uatp,
        )
        assert 4_250_000 == await r.spent_uatp()
        after = finished_of(await r.run(job(new=4)))
        assert ("dear", 7 * 4_250_000) == (after.price.rate_card, after.price.charged_uatp)


async def test_who_leaves_before_the_job_is_admitted_stops_it(tmp_path: Path) -> None:
    """There is no stream to cancel yet: the call itself is, and goes on until nothing is held."""
    async with rig(tmp_path) as r:
        busy, free = threading.Event(), threading.Event()

        def block(*_: object) -> None:
            busy.set()
            assert free.wait(WAIT_S)

        blocked = asyncio.create_task(r.ledger._ask(block))
        assert await asyncio.to_thread(busy.wait, WAIT_S)
        asked = asyncio.create_task(r.submit(job(new=400)))
        while not r.broker.num_jobs:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.sleep(0)
        assert not asked.done(), "its call keeps its turn for as long as there is work for it"
        free.set()
        await blocked
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert 0 == r.broker.num_jobs
        await r.settled()
        assert [] == r.engines[Tier.TACTICAL].steps
        assert 0 == await r.spent_uatp()


async def test_a_deadline_counts_from_the_arrival(tmp_path: Path) -> None:
    """What a request waited before it was read is part of its time."""
    async with rig(tmp_path) as r:
        late = job(new=400, sampling={"deadline_s": 60.0})
        with pytest.raises(DeadlineInfeasible, match=r"0\.00 s are left"):
            await r.broker.submit(late, time.monotonic() - 60.0)
        engine = r.gate()
        stream = await r.broker.submit(late, time.monotonic() - 58.5)
        await _stopped(r, StopReason.DEADLINE)
        engine.let_pass(1000)
        finished = finished_of(await read(stream))
        assert StopReason.DEADLINE is finished.stop_reason
        assert finished.timing.total_s >= 60.0


async def test_nothing_comes_after_a_stop_string_whatever_else_was_asked(tmp_path: Path) -> None:
    """An abort that comes with it changes nothing: the text is complete and ends there."""
    async with rig(tmp_path) as r:
        whole, _ = _output(await r.run(job(new=8)))
        engine = r.gate()
        stop = whole[4:6]
        stream = await r.submit(job(new=8, sampling={"stop": (stop,)}))
        engine.let_pass(7)
        # The loop stands still until the last step has begun: seven tokens are under way.
        while len(engine.steps) < 8 + 7 or not engine.entered.acquire(timeout=WAIT_S):
            time.sleep(0.001)  # noqa: ASYNC251
        (running,) = r.broker.running()
        assert r.broker.abort(running.job_id)
        events = aiter(stream)
        seen = [await anext(events), await anext(events)]
        engine.let_pass()
        seen += [event async for event in events]
        assert whole[: whole.index(stop)] == _output(seen)[0]
        assert StopReason.STOP_STRING is finished_of(seen).stop_reason


async def test_whoever_leaves_before_the_hold_is_known_holds_nothing(tmp_path: Path) -> None:
    """A submit that is cancelled at any await before its answer leaves books and device clean."""
    async with rig(tmp_path) as r:
        for turns in range(12):
            asking = asyncio.create_task(r.submit(job(new=300)))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await asking).cancel()
            await r.settled()


async def test_a_job_torn_off_with_its_task_is_given_back(tmp_path: Path) -> None:
    """The last line of defence: even a cancelled job task voids its hold and ends its stream."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        stream = await r.submit(job(new=300))
        await entered(engine)
        (running,) = r.broker.running()
        (task,) = (t for t in asyncio.all_tasks() if t.get_name() == running.job_id)
        task.cancel()
        with pytest.raises(TierUnavailable):
            await read(stream)
        engine.let_pass(3)
        await r.settled()
        assert 0 == await r.spent_uatp()


async def test_a_request_id_runs_once_at_a_time(tmp_path: Path) -> None:
    """While it runs it is refused, afterwards replayed, and another payload is refused."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        first = await r.submit(job(client_request_id="one"))
        with pytest.raises(RequestIdConflict):
            await r.submit(job(client_request_id="one"))
        engine.let_pass(10)
        events = await read(first)
        replayed = await r.run(job(client_request_id="one"))
        assert isinstance(replayed[0], Started)
        assert replayed[0].replayed
        assert _output(events) == _output(replayed)
        assert finished_of(events) == finished_of(replayed)
        with pytest.raises(RequestIdConflict):
            await r.submit(job(new=5, client_request_id="one"))
        assert finished_of(events).price.charged_uatp == await r.spent_uatp()
        assert 1.0 == r.counted(
            "requests_total", tier="tactical", outcome="replayed", code="replayed"
        )


async def test_a_full_queue_admits_no_more(tmp_path: Path) -> None:
    """The batch's free places are filled beyond the queue's limit; then jobs are refused."""
    async with rig(tmp_path, max_waiting=2) as r:
        engine = r.gate()
        streams = [await r.submit(job(new=2))]
        await entered(engine)
        # All at once: none has started yet, and there are places in the batch for each of them.
        streams += await asyncio.gather(*(r.submit(job(new=2)) for _ in range(6)))
        with pytest.raises(QueueFull) as full:
            await r.submit(job(new=2))
        assert full.value.retry_after_s
        engine.let_pass(100)
        endings = [finished_of(await read(stream)) for stream in streams]
        await r.settled()
        assert sum(end.price.charged_uatp for end in endings) == await r.spent_uatp()


async def test_a_job_that_nobody_takes_is_refused_unread(tmp_path: Path) -> None:
    """A prompt that would cost work costs none; it is counted, and an answered id is answered."""
    async with rig(tmp_path, max_waiting=1) as r:
        answered = replace(job(new=2), client_request_id="before")
        finished_of(await r.run(answered))
        engine = r.gate()
        streams = [await r.submit(job(new=2))]
        await entered(engine)
        running = replace(job(new=2), client_request_id="running")
        streams.append(await r.submit(running))
        malformed = replace(job(), prompt=Prompt(token_ids=(10**9,)))
        with pytest.raises(QueueFull) as full:
            await r.submit(malformed)
        assert full.value.retry_after_s
        with pytest.raises(QueueFull):
            await r.submit(replace(malformed, client_request_id="new"))
        with pytest.raises(RequestIdConflict):
            await r.submit(running)
        assert finished_of(await r.run(answered))
        assert 2.0 == r.counted(
            "requests_total", tier="tactical", outcome="refused", code="queue_full"
        )
        assert 2.0 == r.counted(
            "route_decisions_total", requested="tactical", chosen="none", reason="queue_full"
        )
        engine.let_pass(100)
        for stream in streams:
            finished_of(await read(stream))
        with pytest.raises(InvalidField):
            await r.submit(malformed)


async def test_the_last_place_is_held_for_once(tmp_path: Path) -> None:
    """It is the first comer's while the books write its hold; nobody holds for nothing."""
    async with rig(tmp_path, max_waiting=2) as r:
        engine = r.gate()
        streams = [await r.submit(job(new=2))]
        await entered(engine)
        streams.append(await r.submit(job(new=2)))
        asked = await asyncio.gather(
            *(r.submit(job(new=2)) for _ in range(5)), return_exceptions=True
        )
        streams += [answer for answer in asked if isinstance(answer, OutgoingStream)]
        refusals = [answer for answer in asked if isinstance(answer, QueueFull)]
        assert (3, 4) == (len(streams), len(refusals))
        engine.let_pass(100)
        for stream in streams:
            finished_of(await read(stream))
        await r.settled()
        held = [
            entry for entry in await entries_of(r.ledger, "local") if entry.kind is EntryKind.HOLD
        ]
        assert len(streams) == len(held)


async def test_answers_that_nobody_reads_take_the_places_of_their_own_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count among its jobs, and never among those of all; a reader that leaves frees one."""
    async with rig(tmp_path, max_account_jobs=18) as r:
        streams = [await r.submit(job(new=2)) for _ in range(18)]
        for stream in streams:
            assert isinstance(await anext(aiter(stream)), Started)
        await r.settled()
        assert 0 == r.broker.num_jobs
        # Nobody has been away for long: those who come back in a moment are no obstacle.
        streams.append(await r.submit(job(new=2)))
        finished_of(await read(streams[-1]))
        monkeypatch.setattr("sage_fed.device.messages.AWAY_S", 0.0)
        with pytest.raises(RateLimited) as full:
            await r.submit(job(new=2))
        assert ("concurrent_jobs", 18) == (full.value.limit, full.value.allowed)
        finished_of(await read(await r.submit(job(new=2, account="robot"))))
        streams[3].cancel()
        finished_of(await read(await r.submit(job(new=2))))
        for stream in streams:
            stream.cancel()


async def test_more_jobs_than_all_may_have_are_refused(tmp_path: Path) -> None:
    """Whoever they are of; a job that has ended is none of them, read or not."""
    async with rig(tmp_path, max_waiting=32) as r:
        engine = r.gate()
        streams = [await r.submit(job(new=2)) for _ in range(16)]
        with pytest.raises(QueueFull) as full:
            await r.submit(job(new=2))
        assert full.value.retry_after_s
        engine.let_pass(1000)
        await r.settled()
        finished_of(await read(await r.submit(job(new=2))))
        for stream in streams:
            stream.cancel()


async def test_a_reader_that_sleeps_gets_one_delta_with_everything(tmp_path: Path) -> None:
    """The job does not wait for its reader; nothing is lost and nothing grows beyond the job."""
    async with rig(tmp_path) as r:
        fast = await r.run(job(new=40))
        stream = await r.submit(job(new=40))
        await r.settled()
        slow = await read(stream)
        assert [Started, Delta, Finished] == [type(event) for event in slow]
        assert _output(fast) == _output(slow)


async def test_a_quote_names_each_tier_with_its_price(tmp_path: Path) -> None:
    """Worst cases by the card, and which of them the balance covers."""
    async with rig(tmp_path) as r:
        quote = await r.broker.quote(job(new=2000))
        assert [
            (Tier.TACTICAL, 5 * 50_000 + 2000 * 1_000_000, True),
            (Tier.STRATEGIC, 5 * 329_500 + 2000 * 6_590_000, False),
        ] == [
            (one.tier, one.worst_case_uatp, one.affordable)
            for one in quote.tiers
            if one.mode is Mode.SINGLE
        ]


@pytest.mark.parametrize("requested", [None, Tier.TACTICAL])
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
@pytest.mark.parametrize("top", [None, 0, 2])
@pytest.mark.parametrize("tier", [Tier.TACTICAL, Tier.called("deep")])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_kept_result_reads_back_as_it_was(
    requested: Tier | None, num_tokens: int, top: int | None, tier: Tier, *, drafted: bool
) -> None:
    """Also of a job that left the tier to the daemon, or of a third one; marked as replayed."""
    started = Started("job-1", Route(tier, "auto_simple", requested), 9, 3, 2**63, 16)
    logprob = Logprob(7, -0.5, ((7, -0.5), (8, -1.5))[:top])
    logprobs = () if top is None else (logprob,) * num_tokens
    made_by = (TokenOrigin.ACCEPTED, TokenOrigin.STRATEGIC) * (num_tokens if drafted else 0)
    output = Delta(
        "Grüß\n", tuple(range(num_tokens)), logprobs, num_tokens, origins=made_by[:num_tokens]
    )
    stages = (StageTiming(Tier.TACTICAL, 0.1, 0.1, 0.1, 0.1), StageTiming(tier, 0.0, 0.1, 0.2, 0.5))
    finished = Finished(
        StopReason.CANCELLED, Usage.single(tier, 3, 1, num_tokens),
        Timing(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, stages), Price(5, 9, "card"), 100,
    )  # fmt: skip
    again = Result.from_bytes(Result(started, output, finished).to_bytes())
    assert Result(replace(started, replayed=True), output, finished) == again


@pytest.mark.parametrize("data", [b"", b"\4", b'{"format":4}'])
def test_bytes_of_another_format_are_no_result(data: bytes) -> None:
    """As of a later version."""
    with pytest.raises(ValueError, match="another format"):
        Result.from_bytes(data)


@pytest.mark.parametrize(("prompt", "new"), [(5, 16), (500, 12), (511, 1)])
async def test_a_job_that_does_not_say_gets_what_fits(
    tmp_path: Path, prompt: int, new: int
) -> None:
    """The default, or the rest of the context where that is less; and a seed to repeat it by."""
    async with rig(tmp_path) as r:
        asked = job(prompt=Prompt(token_ids=(9,) * prompt), sampling={"max_new_tokens": None})
        quote = await r.broker.quote(asked)
        assert ("explicit", new) == (quote.decision.reason, quote.max_new_tokens)
        open_seed = replace(asked, sampling=SamplingRequest())
        seeds = {(await r.broker._admission.draft(open_seed, 0.0)).seed for _ in range(2)}
        assert 2 == len(seeds)
        assert all(0 <= seed < 2**63 for seed in seeds)
        full = await r.broker.quote(replace(asked, prompt=Prompt(token_ids=(9,) * 600)))
        # Never less than one: a negative number of tokens would have a negative price.
        assert ("prompt_too_long", 1) == (full.decision.reason, full.max_new_tokens)


@pytest.mark.parametrize(
    ("reached", "timing"),
    [
        (
            {"started_s": 12.0, "first_token_s": 15.0, "last_token_s": 19.0},
            Timing(1.0, 3.0, 4.0, 5.0, 20.0, 0.5),
        ),
        ({"started_s": 12.0}, Timing(1.0, 0.0, 0.0, 0.0, 20.0, 0.5)),
        ({}, Timing(14.0, 0.0, 0.0, 0.0, 20.0, 0.5)),
    ],
)
def test_a_jobs_times_are_what_it_came_to(reached: dict[str, float], timing: Timing) -> None:
    """Queue, prompt, tokens, first token and all of it, each from where it begins."""
    ended = Ended(1, EndReason.LENGTH, submitted_s=11.0, ended_s=25.0, device_s=0.5, **reached)
    found = timing_of([(Stage(Tier.TACTICAL, (), 4), ended)], arrived_s=10.0, now=30.0)
    assert timing == replace(found, stages=())
    (stage,) = found.stages
    assert (Tier.TACTICAL, timing.queue_s, timing.device_s) == (
        stage.tier, stage.queue_s, stage.device_s,
    )  # fmt: skip


def test_a_drafters_time_is_the_jobs_and_of_its_own_tier() -> None:
    """Over all jobs and tiers it adds up to the time that the device was busy."""
    stage = Stage(Tier.STRATEGIC, (), 4, drafter=Tier.TACTICAL)
    ended = Ended(1, EndReason.LENGTH, submitted_s=1.0, ended_s=2.0, device_s=0.5, draft_s=0.25)
    timing = timing_of([(stage, ended)], arrived_s=1.0, now=2.0)
    (told,) = timing.stages
    assert (0.75, 0.5, Tier.TACTICAL, 0.25) == (
        timing.device_s, told.device_s, told.drafter, told.draft_s,
    )  # fmt: skip


def test_a_job_that_never_ran_took_only_its_waiting() -> None:
    """Nothing is known but when it came and when it was over."""
    assert Timing(0.0, 0.0, 0.0, 0.0, 20.0) == timing_of([], arrived_s=10.0, now=30.0)


async def test_a_quote_does_not_take_its_own_calls_deadline_for_the_jobs(tmp_path: Path) -> None:
    """A client that waits a millisecond for a quote may still have the job run for minutes."""
    async with rig(tmp_path) as r:
        await r.run(job(new=20))
        impatient = replace(job(new=400), call_deadline_s=1e-6)
        quote = await r.broker.quote(impatient)
        assert "explicit" == quote.decision.reason
        hurried = job(new=400, sampling={"deadline_s": 1e-6})
        assert "deadline_infeasible" == (await r.broker.quote(hurried)).decision.reason


async def test_a_closed_broker_refuses_and_lets_jobs_end(tmp_path: Path) -> None:
    """What runs ends in its own time, what comes is told to come back."""
    async with rig(tmp_path) as r:
        engine = r.gate()
        stream = await r.submit(job(new=3))
        r.broker.close()
        with pytest.raises(TierUnavailable) as refusal:
            await r.submit(job())
        assert refusal.value.retry_after_s is not None
        engine.let_pass(10)
        assert StopReason.LENGTH is finished_of(await read(stream)).stop_reason


async def test_a_stop_can_wait_until_every_ending_is_read(tmp_path: Path) -> None:
    """A job that has ended still has a reader, until that leaves."""
    async with rig(tmp_path) as r:
        await r.broker.wait_read()
        first, second = await r.submit(job()), await r.submit(job())
        await r.settled()
        waiting = asyncio.create_task(r.broker.wait_read())
        await read(first)
        first.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
        await read(second)
        second.cancel()
        await asyncio.wait_for(waiting, WAIT_S)


def _output(events: list[Event]) -> tuple[str, tuple[int, ...]]:
    deltas = [event for event in events if isinstance(event, Delta)]
    ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    return "".join(delta.text for delta in deltas), ids


LOGPROBS = {"top_logprobs": 20}


@pytest.mark.parametrize(
    ("fields", "field"),
    [({}, "job.sampling.max_new_tokens"), ({"sampling": LOGPROBS}, "job.sampling.top_logprobs")],
)
async def test_an_answer_that_one_reply_cannot_have_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], field: str
) -> None:
    """By the field that makes it so large; as a stream the same job runs."""
    async with rig(tmp_path) as r:
        monkeypatch.setattr(admission, "MAX_REPLY_BYTES", 4500)
        with pytest.raises(InvalidField, match="one reply may have; stream it") as refusal:
            await r.submit(job(new=50, one_reply=True, **fields))
        assert field == refusal.value.field
        assert 0 == check(r.path).folded_entries
        assert 50 == finished_of(await r.run(job(new=50, **fields))).usage.output_tokens
        await r.run(job(new=1, one_reply=True))
        await r.settled()


async def test_an_answer_that_could_not_be_kept_is_refused_before_it_is_held(
    tmp_path: Path,
) -> None:
    """Where it has a request id, which would have to answer a repeat; without one it runs."""
    kept = Retention(one_result_bytes=5000)
    async with rig(tmp_path, retention=kept) as r:
        with pytest.raises(InvalidField, match="is kept for a client_request_id") as refusal:
            await r.submit(job(new=100, client_request_id="one"))
        assert "job.sampling.max_new_tokens" == refusal.value.field
        assert 0 == check(r.path).folded_entries
        await r.run(job(new=100))
        first = await r.run(job(new=4, client_request_id="one"))
        again = await r.run(job(new=4, client_request_id="one"))
        assert finished_of(first).usage == finished_of(again).usage
        await r.settled()


@given(
    text=st.text(max_size=60),
    num_tokens=st.integers(1, 400),
    top=st.none() | st.integers(0, 5),
    logprob=st.floats(allow_nan=False, allow_infinity=False),
    token_id=st.integers(0, 2**32 - 1),
)
def test_what_an_answer_can_take_at_most_is_never_less_than_it_does(
    text: str, num_tokens: int, top: int | None, logprob: float, token_id: int
) -> None:
    """As one reply and as it is kept; whatever its text, its ids and its numbers are."""
    tops = () if top is None else ((token_id, logprob),) * top
    logprobs = () if top is None else (Logprob(token_id, logprob, tops),) * num_tokens
    origins = (TokenOrigin.ACCEPTED,) * num_tokens
    output = Delta(text * num_tokens, (token_id,) * num_tokens, logprobs, num_tokens, origins)
    route = Route(Tier.STRATEGIC, "downgrade_deadline", requested=Tier.STRATEGIC)
    started = Started("job-" + "f" * 16, route, 2**53, 10**6, 2**64 - 1, 10**6)
    finished = Finished(
        StopReason.STOP_STRING,
        Usage(
            10**6, 10**6, 10**6, tuple(PhaseTokens(Tier.STRATEGIC, phase, 10**6) for phase in Phase)
        ),
        Timing(*([1 / 3] * 6)),
        Price(2**53, 2**53, "x" * 64),
        balance_uatp=2**53,
    )
    spec = job(new=num_tokens, sampling={"top_logprobs": top})
    text_bytes = len(text.encode())
    reply = encode(
        Answer(started, output.text, output.token_ids, output.logprobs, finished),
        inference_pb2.GenerateResponse,
    )
    kept = Result(started, output, finished).to_bytes()

    most_bytes = most_answer_bytes(spec, num_tokens, text_bytes)
    assert max(reply.ByteSize(), len(kept)) <= most_bytes
    assert spec == replace(spec, one_reply=True)
    assert payload_hashes(spec) == payload_hashes(replace(spec, one_reply=True))


def test_the_default_limits_refuse_nothing_for_its_size() -> None:
    """Longest answers with all log-probabilities, of a vocabulary whose longest entry is long."""
    limits = LimitSettings()
    spec = job(sampling={"top_logprobs": limits.max_top_logprobs})
    longest = 256
    most_bytes = most_answer_bytes(spec, limits.max_new_tokens, longest)
    assert min(admission.MAX_REPLY_BYTES, Retention().one_result_bytes) > most_bytes


@pytest.mark.parametrize("refused", [False, True], ids=["served", "refused"])
async def test_a_job_leaves_nothing_to_the_garbage_collector(
    tmp_path: Path, *, refused: bool
) -> None:
    """What it had is freed when it ends: a collection stops the loop for all that there is."""
    async with rig(tmp_path) as r:
        kinds = (Job, JobSpec, OutgoingStream)

        async def once() -> None:
            with contextlib.suppress(CannotAfford):
                await r.run(job(new=4, max_cost_uatp=1) if refused else job(new=4))
            await r.settled()

        await once()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await once()
            gc.collect()
            ours = [type(found).__name__ for found in gc.garbage if isinstance(found, kinds)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert [] == ours
