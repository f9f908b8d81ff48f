"""The modes of a job: drafts and cascades through admission, hold, stream and settlement."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import entered
from surroundings import MODELS
from test_broker import CARD, GRANTED_UATP, Rig, finished_of, job, read, rig
from test_quality_card import quality_card

from sage_fed.cards.quality_card import QualityCard
from sage_fed.cards.rate_card import charge, charge_by_tier, single_uatp
from sage_fed.core import (
    CascadeOutcome,
    Delta,
    EntryKind,
    Mode,
    Phase,
    PhaseTokens,
    Revised,
    Started,
    StopReason,
    Tier,
    TokenOrigin,
    Usage,
)
from sage_fed.errors import InvalidField, RequestIdConflict, TierUnavailable
from sage_fed.jobs.admission import Admission, Encoder
from sage_fed.routing import Reason, RoutingPolicy
from sage_fed.text import Tokenizer, write_padded_tokenizer

T, S = Tier.TACTICAL, Tier.STRATEGIC


def doubtful(p_wrong: float, p_wrong_deepest: float = 0.0) -> QualityCard:
    """A card by which every tactical answer is wrong with this probability."""
    known = quality_card()
    of_any = known.classes["any"]
    flat = replace(
        of_any,
        p_wrong=(p_wrong,) * len(of_any.scores),
        p_wrong_deepest=(p_wrong_deepest,) * len(of_any.scores),
    )
    return replace(known, classes={"any": flat})


async def answer(r: Rig, **fields: Any) -> tuple[list[Any], tuple[int, ...]]:  # noqa: ANN401 - of a job
    """A job's events, and its tokens as its client has them in the end."""
    events = await r.run(job(**fields))
    tokens: list[int] = []
    for event in events:
        if isinstance(event, Revised):
            del tokens[event.from_token :]
        elif isinstance(event, Delta):
            tokens += event.token_ids
    return events, tuple(tokens)


def started_of(events: list[Any]) -> Started:
    """The first event."""
    assert isinstance(events[0], Started)
    return events[0]


async def test_a_strategic_job_speculates_unless_it_says_single(tmp_path: Path) -> None:
    """Its tokens are the same, its price is no higher, and its usage says who did what."""
    async with rig(tmp_path) as r:
        # A strategic step takes long against a tactical one, whatever else this machine does.
        r.engines[S].fail = lambda _step: time.sleep(0.01)
        plain, expected = await answer(r, new=60, requested=S, mode=Mode.SINGLE)
        drafted, tokens = await answer(r, new=60, requested=S)
        assert expected == tokens
        assert (Mode.SINGLE, Mode.SPECULATIVE) == tuple(
            started_of(events).route.mode for events in (plain, drafted)
        )
        assert started_of(plain).held_uatp == started_of(drafted).held_uatp
        usage = finished_of(drafted).usage
        phases = {(n.tier, n.phase) for n in usage.by_phase}
        assert {(T, Phase.DRAFT), (S, Phase.VERIFY)} <= phases
        charged = finished_of(drafted).price.charged_uatp
        assert charge(CARD, usage) == charged < finished_of(plain).price.charged_uatp
        alone, price = finished_of(plain).price, finished_of(drafted).price
        assert alone.charged_uatp == alone.single_uatp == price.single_uatp
        saved_atp = r.counted("atp_saved_total", mode="speculative")
        assert pytest.approx((price.single_uatp - charged) / 1e6) == saved_atp
        (stage,) = finished_of(drafted).timing.stages
        counts = {n.phase: n.tokens for n in usage.by_phase}
        assert (counts[Phase.DRAFT], counts[Phase.VERIFY]) == (
            stage.drafted_tokens, stage.verified_tokens,
        )  # fmt: skip
        assert 60 - counts[Phase.DECODE] == stage.accepted_tokens
        for origin in ("drafter", "lookup"):
            labels = {"tier": "strategic", "origin": origin}
            drafts = [
                r.counted("speculative_tokens_total", **labels, outcome=outcome)
                for outcome in ("drafted", "accepted", "rejected")
            ]
            assert drafts[0] >= drafts[1] + drafts[2]
            assert drafts[1] == r.counted("accepted_draft_tokens_sum", **labels)
        origins = [o for event in drafted if isinstance(event, Delta) for o in event.origins]
        assert len(tokens) == len(origins)
        accepted = origins.count(TokenOrigin.ACCEPTED)
        assert accepted + origins.count(TokenOrigin.STRATEGIC) == 60
        assert accepted > 10
        assert () == next(event.origins for event in plain if isinstance(event, Delta))
        entries = await r.ledger.page("local", None, 9, lambda page: page.entries)
        in_books = {e.amount_uatp: e.usage for e in entries if e.kind is EntryKind.SETTLE}
        assert {charged: usage.by_phase, alone.charged_uatp: finished_of(plain).usage.by_phase} == (
            in_books
        )
        assert all(not e.usage for e in entries if e.kind is not EntryKind.SETTLE)


