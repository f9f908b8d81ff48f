"""Where the engine keeps what it can make again: compiled kernels, quantised weights.

Owns the rule for the place, and that nobody else may write there: what is found there is run,
or served. Fails with `OSError`.
"""

from __future__ import annotations

import os
from pathlib import Path

from sage_fed.errors import ConfigError
from sage_fed.trusted_files import require_trusted


def default_directory(name: str) -> Path:
    """`name` under $CACHE_DIRECTORY (systemd's), $XDG_CACHE_HOME/sage-fed or ~/.cache/sage-fed.

    Raises:
        OSError: there is no home.
    """
    named = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]  # systemd may list several
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(named) if named else Path(home or Path.home() / ".cache") / "sage-fed") / name
    except RuntimeError as error:
        raise OSError(str(error)) from error


def private(directory: Path) -> Path:
    """The directory, made if need be, which is this user's and closed to others (0700).

    Raises:
        OSError: it cannot be made, or others may use it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if status.st_mode & 0o077:
        raise PermissionError(
            f"{directory} must belong to this user and be closed to others (0700)"
        )
    try:
        require_trusted("cache", directory, status, {os.geteuid()})
    except ConfigError as error:
        raise PermissionError(error.message) from None
    return directory
