"""What is left of old entries: one row an account and day, into which they are folded.

Owns the `day` table, which entries and jobs may go, and in which order. Knows no amounts: the
database itself adds an entry that is deleted to its day (`schema.py`), so no sum can be lost.
Runs inside the caller's transaction, in steps of so many rows.

Entries go in the order in which they came, oldest first, a job's all together with its ending; only
the hold of a job that has not ended, or not long ago, is passed over. So what is left is, at every
instant, a balance to start from and everything since: `check` proves it, running balances included.
A hold that was given back by its own job moved nothing in the end, and a client could make as many
as it likes: it goes at once, and leaves a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import apsw

from sage_fed.ledger.clock import Now
from sage_fed.ledger.words import NS_PER_S, Day, JobState

STEP_ENTRIES = 256
"""What one step looks at: a few milliseconds of the writer's."""

DAY_NS = 86_400 * NS_PER_S

MAY_FOLD = (
    "SELECT state FROM job WHERE job_id = ? AND state <> 'held' "
    "AND NOT EXISTS (SELECT 1 FROM request WHERE request.job_id = job.job_id)"
)
"""How a job ended whose entries nobody needs one by one: not open, and no request id to answer.

What else has to stay gets its condition here, and in the trigger `entry_stays`.
"""

_COUNTS = {
    JobState.SETTLED: "settled_jobs",
    JobState.VOIDED: "voided_jobs",
    JobState.EXPIRED: "expired_jobs",
}


@dataclass(frozen=True, slots=True)
class Folded:
    """What a step did: entries that went, where the next one begins, whether there may be more."""

    entries: int
    passed_id: int
    more: bool


class Days:
    """The `day` table on one connection."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def fold_job(self, job_id: str, account: str, ended: JobState, ended_ns: int) -> int:
        """Fold all that is left of a job that has ended; how many entries that were."""
        self._db.execute("DELETE FROM entry WHERE job_id = ?", (job_id,))
        entries = self._db.changes()
        self._db.execute("DELETE FROM job WHERE job_id = ?", (job_id,))
        count = _COUNTS[ended]
        self._db.execute(
            "INSERT INTO day (account, day, entries, charged_uatp, held_uatp, discharged_uatp, "  # noqa: S608 - a constant
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
                ended = self._db.execute(MAY_FOLD, (job_id,)).get
                if ended is None:
                    return Folded(folded, passed_id, more=False)
                folded += self.fold_job(job_id, account, JobState(ended), time_ns)
                gone.add(job_id)
            passed_id = entry_id
        return Folded(folded, passed_id, more=len(rows) == STEP_ENTRIES)

    def read(self, account: str, before_day: int | None, limit: int) -> list[Day]:
        """Up to `limit` days of an account before a day, newest first."""
        rows = self._db.execute(
            "SELECT day, entries, charged_uatp + held_uatp + discharged_uatp, discharged_uatp, "
            "settled_jobs, voided_jobs, expired_jobs FROM day WHERE account = ? AND day < ? "
            "ORDER BY day DESC LIMIT ?",
            (account, 2**63 - 1 if before_day is None else before_day, limit),
        )
        return [Day(*row) for row in rows]