def repeating(r: Rig) -> None:
    """Let both tiers' texts repeat themselves, and their steps take as long as a real model's."""
    for engine in r.engines.values():
        engine.period, engine.fail = 2, lambda _step: time.sleep(0.004)


@pytest.mark.parametrize("tier", [T, S])
async def test_earlier_text_drafts_at_no_step_of_a_model(tmp_path: Path, tier: Tier) -> None:
    """The tactical tier's own jobs, and strategic ones while it is down, are cheaper for it."""
    async with rig(tmp_path) as r:
        repeating(r)
        if tier == S:

            def broken(_step: object) -> None:
                raise RuntimeError("a broken device")

            # It is loaded again in a second, and breaks again at the first draft.
            r.engines[T].fail = broken
            with pytest.raises(TierUnavailable):
                await r.run(job())
        before_uatp = await r.spent_uatp()
        plain, expected = await answer(r, new=80, requested=tier, mode=Mode.SINGLE)
        drafted, tokens = await answer(r, new=80, requested=tier)
        assert expected == tokens
        mode = Mode.SPECULATIVE if tier == S else Mode.SINGLE
        assert (Mode.SINGLE, mode) == tuple(
            started_of(events).route.mode for events in (plain, drafted)
        )
        assert started_of(plain).held_uatp == started_of(drafted).held_uatp
        assert Usage.single(tier, 5, 0, 80) == finished_of(plain).usage
        counts = {(n.tier, n.phase): n.tokens for n in finished_of(drafted).usage.by_phase}
        assert {(tier, phase) for phase in (Phase.PREFILL, Phase.VERIFY, Phase.DECODE)} == (
            counts.keys()
        )
        assert counts[tier, Phase.VERIFY] > 40
        alone, price = finished_of(plain).price, finished_of(drafted).price
        assert charge(CARD, finished_of(drafted).usage) == price.charged_uatp < alone.charged_uatp
        assert alone.single_uatp == alone.charged_uatp == price.single_uatp
        assert alone.charged_uatp + price.charged_uatp == await r.spent_uatp() - before_uatp
        saved_atp = r.counted("atp_saved_total", mode=mode.value)
        assert pytest.approx((alone.charged_uatp - price.charged_uatp) / 1e6) == saved_atp
        assert 1.0 == r.broker._admission.experience.speculated or tier == S


@pytest.mark.parametrize("tier", [T, S])
async def test_the_setting_turns_drafts_off(tmp_path: Path, tier: Tier) -> None:
    """A job that names no mode has none then; one that asks for them still has them."""
    async with rig(tmp_path, speculates=False) as r:
        repeating(r)
        events, _ = await answer(r, new=80, requested=tier)
        assert Usage.single(tier, 5, 0, 80) == finished_of(events).usage
        assert Mode.SINGLE is started_of(events).route.mode
        events, _ = await answer(r, new=80, requested=S, mode=Mode.SPECULATIVE)
        assert Phase.VERIFY in {done.phase for done in finished_of(events).usage.by_phase}


