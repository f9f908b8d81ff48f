"""What the ledger is asked in tests: a hold whose worst case is known, and pages as lists."""

from collections.abc import Callable

from sage_fed.core import Budget, Entry
from sage_fed.ledger import HoldRequest, Ledger, RequestKey
from sage_fed.ledger.entries import Place

Asked = tuple[RequestKey, Callable[[Budget], HoldRequest]]


def asked(
    job_id: str,
    account: str = "ann",
    amount_uatp: int = 10,
    rate_card: str = "card",
    tier: str = "tactical",
    *,
    client_request_id: str = "",
    payload_hash: bytes = b"",
    ttl_s: float = 3600.0,
) -> Asked:
    """Return what `Ledger.hold` and `Books.hold` take, for a job that asks for just so much."""
    key = RequestKey(account, client_request_id, (payload_hash,))
    request = HoldRequest(job_id, amount_uatp, rate_card, tier, ttl_s)
    return key, lambda _: request


async def entries_of(
    ledger: Ledger, account: str, before_id: int | None = None, limit: int = 50
) -> list[Entry]:
    """Return entries of an account below that number, newest first."""
    place = None if before_id is None else Place(before_id)
    page = await ledger.page(account, place, limit, lambda page: page)
    return list(page.entries)
