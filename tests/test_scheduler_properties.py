"""The scheduler under arbitrary traffic: nothing leaks, nothing is lost, nobody waits for ever."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fake_engine import EOS, FakeEngine, reference, spec
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sage_fed.core import TIER_ROLES, Priority, Sampling, Tier
from sage_fed.device import Ended, EndReason, Outcome, Scheduler, SequenceSpec, TierLimits
from sage_fed.errors import InvalidField
from sage_fed.steps import Step

LIMITS = TierLimits(
    num_blocks=12, max_context_tokens=96, max_batch=4, max_waiting=5, prefill_chunk_tokens=20
)
CROWDED = replace(
    LIMITS, kv_overcommit=4.0, ageing_s=1.0, overdue_s=5.0, preempt_after_s=0.5, max_preemptions=3
)
THREE = (Tier(0, "fast"), Tier(1, "middle"), Tier(2, "deep"))


class Traffic(RuleBasedStateMachine):
    """Clients, a device that is sometimes out of memory, and cancels at any moment."""

    limits = LIMITS
    tiers = TIER_ROLES
    depth = 1
    num_parts = 1

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        pipelined = self.depth > 1
        self.engines = {
            tier: FakeEngine(num_blocks=LIMITS.num_blocks, pipelined=pipelined)
            for tier in self.tiers
        }
        for tier in self.tiers:
            self.scheduler.open_tier(
                tier,
                self.limits,
                frozenset({EOS}),
                pipelined=pipelined,
                num_parts=self.num_parts,
            )
        self.specs: dict[int, SequenceSpec] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.flying: deque[Step] = deque()
        self.paused: Step | None = None
        self.divided: Step | None = None
        self.part_s = 0.0
        self.now = 0.0
        self.busy_s = 0.0
        self.closed: set[Tier] = set()

    def take(self, outcome: Outcome) -> None:
        """Deliver to the clients."""
        for token in outcome.tokens:
            assert token.seq_id not in self.ended
            self.outputs[token.seq_id].append(token.token_id)
        self.end(*outcome.ended)

    def end(self, *endings: Ended) -> None:
        """Tell the clients."""
        for ended in endings:
            assert ended.seq_id not in self.ended, "a sequence ends once"
            self.ended[ended.seq_id] = ended

    @rule(
        number=st.integers(0, 2),
        prompt=st.integers(1, 70),
        new=st.integers(1, 40),
        account=st.sampled_from(["a", "b"]),
        system=st.sampled_from([0, 0, 15, 16, 40, 64]),
        cached=st.booleans(),
        priority=st.sampled_from(Priority),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([1.0, 1.1]),
        drafted=st.integers(0, 30),
        right=st.integers(0, 30),
        drafts=st.booleans(),
    )
    def add(
        self,
        number: int,
        prompt: int,
        new: int,
        account: str,
        system: int,
        cached: bool,
        priority: Priority,
        ignore_eos: bool,
        penalty: float,
        drafted: int,
        right: int,
        drafts: bool,
    ) -> None:
        """A client asks; what can never fit is refused."""
        tier = self.tiers[number % len(self.tiers)]
        if tier in self.closed:
            return
        asked = spec(
            len(self.specs),
            tier,
            prompt=prompt,
            new=new,
            system=system,
            account=account,
            prefix_cache=cached,
            priority=priority,
            ignore_eos=ignore_eos,
            sampling=Sampling(seed=len(self.specs), repetition_penalty=penalty),
        )
        expected = reference(asked)
        draft = (*expected[:right], *range(10**6, 10**6 + drafted))[:drafted]
        asked = replace(asked, speculates=drafts, draft_tokens=draft, drafter=self.tiers[0])
        load = self.scheduler.load(tier)
        assert load is not None
        if load.waiting >= LIMITS.max_waiting:
            return  # admission refuses
        try:
            self.scheduler.add(asked, self.now)
        except InvalidField:
            assert prompt + new > 96
        else:
            assert prompt + new <= 96
            self.specs[asked.seq_id] = asked
            self.outputs[asked.seq_id] = []

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client goes away, also while its step is on the device, also twice."""
        seq_id = data.draw(st.sampled_from(sorted(self.specs)))
        self.end(*self.scheduler.cancel(seq_id, self.now))

    @precondition(lambda self: len(self.flying) < self.depth)
    @rule()
    def launch(self) -> None:
        """The next step goes to the device."""
        step = self.scheduler.next_step(self.now)
        if not self.flying:
            assert (step is None) == (len(self.ended) == len(self.specs))
        if step is not None and step is self.paused:
            self.flying.append(step)
            self.paused = None
        elif step is not None:
            assert self.paused is None or step.tier < self.paused.tier
            self.flying.append(step)

    @precondition(lambda self: self.flying and self.num_parts > 1)
    @rule(elapsed_s=st.floats(0.0, 1.0))
    def pause(self, elapsed_s: float) -> None:
        """A deep step makes way for a shallower tier."""
        if self.scheduler.pause_after_s(self.flying[0]) is None:
            return
        self.paused = self.divided = self.flying.popleft()
        self.now += elapsed_s
        self.busy_s += elapsed_s
        self.part_s += elapsed_s
        self.scheduler.paused(self.paused, self.part_s)

    def whole_s(self, step: Step, elapsed_s: float) -> float:
        """What a step that ends now has taken with its last part."""
        if step is not self.divided:
            return elapsed_s
        part_s, self.part_s = self.part_s, 0.0
        return part_s + elapsed_s

    @precondition(lambda self: self.flying)
    @rule(elapsed_s=st.floats(0.0, 1.0), fits=st.integers(0, 4))
    def land(self, elapsed_s: float, fits: int) -> None:
        """The device answers, or was out of memory after it had written some KV."""
        step = self.flying.popleft()
        self.now += elapsed_s
        self.busy_s += elapsed_s
        engine = self.engines[step.tier]
        drawn = engine.answer(step)
        elapsed_s = self.whole_s(step, elapsed_s)
        if fits:
            outcome = self.scheduler.complete(step, drawn, now=self.now, elapsed_s=elapsed_s)
        else:
            engine.newest = {}
            outcome = self.scheduler.out_of_memory(step, now=self.now, elapsed_s=elapsed_s)
            assert len(outcome.ended) <= len(step.chunks)
        self.take(outcome)

    @precondition(lambda self: len(self.flying) == 2)
    @rule()
    def refuse(self) -> None:
        """The second step does not even get on the device."""
        step = self.flying.pop()
        self.take(self.scheduler.out_of_memory(step, now=self.now, elapsed_s=0.0))

    @precondition(lambda self: self.flying and len(self.ended) > 12)
    @rule(elapsed_s=st.floats(0.0, 1.0))
    def break_in_flight(self, elapsed_s: float) -> None:
        """An engine breaks in the middle of a step, which took its time all the same."""
        step = self.flying.popleft()
        self.now += elapsed_s
        self.busy_s += elapsed_s
        elapsed_s = self.whole_s(step, elapsed_s)
        self.end(*self.scheduler.broken(step, now=self.now, elapsed_s=elapsed_s))
        self.closed.add(step.tier)
        self.flying = deque(other for other in self.flying if other.tier is not step.tier)

    @precondition(lambda self: not self.flying and not self.paused and len(self.ended) > 12)
    @rule()
    def break_deepest(self) -> None:
        """An engine breaks: its sequences end, the other tiers' do not notice."""
        self.end(*self.scheduler.close_tier(self.tiers[-1], EndReason.FAILED, self.now))
        self.closed.add(self.tiers[-1])

    @invariant()
    def blocks_have_one_owner(self) -> None:
        """Every block is free, kept, or owned by as many live sequences as the pool says."""
        for schedule in self.scheduler._tiers.values():
            pool = schedule.pool
            owned = Counter(b for seq in schedule.running.values() for b in seq.blocks)
            for drafting in self.scheduler._drafting.values():
                for draft in drafting._drafts.values():
                    owned.update(draft.blocks if draft.drafter is schedule else ())
            assert owned == Counter(pool._owners)
            assert sorted([*owned, *pool._free, *pool._kept]) == list(range(LIMITS.num_blocks))
            assert pool._by_key == {key: block for block, key in pool._keys.items()}
            assert not pool._keys.keys() & set(pool._free)
            interrupted = [seq for seq in schedule.queue if seq.num_output or seq.preemptions]
            assert len(schedule.queue) <= LIMITS.max_waiting + len(interrupted)
            assert len(schedule.running) <= LIMITS.max_batch
            assert all(s.preemptions > 0 for s in interrupted)
            live = (*schedule.queue, *schedule.running.values())
            assert sum(seq.prefill_left for seq in live) == schedule.load.queued_prompt_tokens
            accounts = Counter(seq.spec.account for seq in live)
            known = schedule.queue._accounts
            assert accounts == Counter({name: a.live for name, a in known.items()})

    def teardown(self) -> None:
        """Whatever was begun ends within a bounded number of steps, with the right tokens."""
        for _ in range(LIMITS.max_waiting * len(self.tiers) * 100):
            while self.flying:
                self.land(0.01, 1)
            self.launch()
            if not self.flying:
                break
            if self.depth > 1:
                self.launch()
        assert self.specs.keys() == self.ended.keys()
        for seq_id, ended in self.ended.items():
            expected = reference(self.specs[seq_id])
            output = self.outputs[seq_id]
            assert expected[: len(output)] == output
            assert len(output) == ended.output_tokens
            if ended.reason in {EndReason.EOS, EndReason.LENGTH}:
                assert expected == output
                assert (ended.reason is EndReason.LENGTH) == (
                    len(output) == self.specs[seq_id].max_new_tokens
                )
                assert len(self.specs[seq_id].prompt) == ended.prompt_tokens
            assert 0 <= ended.cached_tokens <= ended.prompt_tokens
            assert ended.accepted_tokens <= min(ended.verified_tokens, len(output))
            if not self.specs[seq_id].speculates:
                assert 0 == ended.verified_tokens == ended.drafted_tokens
            if not self.specs[seq_id].prefix_cache:
                assert 0 == ended.cached_tokens
        paid_s = sum(ended.device_s + ended.draft_s for ended in self.ended.values())
        assert self.busy_s == pytest.approx(paid_s)


