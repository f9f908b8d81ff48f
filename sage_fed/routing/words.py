"""The router's vocabulary: what it is asked, and the stable codes of what it answers.

Codes are metric labels and part of the wire contract: add, never rename.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from sage_fed.core import Budget, JobSpec, Offer, Tier, TierLoad


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
