"""The file of who may call: `[[token]]` and `[[certificate]]` tables in TOML.

Owns its form, how `sage-fed token` changes it, and how a new token looks. A change is whole or not
there (written beside, then renamed, under a lock), the file stays private, and the operator's
comments stay where they are. Holds digests, never a token.
Fails with `ConfigError`, which names the file, the entry and the key, or with `MachineFault`;
nothing is changed then.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import logging
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.toml_document import TOMLDocument

from sage_fed.auth.authenticator import (
    Certificate,
    Identity,
    Register,
    Token,
    digest_of,
    parse_identity,
)
from sage_fed.core import Caller, Role
from sage_fed.errors import ConfigError
from sage_fed.settings import AccountSettings
from sage_fed.trusted_files import open_trusted, os_error, owners_beside, replace_file

KEYS: Mapping[str, frozenset[str]] = {
    "token": frozenset({"sha256", "account", "role", "name", "created", "expires"}),
    "certificate": frozenset({"identity", "account", "role", "name", "created", "expires"}),
}
"""The tables and their keys."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


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
    for at, entry in _tables(where, document, "token"):
        token = _token(at, entry, accounts)
        if token.digest in tokens:
            raise ConfigError(_twice(at, "token", "sha256", tokens[token.digest].caller))
        tokens[token.digest] = token
    for at, entry in _tables(where, document, "certificate"):
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


def _tables(where: str, document: Mapping[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
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


# Keeps comments and order, which the standard library cannot: it only reads TOML.


ID_CHARS = 8
"""Of a digest: enough to tell tokens apart, too few to guess one from."""

_MAX_MODE = 0o640


@dataclass(frozen=True, slots=True)
class Entry:
    """One who may call, as the file has it; `id` and `name` are what it is revoked by."""

    id: str
    kind: str
    name: str
    account: str
    role: str
    created: str
    expires: str

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.id} ({self.name})" if self.name else self.id


def entries(path: Path, accounts: Mapping[str, AccountSettings]) -> tuple[Entry, ...]:
    """Return the file's entries in their order; none where there is no file."""
    read_register(path, accounts, optional=True, owners=owners_beside(path))
    return tuple(entry for _, _, entry in _entries(_read(path), accounts))


def add(
    path: Path,
    accounts: Mapping[str, AccountSettings],
    proof: Mapping[str, str],
    *,
    account: str,
    role: str | None,
    name: str,
    expires: dt.datetime | None,
) -> Entry:
    """Let somebody in, by `sha256` or by `identity` as `proof` says; return the new entry.

    Raises:
        ConfigError: the file cannot be used or written, or has the name or the proof already.
    """
    kind = "token" if "sha256" in proof else "certificate"
    with _changing(path, accounts) as document:
        if name and any(known.name == name for _, _, known in _entries(document, accounts)):
            raise ConfigError(f"name: {name} is taken in {path}; choose another, or revoke it")
        _require_new(path, document, accounts, kind, proof)
        table = tomlkit.table()
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        given = {**proof, "account": account, "role": role, "name": name or None, "created": now}
        for key, value in {**given, "expires": expires}.items():
            if value is not None:
                table[key] = value
        if kind not in document:
            document[kind] = tomlkit.aot()
        document[kind].append(table)
    return _entry(kind, table, accounts)


def remove(path: Path, accounts: Mapping[str, AccountSettings], wanted: str) -> Entry:
    """Let somebody in no more, by id or by name; return what was removed.

    Raises:
        ConfigError: the file cannot be used or written, or has no such entry, or several.
    """
    with _changing(path, accounts) as document:
        found = [
            (kind, number, entry)
            for kind, number, entry in _entries(document, accounts)
            if wanted in (entry.id, entry.name)
        ]
        if not found:
            raise ConfigError(
                f"{path} has nobody of the id or name {wanted}; see `sage-fed token list`"
            )
        if len(found) > 1:
            raise ConfigError(
                f"{wanted} is several in {path}; give one's id, see `sage-fed token list`"
            )
        kind, number, entry = found[0]
        del document[kind][number]
        if not document[kind]:
            del document[kind]
    return entry


def _require_new(
    path: Path,
    document: TOMLDocument,
    accounts: Mapping[str, AccountSettings],
    kind: str,
    proof: Mapping[str, str],
) -> None:
    """Refuse a proof that somebody has, with the command that makes it free again."""
    wanted = _compared(kind, proof)
    for known_kind, number, known in _entries(document, accounts):
        if known_kind == kind and _compared(kind, document[kind][number]) == wanted:
            raise ConfigError(
                f"{path} has {known.id} already, for account {known.account}; first "
                f"`sage-fed token revoke {known.id}`"
            )


def _compared(kind: str, table: Mapping[str, Any]) -> object:
    """What makes two entries the same for the reader."""
    if kind == "token":
        return str(table["sha256"]).lower()
    return parse_identity(str(table["identity"])).widest


def _entries(
    document: TOMLDocument, accounts: Mapping[str, AccountSettings]
) -> Iterator[tuple[str, int, Entry]]:
    for kind in KEYS:
        tables: Any = document.get(kind, [])
        for number, table in enumerate(tables):
            yield kind, number, _entry(kind, table, accounts)


def _entry(kind: str, table: Any, accounts: Mapping[str, AccountSettings]) -> Entry:  # noqa: ANN401
    account = str(table["account"])
    settings = accounts.get(account)
    role = table.get("role") or (settings.role.value if settings is not None else "user")
    proof = str(table["sha256"]).lower()[:ID_CHARS] if kind == "token" else str(table["identity"])
    return Entry(
        id=proof,
        kind=kind,
        name=str(table.get("name", "")),
        account=account,
        role=str(role),
        created=_time(table.get("created")),
        expires=_time(table.get("expires")),
    )


def _time(value: object) -> str:
    return value.isoformat() if isinstance(value, dt.datetime) else str(value or "")


@contextlib.contextmanager
def _changing(path: Path, accounts: Mapping[str, AccountSettings]) -> Iterator[TOMLDocument]:
    """The document, to be changed in the block and written after it."""
    try:
        with _locked(path.parent):
            read_register(path, accounts, optional=True, owners=owners_beside(path))
            document = _read(path)
            yield document
            text = tomlkit.dumps(document)
            # A file that its reader refuses could not be mended by a command any more.
            parse_register(path, text.encode(), accounts)
            _write(path, text)
    except OSError as error:
        raise os_error(f"{path}: cannot be written", error) from None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep others who change a file here waiting; the file itself is replaced, so not on it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> TOMLDocument:
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return tomlkit.document()


def _write(path: Path, text: str) -> None:
    """Replace the file, its owner, group and mode kept."""
    try:
        before = path.stat()
    except FileNotFoundError:
        # Made by root for a service whose directory this is: the service has to read it.
        before = None
    owner = before or path.parent.stat()
    replace_file(
        path,
        text,
        mode=0o600 if before is None else stat.S_IMODE(before.st_mode) & _MAX_MODE,
        owner=(owner.st_uid, owner.st_gid) if os.geteuid() == 0 else None,
    )


ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
"""In the state directory, readable by its owner only; written anew at every start."""

ADMIN_ACCOUNT = "local"
"""Who pays for what the admin token's bearer runs, where the settings name no anonymous account."""

TOKEN_PREFIX = "sagefed_"  # noqa: S105 - what every token begins with
"""So that scanners of repositories and logs know one when they see it."""


def new_token() -> str:
    """Return a fresh token: 256 random bits, and what it is."""
    return f"{TOKEN_PREFIX}{secrets.token_urlsafe(32)}"


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
