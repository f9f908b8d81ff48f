"""What an operator does: `models`, `status`, `admin ...`, `ledger ...`, `token ...`.

Owns: the options and tables of these commands; that a token is shown once, and on stdout alone.
Does not know: the wire; the ledger's file except through its own audit and backup; the form of
the tokens file (`sage_fed.auth`).
Fails: exit codes of `exits.py`; `ledger check` with 1 where the books do not balance.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode, reported
from sage_fed.cli.options import HERE, Connection, connected, ledger_file
from sage_fed.cli.render import (
    atp_number,
    format_atp,
    format_bytes,
    format_seconds,
    print_fields,
    print_json,
    print_table,
    printable,
)
from sage_fed.cli.serve import effective
from sage_fed.cli.streams import complain
from sage_fed.core import (
    CardFit,
    DaemonStatus,
    Day,
    ModelStatus,
    OpenReply,
    Role,
    RunningJob,
    TierLoad,
    counted,
)
from sage_fed.ledger import CheckReport, backup, check


@connected
def models(
    *,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Show the model of each tier."""
    with reported(as_json=as_json):
        listed = daemon.call(lambda client: client.models())
        if as_json:
            print_json({"models": listed})
            return
        for index, model in enumerate(listed):
            if index:
                typer.echo()
            state = model.state.value
            if model.message:
                state += f": {model.message}"
            elif model.load_progress < 1:
                state += f" {model.load_progress:.0%}"
            print_fields(
                (
                    (model.tier.name, model.name + (f"@{model.revision}" * bool(model.revision))),
                    ("  state", state),
                    ("  architecture", f"{model.architecture}, {model.parameters:,} parameters"),
                    ("  precision", f"{model.precision} on {model.device}{_kernels(model)}"),
                    (
                        "  memory",
                        f"{format_bytes(model.weight_bytes)} weights, {_kv_cache(model)}",
                    ),
                    ("  context", f"{model.max_context_tokens:,} tokens"),
                    ("  loaded in", format_seconds(model.load_s)),
                    ("  ends with", _ends(model)),
                    ("  price", _price(model)),
                )
            )


