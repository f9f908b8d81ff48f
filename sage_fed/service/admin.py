"""AdminService: what an operator does to a running daemon.

Owns the checks of the operator's requests; the role is the edge's to check.
Fails with `InvalidField` on the request, otherwise as the ledger does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from sage_fed.errors import InvalidField, NoSuchAccount
from sage_fed.ledger.entries import BudgetChange
from sage_fed.service import replies, reports
from sage_fed.service.calls import OpenCalls
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import Books, Jobs, Operations
from sage_fed.service.requests import require_between
from sage_fed.v1 import admin_pb2

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
