"""One job's money: its worst case is held, and that hold is settled or voided.

Owns what the books are asked on a job's behalf. Knows no tokens, no device and no reader.
Fails with what the router refuses and with what the ledger cannot do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sage_fed.core import Budget, Refusal, Route, StopReason, Tier
from sage_fed.jobs.plan import Draft, Planner
from sage_fed.jobs.results import hash_payload
from sage_fed.ledger import HoldRequest, Ledger, Replay
from sage_fed.metrics import Metrics, MoneyMetrics
from sage_fed.routing import refusal_error
from sage_fed.workers import Workers


@dataclass(frozen=True, slots=True)
class Hold:
    """`uatp` of an account, reserved for one job on its route; ends by `settle` or by `void`."""

    job_id: str
    account: str
    route: Route
    uatp: int
    ledger: Ledger
    metrics: MoneyMetrics

    async def settle(self, charged_uatp: int, reason: StopReason, result: bytes | None) -> int:
        """Charge what was done and release the rest; return the balance.

        Args:
            charged_uatp: at most what is held.
            reason: why the job stopped, for the books.
            result: what a repeated request of the same id is answered with, if it has one.
        """
        settlement = await self.ledger.settle(self.job_id, charged_uatp, reason.value, result)
        self.metrics.balance_changed(self.account, settlement.balance_uatp)
        self.metrics.settled(self.route.tier, self.uatp, charged_uatp)
        return settlement.balance_uatp

    async def void(self, why: str) -> int:
        """Release all of it; return the balance."""
        release = await self.ledger.void(self.job_id, why)
        self.metrics.voided(self.route.tier, release.released_uatp)
        return release.balance_uatp


async def take_hold(
    job_id: str,
    draft: Draft,
    *,
    planner: Planner,
    ledger: Ledger,
    metrics: Metrics,
    workers: Workers,
    ttl_s: float,
) -> Hold | Replay:
    """Route and hold in one operation of the ledger, at the balance of that instant.

    Nothing behind the ledger's answer can fail here: a hold that nobody knows of stays until it
    expires.
    """
    spec = draft.spec
    # Only told apart from another request of the same id: without one there is none.
    payload = await hash_payload(spec, workers) if spec.client_request_id else b""
    loads = planner.loads()
    decision: Route | Refusal | None = None
    decision_s = 0.0
    if not spec.client_request_id:  # which may have been answered before, place or no place
        began_s = time.perf_counter()
        refusal = planner.hopeless(draft, loads)
        if refusal is not None:
            metrics.jobs.route_decided(spec.requested, refusal, time.perf_counter() - began_s)
            raise refusal_error(refusal, spec.account)

    def decide(budget: Budget) -> HoldRequest:
        nonlocal decision, decision_s
        began_s = time.perf_counter()
        decision = planner.decide(draft, budget, loads)
        decision_s = time.perf_counter() - began_s
        if isinstance(decision, Refusal):
            raise refusal_error(decision, spec.account)
        planner.require_bounded(draft, decision.tier, ledger.max_result_bytes)
        return HoldRequest(
            job_id=job_id,
            account=spec.account,
            amount_uatp=draft.offers[decision.tier].worst_case_uatp,
            rate_card=draft.card.version,
            tier=decision.tier.name,
            strategic=decision.tier == Tier.STRATEGIC,
            client_request_id=spec.client_request_id,
            payload_hash=payload,
            ttl_s=ttl_s,
        )

    try:
        held = await ledger.decide_hold(spec.account, spec.client_request_id, payload, decide)
    finally:
        if decision is not None:
            metrics.jobs.route_decided(spec.requested, decision, decision_s)
    if isinstance(held, Replay):
        return held
    assert isinstance(decision, Route), "what is held was decided"
    metrics.money.held(decision.tier, held.held_uatp)
    return Hold(job_id, spec.account, decision, held.held_uatp, ledger, metrics.money)
