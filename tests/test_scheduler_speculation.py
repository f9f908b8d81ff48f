"""Speculation: a deep tier's tokens are its own, whoever drafted them, and come sooner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from fake_engine import EOS, VOCAB, FakeEngine, reference, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_fed.core import DraftAcceptance, DraftOrigin, Sampling, Tier
from sage_fed.device import Ended, EndReason, Scheduler, SequenceSpec, TierLimits
from sage_fed.device.drafting import Candidate, allot
from sage_fed.device.tier_scheduler import StepRates
from sage_fed.steps import BLOCK_SIZE, NO_TOKEN, SampledToken, Step, StepKind, StepReport

T, S = Tier.TACTICAL, Tier.STRATEGIC


@dataclass
class Pair:
    """Two tiers over fake engines; a step takes `base_s` of its tier and `row_s` a token."""

    wrong: int = 0
    num_blocks: int = 64
    base_s: dict[Tier, float] = field(default_factory=lambda: {T: 0.01, S: 0.1})
    row_s: dict[Tier, float] = field(default_factory=lambda: {T: 0.0002, S: 0.002})
    limits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler()
        self.engines = {
            T: FakeEngine(num_blocks=self.num_blocks, wrong=self.wrong),
            S: FakeEngine(num_blocks=256),
        }
        for tier, engine in self.engines.items():
            limits = TierLimits(engine.num_blocks, 512, **self.limits)  # type: ignore[arg-type]
            self.scheduler.open_tier(tier, limits, frozenset({EOS}))
        self.now = 0.0
        self.tokens: dict[int, list[int]] = {}
        self.accepted: Counter[int] = Counter()
        self.ended: dict[int, Ended] = {}
        self.steps: list[Step] = []
        self.kinds: list[StepKind] = []
        self.reports: list[StepReport] = []

    def add(self, *asked: SequenceSpec) -> None:
        """Queue sequences."""
        for one in asked:
            self.scheduler.add(one, self.now)
            self.tokens[one.seq_id] = []

    def step(self, *, fits: bool = True) -> Step:
        """Run the next step."""
        step = self.scheduler.next_step(self.now)
        assert step is not None
        sampled = self.engines[step.tier].run(step)
        elapsed_s = self.base_s[step.tier] + self.row_s[step.tier] * step.num_tokens
        self.now += elapsed_s
        done = self.scheduler.complete if fits else None
        if done is None:
            outcome = self.scheduler.out_of_memory(step, now=self.now, elapsed_s=elapsed_s)
        else:
            outcome = done(step, sampled, now=self.now, elapsed_s=elapsed_s)
        self.steps.append(step)
        self.kinds.append(outcome.report.kind)
        self.reports.append(outcome.report)
        for token in outcome.tokens:
            self.tokens[token.seq_id].append(token.token_id)
            self.accepted[token.seq_id] += token.accepted
        self.ended |= {one.seq_id: one for one in outcome.ended}
        return step

    def run(self, *asked: SequenceSpec) -> float:
        """Run sequences to their end, each with the tokens that it has alone; seconds taken."""
        begun = self.now
        self.add(*asked)
        while self.scheduler.has_work:
            self.step()
        for one in asked:
            assert reference(one) == self.tokens[one.seq_id]
        assert {0} == {self.used(tier) for tier in self.engines}, "every block is given back"
        return self.now - begun

    def used(self, tier: Tier) -> int:
        """KV tokens that are in use."""
        load = self.scheduler.load(tier)
        assert load is not None
        return load.kv_tokens_used


def asked(seq_id: int, new: int = 64, **fields: object) -> SequenceSpec:
    """A strategic sequence that speculates."""
    values: dict[str, object] = {"speculates": True, "drafter": T, **fields}
    return spec(seq_id, S, new=new, **values)  # type: ignore[arg-type]


def alone(seq_id: int, new: int = 64, **fields: object) -> SequenceSpec:
    """The same one, without drafts."""
    return asked(seq_id, new, speculates=False, drafter=None, **fields)


@pytest.mark.parametrize("wrong", [0, 20, 60, 100])
def test_the_tokens_are_the_deep_tiers_own(wrong: int) -> None:
    """However often the drafter is wrong."""
    Pair(wrong).run(asked(0))


def test_a_drafter_that_is_right_saves_steps() -> None:
    """Nearly all tokens are drafted, several a verification."""
    pair = Pair()
    slow_s = pair.run(alone(0, 128))
    num_steps = sum(step.tier == S for step in pair.steps)
    fast_s = pair.run(asked(0, 128))
    assert slow_s > 2.0 * fast_s
    assert num_steps > 4 * sum(step.tier == S for step in pair.steps[num_steps:])
    ended = pair.ended[0]
    assert ended.drafted_tokens >= ended.accepted_tokens > 100
    assert 0.0 < ended.draft_s < ended.device_s


@pytest.mark.parametrize("wrong", [0, 20, 60])
def test_steps_report_what_the_endings_add_up_to(wrong: int) -> None:
    """Tokens drafted, verified and accepted, each once, under what proposed them."""
    pair = Pair(wrong)
    pair.run(asked(0, 96), asked(1, 64), alone(2, 32))
    answer = tuple(reference(asked(3, 40)))
    pair.run(asked(3, 40, draft_tokens=answer))
    endings, drafts = pair.ended.values(), [d for r in pair.reports for d in r.verified]
    origins = {draft.origin for draft in drafts}

    assert sum(r.num_draft_tokens for r in pair.reports) == sum(e.drafted_tokens for e in endings)
    verified = sum(ended.verified_tokens for ended in endings)
    assert verified == sum(report.num_verify_tokens for report in pair.reports)
    assert verified == sum(draft.num_tokens for draft in drafts)
    accepted = sum(draft.num_accepted * draft.num_drafts for draft in drafts)
    assert accepted == sum(ended.accepted_tokens for ended in endings)
    assert {DraftOrigin.DRAFTER, DraftOrigin.ANSWER} <= origins
    for report, step in zip(pair.reports, pair.steps, strict=True):
        phases = (
            report.num_prefill_tokens, report.num_decode_tokens,
            report.num_draft_tokens, report.num_verify_tokens,
        )  # fmt: skip
        assert step.num_tokens == sum(phases)
        assert (report.kind is StepKind.DRAFT) == (report.drafts_for is S)
        assert (report.kind is StepKind.DRAFT) >= (report.num_draft_tokens > 0)


def test_a_load_says_who_speculates_and_how_well() -> None:
    """While drafts pay a sequence counts, and the share that was accepted is measured."""
    pair = Pair()
    idle = pair.scheduler.load(S)
    assert idle is not None
    assert (0, ()) == (idle.speculating, idle.acceptance)
    pair.add(asked(0, 128), alone(1, 128))
    busy = 0
    while pair.scheduler.has_work:
        pair.step()
        load = pair.scheduler.load(S)
        assert load is not None
        busy = max(busy, load.speculating)
    assert 1 == busy
    assert DraftAcceptance(DraftOrigin.DRAFTER, 1.0) in load.acceptance
    assert 0 == load.speculating

    wrong = Pair(100)
    wrong.run(asked(0, 64))
    load = wrong.scheduler.load(S)
    assert load is not None
    (measured,) = (one for one in load.acceptance if one.origin is DraftOrigin.DRAFTER)
    assert measured.share < 0.1


def test_a_drafter_that_is_wrong_costs_little() -> None:
    """After a few tries it is left alone, and asked again now and then."""
    pair = Pair(wrong=100)
    for seq_id in range(3):
        plain_s = pair.run(alone(seq_id, 256))
        assert pair.run(asked(seq_id, 256)) < 1.03 * plain_s
    assert pair.kinds.count(StepKind.DRAFT) > 0


def test_a_known_answer_needs_no_drafter() -> None:
    """It is verified at no step of a model, in pieces that grow."""
    pair = Pair()
    pair.run(asked(1, 40, drafter=None))
    answer = tuple(reference(asked(2, 40)))
    taken_s = pair.run(asked(2, 40, drafter=None, draft_tokens=answer))
    assert StepKind.DRAFT not in pair.kinds
    assert 40 == pair.ended[2].output_tokens
    assert 0 == pair.ended[2].drafted_tokens
    assert taken_s < 0.4 * pair.run(alone(3, 40))


def own(seq_id: int, new: int = 200, **fields: object) -> SequenceSpec:
    """A tactical sequence that may have drafts of earlier text."""
    return spec(seq_id, T, new=new, prompt=8, speculates=True, **fields)


def repeating(pair: Pair, tier: Tier, seq: SequenceSpec) -> None:
    """Run a sequence whose text repeats itself on a tier, to its end; its tokens are its own."""
    # A step is planned for that was measured.
    pair.scheduler.begin_with({tier: {1: pair.base_s[tier] + pair.row_s[tier]}})
    pair.engines[tier].period = 5
    pair.add(seq)
    while pair.scheduler.has_work:
        pair.step()
    expected = list(seq.prompt)
    while len(expected) < len(seq.prompt) + seq.max_new_tokens:
        expected.append(expected[-5])
    assert expected[len(seq.prompt) :] == pair.tokens[seq.seq_id]
    assert {0} == {pair.used(tier) for tier in pair.engines if pair.scheduler.load(tier)}


def test_the_fast_tiers_own_sequences_have_drafts_of_earlier_text() -> None:
    """Where its text repeats itself and a step over several rows takes hardly longer than one."""
    pair = Pair()
    repeating(pair, T, own(0))
    ended = pair.ended[0]
    assert ended.accepted_tokens > 100
    assert 0 == ended.drafted_tokens
    assert len(pair.steps) < 100


def test_a_step_over_rows_that_costs_as_much_as_their_steps_has_no_drafts() -> None:
    """Text that repeats itself does not pay by itself: it is tried now and then."""
    pair = Pair(base_s={T: 0.0005, S: 0.1}, row_s={T: 0.01, S: 0.002})
    repeating(pair, T, own(0))
    begun = pair.now
    repeating(pair, T, own(1))
    assert pair.ended[1].verified_tokens < 50
    taken_s, begun = pair.now - begun, pair.now
    repeating(pair, T, replace(own(2), speculates=False))
    assert taken_s < 1.02 * (pair.now - begun)


def test_steps_that_are_as_short_as_a_plan_are_not_planned_for() -> None:
    """A tiny model's step is over before the host knows whether a draft would be worth it."""
    pair = Pair(base_s={T: 0.0005, S: 0.1}, row_s={T: 0.0, S: 0.002})
    repeating(pair, T, own(0))
    assert 0 == pair.ended[0].verified_tokens
    # A drafter saves deep steps, whatever its own take.
    pair.run(asked(2))
    assert pair.ended[2].accepted_tokens > 0


