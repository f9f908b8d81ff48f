"""One daemon's life: start, serve, stop.

Owns the order in which parts come and go: books before server, tactical before strategic,
jobs before executor, executor before ledger. Knows what each part is for and nothing of how
it works. Fails with `ConfigError`, `ModelLoadError`, `LedgerCorrupt` or `LedgerUnusable` before it
serves; after that, with an exit code.

The state directory: made private at the start, and it says where the daemon listens.

Owns the file `endpoint.json` in it. Fails with `ConfigError`, which names the setting, and with
`MachineFault` where the disk takes nothing now.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import uvloop

from sage_fed.auth import mint_admin_token
from sage_fed.calibrate.calibrator import Calibrator
from sage_fed.core import Address, UnixSocket, counted
from sage_fed.daemon.access import Access, throttle_of
from sage_fed.daemon.build import (
    build_metrics,
    cards_in_force,
    expose,
    load_tokenizers,
    on_device_at_hand,
    open_accounts,
    open_ledger,
    page_url,
    site_of,
    start_watching,
    tier_setup,
)
from sage_fed.daemon.operations import Operations
from sage_fed.daemon.readiness import Laps, Lifecycle, Readiness, StartProgress, keep_watch
from sage_fed.device import Executor
from sage_fed.engine import describe_device, read_bandwidth_bytes_per_s, set_cpu_threads
from sage_fed.errors import SageFedError
from sage_fed.jobs.admission import Admission, Encoder
from sage_fed.jobs.broker import Broker, Services
from sage_fed.metrics import Snapshot
from sage_fed.routing import RoutingPolicy
from sage_fed.service import build_server
from sage_fed.settings import Settings
from sage_fed.systemd.notify import ServiceManager
from sage_fed.trusted_files import (
    make_directory,
    os_error,
    replace_file,
    require_trusted_directory,
)
from sage_fed.workers import Workers

_LAST_WORDS_S = 5.0
"""How long aborted jobs may take to settle, and replies to reach their clients."""

_CLEAR_UP_S = 45.0
"""How long a stop may take after the grace, at the very most: last words, threads, the ledger."""

_FLUSH_S = 0.5
"""How long calls that are being answered may take, once every job's reader has its ending."""

_TURN_S = 0.0005
"""How long one thread's Python makes another's wait. The default of 5 ms is longer than a step of
a small model: a busy event loop would hold up a device that has nothing to do, and the ledger
before each of its statements."""

_GARBAGE_THRESHOLDS = (700, 10, 100)
"""When garbage is looked for; the last is for what has lived for long, which takes tens of
milliseconds with hundreds of jobs: ten times less often than by default. What is ours leaves no
cycles, and what gRPC leaves of a call is mostly found while it is young: some megabytes wait."""

_ENDPOINT_FILE = "endpoint.json"
"""In the state directory: where this daemon listens; there while it serves."""

_log = logging.getLogger(__name__)


def serve(settings: Settings, progress: StartProgress, manager: ServiceManager) -> int:
    """Run a daemon until it is told to stop; return the process's exit code.

    `manager` is told how the start, the service and the stop go.

    Raises:
        ConfigError: a setting that cannot work.
        ModelLoadError: a model that cannot be served.
        LedgerCorrupt: books that do not balance, or were lost.
        LedgerUnusable: a disk that does not take them.
    """
    sys.setswitchinterval(_TURN_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings, progress, manager))
    except BaseExceptionGroup as group:
        # The start's last steps run inside the group of tasks, which wraps what they raise.
        errors, others = group.split(SageFedError)
        if errors is None or others is not None or len(errors.exceptions) != 1:
            raise
        raise errors.exceptions[0] from None


async def _run(settings: Settings, progress: StartProgress, manager: ServiceManager) -> int:
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    # Before anything in it is believed.
    await asyncio.to_thread(require_trusted_directory, "state_dir", settings.state_dir)
    async with contextlib.AsyncExitStack() as stack:
        daemon = _Daemon(settings, lifecycle, progress, manager, stack)
        await daemon.start()
        await lifecycle.stopping.wait()
        await daemon.stop()
    lifecycle.ignore_signals()
    # What is read last is what `systemctl status` goes on to show.
    manager.status(lifecycle.failure or "stopped")
    _log.info("stopped")
    return lifecycle.exit_code


