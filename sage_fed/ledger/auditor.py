"""The audit of all entries, beside the writer: what a start of many entries has no time for.

Owns a thread, a connection and one snapshot of the books. Knows no repair and no verdict: whoever
asked is told what does not balance, once, and nothing where everything does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from sage_fed.errors import SageFedError
from sage_fed.ledger import store
from sage_fed.ledger.check import balance_violations

log = logging.getLogger(__name__)

_NICE = 10
"""Everybody else's work is more urgent."""


class Auditor:
    """One audit; `start` it, `stop` it. `on_violations` is called on its thread."""

    def __init__(self, path: Path, on_violations: Callable[[tuple[str, ...]], None]) -> None:
        self._path = path
        self._on_violations = on_violations
        self._stopped = threading.Event()
        self._db: apsw.Connection | None = None
        self._thread = threading.Thread(target=self._run, name="ledger-audit", daemon=True)

    def start(self) -> None:
        """Begin; the books have been opened by their writer."""
        self._thread.start()

    def stop(self) -> None:
        """End it, wherever it is, and wait for that."""
        self._stopped.set()
        while self._thread.is_alive():
            # Again and again: an interruption between two statements is none.
            if self._db is not None:
                with contextlib.suppress(apsw.ConnectionClosedError):
                    self._db.interrupt()
            self._thread.join(0.01)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a kernel that allows no thread its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        began_s = time.monotonic()
        try:
            with contextlib.closing(store.connect_reader(self._path)) as db:
                self._db = db
                db.execute("BEGIN")
                violations = balance_violations(db)
        except (apsw.Error, SageFedError) as error:
            violations = (f"they could not be audited: {error}",)
        if self._stopped.is_set():
            return
        if violations:
            self._on_violations(violations)
        else:
            log.info("the books balance, all entries audited in %.1f s", time.monotonic() - began_s)
