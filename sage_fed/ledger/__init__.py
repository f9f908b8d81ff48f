"""The crash-safe ATP ledger: double entry in SQLite, one writer thread, group commit.

`ledger.py` is the facade for the event loop over its `inbox.py`, `writer.py` the thread that
writes, `reader.py` the one that reads for clients,
`books.py` the bookkeeping with `accounts.py`, `requests.py` and `refill.py`, `schema.py`,
`store.py`, `files.py` and `lock.py` the file, `days.py` what is left of old entries, `check.py` the
audit and `auditor.py` its thread, `backup.py` the copy,
`clock.py` and `words.py` what they all speak of.
"""

from sage_fed.ledger.backup import backup
from sage_fed.ledger.check import CheckReport, check
from sage_fed.ledger.inbox import LedgerOptions
from sage_fed.ledger.ledger import Ledger
from sage_fed.ledger.requests import Retention
from sage_fed.ledger.words import (
    AccountTerms,
    BudgetChange,
    Day,
    Entry,
    EntryKind,
    HoldReceipt,
    HoldRequest,
    Recovery,
    Release,
    Replay,
    Settlement,
)

__all__ = [
    "AccountTerms",
    "BudgetChange",
    "CheckReport",
    "Day",
    "Entry",
    "EntryKind",
    "HoldReceipt",
    "HoldRequest",
    "Ledger",
    "LedgerOptions",
    "Recovery",
    "Release",
    "Replay",
    "Retention",
    "Settlement",
    "backup",
    "check",
]
