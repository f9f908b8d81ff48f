"""The router: a table with every reason code, and what must hold for all inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sage_fed.core import (
    TIER_ROLES,
    Budget,
    JobSpec,
    Mode,
    Offer,
    Prompt,
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
    TierUnavailable,
)
from sage_fed.routing import (
    Reason,
    RouteRequest,
    RoutingPolicy,
    Way,
    estimate_s,
    possible_decisions,
    refusal_error,
    refuse_unread,
    route,
)

TACTICAL, STRATEGIC, DEEP = Tier.TACTICAL, Tier.STRATEGIC, Tier(2, "deep")
DAEMONS = [(TACTICAL,), TIER_ROLES, (*TIER_ROLES, DEEP)]
ATP = 1_000_000


def load(tier: Tier, **changes: object) -> TierLoad:
    """A measured tier with room: 1 ms a step (tactical) or 10 ms, 1000 prompt tokens a second."""
    ready = TierLoad(
        tier,
        TierState.READY,
        waiting_limit=8,
        max_context_tokens=4096,
        decode_step_s=0.001 if tier is TACTICAL else 0.010,
        prefill_tokens_per_s=1000.0,
    )
    return replace(ready, **changes)  # type: ignore[arg-type]


@dataclass
class Case:
    """One row: a rich account asks for 100 new tokens after 20, unless told otherwise."""

    requested: Tier | None = None
    job: dict[str, Any] = field(default_factory=dict)
    tactical: dict[str, Any] = field(default_factory=dict)
    strategic: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 20
    max_new_tokens: int = 100
    deadline_s: float | None = None
    errors: tuple[float, float, float] | None = None
    """Of the tactical tier, the strategic one and a cascade, which costs as the tactical tier does
    and a third of the strategic."""

    def request(self) -> RouteRequest:
        """The request of this row."""
        # Tactical costs 101 ATP at worst, strategic 670.
        sizes = (self.prompt_tokens, self.max_new_tokens)
        budget = Budget("alice", 1000 * ATP, 0, 0, 1000 * ATP, 10 * ATP, 50 * ATP)
        tactical = Offer(TACTICAL, *sizes, sizes[0] * ATP // 20, ATP)
        strategic = Offer(STRATEGIC, *sizes, sizes[0] * ATP // 2, 66 * ATP // 10)
        both = replace(strategic, earlier=(tactical,))
        tactical_uatp, strategic_uatp = tactical.worst_case_uatp, strategic.worst_case_uatp
        ways: tuple[Way, ...] = ()
        if self.errors is not None:
            first, second, third = self.errors
            ways = (
                Way(Mode.SINGLE, tactical, tactical_uatp, first),
                Way(Mode.SPECULATIVE, strategic, strategic_uatp, second),
                Way(Mode.CASCADE, both, tactical_uatp + strategic_uatp // 3, third),
            )
        return RouteRequest(
            job=JobSpec("alice", Prompt(), requested=self.requested, **self.job),
            offers={TACTICAL: tactical, STRATEGIC: strategic},
            cascade=both,
            ways=ways,
            max_error=0.1,
            loads={
                TACTICAL: load(TACTICAL, **self.tactical),
                STRATEGIC: load(STRATEGIC, **self.strategic),
            },
            budget=replace(budget, **self.budget),
            policy=RoutingPolicy(complexity_threshold=0.5, strategic_prompt_tokens=1000),
            deadline_s=self.deadline_s,
        )


HARD = {"complexity": 0.9}
CASCADE = {"mode": Mode.CASCADE}
GOOD, WEAK, BAD = (0.05, 0.02, 0.03), (0.3, 0.02, 0.08), (0.4, 0.2, 0.25)
DOWN = {"allow_downgrade": True}
LOADING = {"state": TierState.LOADING, "max_context_tokens": 0}
FAILED = {"state": TierState.FAILED}
DRAINING = {"state": TierState.DRAINING}
FULL = {"waiting": 8}
SLOW = {"queued_prompt_tokens": 60_000}
POOR = {"balance_uatp": 200 * ATP}
BROKE = {"balance_uatp": 60 * ATP}
STUCK = BROKE | {"refill_uatp_per_s": 0}
LOW = {"balance_uatp": 50 * ATP, "capacity_uatp": 1000 * ATP}
CHEAP = {"max_cost_uatp": 150 * ATP}

ROUTES = [
    (Case(TACTICAL), TACTICAL, Reason.EXPLICIT),
    (Case(STRATEGIC), STRATEGIC, Reason.EXPLICIT),
    (Case(STRATEGIC, DOWN), STRATEGIC, Reason.EXPLICIT),
    (Case(TACTICAL, HARD), TACTICAL, Reason.EXPLICIT),
    (Case(), TACTICAL, Reason.AUTO_SIMPLE),
    (Case(job={"complexity": 0.49}), TACTICAL, Reason.AUTO_SIMPLE),
    (Case(job={"complexity": 0.1}, prompt_tokens=1500), TACTICAL, Reason.AUTO_SIMPLE),
    (Case(job={"complexity": 0.5}), STRATEGIC, Reason.AUTO_COMPLEX),
    (Case(prompt_tokens=1000, max_new_tokens=10), STRATEGIC, Reason.AUTO_LARGE),
    (Case(job=HARD, strategic={"max_context_tokens": 119}), TACTICAL, Reason.AUTO_CONTEXT),
    (Case(tactical={"max_context_tokens": 119}), STRATEGIC, Reason.AUTO_CONTEXT),
    (Case(tactical={"max_context_tokens": 120}), TACTICAL, Reason.AUTO_SIMPLE),
    (Case(job=HARD, strategic=LOADING), TACTICAL, Reason.AUTO_LOADING),
    (Case(job=HARD, strategic=FAILED), TACTICAL, Reason.AUTO_UNAVAILABLE),
    (Case(tactical=FAILED), STRATEGIC, Reason.AUTO_UNAVAILABLE),
    (Case(job=HARD, strategic=FULL), TACTICAL, Reason.AUTO_QUEUE),
    (Case(tactical=FULL), STRATEGIC, Reason.AUTO_QUEUE),
    (Case(job=HARD, deadline_s=0.5), TACTICAL, Reason.AUTO_DEADLINE),
    (Case(tactical=SLOW, deadline_s=5), STRATEGIC, Reason.AUTO_DEADLINE),
    (Case(job=HARD, budget=LOW, max_new_tokens=5), TACTICAL, Reason.AUTO_FLOOR),
    (Case(job=HARD | CHEAP), TACTICAL, Reason.AUTO_MAX_COST),
    (Case(job=HARD, budget=POOR), TACTICAL, Reason.AUTO_BUDGET),
    (Case(STRATEGIC, DOWN, strategic=LOADING), TACTICAL, Reason.DOWNGRADE_LOADING),
    (Case(STRATEGIC, DOWN, strategic=DRAINING), TACTICAL, Reason.DOWNGRADE_UNAVAILABLE),
    (Case(STRATEGIC, DOWN, strategic=FULL), TACTICAL, Reason.DOWNGRADE_QUEUE),
    (Case(STRATEGIC, DOWN, deadline_s=0.5), TACTICAL, Reason.DOWNGRADE_DEADLINE),
    (Case(STRATEGIC, DOWN, budget=LOW, max_new_tokens=5), TACTICAL, Reason.DOWNGRADE_FLOOR),
    (Case(STRATEGIC, DOWN | CHEAP), TACTICAL, Reason.DOWNGRADE_MAX_COST),
    (Case(STRATEGIC, DOWN, budget=POOR), TACTICAL, Reason.DOWNGRADE_BUDGET),
    # By what each way is worth.
    (Case(errors=GOOD), TACTICAL, Reason.AUTO_RETURN),
    (Case(errors=GOOD, tactical=FULL), STRATEGIC, Reason.AUTO_RETURN),
    (Case(errors=WEAK), STRATEGIC, Reason.AUTO_RETURN),
    (Case(errors=WEAK, tactical=FAILED), STRATEGIC, Reason.AUTO_RETURN),
    (Case(errors=WEAK, budget={"balance_uatp": 700 * ATP}), STRATEGIC, Reason.AUTO_RETURN),
    (Case(errors=WEAK, budget=POOR), TACTICAL, Reason.MAX_ERROR_UNMET),
    (Case(errors=BAD), STRATEGIC, Reason.MAX_ERROR_UNMET),
    (Case(errors=BAD, strategic=FAILED), TACTICAL, Reason.MAX_ERROR_UNMET),
    (Case(errors=WEAK, job=HARD), STRATEGIC, Reason.AUTO_COMPLEX),
    (Case(errors=GOOD, job=HARD | {"max_error": 0.1}), TACTICAL, Reason.AUTO_RETURN),
    # A cascade, and what stands in its way.
    (Case(job=CASCADE), STRATEGIC, Reason.CASCADE),
    (Case(STRATEGIC, CASCADE), STRATEGIC, Reason.CASCADE),
    (Case(job=CASCADE, tactical={"max_context_tokens": 119}), STRATEGIC, Reason.CASCADE_CONTEXT),
    (Case(job=CASCADE, tactical=LOADING), STRATEGIC, Reason.CASCADE_LOADING),
    (Case(job=CASCADE, tactical=FAILED), STRATEGIC, Reason.CASCADE_UNAVAILABLE),
    (Case(job=CASCADE, tactical=FULL), STRATEGIC, Reason.CASCADE_QUEUE),
    (Case(job=CASCADE, tactical=SLOW, deadline_s=5), STRATEGIC, Reason.CASCADE_DEADLINE),
    (Case(job=CASCADE | {"max_cost_uatp": 700 * ATP}), STRATEGIC, Reason.CASCADE_MAX_COST),
    (Case(job=CASCADE, budget={"balance_uatp": 700 * ATP}), STRATEGIC, Reason.CASCADE_BUDGET),
    (Case(job=CASCADE | DOWN, strategic=FAILED), TACTICAL, Reason.DOWNGRADE_UNAVAILABLE),
    # To the last uATP.
    (Case(STRATEGIC, budget={"balance_uatp": 670 * ATP}), STRATEGIC, "explicit"),
    (Case(STRATEGIC, {"max_cost_uatp": 670 * ATP}), STRATEGIC, "explicit"),
    (
        Case(STRATEGIC, budget={"balance_uatp": 50 * ATP + 1}, max_new_tokens=5),
        STRATEGIC,
        "explicit",
    ),
    # An unmeasured tier is not refused for a deadline that it may miss.
    (Case(STRATEGIC, strategic={"decode_step_s": None}, deadline_s=0.1), STRATEGIC, "explicit"),
]

REFUSALS = [
    (Case(STRATEGIC, prompt_tokens=4096), Reason.PROMPT_TOO_LONG, "at most 4,095"),
    (Case(STRATEGIC, DOWN, prompt_tokens=4096), Reason.PROMPT_TOO_LONG, "the strategic tier"),
    (Case(STRATEGIC, prompt_tokens=4000), Reason.OUTPUT_TOO_LONG, "ask for at most 96"),
    (Case(prompt_tokens=5000), Reason.PROMPT_TOO_LONG, "5,000 tokens"),
    (Case(STRATEGIC, strategic=LOADING), Reason.TIER_LOADING, "allow_downgrade the tactical"),
    (Case(TACTICAL, tactical=LOADING), Reason.TIER_LOADING, "loading its model"),
    (Case(TACTICAL, DOWN, tactical=FAILED), Reason.TIER_UNAVAILABLE, "tier is failed"),
    (Case(tactical=DRAINING, strategic=DRAINING), Reason.TIER_UNAVAILABLE, "is draining"),
    (
        Case(TACTICAL, tactical=FULL),
        Reason.QUEUE_FULL,
        "8 jobs wait for the tactical tier, which is its limit; ask again soon",
    ),
    (Case(STRATEGIC, deadline_s=0.52), Reason.DEADLINE_INFEASIBLE, "at most 50 new tokens"),
    (Case(STRATEGIC, deadline_s=0.001), Reason.DEADLINE_INFEASIBLE, "give it a later deadline"),
    (
        Case(TACTICAL, tactical={"decode_step_s": None}, deadline_s=0.0),
        Reason.DEADLINE_INFEASIBLE,
        "0.00 s are left",
    ),
    (Case(TACTICAL, deadline_s=0.0), Reason.DEADLINE_INFEASIBLE, "0.00 s are left"),
    (Case(STRATEGIC, budget=LOW, max_new_tokens=5), Reason.BELOW_FLOOR, "floor of 50 ATP"),
    (Case(STRATEGIC, CHEAP), Reason.ABOVE_MAX_COST, "at most 21 new tokens"),
    (Case(TACTICAL, {"max_cost_uatp": 0}), Reason.ABOVE_MAX_COST, "shorten the prompt"),
    (Case(STRATEGIC, budget=POOR), Reason.CANNOT_AFFORD, "670 ATP on the strategic tier and 200"),
    (Case(STRATEGIC, DOWN, budget=BROKE), Reason.CANNOT_AFFORD, "101 ATP on the tactical tier"),
    (Case(TACTICAL, budget=BROKE), Reason.CANNOT_AFFORD, "at most 59 new tokens"),
    (Case(budget=BROKE), Reason.CANNOT_AFFORD, "wait 4.1 s for the refill"),
    (
        Case(STRATEGIC, budget={"balance_uatp": 670 * ATP - 1}),
        Reason.CANNOT_AFFORD,
        "670 ATP on the strategic tier and 669.999999 ATP are available",
    ),
    (Case(STRATEGIC, {"max_cost_uatp": 670 * ATP - 1}), Reason.ABOVE_MAX_COST, "raise that"),
    # Money is not a way up, and a loading strategic tier does not hide an empty purse.
    (Case(job=HARD, strategic=LOADING, budget=STUCK), Reason.CANNOT_AFFORD, "tactical tier"),
    (Case(job=CASCADE, strategic=FAILED), Reason.TIER_UNAVAILABLE, "the strategic tier is failed"),
    (Case(errors=WEAK, budget=BROKE), Reason.CANNOT_AFFORD, "tactical tier"),
    (Case(job=HARD, strategic=LOADING, tactical=FULL), Reason.QUEUE_FULL, "tactical tier"),
    (Case(tactical=FULL, budget=POOR), Reason.QUEUE_FULL, "tactical tier"),
]


@pytest.mark.parametrize(("case", "tier", "reason"), ROUTES)
def test_a_job_takes_the_route_of_the_table(case: Case, tier: Tier, reason: str) -> None:
    """Each row's circumstances give its tier and reason code, and say if it is a downgrade."""
    taken = route(case.request())
    assert isinstance(taken, Route)
    assert (tier, reason, case.requested) == (taken.tier, taken.reason, taken.requested)
    assert reason.startswith("downgrade") == taken.downgraded


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (Case(errors=GOOD), Mode.SINGLE),
        (Case(errors=WEAK), Mode.CASCADE),
        (Case(errors=WEAK, tactical=FAILED), Mode.SPECULATIVE),
        (Case(errors=WEAK, budget={"balance_uatp": 700 * ATP}), Mode.SPECULATIVE),
        (Case(errors=BAD), Mode.SPECULATIVE),
        (Case(job=CASCADE), Mode.CASCADE),
        (Case(job=CASCADE, tactical=FULL), Mode.SINGLE),
    ],
)
def test_a_route_says_how_the_job_is_served(case: Case, mode: Mode) -> None:
    """Both tiers for a cascade, the strategic one with drafts where that is the way taken."""
    taken = route(case.request())
    assert isinstance(taken, Route)
    assert mode is taken.mode