@pytest.mark.parametrize("why", ["down", "busy", "of other tokens"])
def test_earlier_text_serves_a_deep_sequence_without_its_drafter(why: str) -> None:
    """The tactical tier has failed, has no block left, or cannot draft for it at all."""
    pair = Pair(num_blocks=16)
    drafter = None if why == "of other tokens" else T
    if why == "down":
        pair.scheduler.close_tier(T, EndReason.FAILED, 0.0)
    elif why == "busy":
        pair.add(spec(9, T, prompt=8, new=240))
        pair.step()
        assert pair.num_blocks == pair.used(T) // BLOCK_SIZE
    repeating(pair, S, asked(0, 200, prompt=8, drafter=drafter))
    ended = pair.ended[0]
    assert 0 == ended.drafted_tokens
    assert ended.accepted_tokens > 100


class Foreign(FakeEngine):
    """A drafter of which every fifth token is one that the tier's model has no row for."""

    def answer(self, step: Step, share: float = 1.0) -> tuple[SampledToken, ...]:
        """Draw, and draw another instead."""
        drawn = super().answer(step, share)
        return tuple(
            one if one.token_id % 5 else replace(one, token_id=one.token_id + VOCAB)
            for one in drawn
        )


@pytest.mark.parametrize("drafter", [T, None])
def test_a_tier_is_fed_no_draft_token_that_its_model_lacks(drafter: Tier | None) -> None:
    """Of a drafter or of an answer from another model, padded to more rows than its own."""
    pair = Pair(limits={"num_ids": VOCAB})
    pair.engines[T] = Foreign(num_blocks=pair.num_blocks)
    known = tuple(reference(asked(0)))
    answer = (*known[:20], VOCAB, *known[21:]) if drafter is None else ()
    pair.run(asked(0, drafter=drafter, draft_tokens=answer))
    fed = {
        token for step in pair.steps if step.tier == S for c in step.chunks for token in c.token_ids
    }
    assert VOCAB > max(fed)
    assert pair.ended[0].accepted_tokens > 10


