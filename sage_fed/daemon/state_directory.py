"""The state directory: made private at the start, and it says where the daemon listens.

Owns the file `endpoint.json` in it. Fails with `ConfigError`, which names the setting.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from sage_fed.errors import ConfigError
from sage_fed.settings import Address, UnixSocket

ENDPOINT_FILE = "endpoint.json"
"""Where this daemon listens; there while it serves."""


def prepare(state_dir: Path) -> None:
    """Make the directory where there is none."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_dir: cannot create {state_dir}: {error.strerror}") from None


@contextlib.contextmanager
def announced(state_dir: Path, listen: Address | UnixSocket, metrics: Address) -> Iterator[None]:
    """Say where we listen while we do; renamed into place, so that no reader sees half of it."""
    endpoint = state_dir / ENDPOINT_FILE
    fresh = endpoint.with_name(f"{endpoint.name}.new")
    try:
        fresh.write_text(json.dumps({"listen": str(listen), "metrics": str(metrics)}))
        fresh.replace(endpoint)
    except OSError as error:
        raise ConfigError(f"state_dir: cannot write {endpoint}: {error.strerror}") from None
    try:
        yield
    finally:
        endpoint.unlink(missing_ok=True)
