"""Every accepted job, from its request to its one ending.

Owns the set of running jobs and their tasks, which outlive the RPC handlers that started
them. Does not know protobuf, SQL or torch. Fails with what admission refuses: nothing is held
or charged for a job that was refused.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from sage_fed.core import JobSpec, Prompt, Quote, RunningJob, StopReason, Tier, counted
from sage_fed.device import Executor
from sage_fed.errors import QueueFull, RateLimited, SageFedError, TierUnavailable
from sage_fed.jobs.job import Job
from sage_fed.jobs.mailbox import JobStream
from sage_fed.jobs.pace import Pace, is_away
from sage_fed.jobs.plan import Planner
from sage_fed.jobs.results import hash_payload
from sage_fed.ledger import Ledger
from sage_fed.metrics import Metrics
from sage_fed.routing import refusal_error
from sage_fed.tracing import Tracing
from sage_fed.workers import Workers

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
        max_stream_messages_per_s: that all streams may write together; 0 is no limit.
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
        max_stream_messages_per_s: float = 0.0,
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
        self._pace = Pace(max_stream_messages_per_s)
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

    async def submit(self, spec: JobSpec, arrived: float) -> JobStream:
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
            pace=self._pace,
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
        earlier = await self._ledger.lookup_request(
            spec.account, spec.client_request_id, await hash_payload(spec, self._workers)
        )
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
            self._metrics.jobs.route_decided(spec.requested, refusal, elapsed_s)
            raise refusal_error(refusal, spec.account)

    def _count_refusal(self, spec: JobSpec, refusal: SageFedError, elapsed_s: float) -> None:
        self._metrics.jobs.failed(spec.requested, refusal, elapsed_s)
        if self._tracing is not None:
            self._tracing.job_ended(spec, None, refusal)

    def _require_place(self, account: str) -> None:
        """Refuse a job of an account that has all that it may; nothing is held for it."""
        allowed = self._max_account_jobs(account)
        if not allowed or self._account_jobs[account] + self._num_unread(account) < allowed:
            return
        self._metrics.doors.call_denied("concurrent_jobs")
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
