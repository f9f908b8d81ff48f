"""The blocking client, for scripts and notebooks.

Owns one channel, and the list of calls; use it as a context manager. It blocks: not for an event
loop. Every method raises the error tree: `InvalidField`, `CannotAfford`, ..., `CannotConnect`
where no daemon answers, `CallFailed` for a status that is none of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtoMessage

from sage_fed import core
from sage_fed.client import replies, reports
from sage_fed.client.channel import (
    DEFAULT_TIMEOUT_S,
    Tls,
    error_of,
    metadata_of,
    open_channel,
    serialize,
)
from sage_fed.client.requests import (
    JobFields,
    PromptLike,
    TierName,
    chat_of,
    filled,
    job_of,
    prompt_of,
    tier_of,
)
from sage_fed.core import (
    Answer,
    Budget,
    BudgetChange,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    Day,
    Entry,
    EntryPage,
    Event,
    LoadReport,
    Message,
    ModelStatus,
    Quote,
    Tier,
    TokenCount,
)
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2

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
        return self._stream(ask_stream(job_of(prompt, **fields)))

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
        return self._ask(ask_generate(job_of(prompt, **fields)))

    def quote(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Quote:
        """Return what the job would cost at most and which route it would take."""
        return self._ask(ask_quote(job_of(prompt, **fields)))

    def count_tokens(
        self, prompt: str | Sequence[Message], tier: Tier | TierName = Tier.TACTICAL
    ) -> TokenCount:
        """Return the prompt's tokens as the tier's model would see them."""
        return self._ask(ask_count_tokens(prompt, tier))

    def budget(self) -> Budget:
        """Return the caller's own books."""
        return self._ask(ask_budget())

    def entries_page(self, page_size: int = 50, page_token: str = "") -> EntryPage:
        """Return one page of the caller's own ledger, newest first."""
        return self._ask(ask_entries(page_size, page_token))

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
        return self._ask(ask_models())

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return self._ask(ask_status())

    def abort(self, job_id: str) -> bool:
        """End a job of any account (admins only); False where no such job runs."""
        return self._ask(ask_abort(job_id))

    def end_call(self, call_id: str) -> bool:
        """End a call of `load().unread` (admins only); False where there is none of that id."""
        return self._ask(ask_end_call(call_id))

    def close_connection(self, connection: str) -> bool:
        """Close a connection of `load().unread` (admins only); False where there is none."""
        return self._ask(ask_close_connection(connection))

    def drain(self, grace_s: float | None = None) -> int:
        """Stop the daemon when its jobs have ended (admins only); how many still run."""
        return self._ask(ask_drain(grace_s))

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
        return self._ask(ask_set_budget(account, change))

    def load(self) -> LoadReport:
        """Return what runs and waits now (admins only)."""
        return self._ask(ask_load())

    def calibrate(
        self, *, quick: bool = False, adopt: bool = False
    ) -> Generator[CalibrationEvent, None, None]:
        """Measure the engines and write a rate card (admins only): progress, then the result.

        Leaving the loop early ends the calibration without a trace.
        """
        return self._stream(ask_calibrate(quick=quick, adopt=adopt))

    def adopt_card(self, version: str) -> CardStatus:
        """Put a rate card in force for new jobs, until the daemon restarts (admins only)."""
        return self._ask(ask_adopt_card(version))

    def _ask(self, ask: Ask[T]) -> T:
        call = self._channel.unary_unary(ask.method, serialize, ask.reply.FromString)
        timeout_s = self._timeout_s if ask.timed else None
        try:
            reply = call(ask.request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._address, self._tls) from None
        return ask.read(reply)


_INFERENCE = "/sage_fed.v1.InferenceService/"
_BUDGET = "/sage_fed.v1.BudgetService/"
_MODEL = "/sage_fed.v1.ModelService/"
_ADMIN = "/sage_fed.v1.AdminService/"


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One call: full method name, request, reply class, and the reply's meaning.

    A job lasts as long as it lasts; every other call is `timed` by the client's own deadline.
    """

    method: str
    request: ProtoMessage
    reply: type[Any]
    read: Callable[[Any], T]
    timed: bool = True


def ask_stream(job: types_pb2.JobSpec) -> Ask[core.Event]:
    """Run a job; one reply an event."""
    request = inference_pb2.GenerateStreamRequest(job=job)
    reply = inference_pb2.GenerateStreamResponse
    return Ask(f"{_INFERENCE}GenerateStream", request, reply, replies.event_of, timed=False)


def ask_generate(job: types_pb2.JobSpec) -> Ask[Answer]:
    """Run a job and wait for its whole answer."""
    request = inference_pb2.GenerateRequest(job=job)
    reply = inference_pb2.GenerateResponse
    return Ask(f"{_INFERENCE}Generate", request, reply, replies.answer_of, timed=False)


def ask_quote(job: types_pb2.JobSpec) -> Ask[core.Quote]:
    """Ask what a job would cost."""
    request = inference_pb2.QuoteRequest(job=job)
    return Ask(f"{_INFERENCE}Quote", request, inference_pb2.QuoteResponse, replies.quote_of)


def ask_count_tokens(
    prompt: str | Sequence[core.Message], tier: core.Tier | TierName
) -> Ask[TokenCount]:
    """Count a prompt's tokens."""
    request = inference_pb2.CountTokensRequest(tier=tier_of(tier, "tier"))
    if isinstance(prompt, str):
        filled(request, text=prompt)
    else:
        request.chat.CopyFrom(chat_of(prompt_of(prompt).messages, "chat"))
    reply = inference_pb2.CountTokensResponse
    return Ask(f"{_INFERENCE}CountTokens", request, reply, replies.count_of)


