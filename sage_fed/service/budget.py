"""BudgetService: the caller's own account.

Owns the paging of entries: a page token is opaque to clients and names the last entry or day seen.
Fails as the ledger does, and with `InvalidField` on a page that cannot be.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping

from sage_fed.errors import InvalidField
from sage_fed.ledger.entries import Page, Place
from sage_fed.service import replies
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import Books, Operations
from sage_fed.v1 import budget_pb2

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
