"""Clocks that jump: the refill follows the time that really passed, and never pays twice."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, Launch, launch
from surroundings import require_tool

from sage_fed.client import Client
from sage_fed.core import UATP_PER_ATP, Tier
from sage_fed.ledger import check

RATE = 100
SETTINGS = (
    *("--set", "budget.initial_atp=1000", "--set", "budget.capacity_atp=1000000"),
    *("--set", f"budget.refill_atp_per_s={RATE}"),
)
WAIT_S = 60.0


def under_false_time(moment: Path) -> Launch:
    """Start a daemon that takes the wall clock's offset from a file, whenever it looks."""
    library = require_library("libfaketime.so.1")

    return partial(
        launch,
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(moment),
        FAKETIME_NO_CACHE="1",
        # An administrator or NTP moves the wall clock; nobody moves the others.
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )


def require_library(name: str) -> Path:
    """The library that `faketime` preloads."""
    require_tool("faketime")
    for folder in Path("/usr/lib").glob("*/faketime"):
        if (folder / name).exists():
            return folder / name
    pytest.fail(f"{name} is not where the package faketime puts it")


def test_the_refill_does_not_follow_the_wall_clock(tmp_path: Path) -> None:
    """A year ahead, ten back, and home: the balance grows as the seconds pass, no more, no less."""
    moment = tmp_path / "moment"
    moment.write_text("+0")
    began_s = time.monotonic()
    daemon = DaemonProcess.start(tmp_path / "state", *SETTINGS, launch=under_false_time(moment))
    spent_uatp = 0
    balances: list[int] = []
    with Client(daemon.address) as client:
        for offset in ("+365d", "-3650d", "+1d", "-1s", "+0"):
            fresh = tmp_path / "fresh"
            fresh.write_text(offset)
            fresh.replace(moment)
            finished = client.generate(
                "count", tier=Tier.TACTICAL, max_new_tokens=5, ignore_eos=True
            ).finished
            spent_uatp += finished.price.charged_uatp
            before_s = time.monotonic()
            balance = client.budget().balance_uatp + spent_uatp
            balances.append(balance)
            longest = (time.monotonic() - began_s) * RATE * UATP_PER_ATP
            assert 1000 * UATP_PER_ATP <= balance <= 1000 * UATP_PER_ATP + longest
            # Real time is what is tested: a sleep never returns early, so this much has to come.
            time.sleep(0.2)
            later = client.budget().balance_uatp + spent_uatp
            passed = (time.monotonic() - before_s) * RATE * UATP_PER_ATP
            assert 0.2 * RATE * UATP_PER_ATP <= later - balance <= passed
        stamps = [entry.time_ns for entry in client.entries(limit=100)]
    assert sorted(balances) == balances
    # The daemon did believe the clock where it may: entries are stamped with it.
    assert max(stamps) - min(stamps) > 9 * 365 * 86_400 * 10**9
    assert 0 == daemon.stop(WAIT_S)
    assert () == check(tmp_path / "state" / "ledger.db").violations


PROGRAM = """
import asyncio, sys
from pathlib import Path
from sage_fed.ledger import AccountTerms, HoldRequest, Ledger, RequestKey

async def main(path, job):
    ledger = await Ledger(Path(path)).open()
    await ledger.ensure_account("ann", AccountTerms(10**15, 1_000_000, initial_uatp=0))
    budget = await ledger.budget("ann")
    if budget.balance_uatp:
        # Written down: what was credited stays credited.
        request = HoldRequest(job, 1, "card", "tactical", 60.0)
        await ledger.hold(RequestKey("ann"), lambda _: request)
        await ledger.void(job, "test")
    print((await ledger.budget("ann")).balance_uatp)
    await ledger.close()

asyncio.run(main(*sys.argv[1:]))
"""


BOOT_ID = "/proc/sys/kernel/random/boot_id"


def balance_at(path: Path, job: str, boot_offset_s: int, boot_id: Path | None = None) -> int:
    """Open the books on a boot clock that is ahead by so much, and return the balance.

    A file for the boot's id makes it another machine's.
    """
    command = [sys.executable, "-c", PROGRAM, str(path), job]
    if boot_id is not None:
        mount = f'mount --bind "$0" {BOOT_ID} && exec "$@"'
        command = [require_tool("unshare"), "-m", "sh", "-c", mount, str(boot_id), *command]
    if boot_offset_s:
        unshare = require_tool("unshare")
        command = [unshare, "--time", "--boottime", str(boot_offset_s), "--fork", "--", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert 0 == done.returncode, done.stderr
    return int(done.stdout)


def test_a_boot_clock_that_jumps_pays_no_second_twice(tmp_path: Path) -> None:
    """Ahead by an hour it pays an hour, as nothing tells it from one; back again, nothing."""
    path = tmp_path / "ledger.db"
    began_s = time.monotonic()
    first = balance_at(path, "a", 0)
    ahead = balance_at(path, "b", 3600)
    back = balance_at(path, "c", 0)
    further_back = balance_at(path, "d", -60)
    ahead_again = balance_at(path, "e", 3600)
    passed = int((time.monotonic() - began_s) * UATP_PER_ATP) + 1
    assert first <= passed
    assert 3600 * UATP_PER_ATP <= ahead <= 3600 * UATP_PER_ATP + passed
    # The moment between the first answer and the end of that process is the only difference.
    assert ahead <= back < ahead + UATP_PER_ATP
    assert back == further_back
    assert back <= ahead_again <= 3600 * UATP_PER_ATP + passed
    assert () == check(path).violations


def test_books_that_are_carried_between_machines_are_refilled_by_neither(tmp_path: Path) -> None:
    """One has been up for an hour longer than the other: no move pays a second of it."""
    path, boot_ids = tmp_path / "ledger.db", [tmp_path / "here", tmp_path / "there"]
    for number, boot_id in enumerate(boot_ids):
        boot_id.write_text(f"0000000{number}-aaaa-bbbb-cccc-dddddddddddd\n")
    began_s = time.monotonic()
    balances = [
        balance_at(path, f"move-{move}", 3600 * (move % 2), boot_ids[move % 2]) for move in range(4)
    ]
    passed = int((time.monotonic() - began_s) * UATP_PER_ATP) + 1
    assert max(balances) <= passed
    assert sorted(balances) == balances
    assert () == check(path).violations