def test_an_answer_is_aligned_again_behind_a_difference() -> None:
    """One token in the middle of a given answer differs: the rest of it is still used."""
    pair = Pair()
    pair.run(alone(9, 64))
    expected = reference(asked(0, 64))
    answer = [*expected]
    answer[10] = (answer[10] + 1) % 50
    pair.run(asked(0, 64, drafter=None, draft_tokens=tuple(answer)))
    assert pair.ended[0].accepted_tokens > 50


def test_drafts_of_several_sequences_share_their_steps() -> None:
    """A step of the drafter, and one of the deep tier, has a row or more of each."""
    pair = Pair()
    pair.run(*(asked(seq_id) for seq_id in range(4)))
    drafts = [s for s, kind in zip(pair.steps, pair.kinds, strict=True) if kind is StepKind.DRAFT]
    assert max(len(step.chunks) for step in drafts) == 4


def test_a_shallow_sequence_goes_before_drafts() -> None:
    """Drafts are the deep tier's time: the fast tier has its share as beside deep steps."""
    pair = Pair()
    pair.run(asked(0))
    begun, num = pair.now, len(pair.steps)
    pair.add(asked(1, 200), spec(2, T, new=50))
    while 2 not in pair.ended:
        pair.step()
    own_s = sum(
        pair.base_s[T] + pair.row_s[T] * step.num_tokens
        for step, kind in zip(pair.steps[num:], pair.kinds[num:], strict=True)
        if step.tier == T and kind is not StepKind.DRAFT
    )
    assert own_s > 0.45 * (pair.now - begun)


