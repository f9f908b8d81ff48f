"""All tiers' sequences and the order of their steps: the state machine that the thread drives.

Owns the tiers' schedulers and the interleaving of their steps. No torch, no thread, no clock: `now`
(monotonic seconds) and measured step times are given, so every decision can be tested without a
device. A tier is opened when its engine is loaded and closed when that engine is broken or done.

Tiers are ordered by rank: the lowest is the fast one, which waits for deeper ones least. The rule
pays afterwards, with measured time: a step that took S seconds, while a shallower tier had work or
got some soon after, gives that tier the next `S * share / (1 - share)` seconds of the device. So
nothing is predicted, the ratio of steps follows the models as they are, and a deep step never
follows a deep step while shallower work is waiting. A deep tier cannot starve: what it owes is
bounded by `MAX_FAST_RUN` steps, also where one of its steps took absurdly long.

Where an engine can pause between layers, all this holds of the parts of a deep step: each is about
as long as one fast step pays for, so that the fast tier's tokens wait for a part, not a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sage_fed.core import Tier, TierLoad
from sage_fed.device.drafting import Drafting
from sage_fed.device.sequence import Ended, EndReason, SequenceSpec, TierLimits
from sage_fed.device.tier_scheduler import Outcome, StepRates, TierScheduler
from sage_fed.errors import TierUnavailable
from sage_fed.steps import SampledToken, Step

MAX_FAST_RUN = 64
"""Steps of a tier in a row, at most, while a deeper one has work."""

_NEAR_S = 10.0
"""How long after its last step a shallower tier is expected to have work again soon.

