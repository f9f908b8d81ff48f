"""The bookkeeping: hold, settle, void, expire, on one connection.

Owns the `job` table and the order of an operation's entries. Knows no threads and no
transactions: the caller opens one, and takes back an operation that raised (`writer.py`).
Every time is an argument. A hold ends exactly once; each end first counts the refill until now,
because what is spent makes room that earlier refill must not fill.
Fails with the errors each method names; an `apsw` error means a bug or a broken disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import apsw

from sage_fed.core import Budget
from sage_fed.errors import CannotAfford, HoldClosed, InvalidField, NotFound
from sage_fed.ledger.accounts import Account, Accounts
from sage_fed.ledger.clock import Now
from sage_fed.ledger.days import Days, Folded
from sage_fed.ledger.requests import Requests, Retention
from sage_fed.ledger.words import (
    NS_PER_S,
    Entry,
    EntryKind,
    HoldReceipt,
    HoldRequest,
    JobState,
    Page,
    Place,
    Recovery,
    Release,
    Replay,
    Settlement,
    require_amount,
    require_text,
)

MAX_HASH_BYTES = 64
MAX_TTL_S = 30 * 86400.0

_EXPIRED, _ORPHANED = _NOT_ITS_OWN = ("expired", "orphaned")
"""How holds end that nobody ended; they stay in sight as long as what was charged."""


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
        self._db = db
        self.accounts = Accounts(db)
        self.retention = retention or Retention()
        self.requests = Requests(db, self.retention)
        self.days = Days(db)

    def hold(self, request: HoldRequest, now: Now) -> HoldReceipt | Replay:
        """Reserve a job's worst case, or hand back the result of the same earlier request.

        Raises `NoSuchAccount`, `RequestIdConflict`, `CannotAfford` (`detail` says whether the
        balance or the strategic floor is in the way) and `InvalidField`.
        """
        _require_sound(request)
        row = self.accounts.read(request.account)
        replay = self.requests.find(
            request.account, request.client_request_id, request.payload_hash
        )
        return self._hold(row, request, now) if replay is None else replay

    def decide_hold(
        self,
        account: str,
        client_request_id: str,
        payload_hash: bytes,
        decide: Callable[[Budget], HoldRequest],
        now: Now,
    ) -> HoldReceipt | Replay:
        """Hold what `decide` asks for when it is shown the balance; a repeat is not asked.

        Deciding and holding are one operation, so no other client's hold comes between them.
        Raises what `hold` and `decide` raise; nothing is held then.
        """
        replay = self.requests.find(account, client_request_id, payload_hash)
        if replay is not None:
            return replay
        row = self.accounts.read(account)
        request = decide(row.budget(now))
        assert request.account == account, "the balance that was shown is another account's"
        _require_sound(request)
        return self._hold(row, request, now)

    def settle(
        self, job_id: str, charged_uatp: int, outcome: str, result: bytes | None, now: Now
    ) -> Settlement:
        """Charge a hold's actual price and release the rest; a second time changes nothing.

        `result` is kept for repeats of the client's request; None keeps nothing.
        Raises `NotFound`, `InvalidField` (a charge above the hold) and `HoldClosed` where the
        hold was voided or has expired: then nothing is charged.
        """
        job = self._read(job_id)
        if job.state is JobState.SETTLED:
            balance_uatp = self._balance_uatp(job.account, now)
            return Settlement(job_id, job.held_uatp, job.charged_uatp, balance_uatp, repeated=True)
        if job.state is not JobState.HELD:
            raise HoldClosed(f"the hold of job {job_id} was {job.state.value}", how=job.state.value)
        require_amount("charged_uatp", charged_uatp)
        if charged_uatp > job.held_uatp:
            raise InvalidField("charged_uatp", f"is above the {job.held_uatp} uATP held")
        row = self.accounts.read(job.account)
        released_uatp = job.held_uatp - charged_uatp
        self.accounts.write_refill(row, now)
        self._end(job_id, JobState.SETTLED, outcome, charged_uatp)
        self.accounts.post(job.account, EntryKind.SETTLE, charged_uatp, now, job_id)
        self.accounts.post(job.account, EntryKind.RELEASE, released_uatp, now, job_id)
        self.requests.answer(job_id, result, now)
        if not job.held_uatp and not self.requests.keeps(job_id):
            self.days.fold_job(job_id, job.account, JobState.SETTLED, now.wall_ns)
        # The refill until now was counted before, so what comes back is all that comes.
        balance_uatp = row.available_uatp(now) + released_uatp
        return Settlement(job_id, job.held_uatp, charged_uatp, balance_uatp)

    def void(self, job_id: str, reason: str, now: Now) -> Release:
        """Give a hold back whole; after it expired, or a restart gave it back, nothing changes.

        Nothing came of the job, so a count is all that stays of it: whoever has it given back a
        second time is told that there is no such job.
        Raises `NotFound`, and `HoldClosed` where the hold was settled.
        """
        job = self._read(job_id)
        if job.state is JobState.SETTLED:
            raise HoldClosed(f"the hold of job {job_id} was settled", how=job.state.value)
        if job.state is JobState.HELD:
            self._give_back(job, JobState.VOIDED, EntryKind.VOID, reason, now)
        return Release(
            job_id,
            job.held_uatp,
            self._balance_uatp(job.account, now),
            repeated=job.state is not JobState.HELD,
        )

    def expire_due(self, now: Now, alive: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Give back every hold past its time to live; returns their job ids.

        Those of jobs in `alive` stay: such a job still ends its hold itself, and its work must
        not become free because it took long.
        """
        due = [
            job for job in self._open("AND expires_ns <= ?", (now.ns,)) if job.job_id not in alive
        ]
        for job in due:
            self._give_back(job, JobState.EXPIRED, EntryKind.EXPIRE, _EXPIRED, now)
        return tuple(job.job_id for job in due)

    def recover(self, now: Now) -> Recovery:
        """Go on with books that another process has left, perhaps on another boot or machine."""
        self.accounts.begin_epoch(now)
        return self.void_orphans(now)

    def void_orphans(self, now: Now) -> Recovery:
        """Void every open hold: at boot nobody can be running their jobs."""
        orphans = self._open()
        for job in orphans:
            self._give_back(job, JobState.VOIDED, EntryKind.VOID, _ORPHANED, now)
        return Recovery(len(orphans), sum(job.held_uatp for job in orphans))

    def entries(self, account: str, before_id: int | None, limit: int) -> list[Entry]:
        """Up to `limit` entries of an account with numbers below `before_id`, newest first.

        Raises `NoSuchAccount`.
        """
        self.accounts.read(account)
        rows = self._db.execute(
            "SELECT number, time_ns, kind, coalesce(entry.job_id, ''), amount_uatp, debit, "
            "credit, coalesce(rate_card, '') FROM entry LEFT JOIN job USING (job_id) "
            "WHERE entry.account = ? AND number < ? ORDER BY number DESC LIMIT ?",
            (account, 2**63 - 1 if before_id is None else before_id, limit),
        )
        return [
            Entry(entry_id, time_ns, EntryKind(kind), *rest)
            for entry_id, time_ns, kind, *rest in rows
        ]

    def page(self, account: str, place: Place | None, limit: int) -> Page:
        """Up to `limit` entries of an account from a place on, and its days behind them.

        Raises `NoSuchAccount`.
        """
        entries: list[Entry] = []
        before_day = place.before if place is not None and place.in_days else None
        if place is None or not place.in_days:
            entries = self.entries(account, None if place is None else place.before, limit)
            if len(entries) == limit:
                # Also where nothing comes behind them: that page is then empty, and last.
                return Page(tuple(entries), (), Place(entries[-1].entry_id))
        wanted = limit - len(entries)
        days = self.days.read(account, before_day, wanted)
        rest = Place(days[-1].day, in_days=True) if len(days) == wanted else None
        return Page(tuple(entries), tuple(days), rest)

    def tidy(self, now: Now, passed_id: int) -> Folded:
        """Forget what is past its retention, and fold what is old: one small step of it."""
        forgotten = self.requests.prune(now)
        if forgotten:
            return Folded(0, passed_id, more=True)
        return self.days.fold(now, max(self.retention.entries_s, self.retention.keep_s), passed_id)

    def prove_writable(self) -> None:
        """Write what changes nothing; fails where the disk takes no writes."""
        self._db.pragma("user_version", self._db.pragma("user_version"))

    def held_total_uatp(self) -> int:
        """What is held now, over all accounts."""
        return int(self._db.execute("SELECT coalesce(sum(held_uatp), 0) FROM account").get)

    def _hold(self, row: Account, request: HoldRequest, now: Now) -> HoldReceipt:
        """Hold for the account of `row`, as it was just read."""
        available_uatp = row.available_uatp(now)
        _require_affordable(row, request, now)
        self._db.execute(
            "INSERT INTO job (job_id, account, state, held_uatp, rate_card, tier, expires_ns) "
            "VALUES (?, ?, 'held', ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                request.job_id,
                request.account,
                request.amount_uatp,
                request.rate_card,
                request.tier,
                now.ns + int(request.ttl_s * NS_PER_S),
            ),
        )
        if not self._db.changes():
            raise InvalidField("job_id", "is in use")
        self.accounts.write_refill(row, now, needed_uatp=request.amount_uatp)
        self.accounts.post(
            request.account, EntryKind.HOLD, request.amount_uatp, now, request.job_id
        )
        self.requests.claim(request)
        # What is held counts as outstanding, so holding it makes no room for more refill.
        balance_uatp = available_uatp - request.amount_uatp
        return HoldReceipt(request.job_id, request.amount_uatp, balance_uatp)

    def _balance_uatp(self, account: str, now: Now) -> int:
        return self.accounts.read(account).available_uatp(now)

    def _find(self, job_id: str) -> _Job | None:
        row = self._db.execute(
            "SELECT account, held_uatp, charged_uatp, state FROM job WHERE job_id = ?", (job_id,)
        ).fetchone()
        if row is None:
            return None
        account, held_uatp, charged_uatp, state = cast("tuple[Any, ...]", row)
        return _Job(job_id, account, held_uatp, charged_uatp, JobState(state))

    def _read(self, job_id: str) -> _Job:
        job = self._find(job_id)
        if job is None:
            raise NotFound(f"the ledger has no job {job_id}")
        return job

    def _open(self, where: str = "", bindings: tuple[int, ...] = ()) -> list[_Job]:
        # By that index or not at all: asked for in order, SQLite reads every job there ever was.
        rows = self._db.execute(
            "SELECT job_id, account, held_uatp FROM job INDEXED BY job_open "  # noqa: S608
            f"WHERE state = 'held' {where}",
            bindings,
        ).fetchall()
        return [_Job(*row) for row in sorted(cast("list[tuple[Any, Any, Any]]", rows))]

    def _end(self, job_id: str, state: JobState, outcome: str, charged_uatp: int) -> None:
        self._db.execute(
            "UPDATE job SET state = ?, outcome = ?, charged_uatp = ? WHERE job_id = ?",
            (state.value, outcome, charged_uatp, job_id),
        )

    def _give_back(
        self, job: _Job, state: JobState, kind: EntryKind, outcome: str, now: Now
    ) -> None:
        self.accounts.write_refill(self.accounts.read(job.account), now)
        self._end(job.job_id, state, outcome, 0)
        self.accounts.post(job.account, kind, job.held_uatp, now, job.job_id)
        self.requests.free(job.job_id)
        # Its own job took nothing and tells nobody; and what is free has no entry to be found by.
        if outcome not in _NOT_ITS_OWN or not job.held_uatp:
            self.days.fold_job(job.job_id, job.account, state, now.wall_ns)


