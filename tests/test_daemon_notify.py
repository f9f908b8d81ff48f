"""What a real daemon tells its service manager, from its start to its stop."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from daemon_process import DaemonProcess, launch, serve_arguments
from grpc_health.v1 import health_pb2, health_pb2_grpc
from surroundings import MODELS

WAIT_S = 60.0
_BYE = "BYE"


class Manager:
    """The manager's end of NOTIFY_SOCKET: what was said, in order."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._news = threading.Condition()
        self.said: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def wait(self, wanted: str) -> None:
        """Wait until it is said."""
        with self._news:
            assert self._news.wait_for(lambda: wanted in self.said, WAIT_S), self.said

    def rest(self) -> list[str]:
        """All that was said, now that nobody is left to say more."""
        self.close()
        return [message for message in self.said if message != _BYE]

    def close(self) -> None:
        """Stop listening."""
        if self._thread.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(_BYE.encode(), self._path)
            self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while _BYE not in self.said:
            message = self._socket.recv(4096).decode()
            with self._news:
                self.said.append(message)
                self._news.notify_all()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager whom the next daemon is told of."""
    path = tmp_path / "notify"
    listening = Manager(path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield listening
    listening.close()


def test_ready_is_said_when_the_tactical_tier_serves(manager: Manager, tmp_path: Path) -> None:
    """While strategic still loads, health agrees; then the watchdog is fed, and the stop told."""
    model = tmp_path / "slow-model"
    shutil.copytree(MODELS / "demo-strategic", model)
    kept = (model / "config.json").rename(model / "config.kept")
    # Loading waits inside open() until somebody writes.
    os.mkfifo(model / "config.json")
    daemon = DaemonProcess.start(
        tmp_path / "state", "--set", f"strategic.model={model}", wait_for=()
    )
    try:
        manager.wait("READY=1")
        with grpc.insecure_channel(daemon.address) as channel:
            ask = health_pb2.HealthCheckRequest(service="")
            health = health_pb2_grpc.HealthStub(channel).Check(ask, timeout=WAIT_S)
        assert health_pb2.HealthCheckResponse.SERVING == health.status
        assert "STATUS=tactical serves; strategic: 0 % of the weights" in manager.said
        # The start was given time for as long as it got on.
        assert "EXTEND_TIMEOUT_USEC=300000000" in manager.said
        manager.wait("WATCHDOG=1")
        # The name is a file's before the waiting reader gets on: it is read more than once.
        with (model / "config.json").open("w") as waiting:
            kept.rename(model / "config.json")
            waiting.write((model / "config.json").read_text())
        manager.wait("STATUS=tactical serves; strategic serves")
        daemon.process.send_signal(signal.SIGTERM)
        assert 0 == daemon.process.wait(WAIT_S)
    finally:
        daemon.kill()
    said = manager.rest()
    assert ["STOPPING=1", "EXTEND_TIMEOUT_USEC=75000000"] == [
        line for line in said if line.startswith(("STOPPING", "EXTEND"))
    ][-2:]
    assert "STATUS=stopped" == said[-1]
    assert 1 == said.count("READY=1")


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("tactical.max_batch=0", "STATUS=error: tactical.max_batch (flag): "),
        ("tactical.model=/no/such/place", "STATUS=error: tactical.model: there is no directory"),
        ("rate_card=no-such-card", "STATUS=error: rate_card"),
    ],
)
def test_a_failed_start_leaves_its_reason(
    manager: Manager, tmp_path: Path, assignment: str, named: str
) -> None:
    """The last status is the sentence of the log, with the field; READY was never said."""
    process = launch(serve_arguments(tmp_path / "state", "--set", assignment), tmp_path / "log")
    assert 78 == process.wait(WAIT_S)
    said = manager.rest()
    assert said[-1].startswith(named)
    assert said[-1].removeprefix("STATUS=") in (tmp_path / "log").read_text()
    assert "READY=1" not in said


def test_a_model_that_does_not_load_leaves_its_reason(manager: Manager, tmp_path: Path) -> None:
    """It is no matter of settings: exit code 1, so that the manager tries again."""
    model = tmp_path / "broken"
    shutil.copytree(MODELS / "demo-tactical", model)
    (model / "model.safetensors").write_bytes(b"broken")
    arguments = serve_arguments(tmp_path / "state", "--set", f"tactical.model={model}")
    process = launch(arguments, tmp_path / "log")
    assert 1 == process.wait(WAIT_S)
    assert manager.rest()[-1].startswith("STATUS=the tactical tier did not load: model broken")
