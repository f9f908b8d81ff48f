"""The executor with both tiers serving: streams, cancels, failures, and what it reports."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from executor_rig import Rig, Tokens, read, serving, submit
from fake_engine import WAIT_S, entered, reference, spec

from sage_fed.core import TIER_ROLES, DraftOrigin, Tier, TierState
from sage_fed.device import EndReason
from sage_fed.device.messages import Batch
from sage_fed.errors import DeviceOutOfMemory, InvalidField, TierUnavailable
from sage_fed.steps import Step, StepKind, StepReport, VerifiedDrafts

T, S = Tier.TACTICAL, Tier.STRATEGIC


@pytest.mark.parametrize(("pipelined", "num_parts"), [(False, 1), (True, 1), (False, 5)])
async def test_every_stream_is_what_it_would_be_alone(*, pipelined: bool, num_parts: int) -> None:
    """Many sequences on both tiers, joining and leaving at random, do not touch each other."""
    rig = Rig(pipelined=pipelined, num_parts=num_parts, max_batch=8, max_waiting=200)
    chance = random.Random(2)
    asked = [
        spec(i, chance.choice([T, S]), prompt=chance.randint(1, 60), new=chance.randint(1, 30))
        for i in range(120)
    ]
    async with serving(rig) as executor:
        readers = []
        gone = set()
        for one in asked:
            readers.append(asyncio.create_task(read(submit(executor, one))))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            if chance.random() < 0.2:
                gone.add(one.seq_id)
                executor.cancel(one.seq_id)
        results = await asyncio.gather(*readers)
        loads = [executor.load(tier) for tier in TIER_ROLES]
    for one, (tokens, ended) in zip(asked, results, strict=True):
        expected = reference(one)
        assert expected[: len(tokens)] == tokens
        assert len(tokens) == ended.output_tokens
        if one.seq_id not in gone:
            assert (EndReason.LENGTH, expected) == (ended.reason, tokens)
    assert [(0, 0, 0)] * 2 == [(l_.running, l_.waiting, l_.kv_tokens_used) for l_ in loads]
    busy_s = rig.clock.now - 100.0
    assert pytest.approx(busy_s) == sum(ended.device_s for _, ended in results)


async def test_tokens_are_delivered_as_they_come() -> None:
    """A reader that is called gets every token in order, and the ending after the last."""
    rig = Rig()
    async with serving(rig) as executor:
        one = spec(1, T, prompt=5, new=20)
        got: list[int] = []
        ended = await executor.submit(one, lambda drawn: got.extend(d.token_id for d in drawn))
    assert reference(one) == got
    assert (EndReason.LENGTH, 20) == (ended.reason, ended.output_tokens)


async def test_a_reader_that_fails_fails_alone() -> None:
    """Its error comes out of its own wait; a neighbour in the same step loses no token."""
    rig = Rig()
    async with serving(rig) as executor:
        broken, well = spec(1, T, prompt=5, new=20), spec(2, T, prompt=7, new=20)

        def fail(_: object) -> None:
            raise ZeroDivisionError

        async def deliver() -> None:
            with pytest.raises(ZeroDivisionError):
                await executor.submit(broken, fail)

        _, (tokens, ended) = await asyncio.gather(deliver(), read(submit(executor, well)))
        executor.cancel(broken.seq_id)
    assert (reference(well), EndReason.LENGTH) == (tokens, ended.reason)


async def test_a_stalled_loop_is_woken_once() -> None:
    """Ten steps while the event loop does not run are one wake-up with all the tokens."""
    rig = Rig()
    engine = rig.gate(T)
    loop = asyncio.get_running_loop()
    wakes = 0
    real = loop.call_soon_threadsafe

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal wakes
        wakes += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]

    async with serving(rig) as executor:
        stream = submit(executor, spec(0, new=20))
        loop.call_soon_threadsafe = counting  # type: ignore[method-assign,assignment]
        assert engine.entered.acquire(timeout=WAIT_S)
        for _ in range(10):
            engine.let_pass()
            # Blocks the event loop on purpose: the tenth acquire says ten steps were handed over.
            assert engine.entered.acquire(timeout=WAIT_S)
        assert 1 == wakes
        first = await stream.next()
        loop.call_soon_threadsafe = real  # type: ignore[method-assign]
        engine.let_pass(100)
        await stream.wait_ended()
    assert isinstance(first, Tokens)
    assert 10 == len(first.drawn)
    assert 10 == len([r for r in rig.observer.reports if r.tier is T][:10])


async def test_a_cancel_frees_the_blocks_at_the_step_boundary() -> None:
    """The step on the device is the last one, and the KV is free when the ending comes."""
    rig = Rig()
    engine = rig.gate(T)
    async with serving(rig) as executor:
        stream = submit(executor, spec(0, new=50))
        await entered(engine)
        assert executor.cancel(0)
        assert executor.cancel(0)
        engine.let_pass(100)
        tokens, ended = await read(stream)
        load = executor.load(T)
        assert not executor.cancel(0)
    assert (EndReason.CANCELLED, 1) == (ended.reason, len(engine.steps))
    assert reference(spec(0, new=50))[:1] == tokens
    assert 0 == load.kv_tokens_used


async def test_a_load_is_never_older_than_an_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a cancel's ending is told, the published load has its blocks free already."""
    rig = Rig()
    engine = rig.gate(T)
    used: list[int] = []
    async with serving(rig) as executor:
        device = executor._device
        assert device
        real = device._outbox.put

        def put(**news: object) -> None:
            if news.get("ended"):
                used.append(device.loads[T].kv_tokens_used)
            real(**news)  # type: ignore[arg-type]

        monkeypatch.setattr(device._outbox, "put", put)
        stream = submit(executor, spec(0, new=50))
        await entered(engine)
        executor.cancel(0)
        engine.let_pass(100)
        await stream.wait_ended()
    assert [0] == used


