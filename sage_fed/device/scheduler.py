"""Both tiers' sequences and the order of their steps: the state machine the executor drives.

Owns the tiers' schedules and the interleaving. No torch, no thread, no clock: `now` (monotonic
seconds) and measured step times are given, so every decision can be tested without a device.
A tier is opened when its engine is loaded and closed when that engine is broken or done.

Which tier steps next, and how long a strategic step and its prefill chunk may be.

Owns the tactical tier's claim on device time. Knows no sequences and no queues.

The rule pays afterwards, with measured time: a strategic step that took S seconds, while
tactical work was waiting or came soon after, gives the tactical tier the next
`S * share / (1 - share)` seconds of the device. So nothing is predicted, the ratio of steps
follows the models as they are, and a strategic step never follows a strategic step while
tactical work is waiting. The strategic tier cannot starve: what it owes is bounded by
`MAX_TACTICAL_RUN` steps, also where one of its steps took absurdly long.

Where an engine can pause between layers, all this holds of the parts of a strategic step: each is
about as long as one tactical step pays for, so that tactical tokens wait for a part, not a step.
"""

from __future__ import annotations

from collections.abc import Iterable

from sage_fed.core import Tier, TierLoad, TierState
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits
from sage_fed.device.tier_scheduler import Outcome, StepRates, TierSchedule
from sage_fed.errors import TierUnavailable
from sage_fed.steps import BLOCK_SIZE, SampledToken, Step

_TACTICAL_NEAR_S = 10.0
"""How long after its last step the tactical tier is expected to have work again soon.

A request that comes in the middle of a strategic step waits for all of it. With prompts cut only
while tactical work is there, the first request after a pause would wait for a whole chunk."""


