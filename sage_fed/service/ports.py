"""What the edge asks of the floors below, and nothing more of them.

Owns no behaviour: protocols that the broker, the ledger and the daemon fulfil.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol, TypeVar

from sage_fed.core import (
    Budget,
    BudgetChange,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    Delta,
    Event,
    Finished,
    JobSpec,
    ModelStatus,
    Prompt,
    Quote,
    RunningJob,
    Started,
    Tier,
)
from sage_fed.ledger.entries import Page, Place

T = TypeVar("T")


class EventStream(Protocol):
    """One job's events: Started, Delta..., Finished; or a `SageFedError` that ended it."""

    @property
    def job_id(self) -> str:
        """The job's id."""

    @property
    def kept_bytes(self) -> int:
        """What it keeps for a reader that is behind, about."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Read the events, once; a slow reader finds its deltas merged."""

    async def answer(self) -> tuple[Started, Delta, Finished]:
        """Wait for all of them, the deltas as one; instead of iterating."""

    def cancel(self) -> None:
        """Say that nobody reads any more. Never blocks; after the ending it does nothing."""


class Jobs(Protocol):
    """The broker."""

    async def submit(self, spec: JobSpec, arrived: float) -> EventStream:
        """Accept a job: return once its hold is durable. `arrived` is `time.monotonic()`.

        Cancelled while it waits, it cancels the job itself: the caller has no stream to
        cancel yet. Raises `SageFedError` where the job is refused; nothing is held then.
        """

    async def quote(self, spec: JobSpec) -> Quote:
        """Say what the job would cost and which route it would take; no side effect."""

    async def count_tokens(self, prompt: Prompt, tier: Tier, account: str) -> tuple[int, int]:
        """Return the prompt's tokens and the tier's longest context, in tokens."""

    def abort(self, job_id: str) -> bool:
        """End a running job for an operator; False where there is none of that id."""

    def running(self) -> tuple[RunningJob, ...]:
        """Return every accepted job that has not ended."""


class Books(Protocol):
    """The ledger, as far as the edge reads and sets it."""

    async def budget(self, account: str) -> Budget:
        """Return the account's books now, refill included. Raises `NoSuchAccount`."""

    async def page(
        self,
        account: str,
        place: Place | None,
        limit: int,
        render: Callable[[Page], T],
    ) -> T:
        """Return what `render` makes of up to `limit` entries from a place on, newest first.

        It is called on another thread. Raises `NoSuchAccount`, and `QueueFull` where the account
        has too many reads waiting.
        """

    async def set_budget(self, account: str, change: BudgetChange) -> Budget:
        """Create or change an account. Raises `InvalidField` named as in `BudgetChange`."""

    async def held_total_uatp(self) -> int:
        """Return what is held now, over all accounts."""


class Operations(Protocol):
    """The daemon as a whole."""

    def models(self) -> tuple[ModelStatus, ...]:
        """Return both tiers' models, whatever their state."""

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""

    def drain(self, grace_s: float | None) -> int:
        """Start to drain (idempotent; None is the setting's grace); jobs still running."""

    def calibrate(self, *, quick: bool, adopt: bool) -> AsyncGenerator[CalibrationEvent, None]:
        """Measure and write a card; closing the generator ends it without a trace.

        Raises `CalibrationRunning`, `DeviceBusy`, `TierUnavailable` or `DeviceOutOfMemory`.
        """

    async def adopt_card(self, version: str) -> CardStatus:
        """Put a card in force for new jobs; `NotFound` where there is none of that version."""
