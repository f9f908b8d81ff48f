"""BudgetService: the caller's own account.

Owns the paging of entries: a page token is opaque to clients and names the last entry seen.
Fails as the ledger does, and with `InvalidField` on a page that cannot be.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence

from sage_fed.errors import InvalidField
from sage_fed.ledger.words import Entry
from sage_fed.service import replies
from sage_fed.service.edge import Call, Method
from sage_fed.service.ports import Books, Operations
from sage_fed.v1 import budget_pb2

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

_TOKEN = struct.Struct(">BQ")  # format version, entry id
_TOKEN_VERSION = 1


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
        """Return a page of the account's entries, newest first."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        if size > MAX_PAGE_SIZE:
            raise InvalidField("page_size", f"must be from 1 to {MAX_PAGE_SIZE}, not {size}")
        before_id = read_page_token(request.page_token)

        def page(entries: Sequence[Entry]) -> budget_pb2.ListEntriesResponse:
            return budget_pb2.ListEntriesResponse(
                entries=[replies.entry_of(entry) for entry in entries],
                # After a full page there may be nothing more: the next one is empty, and last.
                next_page_token=page_token(entries[-1].entry_id) if len(entries) == size else "",
            )

        return await self._books.page(call.caller.account, before_id, size, page)


def page_token(entry_id: int) -> str:
    """Return the token of the page that follows this entry."""
    return base64.urlsafe_b64encode(_TOKEN.pack(_TOKEN_VERSION, entry_id)).decode()


def read_page_token(token: str) -> int | None:
    """Return the entry that the page follows; None for the first page.

    Raises:
        InvalidField: not a token that `page_token` made.
    """
    if not token:
        return None
    try:
        version, entry_id = _TOKEN.unpack(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError):
        version, entry_id = 0, 0
    if version != _TOKEN_VERSION or entry_id >= 2**63:
        raise InvalidField("page_token", "must be a next_page_token of an earlier page")
    return int(entry_id)