@pytest.mark.parametrize(("case", "reason", "advice"), REFUSALS)
def test_a_refusal_says_what_to_do(case: Case, reason: Reason, advice: str) -> None:
    """Each row's circumstances give its refusal code, with the numbers to act on."""
    refusal = route(case.request())

    assert isinstance(refusal, Refusal)
    assert reason == refusal.reason
    assert advice in refusal.message


def test_the_tables_have_every_reason_code() -> None:
    """A code without a row would be untested, or unreachable."""
    rows = {Reason(reason) for _, _, reason in ROUTES} | {reason for _, reason, _ in REFUSALS}
    # What `jobs` finds before it asks the router (`test_broker.py`).
    before = {Reason.ACCOUNT_JOBS, Reason.DRAINING, Reason.TOO_MANY_JOBS}

    assert set(Reason) == rows | before


def test_a_cheaper_strategic_tier_is_no_way_round_an_empty_purse() -> None:
    """Else a larger balance, which frees the tactical tier, would yield the lower one."""
    request = Case(budget=BROKE).request()
    bargain = replace(request.offers[STRATEGIC], prompt_uatp=0, decode_uatp=1)

    refusal = route(replace(request, offers={**request.offers, STRATEGIC: bargain}))

    assert Reason.CANNOT_AFFORD == refusal.reason


