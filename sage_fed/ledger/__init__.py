"""The crash-safe ATP ledger: double entry in SQLite, one writer thread, group commit.

`ledger.py` is the facade for the event loop, `writer.py` its thread, `books.py` the bookkeeping
with `accounts.py`, `requests.py` and `refill.py`, `schema.py`, `store.py` and `files.py` the file,
`check.py` the audit, `clock.py` and `words.py` what they all speak of.
"""

from sage_fed.ledger.check import CheckReport, check
from sage_fed.ledger.ledger import Ledger, LedgerOptions
from sage_fed.ledger.requests import Retention
from sage_fed.ledger.words import (
    AccountTerms,
    BudgetChange,
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
    "check",
]
