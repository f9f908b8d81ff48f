"""One job's life: plan, hold, deliver, settle; exactly one ending.

Owns the order in which money and work happen: the worst case is held before any device work, and
whatever happens after that, the hold is settled or voided by this task, never by the RPC handler.
Writes the one ending, and tells the log, the metrics and the traces of it. Does not know protobuf,
SQL or torch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from sage_fed.cards import charge
from sage_fed.core import Finished, JobSpec, Price, RunningJob, Started, StopReason, Usage
from sage_fed.device import Ended, Executor
from sage_fed.errors import Internal, RateLimited, SageFedError, TierUnavailable
from sage_fed.jobs.delivery import Delivery
from sage_fed.jobs.endings import failure_of, stop_reason_of, timing_of
from sage_fed.jobs.hold import Hold, take_hold
from sage_fed.jobs.mailbox import JobStream, split
from sage_fed.jobs.pace import Pace
from sage_fed.jobs.plan import Plan, Planner
from sage_fed.jobs.results import Result, read_result, write_result
from sage_fed.ledger import Ledger, Replay
from sage_fed.metrics import Metrics
from sage_fed.tracing import Tracing
from sage_fed.workers import Workers

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
        workers: Workers,
        hold_ttl_s: float,
        tracing: Tracing | None,
        on_left: Callable[[], None],
        pace: Pace,
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.stream = JobStream(on_cancel=self._reader_left, pace=pace)
        self._on_left = on_left
        self._arrived_s = arrived_s
        self._planner = planner
        self._ledger = ledger
        self._metrics = metrics
        self._workers = workers
        self._hold_ttl_s = hold_ttl_s
        self._tracing = tracing
        self._started: Started | None = None
        self._wasted: Usage | None = None
        self._device_s = 0.0
        # What a slow bucket shows: the id that the ledger, the log and the client know, too.
        self._exemplar = {"job_id": job_id}
        if spec.trace is not None:
            self._exemplar["trace_id"] = spec.trace.trace_id
        self._delivery = Delivery(
            seq_id,
            spec,
            self.stream,
            arrived_s=arrived_s,
            executor=executor,
            metrics=metrics.jobs,
            exemplar=self._exemplar,
        )

    def stop(self, reason: StopReason) -> None:
        """Ask the job to end at the next step; the first reason counts."""
        self._delivery.stop(reason)

    def _reader_left(self) -> None:
        self._on_left()
        self.stop(StopReason.CANCELLED)

    def describe(self, now: float) -> RunningJob | None:
        """Return what an operator sees of it; None until it holds something."""
        if (started := self._started) is None:
            return None
        return RunningJob(
            job_id=self.job_id,
            account=self.spec.account,
            tier=started.route.tier,
            priority=self.spec.priority,
            age_s=now - self._arrived_s,
            prompt_tokens=started.prompt_tokens,
            output_tokens=self._delivery.num_tokens,
            held_uatp=started.held_uatp,
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
        finally:
            # There is nothing left to stop; and a job that its stream leads back to would be the
            # garbage collector's, which stops the loop the longer the more it has to look through.
            self.stream.on_cancel = self._on_left

    async def _run(self) -> None:
        draft = await self._planner.draft(self.spec, self._arrived_s)
        hold = await take_hold(
            self.job_id,
            draft,
            planner=self._planner,
            ledger=self._ledger,
            metrics=self._metrics,
            workers=self._workers,
            ttl_s=self._hold_ttl_s,
        )
        if isinstance(hold, Replay):
            await self._replay(hold)
            return
        try:
            plan = self._planner.plan(draft, hold.route)
            started = self._started = _started(plan, hold)
            ended = await self._work(plan, started)
        except BaseException:
            # Also when this task is cancelled: an open hold would only end by expiry.
            await asyncio.shield(hold.void("failed"))
            raise
        await self._settle(plan, hold, started, ended)

    async def _replay(self, earlier: Replay) -> None:
        """Answer with what an earlier request of the same id got; nothing is charged."""
        result = await read_result(earlier.result, self.spec.account, self._workers)
        budget = await self._ledger.budget(self.spec.account, refusable=False)
        self.stream.start(result.started)
        if result.output.token_ids or result.output.text:
            for part in split(result.output):
                self.stream.push(part)
        self._metrics.jobs.replayed(result.started.route.tier)
        self.stream.end(replace(result.finished, balance_uatp=budget.balance_uatp))

    def _fail(self, error: SageFedError) -> None:
        self._log_ending(error.reason.lower())
        tier = self._started.route.tier if self._started else self.spec.requested
        total_s = time.monotonic() - self._arrived_s
        if not isinstance(error, RateLimited):  # counted as a call that its account may not make
            self._metrics.jobs.failed(tier, error, total_s, self._wasted, self._device_s)
        self._trace(error)
        # Its frames lead back to the job: see `run`.
        self.stream.end(error.with_traceback(None))

    async def _work(self, plan: Plan, started: Started) -> Ended | None:
        """Have the tokens delivered; None where the sequence never got to the executor."""
        ended = await self._delivery.run(plan, started)
        if ended is None:
            return None
        self._device_s = ended.device_s
        if (failure := failure_of(ended, plan.route.tier)) is not None:
            self._wasted = Usage(ended.prompt_tokens, ended.cached_tokens, ended.output_tokens)
            raise failure
        return ended

    async def _settle(self, plan: Plan, hold: Hold, started: Started, ended: Ended | None) -> None:
        """Charge what was done, release the rest, and write the ending."""
        output = self._delivery.whole()
        usage = Usage(
            prompt_tokens=ended.prompt_tokens if ended else 0,
            cached_tokens=ended.cached_tokens if ended else 0,
            output_tokens=output.output_tokens if output else 0,
        )
        charged_uatp = charge(plan.card, plan.route.tier, usage)
        finished = Finished(
            stop_reason=stop_reason_of(
                self._delivery.stop_reason, ended, self.spec.sampling.stop_token_ids
            ),
            usage=usage,
            timing=timing_of(ended, self._arrived_s, time.monotonic()),
            price=Price(charged_uatp, hold.uatp, plan.card.version),
            # Known only once settled; a replay shows the balance of its own time anyway.
            balance_uatp=0,
        )
        if output is None or not charged_uatp:
            balance_uatp = await hold.void("nothing was done")
        else:
            stored = None
            if self.spec.client_request_id:
                result = Result(started, output, finished)
                stored = await write_result(result, self.spec.account, self._workers)
            # Until the books say otherwise: without a settlement it was done for nobody.
            self._wasted = usage
            balance_uatp = await hold.settle(charged_uatp, finished.stop_reason, stored)
        self._metrics.jobs.finished(
            plan.route.tier,
            finished,
            contended=self._delivery.contended,
            exemplar=self._exemplar,
        )
        self._log_ending(finished.stop_reason.value)
        self._trace(finished)
        if output is None:
            self.stream.start(started)
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
            self._tracing.job_ended(self.spec, self._started, ending)


def _started(plan: Plan, hold: Hold) -> Started:
    return Started(
        job_id=hold.job_id,
        route=plan.route,
        held_uatp=hold.uatp,
        prompt_tokens=len(plan.prompt),
        seed=plan.sampling.seed,
        max_new_tokens=plan.offer.max_new_tokens,
    )