def _require_sound(request: HoldRequest) -> None:
    require_amount("amount_uatp", request.amount_uatp)
    require_text("job_id", request.job_id)
    require_text("rate_card", request.rate_card)
    require_text("client_request_id", request.client_request_id, empty=True)
    if len(request.payload_hash) > MAX_HASH_BYTES:
        raise InvalidField("payload_hash", f"must have at most {MAX_HASH_BYTES} bytes")
    if not 0 < request.ttl_s <= MAX_TTL_S:
        raise InvalidField("ttl_s", f"must be above 0 and at most {MAX_TTL_S:.0f}")


def _require_affordable(row: Account, request: HoldRequest, now: Now) -> None:
    available_uatp = row.available_uatp(now)
    needed_uatp = request.amount_uatp
    if request.strategic:
        needed_uatp = max(needed_uatp, row.strategic_floor_uatp + 1)
    if needed_uatp <= available_uatp:
        return
    below_floor = request.strategic and available_uatp <= row.strategic_floor_uatp
    raise CannotAfford(
        f"the balance of {available_uatp} uATP is at or below the strategic floor of "
        f"{row.strategic_floor_uatp}; ask for tactical work or wait for the refill"
        if below_floor
        else f"the worst case of {request.amount_uatp} uATP is above the balance of "
        f"{available_uatp}; ask for less or wait for the refill",
        account=request.account,
        reason="STRATEGIC_FLOOR" if below_floor else "BALANCE",
        retry_after_s=row.retry_after_s(needed_uatp, now),
    )
