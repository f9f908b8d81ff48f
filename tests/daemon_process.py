"""A real daemon as a real process, for tests that talk to it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from forked_daemon import ForkedProcess
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_DEADLINE_S = 60.0

TROUBLE = re.compile(r'Traceback|"exception"|internal error')
"""In a daemon's log: a bug of ours, whatever the client was told."""

Process = subprocess.Popen[bytes] | ForkedProcess
Launch = Callable[[Sequence[str], Path], Process]
"""From the command line behind `sage-fed` and the log file to the running process."""


def launch(arguments: Sequence[str], log: Path, **more: str) -> Process:
    """Start a fresh interpreter, as a shell or systemd does; `more` goes into its environment."""
    environ = {key: value for key, value in os.environ.items() if "SAGE_FED" not in key}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "sage_fed.cli", *arguments],
            stdout=output,
            stderr=output,
            env=environ | more,
        )


def serve_arguments(state_dir: Path, *more: str) -> tuple[str, ...]:
    """The command line of a demo daemon on free loopback ports."""
    return (
        "serve", "--profile", "demo", "--listen", "127.0.0.1:0",
        "--metrics-listen", "127.0.0.1:0", "--state-dir", str(state_dir), *more,
    )  # fmt: skip


@dataclass
class DaemonProcess:
    """`sage-fed serve` on free loopback ports, with its own state directory."""

    process: Process
    state_dir: Path
    log: Path
    address: str = ""
    metrics_url: str = ""

    @classmethod
    def start(
        cls,
        state_dir: Path,
        *arguments: str,
        wait_for: tuple[str, ...] = ("tactical", "strategic"),
        launch: Launch = launch,
        connect: Callable[[str], grpc.Channel] = grpc.insecure_channel,
    ) -> DaemonProcess:
        """Start it and wait until the given health services are SERVING."""
        state_dir.mkdir(parents=True, exist_ok=True)
        endpoint = state_dir / "endpoint.json"
        endpoint.unlink(missing_ok=True)
        log = state_dir / "daemon.log"
        process = launch(serve_arguments(state_dir, *arguments), log)
        daemon = cls(process, state_dir, log)
        deadline = time.monotonic() + START_DEADLINE_S
        while not endpoint.exists():
            daemon._still_starting(deadline)
        where = json.loads(endpoint.read_text())
        daemon.address = where["listen"]
        daemon.metrics_url = f"http://{where['metrics']}/metrics"
        with connect(daemon.address) as channel:
            for service in wait_for:
                daemon._watch_until_serving(channel, service, deadline)
        return daemon

    def _watch_until_serving(self, channel: grpc.Channel, service: str, deadline: float) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        watch = stub.Watch(request, timeout=deadline - time.monotonic(), wait_for_ready=True)
        for response in watch:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                watch.cancel()
                return
        raise AssertionError(f"{service} never served:\n{self.log.read_text()}")

    def _still_starting(self, deadline: float) -> None:
        assert self.process.poll() is None, f"the daemon died:\n{self.log.read_text()}"
        assert time.monotonic() < deadline, f"the daemon hangs:\n{self.log.read_text()}"
        # The endpoint file is the event; there is nothing else to wait on across processes.
        time.sleep(0.02)

    @property
    def admin_token(self) -> str:
        """The token that the daemon wrote for admins of this machine."""
        return (self.state_dir / "admin.token").read_text().strip()

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL: no goodbye of any kind."""
        self.process.kill()
        self.process.wait(30)
