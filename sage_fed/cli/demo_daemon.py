"""The demo's own daemon: a real process on free ports with fresh books.

Owns: starting it, learning its ports, noticing its death, stopping it.
Does not know: what is asked of it.
Fails: `DaemonDied` with the end of its log where it ends, or takes too long to start or stop.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sage_fed.errors import SageFedError

_ENDPOINT = "endpoint.json"
_POLL_S = 0.02
_LOG_LINES = 15


class DaemonDied(SageFedError):
    """The daemon's process ended when it should not have, or not when it should."""

    reason = "DAEMON_DIED"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the daemon listens, as it wrote it down once bound."""

    listen: str
    metrics: str

    @property
    def metrics_url(self) -> str:
        """The page that Prometheus scrapes."""
        return f"http://{self.metrics}/metrics"


class DemoDaemon:
    """`sage-fed serve --profile demo` as a subprocess; its state and log are in `state_dir`."""

    def __init__(self, state_dir: Path, *arguments: str, interpreter: str = sys.executable) -> None:
        """Start the process, with further flags of `serve`; it is not serving yet.

        `interpreter` is the one of another installation, for benchmarks that compare two.
        """
        self.state_dir = state_dir
        # A file of an earlier daemon would send us to its ports.
        (state_dir / _ENDPOINT).unlink(missing_ok=True)
        # The demo shows the shipped settings, whatever the caller's environment says.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SAGE_FED_")}
        with (state_dir / "daemon.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [
                    # -P: what is installed, and not what the working directory may have.
                    interpreter, "-P", "-m", "sage_fed.cli", "serve", "--profile", "demo",
                    "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                    "--state-dir", str(state_dir), *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                # Ctrl-C is for the demo, which then stops the daemon properly.
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process, to measure it by."""
        return self._process.pid

    def endpoint(self, deadline_s: float) -> Endpoint:
        """Wait until the daemon has bound its ports."""
        path = self.state_dir / _ENDPOINT
        until = time.monotonic() + deadline_s
        while not path.exists():
            self.check()
            if time.monotonic() > until:
                raise DaemonDied(f"the daemon bound no port in {deadline_s:.0f} s:\n{self.log()}")
            # Across processes the file is the only event there is.
            time.sleep(_POLL_S)
        body = json.loads(path.read_text())
        return Endpoint(body["listen"], body["metrics"])

    def check(self) -> None:
        """Raise where the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise DaemonDied(f"the daemon ended with exit code {code}:\n{self.log()}")

    def log(self) -> str:
        """The last lines that it logged."""
        lines = (self.state_dir / "daemon.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def stop(self, deadline_s: float) -> int:
        """SIGTERM, then its exit code; killed where it does not leave in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DaemonDied(
                f"the daemon did not leave in {deadline_s:.0f} s:\n{self.log()}"
            ) from None
