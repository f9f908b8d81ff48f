"""`sage-fed calibrate`: have the daemon measure what its tokens cost, and watch it do so.

Owns: the progress on the terminal, the tables of the result, the copies that `--output` asks for.
Does not know: how anything is measured (`sage_fed.calibrate` does, in the daemon).
Fails: exit codes of `exits.py`; an interrupt ends the calibration, which leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from sage_fed.cards import MAX_SPREAD
from sage_fed.cli import options
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import reported
from sage_fed.cli.render import format_seconds, print_fields, print_json, print_table, to_plain
from sage_fed.core import (
    TIER_ROLES,
    CalibrationEvent,
    CalibrationProgress,
    CalibrationResult,
    MeasuredPoint,
    Phase,
)
from sage_fed.errors import ConfigError


@connected
def calibrate(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds: seconds, not minutes; less exact.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Put the new card in force, until the daemon restarts.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Copies of the card, the report, the plot."),
    ] = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    daemon: Connection = HERE,
) -> None:
    """Measure what a token costs here, and write a rate card.

    The daemon times its own engines while no job runs; jobs that come go first.
    It needs the operator's token, as `sage-fed admin` does.
    """
    from sage_fed.cli.progress import watched_bar  # noqa: PLC0415 - a tenth of a second

    with reported(as_json=as_json):
        with watched_bar(as_json=as_json) as move:

            def watch(events: Iterator[CalibrationEvent]) -> CalibrationResult:
                for event in events:
                    if isinstance(event, CalibrationResult):
                        return event
                    move(event.fraction, _text(event))
                raise AssertionError("a calibration ends with a result or an error")

            result = daemon.as_operator(state_dir).call(
                lambda client: watch(client.calibrate(quick=quick, adopt=adopt)),
            )
        copies = _copy(result, output) if output else []
        if as_json:
            texts = ("card", "report", "plot")
            fields = (field.name for field in dataclasses.fields(result))
            shown = {name: getattr(result, name) for name in fields if name not in texts}
            card = {
                "prices_atp": _prices(result),
                "price_spreads": _spreads(result),
                "warning": _warning(result),
                "sound": _sound(result),
            }
            print_json({**shown, **card, "copies": copies})
        else:
            _print_result(result, copies, _adopt_command(result.version, state_dir, daemon))


def _text(progress: CalibrationProgress) -> str:
    """What is measured now, and the ratio so far."""
    parts = [progress.phase, progress.point]
    if progress.cost_ratio is not None:
        parts.append(f"ratio {progress.cost_ratio:.2f}")
    return " · ".join(filter(None, parts))


def _copy(result: CalibrationResult, directory: Path) -> list[str]:
    """Write the three texts on this side of the wire."""
    texts = {".toml": result.card, ".md": result.report, ".svg": result.plot}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            (directory / f"{result.version}{suffix}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write into {directory}: {error.strerror}") from None
    return [str(directory / f"{result.version}{suffix}") for suffix in texts]


def _prices(result: CalibrationResult) -> dict[str, dict[str, str]]:
    """The card's prices as they are written, in ATP."""
    card = tomllib.loads(result.card)
    return {
        tier.name: {phase.value: card[tier.name][phase.value]["price_atp"] for phase in Phase}
        for tier in TIER_ROLES
    }


def _spreads(result: CalibrationResult) -> dict[str, dict[str, float | None]]:
    """The relative spread of each price; None where the card has none."""
    card = tomllib.loads(result.card)
    return {
        tier.name: {phase.value: card[tier.name][phase.value].get("spread") for phase in Phase}
        for tier in TIER_ROLES
    }


def _sound(result: CalibrationResult) -> bool:
    """Whether `rate_card = "auto"` would take the card."""
    spreads = [spread for prices in _spreads(result).values() for spread in prices.values()]
    return all((spread or 0.0) <= MAX_SPREAD for spread in (*spreads, result.cost_ratio_spread))


def _warning(result: CalibrationResult) -> str:
    """What the card says of its own measurement."""
    return str(tomllib.loads(result.card).get("measured", {}).get("warning", ""))


def _adopt_command(version: str, state_dir: str | None, daemon: Connection) -> str:
    """The command that puts the card in force, at the daemon that this one was given."""
    words = ["sage-fed", "admin", "adopt-card", version]
    if state_dir is not None:
        words += ["--state-dir", state_dir]
    return shlex.join([*words, *daemon.arguments()])


def _print_result(result: CalibrationResult, copies: list[str], command: str) -> None:
    print_table(
        ("tier", "phase", "batch", "context", "tokens", "step", "tok/s", "beside the other", "±"),
        [_row(point) for point in result.points],
        right=("batch", "context", "tokens", "step", "tok/s", "beside the other", "±"),
    )
    typer.echo()
    prices, spreads = _prices(result), _spreads(result)
    print_table(
        ("ATP per token", *(phase.value for phase in Phase)),
        [
            row
            for tier in (each.name for each in TIER_ROLES)
            for row in (
                (tier, *(f"{float(price):.4f}" for price in prices[tier].values())),
                ("  spread", *(_spread(spread) for spread in spreads[tier].values())),
            )
        ],
        right=tuple(phase.value for phase in Phase),
    )
    typer.echo()
    ratio = f"{result.cost_ratio:.3f} : 1, spread ±{result.cost_ratio_spread:.1%}"
    warning = _warning(result)
    in_force = "now, until the daemon restarts" if result.adopted else f"no; `{command}`"
    if not _sound(result):
        in_force += (
            f"; rate_card = auto does not take it: a spread above {MAX_SPREAD:.0%} is of the "
            "machine's other work; measure again when it idles"
        )
    elif result.adopted:
        in_force += "; rate_card = auto keeps it"
    else:
        in_force += ", or rate_card = auto at a restart"
    print_fields(
        (
            ("strategic : tactical", ratio),
            *((("WARNING", warning),) if warning else ()),
            ("took", format_seconds(result.took_s)),
            ("rate card", result.version),
            ("written to", f"{result.path}, with a report (.md) and a plot (.svg) beside it"),
            *((("copies in", str(Path(copies[0]).parent)),) if copies else ()),
            ("in force", in_force),
        )
    )


def _row(point: MeasuredPoint) -> tuple[str, ...]:
    beside = point.co_resident_s
    return (
        point.tier.name,
        str(to_plain(point.phase)),
        str(point.batch),
        str(point.context_tokens),
        str(point.tokens),
        format_seconds(point.step_s),
        f"{1 / point.token_s:,.0f}",
        "-" if beside is None else f"{beside / point.step_s:.2f}x",
        _spread(point.spread),
    )


def _spread(spread: float | None) -> str:
    """One round has none."""
    return "-" if spread is None else f"±{spread:.1%}"
