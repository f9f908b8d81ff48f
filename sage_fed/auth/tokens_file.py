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

ID_CHARS = 8
"""Of a digest: enough to tell tokens apart, too few to guess one from."""

_MAX_MODE = 0o640

ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105 - a file's name
"""In the state directory, readable by its owner only; written anew at every start."""

ADMIN_ACCOUNT = "local"
"""Who pays for what the admin token's bearer runs, where the settings name no anonymous account."""

TOKEN_PREFIX = "sagefed_"  # noqa: S105 - what every token begins with
"""So that scanners of repositories and logs know one when they see it."""

_log = logging.getLogger(__name__)


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


def read_register(
    path: Path,
    accounts: Mapping[str, AccountSettings],
    *,
    optional: bool = False,
) -> Register:
    """Read the file. Without `role` an entry has its account's in the settings, else a user's.

    Args:
        path: the file.
        accounts: the settings of accounts that have some.
        optional: whether it may be absent, which is an empty one.

    Raises:
        ConfigError: unreadable, another user may change it, not TOML, or an entry that cannot be
            used; names entry and key.
        MachineFault: the disk does not give it now.
    """
    content = _read(path, None, optional=optional)
    known = [proof for _, proof in _parse(path, content, accounts)]
    return Register(
        tuple(proof for proof in known if isinstance(proof, Token)),
        tuple(proof for proof in known if isinstance(proof, Certificate)),
    )


def entries(path: Path, accounts: Mapping[str, AccountSettings]) -> tuple[Entry, ...]:
    """Return the file's entries in their order; none where there is no file."""
    content = _read(path, owners_beside(path), optional=True)
    return tuple(entry for entry, _ in _parse(path, content, accounts))


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
    """Add an entry for the `sha256` or `identity` that `proof` has; return it.

    Raises:
        ConfigError: the file cannot be used or written, or has the name or the proof already.
    """
    kind = "token" if "sha256" in proof else "certificate"
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    given = {"account": account, "role": role, "name": name or None, "created": now}
    table = {
        key: value
        for key, value in (*proof.items(), *given.items(), ("expires", expires))
        if value is not None
    }
    entry, new = _entry(str(path), kind, table, accounts)
    with _changing(path, accounts) as (document, known):
        if name and any(other.name == name for other, _ in known):
            raise ConfigError(f"name: {name} is taken in {path}; choose another, or revoke it")
        for other, its_proof in known:
            if _compared(its_proof) == _compared(new):
                raise ConfigError(
                    f"{path} has {other.id} already, for account {other.account}; first "
                    f"`sage-fed token revoke {other.id}`"
                )
        document.setdefault(kind, tomlkit.aot()).append(tomlkit.item(table))
    return entry


def remove(path: Path, accounts: Mapping[str, AccountSettings], wanted: str) -> Entry:
    """Remove the entry of this id or name; return it.

    Raises:
        ConfigError: the file cannot be used or written, or has no such entry, or several.
    """
    with _changing(path, accounts) as (document, known):
        found = [entry for entry, _ in known if wanted in (entry.id, entry.name)]
        if not found:
            raise ConfigError(
                f"{path} has no entry of the id or name {wanted}; see `sage-fed token list`"
            )
        if len(found) > 1:
            raise ConfigError(
                f"{wanted} is several in {path}; give one's id, see `sage-fed token list`"
            )
        tables: Any = document[found[0].kind]
        del tables[[entry for entry, _ in known if entry.kind == found[0].kind].index(found[0])]
        if not tables:
            del document[found[0].kind]
    return found[0]


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


def _read(path: Path, owners: Collection[int] | None, *, optional: bool) -> bytes:
    """Return the file's content; nothing where it may be absent and is."""
    where = f"auth.tokens_file {path}"
    try:
        with open_trusted("auth.tokens_file", path, owners) as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                _log.warning("%s: anyone may read it; chmod o-r keeps the digests private", where)
            return file.read()
    except FileNotFoundError as error:
        if optional:
            return b""
        raise ConfigError(
            f"{where}: cannot be read: {error.strerror}; `sage-fed token create` writes it"
        ) from None
    except OSError as error:
        raise os_error(f"{where}: cannot be read", error) from None


