"""Fixtures shared by all tests: one real daemon."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from daemon_process import DaemonProcess
from hypothesis import Phase, settings

# A busy machine is no wrong answer: how long an example takes is a benchmark's business.
# The suite draws the same examples every time, so that it fails for a change and never by chance.
# `make explore` looks for new ones; what it finds is kept as an @example of its property.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=3000, deadline=None, print_blob=True)
# For `make mutants`: whether a test fails is asked thousands of times, and never what fails least.
settings.register_profile(
    "mutants",
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("suite")

# Whoever starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with the bundled pair for every test that only talks to it."""
    daemon = DaemonProcess.start(tmp_path_factory.mktemp("daemon") / "state")
    yield daemon
    code = daemon.stop()
    assert 0 == code, f"the shared daemon ended with {code}:\n{daemon.log.read_text()}"
