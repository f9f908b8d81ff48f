"""New tokens: how they look, what is kept of them, and the admin token of this machine.

Owns the one place where a token is a text; everything else knows its digest.
Fails with `ConfigError` or `MachineFault` where the state directory cannot be written.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from sage_fed.auth.register import Token
from sage_fed.core import Caller, Role
from sage_fed.trusted_files import os_error, replace_file

ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
"""In the state directory, readable by its owner only; written anew at every start."""

ADMIN_ACCOUNT = "local"
"""Who pays for what the admin token's bearer runs, where the settings name no anonymous account."""

TOKEN_PREFIX = "sagefed_"  # noqa: S105 - what every token begins with
"""So that scanners of repositories and logs know one when they see it."""


def new_token() -> str:
    """Return a fresh token: 256 random bits, and what it is."""
    return f"{TOKEN_PREFIX}{secrets.token_urlsafe(32)}"


def digest_of(token: str | bytes) -> bytes:
    """Return what is kept of a token (32 bytes); a plain SHA-256, as random bits need no salt."""
    return hashlib.sha256(token.encode() if isinstance(token, str) else token).digest()


def mint_admin_token(state_dir: Path, account: str) -> Token:
    """Write a fresh admin token to the state directory (mode 0600) and return its digest.

    Raises:
        ConfigError: the state directory may not be written.
        MachineFault: its disk takes nothing now.
    """
    token = new_token()
    path = state_dir / ADMIN_TOKEN_FILE
    try:
        replace_file(path, f"{token}\n")
    except OSError as error:
        raise os_error(f"state_dir: cannot write {path}", error) from None
    return Token(digest_of(token), Caller(account or ADMIN_ACCOUNT, Role.ADMIN))
