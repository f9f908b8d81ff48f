"""Where the daemon keeps what the command line reads on the same machine.

Owns: the names of the files in a state directory.
Does not know: what is in them.
Fails: `ConfigError` where the admin token cannot be read.
"""

from __future__ import annotations

from pathlib import Path

from sage_fed.errors import ConfigError
from sage_fed.trusted_files import owners_beside, read_trusted


def ledger_file(state_dir: Path) -> Path:
    """The books."""
    return state_dir / "ledger.db"


def operator_token(token: str | None, state_dir: str | None) -> str:
    """The given token, or the one of this machine's daemon."""
    if token:
        return token
    from sage_fed.cli.serve import effective  # noqa: PLC0415 - pydantic takes half a second

    return admin_token(effective({"state_dir": state_dir}, None).settings.state_dir)


def admin_token(state_dir: Path) -> str:
    """The token that the running daemon wrote for operators of its machine."""
    path = state_dir / "admin.token"
    try:
        return read_trusted("admin token", path, owners_beside(path)).decode().strip()
    except OSError as error:
        raise ConfigError(
            f"admin token: {path} cannot be read ({error.strerror}); give --state-dir of the "
            "running daemon, or an admin's token in SAGE_FED_TOKEN"
        ) from None
