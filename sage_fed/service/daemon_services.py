"""BudgetService, ModelService and AdminService: the caller's account, the models, the operator.

Owns the checks of their requests, and the paging of entries: a page token is opaque to clients and
names the last entry or day seen. The role that a method takes is the edge's to check.
Fails with `InvalidField` on the request, otherwise as the ledger does.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import struct
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from sage_fed.core import BudgetChange
from sage_fed.errors import InvalidField, NoSuchAccount, NotFound
from sage_fed.ledger.entries import Page, Place
from sage_fed.service import replies, reports
from sage_fed.service.calls import OpenCalls
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import Books, Jobs, Operations
from sage_fed.service.requests import parse_tier, require_between
from sage_fed.v1 import admin_pb2, budget_pb2, model_pb2

MAX_GRACE_S = 86_400.0
"""A drain that may take longer is a daemon that does not stop."""

MAX_NAME_CHARS = 256
MAX_VERSION_CHARS = 64


class AdminService:
    """Abort, Drain, SetBudget, GetLoad, Calibrate and AdoptRateCard."""

    def __init__(self, jobs: Jobs, books: Books, operations: Operations, calls: OpenCalls) -> None:
        self._jobs = jobs
        self._calls = calls
        self._books = books
        self._operations = operations

    @property
    def methods(self) -> Mapping[str, Method]:
        """The service's RPCs by name."""
        return {
            "Abort": self.abort,
            "Drain": self.drain,
            "SetBudget": self.set_budget,
            "GetLoad": self.get_load,
            "Calibrate": self.calibrate,
            "AdoptRateCard": self.adopt_rate_card,
        }

    async def abort(
        self,
        request: admin_pb2.AbortRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> admin_pb2.AbortResponse:
        """End a job of any account, running or unread, a call, or a connection."""
        given = {
            field: name
            for field in ("job_id", "call_id", "connection")
            if (name := getattr(request, field))
        }
        if len(given) > 1:
            raise InvalidField("job_id", f"{' and '.join(given)} are set; name one thing to end")
        field, name = given.popitem() if given else ("job_id", "")
        if not 1 <= len(name) <= MAX_NAME_CHARS:
            raise InvalidField(field, f"must have 1 to {MAX_NAME_CHARS} characters")
        if field == "connection":
            aborted = self._calls.close_connection(name)
        elif field == "call_id":
            aborted = self._calls.end(name)
        else:
            # A running job's reader gets what was made; what has ended unread is not waited for.
            aborted = self._jobs.abort(name) or self._calls.end(name)
        return admin_pb2.AbortResponse(aborted=aborted)

    async def drain(
        self,
        request: admin_pb2.DrainRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> admin_pb2.DrainResponse:
        """Stop admission; the daemon exits when its jobs have ended or the grace is over."""
        grace_s = request.grace_s if request.HasField("grace_s") else None
        if grace_s is not None:
            require_between("grace_s", grace_s, 0.0, MAX_GRACE_S)
        return admin_pb2.DrainResponse(jobs_running=self._operations.drain(grace_s))

    async def set_budget(
        self,
        request: admin_pb2.SetBudgetRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> admin_pb2.SetBudgetResponse:
        """Create an account's budget or change it; the ledger checks each amount by itself.

        To the ledger the capacity limits refill only. An operator who sets a balance above it
        has mistyped one of the two, and an account that may hold nothing was not meant.
        """
        if not request.account:
            raise InvalidField("account", "must not be empty")

        def given(name: str) -> int | None:
            return int(getattr(request, name)) if request.HasField(name) else None

        change = BudgetChange(
            balance_uatp=given("balance_uatp"),
            capacity_uatp=given("capacity_uatp"),
            refill_uatp_per_s=given("refill_uatp_per_s"),
            strategic_floor_uatp=given("strategic_floor_uatp"),
        )
        change = replace(change, capacity_uatp=await self._capacity(request.account, change))
        budget = await self._books.set_budget(request.account, change)
        return admin_pb2.SetBudgetResponse(budget=replies.budget_of(budget))

    async def _capacity(self, account: str, change: BudgetChange) -> int | None:
        """Return the capacity to set, None for the present one; it covers the balance."""
        try:
            present_uatp = (await self._books.budget(account)).capacity_uatp
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

    async def get_load(
        self,
        request: admin_pb2.GetLoadRequest,  # noqa: ARG002 - it is empty
        call: Call,  # noqa: ARG002 - every method has it
    ) -> admin_pb2.GetLoadResponse:
        """Return what runs and waits now, of every account."""
        return admin_pb2.GetLoadResponse(
            tiers=[reports.load_of(load) for load in self._operations.status().tiers],
            jobs=[reports.running_job_of(job) for job in self._jobs.running()],
            unread=[reports.unread_of(reply) for reply in self._calls.unread()],
            open_calls=self._calls.num_open,
            connections=self._calls.num_connections,
            held_uatp=await self._books.held_total_uatp(),
        )

    async def calibrate(
        self,
        request: admin_pb2.CalibrateRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> AsyncGenerator[admin_pb2.CalibrateResponse, None]:
        """Measure the engines and write a card; a client that goes away ends it."""
        events = self._operations.calibrate(quick=request.quick, adopt=request.adopt)
        async with contextlib.aclosing(events):
            async for event in events:
                yield reports.calibration_of(event)

    async def adopt_rate_card(
        self,
        request: admin_pb2.AdoptRateCardRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> admin_pb2.AdoptRateCardResponse:
        """Put a card in force for jobs from now on."""
        if not 1 <= len(request.version) <= MAX_VERSION_CHARS:
            raise InvalidField("version", f"must have 1 to {MAX_VERSION_CHARS} characters")
        return reports.card_status_of(await self._operations.adopt_card(request.version))


DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

_TOKEN = struct.Struct(">B?Q")  # format version, whether in the days, entry's number or day
_TOKEN_VERSION = 2
_TOKEN_1 = struct.Struct(">BQ")


class BudgetService:
    """GetBudget and ListEntries."""

    def __init__(self, books: Books, operations: Operations) -> None:
        self._books = books
        self._operations = operations

    @property
    def methods(self) -> Mapping[str, Method]:
        """The service's RPCs by name."""
        return {"GetBudget": self.get_budget, "ListEntries": self.list_entries}

    async def get_budget(
        self,
        request: budget_pb2.GetBudgetRequest,  # noqa: ARG002 - it is empty
        call: Call,
    ) -> budget_pb2.GetBudgetResponse:
        """Return the account's books and the card that prices its jobs now."""
        budget = await self._books.budget(call.caller.account)
        return budget_pb2.GetBudgetResponse(
            budget=replies.budget_of(budget), rate_card=self._operations.status().rate_card
        )

    async def list_entries(
        self, request: budget_pb2.ListEntriesRequest, call: Call
    ) -> budget_pb2.ListEntriesResponse:
        """Return a page of the account's entries, newest first, and its days behind them."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        if size > MAX_PAGE_SIZE:
            raise InvalidField("page_size", f"must be from 1 to {MAX_PAGE_SIZE}, not {size}")
        place = read_page_token(request.page_token)
        return await self._books.page(call.caller.account, place, size, _page_of)


def _page_of(page: Page) -> budget_pb2.ListEntriesResponse:
    return budget_pb2.ListEntriesResponse(
        entries=[replies.entry_of(entry) for entry in page.entries],
        days=[replies.day_of(day) for day in page.days],
        next_page_token="" if page.rest is None else page_token(page.rest),
    )


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
    """ListModels, GetModel and GetStatus."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @property
    def methods(self) -> Mapping[str, Method]:
        """The service's RPCs by name."""
        return {
            "ListModels": self.list_models,
            "GetModel": self.get_model,
            "GetStatus": self.get_status,
        }

    async def list_models(
        self,
        request: model_pb2.ListModelsRequest,  # noqa: ARG002 - it is empty
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.ListModelsResponse:
        """Return both tiers' models, whatever their state."""
        models = [reports.model_of(model) for model in self._operations.models()]
        return model_pb2.ListModelsResponse(models=models)

    async def get_model(
        self,
        request: model_pb2.GetModelRequest,
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.GetModelResponse:
        """Return one tier's model."""
        tier = parse_tier("tier", request.tier)
        if tier is None:
            raise InvalidField("tier", "must be TIER_TACTICAL or TIER_STRATEGIC")
        for model in self._operations.models():
            if model.tier is tier:
                return model_pb2.GetModelResponse(model=reports.model_of(model))
        raise NotFound(f"this daemon has no {tier.name} tier")

    async def get_status(
        self,
        request: model_pb2.GetStatusRequest,  # noqa: ARG002 - it is empty
        call: Call,  # noqa: ARG002 - every method has it
    ) -> model_pb2.GetStatusResponse:
        """Return the daemon at a glance."""
        return reports.status_of(self._operations.status())