class CrowdedTraffic(Traffic):
    """The same where outputs are expected to be short, and jobs are interrupted easily."""

    limits = CROWDED


class PipelinedTraffic(Traffic):
    """The same with a second step behind the one on the device, of either tier."""

    depth = 2


class PausingTraffic(Traffic):
    """The same where strategic steps pause between layers, and tactical ones run meanwhile."""

    num_parts = 4


class CrowdedPausingTraffic(CrowdedTraffic):
    """The same, and jobs are interrupted easily."""

    num_parts = 4


class CrowdedPipelinedTraffic(CrowdedTraffic):
    """Everything at once."""

    depth = 2


class OneTierTraffic(CrowdedTraffic):
    """The same with a single tier."""

    tiers = TIER_ROLES[:1]


class ThreeTierTraffic(CrowdedTraffic):
    """The same with a tier between the fast and the deep one."""

    tiers = THREE


class ThreePipelinedTierTraffic(ThreeTierTraffic):
    """The same, a step behind another."""

    depth = 2


class ThreePausingTierTraffic(ThreeTierTraffic):
    """The same, and steps of both deeper tiers pause."""

    num_parts = 4


TRAFFIC = settings(max_examples=2 * settings.default.max_examples // 5, stateful_step_count=40)

TestTraffic = Traffic.TestCase
TestTraffic.settings = TRAFFIC
TestCrowdedTraffic = CrowdedTraffic.TestCase
TestCrowdedTraffic.settings = TRAFFIC
TestPipelinedTraffic = PipelinedTraffic.TestCase
TestPipelinedTraffic.settings = TRAFFIC
TestPausingTraffic = PausingTraffic.TestCase
TestPausingTraffic.settings = TRAFFIC
TestCrowdedPausingTraffic = CrowdedPausingTraffic.TestCase
TestCrowdedPausingTraffic.settings = TRAFFIC
TestCrowdedPipelinedTraffic = CrowdedPipelinedTraffic.TestCase
TestCrowdedPipelinedTraffic.settings = TRAFFIC
TestOneTierTraffic = OneTierTraffic.TestCase
TestOneTierTraffic.settings = TRAFFIC
TestThreeTierTraffic = ThreeTierTraffic.TestCase
TestThreeTierTraffic.settings = TRAFFIC
TestThreePipelinedTierTraffic = ThreePipelinedTierTraffic.TestCase
TestThreePipelinedTierTraffic.settings = TRAFFIC
TestThreePausingTierTraffic = ThreePausingTierTraffic.TestCase
TestThreePausingTierTraffic.settings = TRAFFIC


@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    chunk=st.integers(1, 64),
)
def test_chunks_of_a_prompt_are_consecutive_and_complete(prompts: list[int], chunk: int) -> None:
    """Each prompt is fed once, in order, within the step's budget, and only its end draws."""
    limits = TierLimits(64, 128, max_batch=8, prefill_chunk_tokens=chunk)
    scheduler = Scheduler()
    scheduler.open_tier(Tier.TACTICAL, limits, frozenset())
    engine = FakeEngine()
    for seq_id, length in enumerate(prompts):
        scheduler.add(spec(seq_id, prompt=length, new=1), 0.0)
    fed: dict[int, list[int]] = {seq_id: [] for seq_id in range(len(prompts))}
    while step := scheduler.next_step(0.0):
        assert step.num_tokens <= chunk
        for piece in step.chunks:
            assert len(fed[piece.seq_id]) == piece.start
            fed[piece.seq_id].extend(piece.token_ids)
            complete = len(fed[piece.seq_id]) == prompts[piece.seq_id]
            assert complete == (len(piece.draws) == 1)
        scheduler.complete(step, engine.run(step), now=0.0, elapsed_s=0.01)
    assert [spec(i, prompt=n).prompt for i, n in enumerate(prompts)] == [
        tuple(fed[i]) for i in range(len(prompts))
    ]