@connected
def status(
    *,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Show the daemon at a glance."""
    with reported(as_json=as_json):
        now = daemon.call(lambda client: client.status())
        if as_json:
            print_json(now)
            return
        print_fields(
            (
                ("version", now.version),
                ("up for", format_seconds(now.uptime_s)),
                (
                    "device",
                    now.device + f" (fallback: {now.device_fallback})" * bool(now.device_fallback),
                ),
                ("rate card", f"{now.rate_card} (strategic : tactical {now.cost_ratio:.2f} : 1)"),
                ("  its prices", card_fit(now)),
                ("admission", admission(now)),
                *([("recovered", recovered(now))] if now.recovered_jobs else []),
            )
        )
        typer.echo()
        print_tier_loads(now.tiers)


def admission(now: DaemonStatus) -> str:
    """Whether jobs are taken, and if not, why."""
    if now.draining:
        return "draining"
    return (
        f"refused, the ledger takes no entries: {now.ledger_trouble}"
        if now.ledger_trouble
        else "open"
    )


def recovered(now: DaemonStatus) -> str:
    """What the start had to put right."""
    return (
        f"{counted(now.recovered_jobs, 'job')} of the daemon before; "
        f"{format_atp(now.recovered_uatp)} given back"
    )


def print_tier_loads(tiers: tuple[TierLoad, ...]) -> None:
    """What each tier is doing."""
    print_table(
        ("tier", "state", "running", "waiting", "KV tokens", "cached", "step", "prefill tok/s"),
        [
            (
                tier.tier.name,
                tier.state.value,
                f"{tier.running}/{tier.running_limit}",
                f"{tier.waiting}/{tier.waiting_limit}",
                f"{tier.kv_tokens_used:,}/{tier.kv_tokens_total:,}",
                f"{tier.kv_tokens_cached:,}",
                "-" if tier.decode_step_s is None else format_seconds(tier.decode_step_s),
                "-" if tier.prefill_tokens_per_s is None else f"{tier.prefill_tokens_per_s:,.0f}",
            )
            for tier in tiers
        ],
        right=("running", "waiting", "KV tokens", "cached", "step", "prefill tok/s"),
    )


def _kernels(model: ModelStatus) -> str:
    return f", {model.kernels} kernels" if model.kernels else ""


def _ends(model: ModelStatus) -> str:
    """The tokens that end its text."""
    return ", ".join(f"{printable(end.text)} ({end.id})" for end in model.end_tokens) or "-"


def _price(model: ModelStatus) -> str:
    """What each kind of token costs on the card in force."""
    return (
        f"{format_atp(model.decode_uatp)} per output token, "
        f"{format_atp(model.prefill_uatp)} per prompt token, "
        f"{format_atp(model.cached_uatp)} where it is cached"
    )


def card_fit(now: DaemonStatus) -> str:
    """Whether the prices belong to this machine, loudly where they do not."""
    fit = now.rate_card_fit
    return f"{'STALE' if fit is CardFit.STALE else fit.value}: {headline(now.rate_card_note)}"


def headline(note: str) -> str:
    """A card's note for a person; the lines below it are for the log and for programs."""
    return note.partition("\n")[0]


def _kv_cache(model: ModelStatus) -> str:
    return f"{format_bytes(model.kv_cache_bytes)} KV cache ({model.kv_cache_tokens:,} tokens)"


if TYPE_CHECKING:
    from sage_fed.client import Client


def admin_app() -> typer.Typer:
    """The operator's commands."""
    app = typer.Typer(
        name="admin",
        invoke_without_command=True,
        callback=options.help_if_bare,
        help="Operate the daemon. The token is SAGE_FED_TOKEN, or the one in its state directory.",
        epilog=EXIT_CODES_HELP,
    )
    for command in (load, abort, drain, set_budget, adopt_card):
        app.command(epilog=EXIT_CODES_HELP)(command)
    return app


@connected
def load(
    *,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Show the running jobs of all accounts."""
    with reported(as_json=as_json):
        now = daemon.as_operator(state_dir).call(lambda client: client.load())
        if as_json:
            print_json(now)
            return
        print_tier_loads(now.tiers)
        typer.echo()
        if now.jobs:
            _print_jobs(now.jobs)
            typer.echo(f"\n{format_atp(now.held_uatp)} held over all accounts")
        else:
            typer.echo("no job is running")
        if now.unread:
            typer.echo()
            _print_unread(now.unread)
        typer.echo(
            f"{counted(now.open_calls, 'call')} on {counted(now.connections, 'connection')} "
            f"open, {counted(len(now.unread), 'reply', 'replies')} unread"
        )


def _print_jobs(jobs: Sequence[RunningJob]) -> None:
    print_table(
        ("job", "account", "tier", "priority", "age", "tokens", "held ATP"),
        [
            (
                job.job_id,
                job.account,
                job.tier.name,
                job.priority.name.lower(),
                format_seconds(job.age_s),
                f"{job.prompt_tokens} + {job.output_tokens}",
                atp_number(job.held_uatp),
            )
            for job in jobs
        ],
        right=("age", "tokens", "held ATP"),
    )


def _print_unread(replies: Sequence[OpenReply]) -> None:
    """Show what readers do not take; each name is one that `admin abort` takes."""
    print_table(
        ("call", "job", "account", "connection", "unread for", "size", "ended"),
        [
            (
                reply.call_id,
                reply.job_id or "-",
                reply.account,
                reply.connection,
                format_seconds(reply.unread_s),
                format_bytes(reply.unread_bytes),
                "yes" if reply.ended else "no",
            )
            for reply in replies
        ],
        right=("unread for", "size"),
    )


@connected
def abort(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A job's id, or a call or connection that `admin load` shows."
        ),
    ],
    *,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """End a running job, a call that is not read, or a connection.

    A job's client gets, and pays for, what was made.
    """

    def end(client: Client) -> bool:
        if name.startswith("call-"):
            return client.end_call(name)
        if name.startswith(("ipv4:", "ipv6:")):
            return client.close_connection(name)
        return client.abort(name)

    with reported(as_json=as_json):
        aborted = daemon.as_operator(state_dir).call(end)
        if as_json:
            print_json({"aborted": aborted})
        else:
            typer.echo(f"aborted {name}" if aborted else f"there is no {name} to end")
        if not aborted:
            raise typer.Exit(ExitCode.ERROR)


@connected
def drain(
    grace: Annotated[
        float | None,
        typer.Option("--grace", min=0.0, metavar="SECONDS", help="How long they may take."),
    ] = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Stop the daemon when its jobs are done.

    Nothing more is admitted. What still runs after the grace is cancelled.
    """
    with reported(as_json=as_json):
        running = daemon.as_operator(state_dir).call(lambda client: client.drain(grace))
        if as_json:
            print_json({"jobs_running": running})
        else:
            typer.echo(f"draining, {counted(running, 'job')} still run{'s' * (running == 1)}")


@connected
def set_budget(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="Its name.")],
    *,
    balance: Annotated[
        int | None,
        typer.Option(
            "--balance",
            parser=options.atp_amount,
            metavar="ATP",
            help="What it has now; at most the capacity.",
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            "--capacity",
            parser=options.atp_amount,
            metavar="ATP",
            help="Up to where it refills; a new account's balance by default.",
        ),
    ] = None,
    refill: Annotated[
        int | None,
        typer.Option(
            "--refill", parser=options.atp_amount, metavar="ATP", help="What it gains a second."
        ),
    ] = None,
    strategic_floor: Annotated[
        int | None,
        typer.Option(
            "--strategic-floor",
            parser=options.atp_amount,
            metavar="ATP",
            help="Below this only tactical work is done.",
        ),
    ] = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Create an account's budget, or change it.

    What is not given stays as it is.
    """
    with reported(as_json=as_json):
        books = daemon.as_operator(state_dir).call(
            lambda client: client.set_budget(
                account,
                balance_uatp=balance,
                capacity_uatp=capacity,
                refill_uatp_per_s=refill,
                strategic_floor_uatp=strategic_floor,
            ),
        )
        if as_json:
            print_json(books)
        else:
            typer.echo(
                f"{books.account}: {format_atp(books.balance_uatp)} of "
                f"{format_atp(books.capacity_uatp)}, "
                f"refill {format_atp(books.refill_uatp_per_s)}/s, "
                f"strategic floor {format_atp(books.strategic_floor_uatp)}"
            )


@connected
def adopt_card(
    version: Annotated[str, typer.Argument(metavar="CARD", help="Its version.")],
    *,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Put a rate card in force, until the daemon restarts.

    It prices jobs from now on; those that run keep the prices they were admitted at.
    """
    with reported(as_json=as_json):
        card = daemon.as_operator(state_dir).call(
            lambda client: client.adopt_card(version),
        )
        if as_json:
            print_json(card)
        else:
            typer.echo(
                f"{card.version} is in force (strategic : tactical {card.cost_ratio:.2f} : 1); "
                f"{card.fit.value}: {headline(card.note)}"
            )


_BOOKS = {"charged": "available", "discharged": "spent"}
"""What a person reads for a book of the ledger."""


def ledger_app() -> typer.Typer:
    """`ledger` lists, `ledger check` audits, `ledger backup` copies."""
    app = typer.Typer(
        name="ledger",
        help="List the account's entries; audit the books, or copy them.",
        epilog=EXIT_CODES_HELP,
    )
    app.callback(invoke_without_command=True)(list_entries)
    app.command("check", epilog=EXIT_CODES_HELP)(check_books)
    app.command("backup", epilog=EXIT_CODES_HELP)(back_up_books)
    return app


@connected
def list_entries(
    *,
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="So many of the newest lines.")
    ] = 50,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """List the account's entries, newest first; `ledger check` audits the books.

    Behind them the days that older ones were folded into.
    """
    if context.invoked_subcommand is not None:
        return
    with reported(as_json=as_json):
        page = daemon.call(lambda client: client.books(limit=limit))
        entries, days = page.entries, page.days
        if as_json:
            print_json({"entries": entries, "days": [_day_fields(day) for day in days]})
            return
        if not entries and not days:
            typer.echo("no entries yet")
            return
        print_table(
            ("entry", "time", "kind", "ATP", "moved to", "job"),
            [
                (
                    str(entry.entry_id),
                    _local_time(entry.time_ns),
                    entry.kind.value,
                    atp_number(entry.amount_uatp),
                    _BOOKS.get(entry.credit, entry.credit),
                    entry.job_id or "-",
                )
                for entry in entries
            ],
            right=("entry", "ATP"),
        )
        if days:
            typer.echo("\nolder entries, and holds that were given back, by the day (UTC):")
            _print_days(days)