A request that comes in the middle of a deep step waits for all of it. With prompts cut only while
shallower work is there, the first request after a pause would wait for a whole chunk."""

_CHUNK_FAST_STEPS = 4.0
"""What a deep prefill chunk may cost, in decode steps of the fast tier."""

_CHUNK_SHORTEST_STEPS = 2.0
"""Or, if that is more, in shortest deep steps: below about one, a chunk is pure overhead,
because any step reads all the weights; above one, a chunk grows until its tokens cost time."""

_FIRST_PART_S = 0.020
"""A part of a deep step until a fast step has been measured."""

_SHORTEST_PART_S = 0.002
"""A pause costs the host a turn of its loop; parts are to be long against that."""

_FIRST_CHUNK_TOKENS = 64
"""Chunk length until prefill has been measured."""

_MIN_CHUNK_TOKENS = 16


class Scheduler:
    """Admits, builds steps, takes in results. One caller.

    `fast_share` is a tier's part of the device's time while it and a deeper one have work.
    """

    def __init__(self, *, fast_share: float = 0.5) -> None:
        self._fast_share = fast_share
        self._tiers: dict[Tier, TierScheduler] = {}
        """By rank."""
        self._drafting: dict[Tier, Drafting] = {}
        self._leaving: list[Drafting] = []
        """Of closed tiers, whose drafter still has a step on the device."""
        self._claims: dict[Tier, DeviceClaim] = {}
        self._seen_s: dict[Tier, float] = {}
        """When each tier last had work."""
        self._paused: Step | None = None
        self._noted_s = 0.0
        """Of the paused step's time, what the claims have been told."""
        self._measured_s: Mapping[Tier, Mapping[int, float]] = {}

    def begin_with(self, measured_s: Mapping[Tier, Mapping[int, float]]) -> None:
        """Take what steps of so many rows took on each tier when they were measured.

        Also for tiers that are opened later, until this is called again.
        """
        self._measured_s = measured_s
        for tier, schedule in self._tiers.items():
            schedule.rates.begin(measured_s.get(tier, {}))

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

        `pipelined` allows two of its steps on the device; with more than one of `num_parts` a
        step may pause.
        """
        assert tier not in self._tiers
        self._tiers[tier] = TierScheduler(
            tier, limits, eos_token_ids, pipelined=pipelined, num_parts=num_parts
        )
        schedule, ordered = self._tiers[tier], sorted(self._tiers.items())
        schedule.rates.begin(self._measured_s.get(tier, {}))
        self._tiers.clear()
        self._tiers.update(ordered)
        schedule.reclaim = lambda enough: self._reclaim(schedule, enough)
        self._drafting[tier] = Drafting(schedule, self._tiers.get)
        self._claims.setdefault(tier, DeviceClaim(self._fast_share))

    def close_tier(self, tier: Tier, reason: EndReason, now: float) -> tuple[Ended, ...]:
        """End all of a tier's sequences and admit no more; a closed tier is no error."""
        schedule = self._tiers.pop(tier, None)
        if self._paused and self._paused.tier == tier:
            self._paused = None
        if schedule is None:
            return ()
        ended = schedule.end_all(reason, now)
        own = self._drafting.pop(tier)
        own.close()
        if own.in_flight:
            self._leaving.append(own)
        for drafting in (*self._drafting.values(), *self._leaving):
            drafting.close_drafter(schedule)
        return ended

    @property
    def has_work(self) -> bool:
        """Whether `next_step` would return a step."""
        return any(schedule.has_work for schedule in self._tiers.values())

    def add(self, spec: SequenceSpec, submitted_s: float) -> None:
        """Queue a sequence.

        Raises:
            InvalidField: it could never run on its tier.
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

        The ending is returned here, or by `complete` if the sequence is in a launched step.
        An unknown id is no error: the sequence may have ended a moment ago.
        """
        for tier, schedule in self._tiers.items():
            if ended := schedule.cancel(seq_id, reason, now):
                self._drafting[tier].prune()
                return ended
        return ()

    def next_step(self, now: float) -> Step | None:
        """Return what to run next, or None where there is nothing to do.

        That may be the paused step, to be resumed. Also None where a launched step has to be
        completed before the next can be built. With shallower work waiting, what follows a deep
        step, or a part of one, is a shallower one, launched at once. A tier's step follows its own
        launched one only where its engine is pipelined, and a deep one only where no request of a
        shallower tier is to be expected: it would wait for both.
        """
        tier = self._next_tier(now)
        if tier is None:
            return None
        if self._paused and tier == self._paused.tier:
            return self._paused
        schedule, drafting = self._tiers[tier], self._drafting[tier]
        if drafting.in_flight:
            return None
        limit = schedule.limits.prefill_chunk_tokens
        fast = self._fast_beside(tier)
        near = fast is not None and self._is_near(tier, now)
        if fast is not None and near:
            if schedule.in_flight:
                return None
            shared = shared_chunk_tokens(fast.rates, schedule.rates, schedule.num_parts)
            limit = min(limit, shared)
        step = drafting.next_step(near=near)
        if step is None:
            step = schedule.build(limit, now)
            drafting.built()
        return step

    def pause_after_s(self, step: Step) -> float | None:
        """Return how much of a step to run before shallower tiers are asked; None: all of it.

        A deep step pauses also where no shallower work is there yet: a request that comes in the
        middle of it would wait for the rest. One step is paused at a time.
        """
        fast = self._fast_beside(step.tier)
        other_is_paused = self._paused is not None and self._paused is not step
        if fast is None or other_is_paused or self._tiers[step.tier].num_parts == 1:
            return None
        return self._claims[fast.tier].part_s(fast.rates)

    def paused(self, step: Step, elapsed_s: float) -> None:
        """Take note that a step has paused, which has taken `elapsed_s` of the device so far."""
        self._note(step, elapsed_s, step.tier)
        self._paused, self._noted_s = step, elapsed_s

    def complete(
        self, step: Step, sampled: Iterable[SampledToken], *, now: float, elapsed_s: float
    ) -> Outcome:
        """Take in what a step computed; `elapsed_s` is the device's time for it."""
        if (drafting := self._drafts_for(step)) is not None:
            self._note(step, elapsed_s, drafting.tier)
            return drafting.complete(step, sampled, now=now, elapsed_s=elapsed_s)
        outcome = self._tiers[step.tier].complete(step, sampled, now=now, elapsed_s=elapsed_s)
        self._note(step, elapsed_s, step.tier)
        self._drafting[step.tier].prune()
        return outcome

    def out_of_memory(self, step: Step, *, now: float, elapsed_s: float) -> Outcome:
        """End as few sequences as possible after a step that did not fit the device."""
        if (drafting := self._drafts_for(step)) is not None:
            self._note(step, elapsed_s, drafting.tier)
            return drafting.out_of_memory(step, now=now, elapsed_s=elapsed_s)
        outcome = self._tiers[step.tier].out_of_memory(step, now=now, elapsed_s=elapsed_s)
        self._note(step, elapsed_s, step.tier)
        self._drafting[step.tier].prune()
        return outcome

    def broken(self, step: Step, *, now: float, elapsed_s: float) -> tuple[Ended, ...]:
        """End all of a tier's sequences after a step that broke its engine; see `TierScheduler`."""
        drafting = self._drafts_for(step)
        ended = drafting.broken(step, now=now, elapsed_s=elapsed_s) if drafting else ()
        ended += self._tiers[step.tier].broken(step, now=now, elapsed_s=elapsed_s)
        self.close_tier(step.tier, EndReason.FAILED, now)
        return ended

    def unsound(self, tier: Tier) -> bool:
        """Whether an open tier's model has given several sequences in a row no numbers."""
        schedule = self._tiers.get(tier)
        return schedule is not None and schedule.unsound

    def reserve(self, tier: Tier, num_blocks: int) -> tuple[int, ...] | None:
        """Take KV blocks of a tier for a measurement; None where so many are not available."""
        schedule = self._tiers.get(tier)
        if schedule is None:
            return None
        schedule.reclaim(lambda: schedule.pool.fits(num_blocks))
        if not schedule.pool.fits(num_blocks):
            return None
        return schedule.pool.take(num_blocks)

    def give_back(self, tier: Tier, blocks: tuple[int, ...]) -> None:
        """Free what `reserve` returned; a tier that was closed meanwhile is no error."""
        if schedule := self._tiers.get(tier):
            schedule.pool.give_back(blocks)

    def load(self, tier: Tier) -> TierLoad | None:
        """Return an open tier's load as it is now."""
        schedule = self._tiers.get(tier)
        return schedule.load if schedule else None

    def _next_tier(self, now: float) -> Tier | None:
        """Choose the tier that steps next: the shallowest that has work and is due its time."""
        working = [tier for tier, schedule in self._tiers.items() if schedule.has_work]
        for tier in working:
            self._seen_s[tier] = now
        for tier in working[:-1]:
            if self._paused and tier == self._paused.tier:
                return tier  # only shallower tiers go before the rest of a paused step
            deep_in_flight = any(s.in_flight for t, s in self._tiers.items() if t.rank > tier.rank)
            if (deep_in_flight and not self._paused) or self._claims[tier].is_due:
                return tier
        return working[-1] if working else None

    def _fast_beside(self, tier: Tier) -> TierScheduler | None:
        """Return the lowest-ranked open tier, if that is another and shallower one."""
        fast = next(iter(self._tiers))
        return self._tiers[fast] if fast.rank < tier.rank else None

    def _is_near(self, tier: Tier, now: float) -> bool:
        """Whether a shallower tier has work, or may get some soon."""
        seen_s = (self._seen_s[t] for t in self._tiers if t.rank < tier.rank and t in self._seen_s)
        return any(now - one < _NEAR_S for one in seen_s)

    def _drafts_for(self, step: Step) -> Drafting | None:
        """Return what a step drafts for; None for a tier's own step."""
        everyone = (*self._drafting.values(), *self._leaving)
        owner = next((drafting for drafting in everyone if drafting.owns(step)), None)
        if owner in self._leaving:
            self._leaving.remove(owner)
        return owner

    def _reclaim(self, schedule: TierScheduler, enough: Callable[[], bool]) -> None:
        for drafting in self._drafting.values():
            drafting.reclaim(schedule, enough)

    def _note(self, step: Step, elapsed_s: float, payer: Tier) -> None:
        """Tell the claims of what a step has taken since they were told last.

        `payer` is the tier that it was for: its own, or the one that its drafts are for.
        """
        if step is self._paused:
            elapsed_s -= self._noted_s
            self._paused = None
        contended = any(s.has_work for t, s in self._tiers.items() if t.rank > payer.rank)
        self._claims[payer].stepped(elapsed_s, contended=contended)
        for tier in self._tiers:
            if tier.rank < payer.rank:
                self._claims[tier].waited(elapsed_s)


