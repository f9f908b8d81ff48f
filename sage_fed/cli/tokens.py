"""`sage-fed token ...`: who may call.

Owns: the options of these commands, and that a token is shown once, and on stdout alone.
Does not know: the file's form (`sage_fed.auth.editing`).
Fails: exit codes of `exits.py`; a file that cannot be used is 2.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import EXIT_CODES_HELP, reported
from sage_fed.cli.render import print_json, print_table
from sage_fed.cli.serve import effective
from sage_fed.cli.streams import complain
from sage_fed.core import Role

if TYPE_CHECKING:
    from sage_fed.settings import Settings

_SPAN = re.compile(r"(?P<count>[1-9]\d{0,4})(?P<unit>[hd])")
_MAX_CHARS = 256
_ROLES = ", ".join(role.value for role in Role)

TokensFile = Annotated[
    Path | None,
    typer.Option(
        "--tokens-file", metavar="FILE", help="The file; otherwise auth.tokens_file's, or "
        "tokens.toml in the state directory.",
    ),
]  # fmt: skip


def token_app() -> typer.Typer:
    """The commands."""
    app = typer.Typer(
        name="token",
        invoke_without_command=True,
        callback=options.help_if_bare,
        help="Say who may call. A running daemon follows within two seconds.",
        epilog=EXIT_CODES_HELP,
    )
    for name, command in (("create", create), ("revoke", revoke), ("list", list_tokens)):
        app.command(name, epilog=EXIT_CODES_HELP)(command)
    return app


def expiry(text: str) -> dt.datetime:
    """A time from now such as `90d` or `12h`, or a date in ISO form, in UTC without a zone."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    if span := _SPAN.fullmatch(text):
        hours = int(span["count"]) * (24 if span["unit"] == "d" else 1)
        return now + dt.timedelta(hours=hours)
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither 90d, 12h nor a date as 2027-01-31") from None
    at = at.replace(tzinfo=dt.UTC) if at.tzinfo is None else at
    if at <= now:
        raise typer.BadParameter(f"{text} is over")
    return at


def role_name(text: str) -> str:
    """One of the roles."""
    if text not in {role.value for role in Role}:
        raise typer.BadParameter(f"{text!r} is none of {_ROLES}")
    return text


def create(
    *,
    account: Annotated[str, typer.Option("--account", metavar="NAME", help="Who pays.")],
    role: Annotated[
        str | None,
        typer.Option(
            "--role",
            parser=role_name,
            metavar="ROLE",
            help=f"{_ROLES} (metrics only); the account's by default.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", metavar="TEXT", help="What it is for; revokes it, too.")
    ] = "",
    expires: Annotated[
        dt.datetime | None,
        typer.Option("--expires", parser=expiry, metavar="WHEN", help="90d, 12h or 2027-01-31."),
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option(
            "--certificate",
            metavar="[KIND:]NAME",
            help="No token: let in who shows a client certificate of this name; KIND is dns, uri, "
            "email, ip or cn.",
        ),
    ] = None,
    tokens_file: TokensFile = None,
    config_file: options.ConfigFile = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a token, and show it once.

    The file keeps its SHA-256 only. Stdout is the token and nothing else.
    """
    with reported(as_json=as_json):
        settings = _settings(config_file, state_dir)
        from sage_fed.auth import digest_of, new_token, parse_identity  # noqa: PLC0415 - with the settings
        from sage_fed.auth.editing import add  # noqa: PLC0415
        from sage_fed.settings import parse_account  # noqa: PLC0415

        path = tokens_file or settings.tokens_file
        _require("account", account, parse_account)
        _require("name", name, _printable)
        token = None if certificate is not None else new_token()
        proof = (
            {"identity": _require("certificate", certificate or "", _printable, parse_identity)}
            if token is None
            else {"sha256": digest_of(token).hex()}
        )
        entry = add(
            path, settings.accounts, proof, account=account, role=role, name=name, expires=expires
        )
        if as_json:
            print_json({"token": token, **asdict(entry), "tokens_file": str(path)})
            return
        who = f"{entry.title} is {entry.role} of account {entry.account}"
        until = f" until {entry.expires}" if entry.expires else ""
        typer.echo(f"{who}{until}, in {path}", err=True)
        if token is None and settings.tls.client_ca is None:
            complain("warning: it matches nobody until tls.client_ca is set: no client shows one")
        if token is not None:
            typer.echo("keep the token now, it is not shown again:", err=True)
            typer.echo(token)


def revoke(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="Its id or its name.")],
    *,
    tokens_file: TokensFile = None,
    config_file: options.ConfigFile = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Let a token, or a certificate, in no more.

    Jobs that run go on; every further call is refused.
    """
    with reported(as_json=as_json):
        settings = _settings(config_file, state_dir)
        from sage_fed.auth.editing import remove  # noqa: PLC0415 - with the settings

        path = tokens_file or settings.tokens_file
        entry = remove(path, settings.accounts, wanted)
        if as_json:
            print_json({"revoked": asdict(entry), "tokens_file": str(path)})
        else:
            typer.echo(f"revoked {entry.title} of account {entry.account}")


def list_tokens(
    *,
    tokens_file: TokensFile = None,
    config_file: options.ConfigFile = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Show who may call; never a token."""
    with reported(as_json=as_json):
        settings = _settings(config_file, state_dir)
        from sage_fed.auth.editing import entries  # noqa: PLC0415 - with the settings

        path = tokens_file or settings.tokens_file
        known = entries(path, settings.accounts)
        if as_json:
            print_json({"entries": [asdict(entry) for entry in known], "tokens_file": str(path)})
            return
        if not known:
            typer.echo(f"nobody, in {path}")
            return
        print_table(
            ("id", "kind", "name", "account", "role", "created", "expires"),
            [
                (e.id, e.kind, e.name, e.account, e.role, e.created, e.expires or "never")
                for e in known
            ],
        )


def _settings(config_file: Path | None, state_dir: str | None) -> Settings:
    return effective({"state_dir": state_dir}, config_file).settings


def _require(field: str, text: str, *parsers: Callable[[str], object]) -> str:
    """The text, which every parser takes, as the file's reader will."""
    try:
        for parse in parsers:
            parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{field}") from None
    return text


def _printable(text: str) -> str:
    if not text.isprintable() or len(text) > _MAX_CHARS:
        raise ValueError(f"expected at most {_MAX_CHARS} printable characters")
    return text