def test_drafts_give_their_blocks_to_the_tiers_own_sequences() -> None:
    """A fast sequence that lacks blocks has those of drafts; the deep one goes on without."""
    pair = Pair(num_blocks=8)
    pair.add(asked(0, 200, prompt=20))
    while pair.used(T) == 0:
        pair.step()
    pair.add(spec(1, T, prompt=100, new=20))
    while 1 not in pair.ended:
        pair.step()
    while pair.scheduler.has_work:
        pair.step()
    assert reference(asked(0, 200, prompt=20)) == pair.tokens[0]
    assert reference(spec(1, T, prompt=100, new=20)) == pair.tokens[1]


def test_a_cancelled_sequence_leaves_nothing_at_the_drafter() -> None:
    """Also in the middle of a round."""
    pair = Pair()
    pair.add(asked(0, 200))
    while StepKind.DRAFT not in pair.kinds:
        pair.step()
    assert pair.used(T) > 0
    pair.scheduler.cancel(0, pair.now)
    assert pair.used(T) == 0
    assert not pair.scheduler.has_work


def test_a_draft_step_out_of_memory_ends_nothing() -> None:
    """The drafts are given up for a while."""
    pair = Pair()
    pair.add(asked(0, 100))
    while StepKind.DRAFT not in pair.kinds:
        pair.step()
    while (step := pair.scheduler.next_step(pair.now)) and step.tier == S:
        sampled = pair.engines[S].run(step)
        outcome = pair.scheduler.complete(step, sampled, now=pair.now, elapsed_s=0.1)
        pair.tokens[0] += [token.token_id for token in outcome.tokens]
    assert step is not None
    assert () == pair.scheduler.out_of_memory(step, now=pair.now, elapsed_s=0.01).ended
    assert pair.used(T) == 0
    while pair.scheduler.has_work:
        pair.step()
    assert reference(asked(0, 100)) == pair.tokens[0]


