"""Which tier serves a job, or which refusal: a pure function of what is known now.

The rules never bend: the budget is the hard limit; more budget never yields a lower tier; a
downgrade happens only if the client allowed it, and the route says so.
Owns the decision, its reason codes and the texts of refusals, which tell what to do next with
numbers. Knows neither clocks, ledgers, cards nor engines: prices come as offers, rates and queues
as loads. Never raises; `refusal_error` makes the exception for callers that want one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    Budget,
    JobSpec,
    Offer,
    Refusal,
    Route,
    Tier,
    TierLoad,
    TierState,
)
from sage_fed.errors import (
    CannotAfford,
    DeadlineInfeasible,
    InvalidField,
    QueueFull,
    SageFedError,
    TierUnavailable,
)


class Obstacle(enum.StrEnum):
    """Why a tier cannot take a job now, in the order in which it is looked for.

    What does not depend on money comes first: else a larger budget could change which obstacle
    is seen first, and with it lead to a lower tier.
    """

    CONTEXT = "context"
    LOADING = "loading"
    UNAVAILABLE = "unavailable"
    QUEUE = "queue"
    DEADLINE = "deadline"
    FLOOR = "floor"
    MAX_COST = "max_cost"
    BUDGET = "budget"

    @property
    def about_money(self) -> bool:
        """Whether a dearer tier cannot be the way round it."""
        return self in (Obstacle.FLOOR, Obstacle.MAX_COST, Obstacle.BUDGET)


class Reason(enum.StrEnum):
    """Why a route was taken, or why none was."""

    EXPLICIT = "explicit"
    """The tier that was asked for."""
    AUTO_SIMPLE = "auto_simple"
    """Below the complexity threshold, or without a hint and short: tactical."""
    AUTO_COMPLEX = "auto_complex"
    """At or above the complexity threshold: strategic."""
    AUTO_LARGE = "auto_large"
    """No hint, but a long prompt: strategic."""

    # The daemon chose, and the tier that it would have chosen could not take the job.
    AUTO_CONTEXT = "auto_context"
    AUTO_LOADING = "auto_loading"
    AUTO_UNAVAILABLE = "auto_unavailable"
    AUTO_QUEUE = "auto_queue"
    AUTO_DEADLINE = "auto_deadline"
    AUTO_FLOOR = "auto_floor"
    AUTO_MAX_COST = "auto_max_cost"
    AUTO_BUDGET = "auto_budget"

    # The client chose strategic and allowed less; strategic could not take the job.
    DOWNGRADE_LOADING = "downgrade_loading"
    DOWNGRADE_UNAVAILABLE = "downgrade_unavailable"
    DOWNGRADE_QUEUE = "downgrade_queue"
    DOWNGRADE_DEADLINE = "downgrade_deadline"
    DOWNGRADE_FLOOR = "downgrade_floor"
    DOWNGRADE_MAX_COST = "downgrade_max_cost"
    DOWNGRADE_BUDGET = "downgrade_budget"

    # Refusals.
    PROMPT_TOO_LONG = "prompt_too_long"
    """The prompt alone fills the tier's context."""
    OUTPUT_TOO_LONG = "output_too_long"
    """Prompt and max_new_tokens together exceed the tier's context."""
    TIER_LOADING = "tier_loading"
    TIER_UNAVAILABLE = "tier_unavailable"
    QUEUE_FULL = "queue_full"
    DEADLINE_INFEASIBLE = "deadline_infeasible"
    BELOW_FLOOR = "below_floor"
    """The balance is at or below the account's strategic floor."""
    ABOVE_MAX_COST = "above_max_cost"
    """The worst case is above what the job may cost."""
    CANNOT_AFFORD = "cannot_afford"
    """The worst case is above the balance."""


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """The operator's choices.

    AUTO is strategic from a complexity hint of `complexity_threshold` on; without a hint, from
    `strategic_prompt_tokens` on. The other two are the retry delays told to clients.
    """

    complexity_threshold: float = 0.5
    strategic_prompt_tokens: int = 1024
    queue_retry_s: float = 1.0
    unavailable_retry_s: float = 5.0


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """Everything a decision depends on.

    `offers` and `loads` may lack a tier that cannot serve (its tokenizer is not loaded yet).
    `deadline_s` is what is left of the job's deadline; None: it has none.
    """

    job: JobSpec
    offers: Mapping[Tier, Offer]
    loads: Mapping[Tier, TierLoad]
    budget: Budget
    policy: RoutingPolicy = field(default_factory=RoutingPolicy)
    deadline_s: float | None = None


Blocked = tuple[Obstacle, Refusal]

