"""Which tier serves a job and how, or which refusal: a pure function of what is known now.

The rules never bend: the budget is the hard limit; more budget never yields a lower tier, nor an
answer that misses the job's `max_error` where a smaller one met it; a downgrade happens only if the
client allowed it, and the route says so.
Where the daemon chooses and a quality card tells how often each way is wrong, it takes the one that
is expected to cost least of those that meet `max_error`; else it goes by hint and size.
Owns the decision, its reason codes, and the texts of refusals, which tell with numbers what to do
next. Knows neither clocks, ledgers, cards nor engines: prices come as offers, rates and queues as
loads. Never raises; `refusal_error` makes the exception for callers that want one.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from sage_fed.core import (
    UATP_PER_ATP,
    Budget,
    JobSpec,
    Mode,
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
    RateLimited,
    SageFedError,
    TierUnavailable,
)

_QUEUE_RETRY_S = 1.0
_UNAVAILABLE_RETRY_S = 5.0

_LONGEST_S = 1e9
"""Thirty years: every longer estimate says the same, and a refusal, JSON and a protobuf duration
can say this one. A rate next to zero would make it infinite."""


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
        """Whether a deeper tier cannot be the way round it."""
        return self in (Obstacle.FLOOR, Obstacle.MAX_COST, Obstacle.BUDGET)


class Reason(enum.StrEnum):
    """Why a route was taken, or why none was.

    Codes are metric labels and part of the wire contract: add, never rename.
    """

    EXPLICIT = "explicit"
    """The tier that was asked for."""
    AUTO_SIMPLE = "auto_simple"
    """The lowest tier: the job is below the complexity threshold, or without a hint and short."""
    AUTO_COMPLEX = "auto_complex"
    """The deepest tier: at or above the complexity threshold."""
    AUTO_LARGE = "auto_large"
    """The deepest tier: no hint, but a long prompt."""
    AUTO_RETURN = "auto_return"
    """Of the ways whose expected error meets `max_error` the one that is expected to cost least."""
    MAX_ERROR_UNMET = "max_error_unmet"
    """No way that is open to the job meets its `max_error`: the one that errs least."""
    CASCADE = "cascade"
    """The cascade that was asked for."""

    # The daemon chose, and the tier that it would have chosen could not take the job.
    AUTO_CONTEXT = "auto_context"
    AUTO_LOADING = "auto_loading"
    AUTO_UNAVAILABLE = "auto_unavailable"
    AUTO_QUEUE = "auto_queue"
    AUTO_DEADLINE = "auto_deadline"
    AUTO_FLOOR = "auto_floor"
    AUTO_MAX_COST = "auto_max_cost"
    AUTO_BUDGET = "auto_budget"

    # The client asked for a cascade, whose lowest tier or price stands in the way: the deepest tier
    # serves at once.
    CASCADE_CONTEXT = "cascade_context"
    CASCADE_LOADING = "cascade_loading"
    CASCADE_UNAVAILABLE = "cascade_unavailable"
    CASCADE_QUEUE = "cascade_queue"
    CASCADE_DEADLINE = "cascade_deadline"
    CASCADE_MAX_COST = "cascade_max_cost"
    CASCADE_BUDGET = "cascade_budget"

    # The client chose a tier and allowed a lower one; its own could not take the job.
    DOWNGRADE_LOADING = "downgrade_loading"
    DOWNGRADE_UNAVAILABLE = "downgrade_unavailable"
    DOWNGRADE_QUEUE = "downgrade_queue"
    DOWNGRADE_DEADLINE = "downgrade_deadline"
    DOWNGRADE_FLOOR = "downgrade_floor"
    DOWNGRADE_MAX_COST = "downgrade_max_cost"
    DOWNGRADE_BUDGET = "downgrade_budget"

    # Refusals.
    ACCOUNT_JOBS = "account_jobs"
    """The account runs as many jobs as it may; found by `jobs`, before a tier is looked at."""
    DRAINING = "draining"
    """The daemon takes no more jobs; found by `jobs`."""
    TOO_MANY_JOBS = "too_many_jobs"
    """The daemon runs as many jobs as it may; found by `jobs`."""
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

    @property
    def is_refusal(self) -> bool:
        """Whether no tier serves the job."""
        routes = ("explicit", "auto_", "downgrade_", "cascade", "max_error_unmet")
        return not self.startswith(routes)


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """The operator's choices.

    AUTO is the deepest tier from a complexity hint of `complexity_threshold` on; without a hint,
    from `strategic_prompt_tokens` on.
    """

    complexity_threshold: float = 0.5
    strategic_prompt_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve a job: its price at most, and what it is expected to cost and to err.

    `expected_error` is the probability that the answer is wrong.
    """

    mode: Mode
    offer: Offer
    expected_uatp: int
    expected_error: float

    @property
    def tier(self) -> Tier:
        """The tier that may answer last."""
        return self.offer.tier


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """Everything a decision depends on.

    `loads` has every tier of the daemon, at least one; `offers` may lack one that cannot be fed
    the prompt. `budget` None asks for what holds whatever the account has: its refusal is final,
    its route may still be refused for money. `deadline_s` is what is left of the job's deadline;
    None: it has none. `cascade` is what one would ask for, where there can be one; `ways` is empty
    where no quality card tells what each is worth, and `max_error` what the job puts up with.
    """

    job: JobSpec
    offers: Mapping[Tier, Offer]
    loads: Mapping[Tier, TierLoad]
    budget: Budget | None
    policy: RoutingPolicy = field(default_factory=RoutingPolicy)
    deadline_s: float | None = None
    cascade: Offer | None = None
    ways: tuple[Way, ...] = ()
    max_error: float = 1.0


