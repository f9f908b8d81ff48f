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
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import ExitCode, reported
from sage_fed.cli.options import (
    Caller,
    Operator,
    OptionGroup,
    grouped,
    ledger_file,
    option,
    report,
)
from sage_fed.cli.render import (
    atp_number,
    card_fit,
    format_atp,
    format_bytes,
    format_seconds,
    headline,
    print_fields,
    print_json,
    print_table,
    printable,
)
from sage_fed.cli.serve import effective
from sage_fed.cli.streams import complain
from sage_fed.core import (
    DaemonStatus,
    Day,
    ModelStatus,
    ModeReturns,
    OpenReply,
    PhaseTokens,
    Role,
    RunningJob,
    TierLoad,
    counted,
)
from sage_fed.ledger import CheckReport, backup, check

if TYPE_CHECKING:
    from sage_fed.client import Client, EntryPage, LoadReport
    from sage_fed.settings import Settings


_BOOKS = {"charged": "available", "discharged": "spent"}
"""What a person reads for a book of the ledger."""
_SPAN = re.compile(r"(?P<count>[1-9]\d{0,4})(?P<unit>[hd])")
_MAX_CHARS = 256
_ROLES = ", ".join(role.value for role in Role)


def _amount(flag: str, help_text: str) -> Any:  # noqa: ANN401 - as typer has it
    return option(flag, help_text, "ATP", parser=options.atp_amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoiOptions(OptionGroup):
    """Whether the modes are compared, and on which tasks."""

    roi: bool = option(
        "--roi",
        "What an answer costs in each mode and how often it is right, on the quality card's tasks.",
        default=False,
    )
    task_class: str = option("--task-class", "With --roi: of these tasks.", "CLASS", default="")
    max_error: float | None = option(
        "--max-error",
        "With --roi: the probability of a wrong answer that a cascade puts up with.",
        "P",
        min=0.0,
        max=1.0,
    )


@grouped
def models(*, compare: RoiOptions, daemon: Caller) -> None:
    """Show the model of each tier, or with --roi what each mode returns for its price."""
    if compare.roi:
        daemon.report(
            lambda client: client.compare_modes(
                task_class=compare.task_class, max_error=compare.max_error
            ),
            _print_returns,
        )
        return
    if compare != RoiOptions():
        raise typer.BadParameter("goes with --roi", param_hint="--task-class or --max-error")
    daemon.report(lambda client: client.models(), _print_models, lambda listed: {"models": listed})


def _print_returns(found: ModeReturns) -> None:
    print_table(
        {
            "tier": one.tier.name,
            "mode": one.mode.value,
            ">ATP an answer": atp_number(one.expected_uatp),
            ">right": f"{one.accuracy:.1%}",
            ">per 1,000 ATP": _figure(1000 * one.right_per_atp),
            ">device time": "-" if one.device_s is None else format_seconds(one.device_s),
            ">J an answer": _figure(one.joules),
            ">per kJ": _figure(one.right_per_joule and 1000 * one.right_per_joule),
            ">jobs here": f"{one.num_jobs:,}",
        }
        for one in found.modes
    )
    typer.echo()
    power = "" if found.watts is None else f"{found.watts:.1f} W, "
    print_fields(
        (
            ("tasks", f"{found.num_tasks:,} of class {found.task_class}, {found.quality_card}"),
            ("cascade", f"escalates {found.escalated:.1%} at --max-error {found.max_error:g}"),
            ("prices", found.rate_card),
            ("power", f"{power}{found.power_note}"),
        )
    )


def _figure(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_models(listed: Sequence[ModelStatus]) -> None:
    for index, model in enumerate(listed):
        if index:
            typer.echo()
        state = model.state.value
        if model.message:
            state += f": {model.message}"
        elif model.load_progress < 1:
            state += f" {model.load_progress:.0%}"
        kernels = f", {model.kernels} kernels" if model.kernels else ""
        ends = ", ".join(f"{printable(end.text)} ({end.id})" for end in model.end_tokens)
        memory = (
            f"{format_bytes(model.weight_bytes)} weights, {format_bytes(model.kv_cache_bytes)} "
            f"KV cache ({model.kv_cache_tokens:,} tokens)"
        )
        price = (
            f"{format_atp(model.decode_uatp)} per output token, "
            f"{format_atp(model.prefill_uatp)} per prompt token, "
            f"{format_atp(model.cached_uatp)} where it is cached"
        )
        print_fields(
            (
                (model.tier.name, model.name + (f"@{model.revision}" * bool(model.revision))),
                ("  state", state),
                ("  architecture", f"{model.architecture}, {model.parameters:,} parameters"),
                ("  precision", f"{model.precision} on {model.device}{kernels}"),
                ("  memory", memory),
                ("  context", f"{model.max_context_tokens:,} tokens"),
                ("  loaded in", format_seconds(model.load_s)),
                ("  ends with", ends or "-"),
                ("  price", price),
            )
        )


@grouped
def status(*, daemon: Caller) -> None:
    """Show the daemon at a glance."""
    daemon.report(lambda client: client.status(), _print_status)


def _print_status(now: DaemonStatus) -> None:
    fallback = f" (fallback: {now.device_fallback})" * bool(now.device_fallback)
    fields = [
        ("version", now.version),
        ("up for", format_seconds(now.uptime_s)),
        ("device", now.device + fallback),
        ("rate card", f"{now.rate_card} (strategic : tactical {now.cost_ratio:.2f} : 1)"),
        ("  its prices", card_fit(now)),
        ("quality card", f"{now.quality_card or 'none'}: {headline(now.quality_card_note)}"),
        ("admission", admission(now)),
    ]
    if now.recovered_jobs:
        fields.append(("recovered", recovered(now)))
    print_fields(fields)
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
        {
            "tier": tier.tier.name,
            "state": tier.state.value,
            ">running": f"{tier.running}/{tier.running_limit}",
            ">waiting": f"{tier.waiting}/{tier.waiting_limit}",
            ">KV tokens": f"{tier.kv_tokens_used:,}/{tier.kv_tokens_total:,}",
            ">cached": f"{tier.kv_tokens_cached:,}",
            ">step": "-" if tier.decode_step_s is None else format_seconds(tier.decode_step_s),
            ">prefill tok/s": "-"
            if tier.prefill_tokens_per_s is None
            else f"{tier.prefill_tokens_per_s:,.0f}",
        }
        for tier in tiers
    )


@grouped
def load(*, daemon: Operator) -> None:
    """Show the running jobs of all accounts."""
    daemon.report(lambda client: client.load(), _print_load)


def _print_load(now: LoadReport) -> None:
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
        {
            "job": job.job_id,
            "account": job.account,
            "tier": job.tier.name,
            "mode": job.mode.value,
            "priority": job.priority.name.lower(),
            ">age": format_seconds(job.age_s),
            ">tokens": f"{job.prompt_tokens} + {job.output_tokens}",
            ">held ATP": atp_number(job.held_uatp),
        }
        for job in jobs
    )


