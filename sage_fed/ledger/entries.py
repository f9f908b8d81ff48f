"""The ledger's values: entries, terms, what each operation takes and gives, its options, its clock.

Owns frozen values and their limits. Knows neither SQL nor threads.
Amounts are integer uATP from 0 to `MAX_UATP`; anything else raises `InvalidField`.
"""

from __future__ import annotations

import enum
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from sage_fed.core import MAX_UATP, Day, Entry, EntryKind
from sage_fed.errors import InvalidField

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
class RequestKey:
    """Whose request it is, and by what a repeat of it is known.

    `client_request_id` makes the request idempotent within the account; "" is none.
    `payload_hashes` say what it asks for, by every version of the hash: the first is kept, and a
    kept one that is among them tells a repeat from another request under the same id.
    """

    account: str
    client_request_id: str = ""
    payload_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """The worst case of one job, to be reserved before any device work.

    `tier` is the tier's name. A hold that no living job ends is released after `ttl_s` seconds.
    """

    job_id: str
    amount_uatp: int
    rate_card: str
    tier: str
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
    """The end of a hold: what it was charged, 0 where it was given back whole.

    `repeated` where it had ended so before, at this same price.
    """

    job_id: str
    held_uatp: int
    charged_uatp: int
    balance_uatp: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """What opening the books had to do: holds that a dead process had left, now voided."""

    voided_jobs: int
    voided_uatp: int


@dataclass(frozen=True, slots=True)
class Retention:
    """How long results are kept, and how many bytes of them, each and in all.

    And how long entries are, one by one; never shorter than a request id that goes with them.
    """

    keep_s: float = 24 * 3600.0
    entries_s: float = 30 * 86_400.0
    one_result_bytes: int = 32 * 2**20
    all_results_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True)
class LedgerOptions:
    """Limits. `inbox_limit` bounds what may be refused; the ends of open holds always fit.

    `account_reads` is how many reads an account may have waiting, `busy_s` how long another program
    that has the file locked is waited for, and `commit_timeout_s` after how long a group that is
    not on disk counts as a disk that hangs.
    A start audits up to `audit_entries` itself, and has more of them audited beside its first jobs.
    """

    retention: Retention = field(default_factory=Retention)
    group_limit: int = 256
    inbox_limit: int = 1024
    account_reads: int = 16
    busy_s: float = 2.0
    commit_timeout_s: float = 5.0
    audit_entries: int = 200_000
    answer_timeout_s: float = 30.0
    upkeep_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Now:
    """One instant: `ns` nanoseconds since the start of `epoch`, and Unix time `wall_ns`.

    Refill counts `ns` of one epoch, because the wall clock jumps: a corrected date must neither
    mint nor withhold ATP. Wall time only stamps entries and ages kept results.
    """

    epoch: str
    ns: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Clock:
    """The time since the start of `epoch`, by a clock that never goes back within it."""

    epoch: str
    read_ns: Callable[[], int]

    def now(self) -> Now:
        """Return the instant of the call."""
        return Now(self.epoch, self.read_ns(), time.time_ns())


def system_clock(boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id")) -> Clock:
    """Return the kernel's clock since boot, suspend included, with the boot's id as its epoch.

    A platform without either counts within this process only: it loses the refill of its downtime
    instead of ever minting twice.
    """
    try:
        boot_id = boot_id_file.read_text(encoding="ascii").strip()
    except OSError:
        boot_id = ""
    if boot_id and hasattr(time, "CLOCK_BOOTTIME"):
        return Clock(f"boot:{boot_id}", lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    start_ns = time.monotonic_ns()
    return Clock(f"process:{uuid.uuid4()}", lambda: time.monotonic_ns() - start_ns)


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
