"""What a refusal says to the client, and the error that it becomes.

Texts tell what to do next with numbers. Knows the words of the wire contract only.
"""

from __future__ import annotations

from decimal import Decimal

from sage_fed.core import UATP_PER_ATP, Budget, Offer, Refusal, Tier, TierLoad
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    InvalidField,
    QueueFull,
    SageFedError,
    TierUnavailable,
)
from sage_fed.routing.words import Reason, RoutingPolicy


def refusal_error(refusal: Refusal, account: str) -> SageFedError:
    """The error that tells `account` of this refusal."""
    match Reason(refusal.reason):
        case Reason.PROMPT_TOO_LONG:
            return InvalidField("job.prompt", refusal.message)
        case Reason.OUTPUT_TOO_LONG:
            return InvalidField("job.sampling.max_new_tokens", refusal.message)
        case Reason.TIER_LOADING | Reason.TIER_UNAVAILABLE:
            return TierUnavailable(refusal.message, refusal.retry_after_s)
        case Reason.QUEUE_FULL:
            return QueueFull(refusal.message, refusal.retry_after_s)
        case Reason.DEADLINE_INFEASIBLE:
            return DeadlineInfeasible(refusal.message, estimate_s=refusal.estimate_s or 0.0)
        case Reason.BELOW_FLOOR | Reason.ABOVE_MAX_COST | Reason.CANNOT_AFFORD:
            return CannotAfford(
                refusal.message,
                account=account,
                reason=refusal.reason,
                retry_after_s=refusal.retry_after_s,
            )
        case other:
            raise AssertionError(f"{other} is no refusal")


def too_long(offer: Offer, max_context_tokens: int) -> Refusal:
    """The prompt, or prompt and output together, exceed the tier's context."""
    room = max_context_tokens - offer.prompt_tokens
    name = offer.tier.name
    if room < 1:
        least = "at least " if offer.unread else ""
        return Refusal(
            Reason.PROMPT_TOO_LONG,
            f"the prompt has {least}{offer.prompt_tokens:,} tokens; the {name} tier takes at most "
            f"{max_context_tokens - 1:,} and one of output; shorten it",
        )
    return Refusal(
        Reason.OUTPUT_TOO_LONG,
        f"{offer.prompt_tokens:,} prompt tokens and {offer.max_new_tokens:,} new ones exceed the "
        f"{name} tier's context of {max_context_tokens:,}; ask for at most {room:,}",
    )


def loading(tier: Tier, policy: RoutingPolicy) -> Refusal:
    """The tier's model is being loaded."""
    return Refusal(
        Reason.TIER_LOADING,
        f"the {tier.name} tier is loading its model; ask again soon",
        policy.unavailable_retry_s,
    )


def unavailable(tier: Tier, state: str, policy: RoutingPolicy) -> Refusal:
    """The tier failed, is draining or does not exist here."""
    return Refusal(
        Reason.TIER_UNAVAILABLE,
        f"the {tier.name} tier is {state} and takes no jobs; ask again later or another daemon",
        policy.unavailable_retry_s,
    )


def queue_full(load: TierLoad, policy: RoutingPolicy) -> Refusal:
    """The tier's queue has no place."""
    return Refusal(
        Reason.QUEUE_FULL,
        QueueFull.of_tier(load.tier.name, load.waiting).message,
        load.retry_after_s or policy.queue_retry_s,
    )


def too_slow(offer: Offer, estimate_s: float, deadline_s: float, fitting_tokens: int) -> Refusal:
    """The worst case takes longer than the job has."""
    advice = f"ask for at most {fitting_tokens:,} new tokens or " if fitting_tokens > 0 else ""
    return Refusal(
        Reason.DEADLINE_INFEASIBLE,
        f"{offer.max_new_tokens:,} new tokens would take about {estimate_s:.2f} s on the "
        f"{offer.tier.name} tier and {max(deadline_s, 0.0):.2f} s are left; {advice}"
        "give it a later deadline",
        estimate_s=estimate_s,
    )


def below_floor(offer: Offer, budget: Budget) -> Refusal:
    """The balance is reserved for tactical work."""
    floor = budget.strategic_floor_uatp
    retry_s = refill_s(budget, max(floor + 1, offer.worst_case_uatp))
    return Refusal(
        Reason.BELOW_FLOOR,
        f"the balance of {atp(budget.balance_uatp)} ATP is not above the account's strategic "
        f"floor of {atp(floor)} ATP; {_wait(retry_s)}ask for the tactical tier",
        retry_s,
        denied_uatp=offer.worst_case_uatp,
    )


def above_max_cost(offer: Offer, max_cost_uatp: int) -> Refusal:
    """The job may not cost that much."""
    return Refusal(
        Reason.ABOVE_MAX_COST,
        f"the job may cost up to {atp(offer.worst_case_uatp)} ATP on the {offer.tier.name} tier, "
        f"above its max_cost_uatp of {atp(max_cost_uatp)} ATP; raise that"
        f"{_smaller(offer, max_cost_uatp)}",
        denied_uatp=offer.worst_case_uatp,
    )


def cannot_afford(offer: Offer, budget: Budget) -> Refusal:
    """The balance does not cover the worst case."""
    retry_s = refill_s(budget, offer.worst_case_uatp)
    capacity = (
        f"; the account never holds more than {atp(budget.capacity_uatp)} ATP"
        if offer.worst_case_uatp > budget.capacity_uatp
        else ""
    )
    return Refusal(
        Reason.CANNOT_AFFORD,
        f"the job may cost up to {atp(offer.worst_case_uatp)} ATP on the {offer.tier.name} tier "
        f"and {atp(budget.balance_uatp)} ATP are available{capacity}; "
        f"{_wait(retry_s)}have the budget raised{_smaller(offer, budget.balance_uatp)}",
        retry_s,
        denied_uatp=offer.worst_case_uatp,
    )


def refill_s(budget: Budget, needed_uatp: int) -> float | None:
    """Seconds until the refill alone lifts the balance to `needed_uatp`; None: it never does."""
    short_uatp = needed_uatp - budget.balance_uatp
    if short_uatp <= 0:
        return 0.0
    if needed_uatp > budget.capacity_uatp or budget.refill_uatp_per_s <= 0:
        return None
    return short_uatp / budget.refill_uatp_per_s


def atp(uatp: int) -> str:
    """An amount for people: exact, without needless zeros."""
    text = f"{Decimal(uatp) / UATP_PER_ATP:,.6f}"
    return text.rstrip("0").rstrip(".")


def _wait(retry_s: float | None) -> str:
    return "" if retry_s is None else f"wait {retry_s:.1f} s for the refill, or "


def _smaller(offer: Offer, amount_uatp: int) -> str:
    fitting = offer.tokens_within(amount_uatp)
    return f" or ask for at most {fitting:,} new tokens" if fitting else " or shorten the prompt"