def _print_unread(replies: Sequence[OpenReply]) -> None:
    """Show what readers do not take; each name is one that `admin abort` takes."""
    print_table(
        {
            "call": reply.call_id,
            "job": reply.job_id or "-",
            "account": reply.account,
            "connection": reply.connection,
            ">unread for": format_seconds(reply.unread_s),
            ">size": format_bytes(reply.unread_bytes),
            "ended": "yes" if reply.ended else "no",
        }
        for reply in replies
    )


@grouped
def abort(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A job's id, or a call or connection that `admin load` shows."
        ),
    ],
    *,
    daemon: Operator,
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

    aborted = daemon.report(
        end,
        lambda done: typer.echo(f"aborted {name}" if done else f"there is no {name} to end"),
        lambda done: {"aborted": done},
    )
    if not aborted:
        raise typer.Exit(ExitCode.ERROR)


@grouped
def drain(
    grace: Annotated[
        float | None,
        typer.Option("--grace", min=0.0, metavar="SECONDS", help="How long they may take."),
    ] = None,
    *,
    daemon: Operator,
) -> None:
    """Stop the daemon when its jobs are done.

    Nothing more is admitted. What still runs after the grace is cancelled.
    """
    daemon.report(
        lambda client: client.drain(grace),
        lambda num_jobs: typer.echo(
            f"draining, {counted(num_jobs, 'job')} still run{'s' * (num_jobs == 1)}"
        ),
        lambda num_jobs: {"jobs_running": num_jobs},
    )


def _usage_text(usage: Sequence[PhaseTokens]) -> str:
    """Return what was computed, by tier: "strategic 12 prefill + 31 decode"."""
    by_tier: dict[str, list[str]] = {}
    for done in usage:
        by_tier.setdefault(done.tier.name, []).append(f"{done.tokens:,} {done.phase.value}")
    return "; ".join(f"{tier} {' + '.join(done)}" for tier, done in by_tier.items()) or "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetTerms(OptionGroup):
    """What an account gets; None leaves it as it is."""

    balance_uatp: int | None = _amount("--balance", "What it has now; at most the capacity.")
    capacity_uatp: int | None = _amount(
        "--capacity", "Up to where it refills; a new account's balance by default."
    )
    refill_uatp_per_s: int | None = _amount("--refill", "What it gains a second.")
    strategic_floor_uatp: int | None = _amount(
        "--strategic-floor", "Below this only tactical work is done."
    )