class Scheduler:
    """Admits, builds steps, takes in results. One caller."""

    def __init__(self, *, tactical_share: float = 0.5) -> None:
        self._tiers: dict[Tier, TierSchedule] = {}
        self._interleave = Interleave(tactical_share)
        self._tactical_seen_s: float | None = None
        self._paused: Step | None = None
        self._noted_s = 0.0
        """Of the paused step's time, what the interleaving has been told."""

    def open_tier(
        self,
        tier: Tier,
        limits: TierLimits,
        eos_token_ids: frozenset[int],
        *,
        pipelined: bool = False,
        num_parts: int = 1,
    ) -> None:
        """Begin to admit sequences of a tier.

        `pipelined` allows two of its steps in flight; with `num_parts` above 1 a step may pause.
        """
        assert tier not in self._tiers
        self._tiers[tier] = TierSchedule(
            tier, limits, eos_token_ids, pipelined=pipelined, num_parts=num_parts
        )

    def close_tier(self, tier: Tier, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End all of a tier's sequences and admit no more; a closed tier is no error."""
        schedule = self._tiers.pop(tier, None)
        if self._paused and self._paused.tier is tier:
            self._paused = None
        return schedule.end_all(reason, now) if schedule else ()

    @property
    def has_work(self) -> bool:
        """Whether `next_step` would return a step."""
        return any(schedule.has_work for schedule in self._tiers.values())

    def add(self, spec: SequenceSpec, submitted_s: float) -> None:
        """Queue a sequence.

        Raises:
            InvalidField: it could never run on its tier.
            QueueFull: the tier's waiting list is full.
            TierUnavailable: the tier is not open.
        """
        schedule = self._tiers.get(spec.tier)
        if schedule is None:
            raise TierUnavailable(f"the {spec.tier.name} tier is not serving")
        schedule.add(spec, submitted_s)

    def cancel(
        self, seq_id: int, now: float, reason: EndReason = EndReason.CANCELLED
    ) -> tuple[Ended, ...]:
        """End a sequence at the next step boundary.

        The ending is returned here, or by `complete` if the sequence is in a step in flight.
        An unknown id is no error: the sequence may have ended a moment ago.
        """
        for schedule in self._tiers.values():
            if ended := schedule.cancel(seq_id, reason, now):
                return ended
        return ()

    def next_step(self, now: float) -> Step | None:
        """Return what to run next, or None where there is nothing to do.

        That may be the paused step, to be resumed. Also None where a step in flight has to land
        before the next can be built. With tactical work waiting, what follows a strategic step,
        or a part of one, is a tactical step, launched at once. A tier's step follows its own in
        flight only where its engine is pipelined, and a strategic one only where no tactical
        request is to be expected: it would wait for both.
        """
        tactical = self._tiers.get(Tier.TACTICAL)
        strategic = self._tiers.get(Tier.STRATEGIC)
        tactical_works = tactical is not None and tactical.has_work
        if tactical_works:
            self._tactical_seen_s = now
        strategic_works = strategic is not None and strategic.has_work
        if tactical_works and strategic is not None and strategic.in_flight and not self._paused:
            tier: Tier | None = Tier.TACTICAL
        else:
            tier = self._interleave.pick(tactical=tactical_works, strategic=strategic_works)
        if tier is None:
            return None
        if self._paused and tier is self._paused.tier:
            return self._paused
        schedule = self._tiers[tier]
        limit = schedule.limits.prefill_chunk_tokens
        if tier == Tier.STRATEGIC and tactical is not None and self._tactical_near(now):
            if schedule.in_flight:
                return None
            shared = shared_chunk_tokens(tactical.rates, schedule.rates, schedule.num_parts)
            limit = min(limit, shared)
        return schedule.build(limit, now)

    def pause_after_s(self, step: Step) -> float | None:
        """How much of a step to run before the other tier is asked; None: all of it.

        Only a strategic step pauses, and also where no tactical work is there yet: a request that
        comes in the middle of it would wait for the rest.
        """
        tactical = self._tiers.get(Tier.TACTICAL)
        if step.tier == Tier.TACTICAL or tactical is None or self._tiers[step.tier].num_parts == 1:
            return None
        return self._interleave.part_s(tactical.rates)

    def paused(self, step: Step, elapsed_s: float) -> None:
        """Take note that a step has paused, which has taken `elapsed_s` of the device so far."""
        self._note(step, elapsed_s)
        self._paused, self._noted_s = step, elapsed_s

    def complete(
        self, step: Step, drawn: Iterable[SampledToken], *, now: float, elapsed_s: float
    ) -> Outcome:
        """Take in what a step computed; `elapsed_s` is the device's time for it."""
        outcome = self._tiers[step.tier].complete(step, drawn, now=now, elapsed_s=elapsed_s)
        self._note(step, elapsed_s)
        return outcome

    def out_of_memory(self, step: Step, *, now: float, elapsed_s: float) -> Outcome:
        """End as few sequences as possible after a step that did not fit the device."""
        outcome = self._tiers[step.tier].out_of_memory(step, now=now, elapsed_s=elapsed_s)
        self._note(step, elapsed_s)
        return outcome

    def broken(self, step: Step, *, now: float, elapsed_s: float) -> tuple[Ended, ...]:
        """End all of a tier's sequences after a step that broke its engine.

        Those that were in it bear its time; a probe's step was nobody's.
        """
        self._tiers[step.tier].bear(step, elapsed_s)
        return self.close_tier(step.tier, EndReason.FAILED, now)

    def unsound(self, tier: Tier) -> bool:
        """Whether an open tier's model has given several sequences in a row no numbers."""
        schedule = self._tiers.get(tier)
        return schedule is not None and schedule.unsound

    def reserve(self, tier: Tier, num_blocks: int) -> tuple[int, ...] | None:
        """Take KV blocks of a tier for a measurement; None where so many are not available."""
        schedule = self._tiers.get(tier)
        if schedule is None or not schedule.pool.fits(num_blocks):
            return None
        return schedule.pool.take(num_blocks)

    def give_back(self, tier: Tier, blocks: tuple[int, ...]) -> None:
        """Free what `reserve` returned; a tier that was closed meanwhile is no error."""
        if schedule := self._tiers.get(tier):
            schedule.pool.give_back(blocks)

    def load(self, tier: Tier) -> TierLoad | None:
        """Return an open tier's load as it is now."""
        schedule = self._tiers.get(tier)
        if schedule is None:
            return None
        return TierLoad(
            tier=tier,
            state=TierState.READY,
            running=schedule.num_running,
            waiting=schedule.num_waiting,
            waiting_limit=schedule.limits.max_waiting,
            kv_tokens_used=schedule.pool.num_owned * BLOCK_SIZE,
            kv_tokens_cached=schedule.pool.num_kept * BLOCK_SIZE,
            kv_tokens_total=schedule.pool.num_blocks * BLOCK_SIZE,
            max_context_tokens=schedule.limits.max_context_tokens,
            queued_prompt_tokens=schedule.queued_prompt_tokens,
            decode_step_s=schedule.rates.decode_step_s,
            prefill_tokens_per_s=schedule.rates.prefill_tokens_per_s,
            retry_after_s=schedule.retry_after_s,
            running_limit=schedule.limits.max_batch,
        )

    def _tactical_near(self, now: float) -> bool:
        seen_s = self._tactical_seen_s
        return seen_s is not None and now - seen_s < _TACTICAL_NEAR_S

    def _note(self, step: Step, elapsed_s: float) -> None:
        """Tell the interleaving of what a step has taken since it was told last."""
        if step is self._paused:
            elapsed_s -= self._noted_s
            self._paused = None
        contended = any(s.has_work for t, s in self._tiers.items() if t is not step.tier)
        self._interleave.note(step.tier, elapsed_s, contended=contended)


MAX_TACTICAL_RUN = 64
"""Tactical steps in a row, at most, while strategic work is waiting."""

_CHUNK_TACTICAL_STEPS = 4.0
"""What a strategic prefill chunk may cost, in tactical decode steps."""

_CHUNK_SHORTEST_STEPS = 2.0
"""Or, if that is more, in shortest strategic steps: below about one, a chunk is pure overhead,
because any step reads all the weights; above one, a chunk grows until its tokens cost time."""

_FIRST_PART_S = 0.020
"""A part of a strategic step until a tactical step has been measured."""

_SHORTEST_PART_S = 0.002
"""A pause costs the host a turn of its loop; parts are to be long against that."""

_FIRST_CHUNK_TOKENS = 64
"""Chunk length until prefill has been measured."""

_MIN_CHUNK_TOKENS = 16


class Interleave:
    """Chooses between two tiers; `tactical_share` of device time while both have work."""

    def __init__(self, tactical_share: float) -> None:
        assert 0.0 < tactical_share < 1.0
        self._tactical_per_strategic = tactical_share / (1.0 - tactical_share)
        self._tactical_due_s = 0.0
        self._tactical_run = 0

    def pick(self, *, tactical: bool, strategic: bool) -> Tier | None:
        """Return the tier that steps next, given which have work."""
        if not (tactical and strategic):
            return Tier.TACTICAL if tactical else Tier.STRATEGIC if strategic else None
        if self._tactical_run == 0:
            return Tier.TACTICAL
        paid = self._tactical_due_s <= 0.0 or self._tactical_run >= MAX_TACTICAL_RUN
        return Tier.STRATEGIC if paid else Tier.TACTICAL

    def note(self, tier: Tier, elapsed_s: float, *, contended: bool) -> None:
        """Account for a step; `contended` says whether the other tier had work meanwhile."""
        if tier == Tier.STRATEGIC:
            owed_s = elapsed_s * self._tactical_per_strategic
            # What was paid too much, by less than a step, counts: parts are as short as that.
            paid_s = min(max(-self._tactical_due_s, 0.0), owed_s)
            self._tactical_due_s = owed_s - paid_s
            self._tactical_run = 0
        elif contended:
            self._tactical_due_s -= elapsed_s
            self._tactical_run += 1
        else:
            # Alone on the device: a tier that had no work has no claim on the past.
            self._tactical_due_s = 0.0
            self._tactical_run = 0

    def part_s(self, tactical: StepRates) -> float:
        """Return how long a part of a strategic step is to be: what a tactical step pays for."""
        step_s = tactical.decode_step_s
        if step_s is None:
            return _FIRST_PART_S
        return max(step_s / self._tactical_per_strategic, _SHORTEST_PART_S)


def shared_chunk_tokens(tactical: StepRates, strategic: StepRates, num_parts: int) -> int:
    """Return how many prompt tokens a strategic step may take while tactical work is waiting.

    Of a step that pauses, one of the `num_parts` is to cost a tactical step, not the whole.
    """
    tokens_per_s = strategic.prefill_tokens_per_s
    if tokens_per_s is None:
        return _FIRST_CHUNK_TOKENS
    allowed_s = max(
        max(_CHUNK_TACTICAL_STEPS, num_parts) * (tactical.decode_step_s or 0.0),
        _CHUNK_SHORTEST_STEPS * (strategic.shortest_step_s or 0.0),
    )
    return max(int(tokens_per_s * allowed_s), _MIN_CHUNK_TOKENS)
