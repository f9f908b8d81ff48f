"""Fixtures shared by all tests: the bundled pair, and one real daemon."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess

MODELS = Path(__file__).parent.parent / "sage_fed" / "models"


def require_tool(name: str) -> str:
    """Return the path of a system tool; skip where it is missing, fail in CI."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail(f"{name} is not installed, and REQUIRE_TOOLS is set")
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="session")
def demo_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with the bundled pair for every test that only talks to it."""
    daemon = DaemonProcess.start(tmp_path_factory.mktemp("daemon") / "state")
    yield daemon
    code = daemon.stop()
    assert 0 == code, f"the shared daemon ended with {code}:\n{daemon.log.read_text()}"
