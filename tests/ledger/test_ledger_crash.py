"""The books after `kill -9`, many times, in the middle of their work."""

import random
from pathlib import Path

from killed_ledger import live_and_be_killed

from sage_fed.ledger import Ledger, check
from sage_fed.ledger.ledger_files import snapshot

KILLS = 10


async def test_the_books_balance_after_kill_9_at_any_instant(tmp_path: Path):
    """Every acknowledged settlement is there, every other hold is voided, the audit is silent."""
    path = tmp_path / "ledger.db"
    chance = random.Random(6590)
    settled: dict[str, int] = {}
    open_holds = voided = 0
    for life in range(KILLS):
        said = live_and_be_killed(path, life, chance.randint(2, 120))
        assert ["open", str(open_holds)] == said[0]
        settled |= {words[1]: int(words[2]) for words in said if words[0] == "settled"}
        report = check(path)
        assert () == report.violations
        open_holds = report.open_holds
        voided += open_holds

    ledger = await Ledger(path).open()
    assert open_holds == ledger.recovery.voided_jobs
    assert 0 == await ledger.held_total_uatp()
    await ledger.close()

    report = check(path)
    assert (0, ()) == (report.open_holds, report.violations)
    with snapshot(path) as (db, _):
        written = dict(db.execute("SELECT job_id, charged_uatp FROM job WHERE state = 'settled'"))
    assert settled == {job_id: written.get(job_id) for job_id in settled}
    assert len(settled) > KILLS
    assert voided > 0