def check_books(
    *,
    state_dir: options.StateDir = None,
    profile: options.Profile = None,
    config_file: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Audit the books of this machine.

    Everything is computed anew from the entries; the daemon may be running.
    """
    with reported(as_json=as_json):
        flags = {"state_dir": state_dir, "profile": profile}
        report = check(ledger_file(effective(flags, config_file).settings.state_dir))
        if as_json:
            print_json(report)
        else:
            typer.echo(_counts(report))
            for violation in report.violations:
                typer.echo(f"violation: {violation}")
            typer.echo("the books do not balance" if report.violations else "the books balance")
        if report.violations:
            raise typer.Exit(ExitCode.ERROR)


def back_up_books(
    copy: Annotated[Path, typer.Argument(metavar="FILE", help="The copy, which is not there yet.")],
    *,
    state_dir: options.StateDir = None,
    profile: options.Profile = None,
    config_file: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy the books of this machine into one file.

    All that was acknowledged until now, audited; the daemon may be running.
    """
    with reported(as_json=as_json):
        flags = {"state_dir": state_dir, "profile": profile}
        report = backup(ledger_file(effective(flags, config_file).settings.state_dir), copy)
        if as_json:
            print_json({"copy": str(copy), "report": report})
        else:
            typer.echo(f"{copy}: {_counts(report)}; the books balance")


def _print_days(days: Sequence[Day]) -> None:
    print_table(
        ("day", "entries", "granted", "spent", "jobs", "given back", "expired"),
        [
            (
                _date(day),
                str(day.entries),
                atp_number(day.minted_uatp),
                atp_number(day.spent_uatp),
                str(day.settled_jobs),
                str(day.voided_jobs),
                str(day.expired_jobs),
            )
            for day in days
        ],
        right=("entries", "granted", "spent", "jobs", "given back", "expired"),
    )


def _day_fields(day: Day) -> dict[str, object]:
    fields: dict[str, object] = asdict(day)
    del fields["day"]
    return {"date": _date(day), **fields}


def _date(day: Day) -> str:
    return str(dt.date(1970, 1, 1) + dt.timedelta(days=day.day))


def _counts(report: CheckReport) -> str:
    return (
        f"{counted(report.accounts, 'account')}, {counted(report.jobs, 'job')}, "
        f"{counted(report.open_holds, 'open hold')}, "
        f"{counted(report.entries, 'entry', 'entries')}"
        + (f" and {report.folded_entries:,} folded into days" if report.folded_entries else "")
    )


def _local_time(time_ns: int) -> str:
    moment = dt.datetime.fromtimestamp(time_ns / 1e9, dt.UTC).astimezone()
    return moment.strftime("%m-%d %H:%M:%S")


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
        from sage_fed.auth.tokens_file import add  # noqa: PLC0415
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
        from sage_fed.auth.tokens_file import remove  # noqa: PLC0415 - with the settings

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
        from sage_fed.auth.tokens_file import entries  # noqa: PLC0415 - with the settings

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
