"""The four services: jobs, the caller's account, the models, and the operator's commands.

Owns the rule of who may call each method, the shape of the answers (a stream event by event, or
gathered into one reply), the names of a prompt's errors, what an operator may set together, and
the paging of entries: a page token is opaque to clients and names the last entry or day seen.
A request has been checked, and its caller's role, when it comes here (`edge`).
Fails as the job's stream and the ledger do, and with `InvalidField` where fields do not go
together; a client that goes away is passed on as `cancel`, and the job's own task settles.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar

from google.protobuf.message import Message

from sage_fed.core import (
    TIER_ROLES,
    Answer,
    BudgetChange,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    Delta,
    EntryPage,
    Event,
    Finished,
    JobSpec,
    LoadReport,
    ModelStatus,
    ModeReturns,
    QualityCardStatus,
    Role,
    Tier,
    TokenCount,
)
from sage_fed.errors import InvalidField, NoSuchAccount, NotFound
from sage_fed.ledger import Ledger, Page, Place
from sage_fed.service.calls import OpenCalls
from sage_fed.service.edge import OPEN, Call
from sage_fed.settings import LimitSettings
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2
from sage_fed.wire.codec import decode, encode
from sage_fed.workers import Workers

if TYPE_CHECKING:
    from sage_fed.jobs.broker import Broker
    from sage_fed.jobs.outgoing import OutgoingStream

M = TypeVar("M", bound=Message)

RULES: Mapping[str, Role | None] = MappingProxyType(
    {
        "/sage_fed.v1.InferenceService/Generate": Role.USER,
        "/sage_fed.v1.InferenceService/GenerateStream": Role.USER,
        "/sage_fed.v1.InferenceService/Quote": Role.USER,
        "/sage_fed.v1.InferenceService/CountTokens": Role.USER,
        "/sage_fed.v1.BudgetService/GetBudget": Role.USER,
        "/sage_fed.v1.BudgetService/ListEntries": Role.USER,
        "/sage_fed.v1.ModelService/ListModels": Role.USER,
        "/sage_fed.v1.ModelService/GetModel": Role.USER,
        "/sage_fed.v1.ModelService/GetStatus": Role.USER,
        "/sage_fed.v1.ModelService/CompareModes": Role.USER,
        "/sage_fed.v1.AdminService/Abort": Role.ADMIN,
        "/sage_fed.v1.AdminService/Drain": Role.ADMIN,
        "/sage_fed.v1.AdminService/SetBudget": Role.ADMIN,
        "/sage_fed.v1.AdminService/GetLoad": Role.ADMIN,
        "/sage_fed.v1.AdminService/Calibrate": Role.ADMIN,
        "/sage_fed.v1.AdminService/AdoptRateCard": Role.ADMIN,
        "/sage_fed.v1.AdminService/AdoptQualityCard": Role.ADMIN,
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/List": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Role.USER,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.USER,
    }
)
"""Full method name -> the role that it takes."""

JobRequest = (
    inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest | inference_pb2.QuoteRequest
)

_INLINE_SIZE = 1024
"""What is translated in a millisecond at most; more in a thread."""

_IDS_PER_SIZE = 32
"""Token ids of a request that are read in about a microsecond."""


class InferenceService:
    """Generate, GenerateStream, Quote and CountTokens."""

    def __init__(
        self, jobs: Broker, limits: LimitSettings, workers: Workers, tiers: Sequence[Tier]
    ) -> None:
        self._jobs = jobs
        self._limits = limits
        self._workers = workers
        self._tiers = tiers

    async def generate(
        self, request: inference_pb2.GenerateRequest, call: Call
    ) -> inference_pb2.GenerateResponse:
        """Run a job and return its whole answer."""
        stream = await self._submit(request, call)
        try:
            started, output, finished = await stream.answer()
        finally:
            stream.cancel()
        answer = Answer(started, output.text, output.token_ids, output.logprobs, finished)
        return await self._translated(
            call, output.size, lambda: encode(answer, inference_pb2.GenerateResponse)
        )

    async def generate_stream(
        self, request: inference_pb2.GenerateStreamRequest, call: Call
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        """Run a job and stream its events; nothing is sent before the job is accepted."""
        stream = await self._submit(request, call)
        event: Event | None = None
        try:
            async for event in stream:
                if isinstance(event, Delta) and event.size > _INLINE_SIZE:
                    yield await self._translated(call, event.size, functools.partial(_sent, event))
                else:
                    yield _sent(event)
        finally:
            # Reached with the job still running only if the client is gone.
            stream.cancel()
        assert isinstance(event, Finished), "the job's stream ended without an ending"

    async def quote(
        self, request: inference_pb2.QuoteRequest, call: Call
    ) -> inference_pb2.QuoteResponse:
        """Say what a job would cost at most and which route it would take."""
        # What waits for a thread is bounded there, and takes turns of its own.
        call.open_call.done()
        spec = await self._spec(request, call)
        with _named_as_in(request.job):
            return encode(await self._jobs.quote(spec), inference_pb2.QuoteResponse)

    async def count_tokens(
        self, request: inference_pb2.CountTokensRequest, call: Call
    ) -> inference_pb2.CountTokensResponse:
        """Count a prompt's tokens as the tier's model would see them."""
        asked = _of_tiers(decode(JobSpec, request, account=call.caller.account), self._tiers)
        call.open_call.done()
        with _named_as_in(request):
            counted = await self._jobs.count_tokens(
                asked.prompt, asked.requested or Tier.TACTICAL, asked.account
            )
        return encode(TokenCount(*counted), inference_pb2.CountTokensResponse)

    async def _translated(self, call: Call, size: int, translate: Callable[[], M]) -> M:
        """Return a reply, made in a thread where it is long."""
        if size <= _INLINE_SIZE:
            return translate()
        return await self._workers.run(call.caller.account, size, translate)

    async def _submit(self, request: JobRequest, call: Call) -> OutgoingStream:
        spec = await self._spec(request, call)
        # The turn lasts until the job is admitted, or what was begun for it is undone: calls that
        # are given up as soon as they are made would otherwise be bounded by nothing.
        try:
            with _named_as_in(request.job):
                stream = await self._jobs.submit(spec, call.arrived)
        finally:
            call.open_call.done()
        call.open_call.keep(stream)
        return stream

    async def _spec(self, request: JobRequest, call: Call) -> JobSpec:
        size = len(request.job.token_ids.ids) // _IDS_PER_SIZE
        if size <= _INLINE_SIZE:
            return parse_job(request, self._limits, call, self._tiers)
        account = call.caller.account
        self._workers.require_room(account, size)
        return await self._workers.run(
            account, size, lambda: parse_job(request, self._limits, call, self._tiers)
        )


def parse_job(
    request: JobRequest, limits: LimitSettings, call: Call, tiers: Sequence[Tier] = TIER_ROLES
) -> JobSpec:
    """Return the job that a sound request describes, paid for by the caller."""
    spec = decode(
        JobSpec,
        request.job,
        account=call.caller.account,
        call_deadline_s=_call_deadline_s(call.deadline_s, limits),
        trace=call.trace,
        one_reply=isinstance(request, inference_pb2.GenerateRequest),
    )
    return _of_tiers(spec, tiers)


def _of_tiers(spec: JobSpec, tiers: Sequence[Tier]) -> JobSpec:
    """Return the job with the daemon's tier of the name that it asks for."""
    if spec.requested is None or spec.requested in tiers:
        return spec
    return replace(spec, requested=Tier.called(spec.requested.name, tiers))