def ask_budget() -> Ask[core.Budget]:
    """Read the caller's own books."""
    request = budget_pb2.GetBudgetRequest()

    def read(reply: budget_pb2.GetBudgetResponse) -> core.Budget:
        return replies.budget_of(reply.budget)

    return Ask(f"{_BUDGET}GetBudget", request, budget_pb2.GetBudgetResponse, read)


def ask_entries(page_size: int, page_token: str) -> Ask[EntryPage]:
    """Read a page of the caller's own ledger."""
    request = filled(budget_pb2.ListEntriesRequest(), page_size=page_size, page_token=page_token)
    return Ask(f"{_BUDGET}ListEntries", request, budget_pb2.ListEntriesResponse, replies.page_of)


def ask_models() -> Ask[tuple[core.ModelStatus, ...]]:
    """List both tiers' models."""
    request = model_pb2.ListModelsRequest()

    def read(reply: model_pb2.ListModelsResponse) -> tuple[core.ModelStatus, ...]:
        return tuple(reports.model_of(model) for model in reply.models)

    return Ask(f"{_MODEL}ListModels", request, model_pb2.ListModelsResponse, read)


def ask_status() -> Ask[core.DaemonStatus]:
    """Read the daemon at a glance."""
    request = model_pb2.GetStatusRequest()
    return Ask(f"{_MODEL}GetStatus", request, model_pb2.GetStatusResponse, reports.status_of)


def ask_abort(job_id: str) -> Ask[bool]:
    """End a job."""
    request = filled(admin_pb2.AbortRequest(), job_id=job_id)

    def read(reply: admin_pb2.AbortResponse) -> bool:
        return reply.aborted

    return Ask(f"{_ADMIN}Abort", request, admin_pb2.AbortResponse, read)


def ask_end_call(call_id: str) -> Ask[bool]:
    """End a call whose reply nobody reads."""
    return replace(ask_abort(""), request=admin_pb2.AbortRequest(call_id=call_id))


def ask_close_connection(connection: str) -> Ask[bool]:
    """Close a connection, with all that it carries."""
    return replace(ask_abort(""), request=admin_pb2.AbortRequest(connection=connection))


def ask_drain(grace_s: float | None) -> Ask[int]:
    """Stop the daemon, softly."""
    request = filled(admin_pb2.DrainRequest(), grace_s=grace_s)

    def read(reply: admin_pb2.DrainResponse) -> int:
        return reply.jobs_running

    return Ask(f"{_ADMIN}Drain", request, admin_pb2.DrainResponse, read)


def ask_set_budget(account: str, change: BudgetChange) -> Ask[core.Budget]:
    """Create or change an account."""
    request = filled(
        admin_pb2.SetBudgetRequest(),
        account=account,
        balance_uatp=change.balance_uatp,
        capacity_uatp=change.capacity_uatp,
        refill_uatp_per_s=change.refill_uatp_per_s,
        strategic_floor_uatp=change.strategic_floor_uatp,
    )

    def read(reply: admin_pb2.SetBudgetResponse) -> core.Budget:
        return replies.budget_of(reply.budget)

    return Ask(f"{_ADMIN}SetBudget", request, admin_pb2.SetBudgetResponse, read)


def ask_load() -> Ask[LoadReport]:
    """Read what runs and waits now."""
    request = admin_pb2.GetLoadRequest()
    return Ask(f"{_ADMIN}GetLoad", request, admin_pb2.GetLoadResponse, reports.load_of)


def ask_calibrate(*, quick: bool, adopt: bool) -> Ask[core.CalibrationEvent]:
    """Measure the engines; one reply an event."""
    request = admin_pb2.CalibrateRequest(quick=quick, adopt=adopt)
    reply = admin_pb2.CalibrateResponse
    return Ask(f"{_ADMIN}Calibrate", request, reply, reports.calibration_of, timed=False)


def ask_adopt_card(version: str) -> Ask[core.CardStatus]:
    """Put a card in force."""
    request = filled(admin_pb2.AdoptRateCardRequest(), version=version)
    reply = admin_pb2.AdoptRateCardResponse
    return Ask(f"{_ADMIN}AdoptRateCard", request, reply, reports.card_status_of)
