"""The state directory: made private at the start, and it says where the daemon listens.

Owns the file `endpoint.json` in it. Fails with `ConfigError`, which names the setting, and with
`MachineFault` where the disk takes nothing now.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

from sage_fed.settings import Address, UnixSocket
from sage_fed.trusted_files import (
    make_directory,
    os_error,
    replace_file,
    require_trusted_directory,
)

ENDPOINT_FILE = "endpoint.json"
"""Where this daemon listens; there while it serves."""


def require_own(state_dir: Path) -> None:
    """Refuse a directory that somebody else may change, before anything in it is believed."""
    require_trusted_directory("state_dir", state_dir)


def prepare(state_dir: Path) -> None:
    """Make the directory where there is none."""
    make_directory("state_dir", state_dir)


@contextlib.asynccontextmanager
async def announced(
    state_dir: Path, listen: Address | UnixSocket, metrics: Address
) -> AsyncIterator[None]:
    """Say where we listen while we do."""
    endpoint = state_dir / ENDPOINT_FILE
    where = json.dumps({"listen": str(listen), "metrics": str(metrics)})
    try:
        # In a thread, as it is synced, and calls are answered already.
        await asyncio.to_thread(replace_file, endpoint, where, mode=0o644)
    except OSError as error:
        raise os_error(f"state_dir: cannot write {endpoint}", error) from None
    try:
        yield
    finally:
        endpoint.unlink(missing_ok=True)