@pytest.mark.parametrize(
    ("budget", "max_new_tokens", "retry_after_s"),
    [
        ({"balance_uatp": 1 * ATP}, 100, 10.0),
        ({"balance_uatp": 1 * ATP, "refill_uatp_per_s": 1}, 100, 100.0 * ATP),
        ({"balance_uatp": 1 * ATP, "refill_uatp_per_s": 0}, 100, None),
        ({"balance_uatp": 1 * ATP, "capacity_uatp": 101 * ATP - 1}, 100, None),
        ({"balance_uatp": 1 * ATP, "capacity_uatp": 101 * ATP}, 100, 10.0),
    ],
)
def test_a_budget_refusal_says_when_the_refill_covers_it(
    budget: dict[str, int], max_new_tokens: int, retry_after_s: float | None
) -> None:
    """The delay is the shortfall over the refill, and none where the capacity never suffices."""
    refusal = route(Case(TACTICAL, budget=budget, max_new_tokens=max_new_tokens).request())

    assert isinstance(refusal, Refusal)
    assert retry_after_s == refusal.retry_after_s


def test_a_deadline_refusal_says_how_long_it_would_take() -> None:
    """The estimate is the one that was compared: 20 prompt tokens and 100 of 10 ms."""
    refusal = route(Case(STRATEGIC, deadline_s=0.5).request())

    assert isinstance(refusal, Refusal)
    assert 1.02 == refusal.estimate_s
    assert 1.02 == refusal_error(refusal, "alice").estimate_s