async def test_a_sound_answer_is_kept(tmp_path: Path) -> None:
    """The client sees the tactical tier's answer, and pays that alone."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.05)
        events, tokens = await answer(r, new=20, requested=None, mode=Mode.CASCADE, max_error=0.1)
        _, expected = await answer(r, new=20)
        finished = finished_of(events)
        assert expected == tokens
        assert (CascadeOutcome.KEPT, 0.05) == (finished.cascade, finished.error_probability)
        assert Usage.single(T, 5, 0, 20) == finished.usage
        assert Reason.CASCADE == started_of(events).route.reason
        assert {TokenOrigin.TACTICAL} == {
            origin for event in events if isinstance(event, Delta) for origin in event.origins
        }
        assert all(not event.logprobs for event in events if isinstance(event, Delta))
        (stage,) = finished.timing.stages
        made_s = stage.begin_s + stage.queue_s + stage.prefill_s + stage.decode_s
        assert made_s <= finished.timing.time_to_first_token_s, "it was hidden until it was whole"


async def test_an_operator_sees_a_cascade_where_it_runs(tmp_path: Path) -> None:
    """On the tactical tier first, then on the strategic one."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.9)
        seen: dict[Tier, set[tuple[Tier, Mode]]] = {T: set(), S: set()}
        for tier in (T, S):
            r.engines[tier].fail = lambda step: seen[step.tier].update(
                (job.tier, job.mode) for job in r.broker.running()
            )
        await answer(r, new=20, requested=None, mode=Mode.CASCADE, max_error=0.1)
    # A drafter's steps are the tactical tier's, for a job on the strategic one.
    assert (T, Mode.CASCADE) in seen[T]
    assert {(S, Mode.CASCADE)} == seen[S]


@pytest.mark.parametrize("accepts", [False, True])
async def test_a_doubtful_answer_is_the_strategic_tiers(tmp_path: Path, accepts: bool) -> None:
    """What the strategic tier alone answers, for both stages' price; what was shown is taken back.

    Both fake engines answer alike, so that the whole tactical answer is accepted as a draft.
    """
    async with rig(tmp_path) as r:
        _, expected = await answer(r, new=30, requested=S, mode=Mode.SINGLE)
        before_uatp = await r.spent_uatp()
        r.broker._admission.quality = doubtful(0.9)
        events, tokens = await answer(
            r, new=30, requested=None, mode=Mode.CASCADE, max_error=0.1, accept_revisions=accepts
        )
        finished = finished_of(events)
        assert expected == tokens
        assert CascadeOutcome.ESCALATED is finished.cascade
        assert 30 == finished.usage.output_tokens
        held = started_of(events).held_uatp
        assert charge(CARD, finished.usage) == finished.price.charged_uatp < held
        assert finished.price.charged_uatp == await r.spent_uatp() - before_uatp
        assert accepts == any(isinstance(event, Revised) for event in events)
        if not accepts:
            first = next(event for event in events if isinstance(event, Delta))
            assert TokenOrigin.TACTICAL not in first.origins


async def test_what_the_strategic_tier_would_do_no_better_is_kept(tmp_path: Path) -> None:
    """Doubt alone does not pay for another answer."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.9, 0.95)
        events, _ = await answer(r, new=8, requested=None, mode=Mode.CASCADE, max_error=0.1)
        assert CascadeOutcome.KEPT is finished_of(events).cascade


@pytest.mark.parametrize("accepts", [False, True])
async def test_a_strategic_tier_that_is_down_when_needed(tmp_path: Path, accepts: bool) -> None:
    """The tactical answer where a downgrade is allowed; else nothing, and nothing is charged."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.9)
        engine = r.gate(T)
        fields: dict[str, Any] = {"requested": None, "mode": Mode.CASCADE, "max_error": 0.1}
        fields["accept_revisions"] = accepts
        kept = await r.submit(job(new=12, allow_downgrade=True, **fields))
        lost = await r.submit(job(new=12, **fields))
        await entered(engine)

        def broken(_step: object) -> None:
            raise RuntimeError("a broken device")

        r.engines[S].fail = broken
        engine.let_pass(1_000)
        events = await read(kept)
        finished = finished_of(events)
        assert CascadeOutcome.UNAVAILABLE is finished.cascade
        assert Usage.single(T, 5, 0, 12) == finished.usage
        assert StopReason.LENGTH is finished.stop_reason
        assert 12 == sum(len(event.token_ids) for event in events if isinstance(event, Delta))
        with pytest.raises(TierUnavailable):
            await read(lost)
        await r.settled()
        assert finished.price.charged_uatp == await r.spent_uatp()