def test_a_closed_drafter_is_gone_without() -> None:
    """The deep tier's sequences go on, and speculate again when it is back."""
    pair = Pair()
    pair.add(asked(0, 300))
    while StepKind.DRAFT not in pair.kinds:
        pair.step()
    pair.scheduler.close_tier(T, EndReason.FAILED, pair.now)
    num = len(pair.steps)
    for _ in range(5):
        pair.step()
    assert {S} == {step.tier for step in pair.steps[num:]}
    pair.scheduler.open_tier(T, TierLimits(64, 512), frozenset({EOS}))
    num = len(pair.steps)
    while pair.scheduler.has_work:
        pair.step()
    assert reference(asked(0, 300)) == pair.tokens[0]
    assert StepKind.DRAFT in pair.kinds[num:]


@pytest.mark.parametrize("wrong", [0, 100])
def test_a_pipelined_device_speculates_where_it_pays(wrong: int) -> None:
    """A step behind one whose tokens are not known has no draft: that is waited for if it pays."""
    pair = Pair(wrong)
    for tier, engine in pair.engines.items():
        engine.pipelined = True
        pair.scheduler.close_tier(tier, EndReason.SHUTDOWN, 0.0)
        limits = TierLimits(engine.num_blocks, 512)
        pair.scheduler.open_tier(tier, limits, frozenset({EOS}), pipelined=True)
    one = asked(0, 200)
    pair.add(one)
    in_flight: list[tuple[Step, object]] = []
    behind = 0
    while pair.scheduler.has_work:
        step = pair.scheduler.next_step(pair.now) if len(in_flight) < 2 else None
        if step is not None:
            behind += bool(in_flight)
            in_flight.append((step, pair.engines[step.tier].launch(step)))
            continue
        step, running = in_flight.pop(0)
        elapsed_s = pair.base_s[step.tier] + pair.row_s[step.tier] * step.num_tokens
        pair.now += elapsed_s
        sampled = running.wait()  # type: ignore[attr-defined]
        outcome = pair.scheduler.complete(step, sampled, now=pair.now, elapsed_s=elapsed_s)
        pair.tokens[0] += [token.token_id for token in outcome.tokens]
        pair.kinds.append(outcome.report.kind)
        pair.ended |= {ended.seq_id: ended for ended in outcome.ended}
    assert reference(one) == pair.tokens[0]
    if wrong:
        assert behind > 100
    else:
        assert pair.ended[0].accepted_tokens > 120