def test_a_floor_refusal_waits_until_the_balance_is_above_the_floor() -> None:
    """Covering the job is not enough: the balance has to leave the floor as well."""
    refusal = route(Case(STRATEGIC, budget=LOW, max_new_tokens=1).request())

    assert isinstance(refusal, Refusal)
    assert 1 / (10 * ATP) == refusal.retry_after_s


@pytest.mark.parametrize(
    ("case", "denied_uatp"),
    [
        (Case(STRATEGIC, CHEAP), 670 * ATP),
        (Case(STRATEGIC, budget=POOR), 670 * ATP),
        (Case(STRATEGIC, budget=LOW), 670 * ATP),
        (Case(STRATEGIC, strategic=FULL), 0),
    ],
)
def test_a_refusal_for_money_carries_the_amount(case: Case, denied_uatp: int) -> None:
    """What was denied is the worst case of the tier that was refused."""
    refusal = route(case.request())

    assert isinstance(refusal, Refusal)
    assert denied_uatp == refusal.denied_uatp


@pytest.mark.parametrize(
    ("reason", "error", "field"),
    [
        (Reason.PROMPT_TOO_LONG, InvalidField, {"field": "job.prompt"}),
        (Reason.OUTPUT_TOO_LONG, InvalidField, {"field": "job.sampling.max_new_tokens"}),
        (Reason.TIER_LOADING, TierUnavailable, {"retry_after_s": 3.0}),
        (Reason.TIER_UNAVAILABLE, TierUnavailable, {"retry_after_s": 3.0}),
        (Reason.QUEUE_FULL, QueueFull, {"retry_after_s": 3.0}),
        (Reason.TOO_MANY_JOBS, QueueFull, {"retry_after_s": 3.0}),
        (Reason.DRAINING, TierUnavailable, {"retry_after_s": 3.0}),
        (Reason.ACCOUNT_JOBS, RateLimited, {"limit": "concurrent_jobs", "allowed": 5}),
        (Reason.DEADLINE_INFEASIBLE, DeadlineInfeasible, {"estimate_s": 7.0}),
        (Reason.BELOW_FLOOR, CannotAfford, {"account": "alice", "detail": "below_floor"}),
        (Reason.ABOVE_MAX_COST, CannotAfford, {"account": "alice", "retry_after_s": 3.0}),
        (Reason.CANNOT_AFFORD, CannotAfford, {"account": "alice", "retry_after_s": 3.0}),
    ],
)
def test_a_refusal_becomes_its_error(
    reason: Reason, error: type[Exception], field: dict[str, object]
) -> None:
    """The error class decides the status; delay, estimate and account travel along."""
    raised = refusal_error(Refusal(reason, "why", 3.0, 7.0, allowed_jobs=5), "alice")

    assert error is type(raised)
    assert "why" in str(raised)
    assert field == {name: getattr(raised, name) for name in field}