def _parse(
    path: Path, content: bytes, accounts: Mapping[str, AccountSettings]
) -> list[tuple[Entry, Token | Certificate]]:
    """Return what is, or is to be, in the file at `path`: as it is shown, and as it is compared.

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
    found: dict[bytes | Identity, tuple[Entry, Token | Certificate]] = {}
    for kind in KEYS:
        tables = document.get(kind, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ConfigError(f"{where}: {kind} must be a list of [[{kind}]] tables")
        for number, table in enumerate(tables, start=1):
            at = f"{where}: {kind} {number}"
            entry, proof = _entry(at, kind, table, accounts)
            same = found.setdefault(_compared(proof), (entry, proof))
            if same[1] is not proof:
                key = "sha256" if kind == "token" else "identity"
                raise ConfigError(
                    f"{at}: {key} appears twice, first for account {same[0].account}; delete one "
                    f"of the two [[{kind}]] tables in an editor"
                )
    return list(found.values())


def _compared(proof: Token | Certificate) -> bytes | Identity:
    """What makes two entries the same."""
    return proof.digest if isinstance(proof, Token) else parse_identity(proof.identity).widest


def _entry(
    at: str, kind: str, table: Mapping[str, Any], accounts: Mapping[str, AccountSettings]
) -> tuple[Entry, Token | Certificate]:
    """Read one table, which an error calls `at`."""
    if unknown := sorted(table.keys() - KEYS[kind]):
        known = ", ".join(sorted(KEYS[kind]))
        raise ConfigError(f"{at}: unknown key {unknown[0]}; known are {known}")
    for key in ("name", "created"):
        if not isinstance(table.get(key, ""), (str, dt.datetime)):
            raise ConfigError(f"{at}: {key} must be a text or a time")
    caller, expires = _caller(at, table, accounts), table.get("expires")
    if expires is not None and not (isinstance(expires, dt.datetime) and expires.tzinfo):
        raise ConfigError(
            f"{at}: expires must be a time with its zone, such as 2027-01-31T00:00:00Z"
        )
    expires_s = math.inf if expires is None else expires.timestamp()
    proof: Token | Certificate
    if kind == "token":
        shown = table.get("sha256")
        if not isinstance(shown, str) or not _DIGEST.fullmatch(shown.lower()):
            raise ConfigError(f"{at}: sha256 must be 64 hexadecimal digits")
        proof = Token(bytes.fromhex(shown), caller, expires_s)
        shown = shown.lower()[:ID_CHARS]
    else:
        shown = table.get("identity")
        shown = shown if isinstance(shown, str) else ""
        try:
            parse_identity(shown)
        except ValueError as error:
            raise ConfigError(f"{at}: identity {error}") from None
        proof = Certificate(shown, caller, expires_s)
    entry = Entry(
        id=shown,
        kind=kind,
        name=str(table.get("name", "")),
        account=caller.account,
        role=caller.role.value,
        created=_time(table.get("created")),
        expires=_time(expires),
    )
    return entry, proof


def _caller(at: str, entry: Mapping[str, Any], accounts: Mapping[str, AccountSettings]) -> Caller:
    account, role = entry.get("account"), entry.get("role")
    if not isinstance(account, str) or not account or not account.isprintable():
        raise ConfigError(f"{at}: account must be the name of an account")
    if role is None:
        settings = accounts.get(account)
        role = settings.role.value if settings is not None else Role.USER.value
    if role not in [known.value for known in Role]:
        raise ConfigError(f"{at}: role must be user, admin or monitor")
    return Caller(account, Role(role))


def _time(value: object) -> str:
    return value.isoformat() if isinstance(value, dt.datetime) else str(value or "")


@contextlib.contextmanager
def _changing(
    path: Path, accounts: Mapping[str, AccountSettings]
) -> Iterator[tuple[TOMLDocument, list[tuple[Entry, Token | Certificate]]]]:
    """The document, to be changed in the block and written after it, and what it holds before."""
    try:
        with _locked(path.parent):
            content = _read(path, owners_beside(path), optional=True)
            # Keeps comments and order, which the standard library cannot: it only reads TOML.
            document = tomlkit.parse(content)
            yield document, _parse(path, content, accounts)
            text = tomlkit.dumps(document)
            # A file that its reader refuses could not be mended by a command any more.
            _parse(path, text.encode(), accounts)
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