class _Daemon:
    """Every part of one daemon, built in order; `stack` takes down in reverse what was built."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        progress: StartProgress,
        manager: ServiceManager,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.settings = settings
        self.lifecycle = lifecycle
        self.manager = manager
        self.stack = stack
        self.metrics = build_metrics(settings)
        self.readiness = Readiness(settings, lifecycle, progress, manager)
        self.laps = Laps()
        # Its jobs end before it does: entered when all else is there.
        self.tasks = asyncio.TaskGroup()

    async def start(self) -> None:
        """Build every part, and answer calls."""
        await self._find_device_and_files()
        await self._open_books()
        self._build_jobs()
        await self._bind()
        await self._run_chores()
        await self._listen()

    async def _find_device_and_files(self) -> None:
        """Look at the device and what the settings name, before the books.

        A start that fails for want of either leaves nothing behind, no ledger and no account with
        the wrong profile's grant.
        """
        set_cpu_threads(self.settings.cpu_threads)
        self.settings, self.fallback = await asyncio.to_thread(
            on_device_at_hand, self.settings, self.metrics
        )
        self.device = await asyncio.to_thread(describe_device, self.settings.device)
        self.cards, self.quality = await asyncio.to_thread(
            cards_in_force, self.settings, self.device, self.metrics
        )
        self.bandwidth = await asyncio.to_thread(read_bandwidth_bytes_per_s, self.settings.device)
        self.metrics.memory_bandwidth(self.bandwidth)
        self.laps.done("device")
        self.tokenizers = await load_tokenizers(self.settings)
        self.laps.done("tokenizers")
        self.access = await asyncio.to_thread(Access, self.settings, self.metrics)

    async def _open_books(self) -> None:
        """Open the ledger, and an account for everyone who may call."""
        settings, lifecycle = self.settings, self.lifecycle
        await asyncio.to_thread(make_directory, "state_dir", settings.state_dir)
        self.tracing = start_watching(settings, self.device, self.metrics, self.stack)
        accepts = self.readiness.ledger_accepts
        ledger = self.ledger = await open_ledger(settings, self.metrics, lifecycle, accepts)
        self.stack.push_async_callback(ledger.close)
        # After the ledger, whose lock says that no other daemon has this directory.
        admin = await asyncio.to_thread(
            mint_admin_token, settings.state_dir, settings.auth.anonymous_account
        )
        self.access.accept(admin, lambda accounts: open_accounts(ledger, settings, accounts))
        accounts = {*settings.accounts, *self.access.authenticator.accounts()}
        await open_accounts(ledger, settings, accounts)
        self.laps.done("ledger")

    def _build_jobs(self) -> None:
        """Build what a job passes through: its admission, its task, the device's thread."""
        settings, metrics = self.settings, self.metrics
        self.executor = Executor(
            {tier: tier_setup(settings, tier, self.tokenizers[tier]) for tier in settings.tiers},
            observers=(metrics, self.cards, self.quality, self.readiness),
            tactical_share=settings.scheduling.tactical_share,
            step_timeout_s=settings.scheduling.step_timeout_s,
            max_stream_messages_per_s=settings.limits.max_stream_messages_per_s,
        )
        self.workers = self.stack.enter_context(
            Workers(
                max_calls=settings.limits.max_waiting_calls,
                max_size=settings.limits.max_waiting_chars,
                on_refused=lambda: metrics.call_denied("waiting"),
                has_rivals=lambda account: self.broker.has_rivals(account),  # noqa: PLW0108 - made below
            )
        )
        self.admission = admission = Admission(
            Encoder(self.tokenizers, self.workers),
            self.executor,
            self.cards.card,
            policy=RoutingPolicy(
                complexity_threshold=settings.routing.complexity_threshold,
                strategic_prompt_tokens=settings.routing.strategic_prompt_tokens,
            ),
            default_new_tokens=settings.limits.default_new_tokens,
            max_jobs=settings.limits.max_jobs,
            max_account_jobs=lambda name: settings.account_rates(name).concurrent_jobs,
            speculates=settings.routing.speculation,
            max_error=settings.max_error_of,
        )
        self.cards.use, self.quality.use = admission.use, admission.use_quality
        self.cards.use_times = self.executor.begin_with
        self.broker = Broker(
            self.tasks,
            Services(
                admission,
                self.ledger,
                self.executor,
                metrics,
                self.workers,
                hold_ttl_s=settings.ledger.hold_ttl_s,
                tracing=self.tracing,
            ),
        )

    async def _bind(self) -> None:
        """Bind both ports; the metrics are served from here on, calls are not."""
        settings, metrics, executor = self.settings, self.metrics, self.executor
        site = site_of(settings, self.device, self.bandwidth)
        operations = Operations(
            settings,
            executor,
            self.broker,
            self.cards,
            Calibrator(executor, site, self.cards.adopt),
            quality=self.quality,
            admission=self.admission,
            metrics=metrics,
            lifecycle=self.lifecycle,
            tokenizers=self.tokenizers,
            ledger=self.ledger,
            device_fallback=self.fallback,
        )
        self.bound = await build_server(
            settings.listen,
            authenticator=self.access.authenticator,
            limits=settings.limits,
            jobs=self.broker,
            ledger=self.ledger,
            operations=operations,
            workers=self.workers,
            tiers=tuple(settings.tiers),
            throttle=throttle_of(settings),
            certificate=self.access.certificate,
            on_denied=metrics.call_denied,
            metrics=metrics,
            tracing=self.tracing,
        )
        metrics.watch(
            lambda: Snapshot(
                {tier: executor.load(tier) for tier in settings.tiers}, self.broker.running()
            )
        )
        page_access = self.access.page_access()
        page = self.stack.enter_context(expose(metrics, settings.metrics_listen, page_access))
        self.metrics_address = Address(settings.metrics_listen.host, page.port)
        self.readiness.listening(self.bound.address, page_url(self.metrics_address, page_access))

    async def _run_chores(self) -> None:
        """Begin what goes on beside the jobs."""
        # Entered late, so that an error of the start is not wrapped into a group of errors.
        await self.stack.enter_async_context(self.tasks)
        self.stack.push_async_callback(self.executor.stop, 0.0)
        step_timeout_s = self.settings.scheduling.step_timeout_s
        for name, chore in (
            ("ledger upkeep", self.ledger.run_upkeep(self.broker.job_ids)),
            ("ledger watch", self.ledger.watch()),
            ("health", self.readiness.run(self.bound.health)),
            ("access", self.access.run()),
            ("calls", self.bound.calls.run()),
            ("device watch", self.executor.watch()),
            ("loop watch", self.metrics.watch_loop()),
            ("service watch", keep_watch(self.executor, self.manager, step_timeout_s)),
        ):
            task = self.tasks.create_task(_guarded(name, chore, self.lifecycle), name=name)
            self.stack.callback(task.cancel)

    async def _listen(self) -> None:
        """Load the models, answer calls, and say where."""
        await self.executor.start()
        await self.bound.server.start()
        self.stack.push_async_callback(self.bound.server.stop, 0.0)
        address, metrics_address = self.bound.address, self.metrics_address
        await self.stack.enter_async_context(
            _announced(self.settings.state_dir, address, metrics_address)
        )
        self.laps.done("listen")
        self.readiness.answering()
        _keep_what_is_here()
        _log.info("listening on %s, metrics on %s", address, metrics_address)
        self.access.announce()

    async def stop(self) -> None:
        """Stop admission, let jobs end within the grace, end what is left, then the parts."""
        grace_s = (
            self.settings.drain_grace_s
            if self.lifecycle.grace_s is None
            else self.lifecycle.grace_s
        )
        self.manager.stopping(grace_s + _CLEAR_UP_S)
        self.readiness.report(self.bound.health)
        self.broker.close()
        self.manager.status(f"draining: {counted(self.broker.num_jobs, 'job')} left")
        empty = asyncio.ensure_future(self.broker.wait_empty())
        hurried = asyncio.ensure_future(self.lifecycle.hurried.wait())
        await asyncio.wait({empty, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not empty.done():
            _log.warning("ending %s that did not end in time", counted(self.broker.num_jobs, "job"))
            self.broker.abort_all()
            await asyncio.wait({empty}, timeout=_LAST_WORDS_S)
        empty.cancel()
        # A wedged device ends its streams here at the latest, so every job has its ending.
        await self.executor.stop(0.0)
        # Not left to the server's grace: it would wait for every load balancer that watches health.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.broker.wait_read()
        await self.bound.server.stop(_FLUSH_S)


def _keep_what_is_here() -> None:
    """Look for garbage from now on, but not among what the start has made.

    Half a million objects of torch and the others live as long as we do: a collection that
    walked them would hold every stream for a tenth of a second.
    """
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    gc.enable()


async def _guarded(name: str, chore: Awaitable[None], lifecycle: Lifecycle) -> None:
    """Run a chore; one that fails stops the daemon in order, and never tears jobs off.

    An error that left it would cancel every job in the group of tasks, in the middle of its
    settlement.
    """
    try:
        await chore
    except SageFedError as error:
        why = error.__cause__ if isinstance(error.__cause__, SageFedError) else error
        lifecycle.fail(f"the {name} failed: {why.message}")
    except Exception as error:  # noqa: BLE001 - the last line of defence: the daemon stops
        _log.critical("the %s failed", name, exc_info=error)
        lifecycle.fail(f"the {name} failed, by {type(error).__name__}; the log has the story")


@contextlib.asynccontextmanager
async def _announced(
    state_dir: Path, listen: Address | UnixSocket, metrics: Address
) -> AsyncIterator[None]:
    """Say where we listen while we do."""
    endpoint = state_dir / _ENDPOINT_FILE
    where = json.dumps({"listen": str(listen), "metrics": str(metrics)})
    try:
        # In a thread, as it is synced, and calls are answered already.
        await asyncio.to_thread(replace_file, endpoint, where, mode=0o644)
    except OSError as error:
        raise os_error(f"state_dir: cannot write {endpoint}", error) from None
    try:
        yield
    finally:
        endpoint.unlink(missing_ok=True)