def test_the_estimate_adds_queue_prompt_and_tokens() -> None:
    """2000 queued and 500 own prompt tokens at 1000 a second, then 100 steps of 10 ms."""
    busy = load(STRATEGIC, queued_prompt_tokens=2000)

    assert 3.5 == estimate_s(busy, 500, 100)
    assert estimate_s(replace(busy, decode_step_s=None), 500, 100) is None
    assert estimate_s(replace(busy, prefill_tokens_per_s=None), 500, 100) is None
    assert estimate_s(replace(busy, prefill_tokens_per_s=0.0), 500, 100) is None


@pytest.mark.parametrize(
    "rates", [{"prefill_tokens_per_s": 5e-324}, {"decode_step_s": 1e308, "queued_prompt_tokens": 0}]
)
def test_an_estimate_is_finite(rates: dict[str, Any]) -> None:
    """JSON has no infinity, and a protobuf duration neither: the longest is thirty years."""
    assert 1e9 == estimate_s(load(STRATEGIC, **rates), 500, 100)


@pytest.mark.parametrize(
    ("tactical", "offer", "deadline_s", "reason", "text"),
    [
        ({"max_context_tokens": 60}, {}, None, Reason.OUTPUT_TOO_LONG, "tactical tier's context"),
        (FULL, {}, None, Reason.QUEUE_FULL, "wait for the tactical tier"),
        (LOADING, {}, None, Reason.TIER_LOADING, "the tactical tier is loading"),
        (SLOW, {}, 30.0, Reason.DEADLINE_INFEASIBLE, "about 61.14 s"),
        ({}, {"max_new_tokens": 1000}, None, Reason.CANNOT_AFFORD, "up to 1,671 ATP"),
        ({}, {}, None, None, ""),
    ],
)
def test_every_stage_of_a_program_has_to_fit(
    tactical: dict[str, Any],
    offer: dict[str, Any],
    deadline_s: float | None,
    reason: Reason | None,
    text: str,
) -> None:
    """Context, queue, state, time and price of an earlier stage count as the answer's do."""
    request = Case(STRATEGIC, tactical=tactical, deadline_s=deadline_s).request()
    first = replace(request.offers[TACTICAL], **offer)
    offers = {STRATEGIC: replace(request.offers[STRATEGIC], earlier=(first,))}
    decision = route(replace(request, offers=offers))

    if reason is None:
        assert Route(STRATEGIC, Reason.EXPLICIT, STRATEGIC) == decision
    else:
        assert isinstance(decision, Refusal)
        assert (reason, True) == (decision.reason, text in decision.message), decision.message


# What a search found once; each is tried every time.
NO_PREFILL = Case(TACTICAL, tactical={"prefill_tokens_per_s": 5e-324}, deadline_s=1.0)
NO_STEP = Case(
    TACTICAL,
    tactical={"prefill_tokens_per_s": 10.0, "decode_step_s": 5e-324},
    deadline_s=-1.0,
)
ENDLESS_STEP = Case(TACTICAL, tactical={"decode_step_s": 1e308}, deadline_s=1.0)


