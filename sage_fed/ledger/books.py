"""The bookkeeping on one connection: holds and their ends, accounts, request ids, old days.

Owns every row and the order of an operation's entries. Knows no threads and no transactions: the
caller opens one, and takes back an operation that raised (`writer.py`). Every time is an argument.
A hold ends exactly once; each end first counts the refill until now, because what is spent makes
room that earlier refill must not fill.
Fails with the errors each method names; an `apsw` error means a bug or a broken disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import apsw

from sage_fed.core import Budget, BudgetChange, Day, Entry, EntryKind, Phase, PhaseTokens, Tier
from sage_fed.errors import (
    CannotAfford,
    HoldClosed,
    InvalidField,
    NoSuchAccount,
    NotFound,
    RequestIdConflict,
)
from sage_fed.ledger.entries import (
    MAX_LIFETIME_UATP,
    MOVES,
    NS_PER_S,
    AccountTerms,
    HoldReceipt,
    HoldRequest,
    JobState,
    Now,
    Page,
    Place,
    Recovery,
    Replay,
    RequestKey,
    Retention,
    Settlement,
    require_amount,
    require_text,
)

MAX_HASH_BYTES = 64
MAX_TTL_S = 30 * 86400.0

DAY_NS = 86_400 * NS_PER_S
MAX_INT = 2**63 - 1

REFILL_QUANTUM_NS = NS_PER_S
"""Refill younger than this is not written unless it is needed: at most about one entry a second."""

MARK_AGE_NS = 60 * NS_PER_S
"""Refill older than this is written by `keep_marks`, so a crash and reboot lose at most this."""

MARKS_STEP = 256
STEP_ENTRIES = 256
STEP_REQUESTS = 256
STEP_BYTES = 2**20
"""What one step of the upkeep looks at or forgets at most: a few milliseconds of the writer's."""

_ORPHANED = "orphaned"
"""The outcome of a hold that a dead process left."""