_REFUSALS = (
    Reason.PROMPT_TOO_LONG,
    Reason.OUTPUT_TOO_LONG,
    Reason.TIER_LOADING,
    Reason.TIER_UNAVAILABLE,
    Reason.QUEUE_FULL,
    Reason.DEADLINE_INFEASIBLE,
    Reason.BELOW_FLOOR,
    Reason.ABOVE_MAX_COST,
    Reason.CANNOT_AFFORD,
)


def route(request: RouteRequest) -> Route | Refusal:
    """The tier that serves the job, with the reason, or why none does."""
    requested = request.job.requested
    tier, reason = (requested, Reason.EXPLICIT) if requested else _preference(request)
    blocked = obstacle(request, tier)
    if blocked is None:
        return Route(tier, reason.value, requested)
    fallback = _fallback(request, tier, blocked[0])
    if fallback is None:
        return _with_way_out(request, blocked[1])
    blocked_too = obstacle(request, fallback)
    if blocked_too is not None:
        return _plainer(blocked, blocked_too) if fallback.rank else _plainer(blocked_too, blocked)
    prefix = "downgrade" if requested else "auto"
    return Route(
        fallback,
        Reason(f"{prefix}_{blocked[0]}").value,
        requested,
        downgraded=requested is not None,
    )


def refuse_unread(
    job: JobSpec, loads: Mapping[Tier, TierLoad], policy: RoutingPolicy
) -> Refusal | None:
    """The refusal of a job that no tier takes now, whatever its size and price; None: one may.

    It costs next to nothing: under overload most jobs are refused, and reading their prompts
    would take the time of those that are not.
    """
    tactical, strategic = (shut(tier, loads.get(tier), policy) for tier in TIER_ROLES)
    if job.requested == Tier.TACTICAL:
        return tactical and tactical[1]
    if strategic is None:
        return None
    if tactical is not None:
        both = job.requested is None or job.allow_downgrade
        return _plainer(tactical, strategic) if both else strategic[1]
    if job.requested is None or job.allow_downgrade:
        return None
    message = f"{strategic[1].message}; with allow_downgrade the tactical tier may serve it"
    return replace(strategic[1], message=message)


def possible_decisions() -> Iterator[tuple[Tier | None, Tier | None, Reason]]:
    """Every (requested, chosen, reason) there can be: the bound of a metric's labels.

    A chosen tier of None is a refusal.
    """
    for tier in TIER_ROLES:
        yield tier, tier, Reason.EXPLICIT
    yield None, Tier.TACTICAL, Reason.AUTO_SIMPLE
    yield None, Tier.STRATEGIC, Reason.AUTO_COMPLEX
    yield None, Tier.STRATEGIC, Reason.AUTO_LARGE
    for kind in Obstacle:
        yield None, Tier.TACTICAL, Reason(f"auto_{kind}")
        if not kind.about_money:
            yield None, Tier.STRATEGIC, Reason(f"auto_{kind}")
        if kind is not Obstacle.CONTEXT:
            yield Tier.STRATEGIC, Tier.TACTICAL, Reason(f"downgrade_{kind}")
    for requested in (None, *TIER_ROLES):
        for reason in _REFUSALS:
            if (requested, reason) != (Tier.TACTICAL, Reason.BELOW_FLOOR):
                yield requested, None, reason


def _preference(request: RouteRequest) -> tuple[Tier, Reason]:
    """What AUTO would choose if nothing stood in the way: the hint, else the size."""
    policy, complexity = request.policy, request.job.complexity
    if complexity is not None:
        if complexity >= policy.complexity_threshold:
            return Tier.STRATEGIC, Reason.AUTO_COMPLEX
        return Tier.TACTICAL, Reason.AUTO_SIMPLE
    longest = max((offer.prompt_tokens for offer in request.offers.values()), default=0)
    if longest >= policy.strategic_prompt_tokens:
        return Tier.STRATEGIC, Reason.AUTO_LARGE
    return Tier.TACTICAL, Reason.AUTO_SIMPLE


def _fallback(request: RouteRequest, tier: Tier, kind: Obstacle) -> Tier | None:
    """The other tier, where the rules allow it to serve instead."""
    job = request.job
    if job.requested is None:
        if tier == Tier.STRATEGIC:
            return Tier.TACTICAL
        # Up only round an obstacle that money did not raise: with a larger budget the
        # tactical tier would be free, and more budget must not yield the lower tier.
        return None if kind.about_money else Tier.STRATEGIC
    # A job too long for the tier it names is malformed, whatever it allows.
    if tier == Tier.STRATEGIC and job.allow_downgrade and kind is not Obstacle.CONTEXT:
        return Tier.TACTICAL
    return None


def _with_way_out(request: RouteRequest, refusal: Refusal) -> Refusal:
    """Tells a client that would not take less when less is to be had."""
    allowed = replace(request, job=replace(request.job, allow_downgrade=True))
    if request.job.allow_downgrade or isinstance(route(allowed), Refusal):
        return refusal
    return replace(
        refusal, message=f"{refusal.message}; with allow_downgrade the tactical tier would serve it"
    )


