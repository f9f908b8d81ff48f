"""Every accepted job, from its request to its one ending.

Owns the set of running jobs, their tasks, which outlive the RPC handlers that started them, and
the order in which money and work happen: the worst case is held before any device work, and
whatever happens after that, the job's own task settles or voids the hold, writes the one ending,
and tells the log, the metrics and the traces of it.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sage_fed.cards.rate_card import charge_by_tier, price_in_single
from sage_fed.core import (
    Budget,
    CascadeOutcome,
    Finished,
    JobSpec,
    Mode,
    Price,
    Prompt,
    Quote,
    Refusal,
    Route,
    RunningJob,
    Stage,
    StageTiming,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.device import Ended, EndReason, Executor, is_away
from sage_fed.errors import (
    DeviceOutOfMemory,
    Internal,
    NotFinite,
    RateLimited,
    SageFedError,
    TierUnavailable,
)
from sage_fed.jobs.admission import Admission, Draft, Place
from sage_fed.jobs.outgoing import DROPS_OUTPUT, Delivery, OutgoingStream
from sage_fed.jobs.results import Result, read_result, request_key, write_result
from sage_fed.ledger import HoldRequest, Ledger, Replay
from sage_fed.metrics import Metrics
from sage_fed.routing import Reason, refusal_error
from sage_fed.workers import Workers

if TYPE_CHECKING:
    from sage_fed.tracing import Tracing

_log = logging.getLogger(__name__)

_RETRY_FAILED_S = 5.0
"""A tier that failed loads its model again at once; a small one serves by then."""

_NATURAL = {EndReason.EOS: StopReason.END_OF_TEXT, EndReason.LENGTH: StopReason.LENGTH}

_NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Services:
    """What every job uses of the daemon.

    `hold_ttl_s` is the ledger's safety net for a hold that no job ends; `tracing` is told of every
    job's ending, None traces none.
    """

    admission: Admission
    ledger: Ledger
    executor: Executor
    metrics: Metrics
    workers: Workers
    hold_ttl_s: float
    tracing: Tracing | None = None
    seq_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class Broker:
    """The daemon's jobs; `tasks` is where they run, and ends after all of them have."""

    def __init__(self, tasks: asyncio.TaskGroup, services: Services) -> None:
        self._tasks = tasks
        self._services = services
        self._admission = services.admission
        self._jobs: dict[str, Job] = {}
        self._account_jobs: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        self._reading: set[str] = set()
        self._unread: dict[str, Job] = {}
        self._all_read = asyncio.Event()
        self._all_read.set()

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
            place = await self._admit(spec)
        except RateLimited:  # counted as a call that its account may not make, not as a job
            self._services.metrics.call_denied("concurrent_jobs")
            raise
        except SageFedError as refusal:
            elapsed_s = time.monotonic() - arrived
            self._services.metrics.job_failed(spec.requested, refusal, elapsed_s)
            if self._services.tracing is not None:
                self._services.tracing.job_ended(spec, None, refusal)
            raise
        job_id = f"job-{secrets.token_hex(8)}"
        job = Job(
            job_id,
            spec,
            arrived_s=arrived,
            place=place,
            services=self._services,
            on_left=lambda: self._reader_left(job_id),
        )
        self._jobs[job_id] = job
        self._account_jobs[spec.account] += 1
        self._empty.clear()
        task = self._tasks.create_task(job.run(), name=job_id)
        task.add_done_callback(lambda _: self._forget(job_id))
        try:
            await job.stream.admitted()
        except asyncio.CancelledError:
            job.stop(StopReason.CANCELLED)
            # Until its hold is given back: who gives up at once is to pay at least with time.
            await asyncio.wait((task,))
            raise
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
        draft = await self._admission.draft(job, time.monotonic())
        return self._admission.quote(draft, await self._services.ledger.budget(spec.account))

    async def count_tokens(self, prompt: Prompt, tier: Tier, account: str) -> tuple[int, int]:
        """Return the prompt's tokens under the tier's template, and the tier's longest context.

        Raises:
            InvalidField: the prompt cannot be encoded.
            RateLimited: the account has as much waiting as it may.
        """
        encoded = await self._admission.encoder.encode(prompt, account)
        return encoded.num_tokens[tier], self._services.executor.load(tier).max_context_tokens

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
        self._admission.draining = True

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

    async def _admit(self, spec: JobSpec) -> Place:
        """Return a job's place; one whose answer the books have needs none in a queue.

        Raises:
            SageFedError: there is none, or its request id is in use.
        """
        began_s = time.perf_counter()
        answer = self._ask(spec, answered=False)
        if isinstance(answer, Refusal) and spec.client_request_id and _about_tiers(answer):
            key = await request_key(spec, self._services.workers)
            if await self._services.ledger.lookup_request(key):
                answer = self._ask(spec, answered=True)
        if isinstance(answer, Place):
            return answer
        if answer.reason != Reason.ACCOUNT_JOBS:
            elapsed_s = time.perf_counter() - began_s
            self._services.metrics.route_decided(spec.requested, answer, elapsed_s)
        raise refusal_error(answer, spec.account)

    def _ask(self, spec: JobSpec, *, answered: bool) -> Place | Refusal:
        def account_jobs() -> int:
            return self._account_jobs[spec.account] + self._num_unread(spec.account)

        return self._admission.admit(spec, len(self._jobs), account_jobs, answered=answered)

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

    def _reader_left(self, job_id: str) -> None:
        self._reading.discard(job_id)
        self._unread.pop(job_id, None)
        if not self._reading:
            self._all_read.set()

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


