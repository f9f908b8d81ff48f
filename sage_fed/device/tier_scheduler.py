"""One tier's steps: built from its running sequences, taken in when computed, each ending once.

Owns the tier's launched steps, its KV blocks, and which sequences run in them. Knows nothing of
the other tiers, of threads or of a clock: `now` is given. Only `add` raises an error that a caller
can cause (`InvalidField`); a wrong call anywhere else is our bug and asserts. Who starts next is
the decision of `request_queue`, and how many may wait that of admission.

Where the engine is pipelined, a second step may be built while the first is on the device: a
sequence whose newest token is still being sampled is fed `PENDING`. One that turns out to have
ended wastes that row, and ends, giving its blocks back, when the step has been computed.

A sequence that is interrupted loses its blocks, waits with its rank, and later feeds its prompt and
output again (what the prefix cache still has of them is not even computed); its next token is
sampled with the same seed and index, so its reader notices a pause and nothing else.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sage_fed.core import Tier, TierLoad, TierState
from sage_fed.device.draft_sources import Estimates
from sage_fed.device.kv_blocks import BlockPool
from sage_fed.device.request_queue import PlaceShares, RequestQueue, StepShares, even_share
from sage_fed.device.sequence import Ended, EndReason, Sequence, SequenceSpec, TierLimits
from sage_fed.steps import (
    BLOCK_SIZE,
    NO_TOKEN,
    Chunk,
    SampledToken,
    Step,
    StepKind,
    StepReport,
    VerifiedDrafts,
    added_up,
)

_RETRY_S = 1.0
"""How soon a place may be free, where nothing has been measured."""
_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 30.0

_SPOILED = 3
"""Sequences in a row without a finite logit, from which on the weights are not trusted.

A single prompt may overflow a 16-bit format; one that does not would get its token in between."""

_WINDOW = 64
"""Steps that a figure looks back on: about a second of tactical decoding."""

_NEWEST = 0.1
"""The newest step's weight in what a step of so many rows takes."""

_OFTEN = 3
"""Steps of so many rows from which on their time is believed."""

_RELAXED = 0.9
"""What is assumed of a time that has not been measured for long, each time that this matters."""

_LEAST_STEP_S = 0.002
"""A decode step from which on sequences without a drafter look for drafts in earlier text.

The host takes some 50 us for a plan, a good part of a shorter step. What has not been measured is
not planned for, either."""

_STALE_STEPS = 200
"""Steps of other numbers of rows after which it is not: the machine may have been busy then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step delivered and which sequences it ended; a token comes before its ending."""

    report: StepReport
    tokens: tuple[SampledToken, ...] = ()
    ended: tuple[Ended, ...] = ()


@dataclass(slots=True, eq=False)
class _ScheduledStep:
    """A step from its building to its results; `members` are its chunks' sequences, in order.

    `num_prefill` of its tokens are prompt tokens, `num_verified` are draft tokens. For it,
    `num_preempted` were interrupted, and those that started were looked up in the prefix cache with
    `num_queried` tokens and found `num_hit` of them. `void` where it was fed what an earlier step
    was to sample, and that step came to nothing.
    """

    step: Step
    members: tuple[Sequence, ...] = ()
    num_prefill: int = 0
    num_verified: int = 0
    num_queried: int = 0
    num_hit: int = 0
    num_preempted: int = 0
    void: bool = False

    @property
    def rows(self) -> Iterator[tuple[Sequence, Chunk]]:
        """Each sequence and its chunk."""
        return zip(self.members, self.step.chunks, strict=True)

    def charge(self, elapsed_s: float) -> None:
        """Attribute the device's time to the members, by tokens."""
        token_s = elapsed_s / self.step.num_tokens
        for seq, chunk in self.rows:
            seq.device_s += token_s * len(chunk.token_ids)

    def report(self, elapsed_s: float, *, out_of_memory: bool = False) -> StepReport:
        """Return what was done by it."""
        num_decode = self.step.num_tokens - self.num_prefill - self.num_verified
        if not self.num_prefill:
            kind = StepKind.DECODE
        else:
            kind = StepKind.MIXED if num_decode or self.num_verified else StepKind.PREFILL
        return StepReport(
            tier=self.step.tier,
            kind=kind,
            num_steps=1,
            num_prefill_tokens=self.num_prefill,
            num_decode_tokens=num_decode,
            num_sequences=len(self.step.chunks),
            elapsed_s=elapsed_s,
            out_of_memory=out_of_memory,
            num_context_tokens=self.step.num_context_tokens,
            num_queried_tokens=self.num_queried,
            num_hit_tokens=self.num_hit,
            num_preempted=self.num_preempted,
            num_verify_tokens=self.num_verified,
        )


