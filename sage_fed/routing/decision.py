"""The rules that choose between the tiers.

They never bend: the budget is the hard limit; more budget never yields a lower tier; a
downgrade happens only if the client allowed it, and the route says so. Cannot fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sage_fed.core import TIER_ROLES, JobSpec, Refusal, Route, Tier, TierLoad
from sage_fed.routing.obstacles import Blocked, obstacle, shut
from sage_fed.routing.words import Obstacle, Reason, RouteRequest, RoutingPolicy

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
