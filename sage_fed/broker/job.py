"""One job's life after its plan: hold, run, deliver, settle; exactly one ending.

Owns the order in which money and work happen: the worst case is held before any device
work, and whatever happens after that, the hold is settled or voided by this task, never by
the RPC handler. Does not know protobuf, SQL or torch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from sage_fed.broker.endings import DROPS_OUTPUT, failure_of, stop_reason_of, timing_of
from sage_fed.broker.mailbox import JobStream
from sage_fed.broker.output import Output
from sage_fed.broker.plan import Draft, Plan, Planner
from sage_fed.broker.results import Result, payload_hash
from sage_fed.core import (
    Budget,
    Finished,
    JobSpec,
    Phase,
    Price,
    Refusal,
    Route,
    RunningJob,
    Started,
    StopReason,
    Tier,
    Usage,
)
from sage_fed.errors import Internal, SageFedError, TierUnavailable
from sage_fed.executor import Executor, TokenStream
from sage_fed.ledger import HoldReceipt, HoldRequest, Ledger, Replay
from sage_fed.metrics import Metrics
from sage_fed.pricing import charge
from sage_fed.router import refusal_error
from sage_fed.scheduler import Ended, SequenceSpec, TokenWeights
from sage_fed.steps import Drawn
from sage_fed.tracing import Tracing

_log = logging.getLogger(__name__)


class Job:
    """One request, from its arrival (`arrived_s`, monotonic) to its ending."""

    def __init__(
        self,
        *,
        job_id: str,
        seq_id: int,
        spec: JobSpec,
        arrived_s: float,
        planner: Planner,
        ledger: Ledger,
        executor: Executor,
        metrics: Metrics,
        hold_ttl_s: float,
        tracing: Tracing | None,
        on_left: Callable[[], None],
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.stream = JobStream(on_cancel=self._reader_left)
        self._on_left = on_left
        self._seq_id = seq_id
        self._arrived_s = arrived_s
        self._planner = planner
        self._ledger = ledger
        self._executor = executor
        self._metrics = metrics
        self._hold_ttl_s = hold_ttl_s
        self._tracing = tracing
        self._plan: Plan | None = None
        self._held_uatp = 0
        self._submitted = False
        self._stop_reason: StopReason | None = None
        self._output: Output | None = None
        self._wasted: Usage | None = None
        self._device_s = 0.0
        self._last_push_s = 0.0
        self._contended = False
        # What a slow bucket shows: the id that the ledger, the log and the client know, too.
        self._exemplar = {"job_id": job_id}
        if spec.trace is not None:
            self._exemplar["trace_id"] = spec.trace.trace_id

    def stop(self, reason: StopReason) -> None:
        """Ask the job to end at the next step; the first reason counts."""
        if self._stop_reason is not None or self.stream.ended:
            return
        self._stop_reason = reason
        if self._submitted:
            self._executor.cancel(self._seq_id)

    def _reader_left(self) -> None:
        self._on_left()
        self.stop(StopReason.CANCELLED)

    def describe(self, now: float) -> RunningJob | None:
        """Return what an operator sees of it; None until it holds something."""
        if self._plan is None or not self._held_uatp:
            return None
        return RunningJob(
            job_id=self.job_id,
            account=self.spec.account,
            tier=self._plan.route.tier,
            priority=self.spec.priority,
            age_s=now - self._arrived_s,
            prompt_tokens=len(self._plan.prompt),
            output_tokens=self._output.num_tokens if self._output else 0,
            held_uatp=self._held_uatp,
        )

    async def run(self) -> None:
        """Plan, hold, run and settle; ends the stream. Raises nothing but its own cancellation."""
        try:
            await self._run()
        except SageFedError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(TierUnavailable("the daemon is stopping; ask another one"))
            raise
        except Exception as error:  # noqa: BLE001 - the job's last line of defence: it must end
            self._fail(self._internal(error))

    async def _run(self) -> None:
        draft = await self._planner.draft(self.spec, self._arrived_s)
        held, route = await self._hold(draft)
        if isinstance(held, Replay):
            await self._replay(held)
            return
        assert route is not None
        self._held_uatp = held.held_uatp
        self._metrics.held(route.tier, held.held_uatp)
        try:
            plan = self._plan = self._planner.plan(draft, route)
            ended = await self._work(plan)
        except BaseException:
            # The device may be well and the bug ours: nobody reads what it would go on making.
            self._executor.cancel(self._seq_id)
            # Also when this task is cancelled: an open hold would only end by expiry.
            await asyncio.shield(self._void(route.tier, "failed"))
            raise
        await self._settle(plan, ended)

    async def _hold(self, draft: Draft) -> tuple[HoldReceipt | Replay, Route | None]:
        """Route and hold in one operation of the ledger, at the balance of that instant.

        Nothing behind the ledger's answer can fail here: a hold that nobody knows of stays
        until it expires.
        """
        spec, loads = self.spec, self._planner.loads()
        # Only told apart from another request of the same id: without one there is none.
        payload = payload_hash(spec) if spec.client_request_id else b""
        decision: Route | Refusal | None = None
        decision_s = 0.0
        if not spec.client_request_id:  # which may have been answered before, place or no place
            began_s = time.perf_counter()
            refusal = self._planner.hopeless(draft, loads)
            if refusal is not None:
                elapsed_s = time.perf_counter() - began_s
                self._metrics.route_decided(spec.requested, refusal, elapsed_s)
                raise refusal_error(refusal, spec.account)

        def decide(budget: Budget) -> HoldRequest:
            nonlocal decision, decision_s
            began_s = time.perf_counter()
            decision = self._planner.decide(draft, budget, loads)
            decision_s = time.perf_counter() - began_s
            if isinstance(decision, Refusal):
                raise refusal_error(decision, spec.account)
            return HoldRequest(
                job_id=self.job_id,
                account=spec.account,
                amount_uatp=draft.offers[decision.tier].worst_case_uatp,
                rate_card=draft.card.version,
                tier=decision.tier.value,
                strategic=decision.tier is Tier.STRATEGIC,
                client_request_id=spec.client_request_id,
                payload_hash=payload,
                ttl_s=self._hold_ttl_s,
            )

        try:
            held = await self._ledger.decide_hold(
                spec.account, spec.client_request_id, payload, decide
            )
        finally:
            if decision is not None:
                self._metrics.route_decided(spec.requested, decision, decision_s)
        return held, decision if isinstance(decision, Route) else None

    async def _replay(self, earlier: Replay) -> None:
        """Answer with what an earlier request of the same id got; nothing is charged."""
        result = Result.from_bytes(earlier.result)
        budget = await self._ledger.budget(self.spec.account)
        self.stream.start(result.started)
        if result.output.token_ids or result.output.text:
            self.stream.push(result.output)
        self._metrics.replayed(result.started.route.tier)
        self.stream.end(replace(result.finished, balance_uatp=budget.balance_uatp))

    def _fail(self, error: SageFedError) -> None:
        self._log_ending(error.reason.lower())
        tier = self._plan.route.tier if self._plan else self.spec.requested
        total_s = time.monotonic() - self._arrived_s
        self._metrics.job_failed(tier, error, total_s, self._wasted, self._device_s)
        self._trace(error)
        self.stream.end(error)

    async def _work(self, plan: Plan) -> Ended | None:
        """Run the sequence and deliver its tokens; None where it never got to the executor."""
        if self._stop_reason is not None:
            return None
        source = self._executor.submit(
            SequenceSpec(
                seq_id=self._seq_id,
                tier=plan.route.tier,
                prompt=plan.prompt,
                max_new_tokens=plan.offer.max_new_tokens,
                sampling=plan.sampling,
                ignore_eos=self.spec.sampling.ignore_eos,
                priority=self.spec.priority,
                account=self.spec.account,
                weights=_weights(plan),
            )
        )
        self._submitted = True
        self._output = Output(plan.tokenizer.decoder(), self.spec.sampling.stop)
        self.stream.start(self._started(plan))
        timer = self._deadline()
        try:
            with self._metrics.at_work(plan.route.tier):
                ended = await self._deliver(source)
        finally:
            if timer is not None:
                timer.cancel()
        self._device_s = ended.device_s
        if (failure := failure_of(ended, plan.route.tier)) is not None:
            self._wasted = Usage(ended.prompt_tokens, ended.cached_tokens, ended.output_tokens)
            raise failure
        return ended

    def _deadline(self) -> asyncio.TimerHandle | None:
        """Have the job stopped at its deadline, if it has one."""
        deadline_s = self.spec.deadline_s
        if deadline_s is None:
            return None
        left_s = self._arrived_s + deadline_s - time.monotonic()
        loop = asyncio.get_running_loop()
        return loop.call_later(max(left_s, 0.0), self.stop, StopReason.DEADLINE)

    async def _deliver(self, source: TokenStream) -> Ended:
        """Pass on what the client may see, until the sequence has ended."""
        output = self._output
        assert output is not None

        def take(drawn: Sequence[Drawn]) -> None:
            if self._stop_reason in DROPS_OUTPUT:
                return
            delta, matched = output.push(drawn)
            self.stream.push(delta)
            self._note_gap(len(delta.token_ids))
            if matched:
                # Also where a deadline or an abort came first: the text is complete.
                self._stop_reason = StopReason.STOP_STRING
                self._executor.cancel(self._seq_id)

        ended = await source.deliver(take)
        if self._stop_reason not in DROPS_OUTPUT:
            delta, matched = output.finish()
            if matched:
                self._stop_reason = StopReason.STOP_STRING
            if delta.text:
                self.stream.push(delta)
        return ended

    def _note_gap(self, num_tokens: int) -> None:
        now, before = time.monotonic(), self._last_push_s
        assert self._plan is not None
        tier = self._plan.route.tier
        if before:
            self._metrics.tokens_delivered(tier, num_tokens, now - before, self._exemplar)
        else:
            self._contended = self._metrics.contended(tier)
        self._last_push_s = now

    async def _settle(self, plan: Plan, ended: Ended | None) -> None:
        """Charge what was done, release the rest, and write the ending."""
        output = self._output.whole() if self._output else None
        usage = Usage(
            prompt_tokens=ended.prompt_tokens if ended else 0,
            cached_tokens=ended.cached_tokens if ended else 0,
            output_tokens=output.output_tokens if output else 0,
        )
        charged_uatp = charge(plan.card, plan.route.tier, usage)
        finished = Finished(
            stop_reason=stop_reason_of(self._stop_reason, ended),
            usage=usage,
            timing=timing_of(ended, self._arrived_s, time.monotonic()),
            price=Price(charged_uatp, self._held_uatp, plan.card.version),
            # Known only once settled; a replay shows the balance of its own time anyway.
            balance_uatp=0,
        )
        if output is None or not charged_uatp:
            balance_uatp = await self._void(plan.route.tier, "nothing was done")
        else:
            stored = None
            if self.spec.client_request_id:
                stored = Result(self._started(plan), output, finished).to_bytes()
            # Until the books say otherwise: without a settlement it was done for nobody.
            self._wasted = usage
            settlement = await self._ledger.settle(
                self.job_id, charged_uatp, finished.stop_reason.value, stored
            )
            balance_uatp = settlement.balance_uatp
            self._metrics.balance_changed(self.spec.account, balance_uatp)
            self._metrics.settled(plan.route.tier, self._held_uatp, charged_uatp)
        self._metrics.job_finished(
            plan.route.tier, finished, contended=self._contended, exemplar=self._exemplar
        )
        self._log_ending(finished.stop_reason.value)
        self._trace(finished)
        if not self._submitted:
            self.stream.start(self._started(plan))
        self.stream.end(replace(finished, balance_uatp=balance_uatp))

    def _log_ending(self, how: str) -> None:
        """Say how it ended, under the id that its client and the ledger have; at debug only.

        A line a job would cost more than the job's own bookkeeping, and a flood of refusals would
        be a flood of lines.
        """
        if _log.isEnabledFor(logging.DEBUG):
            story = {"job_id": self.job_id, "account": self.spec.account, "ending": how}
            _log.debug("%s ended: %s", self.job_id, how, extra=story)

    def _internal(self, error: Exception) -> Internal:
        """Return what the client gets for a bug of ours; the log gets the rest."""
        error_id = secrets.token_hex(4)
        story = {"job_id": self.job_id, "error_id": error_id}
        _log.error("%s: internal error %s", self.job_id, error_id, exc_info=error, extra=story)
        return Internal(error_id)

    def _trace(self, ending: Finished | SageFedError) -> None:
        if self._tracing is not None:
            started = self._started(self._plan) if self._plan else None
            self._tracing.job_ended(self.spec, started, ending)

    async def _void(self, tier: Tier, why: str) -> int:
        release = await self._ledger.void(self.job_id, why)
        self._metrics.voided(tier, release.released_uatp)
        return release.balance_uatp

    def _started(self, plan: Plan) -> Started:
        return Started(
            job_id=self.job_id,
            route=plan.route,
            held_uatp=self._held_uatp,
            prompt_tokens=len(plan.prompt),
            seed=plan.sampling.seed,
            max_new_tokens=plan.offer.max_new_tokens,
        )


def _weights(plan: Plan) -> TokenWeights:
    """Return what the job's tokens count for between accounts: what they cost."""
    rates = plan.card.lines[plan.route.tier]
    return TokenWeights(
        rates[Phase.PREFILL].uatp, rates[Phase.CACHED].uatp, rates[Phase.DECODE].uatp
    )
