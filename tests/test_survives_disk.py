"""A daemon whose disk fills up or turns read-only: refusals in words, no restart, right books."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import apsw
import pytest
from daemon_process import TROUBLE, DaemonProcess, serve_arguments
from forked_daemon import ForkedProcess
from small_disks import Disk, small_ext4, small_tmpfs
from waiting import WAIT_S, until

from sage_fed.auth import digest_of, new_token
from sage_fed.cli import top
from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, UATP_PER_ATP, Delta, Event, Finished, StopReason, Tier
from sage_fed.errors import LedgerBlocked, SageFedError, Unauthenticated
from sage_fed.ledger import check

SETTINGS = (
    *("--set", "budget.initial_atp=1000000", "--set", "budget.capacity_atp=1000000"),
    *("--set", "budget.refill_atp_per_s=0", "--set", "limits.max_new_tokens=900"),
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_tmpfs(tmp_path / "disk", "2m") as disk:
        yield disk


def start(disk: Disk, log: Path, *, ready: bool = True) -> DaemonProcess:
    """A daemon whose state is on the disk, and whose log is not."""
    state = disk.path / "state"
    state.mkdir(exist_ok=True)
    (state / "daemon.log").unlink(missing_ok=True)
    (state / "daemon.log").symlink_to(log)
    log.touch()
    tiers = tuple(tier.name for tier in TIER_ROLES) if ready else ()
    return DaemonProcess.start(state, *SETTINGS, wait_for=tiers, launch=ForkedProcess)


def small(client: Client) -> Finished:
    return client.generate("count", tier=Tier.TACTICAL, max_new_tokens=2, ignore_eos=True).finished


def until_blocked(client: Client) -> int:
    """Ask until the ledger takes nothing more; returns what was charged on the way."""
    charged_uatp = 0
    for _ in range(5000):
        try:
            charged_uatp += small(client).price.charged_uatp
        except LedgerBlocked:
            return charged_uatp
    raise AssertionError("the disk does not fill up")


def writable(daemon: DaemonProcess) -> float | None:
    page = top.Page.read(top.fetch(daemon.metrics_url), 0.0)
    return page.total("sage_fed_ledger_writable")


def served(client: Client) -> bool:
    try:
        return small(client).stop_reason is StopReason.LENGTH
    except LedgerBlocked:
        return False


def let_in(client: Client) -> bool:
    try:
        client.status()
    except Unauthenticated:
        return False
    return True


def test_a_full_disk_refuses_jobs_and_passes(disk: Disk, tmp_path: Path) -> None:
    """New jobs are told to come back, a running one is finished and charged, nobody restarts."""
    log = tmp_path / "daemon.log"
    daemon = start(disk, log)
    with Client(daemon.address) as client, ThreadPoolExecutor(1) as threads:
        spent_uatp = small(client).price.charged_uatp
        events: Iterator[Event] = client.stream(
            "count", tier=Tier.STRATEGIC, max_new_tokens=900, ignore_eos=True
        )
        next(event for event in events if isinstance(event, Delta))
        disk.fill()
        spent_uatp += until_blocked(client)
        running = threads.submit(lambda: [*events][-1])
        assert 0.0 == writable(daemon)
        assert client.budget().held_uatp > 0
        with pytest.raises(LedgerBlocked) as refused:
            small(client)
        assert refused.value.retry_after_s
        assert "/" not in refused.value.message
        disk.free()
        until(lambda: writable(daemon) == 1.0, "the ledger does not recover")
        finished = running.result(WAIT_S)
        assert isinstance(finished, Finished)
        assert (StopReason.LENGTH, 900) == (finished.stop_reason, finished.usage.output_tokens)
        spent_uatp += finished.price.charged_uatp
        spent_uatp += small(client).price.charged_uatp
        budget = client.budget()
        assert (0, spent_uatp) == (budget.held_uatp, budget.discharged_uatp)
    assert 0 == daemon.stop(WAIT_S)
    report = check(disk.path / "state" / "ledger.db")
    assert ((), 0) == (report.violations, report.open_holds)
    assert not TROUBLE.search(log.read_text())


def test_another_program_that_locks_the_ledger_passes(disk: Disk, tmp_path: Path) -> None:
    """Jobs are told to come back, a running one is charged, a token made meanwhile works later."""
    log, path = tmp_path / "daemon.log", disk.path / "state" / "ledger.db"
    daemon = start(disk, log)
    with Client(daemon.address) as client, ThreadPoolExecutor(1) as threads:
        events: Iterator[Event] = client.stream(
            "count", tier=Tier.STRATEGIC, max_new_tokens=200, ignore_eos=True
        )
        next(event for event in events if isinstance(event, Delta))
        with contextlib.closing(apsw.Connection(str(path))) as other:
            other.execute("BEGIN IMMEDIATE")
            running = threads.submit(lambda: [*events][-1])
            with pytest.raises(LedgerBlocked):
                small(client)
            token = new_token()
            tokens = disk.path / "state" / "tokens.toml"
            tokens.write_text(f'[[token]]\nsha256 = "{digest_of(token).hex()}"\naccount = "ann"\n')
            with pytest.raises(LedgerBlocked):
                small(client)
            assert 0.0 == writable(daemon)
            other.execute("ROLLBACK")
        finished = running.result(WAIT_S)
        assert isinstance(finished, Finished)
        assert 200 == finished.usage.output_tokens
        until(lambda: served(client), "the ledger does not recover")
    with Client(daemon.address, token) as ann:
        until(lambda: let_in(ann), "the token never worked")
        small(ann)
    assert 0 == daemon.stop(WAIT_S)
    assert "another program has locked the ledger" in log.read_text()
    assert not TROUBLE.search(log.read_text())
    report = check(path)
    assert ((), 0) == (report.violations, report.open_holds)


def test_a_daemon_killed_on_a_full_disk_starts_when_there_is_room(
    disk: Disk, tmp_path: Path
) -> None:
    """Until then it says what is missing and exits; afterwards the books are as they were."""
    log = tmp_path / "daemon.log"
    daemon = start(disk, log)
    with Client(daemon.address) as client:
        disk.fill()
        spent_uatp = until_blocked(client)
    daemon.kill()
    disk.fill()
    with pytest.raises(AssertionError, match=r"(?i)no space left on"):
        start(disk, log)
    assert not TROUBLE.search(log.read_text())
    disk.free()
    again = start(disk, log)
    with Client(again.address) as client:
        budget = client.budget()
        assert (0, spent_uatp) == (budget.held_uatp, budget.discharged_uatp)
        assert StopReason.LENGTH is small(client).stop_reason
    assert 0 == again.stop(WAIT_S)
    assert () == check(disk.path / "state" / "ledger.db").violations


def test_what_a_killed_daemon_left_is_said_at_the_next_start(tmp_path: Path) -> None:
    """In the log, in the status and in the metrics: how many jobs, and how much was given back."""
    state = tmp_path / "state"
    killed = DaemonProcess.start(state, *SETTINGS, launch=ForkedProcess)
    with Client(killed.address) as client:
        stream = client.stream("count", tier=Tier.STRATEGIC, max_new_tokens=500, ignore_eos=True)
        next(stream)
        held_uatp = client.budget().held_uatp
        assert held_uatp
        killed.kill()
    again = DaemonProcess.start(state, *SETTINGS, launch=ForkedProcess)
    with Client(again.address) as client:
        status = client.status()
    assert (1, held_uatp) == (status.recovered_jobs, status.recovered_uatp)
    page = top.Page.read(top.fetch(again.metrics_url), 0.0)
    assert 1.0 == page.total("sage_fed_ledger_recovered_jobs")
    assert held_uatp / UATP_PER_ATP == page.total("sage_fed_ledger_recovered_atp")
    assert 0 == again.stop(WAIT_S)
    assert "did not end 1 job" in again.log.read_text()


def test_a_read_only_disk_is_said_in_words(disk: Disk, tmp_path: Path) -> None:
    """The start fails with what is the matter, and changes nothing."""
    log = tmp_path / "daemon.log"
    daemon = start(disk, log)
    with Client(daemon.address) as client:
        spent_uatp = small(client).price.charged_uatp
    assert 0 == daemon.stop(WAIT_S)
    disk.remount("ro")
    process = ForkedProcess(
        ("serve", "--profile", "demo", "--listen", "127.0.0.1:0", "--metrics-listen",
         "127.0.0.1:0", "--state-dir", str(disk.path / "state")),
        log,
    )  # fmt: skip
    assert 1 == process.wait(WAIT_S)
    assert "Read-only file system" in log.read_text()
    assert not TROUBLE.search(log.read_text())
    disk.remount("rw")
    again = start(disk, log)
    with Client(again.address) as client:
        assert spent_uatp == client.budget().discharged_uatp
    assert 0 == again.stop(WAIT_S)


def unstarted(disk: Disk, log: Path, *more: str) -> str:
    """The log of a daemon that cannot start now; its manager is to try again."""
    process = ForkedProcess(serve_arguments(disk.path / "state", *more), log)
    assert 1 == process.wait(WAIT_S), log.read_text()
    said = log.read_text()
    assert not TROUBLE.search(said)
    return said


def ended_or_listening(process: ForkedProcess, state: Path) -> bool:
    return process.poll() is not None or (state / "endpoint.json").exists()


@pytest.mark.slow
def test_a_disk_without_inodes_is_nobodys_setting(tmp_path: Path) -> None:
    """Whichever file of a start is the one too many: exit code 1, in words, until there is room."""
    log = tmp_path / "daemon.log"
    files: set[str] = set()
    with small_tmpfs(tmp_path / "disk", "4m", "nr_inodes=2") as disk:
        (disk.path / "state").mkdir(mode=0o700)
        for free in range(20):
            disk.remount(f"nr_inodes={2 + free}")
            process = ForkedProcess(
                serve_arguments(disk.path / "state", "--listen", f"unix:{disk.path}/state/sock"),
                log,
            )
            until(partial(ended_or_listening, process, disk.path / "state"))
            if process.poll() is None:
                break
            assert 1 == process.wait(WAIT_S), log.read_text()
            files |= {path.name for path in (disk.path / "state").iterdir()}
        else:
            raise AssertionError("it never started")
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(WAIT_S), log.read_text()
        assert () == check(disk.path / "state" / "ledger.db").violations
    said = log.read_text()
    assert not TROUBLE.search(said)
    assert {"ledger.db", "admin.token"} <= files, "it failed behind these, too"
    for last in ("ledger.db", "admin.token", "cannot bind unix:", "endpoint.json"):
        assert last in said


def test_no_room_for_the_admin_token_or_the_socket_passes(tmp_path: Path) -> None:
    """The books are there and open; what is written behind them is no setting either."""
    log = tmp_path / "daemon.log"
    state = tmp_path / "disk" / "state"
    with small_tmpfs(tmp_path / "disk", "4m", "nr_inodes=40") as disk:
        first = DaemonProcess.start(state, *SETTINGS, launch=ForkedProcess)
        assert 0 == first.stop(WAIT_S)
        (state / "daemon.log").unlink()
        (state / "admin.token").unlink()
        taken = 2 + sum(1 for _ in state.iterdir())
        # Of a start's files the books' two logs come first.
        disk.remount(f"nr_inodes={taken + 2}")
        assert "admin.token: No space left on device" in unstarted(disk, log)
        disk.remount(f"nr_inodes={taken + 3}")
        assert "cannot bind unix:" in unstarted(disk, log, "--listen", f"unix:{state}/sock")
        (state / "admin.token").unlink()
        assert "endpoint.json: No space left on device" in unstarted(disk, log)
        disk.remount(f"nr_inodes={taken + 10}")
        again = start(disk, log)
        assert 0 == again.stop(WAIT_S)


def test_a_disk_that_turns_read_only_under_the_daemon(tmp_path: Path) -> None:
    """As a file system does that found an error: jobs are refused, and the books stay whole."""
    log, image = tmp_path / "daemon.log", tmp_path / "disk.img"
    with small_ext4(tmp_path / "disk", image) as disk:
        daemon = start(disk, log)
        with Client(daemon.address) as client:
            spent_uatp = small(client).price.charged_uatp
            disk.remount("abort")
            refused: SageFedError | None = None
            while refused is None:
                try:
                    spent_uatp += small(client).price.charged_uatp
                except SageFedError as error:
                    refused = error
            assert refused.reason in ("LEDGER_BLOCKED", "LEDGER_DOWN", "CANNOT_CONNECT")
        code = daemon.stop(WAIT_S)
        assert "Read-only file system" in log.read_text() or "disk I/O error" in log.read_text()
        assert code in (0, 1)
    with small_ext4(tmp_path / "disk", image) as disk:
        again = start(disk, log)
        with Client(again.address) as client:
            budget = client.budget()
            assert 0 == budget.held_uatp
            assert spent_uatp == budget.discharged_uatp
        assert 0 == again.stop(WAIT_S)
        assert () == check(disk.path / "state" / "ledger.db").violations