@settings(max_examples=150, deadline=None)
@given(
    wrong=st.sampled_from([0, 10, 50, 100]),
    num_blocks=st.sampled_from([6, 12, 64]),
    row_s=st.floats(0.0, 0.05),
    data=st.data(),
)
def test_any_traffic_has_its_own_tokens(
    wrong: int, num_blocks: int, row_s: float, data: st.DataObject
) -> None:
    """Joins, leaves, interruptions, cache hits, ends of text, penalties, drafts right and wrong."""
    pair = Pair(wrong, num_blocks, row_s={T: row_s / 5, S: row_s}, limits={"max_batch": 4})
    wanted: dict[int, SequenceSpec] = {}
    cancelled = set()
    for seq_id in range(data.draw(st.integers(1, 8))):
        tier = data.draw(st.sampled_from([S, S, T]))
        one = spec(
            seq_id,
            tier,
            prompt=data.draw(st.integers(1, 40)),
            new=data.draw(st.integers(1, 40)),
            system=data.draw(st.sampled_from([0, 16, 32])),
            account=data.draw(st.sampled_from("ab")),
            ignore_eos=data.draw(st.booleans()),
            prefix_cache=data.draw(st.booleans()),
            sampling=Sampling(
                seed=seq_id, repetition_penalty=data.draw(st.sampled_from([1.0, 1.1]))
            ),
            speculates=data.draw(st.booleans()),
            drafter=T if tier == S else None,
        )
        expected = reference(one)
        right = data.draw(st.integers(0, 40))
        draft = (*expected[:right], *data.draw(st.lists(st.integers(0, 49), max_size=10)))
        if one.speculates:
            one = SequenceSpec(
                **{f: getattr(one, f) for f in one.__slots__} | {"draft_tokens": draft}
            )
        wanted[seq_id] = one
        pair.add(one)
        for _ in range(data.draw(st.integers(0, 20))):
            if pair.scheduler.has_work:
                pair.step()
        if data.draw(st.integers(0, 9)) == 0 and seq_id not in pair.ended:
            cancelled.add(seq_id)
            pair.scheduler.cancel(seq_id, pair.now)
    while pair.scheduler.has_work:
        pair.step()
    for seq_id, one in wanted.items():
        expected = reference(one, wrong if one.tier == T else 0)
        if seq_id in cancelled:
            expected = expected[: len(pair.tokens[seq_id])]
        assert expected == pair.tokens[seq_id]
        if seq_id in pair.ended:
            counted = pair.ended[seq_id].output_tokens, pair.ended[seq_id].accepted_tokens
            assert (len(pair.tokens[seq_id]), pair.accepted[seq_id]) == counted
    assert {0} == {pair.used(tier) for tier in pair.engines}


@pytest.mark.parametrize("wrong", [0, 30])
def test_the_fast_tier_finds_what_drafts_left(wrong: int) -> None:
    """The next turn of a conversation begins with blocks that a drafter filled, the right ones.

    Its tokens are a hash of what is in its blocks: of a draft that was rejected, nothing is there.
    """
    pair = Pair(wrong)
    for seq_id in range(0, 40, 2):
        first = asked(seq_id, 90, prompt=5 + seq_id)
        pair.run(first)
        said = (*first.prompt, *pair.tokens[seq_id])
        turn = replace(spec(seq_id + 1, T, new=20), prompt=said)
        pair.add(turn)
        while pair.scheduler.has_work:
            pair.step()
        assert reference(turn, wrong) == pair.tokens[seq_id + 1]
        assert pair.ended[seq_id + 1].cached_tokens >= 48


def test_a_drafter_begins_in_its_tiers_cache() -> None:
    """What the account's own sequences left is not computed again; another's is not found."""
    for account, least in (("", 80), ("b", 0)):
        pair = Pair()
        before = spec(0, T, prompt=80, new=1, system=80)
        pair.add(before)
        while pair.scheduler.has_work:
            pair.step()
        begun = len(pair.steps)
        pair.run(asked(1, 64, prompt=80, system=80, account=account))
        drafts = zip(pair.steps[begun:], pair.kinds[begun:], strict=True)
        fed = [
            chunk.start for step, kind in drafts if kind is StepKind.DRAFT for chunk in step.chunks
        ]
        assert least == fed[0]


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_a_draft_is_cut_to_the_steps_limit(limit: int) -> None:
    """What was not verified of it is drafted anew behind what was, right or wrong."""
    for wrong in (0, 20):
        pair = Pair(wrong, limits={"prefill_chunk_tokens": limit})
        pair.run(*(asked(seq_id, 60) for seq_id in range(3)))
        assert pair.accepted.total() > 0
        drafted = [len(c.draws) for s in pair.steps if s.tier == S for c in s.chunks]
        assert max(drafted) <= limit + 1