async def test_every_sequence_can_be_cancelled() -> None:
    """Running and waiting sequences of both tiers are cancelled, and new ones are served."""
    rig = Rig(max_batch=2)
    engine = rig.gate(S)
    async with serving(rig) as executor:
        streams = [submit(executor, spec(i, S, new=50)) for i in range(5)]
        await entered(engine)
        engine.let_pass(1000)
        for stream in streams:
            executor.cancel(stream.spec.seq_id)
        assert [EndReason.CANCELLED] * 5 == [(await s.wait_ended()).reason for s in streams]
        tokens, _ = await read(submit(executor, spec(9, T)))
    assert reference(spec(9)) == tokens


async def test_a_broken_engine_takes_only_its_own_tier() -> None:
    """Tactical's sequences end FAILED and its tier refuses; strategic does not notice."""
    rig = Rig()
    engine = rig.gate(S)

    def breaks(_step: Step) -> None:
        raise RuntimeError("device-side assert")

    rig.engines[T].fail = breaks
    async with serving(rig) as executor:
        strategic = submit(executor, spec(0, S, new=10))
        await entered(engine)
        doomed = [submit(executor, spec(i, T)) for i in (1, 2)]
        engine.let_pass(100)
        endings = [(await read(stream))[1] for stream in doomed]
        tokens, ended = await read(strategic)
        assert [EndReason.FAILED] * 2 == [failed.reason for failed in endings]
        busy_s = rig.clock.now - 100.0
        assert pytest.approx(busy_s) == sum(e.device_s for e in (*endings, ended))
        assert reference(spec(0, S, new=10)) == tokens
        assert TierState.FAILED is executor.status(T).state
        assert TierState.FAILED is executor.load(T).state
        assert TierState.READY is executor.status(S).state
        with pytest.raises(TierUnavailable):
            submit(executor, spec(3, T))
        tokens, _ = await read(submit(executor, spec(4, S)))
        assert reference(spec(4, S)) == tokens
    assert rig.engines[T].closed
    assert "device-side" not in executor.status(T).message


async def test_an_engine_that_answers_wrongly_is_broken() -> None:
    """A draw without an answer fails the tier, and no sequence hangs."""
    rig = Rig()
    rig.engines[T].answer = lambda _step: ()  # type: ignore[method-assign]
    async with serving(rig) as executor:
        _, ended = await read(submit(executor, spec(0)))
    assert EndReason.FAILED is ended.reason


async def test_a_step_too_big_for_memory_costs_one_sequence() -> None:
    """The newest prefill ends OUT_OF_MEMORY; who was decoding gets the same tokens as ever."""
    rig = Rig()
    engine = rig.gate(T)

    def fits(step: Step) -> None:
        if step.num_tokens > 30:
            raise DeviceOutOfMemory("no room for this job")

    engine.fail = fits
    async with serving(rig) as executor:
        small = submit(executor, spec(0, new=12))
        await entered(engine)
        big = submit(executor, spec(1, prompt=40))
        engine.let_pass(1000)
        _, ended = await read(big)
        tokens, _ = await read(small)
    assert (EndReason.OUT_OF_MEMORY, 0) == (ended.reason, ended.output_tokens)
    assert reference(spec(0, new=12)) == tokens
    assert 1 == sum(report.out_of_memory for report in rig.observer.reports)


async def test_waiting_is_counted() -> None:
    """What has not started is counted over inbox and queue: admission bounds it."""
    rig = Rig(max_batch=1, max_waiting=3)
    engine = rig.gate(T)
    async with serving(rig) as executor:
        streams = [submit(executor, spec(0))]
        await entered(engine)
        streams += [submit(executor, spec(i)) for i in (1, 2, 3)]
        assert 3 == executor.load(T).waiting
        submit(executor, spec(5, S))
        engine.let_pass(1000)
        for stream in streams:
            await stream.wait_ended()
        await read(submit(executor, spec(6)))
        assert 0 == executor.load(T).waiting


async def test_a_sequence_that_can_never_fit_is_refused_at_once() -> None:
    """The refusal is synchronous: nothing is accepted that has to end."""
    rig = Rig()
    async with serving(rig) as executor:
        with pytest.raises(InvalidField):
            submit(executor, spec(0, prompt=500, new=13))
        assert 0 == executor.num_live


