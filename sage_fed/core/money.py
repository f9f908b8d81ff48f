"""Amounts, prices, budgets and the entries of an account (integer uATP); numbers of things."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from sage_fed.core.tiers import PhaseTokens, Tier

UATP_PER_ATP = 1_000_000

MAX_UATP = 2**53
"""The most that one amount may be: exact in a double too, for clients that read JSON."""


def counted(number: int, one: str, several: str = "") -> str:
    """`1 job`, `1,024 jobs`; `several` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def to_plain(value: object) -> Any:  # noqa: ANN401 - whatever JSON has for it
    """Return dataclasses, enums and tuples as the dicts, strings and lists that JSON has."""
    if isinstance(value, Tier):
        return value.name
    if isinstance(value, enum.IntEnum):
        return value.name.lower()
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def escaped(text: str) -> str:
    """Return the text on one line, with control and direction characters as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


@dataclass(frozen=True, slots=True)
class Price:
    """What a job cost; `rate_card` was frozen at admission.

    `single_uatp` is what its route's tier alone would have charged for the same prompt and output;
    0 where an earlier daemon did not say.
    """

    charged_uatp: int
    held_uatp: int
    rate_card: str
    single_uatp: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """What one tier would ask for a job: the prompt's price and a price per output token.

    Integers of one rate card, so every price made from them is exact. Of an unread prompt, which is
    longer than any tier takes, `prompt_tokens` are the fewest that it can have. `earlier` is what
    the stages before the answer's may ask for besides.
    """

    tier: Tier
    prompt_tokens: int
    max_new_tokens: int
    prompt_uatp: int
    decode_uatp: int
    unread: bool = False
    earlier: tuple[Offer, ...] = ()

    @property
    def stages(self) -> tuple[Offer, ...]:
        """What each stage asks for, in their order."""
        return *self.earlier, self

    @property
    def worst_case_uatp(self) -> int:
        """The price if every stage runs and every token is made."""
        return sum(self.worst_case_by_tier.values())

    @property
    def worst_case_by_tier(self) -> dict[Tier, int]:
        """Each tier's part of the worst case."""
        parts: Counter[Tier] = Counter()
        for stage in self.stages:
            parts[stage.tier] += stage.prompt_uatp + stage.max_new_tokens * stage.decode_uatp
        return dict(parts)

    def tokens_within(self, amount_uatp: int) -> int:
        """The largest `max_new_tokens` of every stage that `amount_uatp` covers; 0: none is."""
        prompt_uatp = sum(stage.prompt_uatp for stage in self.stages)
        return max(0, (amount_uatp - prompt_uatp) // sum(s.decode_uatp for s in self.stages))


@dataclass(frozen=True, slots=True)
class Budget:
    """One account's books at one instant, refill included."""

    account: str
    balance_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int


class EntryKind(enum.Enum):
    """Why an amount moved."""

    GRANT = "grant"
    REFILL = "refill"
    HOLD = "hold"
    SETTLE = "settle"
    RELEASE = "release"
    VOID = "void"
    EXPIRE = "expire"
    REVOKE = "revoke"


@dataclass(frozen=True, slots=True)
class Entry:
    """One immutable line: `amount_uatp` > 0 moved from book `debit` to book `credit`.

    `entry_id` is counted per account; numbers that are missing are of entries that were folded.
    `time_ns` is Unix time; `job_id` and `rate_card` are empty where there is no job. `usage` is
    what a settled job's charge is for, by tier and phase.
    """

    entry_id: int
    time_ns: int
    kind: EntryKind
    job_id: str
    amount_uatp: int
    debit: str
    credit: str
    rate_card: str
    usage: tuple[PhaseTokens, ...] = ()


@dataclass(frozen=True, slots=True)
class Day:
    """What is left of an account's entries of one UTC day that were folded; `day` 0 is 1970-01-01.

    They minted and spent so much, together; jobs are those that ended so on that day.
    """

    day: int
    num_entries: int
    minted_uatp: int
    spent_uatp: int
    settled_jobs: int
    voided_jobs: int
    expired_jobs: int


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """What an operator sets; None stays as it is. Held amounts stay held."""

    balance_uatp: int | None = None
    capacity_uatp: int | None = None
    refill_uatp_per_s: int | None = None
    strategic_floor_uatp: int | None = None


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Ledger entries, newest first; `next_page_token` is empty on the last page.

    `days` is what is left of older ones, behind the oldest entry.
    """

    entries: tuple[Entry, ...]
    next_page_token: str
    days: tuple[Day, ...] = ()