@dataclass(frozen=True, slots=True)
class _Blocked:
    """A tier that cannot take the job, and what its client is told of that."""

    tier: Tier
    kind: Obstacle
    refusal: Refusal


def route(request: RouteRequest) -> Route | Refusal:
    """Return the tier that serves the job, with the reason, or why none does."""
    job, blocked = request.job, list[_Blocked]()
    if job.mode is Mode.CASCADE and request.cascade is not None:
        return _route_cascade(request, request.cascade)
    if goes_by_return(job) and request.ways:
        return _route_by_return(request)
    preferred, reason = _preference(request)
    for tier in candidates(job, request.loads, preferred):
        if blocked and not _may_pass(job, blocked[-1], tier):
            break
        if (obstacle := _obstacle(request, tier, request.offers.get(tier))) is not None:
            blocked.append(obstacle)
        elif not blocked:
            return Route(tier, reason, job.requested)
        else:
            prefix = "auto" if job.requested is None else "downgrade"
            instead = Reason(f"{prefix}_{blocked[0].kind}")
            return Route(tier, instead, job.requested, downgraded=job.requested is not None)
    refusal = _most_useful(blocked)
    if job.requested is not None and not job.allow_downgrade:
        # A client that would not take less is told when less is to be had.
        less = route(replace(request, job=replace(job, allow_downgrade=True)))
        if isinstance(less, Route):
            return _with_way_out(refusal, less.tier, "would")
    return refusal


def goes_by_return(job: JobSpec) -> bool:
    """Whether the daemon weighs cost against error: it chooses, and no hint tells it how."""
    return job.requested is None and (job.complexity is None or job.max_error is not None)


def by_preference(ways: Collection[Way], max_error: float) -> list[Way]:
    """Return the ways, best first: those that meet `max_error` by cost, then the others by error.

    The order knows no budget, so that more of it opens ways and never changes their order.
    """
    return sorted(
        ways,
        key=lambda way: (
            (0, way.expected_uatp, way.expected_error, way.tier)
            if way.expected_error <= max_error
            else (1, way.expected_error, way.expected_uatp, way.tier)
        ),
    )


def _route_by_return(request: RouteRequest) -> Route | Refusal:
    blocked = list[_Blocked]()
    for way in by_preference(request.ways, request.max_error):
        if (obstacle := _obstacle(request, way.tier, way.offer)) is not None:
            blocked.append(obstacle)
            continue
        met = way.expected_error <= request.max_error
        reason = Reason.AUTO_RETURN if met else Reason.MAX_ERROR_UNMET
        return Route(way.tier, reason, None, mode=way.mode)
    return _most_useful(blocked)


