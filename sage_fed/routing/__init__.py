"""Which tier serves a job, or which refusal: a pure function of what is known now.

Owns the decision and its reason codes; `words` has the vocabulary, `obstacles` what stands in
the way of one tier, `decision` the rules. Knows neither clocks, ledgers, cards nor engines:
prices come as offers, rates and queues as loads. Never raises; `refusal_error` makes the
exception for callers that want one.
"""

from sage_fed.routing.decision import possible_decisions, refuse_unread, route
from sage_fed.routing.obstacles import estimate_s
from sage_fed.routing.refusals import refusal_error
from sage_fed.routing.words import Reason, RouteRequest, RoutingPolicy

__all__ = [
    "Reason",
    "RouteRequest",
    "RoutingPolicy",
    "estimate_s",
    "possible_decisions",
    "refusal_error",
    "refuse_unread",
    "route",
]
