"""Fixtures shared by all tests: one real daemon."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest
from daemon_process import DaemonProcess

# A busy machine is no wrong answer: how long an example takes is a benchmark's business.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

# Whoever starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with the bundled pair for every test that only talks to it."""
    daemon = DaemonProcess.start(tmp_path_factory.mktemp("daemon") / "state")
    yield daemon
    code = daemon.stop()
    assert 0 == code, f"the shared daemon ended with {code}:\n{daemon.log.read_text()}"