def test_an_end_of_text_inside_a_draft_is_not_delivered() -> None:
    """It was drafted, and is the model's own: the text ends there, with nothing behind it."""
    pair = Pair()
    one = next(
        asked(seq_id, 200, ignore_eos=False)
        for seq_id in range(100)
        if 20 < len(reference(asked(seq_id, 200, ignore_eos=False))) < 190
    )
    own = reference(one)
    answer = (*own, EOS, *own[:20])
    pair.run(replace(one, drafter=None, draft_tokens=answer))
    ended = pair.ended[one.seq_id]
    assert (EndReason.EOS, len(own)) == (ended.reason, ended.output_tokens)
    assert pair.accepted[one.seq_id] == ended.accepted_tokens <= len(own)
    assert ended.verified_tokens > ended.accepted_tokens


def test_a_drafter_whose_numbers_break_down_leaves_nothing() -> None:
    """Its blocks are not found again, and the sequence goes on without it."""
    pair = Pair()
    one = asked(0, 60, prompt=40)
    pair.add(one)
    broken = 0
    while pair.scheduler.has_work:
        step = pair.scheduler.next_step(pair.now)
        assert step is not None
        sampled = pair.engines[step.tier].run(step)
        if step.tier == T:
            broken += 1
            sampled = tuple(replace(token, token_id=NO_TOKEN) for token in sampled)
        outcome = pair.scheduler.complete(step, sampled, now=pair.now, elapsed_s=0.1)
        pair.tokens[0] += [token.token_id for token in outcome.tokens]
    assert 1 == broken, "it is not asked again for the sequence"
    assert reference(one) == pair.tokens[0]
    turn = replace(spec(1, T, new=3), prompt=(*one.prompt, *pair.tokens[0]))
    pair.add(turn)
    while pair.scheduler.has_work:
        pair.step()
    assert 0 == pair.ended[1].cached_tokens


def test_a_busy_moment_does_not_end_drafts_for_good() -> None:
    """Steps with drafts were slow while something else had the machine: they are tried again."""
    pair = Pair()
    calm_s = dict(pair.row_s)
    pair.row_s = {T: 0.05, S: 0.2}
    pair.run(asked(0, 100))
    pair.row_s = calm_s
    pair.run(asked(1, 300))
    before = len(pair.steps)
    pair.run(asked(2, 200))
    assert sum(step.tier == S for step in pair.steps[before:]) < 100


def test_the_plan_is_none_where_rows_cost_as_much_as_steps() -> None:
    """A device that is saturated by its rows gains nothing from more of them."""
    costs = [0.01 * rows for rows in range(64)]
    candidates = [Candidate(0.9, 8, drafted=True)] * 4
    assert [0] * 4 == allot(candidates, 4, costs, [0.0, 0.001, 0.002, 0.003, 0.004])


def test_the_plan_follows_acceptance() -> None:
    """Rows go to the sequences whose drafts are accepted more often."""
    costs = [0.0, *(0.1 + 0.004 * rows for rows in range(63))]
    candidates = [Candidate(0.95, 16, drafted=False), Candidate(0.3, 16, drafted=False)]
    good, bad = allot(candidates, 2, costs, [0.0] * 3)
    assert good > 4 * max(bad, 1)


@pytest.mark.parametrize(("step_s", "drafts"), [(0.02, True), (0.0003, False)])
def test_the_hosts_time_is_part_of_a_plan(step_s: float, drafts: bool) -> None:
    """Steps of the drafter cost the host some time too, which no very small model repays."""
    verify_s = [0.0] + [step_s] * 80
    candidates = [Candidate(0.7, 8, drafted=True)] * 8
    lengths = allot(candidates, 8, verify_s, [0.0] + [step_s / 4] * 8, spent_s=0.0004)
    assert drafts == any(lengths)


