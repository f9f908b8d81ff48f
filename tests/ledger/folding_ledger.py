"""A daemon's worth of jobs whose entries are folded at once, until somebody kills it.

Prints like `ledger_crash_child`, and `folded <entries>` after each round of tidying.
"""

import asyncio
import itertools
import sys
from pathlib import Path

from ledger_crash_child import ATP, CLIENTS, client, say

from sage_fed.ledger import AccountTerms, Ledger, LedgerOptions, Retention


async def main(path: Path, life: str) -> None:
    """Open, say what was recovered, work and tidy."""
    options = LedgerOptions(retention=Retention(keep_s=0.0, entries_s=0.0))
    ledger = await Ledger(path, options=options).open()
    await ledger.ensure_account("ann", AccountTerms(1000 * ATP, 50_000, initial_uatp=1000 * ATP))
    say(f"open {ledger.recovery.voided_jobs}")
    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(client(ledger, f"{life}-{number}"))
        for _ in itertools.count():
            say(f"folded {await ledger.tidy()}")
            await asyncio.sleep(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
