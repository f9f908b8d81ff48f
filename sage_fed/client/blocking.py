"""The blocking client, for scripts and notebooks.

Owns one channel; use it as a context manager. It blocks: not for an event loop.
Every method raises the error tree: `InvalidField`, `CannotAfford`, ..., `CannotConnect` where
nobody answers, `CallFailed` for a status that is none of ours.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from sage_fed.client import asks
from sage_fed.client.answers import Answer, EntryPage, LoadReport, TokenCount
from sage_fed.client.asks import Ask
from sage_fed.client.channel import (
    DEFAULT_TIMEOUT_S,
    Tls,
    metadata_of,
    open_channel,
    serialize,
)
from sage_fed.client.failures import error_of
from sage_fed.client.requests import JobFields, PromptLike, TierName, job_of
from sage_fed.core import (
    Budget,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    Event,
    Message,
    ModelStatus,
    Quote,
    Tier,
)
from sage_fed.ledger.entries import BudgetChange, Day, Entry

T = TypeVar("T")

MAX_PAGE_SIZE = 1000
"""The most entries that the daemon gives at once."""


class Client:
    """A daemon at `address` (HOST:PORT or unix:/PATH), called as the bearer of `token`.

    With `tls` the connection is encrypted, and the daemon has to prove who it is.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._address = address
        self._metadata = metadata_of(token)
        self._tls = tls
        self._timeout_s = timeout_s
        self._channel = open_channel(address, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running streams are cancelled."""
        self._channel.close()

    def stream(
        self, prompt: PromptLike, **fields: Unpack[JobFields]
    ) -> Generator[Event, None, None]:
        """Run a job and yield its events; leaving the loop early cancels the job."""
        return self._stream(asks.stream(job_of(prompt, **fields)))

    def _stream(self, ask: Ask[T]) -> Generator[T, None, None]:
        method = self._channel.unary_stream(ask.method, serialize, ask.reply.FromString)
        call = method(ask.request, metadata=self._metadata)
        try:
            for reply in call:
                yield ask.read(reply)
        except grpc.RpcError as error:
            raise error_of(error, self._address, self._tls) from None
        finally:
            call.cancel()  # type: ignore[no-untyped-call] # the stubs forgot its types

    def generate(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Answer:
        """Run a job and return its whole answer."""
        return self._ask(asks.generate(job_of(prompt, **fields)))

    def quote(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Quote:
        """Return what the job would cost at most and which route it would take."""
        return self._ask(asks.quote(job_of(prompt, **fields)))

    def count_tokens(
        self, prompt: str | Sequence[Message], tier: Tier | TierName = Tier.TACTICAL
    ) -> TokenCount:
        """Return the prompt's tokens as the tier's model would see them."""
        return self._ask(asks.count_tokens(prompt, tier))

    def budget(self) -> Budget:
        """Return the caller's own books."""
        return self._ask(asks.budget())

    def entries_page(self, page_size: int = 50, page_token: str = "") -> EntryPage:
        """Return one page of the caller's own ledger, newest first."""
        return self._ask(asks.entries(page_size, page_token))

    def entries(self, limit: int = 50) -> tuple[Entry, ...]:
        """Return the newest `limit` entries of the caller's own ledger, newest first."""
        return self.books(limit).entries

    def books(self, limit: int = 50) -> EntryPage:
        """Return the newest `limit` lines of the caller's own ledger, newest first.

        Entries, and where there are fewer of them, days that stand for older ones.
        """
        entries: list[Entry] = []
        days: list[Day] = []
        token = ""
        while (left := limit - len(entries) - len(days)) > 0:
            page = self.entries_page(min(left, MAX_PAGE_SIZE), token)
            entries += page.entries
            days += page.days
            token = page.next_page_token
            if not token:
                break
        return EntryPage(tuple(entries), token, tuple(days))

    def models(self) -> tuple[ModelStatus, ...]:
        """Return both tiers' models."""
        return self._ask(asks.models())

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return self._ask(asks.status())

    def abort(self, job_id: str) -> bool:
        """End a job of any account (admins only); False where no such job runs."""
        return self._ask(asks.abort(job_id))

    def end_call(self, call_id: str) -> bool:
        """End a call of `load().unread` (admins only); False where there is none of that id."""
        return self._ask(asks.end_call(call_id))

    def close_connection(self, connection: str) -> bool:
        """Close a connection of `load().unread` (admins only); False where there is none."""
        return self._ask(asks.close_connection(connection))

    def drain(self, grace_s: float | None = None) -> int:
        """Stop the daemon when its jobs have ended (admins only); how many still run."""
        return self._ask(asks.drain(grace_s))

    def set_budget(
        self,
        account: str,
        *,
        balance_uatp: int | None = None,
        capacity_uatp: int | None = None,
        refill_uatp_per_s: int | None = None,
        strategic_floor_uatp: int | None = None,
    ) -> Budget:
        """Create or change an account (admins only); None stays as it is."""
        change = BudgetChange(
            balance_uatp=balance_uatp,
            capacity_uatp=capacity_uatp,
            refill_uatp_per_s=refill_uatp_per_s,
            strategic_floor_uatp=strategic_floor_uatp,
        )
        return self._ask(asks.set_budget(account, change))

    def load(self) -> LoadReport:
        """Return what runs and waits now (admins only)."""
        return self._ask(asks.load())

    def calibrate(
        self, *, quick: bool = False, adopt: bool = False
    ) -> Generator[CalibrationEvent, None, None]:
        """Measure the engines and write a rate card (admins only): progress, then the result.

        Leaving the loop early ends the calibration without a trace.
        """
        return self._stream(asks.calibrate(quick=quick, adopt=adopt))

    def adopt_card(self, version: str) -> CardStatus:
        """Put a rate card in force for new jobs, until the daemon restarts (admins only)."""
        return self._ask(asks.adopt_card(version))

    def _ask(self, ask: Ask[T]) -> T:
        call = self._channel.unary_unary(ask.method, serialize, ask.reply.FromString)
        timeout_s = self._timeout_s if ask.timed else None
        try:
            reply = call(ask.request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._address, self._tls) from None
        return ask.read(reply)
