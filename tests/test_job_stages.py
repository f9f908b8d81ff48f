"""A job whose program has two stages: one hold, two sequences, a decision between them.

The programs are made here; the only one that the daemon makes is of one stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_engine import entered
from test_broker import CARD, PROMPT, WAIT_S, Rig, finished_of, job, read, rig

from sage_fed.cards.rate_card import charge, charge_by_tier, quote_program
from sage_fed.core import (
    UATP_PER_ATP,
    Delta,
    JobSpec,
    Phase,
    Program,
    Prompt,
    Stage,
    Started,
    StopReason,
    Tier,
    Usage,
)
from sage_fed.errors import DeviceOutOfMemory, QueueFull, SageFedError, TierUnavailable
from sage_fed.jobs.admission import Admission
from sage_fed.ledger import check

T, S = Tier.TACTICAL, Tier.STRATEGIC

Decide = Callable[[Delta, Stage], Stage | None]


def escalate(answer: Delta, planned: Stage) -> Stage:
    """Have the answer verified."""
    return replace(planned, draft_tokens=answer.token_ids)


def spoil(answer: Delta, planned: Stage) -> Stage:
    """Have a draft verified that is wrong from its third token on."""
    wrong = (token_id + 1 for token_id in answer.token_ids[2:])
    return replace(planned, draft_tokens=(*answer.token_ids[:2], *wrong))


def keep(_answer: Delta, _planned: Stage) -> None:
    """Be content with the first answer."""


@asynccontextmanager
async def two_stages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decide: Decide,
    num_before: int = 1,
    **options: Any,  # noqa: ANN401 - the rig's
) -> AsyncIterator[Rig]:
    """Jobs for the strategic tier ask the tactical one first, `num_before` times."""

    def program(_: Admission, _spec: JobSpec, tier: Tier, ids: Any, new: int) -> Program:  # noqa: ANN401 - a mapping
        last = Stage(tier, ids[tier], new)
        if tier == T:
            return Program((last,))
        before = (Stage(T, ids[T], new),) * num_before
        return Program((*before, replace(last, speculates=True)), decide)

    monkeypatch.setattr(Admission, "program", program)
    async with rig(tmp_path, **options) as r:
        yield r


def usage(tier: Tier, phase: Phase, found: Usage) -> int:
    return sum(n.tokens for n in found.by_phase if (n.tier, n.phase) == (tier, phase))


async def alone(tmp_path: Path, **fields: Any) -> tuple[int, ...]:  # noqa: ANN401 - of a job
    """What the strategic tier alone answers."""
    (tmp_path / "alone").mkdir()
    async with rig(tmp_path / "alone") as r:
        return tokens_of(await r.run(job(requested=S, **fields)))


def tokens_of(events: list[Any]) -> tuple[int, ...]:
    return tuple(id_ for event in events if isinstance(event, Delta) for id_ in event.token_ids)


@pytest.mark.parametrize(("decide", "accepted"), [(escalate, 12), (spoil, 2)])
async def test_an_escalated_answer_is_the_second_tiers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decide: Decide, accepted: int
) -> None:
    """Its client sees one answer, pays both stages by tier and phase, and the hold covers both."""
    expected = await alone(tmp_path, new=12)
    async with two_stages(tmp_path, monkeypatch, decide) as r:
        events = await r.run(job(new=12, requested=S))
        started, finished = events[0], finished_of(events)
        assert isinstance(started, Started)
        assert expected == tokens_of(events)
        assert (5, 12) == (finished.usage.prompt_tokens, finished.usage.output_tokens)
        done = {(n.tier, n.phase): n.tokens for n in finished.usage.by_phase}
        # A token of the strategic tier's own comes behind each piece of the draft.
        verified, own = done.pop((S, Phase.VERIFY)), done.pop((S, Phase.DECODE))
        assert {(T, Phase.PREFILL): 5, (T, Phase.DECODE): 12, (S, Phase.PREFILL): 5} == done
        assert 12 - verified <= own <= 12 - min(accepted, 4)
        program = Program((Stage(T, PROMPT, 12), Stage(S, PROMPT, 12)))
        assert quote_program(CARD, program).worst_case_uatp == started.held_uatp
        assert charge(CARD, finished.usage) == finished.price.charged_uatp <= started.held_uatp
        assert finished.price.charged_uatp == await r.spent_uatp()


async def test_an_answer_that_is_kept_is_shown_at_once_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the second stage is paid, and the hold's rest is given back."""
    async with two_stages(tmp_path, monkeypatch, keep) as r:
        events = await r.run(job(new=6, requested=S))
        finished = finished_of(events)
        assert 6 == len(tokens_of(events))
        assert Usage.single(T, 5, 0, 6) == finished.usage
        assert charge(CARD, finished.usage) == await r.spent_uatp()