def of_tiers(
    request: RouteRequest, tiers: tuple[Tier, ...], deep: dict[str, Any] | None = None
) -> RouteRequest:
    """The request at a daemon of these tiers; `DEEP` costs five times what strategic does."""
    offer = replace(request.offers[STRATEGIC], tier=DEEP, decode_uatp=33 * ATP)
    offers = {**request.offers, DEEP: offer}
    loads = {**request.loads, DEEP: load(DEEP, **(deep or {}))}
    return replace(
        request,
        offers={tier: offers[tier] for tier in tiers},
        loads={tier: loads[tier] for tier in tiers},
        cascade=request.cascade if STRATEGIC in tiers else None,
        ways=tuple(way for way in request.ways if {of.tier for of in way.offer.stages} <= {*tiers}),
    )


def test_one_tier_serves_everything_or_nothing() -> None:
    """However hard a job is called; there is nothing to fall back on and nothing to suggest."""
    for job in ({}, HARD, DOWN, HARD | DOWN):
        for requested in (None, TACTICAL):
            reason = "auto_simple" if requested is None else "explicit"
            case = Case(requested, job)
            assert Route(TACTICAL, reason, requested) == route(
                of_tiers(case.request(), (TACTICAL,))
            )
            full = of_tiers(replace(case, tactical=FULL).request(), (TACTICAL,))
            refusal = route(full)
            assert Reason.QUEUE_FULL == refusal.reason
            assert refusal == refuse_unread(full.job, full.loads)
            assert "allow_downgrade" not in refusal.message
        elsewhere = route(of_tiers(Case(STRATEGIC, job).request(), (TACTICAL,)))
        assert (TACTICAL if "allow_downgrade" in job else None) == getattr(elsewhere, "tier", None)


@pytest.mark.parametrize(
    ("case", "tier", "reason"),
    [
        (Case(job=HARD, max_new_tokens=10), DEEP, Reason.AUTO_COMPLEX),
        (Case(job=HARD), STRATEGIC, Reason.AUTO_BUDGET),
        (Case(job=HARD, budget=POOR), TACTICAL, Reason.AUTO_BUDGET),
        (Case(tactical=FULL), STRATEGIC, Reason.AUTO_QUEUE),
        (Case(tactical=FULL, strategic=FULL, max_new_tokens=10), DEEP, Reason.AUTO_QUEUE),
        # Money is no way up, whichever tier is the dear one.
        (Case(tactical=FULL, budget=POOR), None, Reason.QUEUE_FULL),
        (Case(DEEP), None, Reason.CANNOT_AFFORD),
        (Case(DEEP, DOWN), STRATEGIC, Reason.DOWNGRADE_BUDGET),
        (Case(DEEP, DOWN, strategic=LOADING), TACTICAL, Reason.DOWNGRADE_BUDGET),
        (Case(DEEP, DOWN, budget=BROKE), None, Reason.CANNOT_AFFORD),
        (Case(STRATEGIC, DOWN, strategic=FULL), TACTICAL, Reason.DOWNGRADE_QUEUE),
        (Case(STRATEGIC), STRATEGIC, Reason.EXPLICIT),
    ],
)
def test_of_three_tiers_the_next_that_can_serve_does(
    case: Case, tier: Tier | None, reason: Reason
) -> None:
    """Downwards the deepest that is affordable; upwards the lowest that is free."""
    decision = route(of_tiers(case.request(), DAEMONS[-1]))
    assert (tier, reason) == (getattr(decision, "tier", None), decision.reason)


def test_the_way_out_is_the_deepest_tier_that_would_serve() -> None:
    """A refusal names it, whether or not the prompt was read."""
    request = of_tiers(Case(DEEP).request(), DAEMONS[-1], FULL)
    for refusal, would in (
        (route(request), "would"),
        (refuse_unread(request.job, request.loads), "may"),
    ):
        assert isinstance(refusal, Refusal)
        assert f"allow_downgrade the strategic tier {would} serve it" in refusal.message


@pytest.mark.parametrize("case", [Case(budget=BROKE), Case(STRATEGIC, budget=LOW)])
def test_without_a_budget_only_what_no_balance_changes_is_refused(case: Case) -> None:
    """Neither the balance nor the floor; what the job may cost still counts."""
    request = replace(case.request(), budget=None)
    assert isinstance(route(request), Route)
    limited = replace(request, job=replace(request.job, max_cost_uatp=1))
    assert Reason.ABOVE_MAX_COST == route(limited).reason


# What holds for all inputs

AMOUNTS = st.integers(0, 2000 * ATP)
COUNTS = st.integers(0, 5000)


@st.composite
def loads(draw: st.DrawFn, tier: Tier) -> TierLoad:
    return TierLoad(
        tier,
        draw(st.sampled_from(TierState)),
        waiting=draw(st.integers(0, 3)),
        waiting_limit=draw(st.integers(0, 3)),
        max_context_tokens=draw(st.sampled_from([0, 512, 4096, 10_000])),
        queued_prompt_tokens=draw(COUNTS),
        decode_step_s=draw(st.none() | st.floats(0, 1)),
        prefill_tokens_per_s=draw(st.none() | st.floats(0, 1e5)),
    )


