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


@dataclass(frozen=True, slots=True)
class Retention:
    """How long results are kept, and how many bytes of them, each and in all."""

    keep_s: float = 24 * 3600.0
    one_result_bytes: int = 2**20
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

    def free(self, job_id: str) -> None:
        """Let the id of a job be used again."""
        self._db.execute("DELETE FROM request WHERE job_id = ?", (job_id,))

    def prune(self, now: Now) -> int:
        """Forget ids past the retention, and the oldest results above the byte limit.

        Returns how many ids were forgotten.
        """
        oldest_ns = now.wall_ns - int(self._retention.keep_s * NS_PER_S)
        self._db.execute("DELETE FROM request WHERE settled_ns < ?", (oldest_ns,))
        forgotten = self._db.changes()
        self._db.execute(
            "UPDATE request SET result = NULL WHERE rowid IN (SELECT id FROM ("
            "SELECT rowid AS id, sum(length(result)) OVER (ORDER BY settled_ns DESC, rowid DESC) "
            "AS bytes FROM request WHERE result IS NOT NULL) WHERE bytes > ?)",
            (self._retention.all_results_bytes,),
        )
        return forgotten