@given(
    times_s=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=3),
    share=st.floats(0.05, 0.95),
)
def test_no_tier_starves(times_s: list[float], share: float) -> None:
    """With endless work on all, a tier waits for one deeper step at most, and a deep one for 64.

    So it is also between the deeper two of three, whatever the fast one has done meanwhile.
    """
    scheduler = Scheduler(fast_share=share)
    engine = FakeEngine(num_blocks=1000)
    tiers = THREE[: len(times_s)]
    step_s = dict(zip(tiers, times_s, strict=True))
    for tier in tiers:
        scheduler.open_tier(tier, TierLimits(1000, 10_000), frozenset())
        scheduler.add(spec(tier.rank, tier, new=9000), 0.0)
    order = []
    for _ in range(300):
        step = scheduler.next_step(0.0)
        assert step is not None
        order.append(str(step.tier.rank))
        sampled = engine.run(step)
        scheduler.complete(step, sampled, now=0.0, elapsed_s=step_s[step.tier])
    text = "".join(order)
    assert text[0] == "0"
    if len(tiers) > 1:
        assert "0" * 65 not in text
        assert not any(pair in text for pair in ("11", "12", "21", "22"))
        deeper = text.replace("0", "")
        assert deeper
        assert len(tiers) == 2 or ("22" not in deeper and "1" * 65 not in deeper)