async def test_a_cascade_skips_a_tactical_tier_that_is_down(tmp_path: Path) -> None:
    """The strategic tier serves at once, and the route says why."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.9)

        def broken(_step: object) -> None:
            raise RuntimeError("a broken device")

        r.engines[T].fail = broken
        with pytest.raises(TierUnavailable):
            await r.run(job())
        events, tokens = await answer(r, new=12, requested=None, mode=Mode.CASCADE)
        assert Reason.CASCADE_UNAVAILABLE == started_of(events).route.reason
        assert (12, None) == (len(tokens), finished_of(events).cascade)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"requested": T, "mode": Mode.SPECULATIVE}, "strategic"),
        ({"requested": T, "mode": Mode.CASCADE}, "strategic"),
        ({"requested": None, "mode": Mode.CASCADE}, "quality card"),
        ({"requested": None, "mode": Mode.CASCADE, "sampling": {"temperature": 0.7}}, "temper"),
    ],
)
async def test_a_mode_that_cannot_be_had_is_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    """By its field, with nothing held."""
    async with rig(tmp_path) as r:
        if "sampling" in fields:
            r.broker._admission.quality = doubtful(0.9)
        with pytest.raises(InvalidField, match=said) as refused:
            await r.run(job(**fields))
        assert "job.mode" == refused.value.field
        assert 0 == await r.spent_uatp()


@pytest.mark.parametrize(
    ("errors", "mode", "reason"),
    [
        ((0.05, 0.01), Mode.SINGLE, Reason.AUTO_RETURN),
        ((0.9, 0.01), Mode.SPECULATIVE, Reason.AUTO_RETURN),
        ((0.9, 0.8), Mode.CASCADE, Reason.MAX_ERROR_UNMET),
    ],
)
async def test_auto_takes_the_cheapest_that_errs_little_enough(
    tmp_path: Path, errors: tuple[float, float], mode: Mode, reason: Reason
) -> None:
    """By the quality card; a quote shows every mode with its cost and its error."""
    async with rig(tmp_path) as r:
        known = doubtful(*errors)
        of_any = known.classes["any"]
        tiers = {
            tier: replace(of_any.errors[tier], value=value)
            for tier, value in zip((T, S), errors, strict=True)
        }
        known = replace(known, classes={"any": replace(of_any, errors=tiers)})
        r.broker._admission.quality = known
        asked = job(new=8, requested=None, max_error=0.1)
        quote = await r.broker.quote(asked)
        events = await r.run(asked)
        route = started_of(events).route
        assert quote.decision == route
        assert reason == route.reason
        shown = {(one.tier, one.mode): one for one in quote.tiers}
        strategic = {(S, mode) for mode in Mode}
        assert {(T, Mode.SINGLE)} | strategic == shown.keys()
        assert all(0 < one.expected_uatp <= one.worst_case_uatp for one in shown.values())
        assert errors[0] == shown[T, Mode.SINGLE].expected_error
        assert {errors[1]} == {
            shown[S, mode].expected_error for mode in (Mode.SINGLE, Mode.SPECULATIVE)
        }
        assert all(one.expected_error is not None for one in shown.values())
        if reason is Reason.AUTO_RETURN:
            assert mode is route.mode


async def test_a_quote_has_every_mode_and_how_long_it_takes(tmp_path: Path) -> None:
    """Whatever mode the job names; a mode's time once its tiers have served something."""
    async with rig(tmp_path) as r:
        every = [(T, Mode.SINGLE), (S, Mode.SINGLE), (S, Mode.SPECULATIVE)]
        first = await r.broker.quote(job(requested=S))
        assert every == [(one.tier, one.mode) for one in first.tiers]
        assert {None} == {one.estimated_s for one in first.tiers}
        assert {None} == {one.expected_error for one in first.tiers}
        for tier in (T, S):
            await r.run(job(new=8, requested=tier, mode=Mode.SINGLE))
        r.broker._admission.quality = doubtful(0.5)
        for mode in (None, *Mode):
            quote = await r.broker.quote(job(requested=S, mode=mode))
            assert [*every, (S, Mode.CASCADE)] == [(one.tier, one.mode) for one in quote.tiers]
            times = [one.estimated_s or 0.0 for one in quote.tiers]
            assert all(times)
            assert pytest.approx(times[0] + times[1]) == times[3]
            assert None not in [one.expected_error for one in quote.tiers]


