"""The decision for one job, and what it would cost either way."""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one job; `reason` is a stable code and a metric label."""

    tier: Tier
    reason: str
    requested: Tier | None
    downgraded: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A named "no"; `retry_after_s` None means that waiting does not help.

    `estimate_s` is how long the job would take, `denied_uatp` what it could cost, where that
    is the reason.
    """

    reason: str
    message: str
    retry_after_s: float | None = None
    estimate_s: float | None = None
    denied_uatp: int = 0


@dataclass(frozen=True, slots=True)
class RouteQuote:
    """One route's worst case; `estimated_s` None until the tier has been measured."""

    tier: Tier
    worst_case_uatp: int
    affordable: bool
    estimated_s: float | None


@dataclass(frozen=True, slots=True)
class Quote:
    """What a job would cost at most, per route, and which decision would be taken now."""

    decision: Route | Refusal
    tiers: tuple[RouteQuote, ...]
    rate_card: str
    prompt_tokens: int
    max_new_tokens: int
    balance_uatp: int