def _call_deadline_s(remaining_s: float | None, limits: LimitSettings) -> float | None:
    """Return the call's deadline, unless it is so far away that it says nothing of the job."""
    if remaining_s is None or not remaining_s < limits.max_deadline_s:
        return None
    return max(remaining_s, 0.0)


def _sent(event: Event) -> inference_pb2.GenerateStreamResponse:
    return encode(event, inference_pb2.GenerateStreamResponse)


@contextlib.contextmanager
def _named_as_in(request: types_pb2.JobSpec | inference_pb2.CountTokensRequest) -> Iterator[None]:
    """Name a prompt's error as the request does: below, a text is a conversation of a job."""
    try:
        yield
    except InvalidField as error:
        field = error.field
        if request.WhichOneof("prompt") == "text" and field.startswith("job.chat"):
            field = "job.text"
        if isinstance(request, inference_pb2.CountTokensRequest):
            field = field.removeprefix("job.")
        raise InvalidField(field, error.description) from error


if TYPE_CHECKING:
    from sage_fed.jobs.broker import Broker

DEFAULT_PAGE_SIZE = 50

_TOKEN = struct.Struct(">B?Q")  # format version, whether in the days, entry's number or day
_TOKEN_VERSION = 2
_TOKEN_1 = struct.Struct(">BQ")