async def test_of_three_stages_the_last_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may decide more than once; what is hidden of it is paid like any stage."""
    expected = await alone(tmp_path, new=6)
    async with two_stages(tmp_path, monkeypatch, escalate, num_before=2) as r:
        events = await r.run(job(new=6, requested=S))
        finished = finished_of(events)
        assert expected == tokens_of(events)
        assert 12 == usage(T, Phase.DECODE, finished.usage)
        assert charge(CARD, finished.usage) == await r.spent_uatp()


async def test_its_result_is_kept_for_a_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated request id gets the same answer, usage and price, and is charged nothing."""
    async with two_stages(tmp_path, monkeypatch, escalate) as r:
        asked = job(new=6, requested=S, client_request_id="one")
        first, again = await r.run(asked), await r.run(asked)
        assert tokens_of(first) == tokens_of(again)
        assert finished_of(first).usage == finished_of(again).usage
        assert finished_of(first).price.charged_uatp == await r.spent_uatp()


@pytest.mark.parametrize("stage", [T, S])
async def test_a_job_is_cancelled_in_either_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Tier
) -> None:
    """It stops there, what was computed is charged, and no sequence and no hold is left."""
    async with two_stages(tmp_path, monkeypatch, spoil) as r:
        engine = r.gate(stage)
        stream = await r.submit(job(new=100, requested=S))
        engine.let_pass(3)
        async with asyncio.timeout(WAIT_S):
            counted = partial(r.counted, "engine_tokens_total", tier=stage.name, phase="decode")
            while not counted():  # noqa: ASYNC110 - a counter tells nobody
                await asyncio.sleep(0)
        stream.cancel()
        engine.let_pass(1_000)
        await r.settled()
        assert 0 < await r.spent_uatp()


