"""`sage-fed admin ...`: for operators.

Owns: finding the admin token of this machine's daemon.
Does not know: the wire.
Fails: exit codes of `exits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode, reported
from sage_fed.cli.render import (
    atp_number,
    format_atp,
    format_bytes,
    format_seconds,
    print_json,
    print_table,
)
from sage_fed.cli.status import headline, print_tier_loads
from sage_fed.core import OpenReply, RunningJob, counted

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
