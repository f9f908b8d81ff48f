"""`models` and `status`: what is loaded, what it does, and whether the prices belong to it.

Owns: the tables of both commands.
Does not know: the wire.
Fails: exit codes of `exits.py`.
"""

from __future__ import annotations

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import reported
from sage_fed.cli.render import (
    format_atp,
    format_bytes,
    format_seconds,
    print_fields,
    print_json,
    print_table,
    printable,
)
from sage_fed.core import CardFit, DaemonStatus, ModelStatus, TierLoad, counted


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