class TierScheduler:
    """The sequences of one tier; one step is launched at most, or two where `pipelined`."""

    def __init__(
        self,
        tier: Tier,
        limits: TierLimits,
        eos_token_ids: frozenset[int],
        *,
        pipelined: bool = False,
        num_parts: int = 1,
    ) -> None:
        assert num_parts == 1 or not pipelined, "a step in parts has the device to itself"
        self.tier = tier
        self.num_parts = num_parts
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.rates = StepRates()
        self.estimates = Estimates()
        """How often drafts are accepted here."""
        self.reclaim: Callable[[Callable[[], bool]], None] = lambda _enough: None
        """Takes blocks back that are lent to deeper tiers' drafts, until there are enough."""
        self.running: dict[int, Sequence] = {}
        """By sequence id, in the order in which they started."""
        self.queue = RequestQueue(ageing_s=limits.ageing_s, overdue_s=limits.overdue_s)
        self._places = PlaceShares(limits.max_batch)
        self._shares = StepShares()
        self.eos_token_ids = eos_token_ids
        self._orders = itertools.count()
        self._pipelined = pipelined
        self._in_flight: deque[_ScheduledStep] = deque()
        self._claimant: int | None = None
        """The sequence that others were interrupted for: it starts next, whatever was served."""
        self._out_of_memory_alone: int | None = None
        self._spoiled_in_a_row = 0

    @property
    def has_work(self) -> bool:
        """Whether there are sequences; with no launched step, one can be built for them.

        The first in the queue always fits an empty tier.
        """
        return bool(self.running or self.queue)

    @property
    def in_flight(self) -> bool:
        """Whether a step was built that has not been completed."""
        return bool(self._in_flight)

    @property
    def unsound(self) -> bool:
        """Whether one sequence after the other got no numbers: then the model is at fault."""
        return self._spoiled_in_a_row >= _SPOILED

    @property
    def load(self) -> TierLoad:
        """The load as it is now."""
        running = self.running.values()
        return TierLoad(
            tier=self.tier,
            state=TierState.READY,
            running=len(running),
            waiting=len(self.queue),
            waiting_limit=self.limits.max_waiting,
            kv_tokens_used=self.pool.num_owned * BLOCK_SIZE,
            kv_tokens_cached=self.pool.num_kept * BLOCK_SIZE,
            kv_tokens_total=self.limits.kv_tokens,
            max_context_tokens=self.limits.max_context_tokens,
            queued_prompt_tokens=self.queue.prefill_left + sum(seq.prefill_left for seq in running),
            decode_step_s=self.rates.decode_step_s,
            prefill_tokens_per_s=self.rates.prefill_tokens_per_s,
            retry_after_s=self._retry_after_s(),
            running_limit=self.limits.max_batch,
            speculating=sum(seq.num_planned > 0 for seq in running),
            acceptance=self.estimates.measured,
        )

    def add(self, spec: SequenceSpec, submitted_s: float) -> None:
        """Queue a sequence.

        Raises:
            InvalidField: it could never run.
        """
        self.limits.check(spec)
        assert self.find(spec.seq_id) is None, "a sequence id is in use once"
        if not all(map(self.limits.has_row, spec.draft_tokens)):
            known = tuple(filter(self.limits.has_row, spec.draft_tokens))
            spec = replace(spec, draft_tokens=known)
        if spec.speculates and spec.drafter is None and not spec.draft_tokens:
            step_s = self.rates.decode_s(1)
            if step_s is None or step_s < _LEAST_STEP_S:
                spec = replace(spec, speculates=False)
        self.queue.add(Sequence(spec, submitted_s, next(self._orders), self.estimates))

    def find(self, seq_id: int) -> Sequence | None:
        """Return the sequence, waiting or running, if it has not ended."""
        return self.running.get(seq_id) or self.queue.find(seq_id)

    def cancel(self, seq_id: int, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End a sequence: now, or with the step that it is in; an unknown id is no error."""
        seq = self.find(seq_id)
        if seq is None:
            return ()
        if seq.is_in_flight:
            # The device may still write to its blocks, and its time is not known yet.
            seq.ending = seq.ending or reason
            return ()
        return (self._end(seq, reason, now),)

    def end_all(self, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End every sequence at once, a launched step or not; the engine is not used again."""
        self._in_flight.clear()
        everyone = (*self.running.values(), *self.queue)
        return tuple(self._end(seq, reason, now) for seq in everyone)

    def build(self, prefill_limit: int, now: float) -> Step | None:
        """Return the next step: a token of each decoding sequence, then pieces of prompts.

        At most `prefill_limit` prompt and draft tokens; sequences start in the queue's order while
        some of the limit, a place in the batch and their blocks are left, less those that the
        prefix cache has. Where accounts have fallen behind because of others' rows, it is a step of
        theirs only. None where a launched step has to be completed first.
        """
        assert self.has_work
        if not self._may_build():
            return None
        num_preempted = self._make_room(now)
        if num_preempted is None:
            return None
        scheduled = _ScheduledStep(Step(self.tier, ()), num_preempted=num_preempted)
        chunks: list[Chunk] = []
        members: list[Sequence] = []
        left = max(1, min(prefill_limit, self.limits.prefill_chunk_tokens))
        accounts = self._shares.next_accounts(
            {seq.spec.account for seq in self.running.values() if not seq.done}
        )
        for seq in self.running.values():
            if accounts is not None and seq.spec.account not in accounts:
                continue
            if not seq.done and (seq.decodes or left):
                left -= self._feed(seq, left, chunks, scheduled)
                members.append(seq)
        while left and (started := self._start_next(now, accounts)):
            if self.limits.prefix_cache and started.spec.prefix_cache:
                scheduled.num_queried += len(started.token_ids)
                scheduled.num_hit += started.num_stored
            left -= self._feed(started, left, chunks, scheduled)
            members.append(started)
        if not chunks:
            assert self._in_flight, "with nothing launched, some sequence can be fed"
            return None
        scheduled.step, scheduled.members = Step(self.tier, tuple(chunks)), tuple(members)
        self._in_flight.append(scheduled)
        return scheduled.step

    def complete(
        self, step: Step, sampled: Iterable[SampledToken], *, now: float, elapsed_s: float
    ) -> Outcome:
        """Take in what a step computed: one token for each draw, in the order of the chunks."""
        tokens = tuple(sampled)
        wanted = [chunk.seq_id for chunk in step.chunks for _ in chunk.draws]
        assert [token.seq_id for token in tokens] == wanted, "the engine answers each draw once"
        spoiled = {token.seq_id for token in tokens if token.token_id == NO_TOKEN}
        scheduled = self._take_out(step, elapsed_s)
        report = scheduled.report(elapsed_s)
        if scheduled.void:
            self._undo(scheduled)
            return Outcome(report, (), self.end_due(scheduled.members, now))
        self._out_of_memory_alone = None
        self.rates.record(
            num_tokens=step.num_tokens,
            prefills=scheduled.num_prefill > 0,
            verifies=scheduled.num_verified > 0,
            elapsed_s=elapsed_s,
        )
        self._note_shares(scheduled, elapsed_s)
        delivered: list[SampledToken] = []
        verified: list[VerifiedDrafts] = []
        pool, first = self.pool if self.limits.prefix_cache else None, 0
        for seq, chunk in scheduled.rows:
            num_accepted, num_draws = 0, len(chunk.draws)
            origin = seq.draft_origin if num_draws > 1 else None
            if seq.spec.seq_id in spoiled:
                self._spoil(seq, chunk)
            else:
                if num_draws > 1:
                    own = tokens[first : first + num_draws]
                    num_accepted = self._take_tokens(seq, chunk, own, delivered, now)
                elif num_draws and seq.ending is None:
                    seq.ending = self._take_token(seq, tokens[first], delivered, now)
                seq.computed(chunk, num_accepted, pool)
                if seq.ending is None:
                    self.queue.count(seq)
            if origin is not None:
                verified.append(VerifiedDrafts(origin, num_accepted, num_draws - 1))
            first += num_draws
        if verified:
            report = replace(report, verified=added_up(verified))
        return Outcome(report, tuple(delivered), self.end_due(scheduled.members, now))

    def out_of_memory(self, step: Step, *, now: float, elapsed_s: float) -> Outcome:
        """Give way after a step that did not fit the device; it has changed nothing.

        The newest sequence ends, one that prefills before one that decodes, and the others
        try again without it. A sequence that was alone tries once more before it ends.
        """
        behind = [scheduled.step for scheduled in self._in_flight].index(step) + 1
        for later in tuple(self._in_flight)[behind:]:
            # It was fed what this one was to sample, where this one failed only when waited for.
            later.void = True
        scheduled = self._take_out(step, elapsed_s)
        members = scheduled.members
        self._undo(scheduled)
        if not scheduled.void and not any(seq.ending for seq in members):
            victim = max(members, key=lambda seq: (seq.prefill_left > 0, seq.started_s, seq.order))
            spared = len(members) == 1 and self._out_of_memory_alone != victim.spec.seq_id
            self._out_of_memory_alone = victim.spec.seq_id if spared else None
            if not spared:
                victim.ending = EndReason.OUT_OF_MEMORY
        report = scheduled.report(elapsed_s, out_of_memory=True)
        return Outcome(report, (), self.end_due(members, now))

    def broken(self, step: Step, *, now: float, elapsed_s: float) -> tuple[Ended, ...]:
        """End every sequence after a step that broke the engine.

        Those that were in it bear its time; a probe's step has none.
        """
        if any(scheduled.step is step for scheduled in self._in_flight):
            self._take_out(step, elapsed_s)  # else it broke while its results were taken in
        return self.end_all(EndReason.FAILED, now)

    def _retry_after_s(self) -> float:
        """Return when a waiting place may be free: at the worst case of the nearest ending."""
        step_s = self.rates.decode_step_s
        if step_s is None or not self.running:
            return _RETRY_S
        left = min(seq.spec.max_new_tokens - seq.num_output for seq in self.running.values())
        return min(max(left * step_s, _RETRY_MIN_S), _RETRY_MAX_S)

    def _may_build(self) -> bool:
        if not self._in_flight:
            return True
        if not self._pipelined or len(self._in_flight) > 1 or self._in_flight[0].void:
            return False
        # Left out of this step, such a sequence would get every other token only.
        return not any(seq.awaits_tokens for seq in self.running.values())

    def _feed(
        self, seq: Sequence, left: int, chunks: list[Chunk], scheduled: _ScheduledStep
    ) -> int:
        """Append a sequence's next chunk; return how many prompt and draft tokens that takes."""
        prefills = not seq.decodes
        chunk = seq.next_chunk(left)
        seq.launch(chunk)
        chunks.append(chunk)
        num_drafted = seq.num_drafted
        num_prefill = len(chunk.token_ids) - num_drafted if prefills else 0
        scheduled.num_prefill += num_prefill
        scheduled.num_verified += num_drafted
        return num_prefill + num_drafted

    def _take_tokens(
        self,
        seq: Sequence,
        chunk: Chunk,
        sampled: tuple[SampledToken, ...],
        delivered: list[SampledToken],
        now: float,
    ) -> int:
        """Deliver a sequence's tokens up to the first that differs from its draft.

        Returns how many draft tokens were accepted: the model's own choice equals them.
        """
        drafted = chunk.token_ids[len(chunk.token_ids) - len(sampled) + 1 :]
        num_matching, before = 0, seq.num_output
        for index, token in enumerate(sampled):
            if seq.ending is not None:
                break
            differs = index == len(drafted) or token.token_id != drafted[index]
            own = token if differs else replace(token, accepted=True)
            seq.ending = self._take_token(seq, own, delivered, now)
            if differs:
                break
            num_matching += 1
        # An end of text that was drafted, too, is not delivered.
        return min(num_matching, seq.num_output - before)

    def _take_token(
        self, seq: Sequence, token: SampledToken, delivered: list[SampledToken], now: float
    ) -> EndReason | None:
        self._spoiled_in_a_row = 0
        if token.token_id in self.eos_token_ids and not seq.spec.ignore_eos:
            return EndReason.EOS
        if token.token_id in seq.spec.stop_token_ids:
            seq.stop_token_id = token.token_id
            return EndReason.STOP_TOKEN
        seq.append(token.token_id, now)
        delivered.append(token)
        return EndReason.LENGTH if seq.num_output == seq.spec.max_new_tokens else None

    def _note_shares(self, scheduled: _ScheduledStep, elapsed_s: float) -> None:
        """Note which accounts a step has served, and what theirs alone would have taken."""
        present = {seq.spec.account for seq in self.running.values()}
        if len(present) < 2:
            self._shares.stepped(elapsed_s, present, {})
            return
        decoding: Counter[str] = Counter()
        prefilling: Counter[str] = Counter()
        for seq, chunk in scheduled.rows:
            decoding[seq.spec.account] += 1
            prefilling[seq.spec.account] += len(chunk.token_ids) - 1
        speed = self.rates.prefill_tokens_per_s
        alone_s: dict[str, float | None] = {}
        for account, rows in decoding.items():
            row_s = self.rates.decode_s(rows)
            more_s = prefilling[account] / speed if speed else None if prefilling[account] else 0.0
            alone_s[account] = None if row_s is None or more_s is None else row_s + more_s
        self._shares.stepped(elapsed_s, present, alone_s)

    def _take_out(self, step: Step, elapsed_s: float) -> _ScheduledStep:
        """Return a step, the oldest or one that was never launched, and forget it."""
        scheduled = next(one for one in self._in_flight if one.step is step)
        self._in_flight.remove(scheduled)
        scheduled.charge(elapsed_s)
        return scheduled

    def _undo(self, scheduled: _ScheduledStep) -> None:
        """Undo a step that changed nothing."""
        for seq, chunk in scheduled.rows:
            seq.undo(chunk)

    def end_due(self, members: Iterable[Sequence], now: float) -> tuple[Ended, ...]:
        """End those of a step that have a reason to, and are in no step behind it."""
        return tuple(
            self._end(seq, seq.ending, now)
            for seq in members
            if seq.ending is not None and not seq.is_in_flight
        )

    def _spoil(self, seq: Sequence, chunk: Chunk) -> None:
        """End a sequence whose numbers have broken down; its blocks are not found again."""
        seq.computed(chunk, 0, None)
        self.pool.withdraw(seq.blocks)
        if seq.ending is None:  # else a step behind the one that spoiled it, or it was cancelled
            seq.ending = EndReason.NOT_FINITE
            self._spoiled_in_a_row += 1

    def _end(self, seq: Sequence, reason: EndReason, now: float) -> Ended:
        """Free the blocks of a sequence, if it runs, and return its ending."""
        if self.running.pop(seq.spec.seq_id, None):
            self.pool.give_back(seq.blocks)
            assert seq.started_s is not None, "it runs"
            self._places.left(seq.spec.account, now - seq.started_s, now)
        self.queue.end(seq)
        return seq.ended(reason, now)

    # Starting and interrupting.

    def _start_next(self, now: float, accounts: Collection[str] | None = None) -> Sequence | None:
        """Start the first in the queue, if there is a place and there are blocks for it.

        Accounts whose places are kept for others are passed over. With `accounts` the first is
        not started where it is of another account that runs already: the step is not for it.
        """
        free = self.limits.max_batch - len(self.running)
        if free <= 0 or not self.queue:
            return None
        held = Counter(seq.spec.account for seq in self.running.values())
        seq = None if self._claimant is None else self.queue.find(self._claimant)
        if seq is None:
            self._claimant = None
            served = self.queue.served
            kept_from = [a for a in held if free <= self._places.kept_from(a, held, served, now)]
            seq = self.queue.head(now, kept_from)
            if seq is None:
                return None
            other = accounts is not None and seq.spec.account not in accounts
            if other and held[seq.spec.account]:
                return None
        shared = seq.find(self.pool) if self.limits.prefix_cache else ()
        num_own = self.limits.blocks_to_start(seq) - len(shared)
        if not self.pool.fits(num_own, shared):
            self.reclaim(lambda: self.pool.fits(num_own, shared))
            if not self.pool.fits(num_own, shared):
                return None
        self._claimant = None
        self.queue.start(seq, now)
        self.pool.share(shared)
        seq.begin(shared, self.pool.take(num_own), now)
        self.running[seq.spec.seq_id] = seq
        self._places.started(seq.spec.account, held[seq.spec.account] + 1, now)
        return seq

    def _make_room(self, now: float) -> int | None:
        """Interrupt sequences for those that have a better claim; return how many.

        None, and none is interrupted, where a launched step has to be completed before that: the
        device may still write to their blocks.
        """
        num_interrupted = self._grow(now) if self.limits.kv_overcommit > 1.0 else 0
        head = self.queue.head(now)
        if num_interrupted is None or head is None:
            return num_interrupted
        victims = self._victims(head, now)
        if victims and self._in_flight:
            return None
        for seq in victims:
            self._interrupt(seq, now)
        if victims:
            self._claimant = head.spec.seq_id
        return num_interrupted + len(victims)

    def _grow(self, now: float) -> int | None:
        """Give each sequence the block of its next token, where it has none.

        Returns how many were interrupted for that; None where it waits for the launched step.
        """
        num_interrupted = 0
        for seq in tuple(self.running.values()):
            while seq.spec.seq_id in self.running and seq.blocks_missing > 0:
                if not self.pool.num_available:
                    self.reclaim(lambda: self.pool.num_available > 0)
                if self.pool.num_available:
                    seq.blocks += self.pool.take(1)
                elif self._in_flight:
                    return None
                else:
                    self._interrupt(self._first_to_interrupt(), now)
                    num_interrupted += 1
        return num_interrupted

    def _interrupt(self, seq: Sequence, now: float) -> None:
        del self.running[seq.spec.seq_id]
        self.pool.give_back(seq.interrupt())
        self.queue.put_back(seq, now)

    def _first_to_interrupt(self) -> Sequence:
        """Return which gives way where a running sequence, perhaps itself, finds no block."""
        unprotected = [seq for seq in self.running.values() if not self.limits.protects(seq)]
        assert unprotected, "a protected sequence has all its blocks and never asks for one"
        return max(unprotected, key=self.queue.interruption_key)

    def _victims(self, head: Sequence, now: float) -> list[Sequence]:
        """Return the fewest running sequences that have to give way to a head that does not fit.

        None in vain: either the head fits without the chosen ones, or none is chosen. A running
        sequence gives way to the head of the queue
        - of the same account: where the head has the higher priority and goes before it;
        - of another account: where that account has waited `preempt_after_s` for a start, and would
          have been served less than the running one's even after the head had been served whole;
        - of another account, at once: where places (or blocks) are short, the running one's account
          has more than its even share of them, and the head's would have no more than its own.
        So an account gains nothing by interrupting in turn. Nothing is interrupted more than
        `max_preemptions` times, but for what is above a share: that may be again each time when it
        has advanced by as much as it cost to start it anew, so that it ends, however often it is
        claimed.
        """
        limits, queue, pool, running = self.limits, self.queue, self.pool, self.running.values()
        shared = set(head.find(pool)) if limits.prefix_cache else set()
        missing = limits.blocks_to_start(head) - len(shared)
        if missing > pool.num_spare(shared):
            self.reclaim(lambda: missing <= pool.num_spare(shared))
        spare = pool.num_spare(shared)
        places = limits.max_batch - len(running)
        if places > 0 and missing <= spare:
            return []
        place_share = even_share(limits.max_batch, queue.num_accounts)
        block_share = even_share(limits.num_blocks, queue.num_accounts)
        held = Counter(seq.spec.account for seq in running)
        owned: Counter[str] = Counter()
        for seq in running:
            owned[seq.spec.account] += len(seq.blocks)
        own = head.spec.account
        claims_place = held[own] < place_share
        claims_blocks = owned[own] + missing <= block_share
        chosen: list[Sequence] = []
        for seq in sorted(running, key=queue.interruption_key, reverse=True):
            if places > 0 and missing <= spare:
                break
            account = seq.spec.account
            has_too_much = account != own and (
                (places <= 0 and claims_place and held[account] > place_share)
                or (missing > spare and claims_blocks and owned[account] > block_share)
            )
            if limits.protects(seq):
                # Else an account could make its places its own by interrupting itself.
                gives_way = has_too_much and seq.has_repaid
            else:
                gives_way = has_too_much or self._yields(seq, head, now)
            if not gives_way:
                continue
            chosen.append(seq)
            places += 1
            spare += pool.num_freed_by(block for block in seq.blocks if block not in shared)
            held[account] -= 1
            owned[account] -= len(seq.blocks)
        return chosen if places > 0 and missing <= spare else []

    def _yields(self, seq: Sequence, head: Sequence, now: float) -> bool:
        if seq.spec.account == head.spec.account:
            return self.queue.outranks(head, seq)
        patience_over = now - self.queue.waits_since(head) >= self.limits.preempt_after_s
        return patience_over and self.queue.lead_uatp(head, seq) > head.worst_uatp


class StepRates:
    """Step times of one tier, in seconds, and prefill speed, in tokens per second."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque()
        self._by_time: list[float] = []
        """The same, in ascending order."""
        self._prefill: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._prefill_tokens_per_s: float | None = None
        self._by_rows: dict[int, float] = {}
        self._times_seen: Counter[int] = Counter()
        self._last_seen: dict[int, int] = {}
        self._num_seen = 0
        self._rows: list[int] = []
        """The numbers of rows that are known, in ascending order."""
        self._measured_s: Mapping[int, float] = {}

    def begin(self, measured_s: Mapping[int, float]) -> None:
        """Take what steps of so many rows took when they were measured, for what they take.

        What serving has taught is forgotten where it was measured. An empty mapping takes nothing,
        and ends the trust in earlier ones.
        """
        self._measured_s = dict(measured_s)
        for rows, step_s in measured_s.items():
            if rows not in self._by_rows:
                insort(self._rows, rows)
            self._by_rows[rows] = step_s
            self._times_seen[rows], self._last_seen[rows] = _OFTEN, self._num_seen

    def record(
        self, *, num_tokens: int, prefills: bool, elapsed_s: float, verifies: bool = False
    ) -> None:
        """Note a completed step of `num_tokens` tokens, with prompt tokens among them or not.

        A step that verifies drafts, or makes them, has its rows' time, and is no step that decodes.
        """
        elapsed_s = max(elapsed_s, 1e-9)
        if prefills:
            self._prefill.append((num_tokens, elapsed_s))
            self._prefill_tokens_per_s = self._slope()
            return
        if not verifies:
            if len(self._decode_s) == _WINDOW:
                del self._by_time[bisect_left(self._by_time, self._decode_s.popleft())]
            self._decode_s.append(elapsed_s)
            insort(self._by_time, elapsed_s)
        weight = _NEWEST
        known_s = self._by_rows.get(num_tokens)
        if known_s is None:
            insort(self._rows, num_tokens)
            known_s = elapsed_s
        elif num_tokens in self._measured_s:
            # Drift is followed, in some dozen steps; one step that was disturbed moves it by a
            # tenth of itself at most.
            elapsed_s = min(elapsed_s, 2 * known_s)
        elif self._is_stale(num_tokens):
            self._times_seen[num_tokens], weight = 0, 0.5
        self._times_seen[num_tokens] += 1
        self._num_seen += 1
        self._last_seen[num_tokens] = self._num_seen
        self._by_rows[num_tokens] = known_s + weight * (elapsed_s - known_s)

    def _is_stale(self, num_rows: int) -> bool:
        return self._num_seen - self._last_seen.get(num_rows, 0) > _STALE_STEPS

    def _trusted_s(self, num_rows: int) -> float | None:
        """Return what so many rows take for certain; None: they have to be tried, or once more."""
        known_s, measured_s = self._by_rows[num_rows], self._measured_s.get(num_rows)
        if self._is_stale(num_rows):
            # What was slow by accident is by now what it was when nothing disturbed it.
            return None if measured_s is None else min(known_s, measured_s)
        return known_s if self._times_seen[num_rows] >= _OFTEN else None

    def decode_s(self, num_rows: int) -> float | None:
        """Return what a step takes that decodes so many sequences; None where nothing is measured.

        Between measured numbers on the line between them; beyond them rather too much than too
        little: above, in proportion, and below, what the least has taken.
        """
        if (known_s := self._by_rows.get(num_rows)) is not None:
            return known_s
        if not self._rows:
            return None
        place = bisect_left(self._rows, num_rows)
        if place == 0:
            return self._by_rows[self._rows[0]]
        below = self._rows[place - 1]
        below_s = self._by_rows[below]
        if place == len(self._rows):
            return below_s * num_rows / below
        above = self._rows[place]
        return below_s + (self._by_rows[above] - below_s) * (num_rows - below) / (above - below)

    def row_costs(self, most: int) -> list[float]:
        """Return what steps of 0 to `most` rows take, fewer where that cannot be told.

        More rows never take less. Up to twice the most that was seen are assumed to go on as the
        last ones did, fewer than the least in proportion, and what was seen seldom, or not for
        long, to have taken no more than that: so each number of rows is tried, and tried again
        after a while, as it may have been slow by accident. What was measured is believed, and
        after a while again. Empty: nothing was seen.
        """
        if not self._rows:
            return []
        costs, slope, last = [0.0], 0.0, 0
        for rows in self._rows:
            trusted_s = self._trusted_s(rows)
            cost = self._by_rows[rows] if trusted_s is None else trusted_s
            if last and trusted_s is None:
                cost = min(cost, costs[-1] + slope * (rows - last))
            cost = max(cost, costs[-1])
            before = costs[-1]
            slope = (cost - before) / (rows - last)
            costs += [before + slope * (n - last) for n in range(last + 1, rows)] + [cost]
            slope = slope if last else 0.0
            last = rows
            if last >= most:
                return costs[: most + 1]
        return costs + [costs[-1] + slope * n for n in range(1, min(last, most - last) + 1)]

    def relax(self) -> None:
        """Assume that steps take somewhat less than they did: they have not been tried for long."""
        for rows in self._rows:
            known_s = self._by_rows[rows]
            least_s = min(known_s, self._measured_s.get(rows, 0.0))
            self._by_rows[rows] = max(known_s * _RELAXED, least_s)

    @property
    def decode_step_s(self) -> float | None:
        """Median time of a step that only decodes."""
        times = self._by_time
        middle = len(times) // 2
        if len(times) % 2:
            return times[middle]
        return (times[middle - 1] + times[middle]) / 2 if times else None

    def tokens_in(self, num_steps: float) -> int:
        """Return how many prompt tokens take as long as so many decode steps."""
        if self._prefill_tokens_per_s is None or self.decode_step_s is None:
            return 4 * BLOCK_SIZE
        return max(int(self._prefill_tokens_per_s * num_steps * self.decode_step_s), BLOCK_SIZE)

    @property
    def shortest_step_s(self) -> float | None:
        """The least that a step has taken, whatever it did: about the reading of the weights."""
        times = [*self._by_time[:1], *(elapsed_s for _, elapsed_s in self._prefill)]
        return min(times) if times else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Least-squares slope through the origin of tokens over time.

        Long chunks weigh by the square of their length: a short prompt's step is mostly the
        fixed cost of a forward pass and says little about the speed of a long one.
        """
        return self._prefill_tokens_per_s

    def _slope(self) -> float:
        squares = sum(n * n for n, _ in self._prefill)
        return squares / sum(n * elapsed_s for n, elapsed_s in self._prefill)