@grouped
def set_budget(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="Its name.")],
    *,
    terms: BudgetTerms,
    daemon: Operator,
) -> None:
    """Create an account's budget, or change it.

    What is not given stays as it is.
    """
    daemon.report(
        lambda client: client.set_budget(account, **asdict(terms)),
        lambda books: typer.echo(
            f"{books.account}: {format_atp(books.balance_uatp)} of "
            f"{format_atp(books.capacity_uatp)}, refill {format_atp(books.refill_uatp_per_s)}/s, "
            f"strategic floor {format_atp(books.strategic_floor_uatp)}"
        ),
    )


@grouped
def adopt_card(
    version: Annotated[str, typer.Argument(metavar="CARD", help="Its version.")],
    *,
    daemon: Operator,
) -> None:
    """Put a rate card in force, until the daemon restarts.

    It prices jobs from now on; those that run keep the prices they were admitted at.
    """
    daemon.report(
        lambda client: client.adopt_card(version),
        lambda card: typer.echo(
            f"{card.version} is in force (strategic : tactical {card.cost_ratio:.2f} : 1); "
            f"{card.fit.value}: {headline(card.note)}"
        ),
    )


@grouped
def adopt_quality_card(
    version: Annotated[str, typer.Argument(metavar="CARD", help="Its version.")],
    *,
    daemon: Operator,
) -> None:
    """Put a quality card in force, until the daemon restarts.

    It is refused where it was measured on other models than those that are loaded.
    """
    daemon.report(
        lambda client: client.adopt_quality_card(version),
        lambda card: typer.echo(f"{card.version} is in force; {headline(card.note)}"),
    )


@grouped
def list_entries(
    *,
    context: typer.Context,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="So many of the newest lines.")
    ] = 50,
    daemon: Caller,
) -> None:
    """List the account's entries, newest first; `ledger check` audits the books.

    Behind them the days that older ones were folded into.
    """
    if context.invoked_subcommand is None:
        daemon.report(
            lambda client: client.books(limit=limit),
            _print_entries,
            lambda page: {"entries": page.entries, "days": [_day_fields(day) for day in page.days]},
        )


def _print_entries(page: EntryPage) -> None:
    if not page.entries and not page.days:
        typer.echo("no entries yet")
        return
    print_table(
        {
            ">entry": str(entry.entry_id),
            "time": _local_time(entry.time_ns),
            "kind": entry.kind.value,
            ">ATP": atp_number(entry.amount_uatp),
            "moved to": _BOOKS.get(entry.credit, entry.credit),
            "job": entry.job_id or "-",
            "for tokens": _usage_text(entry.usage),
        }
        for entry in page.entries
    )
    if page.days:
        typer.echo("\nolder entries, and holds that were given back, by the day (UTC):")
        _print_days(page.days)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnBooks(OptionGroup):
    """The books of this machine's daemon."""

    state_dir: options.StateDir = None
    profile: options.Profile = None
    config_file: options.ConfigFile = None
    as_json: options.AsJson = False

    @property
    def file(self) -> Path:
        """Where they are."""
        flags = {"state_dir": self.state_dir, "profile": self.profile}
        return ledger_file(effective(flags, self.config_file).settings.state_dir)


@grouped
def check_books(*, books: OwnBooks) -> None:
    """Audit the books of this machine.

    Everything is computed anew from the entries; the daemon may be running.
    """
    found = report(lambda: check(books.file), _print_check, as_json=books.as_json)
    if found.violations:
        raise typer.Exit(ExitCode.ERROR)


def _print_check(found: CheckReport) -> None:
    typer.echo(_counts(found))
    for violation in found.violations:
        typer.echo(f"violation: {violation}")
    typer.echo("the books do not balance" if found.violations else "the books balance")


@grouped
def back_up_books(
    copy: Annotated[Path, typer.Argument(metavar="FILE", help="The copy, which is not there yet.")],
    *,
    books: OwnBooks,
) -> None:
    """Copy the books of this machine into one file.

    All that was acknowledged until now, audited; the daemon may be running.
    """
    report(
        lambda: backup(books.file, copy),
        lambda found: typer.echo(f"{copy}: {_counts(found)}; the books balance"),
        lambda found: {"copy": str(copy), "report": found},
        as_json=books.as_json,
    )


def _print_days(days: Sequence[Day]) -> None:
    print_table(
        {
            "day": _date(day),
            ">entries": str(day.num_entries),
            ">granted": atp_number(day.minted_uatp),
            ">spent": atp_number(day.spent_uatp),
            ">jobs": str(day.settled_jobs),
            ">given back": str(day.voided_jobs),
            ">expired": str(day.expired_jobs),
        }
        for day in days
    )


def _day_fields(day: Day) -> dict[str, object]:
    fields: dict[str, object] = asdict(day)
    del fields["day"]
    return {"date": _date(day), **fields}


def _date(day: Day) -> str:
    return str(dt.date(1970, 1, 1) + dt.timedelta(days=day.day))