class Operations(Protocol):
    """The daemon as a whole."""

    def models(self) -> tuple[ModelStatus, ...]:
        """Return the tiers' models, whatever their state."""

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""

    def compare_modes(self, account: str, task_class: str, max_error: float | None) -> ModeReturns:
        """Return what each mode gives for what it takes; `NotFound` without a quality card."""

    def drain(self, grace_s: float | None) -> int:
        """Start to drain (idempotent; None is the setting's grace); jobs still running."""

    def calibrate(self, *, quick: bool, adopt: bool) -> AsyncGenerator[CalibrationEvent, None]:
        """Measure and write a card; closing the generator ends it without a trace.

        Raises `CalibrationRunning`, `DeviceBusy`, `TierUnavailable` or `DeviceOutOfMemory`.
        """

    async def adopt_card(self, version: str) -> CardStatus:
        """Put a card in force for new jobs; `NotFound` where there is none of that version."""

    async def adopt_quality_card(self, version: str) -> QualityCardStatus:
        """Put a quality card in force; `InvalidField` where it is of other models."""


class BudgetService:
    """GetBudget and ListEntries."""

    def __init__(self, ledger: Ledger, operations: Operations) -> None:
        self._ledger = ledger
        self._operations = operations

    async def get_budget(self, _: object, call: Call) -> budget_pb2.GetBudgetResponse:
        """Return the account's books and the card that prices its jobs now."""
        budget = encode(await self._ledger.budget(call.caller.account), types_pb2.Budget)
        rate_card = self._operations.status().rate_card
        return budget_pb2.GetBudgetResponse(budget=budget, rate_card=rate_card)

    async def list_entries(
        self, request: budget_pb2.ListEntriesRequest, call: Call
    ) -> budget_pb2.ListEntriesResponse:
        """Return a page of the account's entries, newest first, and its days behind them."""
        place = read_page_token(request.page_token)
        size = request.page_size or DEFAULT_PAGE_SIZE
        # A long page is translated by the thread that reads it.
        return await self._ledger.page(call.caller.account, place, size, _page_of)


def _page_of(page: Page) -> budget_pb2.ListEntriesResponse:
    token = "" if page.rest is None else page_token(page.rest)
    return encode(EntryPage(page.entries, token, page.days), budget_pb2.ListEntriesResponse)


def page_token(place: Place) -> str:
    """Return the token of the page that begins at a place."""
    token = _TOKEN.pack(_TOKEN_VERSION, place.in_days, place.before)
    return base64.urlsafe_b64encode(token).decode()


def read_page_token(token: str) -> Place | None:
    """Return where the page begins; None for the first page.

    Raises:
        InvalidField: not a token that `page_token` made, or one that an older daemon did.
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token, altchars=b"-_", validate=True)
        if len(raw) == _TOKEN_1.size and raw[0] == 1:
            raise InvalidField(
                "page_token",
                "is of an older daemon, which numbered entries over all accounts; begin again "
                "without one",
            )
        version, in_days, before = _TOKEN.unpack(raw)
    except (binascii.Error, struct.error, ValueError):
        version, in_days, before = 0, False, 0
    if version != _TOKEN_VERSION or before >= 2**63:
        raise InvalidField("page_token", "must be a next_page_token of an earlier page")
    return Place(before, in_days)


class ModelService:
    """ListModels, GetModel, GetStatus and CompareModes."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def list_models(self, _: object, __: Call) -> model_pb2.ListModelsResponse:
        """Return the tiers' models, whatever their state."""
        models = [encode(model, model_pb2.Model) for model in self._operations.models()]
        return model_pb2.ListModelsResponse(models=models)

    async def get_model(
        self, request: model_pb2.GetModelRequest, _: Call
    ) -> model_pb2.GetModelResponse:
        """Return one tier's model."""
        name = request.tier_name or types_pb2.Tier.Name(request.tier).removeprefix("TIER_").lower()
        if name in ("unspecified", "auto"):
            raise InvalidField("tier", "must be TIER_TACTICAL or TIER_STRATEGIC")
        for model in self._operations.models():
            if model.tier.name == name:
                return model_pb2.GetModelResponse(model=encode(model, model_pb2.Model))
        raise NotFound(f"this daemon has no {name} tier")

    async def get_status(self, _: object, __: Call) -> model_pb2.GetStatusResponse:
        """Return the daemon at a glance."""
        return encode(self._operations.status(), model_pb2.GetStatusResponse)

    async def compare_modes(
        self, request: model_pb2.CompareModesRequest, call: Call
    ) -> model_pb2.CompareModesResponse:
        """Return what each mode gives for what it takes."""
        max_error = request.max_error if request.HasField("max_error") else None
        account = call.caller.account
        found = self._operations.compare_modes(account, request.task_class, max_error)
        return encode(found, model_pb2.CompareModesResponse)


