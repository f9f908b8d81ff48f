"""Speculation: which drafts are worth their verification, and the shallower tier that makes them.

Owns the drafts of one tier's running sequences, and the drafter's KV blocks for them. A round is
planned when the tier is about to step: each sequence that speculates is given a length and a
source, free text or the drafter; the drafter makes its tokens in steps of all such sequences
together; then one step of the tier verifies all drafts, beside the rows of everyone else. No torch
and no clock. Cannot fail: a draft that cannot be made is left out.

What is worth it is a matter of rates alone. With a draft token that is right with probability `a`
given those before it, the `j`-th of a draft adds `a ** j` tokens to the step; it costs a row of the
step, and if the drafter makes it, a part of a drafter's step. Tokens are added in the order of what
they bring, and the plan is the number of them at which tokens a second are most, by the times that
steps of so many rows have taken here. So the length follows acceptance, batch and machine, and is 0
where drafts do not pay. The measure is Leviathan et al. (2023), equation 1, over a batch; the batch
is one objective, because a step's time is everyone's.

Steps of the drafter are time of the deeper tier: its claim on the device pays for them. The
drafter's own sequences come first: drafts lose their blocks as soon as one of those lacks them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from sage_fed.core import DraftOrigin, Tier
from sage_fed.device.draft_sources import Source
from sage_fed.device.kv_blocks import BlockKeys, blocks_for
from sage_fed.device.sequence import Ended, Sequence
from sage_fed.device.tier_scheduler import Outcome, TierScheduler
from sage_fed.steps import (
    BLOCK_SIZE,
    NO_TOKEN,
    Chunk,
    Draw,
    SampledToken,
    Step,
    StepKind,
    StepReport,
)

_LEAST_GAIN = 1.05
"""Tokens a second, drafts over none, from which on they are made: times are not exact."""

_PLAN_S = 50e-6
_STEP_S = 150e-6
"""What the host spends on a sequence's plan, and on one more step: as much as a step of a very
small model takes, and nothing beside any other. Measured with this Python on a 2-core server."""

_LEAST_VALUE = 0.02
"""A draft token that is accepted more seldom is not worth the time of planning it."""

_LONGEST_REST = 32
"""Rounds, at most, that are not planned after plans that found nothing."""

_FORGOTTEN = 0.1
"""Part of the evidence that a plan without a draft forgets, so that drafts are tried again."""

_EXPECTED_SHARE = 0.5
"""Of the longest output that a sequence may still have, what is expected of it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft that could be made: `longest` tokens at most, of this acceptance each.

    `drafted` if the drafter makes them.
    """

    acceptance: float
    longest: int
    drafted: bool


def allot(
    candidates: list[Candidate],
    num_rows: int,
    verify_s: list[float],
    draft_s: list[float],
    spent_s: float = 0.0,
) -> list[int]:
    """Return how many draft tokens of each candidate give the most tokens a second.

    `num_rows` are the step's rows without drafts, one token each. `verify_s[n]` is what a step of
    `n` rows takes, `draft_s[n]` what a drafter's step of `n` does (0 for none); rows beyond the
    lists' ends are not to be had. `spent_s` is the host's time on a round with drafts, before any
    is made. All 0 where drafts gain less than 5 %.
    """
    lengths = [0] * len(candidates)
    best, best_rate = list(lengths), _LEAST_GAIN * num_rows / verify_s[num_rows]
    drafting = [0] * (1 + max((one.longest for one in candidates), default=0))
    gain, rows, drafts_s = float(num_rows), num_rows, spent_s
    heap = [(-one.acceptance, index) for index, one in enumerate(candidates) if one.longest]
    heapq.heapify(heap)
    while heap and rows + 1 < len(verify_s):
        value, index = -heap[0][0], heap[0][1]
        one = candidates[index]
        if value < _LEAST_VALUE:
            break
        lengths[index] += 1
        gain, rows = gain + value, rows + 1
        if one.drafted:
            depth = lengths[index]
            drafting[depth] += 1
            if drafting[depth] >= len(draft_s):
                break
            drafts_s += draft_s[drafting[depth]] - draft_s[drafting[depth] - 1]
            drafts_s += _STEP_S if drafting[depth] == 1 else 0.0
        rate = gain / (verify_s[rows] + drafts_s)
        if rate > best_rate:
            best, best_rate = list(lengths), rate
        if lengths[index] < one.longest:
            heapq.heapreplace(heap, (-value * one.acceptance, index))
        else:
            heapq.heappop(heap)
    return best


def worth(acceptance: float, longest: int, token_cost: float) -> float:
    """Return what a draft brings at its best length, in tokens, at a cost in tokens for each."""
    value, total, best = 1.0, 0.0, 0.0
    for _ in range(longest):
        value *= acceptance
        total += value - token_cost
        best = max(best, total)
        if value <= token_cost:
            break
    return best


@dataclass(slots=True, eq=False)
class _Draft:
    """The drafter's side of one sequence, the `target`.

    The first `num_stored` tokens of the target's and `tokens` have keys and values in `blocks`.
    `base` is how many tokens the target had when the round began; `wanted` tokens are to follow.
    """

    target: Sequence
    drafter: TierScheduler
    keys: BlockKeys
    sampling_draw: Callable[[int, tuple[int, ...]], Draw]
    blocks: tuple[int, ...] = ()
    num_stored: int = 0
    num_published: int = 0
    base: int = 0
    wanted: int = 0
    tokens: list[int] = field(default_factory=list)
    sound: bool = True
    """Whether the drafter's numbers for it are numbers; if not, it drafts no more."""

    @property
    def drafts(self) -> bool:
        """Whether it is to make more tokens in this round."""
        return len(self.tokens) < self.wanted

    def align(self) -> None:
        """Keep of what is stored what the target's tokens are by now."""
        new = self.target.token_ids[self.base : self.base + len(self.tokens)]
        agreed = 0
        while agreed < len(new) and new[agreed] == self.tokens[agreed]:
            agreed += 1
        # The newest token is fed again where it was: its logits are wanted.
        num_tokens = len(self.target.token_ids)
        self.num_stored = min(self.num_stored, self.base + agreed, num_tokens - 1)
        self.base, self.tokens, self.wanted = num_tokens, [], 0

    def publish(self) -> None:
        """Let full blocks of the target's own tokens be found again, by its account."""
        if not (self.target.spec.prefix_cache and self.drafter.limits.prefix_cache):
            return
        token_ids = self.target.token_ids
        for index in range(self.num_published, min(self.num_stored, len(token_ids)) // BLOCK_SIZE):
            self.drafter.pool.publish(self.blocks[index], self.keys.of(index, token_ids))
            self.num_published = index + 1


class Drafting:
    """Drafts of one tier's sequences; `find` returns an open tier's scheduler."""

    def __init__(self, target: TierScheduler, find: Callable[[Tier], TierScheduler | None]) -> None:
        self._target = target
        self._find = find
        self._drafts: dict[int, _Draft] = {}
        self._in_flight: tuple[Step, tuple[_Draft, ...]] | None = None
        self._planned = False
        self._planned_ids: set[int] = set()
        """The sequences of the last plan; without news of others, a plan may rest."""
        self._rest = 0
        self._next_rest = 1

    @property
    def tier(self) -> Tier:
        """The tier that the drafts are for."""
        return self._target.tier

    @property
    def in_flight(self) -> bool:
        """Whether a drafter's step was built that has not been completed."""
        return self._in_flight is not None

    def next_step(self, *, near: bool) -> Step | None:
        """Return the drafter's next step of this round; None: the tier's own is to be built.

        `near`: the drafter's own work is there or expected soon, so that a step is kept short.
        """
        assert not self._in_flight, "one at a time"
        if self._target.in_flight:
            return None
        self.prune()
        if not self._planned:
            self._plan()
            self._planned = True
        return self._build(near=near)

    def built(self) -> None:
        """Note that the tier's own step was built: the next round is planned anew."""
        self._planned = False
        if self._rest:
            self._rest -= 1
            if not self._rest:
                for seq in self._target.running.values():
                    seq.speculates_now = seq.drafts is not None

    def complete(
        self, step: Step, sampled: Iterable[SampledToken], *, now: float, elapsed_s: float
    ) -> Outcome:
        """Take in what the drafter's step computed; it delivers nothing."""
        members = self._take_out(step, elapsed_s)
        tokens = {token.seq_id: token.token_id for token in sampled}
        drafter = members[0].drafter
        prefills = any(len(chunk.token_ids) > _FIRST_TOKENS for chunk in step.chunks)
        drafter.rates.record(
            num_tokens=step.num_tokens, prefills=prefills, verifies=True, elapsed_s=elapsed_s
        )
        for draft, chunk in zip(members, step.chunks, strict=True):
            draft.num_stored += len(chunk.token_ids)
            if not chunk.draws:
                continue
            token_id, target = tokens[chunk.seq_id], draft.target
            if token_id == NO_TOKEN or not self._target.limits.has_row(token_id):
                draft.wanted = len(draft.tokens)
                if token_id == NO_TOKEN:
                    # Its keys and values are not for the drafter's own sequences to find.
                    drafter.pool.withdraw(draft.blocks)
                    draft.sound = False
            else:
                draft.tokens.append(token_id)
                target.drafted_tokens += 1
                if token_id in self._target.eos_token_ids or token_id in target.spec.stop_token_ids:
                    draft.wanted = len(draft.tokens)
            if not draft.drafts:
                self._propose(draft)
        return self._outcome(step, members, now, elapsed_s)

    def out_of_memory(self, step: Step, *, now: float, elapsed_s: float) -> Outcome:
        """Give up all drafts: the drafter's memory is its own sequences'."""
        members = self._take_out(step, elapsed_s)
        for draft in tuple(self._drafts.values()):
            self._drop(draft)
        self._rest = _LONGEST_REST
        return self._outcome(step, members, now, elapsed_s, out_of_memory=True)

    def broken(self, step: Step, *, now: float, elapsed_s: float) -> tuple[Ended, ...]:
        """Note that the step broke the drafter's engine."""
        return self._outcome(step, self._take_out(step, elapsed_s), now, elapsed_s).ended

    def owns(self, step: Step) -> bool:
        """Whether it is a drafter's step of this tier."""
        return self._in_flight is not None and self._in_flight[0] is step

    def prune(self) -> None:
        """Give back the blocks of drafts whose sequence does not run any more."""
        if not self._drafts:
            return
        running = self._target.running
        for draft in tuple(self._drafts.values()):
            if draft.target is not running.get(draft.target.spec.seq_id) and not self._flies(draft):
                self._drop(draft)

    def reclaim(self, drafter: TierScheduler, enough: Callable[[], bool]) -> None:
        """Give blocks of a drafter back until there are enough, those of the oldest draft first."""
        for draft in tuple(self._drafts.values()):
            if enough():
                return
            if draft.drafter is drafter and not self._flies(draft):
                self._drop(draft)

    def close_drafter(self, drafter: TierScheduler) -> None:
        """Forget what was on a tier that is closed; its pool is gone with it."""
        if self._in_flight and self._in_flight[0].tier == drafter.tier:
            self._take_out(self._in_flight[0], 0.0)
        for draft in tuple(self._drafts.values()):
            if draft.drafter is drafter:
                self._drop(draft)

    def close(self) -> None:
        """Give every block back: the tier itself is closed, and its sequences have ended."""
        self.prune()

    # Planning.

    def _plan(self) -> None:
        """Give each sequence that speculates the draft that is worth most."""
        target = self._target
        speculating = [
            seq
            for seq in target.running.values()
            if seq.drafts and not seq.drafts.proposal and seq.decodes and not seq.done
        ]
        if not speculating:
            return
        ids = {seq.spec.seq_id for seq in speculating}
        if self._rest and ids <= self._planned_ids:
            return
        self._planned_ids = ids
        num_rows = sum(not seq.done for seq in target.running.values())
        verify_s = target.rates.row_costs(num_rows + sum(_room(seq) for seq in speculating))
        if len(verify_s) <= num_rows:
            return  # nothing measured yet
        candidates, sources = [], []
        for seq in speculating:
            candidate, source = self._candidate(seq, num_rows, verify_s, len(speculating))
            candidates.append(candidate)
            sources.append(source)
        draft_s = self._draft_costs(speculating)
        spent_s = _PLAN_S * len(speculating)
        lengths = allot(candidates, num_rows, verify_s, draft_s, spent_s)
        for seq, length, candidate, source in zip(
            speculating, lengths, candidates, sources, strict=True
        ):
            assert seq.drafts is not None
            seq.speculates_now = any(lengths)
            seq.num_planned = length
            seq.drafts.source = source[0] if length and source else None
            seq.drafts.proposal = ()
            if not length or source is None:
                seq.drafts.estimates.fade(_FORGOTTEN)
            elif candidate.drafted:
                self._drafts[seq.spec.seq_id].wanted = length
            else:
                seq.drafts.proposal = source[1][:length]
        if any(lengths):
            self._rest, self._next_rest = 0, max(self._next_rest // 2, 1)
        else:
            for drafter in {seq.spec.drafter for seq in speculating} - {None}:
                if self._next_rest == _LONGEST_REST and (of := self._find(drafter)):  # type: ignore[arg-type] # not None
                    of.rates.relax()
            # The round that this plan is for counts.
            self._rest = self._next_rest + 1
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
            self._target.estimates.fade(_FORGOTTEN)

    def _candidate(
        self, seq: Sequence, num_rows: int, verify_s: list[float], num_speculating: int
    ) -> tuple[Candidate, tuple[Source, tuple[int, ...]] | None]:
        """Return the better of a sequence's sources, at the value of a token without drafts."""
        assert seq.drafts is not None
        room, estimates = _room(seq), seq.drafts.estimates
        rate = num_rows / verify_s[num_rows]
        more = min(num_rows + num_speculating, len(verify_s) - 1)
        row_s = (verify_s[more] - verify_s[num_rows]) / max(more - num_rows, 1)
        free = seq.drafts.find() if room > 0 else None
        best, source, most = Candidate(0.0, 0, drafted=False), free, 0.0
        if free is not None:
            longest = min(len(free[1]), room)
            best = Candidate(estimates.rate(free[0]), longest, drafted=False)
            most = worth(best.acceptance, longest, rate * row_s)
        drafter = None if seq.spec.drafter is None else self._find(seq.spec.drafter)
        if drafter is None or room <= 0:
            return best, source
        own = Source(DraftOrigin.DRAFTER)
        acceptance, longest = estimates.rate(own), min(room, seq.drafts.cap)
        costs = drafter.rates.row_costs(num_speculating)
        draft_s = (costs[-1] if len(costs) > 1 else 0.0) + _STEP_S
        draft_s /= num_speculating
        gain = worth(acceptance, longest, rate * (row_s + draft_s))
        if gain <= most:
            return best, source
        left = _EXPECTED_SHARE * (seq.spec.max_new_tokens - seq.num_output)
        repaid_s = left * gain / (1.0 + gain) / rate
        if not self._ready(seq, drafter, longest, repaid_s):
            return best, source
        return Candidate(acceptance, longest, drafted=True), (own, ())

    def _draft_costs(self, speculating: list[Sequence]) -> list[float]:
        """Return what steps of the drafter take, by rows; as good as nothing until measured."""
        drafters = {seq.spec.drafter for seq in speculating if seq.spec.drafter is not None}
        costs = [0.0] * (len(speculating) + 1)
        for tier in drafters:
            drafter = self._find(tier)
            measured = drafter.rates.row_costs(len(speculating)) if drafter else []
            for rows, cost in enumerate(measured):
                costs[rows] = max(costs[rows], cost)
            for rows in range(len(measured), len(costs)):
                costs[rows] = costs[rows - 1] * rows / max(rows - 1, 1)
        costs[0] = 0.0
        return costs

    def _ready(self, seq: Sequence, drafter: TierScheduler, longest: int, repaid_s: float) -> bool:
        """Whether the drafter has a sequence's tokens, or its prefill is repaid and has room."""
        draft = self._drafts.get(seq.spec.seq_id)
        begins = draft is None
        if draft is None:
            draft = _Draft(
                seq, drafter, BlockKeys(seq.spec.account), _plain_draw(seq), base=len(seq.token_ids)
            )
        draft.align()
        if not draft.sound:
            return False
        limits, num_tokens = drafter.limits, len(seq.token_ids) + longest
        if limits.num_ids is not None and max(seq.token_ids[draft.num_stored :]) >= limits.num_ids:
            return False
        shared = self._found(draft) if begins else ()
        missing = blocks_for(num_tokens) - len(draft.blocks) - len(shared)
        if num_tokens > limits.max_context_tokens or not drafter.pool.fits(missing, shared):
            return False
        left = len(seq.token_ids) - max(draft.num_stored, len(shared) * BLOCK_SIZE)
        speed = drafter.rates.prefill_tokens_per_s
        if left > 2 * longest and speed and left / speed > repaid_s:
            return False
        if begins:
            drafter.pool.share(shared)
            draft.blocks = shared
            draft.num_stored = len(shared) * BLOCK_SIZE
            draft.num_published = len(shared)
            self._drafts[seq.spec.seq_id] = draft
        if missing > 0:
            draft.blocks += drafter.pool.take(missing)
        draft.publish()
        return True

    def _found(self, draft: _Draft) -> tuple[int, ...]:
        """Return the drafter's blocks of the target's beginning; its last token has to be fed."""
        token_ids = draft.target.token_ids
        if not (draft.target.spec.prefix_cache and draft.drafter.limits.prefix_cache):
            return ()
        whole = (len(token_ids) - 1) // BLOCK_SIZE
        return draft.drafter.pool.find(draft.keys.of(index, token_ids) for index in range(whole))

    # The drafter's steps.

    def _build(self, *, near: bool) -> Step | None:
        active = [draft for draft in self._drafts.values() if draft.drafts]
        if not active:
            return None
        drafter = active[0].drafter
        left = drafter.limits.prefill_chunk_tokens
        if near:
            left = min(left, drafter.rates.tokens_in(_LONGEST_STEPS))
        chunks, members = [], []
        for draft in active:
            if draft.drafter is not drafter or left <= 0:
                continue
            tokens = draft.target.token_ids[draft.num_stored :] + draft.tokens
            if draft.num_stored > draft.base:
                tokens = draft.tokens[draft.num_stored - draft.base :]
            known = tuple(tokens[:left])
            draws: tuple[Draw, ...] = ()
            if len(known) == len(tokens):
                index = draft.target.num_output + len(draft.tokens)
                draws = (draft.sampling_draw(index, tuple(draft.tokens)),)
            left -= len(known) - len(draws)
            chunk = Chunk(draft.target.spec.seq_id, draft.num_stored, known, draft.blocks, draws)
            chunks.append(chunk)
            members.append(draft)
            draft.target.num_drafting += 1
        step = Step(drafter.tier, tuple(chunks))
        self._in_flight = step, tuple(members)
        return step

    def _propose(self, draft: _Draft) -> None:
        drafts = draft.target.drafts
        assert drafts is not None
        drafts.proposal = tuple(draft.tokens)
        drafts.source = Source(DraftOrigin.DRAFTER) if draft.tokens else None

    def _take_out(self, step: Step, elapsed_s: float) -> tuple[_Draft, ...]:
        assert self.owns(step)
        assert self._in_flight is not None
        members, self._in_flight = self._in_flight[1], None
        token_s = elapsed_s / step.num_tokens
        for draft, chunk in zip(members, step.chunks, strict=True):
            draft.target.num_drafting -= 1
            draft.target.draft_s += token_s * len(chunk.token_ids)
        return members

    def _outcome(
        self,
        step: Step,
        members: tuple[_Draft, ...],
        now: float,
        elapsed_s: float,
        *,
        out_of_memory: bool = False,
    ) -> Outcome:
        """Return what the step did, and which sequences were to end once it is done."""
        num_drafted = sum(len(chunk.draws) for chunk in step.chunks)
        report = StepReport(
            tier=step.tier,
            kind=StepKind.DRAFT,
            num_steps=1,
            num_prefill_tokens=step.num_tokens - num_drafted,
            num_decode_tokens=0,
            num_sequences=len(members),
            elapsed_s=elapsed_s,
            out_of_memory=out_of_memory,
            num_context_tokens=step.num_context_tokens,
            num_draft_tokens=num_drafted,
            drafts_for=self.tier,
        )
        ended = self._target.end_due((draft.target for draft in members), now)
        self.prune()
        return Outcome(report, (), ended)

    def _flies(self, draft: _Draft) -> bool:
        return self._in_flight is not None and draft in self._in_flight[1]

    def _drop(self, draft: _Draft) -> None:
        if draft.drafts:
            draft.wanted = len(draft.tokens)
            self._propose(draft)
        del self._drafts[draft.target.spec.seq_id]
        draft.drafter.pool.give_back(draft.blocks)


_LONGEST_STEPS = 4.0
"""How many decode steps a step with prompts may take while the drafter's own work is near."""

_FIRST_TOKENS = 16
"""A chunk of more tokens is a prompt's, not what a rejected draft leaves to be fed."""


def _room(seq: Sequence) -> int:
    """Return how many draft tokens can be verified: one more than was drafted is sampled."""
    left = seq.spec.max_new_tokens - seq.num_output - 1
    return max(min(left, len(seq.blocks) * BLOCK_SIZE - len(seq.token_ids)), 0)


def _plain_draw(seq: Sequence) -> Callable[[int, tuple[int, ...]], Draw]:
    """Return the target's own draws, without the log-probabilities of what is only proposed."""
    if seq.spec.sampling.top_logprobs is None:
        return seq.draw
    plain = replace(seq.spec.sampling, top_logprobs=None)
    return lambda index, draft: replace(seq.draw(index, draft), sampling=plain)