def _counts(found: CheckReport) -> str:
    return (
        f"{counted(found.accounts, 'account')}, {counted(found.jobs, 'job')}, "
        f"{counted(found.open_holds, 'open hold')}, "
        f"{counted(found.entries, 'entry', 'entries')}"
        + (f" and {found.folded_entries:,} folded into days" if found.folded_entries else "")
    )


def _local_time(time_ns: int) -> str:
    moment = dt.datetime.fromtimestamp(time_ns / 1e9, dt.UTC).astimezone()
    return moment.strftime("%m-%d %H:%M:%S")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensFile(OptionGroup):
    """Which file of tokens is meant."""

    tokens_file: Path | None = option(
        "--tokens-file",
        "The file; otherwise auth.tokens_file's, or tokens.toml in the state directory.",
        "FILE",
    )
    config_file: options.ConfigFile = None
    state_dir: options.StateDir = None
    as_json: options.AsJson = False

    def found(self) -> tuple[Settings, Path]:
        """Return the daemon's settings, and where the file is."""
        settings = effective({"state_dir": self.state_dir}, self.config_file).settings
        return settings, self.tokens_file or settings.tokens_file


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken(OptionGroup):
    """Who may call, as what, and until when."""

    account: str = option("--account", "Who pays.", "NAME", default=MISSING)
    role: str | None = option(
        "--role", f"{_ROLES} (metrics only); the account's by default.", "ROLE", parser=role_name
    )
    name: str = option("--name", "What it is for; revokes it, too.", "TEXT", default="")
    expires: dt.datetime | None = option(
        "--expires", "90d, 12h or 2027-01-31.", "WHEN", parser=expiry
    )
    certificate: str | None = option(
        "--certificate",
        "No token: let in who shows a client certificate of this name; KIND is dns, uri, email, "
        "ip or cn.",
        "[KIND:]NAME",
    )


@grouped
def create(*, new: NewToken, tokens: TokensFile) -> None:
    """Make a token, and show it once.

    The file keeps its SHA-256 only. Stdout is the token and nothing else.
    """
    with reported(as_json=tokens.as_json):
        settings, path = tokens.found()
        from sage_fed.auth import digest_of, new_token, parse_identity  # noqa: PLC0415 - with the settings
        from sage_fed.auth.tokens_file import add  # noqa: PLC0415
        from sage_fed.settings import parse_account  # noqa: PLC0415

        _require("account", new.account, parse_account)
        _require("name", new.name, _printable)
        token = None if new.certificate is not None else new_token()
        proof = (
            {"identity": _require("certificate", new.certificate or "", _printable, parse_identity)}
            if token is None
            else {"sha256": digest_of(token).hex()}
        )
        entry = add(
            path,
            settings.accounts,
            proof,
            account=new.account,
            role=new.role,
            name=new.name,
            expires=new.expires,
        )
        if tokens.as_json:
            print_json({"token": token, **asdict(entry), "tokens_file": str(path)})
            return
        who = f"{entry.title} is {entry.role} of account {entry.account}"
        until = f" until {entry.expires}" if entry.expires else ""
        typer.echo(f"{who}{until}, in {path}", err=True)
        if token is None and settings.tls.client_ca is None:
            complain("warning: it matches no client until tls.client_ca is set: none shows one")
        if token is not None:
            typer.echo("keep the token now, it is not shown again:", err=True)
            typer.echo(token)


@grouped
def revoke(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="Its id or its name.")],
    *,
    tokens: TokensFile,
) -> None:
    """Let a token, or a certificate, in no more.

    Jobs that run go on; every further call is refused.
    """
    with reported(as_json=tokens.as_json):
        settings, path = tokens.found()
        from sage_fed.auth.tokens_file import remove  # noqa: PLC0415 - with the settings

        entry = remove(path, settings.accounts, wanted)
        if tokens.as_json:
            print_json({"revoked": asdict(entry), "tokens_file": str(path)})
        else:
            typer.echo(f"revoked {entry.title} of account {entry.account}")


@grouped
def list_tokens(*, tokens: TokensFile) -> None:
    """Show who may call; never a token."""
    with reported(as_json=tokens.as_json):
        settings, path = tokens.found()
        from sage_fed.auth.tokens_file import entries  # noqa: PLC0415 - with the settings

        known = entries(path, settings.accounts)
        if tokens.as_json:
            print_json({"entries": [asdict(entry) for entry in known], "tokens_file": str(path)})
        elif not known:
            typer.echo(f"no entries in {path}")
        else:
            print_table(
                {
                    "id": e.id,
                    "kind": e.kind,
                    "name": e.name,
                    "account": e.account,
                    "role": e.role,
                    "created": e.created,
                    "expires": e.expires or "never",
                }
                for e in known
            )


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