_REST = {
    JobState.SETTLED: EntryKind.RELEASE,
    JobState.VOIDED: EntryKind.VOID,
    JobState.EXPIRED: EntryKind.EXPIRE,
}
"""The entry by which comes back what an ended hold was not charged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    job_id: str
    account: str
    held_uatp: int
    charged_uatp: int = 0
    state: JobState = JobState.HELD


class Books:
    """One ledger's operations; `accounts`, `requests` and `days` are its other tables."""

    def __init__(self, db: apsw.Connection, retention: Retention | None = None) -> None:
        self.db = db
        self.accounts = Accounts(db)
        self.retention = retention or Retention()
        self.requests = Requests(db, self.retention)
        self.days = Days(db)

    def hold(
        self, key: RequestKey, decide: Callable[[Budget], HoldRequest], now: Now
    ) -> HoldReceipt | Replay:
        """Hold what `decide` asks for when it is shown the balance; a repeat is not asked.

        Deciding and holding are one operation, so no other client's hold comes between them.
        Raises `NoSuchAccount`, `RequestIdConflict`, `InvalidField`, `CannotAfford` and what
        `decide` raises; nothing is held then.
        """
        _require_sound_key(key)
        replay = self.requests.find(key)
        if replay is not None:
            return replay
        row = self.accounts.read(key.account)
        refilled = row.refilled(now)
        request = decide(refilled.budget())
        _require_sound(request)
        balance_uatp = refilled.charged_uatp - request.amount_uatp
        if balance_uatp < 0:
            raise CannotAfford(
                f"the worst case of {request.amount_uatp} uATP is above the balance of "
                f"{refilled.charged_uatp}; ask for less or wait for the refill",
                account=key.account,
                detail="cannot_afford",
                retry_after_s=None,
            )
        self.db.execute(
            "INSERT INTO job (job_id, account, state, held_uatp, rate_card, tier, expires_ns) "
            "VALUES (?, ?, 'held', ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                request.job_id,
                key.account,
                request.amount_uatp,
                request.rate_card,
                request.tier,
                now.ns + int(request.ttl_s * NS_PER_S),
            ),
        )
        if not self.db.changes():
            raise InvalidField("job_id", "is in use")
        self.accounts.write_refill(row, refilled, now, needed_uatp=request.amount_uatp)
        self.accounts.post(key.account, EntryKind.HOLD, request.amount_uatp, now, request.job_id)
        self.requests.claim(key, request.job_id)
        # What is held counts as outstanding, so holding it makes no room for more refill.
        return HoldReceipt(request.job_id, request.amount_uatp, balance_uatp)

    def settle(
        self,
        job_id: str,
        charged_uatp: int,
        outcome: str,
        result: bytes | None,
        now: Now,
        *,
        usage: Sequence[PhaseTokens] = (),
    ) -> Settlement:
        """Charge a hold's actual price and release the rest; a second time changes nothing.

        `usage` is what the charge is for. `result` is kept for repeats of the client's request;
        None keeps nothing.
        Raises `NotFound`, `InvalidField` (a charge above the hold) and `HoldClosed` where the
        hold was voided or has expired: then nothing is charged.
        """
        job = self._read(job_id)
        if job.state is JobState.SETTLED:
            return self._ended_before(job, now)
        if job.state is not JobState.HELD:
            raise HoldClosed(f"the hold of job {job_id} was {job.state.value}", how=job.state.value)
        require_amount("charged_uatp", charged_uatp)
        if charged_uatp > job.held_uatp:
            raise InvalidField("charged_uatp", f"is above the {job.held_uatp} uATP held")
        return self._end(
            job,
            JobState.SETTLED,
            outcome,
            now,
            charged_uatp=charged_uatp,
            result=result,
            usage=usage,
        )

    def void(self, job_id: str, reason: str, now: Now) -> Settlement:
        """Give a hold back whole; after it expired, or a restart gave it back, nothing changes.

        Nothing came of the job, so a count is all that stays of it: a second call for it is told
        that there is no such job.
        Raises `NotFound`, and `HoldClosed` where the hold was settled.
        """
        job = self._read(job_id)
        if job.state is JobState.SETTLED:
            raise HoldClosed(f"the hold of job {job_id} was settled", how=job.state.value)
        if job.state is JobState.HELD:
            return self._end(job, JobState.VOIDED, reason, now)
        return self._ended_before(job, now)

    def expire_due(self, now: Now, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Give back every hold past its time to live; returns their job ids.

        Those of jobs in `alive` stay: such a job still ends its hold itself, and its work must
        not become free because it took long.
        """
        due = [job for job in self._open(due_ns=now.ns) if job.job_id not in alive]
        for job in due:
            self._end(job, JobState.EXPIRED, "expired", now)
        return tuple(job.job_id for job in due)

    def recover(self, now: Now) -> Recovery:
        """Go on with books that another process has left, perhaps on another boot or machine.

        Refill is counted from here, and every open hold is voided: no process runs their jobs.
        """
        self.accounts.begin_epoch(now)
        orphans = self._open()
        for job in orphans:
            self._end(job, JobState.VOIDED, _ORPHANED, now)
        return Recovery(len(orphans), sum(job.held_uatp for job in orphans))

    def page(self, account: str, place: Place | None, limit: int) -> Page:
        """Up to `limit` entries of an account from a place on, newest first, and its days behind.

        Raises `NoSuchAccount`.
        """
        self.accounts.read(account)
        place = place or Place(MAX_INT)
        entries = () if place.in_days else self._entries(account, place.before, limit)
        if len(entries) == limit:
            # Also where nothing comes behind them: that page is then empty, and last.
            return Page(entries, (), Place(entries[-1].entry_id))
        wanted = limit - len(entries)
        days = self.days.read(account, place.before if place.in_days else MAX_INT, wanted)
        rest = Place(days[-1].day, in_days=True) if len(days) == wanted else None
        return Page(entries, days, rest)

    def _entries(self, account: str, before_id: int, limit: int) -> tuple[Entry, ...]:
        rows = self.db.execute(
            "SELECT number, time_ns, kind, coalesce(entry.job_id, ''), amount_uatp, debit, "
            "credit, coalesce(rate_card, ''), iif(kind = 'settle', usage, '') "
            "FROM entry LEFT JOIN job USING (job_id) "
            "WHERE entry.account = ? AND number < ? ORDER BY number DESC LIMIT ?",
            (account, before_id, limit),
        )
        return tuple(
            Entry(number, time_ns, EntryKind(kind), job, uatp, debit, credit, card, _usage(usage))
            for number, time_ns, kind, job, uatp, debit, credit, card, usage in rows
        )

    def tidy(self, now: Now, passed_id: int) -> Folded:
        """Forget what is past its retention, and fold what is old: one small step of it."""
        if self.requests.prune(now):
            return Folded(0, passed_id, more=True)
        return self.days.fold(now, max(self.retention.entries_s, self.retention.keep_s), passed_id)

    def prove_writable(self) -> None:
        """Write what changes nothing; fails where the disk takes no writes."""
        self.db.pragma("user_version", self.db.pragma("user_version"))

    def held_total_uatp(self) -> int:
        """What is held now, over all accounts."""
        return int(self.db.execute("SELECT coalesce(sum(held_uatp), 0) FROM account").get)

    def _read(self, job_id: str) -> _Job:
        row = self.db.execute(
            "SELECT account, held_uatp, charged_uatp, state FROM job WHERE job_id = ?", (job_id,)
        ).fetchone()
        if row is None:
            raise NotFound(f"the ledger has no job {job_id}")
        account, held_uatp, charged_uatp, state = cast("tuple[Any, ...]", row)
        return _Job(job_id, account, held_uatp, charged_uatp, JobState(state))

    def _open(self, due_ns: int = MAX_INT) -> list[_Job]:
        # By that index or not at all: asked for in order, SQLite reads every job there ever was.
        rows = self.db.execute(
            "SELECT job_id, account, held_uatp FROM job INDEXED BY job_open "
            "WHERE state = 'held' AND expires_ns <= ?",
            (due_ns,),
        ).fetchall()
        return [_Job(*row) for row in sorted(cast("list[tuple[Any, Any, Any]]", rows))]

    def _end(
        self,
        job: _Job,
        state: JobState,
        outcome: str,
        now: Now,
        *,
        charged_uatp: int = 0,
        result: bytes | None = None,
        usage: Sequence[PhaseTokens] = (),
    ) -> Settlement:
        row = self.accounts.read(job.account)
        refilled = row.refilled(now)
        self.accounts.write_refill(row, refilled, now)
        self.db.execute(
            "UPDATE job SET state = ?, outcome = ?, charged_uatp = ?, usage = ? WHERE job_id = ?",
            (state.value, outcome, charged_uatp, _usage_text(usage), job.job_id),
        )
        rest_uatp = job.held_uatp - charged_uatp
        self.accounts.post(job.account, EntryKind.SETTLE, charged_uatp, now, job.job_id)
        self.accounts.post(job.account, _REST[state], rest_uatp, now, job.job_id)
        self.requests.answer(job.job_id, result, now)
        # What its own job gave back came to nothing; and what is free has no entry to be found by.
        given_back = state is JobState.VOIDED and outcome != _ORPHANED
        if given_back or not (job.held_uatp or self.requests.keeps(job.job_id)):
            self.days.fold_job(job.job_id, job.account, state, now.wall_ns)
        # The refill until now was counted before, so what comes back is all that comes.
        balance_uatp = refilled.charged_uatp + rest_uatp
        return Settlement(job.job_id, job.held_uatp, charged_uatp, balance_uatp)

    def _ended_before(self, job: _Job, now: Now) -> Settlement:
        balance_uatp = self.accounts.read(job.account).refilled(now).charged_uatp
        return Settlement(job.job_id, job.held_uatp, job.charged_uatp, balance_uatp, repeated=True)


def _usage_text(usage: Sequence[PhaseTokens]) -> str:
    return json.dumps([[n.tier.name, n.phase.value, n.tokens] for n in usage]) if usage else ""


def _usage(text: str) -> tuple[PhaseTokens, ...]:
    return tuple(
        PhaseTokens(Tier.called(tier), Phase(phase), tokens)
        for tier, phase, tokens in json.loads(text or "[]")
    )


def _require_sound_key(key: RequestKey) -> None:
    require_text("client_request_id", key.client_request_id, empty=True)
    if any(len(known) > MAX_HASH_BYTES for known in key.payload_hashes):
        raise InvalidField("payload_hash", f"must have at most {MAX_HASH_BYTES} bytes")


def _require_sound(request: HoldRequest) -> None:
    require_amount("amount_uatp", request.amount_uatp)
    require_text("job_id", request.job_id)
    require_text("rate_card", request.rate_card)
    if not 0 < request.ttl_s <= MAX_TTL_S:
        raise InvalidField("ttl_s", f"must be above 0 and at most {MAX_TTL_S:.0f}")


_DECLARED = {
    "capacity_uatp": "declared_capacity_uatp",
    "refill_uatp_per_s": "declared_refill_uatp_per_s",
    "strategic_floor_uatp": "declared_floor_uatp",
}
"""The terms that settings and operators both set, and where it is kept what the settings said."""


@dataclass(frozen=True, slots=True)
class Account:
    """One row, as of its refill mark."""

    account: str
    charged_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int
    refill_epoch: str
    refill_ns: int
    refill_remainder: int
    declared_capacity_uatp: int | None = None
    declared_refill_uatp_per_s: int | None = None
    declared_floor_uatp: int | None = None

    @property
    def room_uatp(self) -> int:
        """How much may come in yet. Held amounts count: voiding them must not pass the capacity."""
        outstanding_uatp = self.charged_uatp + self.held_uatp
        lifetime_uatp = outstanding_uatp + self.discharged_uatp
        return max(0, min(self.capacity_uatp - outstanding_uatp, MAX_LIFETIME_UATP - lifetime_uatp))

    def refilled(self, now: Now) -> Account:
        """The row with the refill since its mark, up to its room, and the mark moved.

        A rate in uATP/s over some ns gives billionths of a uATP; whole ones are credited and the
        rest is carried, so that refilling often and refilling rarely give the same sum.
        Within an epoch the mark never goes back, so a clock that does cannot pay twice.
        Of another epoch nothing counts: no clock tells how long ago its mark was, and another
        machine's uptime says nothing about it.
        """
        ns = max(self.refill_ns, now.ns) if self.refill_epoch == now.epoch else now.ns
        elapsed_ns = ns - self.refill_ns if self.refill_epoch == now.epoch else 0
        amount_uatp, remainder = divmod(
            self.refill_uatp_per_s * elapsed_ns + self.refill_remainder, NS_PER_S
        )
        if amount_uatp >= self.room_uatp:  # full at some time since: what came later is lost
            amount_uatp, remainder = self.room_uatp, 0
        return replace(
            self,
            charged_uatp=self.charged_uatp + amount_uatp,
            refill_epoch=now.epoch,
            refill_ns=ns,
            refill_remainder=remainder,
        )

    def budget(self) -> Budget:
        return Budget(
            account=self.account,
            balance_uatp=self.charged_uatp,
            held_uatp=self.held_uatp,
            discharged_uatp=self.discharged_uatp,
            capacity_uatp=self.capacity_uatp,
            refill_uatp_per_s=self.refill_uatp_per_s,
            strategic_floor_uatp=self.strategic_floor_uatp,
        )


_ACCOUNT = f"SELECT {', '.join(column.name for column in fields(Account))} FROM account"  # noqa: S608 - columns of ours


class Accounts:
    """The `account` table on one connection, and the insertion of every entry."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def find(self, account: str) -> Account | None:
        """The row, or None."""
        row = self._db.execute(f"{_ACCOUNT} WHERE account = ?", (account,)).fetchone()
        return None if row is None else Account(*cast("tuple[Any, ...]", row))

    def read(self, account: str) -> Account:
        """The row; `NoSuchAccount` where there is none."""
        row = self.find(account)
        if row is None:
            raise NoSuchAccount("this account has no budget; ask the operator for one")
        return row

    def post(
        self, account: str, kind: EntryKind, amount_uatp: int, now: Now, job_id: str | None = None
    ) -> None:
        """Add an entry, which moves the balances; an amount of 0 moves nothing."""
        assert amount_uatp >= 0, "an entry only ever moves forward"
        if amount_uatp == 0:
            return
        self._db.execute(
            "INSERT INTO entry (entry_id, number, time_ns, account, kind, job_id, amount_uatp, "
            "debit, credit) SELECT last_entry_id + 1, last_number + 1, ?, account, ?, ?, ?, ?, ? "
            "FROM book, account WHERE account = ?",
            (now.wall_ns, kind.value, job_id, amount_uatp, *MOVES[kind], account),
        )
        assert self._db.changes() == 1, "the account was read before"

    def write_refill(
        self, row: Account, refilled: Account, now: Now, *, needed_uatp: int = 0
    ) -> None:
        """Write the refill since the mark, before an operation that moves this account.

        Left for later where that changes no sum: the account was never full since its mark,
        `needed_uatp` is there already, and the mark is younger than `REFILL_QUANTUM_NS`.
        """
        if (
            refilled.room_uatp == 0
            or needed_uatp > row.charged_uatp
            or refilled.refill_ns - row.refill_ns >= REFILL_QUANTUM_NS
            or refilled.refill_epoch != row.refill_epoch
        ):
            self._write(row, refilled, now)

    def begin_epoch(self, now: Now) -> None:
        """Begin to count here and now for every account that was last counted on another boot."""
        self._db.execute(
            "UPDATE account SET refill_epoch = ?, refill_ns = ? WHERE refill_epoch <> ?",
            (now.epoch, now.ns, now.epoch),
        )

    def keep_marks(
        self, now: Now, *, age_ns: int = MARK_AGE_NS, after: str = "", limit: int = MARKS_STEP
    ) -> str:
        """Write the refill of accounts whose mark is at least `age_ns` old; one step.

        Looks at so many accounts behind the name `after`, at all where `limit` is -1; returns the
        last one's name, "" at the end.
        """
        rows = self._db.execute(
            f"{_ACCOUNT} WHERE account > ? ORDER BY account LIMIT ?", (after, limit)
        ).fetchall()
        seen = [Account(*cast("tuple[Any, ...]", values)) for values in rows]
        for row in seen:
            refilled = row.refilled(now)
            if row.refill_uatp_per_s and (
                refilled.refill_ns - row.refill_ns >= age_ns or now.epoch != row.refill_epoch
            ):
                self._write(row, refilled, now)
        return seen[-1].account if len(seen) == limit else ""

    def ensure(self, account: str, terms: AccountTerms, now: Now) -> Budget:
        """Create the account, or apply what the settings have changed.

        The last word on a term holds: the operator's, until the settings say something else of
        it than they did when they were last applied or the operator spoke.
        """
        said = {name: getattr(terms, name) for name in _DECLARED}
        for name, amount in (*said.items(), ("initial_uatp", terms.initial_uatp)):
            require_amount(name, amount)
        row = self.find(account)
        if row is None:
            return self._apply(account, BudgetChange(terms.initial_uatp, **said), said, now)
        changed = {}
        for name, new in said.items():
            old, current = getattr(row, _DECLARED[name]), getattr(row, name)
            # None: an operator made it, before this program kept what the settings said then.
            if old in (None, new):
                continue
            changed[name] = new
            if current not in (old, new):
                log.warning(
                    "account %s: the settings have changed its %s, so that %d uATP replace the %d "
                    "that an operator had set; `sage-fed admin set-budget` sets it again",
                    account, name, new, current,
                )  # fmt: skip
        return self._apply(account, BudgetChange(**changed), said, now)

    def set_budget(
        self, account: str, change: BudgetChange, now: Now, terms: AccountTerms | None = None
    ) -> Budget:
        """Create the account or change it; what a new one is not told is 0.

        `terms` are what the settings say of the account now: over what it sets here the operator
        has had the last word, see `ensure`.
        Raises `InvalidField` on amounts out of range.
        """
        named = {
            name: amount
            for name in BudgetChange.__slots__
            if (amount := getattr(change, name)) is not None
        }
        for name, amount in named.items():
            require_amount(name, amount)
        said: dict[str, int] = {}
        if terms is not None:
            # A new account is the operator's in every term, an old one's only in those named.
            told = _DECLARED if self.find(account) is None else _DECLARED.keys() & named.keys()
            said = {name: getattr(terms, name) for name in told}
        return self._apply(account, change, said, now)

    def _apply(
        self, account: str, change: BudgetChange, said: Mapping[str, int], now: Now
    ) -> Budget:
        """Make the account where there is none, change it, and remember what the settings said."""
        require_text("account", account)
        self._db.execute(
            "INSERT INTO account (account, capacity_uatp, refill_uatp_per_s, "
            "strategic_floor_uatp, refill_epoch, refill_ns, refill_remainder) "
            "VALUES (?, 0, 0, 0, ?, ?, 0) ON CONFLICT DO NOTHING",
            (account, now.epoch, now.ns),
        )
        before = self.read(account)
        # The time until now was lived under the old terms.
        row = before.refilled(now)
        self._write(before, row, now)
        if change.balance_uatp is not None:
            rise_uatp = change.balance_uatp - row.charged_uatp
            if change.balance_uatp + row.held_uatp + row.discharged_uatp > MAX_LIFETIME_UATP:
                raise InvalidField("balance_uatp", "this account has got as much as it ever can")
            self.post(account, EntryKind.GRANT, max(0, rise_uatp), now)
            self.post(account, EntryKind.REVOKE, max(0, -rise_uatp), now)
        terms = {name: getattr(change, name) for name in _DECLARED}
        self._update(account, {name: term for name, term in terms.items() if term is not None})
        self._update(account, {_DECLARED[name]: term for name, term in said.items()})
        return self.read(account).budget()

    def _write(self, row: Account, refilled: Account, now: Now) -> None:
        amount_uatp = refilled.charged_uatp - row.charged_uatp
        self.post(row.account, EntryKind.REFILL, amount_uatp, now)
        mark = ("refill_epoch", "refill_ns", "refill_remainder")
        self._update(row.account, {name: getattr(refilled, name) for name in mark})

    def _update(self, account: str, values: Mapping[str, int | str]) -> None:
        if values:
            columns = ", ".join(f"{name} = ?" for name in values)
            self._db.execute(
                f"UPDATE account SET {columns} WHERE account = ?",  # noqa: S608 - columns of ours
                (*values.values(), account),
            )


class Requests:
    """The `request` table: which client request ids are taken, and the results kept for a repeat.

    An id is claimed by a hold and freed when the hold is voided or expires, or is settled without a
    result. A settled one is kept for the retention; where its result is too large or had to make
    room, the id still refuses a second run, because running again would charge again.
    """

    def __init__(self, db: apsw.Connection, retention: Retention) -> None:
        self._db = db
        self._retention = retention

    def find(self, key: RequestKey) -> Replay | None:
        """The kept result, or None where the id is free (an empty one always is).

        Raises `RequestIdConflict` where it was used with another payload, its job still runs,
        or its result is no longer kept.
        """
        if not key.client_request_id:
            return None
        row = self._db.execute(
            "SELECT job_id, payload_hash, settled_ns, result FROM request "
            "WHERE account = ? AND client_request_id = ?",
            (key.account, key.client_request_id),
        ).fetchone()
        if row is None:
            return None
        job_id, first_hash, settled_ns, result = row
        if first_hash not in key.payload_hashes:
            raise RequestIdConflict(
                "client_request_id was used for another request; choose another"
            )
        if settled_ns is None:
            raise RequestIdConflict(
                "the first request with this client_request_id is still running"
            )
        if result is None:
            raise RequestIdConflict(
                "the request with this client_request_id was answered, but its result was too "
                "large to keep; choose another"
            )
        return Replay(job_id, result)

    def claim(self, key: RequestKey, job_id: str) -> None:
        """Take the id for a new hold; nothing where there is none."""
        if key.client_request_id:
            self._db.execute(
                "INSERT INTO request (account, client_request_id, payload_hash, job_id) "
                "VALUES (?, ?, ?, ?)",
                (key.account, key.client_request_id, key.payload_hashes[0], job_id),
            )

    def answer(self, job_id: str, result: bytes | None, now: Now) -> None:
        """Keep a settled job's result for repeats; without one its id is free again."""
        if result is None:
            self.free(job_id)
            return
        kept = result if len(result) <= self._retention.one_result_bytes else None
        self._db.execute(
            "UPDATE request SET settled_ns = ?, result = ? WHERE job_id = ?",
            (now.wall_ns, kept, job_id),
        )

    def keeps(self, job_id: str) -> bool:
        """Whether an id stands for this job."""
        return bool(self._db.execute("SELECT 1 FROM request WHERE job_id = ?", (job_id,)).get)

    def free(self, job_id: str) -> None:
        """Let the id of a job be used again."""
        self._db.execute("DELETE FROM request WHERE job_id = ?", (job_id,))

    def prune(self, now: Now) -> int:
        """Forget the oldest ids past the retention, or the oldest results above the byte limit.

        One step, of so many rows and bytes; returns how many ids or results it was, 0 at the end.
        """
        oldest_ns = now.wall_ns - int(self._retention.keep_s * NS_PER_S)
        past = self._step("settled_ns < ? AND settled_ns IS NOT NULL", oldest_ns, STEP_BYTES)
        for row in past:
            job_id = self._db.execute(
                "DELETE FROM request WHERE rowid = ? RETURNING job_id", (row,)
            ).get
            # A free job has no entries that lead to it later.
            self._db.execute("DELETE FROM job WHERE job_id = ? AND held_uatp = 0", (job_id,))
        above_bytes = self.kept_bytes() - self._retention.all_results_bytes
        if past or above_bytes <= 0:
            return len(past)
        oldest = self._step("settled_ns <= ? AND result IS NOT NULL", MAX_INT, above_bytes)
        self._db.executemany(
            "UPDATE request SET result = NULL WHERE rowid = ?", [(row,) for row in oldest]
        )
        return len(oldest)

    def kept_bytes(self) -> int:
        """What all kept results take together."""
        return int(self._db.execute("SELECT kept_bytes FROM book").get)

    def _step(self, where: str, until_ns: int, enough_bytes: int) -> list[int]:
        """The oldest settled ids of those: as many as are a step, or make up so many bytes."""
        found, bytes_left = [], min(enough_bytes, STEP_BYTES)
        for row, size in self._db.execute(
            f"SELECT rowid, coalesce(length(result), 0) FROM request WHERE {where} "  # noqa: S608
            "ORDER BY settled_ns, rowid LIMIT ?",
            (until_ns, STEP_REQUESTS),
        ):
            if bytes_left <= 0:
                break
            found.append(int(row))
            bytes_left -= int(size)
        return found


_MAY_FOLD = (
    "SELECT state FROM job WHERE job_id = ? AND state <> 'held' "
    "AND NOT EXISTS (SELECT 1 FROM request WHERE request.job_id = job.job_id)"
)
"""How a job ended whose entries are needed no more: not open, and no request id to answer.

What else has to stay gets its condition here, and in the trigger `entry_stays`.
"""


@dataclass(frozen=True, slots=True)
class Folded:
    """What a step did: entries that went, where the next one begins, whether there may be more."""

    entries: int
    passed_id: int
    more: bool


class Days:
    """The `day` table: one row an account and day, into which old entries are folded.

    The database itself adds an entry that is deleted to its day (`schema.py`), so no sum can be
    lost. Entries go in the order in which they came, oldest first, a job's all together with its
    ending; only the hold of a job that has not ended, or not long ago, is passed over. So what is
    left is, at every instant, a balance to start from and everything since: `check` proves it,
    running balances included.
    A hold that was given back by its own job moved nothing in the end, and a client could make as
    many as it likes: it goes at once, and leaves a count.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def fold_job(self, job_id: str, account: str, ended: JobState, ended_ns: int) -> int:
        """Fold all that is left of a job that has ended; how many entries that were."""
        self._db.execute("DELETE FROM entry WHERE job_id = ?", (job_id,))
        entries = self._db.changes()
        self._db.execute("DELETE FROM job WHERE job_id = ?", (job_id,))
        count = f"{ended.value}_jobs"
        self._db.execute(
            "INSERT INTO day (account, day, entries, charged_uatp, held_uatp, discharged_uatp, "  # noqa: S608 - a column of ours
            f"{count}) VALUES (?, ?, 0, 0, 0, 0, 1) "
            f"ON CONFLICT (account, day) DO UPDATE SET {count} = {count} + 1",
            (account, ended_ns // DAY_NS),
        )
        return entries

    def fold(self, now: Now, keep_s: float, passed_id: int) -> Folded:
        """Fold the oldest entries behind `passed_id`, as far as they are older than `keep_s`.

        One step; begun at 0, it passes over the holds of jobs that end later, and nothing else.
        A clock that is behind folds nothing, and one that was ahead holds the folding up.
        """
        oldest_ns = now.wall_ns - int(keep_s * NS_PER_S)
        rows = cast(
            "list[tuple[int, int, str, str, str | None]]",
            self._db.execute(
                "SELECT entry_id, time_ns, account, kind, job_id FROM entry WHERE entry_id > ? "
                "ORDER BY entry_id LIMIT ?",
                (passed_id, STEP_ENTRIES),
            ).fetchall(),
        )
        folded, gone = 0, set[str]()
        for entry_id, time_ns, account, kind, job_id in rows:
            if job_id in gone:  # with its ending's first entry
                continue
            if time_ns >= oldest_ns:
                return Folded(folded, passed_id, more=False)
            if job_id is None:
                self._db.execute("DELETE FROM entry WHERE entry_id = ?", (entry_id,))
                folded += 1
            elif kind != "hold":
                ended = self._db.execute(_MAY_FOLD, (job_id,)).get
                if ended is None:
                    return Folded(folded, passed_id, more=False)
                folded += self.fold_job(job_id, account, JobState(ended), time_ns)
                gone.add(job_id)
            passed_id = entry_id
        return Folded(folded, passed_id, more=len(rows) == STEP_ENTRIES)

    def read(self, account: str, before_day: int, limit: int) -> tuple[Day, ...]:
        """Up to `limit` days of an account before a day, newest first."""
        rows = self._db.execute(
            "SELECT day, entries, charged_uatp + held_uatp + discharged_uatp, discharged_uatp, "
            "settled_jobs, voided_jobs, expired_jobs FROM day WHERE account = ? AND day < ? "
            "ORDER BY day DESC LIMIT ?",
            (account, before_day, limit),
        )
        return tuple(Day(*row) for row in rows)
