"""One tier's steps: built from its running sequences, taken in when they land, each ending once.

Owns the tier's steps in flight and KV blocks. Knows nothing of the other tier, of threads or of a
clock: `now` is given. World's errors are raised by `add` only (`InvalidField`, `QueueFull`); a
wrong call anywhere else is our bug and asserts. Who waits is `line`'s affair, who runs `running`'s.

Where the engine is pipelined, a second step may be built while the first is on the device: a
sequence whose newest token is still being drawn is fed `PENDING`. One that turns out to have ended
wastes that row, and ends, giving its blocks back, when the step has landed.

A step of one tier from its building to its landing, and what comes of it.

Owns what has to be known of it when it lands: its sequences, and what was decided for it.

The running sequences of one tier and the blocks they run in: who joins, gives way, leaves.

Owns the running set. Knows no steps beyond whether one is in flight: nobody is interrupted while
the device may still write to their blocks.

Who starts next is `line`'s decision, who is interrupted `preemption`'s. An interrupted sequence
loses its blocks, waits with its rank, and later feeds its prompt and output again (what the prefix
cache still has of them is not even computed); its next token is drawn with the same seed and
index, so its reader notices a pause and nothing else.

Who is interrupted for whom: a pure choice among the running sequences.

Knows neither how a sequence is interrupted nor how it goes on. Chooses nobody in vain: either
the claimant fits without the chosen ones, or nobody is chosen.

A running sequence gives way to the head of the line
- of the same account: where the head has the higher priority and goes before it;
- of another account: where that account has waited `preempt_after_s` for a start, and would
  have been served less than the running one's even after the head had been served whole;
- of another account, at once: where places (or blocks) are short, the running one's account has
  more than its even share of them, and the head's would have no more than its own.
So nobody gains by interrupting in turn. Nothing is interrupted more than `max_preemptions` times,
but for what is above a share: that may be again each time when it has got on by as much as it cost
to start it anew, so that it ends, however often it is claimed.

What one tier's recent steps took.

Owns two short windows of measured steps and the figures made of them, which are asked for after
every step and so are kept up to date rather than made anew.
Knows no clock (elapsed times are given) and no sequence. Figures are None until measured.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sage_fed.core import Tier
from sage_fed.device.kv_blocks import BlockPool
from sage_fed.device.request_queue import Line, PlaceShares, StepShares, even_share
from sage_fed.device.sequence import Ended, EndReason, Sequence, SequenceSpec, TierLimits
from sage_fed.errors import QueueFull
from sage_fed.steps import NO_TOKEN, Chunk, SampledToken, Step

_RETRY_S = 1.0
"""How soon a place may be free, where nothing has been measured."""
_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 30.0

_SPOILED = 3
"""Sequences in a row without a finite logit, from which on the weights are not trusted.

