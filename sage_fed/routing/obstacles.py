"""What stands between a job and one tier, looked at without the other tier.

Owns the feasibility checks and the time estimate. Cannot fail.
"""

from __future__ import annotations

from sage_fed.core import Offer, Refusal, Tier, TierLoad, TierState
from sage_fed.routing import refusals
from sage_fed.routing.words import Obstacle, RouteRequest, RoutingPolicy

Blocked = tuple[Obstacle, Refusal]

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
        return Obstacle.UNAVAILABLE, refusals.unavailable(tier, "not served here", policy)
    if load.state is TierState.LOADING:
        return Obstacle.LOADING, refusals.loading(tier, policy)
    if load.state is not TierState.READY:
        return Obstacle.UNAVAILABLE, refusals.unavailable(tier, load.state.value, policy)
    if load.waiting >= load.waiting_limit:
        return Obstacle.QUEUE, refusals.queue_full(load, policy)
    return None


def _obstacle_of_state(request: RouteRequest, tier: Tier) -> Blocked | None:
    load, offer, policy = request.loads.get(tier), request.offers.get(tier), request.policy
    context = load.max_context_tokens if load else 0  # 0 until the model is loaded
    if offer and 0 < context < offer.prompt_tokens + max(offer.max_new_tokens, 1):
        return Obstacle.CONTEXT, refusals.too_long(offer, context)
    if (blocked := shut(tier, load, policy)) is not None:
        return blocked
    if load is None or offer is None:
        return Obstacle.UNAVAILABLE, refusals.unavailable(tier, "not served here", policy)
    # Not measured yet is no reason to refuse; a deadline that has passed is.
    needed_s = estimate_s(load, offer.prompt_tokens, offer.max_new_tokens) or 0.0
    deadline_s = request.deadline_s
    if deadline_s is not None and (deadline_s <= 0 or needed_s > deadline_s):
        fitting = _fitting_tokens(load, offer, deadline_s)
        return Obstacle.DEADLINE, refusals.too_slow(offer, needed_s, deadline_s, fitting)
    return None


def _obstacle_of_money(request: RouteRequest, tier: Tier) -> Blocked | None:
    budget, max_cost_uatp = request.budget, request.job.max_cost_uatp
    offer = request.offers[tier]
    if tier == Tier.STRATEGIC and budget.balance_uatp <= budget.strategic_floor_uatp:
        return Obstacle.FLOOR, refusals.below_floor(offer, budget)
    if max_cost_uatp is not None and offer.worst_case_uatp > max_cost_uatp:
        return Obstacle.MAX_COST, refusals.above_max_cost(offer, max_cost_uatp)
    if offer.worst_case_uatp > budget.balance_uatp:
        return Obstacle.BUDGET, refusals.cannot_afford(offer, budget)
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
