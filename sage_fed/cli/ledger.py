"""`sage-fed ledger`: the account's entries, the audit of the books, and their copy.

Owns: the tables of these commands.
Does not know: the wire; the books' file except through the ledger's own audit and backup.
Fails: exit codes of `exits.py`; `ledger check` with 1 where the books do not balance.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode, reported
from sage_fed.cli.paths import ledger_file
from sage_fed.cli.render import atp_number, print_json, print_table
from sage_fed.cli.serve import effective
from sage_fed.core import counted
from sage_fed.ledger import CheckReport, Day, backup, check

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
                str(day.num_entries),
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
