"""Who calls, and what they may do.

Owns bearer tokens: the tokens file, the admin token of this machine, and the comparison.
Only SHA-256 digests are kept; no token is ever logged or put into an error.
Does not know gRPC: it is handed the values of the `authorization` header.
Fails with `Unauthenticated` and `Forbidden` for callers, `ConfigError` for the operator's files.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_fed.core import Caller, Role
from sage_fed.errors import ConfigError, Forbidden, Unauthenticated
from sage_fed.settings import AccountSettings, Settings

ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
"""In the state directory, readable by its owner only; written anew at every start."""

ADMIN_ACCOUNT = "local"
"""Who pays for what the admin token's bearer runs, where the settings name no anonymous account."""

MAX_TOKEN_CHARS = 1024
"""A longer header is refused unread."""

_KEYS = frozenset({"sha256", "account", "role"})
_DIGEST = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token as we know it: its SHA-256 digest (32 bytes), and whom it stands for."""

    digest: bytes
    caller: Caller


class Authenticator:
    """Decides who calls. `anonymous` is who calls without a token; None refuses them."""

    def __init__(self, tokens: Sequence[Token], anonymous: Caller | None) -> None:
        self._tokens = tuple(tokens)
        self._anonymous = anonymous

    @classmethod
    def from_settings(cls, settings: Settings, admin: Token) -> Authenticator:
        """Build what the settings describe, with the admin token of this machine.

        Callers without a token are let in on loopback only, and never as admins.

        Raises:
            ConfigError: the tokens file cannot be used.
        """
        tokens = [admin]
        if settings.auth.tokens_file is not None:
            tokens += read_tokens(settings.auth.tokens_file, settings.accounts)
        account = settings.auth.anonymous_account
        anonymous = Caller(account, Role.USER) if account and settings.listen.is_loopback else None
        return cls(tokens, anonymous)

    def accounts(self) -> frozenset[str]:
        """Return every account that may call: each needs a budget."""
        callers = {token.caller for token in self._tokens}
        if self._anonymous is not None:
            callers.add(self._anonymous)
        return frozenset(caller.account for caller in callers)

    def caller(self, authorization: Sequence[str | bytes]) -> Caller:
        """Return who calls, from the values of the `authorization` header (none or one).

        Raises:
            Unauthenticated: no token where one is needed, a malformed header, or a token that
                nobody has. A wrong token is refused even where none is needed.
        """
        if not authorization:
            if self._anonymous is None:
                raise Unauthenticated("send a token: authorization: Bearer <token>")
            return self._anonymous
        digest = hashlib.sha256(_bearer(authorization)).digest()
        found: Caller | None = None
        # No early exit: the time taken says nothing about which token was close.
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token.caller
        if found is None:
            raise Unauthenticated("nobody has this token")
        return found


def require_role(caller: Caller, role: Role) -> None:
    """Refuse a caller without the role; an admin may do all that a user may.

    Raises:
        Forbidden: the caller may not do this.
    """
    if role is Role.ADMIN and caller.role is not Role.ADMIN:
        raise Forbidden(f"account {caller.account} is not an admin")


def mint_admin_token(state_dir: Path, account: str) -> Token:
    """Write a fresh admin token to the state directory (mode 0600) and return its digest.

    Raises:
        ConfigError: the state directory cannot be written.
    """
    token = secrets.token_urlsafe(32)
    path = state_dir / ADMIN_TOKEN_FILE
    fresh = path.with_name(f"{ADMIN_TOKEN_FILE}.new")
    try:
        fresh.unlink(missing_ok=True)
        # Born private, then renamed: at no instant is it readable by others, or half written.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"{token}\n")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"state_dir: cannot write {path}: {error.strerror}") from None
    digest = hashlib.sha256(token.encode()).digest()
    return Token(digest, Caller(account or ADMIN_ACCOUNT, Role.ADMIN))


def read_tokens(path: Path, accounts: Mapping[str, AccountSettings]) -> tuple[Token, ...]:
    """Read a tokens file: `[[token]]` tables with `sha256`, `account` and optionally `role`.

    Without `role` a token has its account's role in the settings, and that of a user otherwise.

    Raises:
        ConfigError: unreadable, not TOML, or an entry that cannot be used; names the entry and key.
    """
    where = f"auth.tokens_file {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"{where}: anyone may write it; chmod o-w")
    if mode & stat.S_IROTH:
        _log.warning("%s: anyone may read it; chmod o-r keeps the digests private", where)
    if unknown := sorted(document.keys() - {"token"}):
        raise ConfigError(f"{where}: unknown key {unknown[0]}; entries are [[token]] tables")
    entries = document.get("token", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: token must be a list of [[token]] tables")
    tokens: dict[bytes, Token] = {}
    for number, entry in enumerate(entries, start=1):
        token = _token(f"{where}: token {number}", entry, accounts)
        if token.digest in tokens:
            raise ConfigError(f"{where}: token {number}: sha256 appears twice")
        tokens[token.digest] = token
    return tuple(tokens.values())


def _token(where: str, entry: dict[str, Any], accounts: Mapping[str, AccountSettings]) -> Token:
    if unknown := sorted(entry.keys() - _KEYS):
        raise ConfigError(
            f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(_KEYS))}"
        )
    digest, account, role = entry.get("sha256"), entry.get("account"), entry.get("role")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest.lower()):
        raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits")
    if not isinstance(account, str) or not account or not account.isprintable():
        raise ConfigError(f"{where}: account must be the name of an account")
    if role is None:
        settings = accounts.get(account)
        role = settings.role.value if settings is not None else Role.USER.value
    if role not in [known.value for known in Role]:
        raise ConfigError(f"{where}: role must be user or admin")
    return Token(bytes.fromhex(digest), Caller(account, Role(role)))


def _bearer(authorization: Sequence[str | bytes]) -> bytes:
    """Return the token of one `Bearer` header."""
    if len(authorization) > 1:
        raise Unauthenticated("send one authorization header, not several")
    value = authorization[0]
    text = value.encode() if isinstance(value, str) else value
    scheme, _, token = text.partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token or len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated("the authorization header must be: Bearer <token>")
    return token
