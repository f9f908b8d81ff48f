"""One tier's steps: built from its running sequences, taken in when they land, each ending once.

Owns the tier's steps in flight and KV blocks. Knows nothing of the other tier, of threads or of a
clock: `now` is given. World's errors are raised by `add` only (`InvalidField`, `QueueFull`); a
wrong call anywhere else is our bug and asserts. Who waits is `line`'s affair, who runs `running`'s.

Where the engine is pipelined, a second step may be built while the first is on the device: a
sequence whose newest token is still being drawn is fed `PENDING`. One that turns out to have ended
wastes that row, and ends, giving its blocks back, when the step has landed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from sage_fed.core import Tier
from sage_fed.device.blocks import BlockPool
from sage_fed.device.flying import Flying, Outcome
from sage_fed.device.limits import TierLimits
from sage_fed.device.line import Line
from sage_fed.device.rates import StepRates
from sage_fed.device.running import Running
from sage_fed.device.sequence import Sequence
from sage_fed.device.shares import StepShares
from sage_fed.device.words import Ended, EndReason, SequenceSpec
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