async def test_a_deadline_between_the_stages_shows_what_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer was computed and is charged, so its client gets it."""

    def late(answer: Delta, planned: Stage) -> Stage:
        (running,) = r.broker._jobs.values()
        running.stop(StopReason.DEADLINE)
        return escalate(answer, planned)

    async with two_stages(tmp_path, monkeypatch, late) as r:
        events = await r.run(job(new=6, requested=S))
        finished = finished_of(events)
        assert 6 == len(tokens_of(events))
        assert Usage.single(T, 5, 0, 6) == finished.usage
        assert StopReason.LENGTH is finished.stop_reason


@pytest.mark.parametrize("reason", [StopReason.DEADLINE, StopReason.ABORTED, StopReason.CANCELLED])
async def test_a_stop_behind_a_hidden_stop_string_starts_no_second_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: StopReason
) -> None:
    """The first answer is complete: it is shown and charged, and nothing more is made."""

    def late(answer: Delta, planned: Stage) -> Stage:
        (running,) = r.broker._jobs.values()
        running.stop(reason)
        return escalate(answer, planned)

    async with two_stages(tmp_path, monkeypatch, late) as r:
        whole = await r.run(job(new=8))
        text = "".join(event.text for event in whole if isinstance(event, Delta))
        events = await r.run(job(new=40, requested=S, sampling={"stop": (text[3:6],)}))
        finished = finished_of(events)
        shown = "".join(event.text for event in events if isinstance(event, Delta))
        assert text[:3] == shown
        assert StopReason.STOP_STRING is finished.stop_reason
        assert {T} == {done.tier for done in finished.usage.by_phase}
        assert check(r.path).violations == ()


@pytest.mark.parametrize("stage", [T, S])
async def test_a_deadline_passes_in_either_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Tier
) -> None:
    """It ends there; a client sees what that stage made until then, and pays both."""
    async with two_stages(tmp_path, monkeypatch, spoil) as r:
        engine = r.gate(stage)
        stream = await r.submit(job(new=100, requested=S, sampling={"deadline_s": WAIT_S}))
        engine.let_pass(3)
        async with asyncio.timeout(WAIT_S):
            counted = partial(r.counted, "engine_tokens_total", tier=stage.name, phase="decode")
            while not counted():  # noqa: ASYNC110 - a counter tells nobody
                await asyncio.sleep(0)
        (running,) = r.broker._jobs.values()
        running.stop(StopReason.DEADLINE)  # as its timer does
        engine.let_pass(1_000)
        finished = finished_of(await read(stream))
        assert StopReason.DEADLINE is finished.stop_reason
        assert (stage == S) == any(done.tier == S for done in finished.usage.by_phase)
        assert finished.price.charged_uatp == charge(CARD, finished.usage) == await r.spent_uatp()
        assert check(r.path).violations == ()


@pytest.mark.parametrize(
    ("fault", "error"),
    [(DeviceOutOfMemory("full"), DeviceOutOfMemory), (ValueError("bug"), TierUnavailable)],
)
async def test_a_failure_of_the_second_stage_ends_the_job_and_charges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, error: type[SageFedError]
) -> None:
    """What the first stage did is counted as wasted; the whole hold is given back."""
    async with two_stages(tmp_path, monkeypatch, escalate) as r:

        def fail(_: object) -> None:
            raise fault

        r.engines[S].fail = fail
        stream = await r.submit(job(new=6, requested=S))
        with pytest.raises(error):
            await read(stream)
        await r.settled()
        assert 0 == await r.spent_uatp()
        assert 6 == r.counted("tokens_total", tier="tactical", type="output", outcome="failed")
        assert () == check(r.path).violations


@pytest.mark.parametrize("decide", [spoil, keep])
async def test_time_and_money_are_booked_to_the_tier_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decide: Decide
) -> None:
    """Each tier's series have its own part, and what was held there is charged or given back."""
    async with two_stages(tmp_path, monkeypatch, decide) as r:
        events = await r.run(job(new=6, requested=S))
        finished = finished_of(events)
        ran = [T, S] if decide is spoil else [T]
        assert ran == [stage.tier for stage in finished.timing.stages]
        for stage in finished.timing.stages:
            told = r.counted("device_seconds_total", tier=stage.tier.name, outcome="finished")
            assert stage.device_s == told > 0
            assert 1 == r.counted("queue_seconds_count", tier=stage.tier.name)
            assert 1 == r.counted("decode_seconds_count", tier=stage.tier.name)
        assert finished.timing.device_s == sum(of.device_s for of in finished.timing.stages)
        done = charge_by_tier(CARD, finished.usage)
        program = Program((Stage(T, PROMPT, 6), Stage(S, PROMPT, 6, speculates=True)))
        for tier, held_uatp in quote_program(CARD, program).worst_case_by_tier.items():
            charged_atp = done.get(tier, 0) / UATP_PER_ATP
            labels = {"tier": tier.name}
            assert held_uatp / UATP_PER_ATP == r.counted("atp_reserved_total", **labels)
            assert charged_atp == r.counted("atp_charged_total", **labels)
            refunded_atp = held_uatp / UATP_PER_ATP - charged_atp
            assert refunded_atp == pytest.approx(r.counted("atp_refunded_total", **labels))


