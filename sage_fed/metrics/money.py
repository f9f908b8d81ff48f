"""What was held, charged, given back and denied, how fast the books are, and which card prices.

Called on the event loop, and by the ledger's observers. Account names appear only where the
operator wants them in metrics.
"""

from __future__ import annotations

from sage_fed.core import UATP_PER_ATP, Tier
from sage_fed.metrics.series import Factory, MoneySeries


class MoneyMetrics:
    """Counts ATP; with `per_account_balance`, shows each account's balance under its name."""

    def __init__(self, make: Factory, *, per_account_balance: bool) -> None:
        self._series = MoneySeries(make)
        self._per_account_balance = per_account_balance

    def denied(self, reason: str, denied_uatp: int) -> None:
        """Counts what a job would have cost that was refused for money."""
        self._series.denied.labels(reason).inc(denied_uatp / UATP_PER_ATP)

    def held(self, tier: Tier, held_uatp: int) -> None:
        """Counts a hold."""
        self._series.reserved.labels(tier.name).inc(held_uatp / UATP_PER_ATP)

    def settled(self, tier: Tier, held_uatp: int, charged_uatp: int) -> None:
        """Counts a hold that ended with a price."""
        self._series.charged.labels(tier.name).inc(charged_uatp / UATP_PER_ATP)
        self._series.refunded.labels(tier.name).inc((held_uatp - charged_uatp) / UATP_PER_ATP)

    def voided(self, tier: Tier, released_uatp: int) -> None:
        """Counts a hold that was given back whole."""
        self._series.refunded.labels(tier.name).inc(released_uatp / UATP_PER_ATP)

    def balance_changed(self, account: str, balance_uatp: int) -> None:
        """Shows an account's balance, where the operator wants account names in metrics."""
        if self._per_account_balance:
            self._series.balance.labels(account).set(balance_uatp / UATP_PER_ATP)

    def ledger_committed(self, num_operations: int, latency_s: float) -> None:
        """Counts one durable group of the ledger; what `Ledger.open(on_commit=)` calls."""
        self._series.commit_seconds.observe(latency_s)
        self._series.group_size.observe(num_operations)

    def ledger_read(self, latency_s: float) -> None:
        """Counts one read of the books for a caller; what `Ledger.open(on_read=)` calls."""
        self._series.read_seconds.observe(latency_s)

    def ledger_folded(self, num_entries: int) -> None:
        """Counts entries that days stand for now; what `Ledger.open(on_fold=)` calls."""
        self._series.folded.inc(num_entries)

    def ledger_writable(self, *, writable: bool) -> None:
        """Says whether the ledger's disk takes entries; what `Ledger.open(on_disk=)` calls."""
        self._series.writable.set(writable)

    def ledger_recovered(self, voided_jobs: int, voided_uatp: int) -> None:
        """Says which holds of the daemon before this one the start had to give back."""
        self._series.recovered_jobs.set(voided_jobs)
        self._series.recovered_atp.set(voided_uatp / UATP_PER_ATP)

    def rate_card(self, version: str, *, stale: bool = False) -> None:
        """Says which card is in force, and whether it was measured on something else."""
        self._series.card.clear()
        self._series.card.labels(version).set(1)
        self._series.card_stale.set(stale)
