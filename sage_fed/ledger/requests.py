"""Client request ids: which are taken, and the results kept for a repeat.

Owns the `request` table. Knows no amounts; runs inside the caller's transaction.
An id is claimed by a hold and freed when the hold is voided or expires, or is settled without a
result. A settled one is kept for the retention; where its result is too large or had to make
room, the id still refuses a second run, because running again would charge again.
"""

from __future__ import annotations

from dataclasses import dataclass

import apsw

from sage_fed.errors import RequestIdConflict
from sage_fed.ledger.clock import Now
from sage_fed.ledger.words import NS_PER_S, HoldRequest, Replay

STEP_REQUESTS = 256
STEP_BYTES = 2**20
"""What one step forgets at most, and the result that fills it: milliseconds of the writer's."""

MAX_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Retention:
    """How long results are kept, and how many bytes of them, each and in all.

    And how long entries are, one by one; never shorter than a request id that goes with them.
    """

    keep_s: float = 24 * 3600.0
    entries_s: float = 30 * 86_400.0
    one_result_bytes: int = 32 * 2**20
    all_results_bytes: int = 256 * 2**20


class Requests:
    """The `request` table on one connection."""

    def __init__(self, db: apsw.Connection, retention: Retention) -> None:
        self._db = db
        self._retention = retention

    def find(self, account: str, client_request_id: str, payload_hash: bytes) -> Replay | None:
        """The kept result, or None where the id is free (an empty one always is).

        Raises `RequestIdConflict` where it was used with another payload, its job still runs,
        or its result is no longer kept.
        """
        if not client_request_id:
            return None
        row = self._db.execute(
            "SELECT job_id, payload_hash, settled_ns, result FROM request "
            "WHERE account = ? AND client_request_id = ?",
            (account, client_request_id),
        ).fetchone()
        if row is None:
            return None
        job_id, first_hash, settled_ns, result = row
        if first_hash != payload_hash:
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

    def claim(self, request: HoldRequest) -> None:
        """Take the id of a new hold; nothing where it has none."""
        if request.client_request_id:
            self._db.execute(
                "INSERT INTO request (account, client_request_id, payload_hash, job_id) "
                "VALUES (?, ?, ?, ?)",
                (
                    request.account,
                    request.client_request_id,
                    request.payload_hash,
                    request.job_id,
                ),
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
        oldest = self._step("settled_ns <= ? AND result IS NOT NULL", MAX_NS, above_bytes)
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
