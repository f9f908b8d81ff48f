"""The ledger's words: entries, terms, and what each operation takes and gives.

Owns frozen values and their limits. Knows neither SQL nor threads.
Amounts are integer uATP from 0 to `MAX_UATP`; anything else raises `InvalidField`.

The two clocks of the ledger: one that refill trusts, one that people read.

Owns reading them. Does not know accounts or SQL.
Refill counts on the kernel's time since boot (suspend included) together with the boot's id,
because the wall clock jumps: a corrected date must neither mint nor withhold ATP.
Wall time only stamps entries and ages kept results.
Where a platform has neither boot clock nor boot id, time counts within one process only, so
such a machine loses the refill of its downtime instead of ever minting twice.
"""

from __future__ import annotations

import enum
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from sage_fed.core import Day, Entry, EntryKind
from sage_fed.errors import InvalidField

MAX_UATP = 2**53
"""The most that one amount may be: exact in a double too, for clients that read JSON."""

MAX_LIFETIME_UATP = 2**62
"""The most that an account may ever have got; refill stops there, before int64 would overflow."""

MAX_TEXT = 256
"""Characters in an account's name, a job id or a client request id."""

NS_PER_S = 1_000_000_000


MOVES: Mapping[EntryKind, tuple[str, str]] = MappingProxyType(
    {
        EntryKind.GRANT: ("mint", "charged"),
        EntryKind.REFILL: ("mint", "charged"),
        EntryKind.HOLD: ("charged", "held"),
        EntryKind.SETTLE: ("held", "discharged"),
        EntryKind.RELEASE: ("held", "charged"),
        EntryKind.VOID: ("held", "charged"),
        EntryKind.EXPIRE: ("held", "charged"),
        EntryKind.REVOKE: ("charged", "mint"),
    }
)
"""The book each kind debits and the book it credits."""


class JobState(enum.Enum):
    """What became of a hold; every state but HELD is final."""

    HELD = "held"
    SETTLED = "settled"
    VOIDED = "voided"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page of an account's books goes on: below an entry's number, or before a day."""

    before: int
    in_days: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Entries, newest first, and behind the oldest of all the days; `rest` is None at the end."""

    entries: tuple[Entry, ...]
    days: tuple[Day, ...]
    rest: Place | None


@dataclass(frozen=True, slots=True)
class AccountTerms:
    """What the settings say about an account; `initial_uatp` is granted once, at creation."""

    capacity_uatp: int
    refill_uatp_per_s: int = 0
    strategic_floor_uatp: int = 0
    initial_uatp: int = 0


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """The worst case of one job, to be reserved before any GPU work.

    `strategic` asks for the strategic floor to be respected.
    `client_request_id` makes the request idempotent within the account; `payload_hash` tells
    a repeated request from another one under the same id.
    `ttl_s` is the safety net: a hold is released that long after where no living job ends it.
    """

    job_id: str
    account: str
    amount_uatp: int
    rate_card: str
    tier: str
    strategic: bool = False
    client_request_id: str = ""
    payload_hash: bytes = b""
    ttl_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class HoldReceipt:
    """An accepted hold; `balance_uatp` is what is available after it."""

    job_id: str
    held_uatp: int
    balance_uatp: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The kept result of an earlier request with the same id and payload."""

    job_id: str
    result: bytes


@dataclass(frozen=True, slots=True)
class Settlement:
    """A hold's price; `repeated` where it had been settled before, at this same price."""

    job_id: str
    held_uatp: int
    charged_uatp: int
    balance_uatp: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """A hold given back whole; `repeated` where it had been given back before."""

    job_id: str
    released_uatp: int
    balance_uatp: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """What opening the books had to do: holds that a dead process had left, now voided."""

    voided_jobs: int
    voided_uatp: int


def require_amount(field: str, amount: int) -> None:
    """Refuse an amount that is not an integer in [0, MAX_UATP]."""
    if type(amount) is not int or not 0 <= amount <= MAX_UATP:
        raise InvalidField(field, f"must be an integer from 0 to {MAX_UATP}")


def require_text(field: str, text: str, *, empty: bool = False) -> None:
    """Refuse a text that is too long, not storable as UTF-8, or empty where it may not be."""
    if len(text) > MAX_TEXT or (not text and not empty):
        raise InvalidField(field, f"must have {0 if empty else 1} to {MAX_TEXT} characters")
    if not text.isprintable():
        raise InvalidField(field, "must consist of printable characters")


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Now:
    """One instant: `ns` nanoseconds since the start of `epoch`, and Unix time `wall_ns`."""

    epoch: str
    ns: int
    wall_ns: int


class Clock(Protocol):
    """Says what time it is; `ns` never goes back while `epoch` is the same."""

    def now(self) -> Now:
        """The instant of the call."""
        ...


class BootClock:
    """Time since the kernel's boot; its epoch is the boot id."""

    def __init__(self, boot_id: str) -> None:
        self._epoch = f"boot:{boot_id}"

    def now(self) -> Now:
        """The instant of the call."""
        ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return Now(self._epoch, ns, time.time_ns())


class ProcessClock:
    """Time since this object was made; its epoch is new in each process."""

    def __init__(self) -> None:
        self._epoch = f"process:{uuid.uuid4()}"
        self._start_ns = time.monotonic_ns()

    def now(self) -> Now:
        """The instant of the call."""
        return Now(self._epoch, time.monotonic_ns() - self._start_ns, time.time_ns())


def system_clock(boot_id_file: Path = BOOT_ID) -> Clock:
    """The best clock of this platform: since boot, or else since now."""
    try:
        boot_id = boot_id_file.read_text(encoding="ascii").strip()
    except OSError:
        boot_id = ""
    if boot_id and hasattr(time, "CLOCK_BOOTTIME"):
        return BootClock(boot_id)
    return ProcessClock()
