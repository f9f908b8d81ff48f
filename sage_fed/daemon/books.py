"""The ledger as the settings want it: where it lies, how long it keeps, who has an account.

Owns what of the books follows from the settings. Knows nothing of what is booked. Fails with
`LedgerCorrupt` or `LedgerUnusable`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from sage_fed.core import counted
from sage_fed.daemon.lifecycle import Lifecycle
from sage_fed.errors import LedgerDown, SageFedError
from sage_fed.ledger import AccountTerms, Ledger, LedgerOptions, Retention
from sage_fed.metrics import Metrics
from sage_fed.settings import Settings, atp_from_uatp

_log = logging.getLogger(__name__)


async def open_ledger(
    settings: Settings, metrics: Metrics, lifecycle: Lifecycle, accepts: Callable[[bool], None]
) -> Ledger:
    """Open the books in the state directory; should they fail later, the daemon stops.

    `accepts` is told when they begin or cease to take entries.
    """

    def on_disk(writable: bool) -> None:
        metrics.money.ledger_writable(writable=writable)
        accepts(writable)

    ledger = await Ledger.open(
        settings.state_dir / "ledger.db",
        options=LedgerOptions(
            retention=Retention(
                keep_s=settings.ledger.result_retention_s,
                entries_s=settings.ledger.entry_retention_s,
            ),
            account_reads=settings.ledger.account_reads,
            commit_timeout_s=settings.ledger.commit_timeout_s,
        ),
        terms=lambda account: _terms(settings, account),
        on_commit=metrics.money.ledger_committed,
        on_read=metrics.money.ledger_read,
        on_fold=metrics.money.ledger_folded,
        on_disk=on_disk,
        on_death=lambda error: lifecycle.fail(f"the ledger failed: {_words(error)}"),
    )
    recovery = ledger.recovery
    metrics.money.ledger_recovered(recovery.voided_jobs, recovery.voided_uatp)
    if recovery.voided_jobs:
        _log.warning(
            "the daemon before this one did not end %s: %s ATP were given back, nothing charged",
            counted(recovery.voided_jobs, "job"),
            f"{atp_from_uatp(recovery.voided_uatp):f}",
        )
    return ledger


async def open_accounts(ledger: Ledger, settings: Settings, accounts: Collection[str]) -> None:
    """See that these accounts exist, on the terms that the settings give them now."""
    try:
        for account in sorted(accounts):
            await ledger.ensure_account(account, _terms(settings, account))
    except LedgerDown as down:
        # A client is only told that it is down; who starts the daemon has to know why.
        if isinstance(down.__cause__, SageFedError):
            raise down.__cause__ from None
        raise


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, SageFedError) else f"{error!r}; see the log"


def _terms(settings: Settings, account: str) -> AccountTerms:
    budget = settings.account_budget(account)
    return AccountTerms(
        capacity_uatp=budget.capacity_uatp,
        refill_uatp_per_s=budget.refill_uatp_per_s,
        strategic_floor_uatp=budget.strategic_floor_uatp,
        initial_uatp=budget.initial_uatp,
    )
