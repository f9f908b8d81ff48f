"""A ledger whose process was killed in the middle of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from sage_fed import ledger as ledger_package

CHILD = Path(__file__).with_name("ledger_crash_child.py")
FOLDING_CHILD = Path(__file__).with_name("folding_ledger.py")
ROOT = Path(ledger_package.__file__).parents[2]


def live_and_be_killed(
    path: Path, life: int, num_lines: int, child: Path = CHILD
) -> list[list[str]]:
    """Run the child until it has said `num_lines`, kill it, return everything it had said."""
    command = [sys.executable, str(child), str(path), str(life)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().split() for _ in range(num_lines)]
        process.send_signal(signal.SIGKILL)
        said += [line.split() for line in process.stdout]
        assert -signal.SIGKILL == process.wait(timeout=30)
    return said