async def test_tactical_keeps_stepping_while_strategic_prefills() -> None:
    """Between two chunks of a long strategic prompt there are tactical tokens."""
    rig = Rig()
    log: list[Tier] = []
    for tier, engine in rig.engines.items():
        engine.fail = lambda _step, tier=tier: log.append(tier)
    rig.engines[S].step_s, rig.engines[S].token_s = 0.06, 0.001
    gate = rig.gate(T)
    async with serving(rig) as executor:
        submit(executor, spec(0, T, new=200))
        await entered(gate)
        strategic = submit(executor, spec(1, S, prompt=480, new=2))
        gate.let_pass(1000)
        _, ended = await read(strategic)
        executor.cancel(0)
    text = "".join("t" if tier is T else "S" for tier in log)
    assert "SS" not in text.rstrip("S")
    assert text.count("S") >= 4
    assert text.count("t") > 3 * text.count("S")
    assert 480 == ended.prompt_tokens


async def test_an_idle_executor_sleeps_until_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No step, no poll, no clock reading; and a submit wakes it."""
    rig = Rig()
    async with serving(rig) as executor:
        condition = executor._inbox._changed
        asleep = threading.Semaphore(0)
        timeouts: list[object] = []
        real = condition.wait

        def wait(timeout: float | None = None) -> bool:
            timeouts.append(timeout)
            asleep.release()
            return real(timeout)

        monkeypatch.setattr(condition, "wait", wait)
        for i in range(2):
            await read(submit(executor, spec(i, new=3)))
            assert await asyncio.to_thread(asleep.acquire, timeout=WAIT_S)
            heartbeat = executor.heartbeat
            assert heartbeat
            assert (3 * (i + 1), False) == (heartbeat.steps_done, heartbeat.busy)
        assert [None, None] == timeouts


async def test_a_heartbeat_tells_stuck_from_idle() -> None:
    """Busy with no progress is what a watchdog looks for."""
    rig = Rig()
    engine = rig.gate(T)
    async with serving(rig) as executor:
        submit(executor, spec(0))
        await entered(engine)
        heartbeat = executor.heartbeat
        assert heartbeat
        assert (0, True) == (heartbeat.steps_done, heartbeat.busy)


async def test_load_is_unmeasured_until_there_was_traffic() -> None:
    """Rates are None at first, then figures of the steps that were run."""
    rig = Rig()
    async with serving(rig) as executor:
        before = executor.load(T)
        await read(submit(executor, spec(0, prompt=20, new=5)))
        after = executor.load(T)
    assert (TierState.READY, None, None) == (
        before.state,
        before.decode_step_s,
        before.prefill_tokens_per_s,
    )
    assert (64 * 16, 512, 64) == (
        before.kv_tokens_total,
        before.max_context_tokens,
        before.waiting_limit,
    )
    assert pytest.approx(0.01) == after.decode_step_s
    assert pytest.approx(2000.0) == after.prefill_tokens_per_s


async def test_observers_hear_of_every_step() -> None:
    """Kinds, tokens and device time add up to what was done."""
    rig = Rig()
    async with serving(rig) as executor:
        await read(submit(executor, spec(0, prompt=20, new=5)))
    reports = rig.observer.reports
    assert [StepKind.PREFILL, *[StepKind.DECODE] * 4] == [r.kind for r in reports]
    assert (20, 4) == (
        sum(r.num_prefill_tokens for r in reports),
        sum(r.num_decode_tokens for r in reports),
    )
    assert pytest.approx(rig.clock.now - 100.0) == sum(r.elapsed_s for r in reports)


def test_a_batch_left_lying_keeps_its_size() -> None:
    """Reports beyond the bound are added up, and none is lost."""
    batch = Batch()
    report = StepReport(T, StepKind.DECODE, 1, 0, 3, 3, 0.5)
    for _ in range(5000):
        batch.add_report(report)
    kept = [*batch.reports, *batch.summed.values()]
    assert len(kept) < 1100
    assert (5000, 15_000, 2500.0) == (
        sum(r.num_steps for r in kept),
        sum(r.num_decode_tokens for r in kept),
        sum(r.elapsed_s for r in kept),
    )


def test_drafts_of_a_batch_left_lying_are_added_up() -> None:
    """By origin and accepted length, of which there are few, and none is lost."""
    batch = Batch()
    for number in range(6000):
        origin = DraftOrigin.DRAFTER if number % 2 else DraftOrigin.ANSWER
        draft = VerifiedDrafts(origin, number % 5, 4)
        report = StepReport(
            S, StepKind.DECODE, 1, 0, 1, 1, 0.5, num_verify_tokens=4, verified=(draft,)
        )
        batch.add_report(report)
    kept = [*batch.reports, *batch.summed.values()]
    drafts = [draft for report in kept for draft in report.verified]
    assert 24_000 == sum(r.num_verify_tokens for r in kept) == sum(d.num_tokens for d in drafts)
    assert 6000 == sum(draft.num_drafts for draft in drafts)
    assert 12_000 == sum(draft.num_accepted * draft.num_drafts for draft in drafts)
    assert 10 == max(len(report.verified) for report in kept)
