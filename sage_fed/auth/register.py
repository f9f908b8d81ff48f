"""The file of who may call: `[[token]]` and `[[certificate]]` tables in TOML.

Owns its form and what makes it unusable. Holds digests, never a token.
Fails with `ConfigError`, which names the file, the entry and the key.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import os
import re
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_fed.auth.identity import Identity, parse_identity
from sage_fed.core import Caller, Role
from sage_fed.errors import ConfigError
from sage_fed.settings import AccountSettings
from sage_fed.trusted_files import open_trusted, os_error

KEYS: Mapping[str, frozenset[str]] = {
    "token": frozenset({"sha256", "account", "role", "name", "created", "expires"}),
    "certificate": frozenset({"identity", "account", "role", "name", "created", "expires"}),
}
"""The tables and their keys."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token as we know it: its SHA-256 digest (32 bytes), and whom it stands for.

    `expires_s` is in seconds since 1970.
    """

    digest: bytes
    caller: Caller
    expires_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Certificate:
    """A rule about the names in clients' certificates (`parse_identity`), and whom it means."""

    identity: str
    caller: Caller
    expires_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Register:
    """Who may call."""

    tokens: tuple[Token, ...] = ()
    certificates: tuple[Certificate, ...] = ()


def read_register(
    path: Path,
    accounts: Mapping[str, AccountSettings],
    *,
    optional: bool = False,
    owners: Collection[int] | None = None,
) -> Register:
    """Read the file. Without `role` an entry has its account's in the settings, else a user's.

    Args:
        path: the file.
        accounts: the settings of accounts that have some.
        optional: whether it may be absent, which is an empty one.
        owners: whose it may be; None is this process's user's or root's.

    Raises:
        ConfigError: unreadable, somebody else may change it, not TOML, or an entry that cannot be
            used; names entry and key.
        MachineFault: the disk does not give it now.
    """
    where = f"auth.tokens_file {path}"
    try:
        with open_trusted("auth.tokens_file", path, owners) as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except FileNotFoundError as error:
        if optional:
            return Register()
        raise ConfigError(
            f"{where}: cannot be read: {error.strerror}; `sage-fed token create` writes it"
        ) from None
    except OSError as error:
        raise os_error(f"{where}: cannot be read", error) from None
    register = parse_register(path, content, accounts)
    if mode & stat.S_IROTH:
        _log.warning("%s: anyone may read it; chmod o-r keeps the digests private", where)
    return register


def parse_register(path: Path, content: bytes, accounts: Mapping[str, AccountSettings]) -> Register:
    """Read what is, or is to be, in the file at `path`; see `read_register`.

    Raises:
        ConfigError: not TOML, or an entry that cannot be used; names entry and key.
    """
    where = f"auth.tokens_file {path}"
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if unknown := sorted(document.keys() - KEYS.keys()):
        raise ConfigError(
            f"{where}: unknown key {unknown[0]}; entries are [[token]] and [[certificate]] tables"
        )
    tokens: dict[bytes, Token] = {}
    certificates: dict[Identity, Certificate] = {}
    for at, entry in _entries(where, document, "token"):
        token = _token(at, entry, accounts)
        if token.digest in tokens:
            raise ConfigError(_twice(at, "token", "sha256", tokens[token.digest].caller))
        tokens[token.digest] = token
    for at, entry in _entries(where, document, "certificate"):
        certificate = _certificate(at, entry, accounts)
        rule = parse_identity(certificate.identity).widest
        if rule in certificates:
            raise ConfigError(_twice(at, "certificate", "identity", certificates[rule].caller))
        certificates[rule] = certificate
    return Register(tuple(tokens.values()), tuple(certificates.values()))


def _twice(at: str, kind: str, key: str, first: Caller) -> str:
    return (
        f"{at}: {key} appears twice, first for account {first.account}; delete one of the two "
        f"[[{kind}]] tables in an editor"
    )


def _entries(
    where: str, document: Mapping[str, Any], kind: str
) -> list[tuple[str, dict[str, Any]]]:
    """Return the tables of a kind, each with what an error calls it."""
    entries = document.get(kind, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{where}: {kind} must be a list of [[{kind}]] tables")
    found = []
    for number, entry in enumerate(entries, start=1):
        at = f"{where}: {kind} {number}"
        if unknown := sorted(entry.keys() - KEYS[kind]):
            known = ", ".join(sorted(KEYS[kind]))
            raise ConfigError(f"{at}: unknown key {unknown[0]}; known are {known}")
        for key in ("name", "created"):
            if not isinstance(entry.get(key, ""), (str, dt.datetime)):
                raise ConfigError(f"{at}: {key} must be a text or a time")
        found.append((at, entry))
    return found


def _token(at: str, entry: dict[str, Any], accounts: Mapping[str, AccountSettings]) -> Token:
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest.lower()):
        raise ConfigError(f"{at}: sha256 must be 64 hexadecimal digits")
    return Token(bytes.fromhex(digest), _caller(at, entry, accounts), _expires_s(at, entry))


def _certificate(
    at: str, entry: dict[str, Any], accounts: Mapping[str, AccountSettings]
) -> Certificate:
    identity = entry.get("identity")
    try:
        parse_identity(identity if isinstance(identity, str) else "")
    except ValueError as error:
        raise ConfigError(f"{at}: identity {error}") from None
    assert isinstance(identity, str), "what is no text is refused as an empty one"
    return Certificate(identity, _caller(at, entry, accounts), _expires_s(at, entry))


def _caller(at: str, entry: dict[str, Any], accounts: Mapping[str, AccountSettings]) -> Caller:
    account, role = entry.get("account"), entry.get("role")
    if not isinstance(account, str) or not account or not account.isprintable():
        raise ConfigError(f"{at}: account must be the name of an account")
    if role is None:
        settings = accounts.get(account)
        role = settings.role.value if settings is not None else Role.USER.value
    if role not in [known.value for known in Role]:
        raise ConfigError(f"{at}: role must be user, admin or monitor")
    return Caller(account, Role(role))


def _expires_s(at: str, entry: dict[str, Any]) -> float:
    expires = entry.get("expires")
    if expires is None:
        return math.inf
    if not isinstance(expires, dt.datetime) or expires.tzinfo is None:
        raise ConfigError(
            f"{at}: expires must be a time with its zone, such as 2027-01-31T00:00:00Z"
        )
    return expires.timestamp()