def test_no_draft_repays_a_long_plan() -> None:
    """A round that plans for longer than its step takes is not worth four times its tokens."""
    candidates = [Candidate(1.0, 3, drafted=False)]
    assert [3] == allot(candidates, 1, [0.0] + [0.001] * 8, [0.0, 0.0], spent_s=0.001)
    assert [0] == allot(candidates, 1, [0.0] + [0.001] * 8, [0.0, 0.0], spent_s=0.004)


@given(
    acceptances=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
    base_s=st.floats(0.001, 1.0),
    row_s=st.floats(0.0, 0.1),
    draft_s=st.floats(0.0, 0.5),
)
def test_a_plan_is_never_slower_than_none(
    acceptances: list[float], base_s: float, row_s: float, draft_s: float
) -> None:
    """By its own figures."""
    verify = [0.0, *(base_s + row_s * rows for rows in range(1, 100))]
    drafting = [0.0, *(draft_s for _ in acceptances)]
    num_rows = len(acceptances)
    lengths = allot(
        [Candidate(a, 8, drafted=True) for a in acceptances], num_rows, verify, drafting
    )
    gain = num_rows + sum(
        sum(a ** (depth + 1) for depth in range(length))
        for a, length in zip(acceptances, lengths, strict=True)
    )
    taken_s = verify[num_rows + sum(lengths)] + max(lengths) * draft_s
    assert gain / taken_s >= num_rows / verify[num_rows] * (1.0 - 1e-9)


def test_a_measured_start_knows_row_costs_at_once() -> None:
    """Before a step was served; between the counts on the line between them."""
    rates = StepRates()
    rates.begin({1: 0.1, 4: 0.16, 8: 0.32})
    assert pytest.approx([0.0, 0.1, 0.12, 0.14, 0.16, 0.2, 0.24]) == rates.row_costs(6)


def test_one_disturbed_step_does_not_override_a_measured_time() -> None:
    """A hundred times as long moves it by a tenth; that it is so from now on is soon believed."""
    rates = StepRates()
    rates.begin({1: 0.1, 4: 0.16})
    rates.record(num_tokens=4, prefills=False, verifies=True, elapsed_s=16.0)
    assert pytest.approx(0.176) == rates.row_costs(4)[4]
    for _ in range(60):
        rates.record(num_tokens=4, prefills=False, verifies=True, elapsed_s=0.64)
    assert pytest.approx(0.64, rel=0.05) == rates.row_costs(4)[4]


def test_after_a_busy_while_a_measured_time_is_believed_again() -> None:
    """Rows that were slow, and not tried since, cost what they did on a quiet machine."""
    rates = StepRates()
    rates.begin({1: 0.1, 4: 0.16, 8: 0.4})
    for _ in range(60):
        rates.record(num_tokens=8, prefills=False, verifies=True, elapsed_s=1.6)
    assert rates.row_costs(8)[8] > 1.2
    for _ in range(300):
        rates.record(num_tokens=1, prefills=False, elapsed_s=0.1)
    assert pytest.approx(0.4) == rates.row_costs(8)[8]
    rates.relax()
    rates.relax()
    assert pytest.approx(0.4) == rates.row_costs(8)[8]


def test_what_was_measured_outlives_a_tiers_engine() -> None:
    """A tier that is loaded again plans by it from its first step."""
    pair = Pair()
    pair.scheduler.begin_with({T: {1: 0.01, 4: 0.011}, S: {1: 0.1, 8: 0.116}})
    pair.scheduler.close_tier(S, EndReason.FAILED, pair.now)
    pair.scheduler.open_tier(S, TierLimits(256, 512), frozenset({EOS}))
    pair.add(asked(0))
    while not pair.tokens[0]:
        pair.step()
    pair.step()
    assert StepKind.DRAFT is pair.kinds[-1]