class AdminService:
    """Abort, Drain, SetBudget, GetLoad, Calibrate, AdoptRateCard and AdoptQualityCard."""

    def __init__(
        self,
        jobs: Broker,
        ledger: Ledger,
        operations: Operations,
        calls: OpenCalls,
    ) -> None:
        self._jobs = jobs
        self._calls = calls
        self._ledger = ledger
        self._operations = operations

    async def abort(self, request: admin_pb2.AbortRequest, _: Call) -> admin_pb2.AbortResponse:
        """End a job of any account, running or unread, a call, or a connection."""
        if request.connection:
            aborted = self._calls.close_connection(request.connection)
        elif request.call_id:
            aborted = self._calls.end(request.call_id)
        else:
            # A running job's reader gets what was made; what has ended unread is not waited for.
            aborted = self._jobs.abort(request.job_id) or self._calls.end(request.job_id)
        return admin_pb2.AbortResponse(aborted=aborted)

    async def drain(self, request: admin_pb2.DrainRequest, _: Call) -> admin_pb2.DrainResponse:
        """Stop admission; the daemon exits when its jobs have ended or the grace is over."""
        grace_s = request.grace_s if request.HasField("grace_s") else None
        return admin_pb2.DrainResponse(jobs_running=self._operations.drain(grace_s))

    async def set_budget(
        self, request: admin_pb2.SetBudgetRequest, _: Call
    ) -> admin_pb2.SetBudgetResponse:
        """Create an account's budget or change it.

        To the ledger the capacity limits refill only. An operator who sets a balance above it
        has mistyped one of the two, and an account that may hold nothing was not meant.
        """
        change = decode(BudgetChange, request)
        change = replace(change, capacity_uatp=await self._capacity(request.account, change))
        budget = await self._ledger.set_budget(request.account, change)
        return admin_pb2.SetBudgetResponse(budget=encode(budget, types_pb2.Budget))

    async def _capacity(self, account: str, change: BudgetChange) -> int | None:
        """Return the capacity to set, None for the present one; it covers the balance."""
        try:
            present_uatp = (await self._ledger.budget(account)).capacity_uatp
        except NoSuchAccount:
            if change.capacity_uatp is None and change.balance_uatp is None:
                raise InvalidField(
                    "capacity_uatp", "a new account needs a capacity, or a balance to begin with"
                ) from None
            present_uatp = None
        capacity_uatp = change.capacity_uatp if change.capacity_uatp is not None else present_uatp
        if capacity_uatp is None:
            return change.balance_uatp
        if change.balance_uatp is not None and change.balance_uatp > capacity_uatp:
            raise InvalidField(
                "balance_uatp",
                f"must be at most the capacity, {capacity_uatp}; raise capacity_uatp with it",
            )
        return change.capacity_uatp

    async def get_load(self, _: object, __: Call) -> admin_pb2.GetLoadResponse:
        """Return what runs and waits now, of every account."""
        report = LoadReport(
            tiers=self._operations.status().tiers,
            jobs=self._jobs.running(),
            held_uatp=await self._ledger.held_total_uatp(),
            unread=self._calls.unread(),
            open_calls=self._calls.num_open,
            connections=self._calls.num_connections,
        )
        return encode(report, admin_pb2.GetLoadResponse)

    async def calibrate(
        self, request: admin_pb2.CalibrateRequest, _: Call
    ) -> AsyncGenerator[admin_pb2.CalibrateResponse, None]:
        """Measure the engines and write a card; a client that goes away ends it."""
        events = self._operations.calibrate(quick=request.quick, adopt=request.adopt)
        async with contextlib.aclosing(events):
            async for event in events:
                yield encode(event, admin_pb2.CalibrateResponse)

    async def adopt_rate_card(
        self, request: admin_pb2.AdoptRateCardRequest, _: Call
    ) -> admin_pb2.AdoptRateCardResponse:
        """Put a card in force for jobs from now on."""
        card = await self._operations.adopt_card(request.version)
        return encode(card, admin_pb2.AdoptRateCardResponse)

    async def adopt_quality_card(
        self, request: admin_pb2.AdoptQualityCardRequest, _: Call
    ) -> admin_pb2.AdoptQualityCardResponse:
        """Put a quality card in force for decisions from now on."""
        card = await self._operations.adopt_quality_card(request.version)
        return encode(card, admin_pb2.AdoptQualityCardResponse)
