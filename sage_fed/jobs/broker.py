"""Every accepted job, from its request to its one ending.

Owns the set of running jobs, their tasks, which outlive the RPC handlers that started them, and
the order in which money and work happen: the worst case is held before any device work, and
whatever happens after that, the job's task settles or voids the hold.
Does not know protobuf, SQL or torch. Fails with what admission refuses: nothing is held or charged
for a job that was refused.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sage_fed.cards import charge
from sage_fed.core import (
    Budget,
    Finished,
    JobSpec,
    Phase,
    Price,
    Prompt,
    Quote,
    Refusal,
    Route,
    RunningJob,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
    counted,
)
from sage_fed.device import (
    Ended,
    EndReason,
    Executor,
    SequenceSpec,
    TokenWeights,
    is_away,
)
from sage_fed.errors import (
    DeviceOutOfMemory,
    Internal,
    NotFinite,
    QueueFull,
    RateLimited,
    SageFedError,
    TierUnavailable,
)
from sage_fed.jobs.admission import Draft, Plan, Planner
from sage_fed.jobs.outgoing import DROPS_OUTPUT, Delivery, OutgoingStream
from sage_fed.jobs.results import Result, read_result, request_key, write_result
from sage_fed.ledger import HoldRequest, Ledger, Replay
from sage_fed.metrics import Metrics
from sage_fed.routing import refusal_error
from sage_fed.workers import Workers

if TYPE_CHECKING:
    from sage_fed.tracing import Tracing

_RETRY_FULL_S = 1.0
_RETRY_DRAINING_S = 5.0
"""A daemon that is stopped for an update is back about then; another one may answer at once."""


class Broker:
    """The daemon's jobs.

    Args:
        tasks: where jobs run; ends after all of them have.
        workers: for what would hold the event loop too long.
        max_jobs: accepted and not ended, over all tiers and accounts.
        max_account_jobs: accepted and not ended, or ended and not read, of one account; 0 is no
            limit.
        hold_ttl_s: the ledger's safety net for a hold that none of `job_ids` ends.
        tracing: told of every job's ending; None traces none.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        *,
        planner: Planner,
        ledger: Ledger,
        executor: Executor,
        metrics: Metrics,
        workers: Workers,
        max_jobs: int,
        hold_ttl_s: float,
        max_account_jobs: Callable[[str], int] = lambda _: 0,
        tracing: Tracing | None = None,
    ) -> None:
        self._tasks = tasks
        self._planner = planner
        self._ledger = ledger
        self._executor = executor
        self._metrics = metrics
        self._workers = workers
        self._max_jobs = max_jobs
        self._max_account_jobs = max_account_jobs
        self._hold_ttl_s = hold_ttl_s
        self._tracing = tracing
        self._jobs: dict[str, Job] = {}
        self._account_jobs: Counter[str] = Counter()
        self._coming: Counter[Tier] = Counter()
        self._seq_ids = itertools.count(1)
        self._empty = asyncio.Event()
        self._empty.set()
        self._reading: set[str] = set()
        self._unread: dict[str, Job] = {}
        self._all_read = asyncio.Event()
        self._all_read.set()
        self._draining = False

    async def submit(self, spec: JobSpec, arrived: float) -> OutgoingStream:
        """Accept a job; returns once its hold is durable.

        Cancelled while it waits, it cancels the job, whose caller has no stream to cancel yet, and
        returns when that has ended.

        Args:
            spec: what is asked for.
            arrived: `time.monotonic()` at the arrival of the request.

        Raises:
            SageFedError: the job is refused; nothing is held.
        """
        try:
            answered = await self._answered_before(spec)
            # Nothing is awaited from here until the job has its place: it cannot be another's.
            self._require_place(spec.account)
            self._require_room()
            if not answered:
                self._require_taker(spec)
        except RateLimited:  # counted as a call that its account may not make, not as a job
            raise
        except SageFedError as refusal:
            self._count_refusal(spec, refusal, time.monotonic() - arrived)
            raise
        job_id = f"job-{secrets.token_hex(8)}"
        job = Job(
            job_id=job_id,
            seq_id=next(self._seq_ids),
            spec=spec,
            arrived_s=arrived,
            planner=self._planner,
            ledger=self._ledger,
            executor=self._executor,
            metrics=self._metrics,
            workers=self._workers,
            hold_ttl_s=self._hold_ttl_s,
            tracing=self._tracing,
            on_left=lambda: self._reader_left(job_id),
        )
        self._jobs[job_id] = job
        self._account_jobs[spec.account] += 1
        self._empty.clear()
        task = self._tasks.create_task(job.run(), name=job_id)
        task.add_done_callback(lambda _: self._forget(job_id))
        if spec.requested is not None:
            self._coming[spec.requested] += 1
        try:
            await job.stream.admitted()
        except asyncio.CancelledError:
            job.stop(StopReason.CANCELLED)
            # Until its hold is given back: who gives up at once is to pay at least with time.
            await asyncio.wait((task,))
            raise
        finally:
            if spec.requested is not None:
                self._coming[spec.requested] -= 1
        self._reading.add(job_id)
        if job_id not in self._jobs:
            self._unread[job_id] = job
        self._all_read.clear()
        return job.stream

    async def quote(self, spec: JobSpec) -> Quote:
        """Say what a job would cost and which route it would take; no side effect.

        Raises:
            InvalidField: the prompt cannot be encoded.
            NoSuchAccount: the account has no budget.
            RateLimited: the account has as much waiting to be encoded as it may.
        """
        # The call that asks for a quote is not the one that would wait for the job.
        job = replace(spec, call_deadline_s=None)
        draft = await self._planner.draft(job, time.monotonic())
        return self._planner.quote(draft, await self._ledger.budget(spec.account))

    async def count_tokens(self, prompt: Prompt, tier: Tier, account: str) -> tuple[int, int]:
        """Return the prompt's tokens under the tier's template, and the tier's longest context.

        Raises:
            InvalidField: the prompt cannot be encoded.
            RateLimited: the account has as much waiting as it may.
        """
        encoded = await self._planner.encoder.encode(prompt, account)
        return encoded.num_tokens[tier], self._executor.load(tier).max_context_tokens

    def abort(self, job_id: str) -> bool:
        """End a running job for an operator; False where there is none of that id."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        job.stop(StopReason.ABORTED)
        return True

    def running(self) -> tuple[RunningJob, ...]:
        """Return every accepted job that has not ended. May be called from any thread."""
        now = time.monotonic()
        # A copy made in one step of the interpreter: a scrape reads it from its own thread.
        seen = [job.describe(now) for job in tuple(self._jobs.values())]
        return tuple(running for running in seen if running is not None)

    def job_ids(self) -> frozenset[str]:
        """Return the jobs that will end their holds themselves, also before they hold anything."""
        return frozenset(self._jobs)

    def has_rivals(self, account: str) -> bool:
        """Whether other accounts have jobs now."""
        return len(self._account_jobs) > (account in self._account_jobs)

    @property
    def num_jobs(self) -> int:
        """Jobs that were taken on and have not ended."""
        return len(self._jobs)

    def close(self) -> None:
        """Take no more jobs."""
        self._draining = True

    def abort_all(self) -> None:
        """End every job; what was made until now is delivered and charged."""
        for job in tuple(self._jobs.values()):
            job.stop(StopReason.ABORTED)

    async def wait_empty(self) -> None:
        """Wait until every job has ended."""
        await self._empty.wait()

    async def wait_read(self) -> None:
        """Wait until every reader has left its stream; each does, with `cancel`, at its end."""
        await self._all_read.wait()

    def _reader_left(self, job_id: str) -> None:
        self._reading.discard(job_id)
        self._unread.pop(job_id, None)
        if not self._reading:
            self._all_read.set()

    async def _answered_before(self, spec: JobSpec) -> bool:
        """Whether the books know the job's request id; asked only where no tier takes the job.

        Raises:
            RequestIdConflict: they do, but its answer is not to be had.
        """
        if not spec.client_request_id or self._planner.refuse_unread(spec, self._coming) is None:
            return False
        earlier = await self._ledger.lookup_request(await request_key(spec, self._workers))
        return earlier is not None

    def _require_room(self) -> None:
        """Refuse every job while the daemon drains or has as many as it may."""
        if self._draining:
            raise TierUnavailable(
                "the daemon is draining and takes no more jobs", _RETRY_DRAINING_S
            )
        # Not what readers have not taken: that counts against their own account (`_require_place`)
        # and connection (`service.calls`), and never makes another's job fail.
        if len(self._jobs) >= self._max_jobs:
            under_way = counted(self._max_jobs, "job")
            raise QueueFull(f"{under_way} under way, and no more at once", _RETRY_FULL_S)

    def _require_taker(self, spec: JobSpec) -> None:
        """Refuse a job that no tier takes now, before it costs anything.

        Under overload that is most of them: no task, no tokens, no price, no hold.
        """
        began_s = time.perf_counter()
        refusal = self._planner.refuse_unread(spec, self._coming)
        if refusal is not None:
            elapsed_s = time.perf_counter() - began_s
            self._metrics.route_decided(spec.requested, refusal, elapsed_s)
            raise refusal_error(refusal, spec.account)

    def _count_refusal(self, spec: JobSpec, refusal: SageFedError, elapsed_s: float) -> None:
        self._metrics.job_failed(spec.requested, refusal, elapsed_s)
        if self._tracing is not None:
            self._tracing.job_ended(spec, None, refusal)

    def _require_place(self, account: str) -> None:
        """Refuse a job of an account that has all that it may; nothing is held for it."""
        allowed = self._max_account_jobs(account)
        if not allowed or self._account_jobs[account] + self._num_unread(account) < allowed:
            return
        self._metrics.call_denied("concurrent_jobs")
        raise RateLimited(
            f"account {account} may run {counted(allowed, 'job')} at once",
            account=account,
            limit="concurrent_jobs",
            allowed=allowed,
            retry_after_s=_RETRY_FULL_S,
        )

    def _num_unread(self, account: str) -> int:
        """Count the account's jobs that have ended and whose readers take nothing.

        A reader that is about to take its ending is not one of them: its next job would be
        refused otherwise.
        """
        now = time.monotonic()
        return sum(
            job.spec.account == account and is_away(job.stream, now)
            for job in self._unread.values()
        )

    def _forget(self, job_id: str) -> None:
        job = self._jobs.pop(job_id)
        account = job.spec.account
        self._account_jobs[account] -= 1
        if not self._account_jobs[account]:
            del self._account_jobs[account]
        if job_id in self._reading:
            self._unread[job_id] = job
        if not self._jobs:
            self._empty.set()


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
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.stream = OutgoingStream(on_cancel=self._reader_left, pacer=executor.pacer)
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
        self._seq_id = seq_id
        self._delivery = Delivery(
            spec,
            self.stream,
            arrived_s=arrived_s,
            executor=executor,
            metrics=metrics,
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
            output_tokens=self.stream.num_tokens,
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
        output = result.output
        if output.token_ids or output.text:
            self.stream.push(output.text, output.token_ids, output.logprobs)
        self._metrics.job_replayed(result.started.route.tier)
        self.stream.end(replace(result.finished, balance_uatp=budget.balance_uatp))

    def _fail(self, error: SageFedError) -> None:
        self._log_ending(error.reason.lower())
        tier = self._started.route.tier if self._started else self.spec.requested
        total_s = time.monotonic() - self._arrived_s
        if not isinstance(error, RateLimited):  # counted as a call that its account may not make
            self._metrics.job_failed(tier, error, total_s, self._wasted, self._device_s)
        self._trace(error)
        # Its frames lead back to the job: see `run`.
        self.stream.end(error.with_traceback(None))

    async def _work(self, plan: Plan, started: Started) -> Ended | None:
        """Have the tokens delivered; None where the sequence never got to the executor."""
        sequence = _sequence(self._seq_id, self.spec, plan)
        ended = await self._delivery.run(sequence, plan.tokenizer.decoder(), started)
        if ended is None:
            return None
        self._device_s = ended.device_s
        if (failure := failure_of(ended, plan.route.tier)) is not None:
            self._wasted = Usage(ended.prompt_tokens, ended.cached_tokens, ended.output_tokens)
            raise failure
        return ended

    async def _settle(self, plan: Plan, hold: Hold, started: Started, ended: Ended | None) -> None:
        """Charge what was done, release the rest, and write the ending."""
        output = self.stream.whole() if ended else None
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
        self._metrics.job_finished(
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


@dataclass(frozen=True, slots=True)
class Hold:
    """`uatp` of an account, reserved for one job on its route; ends by `settle` or by `void`."""

    job_id: str
    account: str
    route: Route
    uatp: int
    ledger: Ledger
    metrics: Metrics

    async def settle(self, charged_uatp: int, reason: StopReason, result: bytes | None) -> int:
        """Charge what was done and release the rest; return the balance.

        Args:
            charged_uatp: at most what is held.
            reason: why the job stopped, for the books.
            result: what a repeated request of the same id is answered with, if it has one.
        """
        settlement = await self.ledger.settle(self.job_id, charged_uatp, reason.value, result)
        self.metrics.balance_changed(self.account, settlement.balance_uatp)
        self.metrics.hold_settled(self.route.tier, self.uatp, charged_uatp)
        return settlement.balance_uatp

    async def void(self, why: str) -> int:
        """Release all of it; return the balance."""
        release = await self.ledger.void(self.job_id, why)
        self.metrics.hold_settled(self.route.tier, release.held_uatp, 0)
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
    key = await request_key(spec, workers)
    loads = planner.loads()
    decision: Route | Refusal | None = None
    decision_s = 0.0
    if not spec.client_request_id:  # which may have been answered before, place or no place
        began_s = time.perf_counter()
        refusal = planner.hopeless(draft, loads)
        if refusal is not None:
            metrics.route_decided(spec.requested, refusal, time.perf_counter() - began_s)
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
            amount_uatp=draft.offers[decision.tier].worst_case_uatp,
            rate_card=draft.card.version,
            tier=decision.tier.name,
            ttl_s=ttl_s,
        )

    try:
        held = await ledger.hold(key, decide)
    finally:
        if decision is not None:
            metrics.route_decided(spec.requested, decision, decision_s)
    if isinstance(held, Replay):
        return held
    assert isinstance(decision, Route), "what is held was decided"
    metrics.hold_placed(decision.tier, held.held_uatp)
    return Hold(job_id, spec.account, decision, held.held_uatp, ledger, metrics)


_NATURAL = {EndReason.EOS: StopReason.END_OF_TEXT, EndReason.LENGTH: StopReason.LENGTH}

_RETRY_FAILED_S = 5.0
"""A tier that failed loads its model again at once; a small one serves by then."""


def failure_of(ended: Ended, tier: Tier) -> SageFedError | None:
    """Return the error of a sequence that the device did not bring to an end."""
    match ended.reason:
        case EndReason.OUT_OF_MEMORY:
            return DeviceOutOfMemory(
                "the device had no memory for this job; try a shorter prompt or max_new_tokens"
            )
        case EndReason.NOT_FINITE:
            return NotFinite(
                "the model's numbers overflowed for this job and nothing was charged; the same "
                "prompt would fail again, so shorten or reword it"
            )
        case EndReason.FAILED:
            return TierUnavailable(
                f"the {tier.name} tier failed and nothing was charged; ask again soon",
                _RETRY_FAILED_S,
            )
        case _:
            return None


def stop_reason_of(
    asked: StopReason | None, ended: Ended | None, stop_token_ids: Collection[int] = ()
) -> StopReason:
    """Return why a job stopped.

    Args:
        asked: what it was asked to stop for, if it was.
        ended: the sequence's ending; None where it never got to the executor.
        stop_token_ids: those that the client named; any other was spelled by a stop string.
    """
    if asked in DROPS_OUTPUT:
        # Also where the sequence had ended by itself: what came after it was dropped.
        return asked
    if ended is not None and ended.reason in _NATURAL:
        return _NATURAL[ended.reason]
    if ended is not None and ended.reason is EndReason.STOP_TOKEN:
        named = ended.stop_token_id in stop_token_ids
        return StopReason.STOP_TOKEN if named else StopReason.STOP_STRING
    # A shutdown ends sequences without anyone having asked this job to stop.
    return asked or StopReason.ABORTED


def timing_of(ended: Ended | None, arrived_s: float, now: float) -> Timing:
    """Return a job's durations; `arrived_s` and `now` are on the executor's clock."""
    if ended is None:
        return Timing(0.0, 0.0, 0.0, 0.0, now - arrived_s)
    started, first, last = ended.started_s, ended.first_token_s, ended.last_token_s
    return Timing(
        queue_s=(ended.ended_s if started is None else started) - ended.submitted_s,
        prefill_s=first - started if first is not None and started is not None else 0.0,
        decode_s=last - first if last is not None and first is not None else 0.0,
        time_to_first_token_s=first - arrived_s if first is not None else 0.0,
        total_s=now - arrived_s,
        device_s=ended.device_s,
    )


def _sequence(seq_id: int, spec: JobSpec, plan: Plan) -> SequenceSpec:
    rates = plan.card.lines[plan.route.tier]
    return SequenceSpec(
        seq_id=seq_id,
        tier=plan.route.tier,
        prompt=plan.prompt,
        max_new_tokens=plan.offer.max_new_tokens,
        sampling=plan.sampling,
        ignore_eos=spec.sampling.ignore_eos,
        stop_token_ids=plan.stop_token_ids,
        priority=spec.priority,
        account=spec.account,
        # What its tokens count for between accounts: what they cost.
        weights=TokenWeights(
            rates[Phase.PREFILL].uatp, rates[Phase.CACHED].uatp, rates[Phase.DECODE].uatp
        ),
    )
