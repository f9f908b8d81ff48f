"""`quote` and `budget`: what a question would cost, and what there is to pay it with.

Owns: the tables of both commands.
Does not know: the wire.
Fails: exit codes of `exits.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import as_options, reported
from sage_fed.cli.render import (
    atp_number,
    format_atp,
    format_seconds,
    print_fields,
    print_json,
    print_table,
)
from sage_fed.cli.status import card_fit
from sage_fed.core import CardStatus, Quote, Route, SamplingRequest


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
                tier.tier.name,
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
        verdict = ("would run on", f"{decision.tier.name} ({decision.reason})")
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