def _route_cascade(request: RouteRequest, offer: Offer) -> Route | Refusal:
    """Route a job that asks for a cascade; its deepest tier alone answers no worse."""
    requested = request.job.requested
    blocked = _obstacle(request, offer.tier, offer)
    if blocked is None:
        return Route(offer.tier, Reason.CASCADE, requested, mode=Mode.CASCADE)
    job = replace(request.job, requested=offer.tier, mode=None)
    alone = route(replace(request, job=job, cascade=None))
    if isinstance(alone, Refusal):
        return alone
    if alone.tier == offer.tier:
        return replace(alone, reason=Reason(f"cascade_{blocked.kind}"), requested=requested)
    return replace(alone, requested=requested)


def refuse_unread(
    job: JobSpec,
    loads: Mapping[Tier, TierLoad],
    needs: Callable[[Tier], Collection[Tier]] = lambda tier: (tier,),
) -> Refusal | None:
    """Return the refusal of a job that no tier takes now, whatever its size; None: one may.

    It costs next to nothing: under overload most jobs are refused, and reading their prompts
    would take the time of those that are not.

    Args:
        job: what is asked for.
        loads: of every tier.
        needs: says on which tiers a job has stages that this one serves.
    """
    blocked = list[_Blocked]()
    for tier in candidates(job, loads):
        if (obstacle := _shut(tier, needs(tier), loads)) is None:
            return None
        blocked.append(obstacle)
    refusal = _most_useful(blocked)
    if job.requested is not None and not job.allow_downgrade:
        for tier in candidates(replace(job, allow_downgrade=True), loads)[1:]:
            if _shut(tier, needs(tier), loads) is None:
                return _with_way_out(refusal, tier, "may")
    return refusal


def candidates(
    job: JobSpec, tiers: Collection[Tier], preferred: Tier | None = None
) -> tuple[Tier, ...]:
    """Return the tiers that may serve the job, in the order in which they are tried.

    First comes the one that it names, or `preferred` (None: the deepest) where the daemon chooses;
    then what is lower, the deepest first; where the daemon chooses then what is deeper.
    """
    first = job.requested or preferred or max(tiers)
    if job.requested is not None and not job.allow_downgrade:
        return (first,)
    lower = sorted((tier for tier in tiers if tier < first), reverse=True)
    deeper = sorted(tier for tier in tiers if tier > first) if job.requested is None else ()
    return (first, *lower, *deeper)


def possible_decisions(
    tiers: Collection[Tier],
) -> Iterator[tuple[Tier | None, Tier | None, Reason]]:
    """Return every (requested, chosen, reason) there can be: the bound of a metric's labels.

    A chosen tier of None is a refusal.
    """
    lowest, deepest = min(tiers), max(tiers)
    yield None, lowest, Reason.AUTO_SIMPLE
    if deepest > lowest:
        yield None, deepest, Reason.AUTO_COMPLEX
        yield None, deepest, Reason.AUTO_LARGE
        yield from _decisions_of_two(lowest, deepest)
    for tier in tiers:
        yield tier, tier, Reason.EXPLICIT
        for kind in Obstacle:
            if tier < deepest or (tier > lowest and not kind.about_money):
                yield None, tier, Reason(f"auto_{kind}")
            if kind is not Obstacle.CONTEXT:
                for lower in tiers:
                    if lower < tier:
                        yield tier, lower, Reason(f"downgrade_{kind}")
    for requested in (None, *tiers):
        for reason in Reason:
            # What an account may run at once is counted with its calls.
            counted = reason.is_refusal and reason is not Reason.ACCOUNT_JOBS
            if counted and (requested, reason) != (lowest, Reason.BELOW_FLOOR):
                yield requested, None, reason


def _decisions_of_two(
    lowest: Tier, deepest: Tier
) -> Iterator[tuple[Tier | None, Tier | None, Reason]]:
    """Return those that weigh both tiers, or use both."""
    for tier in (lowest, deepest):
        yield None, tier, Reason.AUTO_RETURN
        yield None, tier, Reason.MAX_ERROR_UNMET
    for requested in (None, deepest):
        for reason in Reason:
            if reason.startswith("cascade"):
                yield requested, deepest, reason
    for kind in Obstacle:
        if kind is not Obstacle.CONTEXT:
            yield None, lowest, Reason(f"downgrade_{kind}")


