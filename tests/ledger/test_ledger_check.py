"""The audit finds what was tampered with, and says where."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest
from holds import asked

from sage_fed.errors import ConfigError, LedgerCorrupt
from sage_fed.ledger import AccountTerms, Ledger, check


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    """A closed ledger: a job settled at 4 of 10, one given back by a restart, a request kept.

    And one that was given back by itself, of which only a day's row is left.
    """
    path = tmp_path / "ledger.db"
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(1000, initial_uatp=100))
    await ledger.ensure_account("bob", AccountTerms(1000, initial_uatp=100))
    await ledger.hold(*asked("j1", "ann", 10, "card", "tactical", client_request_id="r"))
    await ledger.settle("j1", 4, "length", b"answer")
    await ledger.hold(*asked("j2", "ann", 20, "card", "tactical"))
    await ledger.close()
    ledger = await Ledger(path).open()
    await ledger.hold(*asked("j0", "ann", 30, "card", "tactical"))
    await ledger.void("j0", "refused")
    await ledger.close()
    return path


def tamper(path: Path, *statements: str) -> None:
    """Change the file as somebody with the SQLite shell would: triggers out of the way."""
    with_shell = apsw.Connection(str(path))
    guards = with_shell.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
    ).fetchall()
    for name, _ in guards:
        with_shell.execute(f"DROP TRIGGER {name}")
    with_shell.pragma("ignore_check_constraints", True)
    for statement in statements:
        with_shell.execute(statement)
    for _, sql in guards:
        with_shell.execute(str(sql))
    with_shell.close()


async def test_sound_books_pass_open_or_closed(path: Path):
    """With and without a writer, with open holds, and without changing the folder."""
    files = sorted(path.parent.iterdir())
    closed = await asyncio.to_thread(check, path)
    assert files == sorted(path.parent.iterdir())
    ledger = await Ledger(path).open()
    await ledger.hold(*asked("j3", "ann", 5, "card", "tactical"))
    running = await asyncio.to_thread(check, path)
    await ledger.close()

    assert (2, 2, 0, 7, 2, ()) == (
        closed.accounts,
        closed.jobs,
        closed.open_holds,
        closed.entries,
        closed.folded_entries,
        closed.violations,
    )
    assert (2, 3, 1, 8, 2, ()) == (
        running.accounts,
        running.jobs,
        running.open_holds,
        running.entries,
        running.folded_entries,
        running.violations,
    )


@pytest.mark.parametrize(
    ("statement", "violation"),
    [
        (
            "UPDATE account SET charged_uatp = charged_uatp + 1 WHERE account = 'ann'",
            "account ann: charged is 97 uATP, its entries say 96",
        ),
        (
            "UPDATE account SET held_uatp = 3 WHERE account = 'bob'",
            "account bob: 3 uATP are held, its open jobs hold 0",
        ),
        (
            "UPDATE entry SET amount_uatp = 5 WHERE kind = 'settle'",
            "ann is settled at 4 of 10 uATP, its entries say hold 10, settle 5, release 6, ",
        ),
        (
            "DELETE FROM entry WHERE kind = 'void'",
            "job j2 of account ann is voided at 0 of 20 uATP, its entries say hold 20, settle 0, ",
        ),
        (
            "DELETE FROM entry WHERE entry_id = 1",
            "entries: there are 6 and 2 were folded, but the last of all is 9: some were removed",
        ),
        (
            "DELETE FROM entry WHERE entry_id = 1",
            "account ann: there are 5 entries and 2 were folded, but the last is 8",
        ),
        (
            "DELETE FROM day",
            "entries: there are 7 and 0 were folded, but the last of all is 9: some were removed",
        ),
        (
            "UPDATE day SET charged_uatp = 1",
            "account ann: charged is 96 uATP, its entries say 97",
        ),
        (
            "UPDATE book SET last_entry_id = 8",
            "entries: the last of all is 8, the accounts have had 9: some are missing",
        ),
        (
            "UPDATE book SET last_entry_id = 6",
            "entries: there is one of the number 7, after the last, 6",
        ),
        (
            "UPDATE book SET kept_bytes = 5",
            "requests: 5 bytes of results are counted, there are 6",
        ),
        (
            "UPDATE entry SET amount_uatp = 9 WHERE entry_id = 1",
            "account ann: charged fell to -1 uATP at entry 3",
        ),
        (
            "UPDATE entry SET account = 'bob', number = 9 WHERE kind = 'hold' AND job_id = 'j2'",
            "entry 6 of job j2 is on account bob, the job on ann",
        ),
        (
            "UPDATE job SET charged_uatp = 2 WHERE job_id = 'j2'",
            "job j2 of account ann is voided, 2 uATP charged",
        ),
        (
            "UPDATE entry SET entry_id = 90 - entry_id WHERE job_id = 'j2'",
            "job j2 of account ann ended at entry 83, before its hold at 84",
        ),
        (
            "UPDATE request SET account = 'bob'",
            "account bob: client request 'r' stands for job j1 of account ann, which is settled",
        ),
        (
            "UPDATE request SET settled_ns = NULL",
            "account ann: client request 'r' stands for job j1 of account ann, which is settled",
        ),
        (
            "UPDATE job SET account = 'carl' WHERE job_id = 'j1'",
            "table job: a row names something that is not in account",
        ),
        (
            "UPDATE entry SET kind = 'gift' WHERE entry_id = 1",
            "account ann: entry 1 is a gift of 100 uATP from mint to charged",
        ),
        (
            "UPDATE entry SET job_id = 'j1' WHERE entry_id = 1",
            "account ann: entry 1 is a grant of 100 uATP from mint to charged",
        ),
        ("DROP INDEX entry_once", "schema: index entry_once is missing"),
    ],
)
def test_tampering_is_found_and_named(path: Path, statement: str, violation: str):
    """One changed row, one sentence that says which account or job."""
    tamper(path, statement)

    found = check(path).violations

    assert any(violation in line for line in found), found


def test_a_missing_guard_is_found(path: Path):
    """Books whose triggers were dropped are not trusted, even where they balance."""
    with_shell = apsw.Connection(str(path))
    with_shell.execute("DROP TRIGGER entry_no_update")
    with_shell.close()

    assert ("schema: trigger entry_no_update is missing",) == check(path).violations


def test_amounts_too_large_to_add_are_reported(path: Path):
    """The audit itself does not fall over them."""
    tamper(path, f"UPDATE entry SET amount_uatp = {2**63 - 1} WHERE kind = 'grant'")
    tamper(
        path,
        f"UPDATE entry SET amount_uatp = {2**63 - 1}, account = 'ann', number = 99 "
        "WHERE entry_id = 2",
    )

    assert any("could not be computed" in line for line in check(path).violations)


def test_a_file_that_is_no_ledger_is_an_error(tmp_path: Path):
    """Nothing to audit is not a pass."""
    with pytest.raises(ConfigError, match="no ledger"):
        check(tmp_path / "none.db")
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"garbage" * 1000)
    with pytest.raises(LedgerCorrupt):
        check(garbage)
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(LedgerCorrupt, match="is empty or damaged"):
        check(empty)