@st.composite
def offers(draw: st.DrawFn, tier: Tier) -> Offer:
    return Offer(tier, draw(COUNTS), draw(COUNTS), draw(AMOUNTS), draw(st.integers(1, 10 * ATP)))


@st.composite
def requests(draw: st.DrawFn) -> RouteRequest:
    """Anything at all, impossible prices and tiers that are not served included."""
    tiers = draw(st.sampled_from(DAEMONS))
    some = st.sets(st.sampled_from(tiers), min_size=1)
    return RouteRequest(
        job=JobSpec(
            "alice",
            Prompt(),
            requested=draw(st.none() | st.sampled_from(tiers)),
            allow_downgrade=draw(st.booleans()),
            max_cost_uatp=draw(st.none() | AMOUNTS),
            complexity=draw(st.none() | st.floats(0, 1)),
        ),
        offers={tier: draw(offers(tier)) for tier in draw(st.sets(st.sampled_from(tiers)))},
        loads={tier: draw(loads(tier)) for tier in draw(some)},
        budget=Budget(
            "alice", draw(AMOUNTS), draw(AMOUNTS), 0, draw(AMOUNTS), draw(AMOUNTS), draw(AMOUNTS)
        ),
        policy=RoutingPolicy(draw(st.floats(0, 1)), draw(COUNTS)),
        deadline_s=draw(st.none() | st.floats(-1, 3600)),
    )


@st.composite
def hopeful_requests(draw: st.DrawFn) -> RouteRequest:
    """Requests near the feasible: every tier is there, prices as a card has them."""
    tiers = draw(st.sampled_from(DAEMONS))
    case = Case(
        requested=draw(st.none() | st.sampled_from(tiers)),
        job={
            "allow_downgrade": draw(st.booleans()),
            "max_cost_uatp": draw(st.none() | AMOUNTS),
            "complexity": draw(st.none() | st.floats(0, 1)),
            "mode": draw(st.sampled_from([None, None, Mode.CASCADE])),
        },
        errors=draw(st.none() | st.tuples(*[st.floats(0, 1)] * 3)),
        tactical=draw(st.sampled_from([{}, {}, FULL, SLOW, LOADING])),
        strategic=draw(st.sampled_from([{}, {}, FULL, SLOW, LOADING, FAILED])),
        budget={"balance_uatp": draw(AMOUNTS), "strategic_floor_uatp": draw(AMOUNTS)},
        prompt_tokens=draw(st.integers(0, 1500)),
        max_new_tokens=draw(st.integers(1, 300)),
        deadline_s=draw(st.none() | st.floats(0, 5)),
    )
    return of_tiers(case.request(), tiers, draw(st.sampled_from([{}, {}, FULL, LOADING])))


ANY = requests() | hopeful_requests()


@example(NO_PREFILL.request())
@example(NO_STEP.request())
@example(ENDLESS_STEP.request())
@given(ANY)
def test_every_request_gets_one_of_the_possible_decisions(request: RouteRequest) -> None:
    """The function is total, and its label combinations are bounded."""
    decision = route(request)

    chosen = decision.tier if isinstance(decision, Route) else None
    assert (request.job.requested, chosen, Reason(decision.reason)) in labels(request)
    if isinstance(decision, Refusal):
        assert refusal_error(decision, "alice").message


@given(hopeful_requests(), AMOUNTS)
def test_more_budget_never_misses_the_error_that_less_has_met(
    request: RouteRequest, more_uatp: int
) -> None:
    """Nor does it take a route away, or make one a downgrade."""
    assert request.budget is not None
    richer = replace(request.budget, balance_uatp=request.budget.balance_uatp + more_uatp)
    before, after = route(request), route(replace(request, budget=richer))
    if isinstance(before, Route):
        assert isinstance(after, Route)
        assert after.downgraded <= before.downgraded
        if before.reason == Reason.AUTO_RETURN:
            assert Reason.AUTO_RETURN == after.reason


def labels(request: RouteRequest) -> set[tuple[Tier | None, Tier | None, Reason]]:
    """What may be decided where the request is made, or was made for."""
    asked = request.job.requested
    return set(possible_decisions(sorted({*request.loads, *((asked,) if asked else ())})))


def test_only_what_can_be_is_a_label() -> None:
    """Money is no way up, a prompt that is too long no reason to go down, nor a floor to refuse."""
    decisions = set(possible_decisions(TIER_ROLES))
    assert (None, STRATEGIC, Reason.AUTO_QUEUE) in decisions
    assert (None, TACTICAL, Reason.AUTO_BUDGET) in decisions
    assert (STRATEGIC, None, Reason.BELOW_FLOOR) in decisions
    never = {
        (None, STRATEGIC, Reason.AUTO_BUDGET),
        (None, STRATEGIC, Reason.AUTO_FLOOR),
        (None, STRATEGIC, Reason.AUTO_MAX_COST),
        (TACTICAL, None, Reason.BELOW_FLOOR),
        (TACTICAL, STRATEGIC, Reason.EXPLICIT),
        (TACTICAL, TACTICAL, Reason.DOWNGRADE_QUEUE),
    }
    assert set() == decisions & never
    seen = {(case.requested, tier, reason) for case, tier, reason in ROUTES} | {
        (case.requested, None, reason) for case, reason, _ in REFUSALS
    }
    assert set() == seen - decisions