def _preference(request: RouteRequest) -> tuple[Tier, Reason]:
    """Return the tier that is tried first: the one asked for, else by hint or size."""
    job, policy, tiers = request.job, request.policy, request.loads
    if job.requested is not None:
        return job.requested, Reason.EXPLICIT
    lowest, deepest = min(tiers), max(tiers)
    longest = max((offer.prompt_tokens for offer in request.offers.values()), default=0)
    if job.complexity is not None:
        deep, reason = job.complexity >= policy.complexity_threshold, Reason.AUTO_COMPLEX
    else:
        deep, reason = longest >= policy.strategic_prompt_tokens, Reason.AUTO_LARGE
    return (deepest, reason) if deep and deepest > lowest else (lowest, Reason.AUTO_SIMPLE)


def _may_pass(job: JobSpec, blocked: _Blocked, tier: Tier) -> bool:
    """Whether `tier` may be tried after one that is blocked."""
    if tier > blocked.tier:
        # Up only round an obstacle that money did not raise: with a larger budget the lower
        # tier would be free, and more budget must not yield the lower tier.
        return not blocked.kind.about_money
    # A job too long for the tier it names is malformed, whatever it allows.
    return blocked.tier != job.requested or blocked.kind is not Obstacle.CONTEXT


def _most_useful(blocked: Collection[_Blocked]) -> Refusal:
    """Return of several refusals the one to act on."""
    lowest = min(blocked, key=lambda obstacle: obstacle.tier)
    # Whatever else passes, a job that cannot pay the cheapest tier cannot pay a dearer one.
    if lowest.kind.about_money:
        return lowest.refusal
    waits = {
        obstacle.tier: math.inf if (wait_s := obstacle.refusal.retry_after_s) is None else wait_s
        for obstacle in blocked
    }
    return min(blocked, key=lambda obstacle: (waits[obstacle.tier], obstacle.tier)).refusal


def _with_way_out(refusal: Refusal, tier: Tier, would: str) -> Refusal:
    advice = f"with allow_downgrade the {tier.name} tier {would} serve it"
    return replace(refusal, message=f"{refusal.message}; {advice}")


def estimate_s(load: TierLoad, prompt_tokens: int, max_new_tokens: int) -> float | None:
    """Return the seconds of a worst case: the queued prompts, its own, every token; finite.

    None until the tier has been measured by traffic. The time that running jobs still keep
    their places is not foreseeable and left out, so this errs towards admitting.
    """
    start_s = _prefill_s(load, prompt_tokens)
    if start_s is None or load.decode_step_s is None:
        return None
    return min(start_s + max_new_tokens * load.decode_step_s, _LONGEST_S)


def needed_s(loads: Mapping[Tier, TierLoad], offer: Offer) -> float | None:
    """Return the seconds that all stages of a job take at most; None until all are measured."""
    parts = [
        estimate_s(loads[stage.tier], stage.prompt_tokens, stage.max_new_tokens)
        for stage in offer.stages
    ]
    known = [part for part in parts if part is not None]
    return min(sum(known), _LONGEST_S) if len(known) == len(parts) else None


def _shut(tier: Tier, needed: Collection[Tier], loads: Mapping[Tier, TierLoad]) -> _Blocked | None:
    """Return what keeps `tier` from taking any job at all now; None: it may take one.

    It needs all of the tiers that the job has stages on.
    """
    for of in needed:
        if (obstacle := _closed(of, loads.get(of))) is not None:
            return replace(obstacle, tier=tier)
    return None


def _closed(tier: Tier, load: TierLoad | None) -> _Blocked | None:
    if load is None:
        return _unavailable(tier, "not served here")
    if load.state is TierState.LOADING:
        text = f"the {tier.name} tier is loading its model; ask again soon"
        refusal = Refusal(Reason.TIER_LOADING, text, _UNAVAILABLE_RETRY_S)
        return _Blocked(tier, Obstacle.LOADING, refusal)
    if load.state is not TierState.READY:
        return _unavailable(tier, load.state.value)
    if load.waiting >= load.waiting_limit:
        text = QueueFull.of_tier(tier.name, load.waiting).message
        refusal = Refusal(Reason.QUEUE_FULL, text, load.retry_after_s or _QUEUE_RETRY_S)
        return _Blocked(tier, Obstacle.QUEUE, refusal)
    return None


