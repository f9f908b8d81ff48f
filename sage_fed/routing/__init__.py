"""Which tier serves a job, or which refusal."""

from sage_fed.routing.router import (
    Reason,
    RouteRequest,
    RoutingPolicy,
    candidates,
    estimate_s,
    possible_decisions,
    refusal_error,
    refuse_unread,
    route,
)

__all__ = [
    "Reason",
    "RouteRequest",
    "RoutingPolicy",
    "candidates",
    "estimate_s",
    "possible_decisions",
    "refusal_error",
    "refuse_unread",
    "route",
]