@given(ANY)
def test_what_is_refused_unread_would_have_been_refused(request: RouteRequest) -> None:
    """A full house is seen before the prompt; whatever its size and price, nothing would serve."""
    refusal = refuse_unread(request.job, request.loads)

    if refusal is not None:
        assert isinstance(route(request), Refusal)
        assert refusal.retry_after_s is not None
        assert (request.job.requested, None, Reason(refusal.reason)) in labels(request)


@given(hopeful_requests(), st.data())
def test_a_tier_that_takes_nothing_is_seen_without_the_prompt(
    request: RouteRequest, data: st.DataObject
) -> None:
    """Who insists on it is refused unread, for the reason that the whole rules give."""
    tier = data.draw(st.sampled_from(sorted(request.loads)))
    job = replace(request.job, requested=tier, allow_downgrade=False)
    decision = route(replace(request, job=job))
    shut = {Reason.QUEUE_FULL, Reason.TIER_LOADING, Reason.TIER_UNAVAILABLE}

    if isinstance(decision, Refusal) and Reason(decision.reason) in shut:
        refusal = refuse_unread(job, request.loads)
        assert refusal is not None
        assert decision.reason == refusal.reason


def test_a_full_tier_says_when_it_expects_a_place() -> None:
    """Its own estimate where it has one, and a way out where the other tier may have room."""
    full = load(STRATEGIC, waiting=8, retry_after_s=7.5)
    job = JobSpec("alice", Prompt(), requested=STRATEGIC)
    refusal = refuse_unread(job, {TACTICAL: load(TACTICAL), STRATEGIC: full})

    assert refusal is not None
    assert (Reason.QUEUE_FULL, 7.5) == (refusal.reason, refusal.retry_after_s)
    assert "with allow_downgrade the tactical tier may serve it" in refusal.message


@given(ANY)
def test_a_route_never_exceeds_what_may_be_spent(request: RouteRequest) -> None:
    """The chosen tier's worst case is within balance and max_cost, and the floor is kept."""
    decision = route(request)
    if isinstance(decision, Route):
        cost_uatp = request.offers[decision.tier].worst_case_uatp
        limit_uatp = request.job.max_cost_uatp
        assert cost_uatp <= request.budget.balance_uatp
        assert limit_uatp is None or cost_uatp <= limit_uatp
        if decision.tier.rank > 0:
            assert request.budget.balance_uatp > request.budget.strategic_floor_uatp


@given(ANY, AMOUNTS, st.none() | AMOUNTS)
def test_more_budget_never_yields_a_lower_tier(
    request: RouteRequest, more_uatp: int, more_cost_uatp: int | None
) -> None:
    """With a larger balance or limit the same job is served by the same tier or a deeper one."""
    before = route(request)
    limit_uatp = request.job.max_cost_uatp
    if limit_uatp is not None:
        limit_uatp = None if more_cost_uatp is None else limit_uatp + more_cost_uatp
    after = route(
        replace(
            request,
            job=replace(request.job, max_cost_uatp=limit_uatp),
            budget=replace(request.budget, balance_uatp=request.budget.balance_uatp + more_uatp),
        )
    )
    if isinstance(before, Route):
        assert isinstance(after, Route)
        assert after.tier.rank >= before.tier.rank


@given(ANY)
def test_a_downgrade_is_allowed_and_said(request: RouteRequest) -> None:
    """Another tier than the one asked for serves only downwards, by leave, and marked."""
    decision = route(request)
    if isinstance(decision, Route):
        asked = request.job.requested
        assert asked == decision.requested
        assert decision.downgraded == (asked is not None and decision.tier is not asked)
        if decision.downgraded:
            assert request.job.allow_downgrade
            assert asked is not None
            assert decision.tier < asked


@given(hopeful_requests(), st.data())
def test_an_explicit_tier_is_honoured_where_it_can_serve(
    request: RouteRequest, data: st.DataObject
) -> None:
    """If the tier alone could take the job, it does, whatever else would be possible."""
    tier = data.draw(st.sampled_from(sorted(request.loads)))
    asked = replace(request, job=replace(request.job, requested=tier))
    alone = replace(asked, loads={tier: asked.loads[tier]}, offers={tier: asked.offers[tier]})
    if isinstance(route(alone), Route):
        assert Route(tier, "explicit", tier) == route(asked)


@given(hopeful_requests())
def test_auto_serves_whatever_tactical_could(request: RouteRequest) -> None:
    """Leaving the choice to the daemon is never worse than asking for the lowest tier."""
    auto = route(replace(request, job=replace(request.job, requested=None)))
    tactical = route(replace(request, job=replace(request.job, requested=TACTICAL)))
    if isinstance(tactical, Route):
        assert isinstance(auto, Route)