def _unavailable(tier: Tier, state: str) -> _Blocked:
    text = f"the {tier.name} tier is {state} and takes no jobs; ask again later or another daemon"
    refusal = Refusal(Reason.TIER_UNAVAILABLE, text, _UNAVAILABLE_RETRY_S)
    return _Blocked(tier, Obstacle.UNAVAILABLE, refusal)


def _obstacle(request: RouteRequest, tier: Tier, offer: Offer | None) -> _Blocked | None:
    """Return the first thing that keeps `tier` from taking the job; None: nothing does."""
    loads = request.loads
    stages = offer.stages if offer else ()
    for stage in stages:
        load = loads.get(stage.tier)
        context = load.max_context_tokens if load else 0  # 0 until the model is loaded
        if 0 < context < stage.prompt_tokens + max(stage.max_new_tokens, 1):
            return _Blocked(tier, Obstacle.CONTEXT, _too_long(stage, context))
    needed = [stage.tier for stage in stages] or [tier]
    if (blocked := _shut(tier, needed, loads)) is not None:
        return blocked
    if offer is None:
        return _unavailable(tier, "not served here")
    # Not measured yet is no reason to refuse; a deadline that has passed is.
    most_s = needed_s(loads, offer) or 0.0
    deadline_s = request.deadline_s
    if deadline_s is not None and (deadline_s <= 0 or most_s > deadline_s):
        return _Blocked(tier, Obstacle.DEADLINE, _too_slow(offer, loads, most_s, deadline_s))
    return _obstacle_of_money(request, offer)


def _obstacle_of_money(request: RouteRequest, offer: Offer) -> _Blocked | None:
    tier, budget, most_uatp = offer.tier, request.budget, request.job.max_cost_uatp
    if budget and tier.rank > 0 and budget.balance_uatp <= budget.strategic_floor_uatp:
        return _Blocked(tier, Obstacle.FLOOR, _below_floor(offer, budget))
    if most_uatp is not None and offer.worst_case_uatp > most_uatp:
        return _Blocked(tier, Obstacle.MAX_COST, _above_max_cost(offer, most_uatp))
    if budget and offer.worst_case_uatp > budget.balance_uatp:
        return _Blocked(tier, Obstacle.BUDGET, _cannot_afford(offer, budget))
    return None


def _prefill_s(load: TierLoad, prompt_tokens: int) -> float | None:
    if not load.prefill_tokens_per_s:
        return None
    return (load.queued_prompt_tokens + prompt_tokens) / load.prefill_tokens_per_s


def _fitting_tokens(loads: Mapping[Tier, TierLoad], offer: Offer, deadline_s: float) -> int:
    """Return how many new tokens of every stage would meet the deadline; 0 where none do."""
    start_s = step_s = 0.0
    for stage in offer.stages:
        load = loads[stage.tier]
        prefill_s = _prefill_s(load, stage.prompt_tokens)
        if prefill_s is None or not load.decode_step_s:
            return 0
        start_s, step_s = start_s + prefill_s, step_s + load.decode_step_s
    if start_s >= deadline_s:
        return 0
    # Bounded before it is rounded: over a step time next to zero the quotient is infinite.
    return int(min((deadline_s - start_s) / step_s, offer.max_new_tokens))