class Job:
    """One request, from its arrival (`arrived_s`, monotonic) to its ending."""

    def __init__(
        self,
        job_id: str,
        spec: JobSpec,
        *,
        arrived_s: float,
        place: Place,
        services: Services,
        on_left: Callable[[], None],
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.stream = OutgoingStream(on_cancel=self._reader_left, pacer=services.executor.pacer)
        self._on_left = on_left
        self._arrived_s = arrived_s
        self._place = place
        self._services = services
        self._started: Started | None = None
        self._held_uatp: Mapping[Tier, int] = {}
        self._usage = _NOTHING
        """Of the sequences that have ended."""
        self._endings: list[tuple[Stage, Ended]] = []
        self._answered: Ended | None = None
        """The last one that came to an end."""
        self._tier: Tier | None = None
        """Where its newest stage runs."""
        self._cascade: CascadeOutcome | None = None
        self._error_probability: float | None = None
        self._shown_s = 0.0
        """When a hidden answer was shown."""
        # What a slow bucket shows: the id that the ledger, the log and the client know, too.
        self._exemplar = {"job_id": job_id}
        if spec.trace is not None:
            self._exemplar["trace_id"] = spec.trace.trace_id
        self._delivery = Delivery(
            spec,
            self.stream,
            arrived_s=arrived_s,
            executor=services.executor,
            metrics=services.metrics,
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
            tier=self._tier or started.route.tier,
            priority=self.spec.priority,
            age_s=now - self._arrived_s,
            prompt_tokens=started.prompt_tokens,
            output_tokens=self.stream.num_tokens,
            held_uatp=started.held_uatp,
            mode=started.route.mode,
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
            self._place.release()
            # There is nothing left to stop; and a job that its stream leads back to would be the
            # garbage collector's, which stops the loop the longer the more it has to look through.
            self.stream.on_cancel = self._on_left

    async def _run(self) -> None:
        draft = await self._services.admission.draft(self.spec, self._arrived_s)
        started = await self._hold(draft)
        if isinstance(started, Replay):
            await self._replay(started)
            return
        try:
            self._started = started
            await self._work(draft, started)
        except BaseException:
            # Also when this task is cancelled: an open hold would only end by expiry.
            await asyncio.shield(self._void("failed"))
            raise
        await self._settle(draft, started)

    async def _hold(self, draft: Draft) -> Started | Replay:
        """Route and hold in one operation of the ledger, at the balance of that instant.

        Nothing behind the ledger's answer can fail here: a hold that its job does not know of
        stays until it expires.
        """
        spec, services = self.spec, self._services
        key = await request_key(spec, services.workers)
        loads = services.admission.loads_for(spec, self._place)
        decided: tuple[Route | Refusal, float] | None = None

        def decide(budget: Budget | None) -> Route:
            nonlocal decided
            began_s = time.perf_counter()
            decision = services.admission.decide(draft, budget, loads)
            if budget is not None or isinstance(decision, Refusal):
                decided = decision, time.perf_counter() - began_s
            if isinstance(decision, Refusal):
                raise refusal_error(decision, spec.account)
            return decision

        def request(budget: Budget) -> HoldRequest:
            taken = decide(budget)
            services.admission.require_bounded(draft, taken, services.ledger.max_result_bytes)
            return HoldRequest(
                job_id=self.job_id,
                amount_uatp=draft.offer(taken).worst_case_uatp,
                rate_card=draft.card.version,
                tier=taken.tier.name,
                ttl_s=services.hold_ttl_s,
            )

        try:
            likely: Route | Refusal
            if spec.client_request_id:  # which may have been answered before, fit or not
                likely = services.admission.decide(draft, None, loads)
            else:
                likely = decide(None)
            if isinstance(likely, Route):
                services.admission.narrow(spec, self._place, likely.tier)
            held = await services.ledger.hold(key, request)
        finally:
            if decided is not None:
                services.metrics.route_decided(spec.requested, *decided)
        if isinstance(held, Replay):
            self._place.release()
            return held
        assert decided is not None, "what is held was decided"
        route = decided[0]
        assert isinstance(route, Route)
        offer = draft.offer(route)
        self._held_uatp = offer.worst_case_by_tier
        services.metrics.hold_placed(self._held_uatp)
        return Started(
            job_id=self.job_id,
            route=route,
            held_uatp=held.held_uatp,
            prompt_tokens=offer.prompt_tokens,
            seed=draft.seed,
            max_new_tokens=offer.max_new_tokens,
        )

    async def _replay(self, earlier: Replay) -> None:
        """Answer with what an earlier request of the same id got; nothing is charged."""
        result = await read_result(earlier.result, self.spec.account, self._services.workers)
        budget = await self._services.ledger.budget(self.spec.account, refusable=False)
        self.stream.start(result.started)
        output = result.output
        if output.token_ids or output.text:
            self.stream.push(output.text, output.token_ids, output.logprobs, output.origins)
        self._services.metrics.job_replayed(result.started.route.tier)
        self.stream.end(replace(result.finished, balance_uatp=budget.balance_uatp))

    async def _work(self, draft: Draft, started: Started) -> None:
        """Run the job's stages, of which the client sees the one that answers.

        With `accept_revisions` it sees each, and is told where the next one replaces it.
        """
        program, delivery = draft.program(started.route), self._delivery
        stage, *planned = program.stages
        shown = not planned or self.spec.accept_revisions
        delivery.tells_origins = started.route.mode is not Mode.SINGLE
        while True:
            before, usage = delivery.state, self._usage
            # From here on it is in this stage's queue itself.
            self._place.cover({later.tier for later in planned})
            try:
                ended = await self._run_stage(draft, started, stage, shown=shown)
            except TierUnavailable:
                # The answer before it stands, where its client takes less.
                if not (self._answered and self.spec.allow_downgrade and delivery.resume(before)):
                    raise
                self._usage, self._cascade = usage, CascadeOutcome.UNAVAILABLE
                break
            if ended is None:
                break
            self._answered = ended
            if not planned:
                return
            if not _is_whole(delivery.stop_reason, ended):
                break
            answer = delivery.answer()
            if program.doubt is not None:
                self._error_probability = program.doubt(answer)
            following = program.decide(answer, planned.pop(0))
            if following is None:
                self._cascade = CascadeOutcome.KEPT
                break
            stage, self._cascade = following, CascadeOutcome.ESCALATED
            shown = not planned or self.spec.accept_revisions
        self._place.release()
        if delivery.stop_reason is not StopReason.CANCELLED:
            if not shown:
                self._shown_s = time.monotonic()
            delivery.show()

    async def _run_stage(
        self, draft: Draft, started: Started, stage: Stage, *, shown: bool
    ) -> Ended | None:
        """Run one sequence and count what it did; None where it was stopped before it began.

        Raises:
            SageFedError: the device did not bring it to an end.
        """
        services = self._services
        sequence = services.admission.sequence(draft, stage, next(services.seq_ids))
        self._tier = stage.tier
        tokenizer = services.admission.encoder.tokenizers[stage.tier]
        ended = await self._delivery.run(sequence, tokenizer.decoder(), started, shown=shown)
        if ended is None:
            return None
        failure = _failure_of(ended, stage.tier)
        made = self._delivery.num_tokens if failure is None else ended.output_tokens
        usage = Usage.single(
            stage.tier,
            ended.prompt_tokens,
            ended.cached_tokens,
            made,
            verified=ended.verified_tokens,
            # A stop string may have cut the output within the draft.
            accepted=min(ended.accepted_tokens, made),
            drafted=ended.drafted_tokens,
            drafter=stage.drafter,
        )
        self._usage = self._usage.then(usage)
        self._endings.append((stage, ended))
        if failure is not None:
            raise failure
        return ended

    async def _settle(self, draft: Draft, started: Started) -> None:
        """Charge what was done, release the rest, and write the ending."""
        services, route = self._services, started.route
        charged_by_tier = charge_by_tier(draft.card, self._usage)
        charged_uatp = sum(charged_by_tier.values())
        finished = Finished(
            stop_reason=_stop_reason_of(
                self._delivery.stop_reason,
                self._answered,
                self.spec.sampling.stop_token_ids,
            ),
            usage=self._usage,
            timing=timing_of(self._endings, self._arrived_s, time.monotonic(), self._shown_s),
            price=Price(
                charged_uatp,
                started.held_uatp,
                draft.card.version,
                price_in_single(draft.card, self._usage, route.tier),
            ),
            # Known only once settled; a replay shows the balance of its own time anyway.
            balance_uatp=0,
            cascade=self._cascade,
            error_probability=self._error_probability,
        )
        if not charged_uatp:
            balance_uatp = await self._void("nothing was done")
        else:
            stored = None
            if self.spec.client_request_id:
                result = Result(started, self._delivery.whole(), finished)
                stored = await write_result(result, self.spec.account, services.workers)
            settlement = await services.ledger.settle(
                self.job_id,
                charged_uatp,
                finished.stop_reason.value,
                stored,
                self._usage.by_phase,
            )
            balance_uatp = settlement.balance_uatp
            services.metrics.balance_changed(self.spec.account, balance_uatp)
            services.metrics.hold_settled(self._held_uatp, charged_by_tier)
            services.metrics.price_compared(route.mode, finished.price)
            services.admission.experience.note(
                draft.card, route, self._usage, started.max_new_tokens, finished.timing.device_s
            )
        services.metrics.job_finished(
            route.tier, finished, contended=self._delivery.contended, exemplar=self._exemplar
        )
        self._tell(finished, finished.stop_reason.value)
        if not self._endings:
            self.stream.start(started)
        self.stream.end(replace(finished, balance_uatp=balance_uatp))

    async def _void(self, why: str) -> int:
        """Release all that is held; return the balance."""
        release = await self._services.ledger.void(self.job_id, why)
        self._services.metrics.hold_settled(self._held_uatp, {})
        return release.balance_uatp

    def _fail(self, error: SageFedError) -> None:
        tier = self._started.route.tier if self._started else self.spec.requested
        if not isinstance(error, RateLimited):  # counted as a call that its account may not make
            total_s = time.monotonic() - self._arrived_s
            # Without a settlement all that was done was done for nothing.
            wasted = self._usage if self._endings else None
            stages = timing_of(self._endings, self._arrived_s, self._arrived_s).stages
            self._services.metrics.job_failed(tier, error, total_s, wasted, stages)
        self._tell(error, error.reason.lower())
        # Its frames lead back to the job: see `run`.
        self.stream.end(error.with_traceback(None))

    def _tell(self, ending: Finished | SageFedError, how: str) -> None:
        """Tell the trace how the job ended, and the log, at debug only.

        A line a job would cost more than the job's own bookkeeping, and a flood of refusals would
        be a flood of lines.
        """
        if _log.isEnabledFor(logging.DEBUG):
            story = {"job_id": self.job_id, "account": self.spec.account, "ending": how}
            _log.debug("%s ended: %s", self.job_id, how, extra=story)
        if self._services.tracing is not None:
            self._services.tracing.job_ended(self.spec, self._started, ending)

    def _internal(self, error: Exception) -> Internal:
        """Return what the client gets for a bug of ours; the log gets the rest."""
        error_id = secrets.token_hex(4)
        story = {"job_id": self.job_id, "error_id": error_id}
        _log.error("%s: internal error %s", self.job_id, error_id, exc_info=error, extra=story)
        return Internal(error_id)


def _about_tiers(refusal: Refusal) -> bool:
    """Whether a job that no tier takes now may be told so, or be answered from the books."""
    return refusal.reason in {Reason.QUEUE_FULL, Reason.TIER_LOADING, Reason.TIER_UNAVAILABLE}


def _is_whole(asked: StopReason | None, ended: Ended) -> bool:
    """Whether a sequence came to its own end."""
    if asked is None:
        return ended.reason in _NATURAL or ended.reason is EndReason.STOP_TOKEN
    return asked is StopReason.STOP_STRING


def _failure_of(ended: Ended, tier: Tier) -> SageFedError | None:
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


def _stop_reason_of(
    asked: StopReason | None, ended: Ended | None, stop_token_ids: Collection[int]
) -> StopReason:
    """Return why a job stopped.

    Args:
        asked: what it was asked to stop for, if it was.
        ended: its last sequence; None where no one got to the executor.
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


def timing_of(
    endings: Sequence[tuple[Stage, Ended]], arrived_s: float, now: float, shown_s: float = 0.0
) -> Timing:
    """Return a job's durations; `arrived_s`, `now` and `shown_s` are on the executor's clock.

    Where it ran several sequences, theirs together. The first token is the answer's; one that was
    hidden until it was decided on came to its client at `shown_s`.
    """
    stages = tuple(_stage_timing(stage, ended, arrived_s) for stage, ended in endings)
    first_s = endings[-1][1].first_token_s if endings else None
    return Timing(
        queue_s=sum(stage.queue_s for stage in stages),
        prefill_s=sum(stage.prefill_s for stage in stages),
        decode_s=sum(stage.decode_s for stage in stages),
        time_to_first_token_s=0.0 if first_s is None else max(first_s, shown_s) - arrived_s,
        total_s=now - arrived_s,
        device_s=sum(stage.device_s + stage.draft_s for stage in stages),
        stages=stages,
    )


def _stage_timing(stage: Stage, ended: Ended, arrived_s: float) -> StageTiming:
    started, first, last = ended.started_s, ended.first_token_s, ended.last_token_s
    return StageTiming(
        tier=stage.tier,
        queue_s=(ended.ended_s if started is None else started) - ended.submitted_s,
        prefill_s=0.0 if first is None or started is None else first - started,
        decode_s=0.0 if last is None or first is None else last - first,
        device_s=ended.device_s,
        drafter=stage.drafter,
        draft_s=ended.draft_s,
        begin_s=ended.submitted_s - arrived_s,
        drafted_tokens=ended.drafted_tokens,
        verified_tokens=ended.verified_tokens,
        accepted_tokens=ended.accepted_tokens,
    )
