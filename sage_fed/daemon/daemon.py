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
from dataclasses import dataclass
from pathlib import Path

import uvloop

from sage_fed.auth import mint_admin_token
from sage_fed.calibrate.calibrator import Calibrator
from sage_fed.core import Address, UnixSocket, counted
from sage_fed.daemon.access import Access, read_access_files, throttle_of
from sage_fed.daemon.build import (
    build_metrics,
    card_in_force,
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
from sage_fed.service import BoundServer, build_server
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


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is running, as far as stopping it needs to know."""

    executor: Executor
    broker: Broker
    readiness: Readiness
    bound: BoundServer
    manager: ServiceManager


async def _run(settings: Settings, progress: StartProgress, manager: ServiceManager) -> int:
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    # Before anything in it is believed.
    await asyncio.to_thread(require_trusted_directory, "state_dir", settings.state_dir)
    async with _started(settings, lifecycle, progress, manager) as parts:
        await lifecycle.stopping.wait()
        await _stop(settings, lifecycle, parts)
    lifecycle.ignore_signals()
    # What is read last is what `systemctl status` goes on to show.
    manager.status(lifecycle.failure or "stopped")
    _log.info("stopped")
    return lifecycle.exit_code


@contextlib.asynccontextmanager
async def _started(
    settings: Settings, lifecycle: Lifecycle, progress: StartProgress, manager: ServiceManager
) -> AsyncIterator[_Parts]:
    """Build every part, and take down in reverse what was built."""
    laps = Laps()
    set_cpu_threads(settings.cpu_threads)
    metrics = build_metrics(settings)
    settings, fallback = await asyncio.to_thread(on_device_at_hand, settings, metrics)
    device = await asyncio.to_thread(describe_device, settings.device)
    cards = await asyncio.to_thread(card_in_force, settings, device, metrics)
    # The device and the models' files before the books: a start that fails for want of either
    # leaves nothing behind, no ledger and no account with the wrong profile's grant.
    bandwidth = await asyncio.to_thread(read_bandwidth_bytes_per_s, settings.device)
    metrics.memory_bandwidth(bandwidth)
    laps.done("device")
    tokenizers = await load_tokenizers(settings)
    laps.done("tokenizers")
    access_files = await asyncio.to_thread(read_access_files, settings)
    await asyncio.to_thread(make_directory, "state_dir", settings.state_dir)
    async with contextlib.AsyncExitStack() as stack:
        tracing = start_watching(settings, device, metrics, stack)
        readiness = Readiness(settings, lifecycle, progress, manager)
        ledger = await open_ledger(settings, metrics, lifecycle, readiness.ledger_accepts)
        stack.push_async_callback(ledger.close)
        access = Access(
            settings,
            access_files,
            # After the ledger, whose lock says that no other daemon has this directory.
            admin=await asyncio.to_thread(
                mint_admin_token, settings.state_dir, settings.auth.anonymous_account
            ),
            open_accounts=lambda accounts: open_accounts(ledger, settings, accounts),
            metrics=metrics,
        )
        await open_accounts(
            ledger, settings, {*settings.accounts, *access.authenticator.accounts()}
        )
        laps.done("ledger")
        executor = Executor(
            {tier: tier_setup(settings, tier, tokenizers[tier]) for tier in settings.tiers},
            observers=(metrics, cards, readiness),
            tactical_share=settings.scheduling.tactical_share,
            step_timeout_s=settings.scheduling.step_timeout_s,
            max_stream_messages_per_s=settings.limits.max_stream_messages_per_s,
        )
        workers = stack.enter_context(
            Workers(
                max_calls=settings.limits.max_waiting_calls,
                max_size=settings.limits.max_waiting_chars,
                on_refused=lambda: metrics.call_denied("waiting"),
                has_rivals=lambda account: broker.has_rivals(account),  # noqa: PLW0108 - made below
            )
        )
        admission = Admission(
            Encoder(tokenizers, workers),
            executor,
            cards.card,
            policy=RoutingPolicy(
                complexity_threshold=settings.routing.complexity_threshold,
                strategic_prompt_tokens=settings.routing.strategic_prompt_tokens,
            ),
            default_new_tokens=settings.limits.default_new_tokens,
            max_jobs=settings.limits.max_jobs,
            max_account_jobs=lambda name: settings.account_rates(name).concurrent_jobs,
        )
        cards.use = admission.use
        tasks = asyncio.TaskGroup()
        broker = Broker(
            tasks,
            Services(
                admission,
                ledger,
                executor,
                metrics,
                workers,
                hold_ttl_s=settings.ledger.hold_ttl_s,
                tracing=tracing,
            ),
        )
        calibrator = Calibrator(executor, site_of(settings, device, bandwidth), cards.adopt)
        operations = Operations(
            settings,
            executor,
            broker,
            cards,
            calibrator,
            lifecycle=lifecycle,
            tokenizers=tokenizers,
            ledger=ledger,
            device_fallback=fallback,
        )
        bound = await build_server(
            settings.listen,
            authenticator=access.authenticator,
            limits=settings.limits,
            jobs=broker,
            ledger=ledger,
            operations=operations,
            workers=workers,
            tiers=tuple(settings.tiers),
            throttle=throttle_of(settings),
            certificate=access.certificate,
            on_denied=metrics.call_denied,
            metrics=metrics,
            tracing=tracing,
        )
        metrics.watch(
            lambda: Snapshot(
                {tier: executor.load(tier) for tier in settings.tiers}, broker.running()
            )
        )
        page_access = access.page_access()
        exposition = stack.enter_context(expose(metrics, settings.metrics_listen, page_access))
        metrics_address = Address(settings.metrics_listen.host, exposition.port)
        readiness.listening(bound.address, page_url(metrics_address, page_access))
        # Entered last, so that an error of the start is not wrapped into a group of errors.
        await stack.enter_async_context(tasks)
        stack.push_async_callback(executor.stop, 0.0)
        for name, chore in (
            ("ledger upkeep", ledger.run_upkeep(broker.job_ids)),
            ("ledger watch", ledger.watch()),
            ("health", readiness.run(bound.health)),
            ("access", access.run()),
            ("calls", bound.calls.run()),
            ("device watch", executor.watch()),
            ("loop watch", metrics.watch_loop()),
            ("service watch", keep_watch(executor, manager, settings.scheduling.step_timeout_s)),
        ):
            task = tasks.create_task(_guarded(name, chore, lifecycle), name=name)
            stack.callback(task.cancel)
        await executor.start()
        await bound.server.start()
        stack.push_async_callback(bound.server.stop, 0.0)
        await stack.enter_async_context(
            _announced(settings.state_dir, bound.address, metrics_address)
        )
        laps.done("listen")
        readiness.answering()
        _keep_what_is_here()
        _log.info("listening on %s, metrics on %s", bound.address, metrics_address)
        access.announce()
        yield _Parts(executor, broker, readiness, bound, manager)


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


async def _stop(settings: Settings, lifecycle: Lifecycle, parts: _Parts) -> None:
    """Stop admission, let jobs end within the grace, end what is left, then the parts."""
    grace_s = settings.drain_grace_s if lifecycle.grace_s is None else lifecycle.grace_s
    parts.manager.stopping(grace_s + _CLEAR_UP_S)
    parts.readiness.report(parts.bound.health)
    parts.broker.close()
    parts.manager.status(f"draining: {counted(parts.broker.num_jobs, 'job')} left")
    empty = asyncio.ensure_future(parts.broker.wait_empty())
    hurried = asyncio.ensure_future(lifecycle.hurried.wait())
    await asyncio.wait({empty, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not empty.done():
        _log.warning("ending %s that did not end in time", counted(parts.broker.num_jobs, "job"))
        parts.broker.abort_all()
        await asyncio.wait({empty}, timeout=_LAST_WORDS_S)
    empty.cancel()
    # A wedged device ends its streams here at the latest, so every job has its ending.
    await parts.executor.stop(0.0)
    # Not left to the server's grace: it would wait for every load balancer that watches health.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            await parts.broker.wait_read()
    await parts.bound.server.stop(_FLUSH_S)


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