def refusal_error(refusal: Refusal, account: str) -> SageFedError:
    """Return the error that tells `account` of this refusal."""
    text, retry_s = refusal.message, refusal.retry_after_s
    match Reason(refusal.reason):
        case Reason.PROMPT_TOO_LONG:
            return InvalidField("job.prompt", text)
        case Reason.OUTPUT_TOO_LONG:
            return InvalidField("job.sampling.max_new_tokens", text)
        case Reason.TIER_LOADING | Reason.TIER_UNAVAILABLE | Reason.DRAINING:
            return TierUnavailable(text, retry_s)
        case Reason.QUEUE_FULL | Reason.TOO_MANY_JOBS:
            return QueueFull(text, retry_s)
        case Reason.DEADLINE_INFEASIBLE:
            return DeadlineInfeasible(text, estimate_s=refusal.estimate_s or 0.0)
        case Reason.BELOW_FLOOR | Reason.ABOVE_MAX_COST | Reason.CANNOT_AFFORD as reason:
            return CannotAfford(text, account=account, detail=reason, retry_after_s=retry_s)
        case Reason.ACCOUNT_JOBS:
            limit, allowed = "concurrent_jobs", refusal.allowed_jobs
            return RateLimited(
                text, account=account, limit=limit, allowed=allowed, retry_after_s=retry_s
            )
        case other:
            raise AssertionError(f"{other} is no refusal")


def _too_long(offer: Offer, max_context_tokens: int) -> Refusal:
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


def _too_slow(
    offer: Offer, loads: Mapping[Tier, TierLoad], most_s: float, deadline_s: float
) -> Refusal:
    fitting_tokens = _fitting_tokens(loads, offer, deadline_s)
    advice = f"ask for at most {fitting_tokens:,} new tokens or " if fitting_tokens > 0 else ""
    return Refusal(
        Reason.DEADLINE_INFEASIBLE,
        f"{offer.max_new_tokens:,} new tokens would take about {most_s:.2f} s on the "
        f"{offer.tier.name} tier and {max(deadline_s, 0.0):.2f} s are left; {advice}"
        "give it a later deadline",
        estimate_s=most_s,
    )


def _below_floor(offer: Offer, budget: Budget) -> Refusal:
    floor = budget.strategic_floor_uatp
    retry_s = _refill_s(budget, max(floor + 1, offer.worst_case_uatp))
    return Refusal(
        Reason.BELOW_FLOOR,
        f"the balance of {_atp(budget.balance_uatp)} ATP is not above the account's strategic "
        f"floor of {_atp(floor)} ATP; {_wait(retry_s)}ask for the tactical tier",
        retry_s,
        denied_uatp=offer.worst_case_uatp,
    )


def _above_max_cost(offer: Offer, max_cost_uatp: int) -> Refusal:
    return Refusal(
        Reason.ABOVE_MAX_COST,
        f"the job may cost up to {_atp(offer.worst_case_uatp)} ATP on the {offer.tier.name} tier, "
        f"above its max_cost_uatp of {_atp(max_cost_uatp)} ATP; raise that"
        f"{_smaller(offer, max_cost_uatp)}",
        denied_uatp=offer.worst_case_uatp,
    )


def _cannot_afford(offer: Offer, budget: Budget) -> Refusal:
    retry_s = _refill_s(budget, offer.worst_case_uatp)
    capacity = (
        f"; the account never holds more than {_atp(budget.capacity_uatp)} ATP"
        if offer.worst_case_uatp > budget.capacity_uatp
        else ""
    )
    return Refusal(
        Reason.CANNOT_AFFORD,
        f"the job may cost up to {_atp(offer.worst_case_uatp)} ATP on the {offer.tier.name} tier "
        f"and {_atp(budget.balance_uatp)} ATP are available{capacity}; "
        f"{_wait(retry_s)}have the budget raised{_smaller(offer, budget.balance_uatp)}",
        retry_s,
        denied_uatp=offer.worst_case_uatp,
    )


def _refill_s(budget: Budget, needed_uatp: int) -> float | None:
    short_uatp = needed_uatp - budget.balance_uatp
    if short_uatp <= 0:
        return 0.0
    if needed_uatp > budget.capacity_uatp or budget.refill_uatp_per_s <= 0:
        return None
    return short_uatp / budget.refill_uatp_per_s


def _atp(uatp: int) -> str:
    text = f"{Decimal(uatp) / UATP_PER_ATP:,.6f}"
    return text.rstrip("0").rstrip(".")


def _wait(retry_s: float | None) -> str:
    return "" if retry_s is None else f"wait {retry_s:.1f} s for the refill, or "


def _smaller(offer: Offer, amount_uatp: int) -> str:
    fitting = offer.tokens_within(amount_uatp)
    return f" or ask for at most {fitting:,} new tokens" if fitting else " or shorten the prompt"
