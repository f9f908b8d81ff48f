"""A daemon's worth of holds and settlements, until somebody kills it.

Prints `open <voided jobs>`, then `held <job>`, `settled <job> <uATP>` and `voided <job>` once
each is acknowledged; a line is written whole, by one system call.
"""

import asyncio
import itertools
import os
import sys
from pathlib import Path

from sage_fed.ledger import AccountTerms, HoldRequest, Ledger, RequestKey

CLIENTS = 8
ATP = 1_000_000


def say(line: str) -> None:
    """Write past every buffer: what is acknowledged must be known after a kill."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


async def client(ledger: Ledger, name: str) -> None:
    """Hold and settle, forever; every fifth job is voided, every seventh left open."""
    for number in itertools.count():
        job_id = f"{name}-{number}"
        request = HoldRequest(job_id, 100, "card", "tactical", ttl_s=60.0)
        await ledger.hold(RequestKey("ann"), lambda _, request=request: request)
        say(f"held {job_id}")
        if number % 7 == 6:
            continue
        if number % 5 == 4:
            await ledger.void(job_id, "refused")
            say(f"voided {job_id}")
            continue
        charged = (await ledger.settle(job_id, number % 100, "length", b"x")).charged_uatp
        say(f"settled {job_id} {charged}")


async def main(path: Path, life: str) -> None:
    """Open, say what was recovered, and work."""
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(1000 * ATP, 50_000, initial_uatp=1000 * ATP))
    say(f"open {ledger.recovery.voided_jobs}")
    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(client(ledger, f"{life}-{number}"))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
