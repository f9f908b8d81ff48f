"""What each mode gives for what it takes: right answers, by ATP and by joule.

Owns the arithmetic alone. How often a mode is right and how long its answers are, the quality card
says, which was measured on the loaded models; what a token costs, the rate card in force; what
drafts save, and the device's time, the jobs that ended here; the power, a sensor. What none of them
says is None, never a guess. Knows no job and no clock. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sage_fed.cards.quality_card import ANY_CLASS, QualityCard, TaskClass
from sage_fed.cards.rate_card import RateCard, single_uatp
from sage_fed.core import (
    UATP_PER_ATP,
    Mode,
    ModeReturn,
    ModeReturns,
    Phase,
    Route,
    Tier,
    Usage,
)

_NEWEST = 0.02
"""The newest job's weight in what is expected of the next."""


@dataclass(slots=True)
class _Work:
    """What the jobs of a mode on a tier have made since the start, and the device's time for it."""

    num_jobs: int = 0
    output_tokens: int = 0
    device_s: float = 0.0


@dataclass(slots=True)
class Experience:
    """What jobs have made, cost and taken here.

    `output` is a moving average of their share of `max_new_tokens`, `speculated` and `escalated`
    are of the price over that without drafts.
    """

    output: float = 0.5
    speculated: float = 1.0
    escalated: float = 1.0
    work: dict[tuple[Tier, Mode], _Work] = field(default_factory=dict)

    def note(
        self, card: RateCard, route: Route, usage: Usage, max_new_tokens: int, device_s: float
    ) -> None:
        """Take in a job that has come to its end."""
        work = self.work.setdefault((route.tier, route.mode), _Work())
        work.num_jobs += 1
        work.output_tokens += usage.output_tokens
        work.device_s += device_s
        self.output += _NEWEST * (usage.output_tokens / max_new_tokens - self.output)
        share = _speculation_share(card, usage, route.tier)
        if share is None or route.mode is Mode.SINGLE:
            return
        if route.mode is Mode.CASCADE:
            self.escalated += _NEWEST * (share - self.escalated)
        else:
            self.speculated += _NEWEST * (share - self.speculated)

    def device_s(self, tier: Tier, mode: Mode, output_tokens: float) -> float | None:
        """Return the device's time for so many output tokens; None before there were any."""
        work = self.work.get((tier, mode))
        if work is None or not work.output_tokens:
            return None
        return work.device_s / work.output_tokens * output_tokens

    def num_jobs(self, tier: Tier, mode: Mode) -> int:
        """Return how many jobs that rests on."""
        work = self.work.get((tier, mode))
        return work.num_jobs if work else 0


def _speculation_share(card: RateCard, usage: Usage, tier: Tier) -> float | None:
    """Return the price of speculated output over that of the same output without drafts."""
    alone_uatp = single_uatp(card, usage, tier)
    speculated = [done for done in usage.by_phase if done.phase in (Phase.VERIFY, Phase.DRAFT)]
    if not speculated or not alone_uatp:
        return None
    own = [d for d in usage.by_phase if (d.tier, d.phase) == (tier, Phase.DECODE)]
    uatp = sum(card.lines[d.tier][d.phase].uatp * d.tokens for d in (*speculated, *own))
    return min(uatp / alone_uatp, 1.0)


def compare_modes(
    card: RateCard,
    quality: QualityCard,
    experience: Experience,
    *,
    task_class: str,
    max_error: float,
    cascades: bool,
    watts: float | None,
    power_note: str,
) -> ModeReturns:
    """Return every mode's price, accuracy and energy an answer, on the quality card's tasks.

    Args:
        card: prices an answer, as one without a cached prompt.
        quality: has the tasks.
        experience: of the jobs that ended here.
        task_class: of the tasks; one that the card does not have is any.
        max_error: what a cascade puts up with.
        cascades: whether there can be any.
        watts: the device's power while it works; None where it is not known.
        power_note: why it is not, or where it was read.
    """
    known, outlook = quality.of_class(task_class), quality.cascade(task_class, max_error)
    modes = []
    for answer in _answers(card, known, experience, max_error, cascades=cascades):
        error = known.errors[answer.tier]
        counted = answer.mode is not Mode.CASCADE
        right = 1.0 - (error.value if counted else outlook.error)
        device_s = experience.device_s(answer.tier, answer.mode, answer.output_tokens)
        joules = None if device_s is None or watts is None else device_s * watts
        modes.append(
            ModeReturn(
                tier=answer.tier,
                mode=answer.mode,
                expected_uatp=round(answer.uatp),
                accuracy=right,
                accuracy_low=1.0 - error.high if counted else None,
                accuracy_high=1.0 - error.low if counted else None,
                output_tokens=answer.output_tokens,
                right_per_atp=right * UATP_PER_ATP / answer.uatp,
                num_jobs=experience.num_jobs(answer.tier, answer.mode),
                device_s=device_s,
                joules=joules,
                right_per_joule=right / joules if joules else None,
            )
        )
    return ModeReturns(
        quality_card=quality.version,
        rate_card=card.version,
        task_class=task_class if task_class in quality.classes else ANY_CLASS,
        num_tasks=known.num_tasks,
        max_error=max_error,
        escalated=outlook.escalated,
        watts=watts,
        power_note=power_note,
        modes=tuple(modes),
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """A mode's answer, on average: its price and its tokens."""

    tier: Tier
    mode: Mode
    uatp: float
    output_tokens: float


def _answers(
    card: RateCard, known: TaskClass, experience: Experience, max_error: float, *, cascades: bool
) -> Iterator[_Answer]:
    tiers = sorted(known.tokens)
    lowest, deepest = tiers[0], tiers[-1]
    prompt_uatp = {t: known.tokens[t].prompt * card.rates[t][Phase.PREFILL] for t in tiers}
    decode_uatp = {t: card.rates[t][Phase.DECODE] for t in tiers}
    output = {t: known.mean_output(t) for t in tiers}
    single = {t: prompt_uatp[t] + output[t] * decode_uatp[t] for t in tiers}
    for tier in tiers:
        yield _Answer(tier, Mode.SINGLE, single[tier], output[tier])
    if deepest == lowest:
        return
    drafted_uatp = output[deepest] * decode_uatp[deepest] * experience.speculated
    yield _Answer(deepest, Mode.SPECULATIVE, prompt_uatp[deepest] + drafted_uatp, output[deepest])
    if cascades:
        again = known.escalated(max_error)
        pairs = zip(known.counts, again, strict=True)
        share = sum(count for count, one in pairs if one) / known.num_tasks
        made = known.mean_output(deepest, again)
        again_uatp = share * prompt_uatp[deepest]
        again_uatp += made * decode_uatp[deepest] * experience.escalated
        kept = known.mean_output(lowest, [not one for one in again])
        yield _Answer(deepest, Mode.CASCADE, single[lowest] + again_uatp, kept + made)