async def test_a_failed_jobs_time_is_booked_to_the_tier_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage was computed for nobody, on its own tier; all that was held is given back."""
    async with two_stages(tmp_path, monkeypatch, escalate) as r:

        def fail(_: object) -> None:
            raise DeviceOutOfMemory("full")

        r.engines[S].fail = fail
        with pytest.raises(DeviceOutOfMemory):
            await r.run(job(new=6, requested=S))
        await r.settled()
        assert 0 < (r.counted("device_seconds_total", tier="tactical", outcome="failed") or 0)
        for tier in (T, S):
            held = r.counted("atp_reserved_total", tier=tier.name)
            assert held == r.counted("atp_refunded_total", tier=tier.name) != 0


@pytest.mark.parametrize("decide", [spoil, keep])
async def test_a_later_stage_has_its_place_until_it_is_in_the_queue_or_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decide: Decide
) -> None:
    """Nobody else is given it meanwhile, and everybody may have it from then on."""
    async with two_stages(tmp_path, monkeypatch, decide, max_waiting=1) as r:
        reserved = r.broker._admission._reserved
        first, second = r.gate(T), r.gate(S)
        settle, left = r.ledger.settle, []

        async def settled(*arguments: Any) -> Any:  # noqa: ANN401 - the ledger's
            left.append(+reserved)
            return await settle(*arguments)

        monkeypatch.setattr(r.ledger, "settle", settled)
        stream = await r.submit(job(new=4, requested=S))
        await entered(first)
        assert {S: 1} == +reserved
        first.let_pass(100)
        if decide is spoil:
            await entered(second)
            assert {} == +reserved
            second.let_pass(100)
        assert finished_of(await read(stream))
        assert [{}] == left


async def test_a_program_needs_room_at_every_tier_of_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first stage's queue is full, the job is refused before its prompt is read."""
    async with two_stages(tmp_path, monkeypatch, escalate, max_waiting=1) as r:
        engine = r.gate(T)
        waiting = [await r.submit(job(new=4))]
        await entered(engine)
        waiting.append(await r.submit(job(new=4)))
        with pytest.raises(QueueFull, match="for the tactical tier"):
            await r.submit(job(prompt=Prompt(token_ids=(10**9,)), requested=S))
        engine.let_pass(10_000)
        for stream in waiting:
            await read(stream)
        assert finished_of(await r.run(job(new=4, requested=S)))


async def test_jobs_that_wait_for_their_holds_keep_no_place_that_they_will_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of small AUTO jobs does not have a job refused that names the deeper tier."""
    async with rig(tmp_path, max_waiting=1) as r:
        admission, held = r.broker._admission, asyncio.Event()
        at_the_ledger, hold = 0, r.ledger.hold

        async def wait(*arguments: Any) -> Any:  # noqa: ANN401 - the ledger's
            nonlocal at_the_ledger
            at_the_ledger += 1
            await held.wait()
            return await hold(*arguments)

        monkeypatch.setattr(r.ledger, "hold", wait)
        for fields in ({}, {"client_request_id": "one"}):
            before = at_the_ledger
            asked = asyncio.create_task(r.submit(job(requested=None, **fields)))
            async with asyncio.timeout(WAIT_S):
                while at_the_ledger == before:  # noqa: ASYNC110 - it is counted above
                    await asyncio.sleep(0)
            assert {T: 1} == +admission._reserved
            held.set()
            await read(await asked)
            held.clear()
        hard = asyncio.create_task(r.submit(job(requested=None, complexity=1.0)))
        async with asyncio.timeout(WAIT_S):
            while at_the_ledger < 3:  # noqa: ASYNC110 - it is counted above
                await asyncio.sleep(0)
        assert {T: 1, S: 1} == +admission._reserved, "a small balance leads lower"
        held.set()
        await read(await hard)
