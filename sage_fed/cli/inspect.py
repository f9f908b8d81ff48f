"""`quote`, `budget`, `ledger`, `models`, `status`: what is, and what would be.

Owns: the tables of these commands.
Does not know: the wire; the books' file except through the ledger's own audit.
Fails: exit codes of `exits.py`; `ledger check` with 1 where the books do not balance.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode, as_options, reported
from sage_fed.cli.paths import ledger_file
from sage_fed.cli.render import (
    atp_number,
    format_atp,
    format_bytes,
    format_seconds,
    print_fields,
    print_json,
    print_table,
)
from sage_fed.cli.serve import effective
from sage_fed.core import (
    CardFit,
    CardStatus,
    DaemonStatus,
    ModelStatus,
    Quote,
    Route,
    SamplingRequest,
    TierLoad,
)
from sage_fed.ledger import check

_BOOKS = {"charged": "available", "discharged": "spent"}
"""What a person reads for a book of the ledger."""


@connected
def quote(
    words: Annotated[list[str] | None, options.PROMPT] = None,
    *,
    tier: options.TierOption = options.TierChoice.AUTO,
    max_cost: options.MaxCost = None,
    allow_downgrade: options.AllowDowngrade = False,
    complexity: options.Complexity = None,
    max_new_tokens: options.MaxNewTokens = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Say what a question would cost, and who would answer.

    The cost is the most that it may be; nothing is spent.
    """
    spec = options.job_spec(
        options.conversation(options.read_prompt(words), None),
        tier=tier,
        max_cost_uatp=max_cost,
        allow_downgrade=allow_downgrade,
        complexity=complexity,
        sampling=SamplingRequest(max_new_tokens=max_new_tokens),
    )
    with reported(as_json=as_json):
        answer = daemon.call(lambda client: client.quote(spec))
        if as_json:
            print_json(answer)
        else:
            _print_quote(answer)


def _print_quote(answer: Quote) -> None:
    print_table(
        ("tier", "at most ATP", "affordable", "takes about"),
        [
            (
                tier.tier.value,
                atp_number(tier.worst_case_uatp),
                "yes" if tier.affordable else "no",
                "-" if tier.estimated_s is None else format_seconds(tier.estimated_s),
            )
            for tier in answer.tiers
        ],
        right=("at most ATP", "takes about"),
    )
    typer.echo()
    decision = answer.decision
    if isinstance(decision, Route):
        verdict = ("would run on", f"{decision.tier.value} ({decision.reason})")
    else:
        verdict = ("would be refused", f"{as_options(decision.message)} ({decision.reason})")
    print_fields(
        (
            verdict,
            ("tokens", f"{answer.prompt_tokens} prompt + {answer.max_new_tokens} new at most"),
            ("balance", format_atp(answer.balance_uatp)),
            ("rate card", answer.rate_card),
        )
    )


@connected
def budget(
    *,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Show the account: balance, held, spent, refill."""
    with reported(as_json=as_json):
        books, now = daemon.call(lambda client: (client.budget(), client.status()))
        if as_json:
            card = CardStatus(now.rate_card, now.cost_ratio, now.rate_card_fit, now.rate_card_note)
            plain = {field.name: getattr(books, field.name) for field in dataclasses.fields(books)}
            print_json({**plain, "rate_card": card})
            return
        print_fields(
            (
                ("account", books.account),
                ("balance", format_atp(books.balance_uatp)),
                ("held", format_atp(books.held_uatp)),
                ("spent", f"{format_atp(books.discharged_uatp)} (as ADP)"),
                ("capacity", format_atp(books.capacity_uatp)),
                ("refill", f"{format_atp(books.refill_uatp_per_s)}/s"),
                ("strategic floor", format_atp(books.strategic_floor_uatp)),
                ("rate card", f"{now.rate_card}, {card_fit(now)}"),
            )
        )


def ledger_app() -> typer.Typer:
    """`ledger` lists, `ledger check` audits."""
    app = typer.Typer(
        name="ledger",
        help="List the account's entries, or audit the books.",
        epilog=EXIT_CODES_HELP,
    )
    app.callback(invoke_without_command=True)(list_entries)
    app.command("check", epilog=EXIT_CODES_HELP)(check_books)
    return app


@connected
def list_entries(
    *,
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="So many of the newest.")
    ] = 50,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """List the account's entries, newest first; `ledger check` audits the books."""
    if context.invoked_subcommand is not None:
        return
    with reported(as_json=as_json):
        entries = daemon.call(lambda client: client.entries(limit=limit))
        if as_json:
            print_json({"entries": entries})
            return
        if not entries:
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
            typer.echo(
                f"{report.accounts} accounts, {report.jobs} jobs, {report.open_holds} open holds, "
                f"{report.entries} entries"
            )
            for violation in report.violations:
                typer.echo(f"violation: {violation}")
            typer.echo("the books do not balance" if report.violations else "the books balance")
        if report.violations:
            raise typer.Exit(ExitCode.ERROR)


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
                    (model.tier.value, model.name + (f"@{model.revision}" * bool(model.revision))),
                    ("  state", state),
                    ("  architecture", f"{model.architecture}, {model.parameters:,} parameters"),
                    ("  precision", f"{model.precision} on {model.device}{_kernels(model)}"),
                    (
                        "  memory",
                        f"{format_bytes(model.weight_bytes)} weights, {_kv_cache(model)}",
                    ),
                    ("  context", f"{model.max_context_tokens:,} tokens"),
                    ("  loaded in", format_seconds(model.load_s)),
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
                ("device", now.device),
                ("rate card", f"{now.rate_card} (strategic : tactical {now.cost_ratio:.2f} : 1)"),
                ("  its prices", card_fit(now)),
                ("admission", "draining" if now.draining else "open"),
            )
        )
        typer.echo()
        print_tier_loads(now.tiers)


def print_tier_loads(tiers: tuple[TierLoad, ...]) -> None:
    """What each tier is doing."""
    print_table(
        ("tier", "state", "running", "waiting", "KV tokens", "cached", "step", "prefill tok/s"),
        [
            (
                tier.tier.value,
                tier.state.value,
                str(tier.running),
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


def _local_time(time_ns: int) -> str:
    moment = dt.datetime.fromtimestamp(time_ns / 1e9, dt.UTC).astimezone()
    return moment.strftime("%m-%d %H:%M:%S")