A single prompt may overflow a 16-bit format; one that does not would get its token in between."""


class TierSchedule:
    """The sequences of one tier; one step is in flight at most, or two where `pipelined`."""

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
        self._eos_token_ids = eos_token_ids
        self._line = Line(ageing_s=limits.ageing_s, overdue_s=limits.overdue_s)
        self._running = Running(self._line, self.pool, limits)
        self._shares = StepShares()
        self._added = 0
        self._pipelined = pipelined
        self._flying: deque[Flying] = deque()
        self._out_of_memory_alone: int | None = None
        self._spoiled_in_a_row = 0

    @property
    def has_work(self) -> bool:
        """Whether there are sequences; with no step in flight, one can be built for them.

        The first in line always fits an empty tier.
        """
        return bool(self._running.by_id or self._line)

    @property
    def in_flight(self) -> bool:
        """Whether a step was built that has not been completed."""
        return bool(self._flying)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running.by_id)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not started, and those that were interrupted."""
        return len(self._line)

    @property
    def queued_prompt_tokens(self) -> int:
        """Tokens that the model has yet to be fed before the sequences that want them decode."""
        return self._line.prefill_left + sum(
            seq.prefill_left for seq in self._running.by_id.values()
        )

    @property
    def retry_after_s(self) -> float:
        """When a waiting place may be free: at the worst case of the nearest ending."""
        step_s = self.rates.decode_step_s
        running = self._running.by_id.values()
        if step_s is None or not running:
            return _RETRY_S
        left = min(seq.spec.max_new_tokens - seq.num_output for seq in running)
        return min(max(left * step_s, _RETRY_MIN_S), _RETRY_MAX_S)

    @property
    def unsound(self) -> bool:
        """Whether one sequence after the other got no numbers: then it is the model, not they."""
        return self._spoiled_in_a_row >= _SPOILED

    def add(self, spec: SequenceSpec, submitted_s: float) -> None:
        """Queue a sequence.

        Raises:
            InvalidField: it could never run.
            QueueFull: `max_waiting` sequences wait already.
        """
        self.limits.check(spec)
        if len(self._line) >= self.limits.max_waiting:
            raise QueueFull.of_tier(self.tier.name, len(self._line), self.retry_after_s)
        assert self.find(spec.seq_id) is None, "a sequence id is in use once"
        self._line.add(Sequence(spec, submitted_s, order=self._added))
        self._added += 1

    def find(self, seq_id: int) -> Sequence | None:
        """Return the sequence, waiting or running, if it has not ended."""
        return self._running.by_id.get(seq_id) or self._line.find(seq_id)

    def cancel(self, seq_id: int, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End a sequence: now, or with the step that it is in; an unknown id is no error."""
        seq = self.find(seq_id)
        if seq is None:
            return ()
        if seq.num_flights:
            # The device may still write to its blocks.
            seq.ending = seq.ending or reason
            return ()
        return (self._end(seq, reason, now),)

    def end_all(self, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End every sequence at once, a step in flight or not; the engine is not used again."""
        self._flying.clear()
        everyone = (*self._running.by_id.values(), *self._line)
        return tuple(self._end(seq, reason, now) for seq in everyone)

    def build(self, prefill_limit: int, now: float) -> Step | None:
        """Return the next step: a token of each decoding sequence, then pieces of prompts.

        At most `prefill_limit` prompt tokens; sequences start in line while some of the limit, a
        place in the batch and their blocks are left, less those that the prefix cache has.
        Where accounts have fallen behind because of others' rows, it is a step of theirs only.
        None where what is in flight has to land first.
        """
        assert self.has_work
        if not self._may_build():
            return None
        num_preempted = self._running.make_room(now, in_flight=bool(self._flying))
        if num_preempted is None:
            return None
        flying = Flying(Step(self.tier, ()), (), num_preempted=num_preempted)
        chunks: list[Chunk] = []
        members: list[Sequence] = []
        left = max(1, min(prefill_limit, self.limits.prefill_chunk_tokens))
        accounts = self._shares.next_accounts(self._accounts_to_feed())
        for seq in self._running.by_id.values():
            if accounts is not None and seq.spec.account not in accounts:
                continue
            if not seq.done and (seq.decodes or left):
                left -= self._feed(seq, left, chunks, flying)
                members.append(seq)
        while left and (started := self._running.start_head(now, accounts)):
            if self.limits.prefix_cache and started.spec.prefix_cache:
                flying.num_queried += len(started.token_ids)
                flying.num_hit += started.num_stored
            left -= self._feed(started, left, chunks, flying)
            members.append(started)
        if not chunks:
            assert self._flying, "with nothing in flight, somebody can be fed"
            return None
        flying.step, flying.members = Step(self.tier, tuple(chunks)), tuple(members)
        self._flying.append(flying)
        return flying.step

    def complete(
        self, step: Step, drawn: Iterable[SampledToken], *, now: float, elapsed_s: float
    ) -> Outcome:
        """Take in what a step computed."""
        by_id = {d.seq_id: d for d in drawn}
        wanted = {chunk.seq_id for chunk in step.chunks if chunk.draw}
        assert by_id.keys() == wanted, "the engine answers each draw once"
        flying = self._land(step, elapsed_s)
        if flying.void:
            self._fall_back(flying)
            return flying.outcome((), self._end_landed(flying.members, now))
        self._out_of_memory_alone = None
        self.rates.record(
            num_tokens=step.num_tokens, prefills=flying.num_prefill > 0, elapsed_s=elapsed_s
        )
        self._share(flying, elapsed_s)
        delivered: list[SampledToken] = []
        for seq, chunk in zip(flying.members, step.chunks, strict=True):
            token = by_id.get(chunk.seq_id)
            if token is not None and token.token_id == NO_TOKEN:
                self._spoil(seq, chunk)
                continue
            seq.land(chunk, self.pool if self.limits.prefix_cache else None)
            if seq.ending is None and token is not None:
                seq.ending = self._take_token(seq, token, delivered, now)
            if seq.ending is None:
                self._line.count(seq)
        return flying.outcome(delivered, self._end_landed(flying.members, now))

    def out_of_memory(self, step: Step, *, now: float, elapsed_s: float) -> Outcome:
        """Give way after a step that did not fit the device; it has changed nothing.

        The newest sequence ends, one that prefills before one that decodes, and the others
        try again without it. A sequence that was alone tries once more before it ends.
        """
        behind = [flying.step for flying in self._flying].index(step) + 1
        for later in tuple(self._flying)[behind:]:
            # It was fed what this one was to draw, where this one failed as late as at its landing.
            later.void = True
        flying = self._land(step, elapsed_s)
        members = flying.members
        self._fall_back(flying)
        if not flying.void and not any(seq.ending for seq in members):
            victim = max(members, key=lambda seq: (seq.prefill_left > 0, seq.started_s, seq.order))
            spared = len(members) == 1 and self._out_of_memory_alone != victim.spec.seq_id
            self._out_of_memory_alone = victim.spec.seq_id if spared else None
            if not spared:
                victim.ending = EndReason.OUT_OF_MEMORY
        return flying.outcome((), self._end_landed(members, now))

    def bear(self, step: Step, elapsed_s: float) -> None:
        """Take in a step that came to nothing but cost time; the engine is not used again."""
        if any(flying.step is step for flying in self._flying):
            self._land(step, elapsed_s)  # else it broke while its results were taken in

    def _may_build(self) -> bool:
        if not self._flying:
            return True
        if not self._pipelined or len(self._flying) > 1 or self._flying[0].void:
            return False
        # Left out of this step, such a sequence would get every other token only.
        return not any(seq.needs_landing for seq in self._running.by_id.values())

    def _feed(self, seq: Sequence, left: int, chunks: list[Chunk], flying: Flying) -> int:
        """Append a sequence's next chunk; returns how many prompt tokens that takes."""
        prefills = not seq.decodes
        chunk = seq.next_chunk(left)
        seq.launch(chunk)
        chunks.append(chunk)
        num_prefill = len(chunk.token_ids) if prefills else 0
        flying.num_prefill += num_prefill
        return num_prefill

    def _accounts_to_feed(self) -> set[str]:
        """Return the accounts with running sequences that have something to be fed."""
        return {seq.spec.account for seq in self._running.by_id.values() if not seq.done}

    def _share(self, flying: Flying, elapsed_s: float) -> None:
        """Note whom a step has served, and what theirs alone would have taken."""
        present = {seq.spec.account for seq in self._running.by_id.values()}
        if len(present) < 2:
            self._shares.stepped(elapsed_s, present, {})
            return
        decoding: Counter[str] = Counter()
        prefilling: Counter[str] = Counter()
        for seq, chunk in zip(flying.members, flying.step.chunks, strict=True):
            decoding[seq.spec.account] += 1
            prefilling[seq.spec.account] += len(chunk.token_ids) - 1
        speed = self.rates.prefill_tokens_per_s
        alone_s: dict[str, float | None] = {}
        for account, rows in decoding.items():
            row_s = self.rates.decode_s(rows)
            more_s = prefilling[account] / speed if speed else None if prefilling[account] else 0.0
            alone_s[account] = None if row_s is None or more_s is None else row_s + more_s
        self._shares.stepped(elapsed_s, present, alone_s)

    def _land(self, step: Step, elapsed_s: float) -> Flying:
        """Take a step, which is the oldest or was never launched, out of the air."""
        flying = next(flying for flying in self._flying if flying.step is step)
        self._flying.remove(flying)
        flying.charge(elapsed_s)
        return flying

    def _fall_back(self, flying: Flying) -> None:
        """Undo a step that changed nothing."""
        for seq, chunk in zip(flying.members, flying.step.chunks, strict=True):
            seq.fall_back(chunk)

    def _end_landed(self, members: Iterable[Sequence], now: float) -> list[Ended]:
        """End those of a landed step that have a reason to, and are in no step behind it."""
        return [
            self._end(seq, seq.ending, now)
            for seq in members
            if seq.ending is not None and not seq.num_flights
        ]

    def _spoil(self, seq: Sequence, chunk: Chunk) -> None:
        """End a sequence whose numbers have broken down; nobody is to find them again."""
        seq.land(chunk, None)
        self.pool.withdraw(seq.blocks)
        if seq.ending is None:  # else a step behind the one that spoiled it, or nobody's any more
            seq.ending = EndReason.NOT_FINITE
            self._spoiled_in_a_row += 1

    def _take_token(
        self, seq: Sequence, drawn: SampledToken, delivered: list[SampledToken], now: float
    ) -> EndReason | None:
        self._spoiled_in_a_row = 0
        if drawn.token_id in self._eos_token_ids and not seq.spec.ignore_eos:
            return EndReason.EOS
        if drawn.token_id in seq.spec.stop_token_ids:
            seq.stop_token_id = drawn.token_id
            return EndReason.STOP_TOKEN
        seq.append(drawn.token_id, now)
        delivered.append(drawn)
        return EndReason.LENGTH if seq.num_output == seq.spec.max_new_tokens else None

    def _end(self, seq: Sequence, reason: EndReason, now: float) -> Ended:
        self._running.leave(seq, now)
        self._line.end(seq)
        return seq.ended(reason, now)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step delivered and which sequences it ended; a token comes before its ending.

    `num_prefill_tokens` of the step's tokens were prompt tokens. The sequences that started with
    the step were looked up in the prefix cache with `num_queried_tokens`, and had `num_hit_tokens`
    of them there. `num_preempted` were interrupted to make room for the step.
    """

    drawn: tuple[SampledToken, ...] = ()
    ended: tuple[Ended, ...] = ()
    num_prefill_tokens: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_preempted: int = 0


@dataclass(slots=True, eq=False)
class Flying:
    """`members` are the sequences of the step's chunks, in their order.

    `num_prefill` of its tokens are prompt tokens. For it, `num_preempted` were interrupted, and
    those that started were looked up with `num_queried` tokens and found `num_hit` of them.
    `void` where it was fed what an earlier step was to draw, and that step came to nothing.
    """

    step: Step
    members: tuple[Sequence, ...]
    num_prefill: int = 0
    num_queried: int = 0
    num_hit: int = 0
    num_preempted: int = 0
    void: bool = False

    def charge(self, elapsed_s: float) -> None:
        """Attribute the device's time to the members, by tokens."""
        token_s = elapsed_s / self.step.num_tokens
        for seq, chunk in zip(self.members, self.step.chunks, strict=True):
            seq.device_s += token_s * len(chunk.token_ids)

    def outcome(self, drawn: Iterable[SampledToken], ended: Iterable[Ended]) -> Outcome:
        """Return what it delivered and whom it ended, with what was decided for it."""
        return Outcome(
            drawn=tuple(drawn),
            ended=tuple(ended),
            num_prefill_tokens=self.num_prefill,
            num_queried_tokens=self.num_queried,
            num_hit_tokens=self.num_hit,
            num_preempted=self.num_preempted,
        )


class Running:
    """Sequences by id, in the order in which they started; they come from `line`."""

    def __init__(self, line: Line, pool: BlockPool, limits: TierLimits) -> None:
        self.by_id: dict[int, Sequence] = {}
        self._line = line
        self._pool = pool
        self._limits = limits
        self._places = PlaceShares(limits.max_batch)
        self._claimant: int | None = None
        """Whom others have been interrupted for: it starts next, whoever was served less."""

    def num_by_account(self) -> Counter[str]:
        """Count the running sequences of each account."""
        return Counter(seq.spec.account for seq in self.by_id.values())

    def make_room(self, now: float, *, in_flight: bool) -> int | None:
        """Interrupt whoever has to be, and return how many.

        None, and nobody is interrupted, where a step in flight has to land before that.
        """
        num_interrupted = self._grow(now, in_flight) if self._limits.kv_overcommit > 1.0 else 0
        head = self._line.head(now)
        if num_interrupted is None or head is None:
            return num_interrupted
        victims = make_way(
            head,
            self.by_id.values(),
            line=self._line,
            pool=self._pool,
            limits=self._limits,
            now=now,
        )
        if victims and in_flight:
            return None
        for seq in victims:
            self._interrupt(seq, now)
        if victims:
            self._claimant = head.spec.seq_id
        return num_interrupted + len(victims)

    def start_head(self, now: float, accounts: Collection[str] | None = None) -> Sequence | None:
        """Start the first in line, if there is a place and there are blocks for it.

        Accounts whose places are kept for others are passed over. With `accounts` the first is
        not started where it is of another account that runs already: the step is not for it.
        """
        free = self._limits.max_batch - len(self.by_id)
        if free <= 0 or not self._line:
            return None
        held = self.num_by_account()
        seq = None if self._claimant is None else self._line.find(self._claimant)
        if seq is None:
            self._claimant = None
            served = self._line.served
            kept_from = [a for a in held if free <= self._places.kept_from(a, held, served, now)]
            seq = self._line.head(now, kept_from)
            if seq is None:
                return None
            other = accounts is not None and seq.spec.account not in accounts
            if other and held[seq.spec.account]:
                return None
        shared = seq.find(self._pool) if self._limits.prefix_cache else ()
        num_own = self._limits.blocks_to_start(seq) - len(shared)
        if not self._pool.fits(num_own, shared):
            return None
        self._claimant = None
        self._line.start(seq, now)
        self._pool.share(shared)
        seq.begin(shared, self._pool.take(num_own), now)
        self.by_id[seq.spec.seq_id] = seq
        self._places.started(seq.spec.account, held[seq.spec.account] + 1, now)
        return seq

    def leave(self, seq: Sequence, now: float) -> None:
        """Free the blocks of a sequence that ends; one that only waited has none."""
        if self.by_id.pop(seq.spec.seq_id, None):
            self._pool.give_back(seq.blocks)
            assert seq.started_s is not None, "it runs"
            self._places.left(seq.spec.account, now - seq.started_s, now)

    def _grow(self, now: float, in_flight: bool) -> int | None:
        """Give each sequence the block of its next token, where it has none.

        Returns how many were interrupted for that; None where it waits for the step in flight.
        """
        num_interrupted = 0
        for seq in tuple(self.by_id.values()):
            while seq.spec.seq_id in self.by_id and seq.blocks_missing > 0:
                if self._pool.num_available:
                    seq.blocks += self._pool.take(1)
                elif in_flight:
                    return None
                else:
                    self._interrupt(weakest(self.by_id.values(), self._line, self._limits), now)
                    num_interrupted += 1
        return num_interrupted

    def _interrupt(self, seq: Sequence, now: float) -> None:
        del self.by_id[seq.spec.seq_id]
        self._pool.give_back(seq.interrupt())
        self._line.put_back(seq, now)


def make_way(
    head: Sequence,
    running: Collection[Sequence],
    *,
    line: Line,
    pool: BlockPool,
    limits: TierLimits,
    now: float,
) -> list[Sequence]:
    """Return the fewest of the weakest that have to give way to a head that does not fit."""
    shared = set(head.find(pool)) if limits.prefix_cache else set()
    missing = limits.blocks_to_start(head) - len(shared)
    spare = pool.num_spare(shared)
    places = limits.max_batch - len(running)
    if places > 0 and missing <= spare:
        return []
    place_share = even_share(limits.max_batch, line.num_accounts)
    block_share = even_share(limits.num_blocks, line.num_accounts)
    held = Counter(seq.spec.account for seq in running)
    owned: Counter[str] = Counter()
    for seq in running:
        owned[seq.spec.account] += len(seq.blocks)
    own = head.spec.account
    claims_place = held[own] < place_share
    claims_blocks = owned[own] + missing <= block_share
    chosen: list[Sequence] = []
    for seq in sorted(running, key=line.weakness, reverse=True):
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
            gives_way = has_too_much or _yields(seq, head, line, limits, now)
        if not gives_way:
            continue
        chosen.append(seq)
        places += 1
        spare += pool.num_freed_by(block for block in seq.blocks if block not in shared)
        held[account] -= 1
        owned[account] -= len(seq.blocks)
    return chosen if places > 0 and missing <= spare else []


def weakest(running: Iterable[Sequence], line: Line, limits: TierLimits) -> Sequence:
    """Return who gives way where a running sequence, perhaps itself, finds no block."""
    unprotected = [seq for seq in running if not limits.protects(seq)]
    assert unprotected, "a protected sequence has all its blocks and never asks for one"
    return max(unprotected, key=line.weakness)


def _yields(seq: Sequence, head: Sequence, line: Line, limits: TierLimits, now: float) -> bool:
    if seq.spec.account == head.spec.account:
        return line.outranks(head, seq)
    patience_over = now - line.waits_since(head) >= limits.preempt_after_s
    return patience_over and line.lead_uatp(head, seq) > head.worst_uatp


_WINDOW = 64
"""Steps that a figure looks back on: about a second of tactical decoding."""

_NEWEST = 0.1
"""The newest step's weight in what a step of so many rows takes."""


class StepRates:
    """Step times of one tier, in seconds, and prefill speed, in tokens per second."""

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque()
        self._by_time: list[float] = []
        """The same, in ascending order."""
        self._prefill: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._prefill_tokens_per_s: float | None = None
        self._by_rows: dict[int, float] = {}
        self._rows: list[int] = []
        """The numbers of rows that have been seen, in ascending order."""

    def record(self, *, num_tokens: int, prefills: bool, elapsed_s: float) -> None:
        """Note a completed step of `num_tokens` tokens, with prompt tokens among them or not."""
        elapsed_s = max(elapsed_s, 1e-9)
        if prefills:
            self._prefill.append((num_tokens, elapsed_s))
            self._prefill_tokens_per_s = self._slope()
            return
        if len(self._decode_s) == _WINDOW:
            del self._by_time[bisect_left(self._by_time, self._decode_s.popleft())]
        self._decode_s.append(elapsed_s)
        insort(self._by_time, elapsed_s)
        known_s = self._by_rows.get(num_tokens)
        if known_s is None:
            insort(self._rows, num_tokens)
            known_s = elapsed_s
        self._by_rows[num_tokens] = known_s + _NEWEST * (elapsed_s - known_s)

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

    @property
    def decode_step_s(self) -> float | None:
        """Median time of a step that only decodes."""
        times = self._by_time
        middle = len(times) // 2
        if len(times) % 2:
            return times[middle]
        return (times[middle - 1] + times[middle]) / 2 if times else None

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
