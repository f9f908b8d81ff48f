"""1,000 times `kill -9` of the ledger's writer at a random instant: are the promises kept?

A ledger goes through fifty lives. In each, eight clients hold, settle, void and leave holds open
as fast as the disk allows, and say so once the ledger has acknowledged it; then the process is
killed, after a random number of acknowledgements and a random time more. After every kill the
books have to balance, and hold every acknowledged hold, settlement and void.

Run: python bench/kills.py [--count 1000]. Exit code 1 on anything lost.
Writes bench/results/kills.json.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import report
from rich.console import Console
from rich.progress import track

import sage_fed
from sage_fed.ledger import check
from sage_fed.ledger.ledger_files import snapshot

ROOT = Path(sage_fed.__file__).parents[1]
WORKER = ROOT / "tests" / "ledger" / "ledger_crash_child.py"
LIVES = 50
"""Of one ledger: its audit after every kill reads all that it ever had."""

MOST_LINES = 150
MOST_WAIT_S = 0.01


def work(path: str, life: int, said: Connection) -> None:
    """In a process of its own: hold and settle until it is killed, and say so into the pipe."""
    os.dup2(said.fileno(), sys.stdout.fileno())
    worker = runpy.run_path(str(WORKER))
    asyncio.run(worker["main"](Path(path), str(life)))


def live_and_be_killed(
    path: Path, life: int, chance: random.Random, context: ForkServerContext
) -> list[list[str]]:
    """Let a worker work, kill it, and return what it had acknowledged, word by word."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(str(path), life, writer), daemon=True)
    process.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno())) as lines:
        said = [lines.readline().split() for _ in range(chance.randint(1, MOST_LINES))]
        time.sleep(chance.uniform(0.0, MOST_WAIT_S))
        process.kill()
        said += [line.split() for line in lines]
    process.join(30)
    assert process.exitcode == -signal.SIGKILL, f"life {life} ended with {process.exitcode}"
    reader.close()
    return said


def lost(path: Path, said: list[list[str]]) -> list[str]:
    """What was acknowledged and is not in the books."""
    wanted = {words[1]: words for words in said[1:] if words}
    missing: list[str] = []
    with snapshot(path) as (db, _):
        for job_id, words in wanted.items():
            row = db.execute(
                "SELECT state, charged_uatp FROM job WHERE job_id = ?", (job_id,)
            ).fetchone()
            if not kept(words, row):
                missing.append(f"{' '.join(words)}: {row}")
    return missing


def kept(words: list[str], row: tuple[str, int] | None) -> bool:
    """Whether a job is in the books as the last of its acknowledgements says.

    Args:
        words: the acknowledgement.
        row: its state and charge; a void leaves none, only a count.
    """
    match words:
        case ["held", _]:
            return True  # its end may have been written and not been acknowledged
        case ["settled", _, price]:
            return row == ("settled", int(price))
        case ["voided", _]:
            return row is None
    return False


def counted_voids(path: Path) -> int:
    """Return how many jobs the books have counted as voided."""
    with snapshot(path) as (db, _):
        return int(db.execute("SELECT coalesce(sum(voided_jobs), 0) FROM day").get)


def main(count: int, seed: int, output: Path | None) -> int:
    """Run, check, report; the exit code."""
    chance = random.Random(seed)
    violations: list[str] = []
    acknowledged: Counter[str] = Counter()
    voided = jobs = entries = open_holds = said_voids = 0
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sage-fed-kills-") as folder:
        # A fork of a process that has imported everything begins to work at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "sage_fed.ledger"])
        for life in track(range(count), "killing", console=Console(stderr=True)):
            path = Path(folder) / f"ledger-{life // LIVES}.db"
            if life % LIVES == 0:
                open_holds = said_voids = 0
            said = live_and_be_killed(path, life, chance, context)
            if said[0] != ["open", str(open_holds)]:
                violations.append(f"life {life} began with {said[0]}, not {open_holds} open holds")
            acknowledged.update(words[0] for words in said if words)
            violations += lost(path, said)
            said_voids += sum(words[0] == "voided" for words in said if words)
            if counted_voids(path) < said_voids:
                violations.append(f"life {life}: {counted_voids(path)} of {said_voids} voids")
            books = check(path)
            violations += books.violations
            open_holds = books.open_holds
            voided += open_holds
            if life % LIVES == LIVES - 1 or life == count - 1:
                jobs, entries = jobs + books.jobs, entries + books.entries
    result = {
        "kills": count,
        "seed": seed,
        "seconds": round(time.monotonic() - began_s, 1),
        "acknowledged": {word: acknowledged[word] for word in ("held", "settled", "voided")},
        "holds_voided_after_kills": voided,
        "jobs_in_the_books": jobs,
        "entries_in_the_books": entries,
        "lost_or_unbalanced": violations[:100],
    }
    report.write("kills", result, output)
    console = Console(stderr=True)
    for violation in violations[:20]:
        console.print(f"VIOLATION: {violation}", markup=False)
    console.print(
        f"{count} kills, {acknowledged.total()} acknowledgements, {len(violations)} lost or wrong",
        highlight=False,
    )
    return 1 if violations else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=6590)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sys.exit(main(given.count, given.seed, given.output))
