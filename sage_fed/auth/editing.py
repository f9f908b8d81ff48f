"""The tokens file as an operator changes it: `sage-fed token`.

Owns that a change is whole or not there (written beside, then renamed, under a lock), that the
file stays private, and that the operator's comments stay where they are.
Does not know how a change is asked for or shown.
Fails with `ConfigError`; nothing is changed then.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keeps comments and order, which the standard library cannot: it only reads TOML.
import tomlkit
from tomlkit.toml_document import TOMLDocument

from sage_fed.auth.identity import parse_identity
from sage_fed.auth.register import KEYS, parse_register, read_register
from sage_fed.errors import ConfigError
from sage_fed.settings import AccountSettings
from sage_fed.trusted_files import os_error, owners_beside, replace_file

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
