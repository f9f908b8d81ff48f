"""Real daemons, forked from a server that has torch imported already.

Importing torch and transformers is nearly all of a daemon's start. A test that starts and kills
many of them forks them instead: each is a process of its own, with its own command line, signals
and exit code.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOAD = ("__main__", "forked_daemon", "sage_fed.cli.serve", "sage_fed.daemon")


class ForkedProcess:
    """As much of `subprocess.Popen` as `DaemonProcess` needs.

    `prepare` is called in the process before anything starts: a test's own interference.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        self.args = arguments
        self._process: ForkServerProcess = fork_context().Process(
            target=_main, args=(tuple(arguments), str(log), prepare), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit code, or `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def fork_context() -> ForkServerContext:
    """How to fork a process that has the daemon's imports, and the client's."""
    context = multiprocessing.get_context("forkserver")
    # Only the first call of a process counts; it is the same list every time.
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _main(arguments: Sequence[str], log: str, prepare: Callable[[], None] | None) -> None:
    """In the forked process: become `sage-fed <arguments>`."""
    for name in [name for name in os.environ if "SAGE_FED" in name]:
        del os.environ[name]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    sys.argv = ["sage-fed", *arguments]
    if prepare is not None:
        prepare()
    from sage_fed.cli import main  # noqa: PLC0415 - as the console script does

    main()