class DeviceClaim:
    """A tier's claim on the device's time, `share` of it while a deeper one has work, too."""

    def __init__(self, share: float) -> None:
        assert 0.0 < share < 1.0
        self._own_per_deep = share / (1.0 - share)
        self._due_s = 0.0
        self._run = 0
        """Steps in a row since a deeper tier's."""

    @property
    def is_due(self) -> bool:
        """Whether the tier steps before the deeper ones that have work."""
        return self._run == 0 or (self._due_s > 0.0 and self._run < MAX_FAST_RUN)

    def waited(self, elapsed_s: float) -> None:
        """Account for a deeper tier's step."""
        owed_s = elapsed_s * self._own_per_deep
        # What was paid too much, by less than a step, counts: parts are as short as that.
        paid_s = min(max(-self._due_s, 0.0), owed_s)
        self._due_s = owed_s - paid_s
        self._run = 0

    def stepped(self, elapsed_s: float, *, contended: bool) -> None:
        """Account for a step of the tier; `contended`: a deeper one had work meanwhile."""
        if contended:
            self._due_s -= elapsed_s
            self._run += 1
        else:
            # Alone on the device: a tier that had no work has no claim on the past.
            self._due_s = 0.0
            self._run = 0

    def part_s(self, rates: StepRates) -> float:
        """Return how long a part of a deep step is to be: what a step of the tier pays for."""
        step_s = rates.decode_step_s
        if step_s is None:
            return _FIRST_PART_S
        return max(step_s / self._own_per_deep, _SHORTEST_PART_S)


def shared_chunk_tokens(fast: StepRates, deep: StepRates, num_parts: int) -> int:
    """Return how many prompt tokens a deep step may take while fast work is waiting.

    Of a step that pauses, one of the `num_parts` is to cost a fast step, not the whole.
    """
    tokens_per_s = deep.prefill_tokens_per_s
    if tokens_per_s is None:
        return _FIRST_CHUNK_TOKENS
    allowed_s = max(
        max(_CHUNK_FAST_STEPS, num_parts) * (fast.decode_step_s or 0.0),
        _CHUNK_SHORTEST_STEPS * (deep.shortest_step_s or 0.0),
    )
    return max(int(tokens_per_s * allowed_s), _MIN_CHUNK_TOKENS)