def _plainer(tactical: Blocked, strategic: Blocked) -> Refusal:
    """Of two refusals the one to act on."""
    # Whatever else passes, a job that cannot pay the cheaper tier cannot pay the dearer one.
    if tactical[0].about_money:
        return tactical[1]

    def wait_s(blocked: Blocked) -> float:
        retry_s = blocked[1].retry_after_s
        return math.inf if retry_s is None else retry_s

    return min(tactical, strategic, key=wait_s)[1]


_LONGEST_S = 1e9
"""Thirty years: every longer estimate says the same, and a refusal, JSON and a protobuf duration
can say this one. A rate next to zero would make it infinite."""


def estimate_s(load: TierLoad, prompt_tokens: int, max_new_tokens: int) -> float | None:
    """Seconds for a job's worst case: the queued prompts, its own prompt, every token; finite.

    None until the tier has been measured by traffic. The time that running jobs still keep
    their places is not foreseeable and left out, so this errs towards admitting.
    """
    start_s = _prefill_s(load, prompt_tokens)
    if start_s is None or load.decode_step_s is None:
        return None
    return min(start_s + max_new_tokens * load.decode_step_s, _LONGEST_S)


def obstacle(request: RouteRequest, tier: Tier) -> Blocked | None:
    """The first thing that keeps `tier` from taking the job; None: nothing does."""
    return _obstacle_of_state(request, tier) or _obstacle_of_money(request, tier)


def shut(tier: Tier, load: TierLoad | None, policy: RoutingPolicy) -> Blocked | None:
    """What keeps `tier` from taking any job at all now; None: it may take one."""
    if load is None:
        return Obstacle.UNAVAILABLE, unavailable(tier, "not served here", policy)
    if load.state is TierState.LOADING:
        return Obstacle.LOADING, loading(tier, policy)
    if load.state is not TierState.READY:
        return Obstacle.UNAVAILABLE, unavailable(tier, load.state.value, policy)
    if load.waiting >= load.waiting_limit:
        return Obstacle.QUEUE, queue_full(load, policy)
    return None


def _obstacle_of_state(request: RouteRequest, tier: Tier) -> Blocked | None:
    load, offer, policy = request.loads.get(tier), request.offers.get(tier), request.policy
    context = load.max_context_tokens if load else 0  # 0 until the model is loaded
    if offer and 0 < context < offer.prompt_tokens + max(offer.max_new_tokens, 1):
        return Obstacle.CONTEXT, too_long(offer, context)
    if (blocked := shut(tier, load, policy)) is not None:
        return blocked
    if load is None or offer is None:
        return Obstacle.UNAVAILABLE, unavailable(tier, "not served here", policy)
    # Not measured yet is no reason to refuse; a deadline that has passed is.
    needed_s = estimate_s(load, offer.prompt_tokens, offer.max_new_tokens) or 0.0
    deadline_s = request.deadline_s
    if deadline_s is not None and (deadline_s <= 0 or needed_s > deadline_s):
        fitting = _fitting_tokens(load, offer, deadline_s)
        return Obstacle.DEADLINE, too_slow(offer, needed_s, deadline_s, fitting)
    return None


def _obstacle_of_money(request: RouteRequest, tier: Tier) -> Blocked | None:
    budget, max_cost_uatp = request.budget, request.job.max_cost_uatp
    offer = request.offers[tier]
    if tier == Tier.STRATEGIC and budget.balance_uatp <= budget.strategic_floor_uatp:
        return Obstacle.FLOOR, below_floor(offer, budget)
    if max_cost_uatp is not None and offer.worst_case_uatp > max_cost_uatp:
        return Obstacle.MAX_COST, above_max_cost(offer, max_cost_uatp)
    if offer.worst_case_uatp > budget.balance_uatp:
        return Obstacle.BUDGET, cannot_afford(offer, budget)
    return None


def _prefill_s(load: TierLoad, prompt_tokens: int) -> float | None:
    if not load.prefill_tokens_per_s:
        return None
    return (load.queued_prompt_tokens + prompt_tokens) / load.prefill_tokens_per_s


def _fitting_tokens(load: TierLoad, offer: Offer, deadline_s: float) -> int:
    """How many of the job's new tokens would meet the deadline; 0 where none do."""
    start_s = _prefill_s(load, offer.prompt_tokens)
    if start_s is None or not load.decode_step_s or start_s >= deadline_s:
        return 0
    # Bounded before it is rounded: over a step time next to zero the quotient is infinite.
    return int(min((deadline_s - start_s) / load.decode_step_s, offer.max_new_tokens))


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
                detail=refusal.reason,
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