async def test_without_a_card_auto_goes_by_hint_and_size(tmp_path: Path) -> None:
    """And its reason says so."""
    async with rig(tmp_path) as r:
        events = await r.run(job(requested=None, complexity=0.9))
        assert (Mode.SPECULATIVE, Reason.AUTO_COMPLEX) == (
            started_of(events).route.mode,
            started_of(events).route.reason,
        )


def usage(*phases: tuple[Tier, Phase, int], output: int) -> Usage:
    """A usage of these phases."""
    return Usage(5, 0, output, tuple(PhaseTokens(*phase) for phase in phases))


def test_drafts_are_never_dearer_than_none() -> None:
    """Failed drafts beyond what they save are the house's loss, each tier's part adding up."""
    good = usage((S, Phase.VERIFY, 40), (S, Phase.DECODE, 10), (T, Phase.DRAFT, 40), output=50)
    assert charge(CARD, good) < single_uatp(CARD, good, S)
    bad = usage((S, Phase.VERIFY, 400), (S, Phase.DECODE, 50), (T, Phase.DRAFT, 400), output=50)
    assert single_uatp(CARD, bad, S) == charge(CARD, bad)
    assert charge(CARD, bad) == sum(charge_by_tier(CARD, bad).values())


def test_a_cascade_pays_its_tactical_stage_besides() -> None:
    """The cap is on what the strategic tier did alone."""
    both = usage(
        (T, Phase.DECODE, 50), (S, Phase.VERIFY, 900), (S, Phase.DECODE, 50), output=50
    )  # fmt: skip
    tactical = usage((T, Phase.DECODE, 50), output=50)
    assert charge(CARD, tactical) + single_uatp(CARD, both, S) == charge(CARD, both)
    assert GRANTED_UATP > charge(CARD, both)


async def test_a_tier_of_other_tokens_drafts_nothing(tmp_path: Path) -> None:
    """Its answers would be other words; earlier text is a source, and a cascade is refused."""
    (tmp_path / "other").mkdir()
    write_padded_tokenizer(MODELS / "demo-tactical", tmp_path / "other", 700)
    other = Tokenizer.load(tmp_path / "other")
    async with rig(tmp_path) as r:
        encoder = r.broker._admission.encoder
        apart = Encoder({T: other, S: encoder.tokenizers[S]}, encoder._workers)
        admission = Admission(
            apart, r.executor, CARD, policy=RoutingPolicy(), default_new_tokens=16, max_jobs=16
        )
        (stage,) = admission.program(job(requested=S), S, {S: (1, 2)}, 8).stages
        assert (True, None) == (stage.speculates, stage.drafter)
        admission.quality = doubtful(0.5)
        with pytest.raises(InvalidField, match="one tokenizer"):
            await admission.draft(job(requested=None, mode=Mode.CASCADE), 0.0)


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("mode", [Mode.SPECULATIVE, Mode.CASCADE])
async def test_a_repeated_request_gets_the_same_answer(
    tmp_path: Path, mode: Mode, accepts: bool
) -> None:
    """Tokens, where they come from, outcome and price; and its id is of this mode alone."""
    async with rig(tmp_path) as r:
        r.broker._admission.quality = doubtful(0.9)
        asked: dict[str, Any] = {"new": 70, "requested": S, "mode": mode, "max_error": 0.1}
        asked |= {"client_request_id": "again", "accept_revisions": accepts}
        first, tokens = await answer(r, **asked)
        spent_uatp = await r.spent_uatp()
        second, repeated = await answer(r, **asked)
        assert tokens == repeated
        assert origins_of(first) == origins_of(second)
        assert len(tokens) == len(origins_of(second)) == 70
        assert started_of(second).replayed
        assert replace(started_of(first), replayed=True) == started_of(second)
        assert finished_of(first) == finished_of(second)
        assert spent_uatp == await r.spent_uatp()
        for other in (Mode.SINGLE, Mode.SPECULATIVE, Mode.CASCADE):
            if other is not mode:
                with pytest.raises(RequestIdConflict):
                    await r.run(job(**{**asked, "mode": other}))
        assert spent_uatp == await r.spent_uatp()


def origins_of(events: list[Any]) -> list[TokenOrigin]:
    """Of the tokens that the client has in the end."""
    origins: list[TokenOrigin] = []
    for event in events:
        if isinstance(event, Revised):
            del origins[event.from_token :]
        elif isinstance(event, Delta):
            origins += event.origins
    return origins
