"""The crash-safe ATP ledger: double entry in SQLite, one writer thread, group commit.

`ledger.py` is the event loop's side: operations as coroutines, the inbox, the reading thread.
`writer.py` is the thread that writes, `books.py` the bookkeeping on one connection, `schema.py` its
tables, `ledger_files.py` the files and the lock, `check.py` the audit and the backup, `entries.py`
the values that they share.
"""

from sage_fed.ledger.check import CheckReport, backup, check
from sage_fed.ledger.entries import (
    AccountTerms,
    HoldReceipt,
    HoldRequest,
    LedgerOptions,
    Page,
    Place,
    Recovery,
    Replay,
    RequestKey,
    Retention,
    Settlement,
)
from sage_fed.ledger.ledger import Ledger

__all__ = [
    "AccountTerms",
    "CheckReport",
    "HoldReceipt",
    "HoldRequest",
    "Ledger",
    "LedgerOptions",
    "Page",
    "Place",
    "Recovery",
    "Replay",
    "RequestKey",
    "Retention",
    "Settlement",
    "backup",
    "check",
]
