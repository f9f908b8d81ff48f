"""A daemon that a test may trouble as it likes, and that has to be sound afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon_process import TROUBLE, DaemonProcess
from forked_daemon import ForkedProcess
from waiting import WAIT_S

from sage_fed.ledger import check


@contextmanager
def sound_daemon(state_dir: Path, *settings: str) -> Iterator[DaemonProcess]:
    """Start it; at the end it stops in order, its books balance and its log has no trouble."""
    daemon = DaemonProcess.start(state_dir, *settings, launch=ForkedProcess)
    yield daemon
    assert 0 == daemon.stop(WAIT_S)
    report = check(state_dir / "ledger.db")
    assert ((), 0) == (report.violations, report.open_holds)
    assert not TROUBLE.search(daemon.log.read_text())
