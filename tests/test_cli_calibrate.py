"""`sage-fed calibrate` and `admin adopt-card` against a server that follows a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import service_harness
from service_harness import CARD, POINTS, RESULT, Harness, in_thread, serving
from test_pricing_cards import MEASURED as CARD_MEASURED
from typer.testing import CliRunner, Result

from sage_fed.cards.rate_card import RateCard, card_text
from sage_fed.cli.app import build_app
from sage_fed.core import TIER_ROLES, Phase, Tier
from sage_fed.errors import CalibrationRunning

CARD_FILE = replace(RateCard.load(), version="mine-1")
MEASURED = replace(RESULT, card=card_text(CARD_FILE), points=POINTS)


def runner(harness: Harness) -> Callable[..., Result]:
    environ = {"SAGE_FED_ADDRESS": harness.address, "SAGE_FED_TOKEN": "admin-token"}
    return lambda *arguments: CliRunner(env=environ).invoke(build_app(), arguments)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's card is one that can be read."""
    monkeypatch.setattr(service_harness, "RESULT", MEASURED)


async def test_the_result_is_shown_as_tables(tmp_path: Path) -> None:
    """Points, prices, ratio with its spread, where the card is and how to put it in force."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        result = await in_thread(lambda: run("calibrate", "--quick"))
    assert 0 == result.exit_code, result.output
    assert [(True, False)] == harness.operations.calibrated
    assert "" == result.stderr, "nobody watches: a bar is for a terminal"
    for text in ("2.0 ms", "1.25x", "6.5900", "5.250 : 1, spread ±1.0%", RESULT.path):
        assert text in result.stdout
    assert "now, until the daemon restarts" in result.stdout


async def test_the_next_command_goes_to_the_same_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It repeats the address and the state directory that were given."""
    monkeypatch.setattr(service_harness, "RESULT", replace(MEASURED, adopted=False))
    state = tmp_path / "a state"
    async with serving(tmp_path) as harness:
        run = runner(harness)
        result = await in_thread(lambda: run("calibrate", "--state-dir", str(state)))
    wanted = f"sage-fed admin adopt-card mine-1 --state-dir '{state}' --address {harness.address}"
    assert wanted in " ".join(result.stdout.split())


async def test_noise_is_shown_with_the_prices_that_it_concerns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dash for one round, null for a program, and the card's own warning in both."""
    single = replace(POINTS[1], spread=None, rounds=1)
    rates = CARD_FILE.lines
    prefill = {**rates[Tier.TACTICAL], Phase.PREFILL: replace(
        rates[Tier.TACTICAL][Phase.PREFILL], spread=0.4)}  # fmt: skip
    text = card_text(
        replace(
            CARD_FILE,
            lines={**rates, Tier.TACTICAL: prefill},
            measured=replace(CARD_MEASURED, warning="not a quiet machine (x)"),
        )
    )
    noisy = replace(MEASURED, card=text, points=(single,))
    monkeypatch.setattr(service_harness, "RESULT", noisy)
    async with serving(tmp_path) as harness:
        run = runner(harness)
        shown = await in_thread(lambda: run("calibrate"))
        told = await in_thread(lambda: run("calibrate", "--json"))
    assert "±40.0%" in shown.stdout
    assert "not a quiet machine (x)" in shown.stdout
    (row,) = (line for line in shown.stdout.splitlines() if "20.0 ms" in line)
    assert row.endswith("-")
    body = json.loads(told.stdout)
    assert [(None, 1)] == [(p["spread"], p["rounds"]) for p in body["points"]]
    assert 0.4 == body["price_spreads"]["tactical"]["prefill"]
    assert "not a quiet machine (x)" == body["warning"]


@pytest.mark.parametrize("adopted", [True, False])
async def test_a_measurement_under_load_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adopted: bool
) -> None:
    """It says that `auto` will not take the card, and what to do, adopted or not."""
    loud = replace(MEASURED, cost_ratio_spread=1.2, adopted=adopted)
    monkeypatch.setattr(service_harness, "RESULT", loud)
    async with serving(tmp_path) as harness:
        run = runner(harness)
        shown = await in_thread(lambda: run("calibrate"))
        told = await in_thread(lambda: run("calibrate", "--json"))
    assert "rate_card = auto does not take it: a spread above 50% " in shown.stdout
    assert "measure again when it idles" in shown.stdout
    assert not json.loads(told.stdout)["sound"]


async def test_a_program_gets_one_object(tmp_path: Path) -> None:
    """Figures and prices, and nothing beside it; the long texts are in the files."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        result = await in_thread(lambda: run("calibrate", "--json", "--adopt"))
    assert (0, "") == (result.exit_code, result.stderr)
    assert [(False, True)] == harness.operations.calibrated
    body = json.loads(result.stdout)
    assert ("mine-1", 5.25, True) == (body["version"], body["cost_ratio"], body["adopted"])
    assert {tier.name for tier in TIER_ROLES} == body["prices_atp"].keys()
    assert {phase.value for phase in Phase} == body["prices_atp"]["tactical"].keys()
    assert len(POINTS) == len(body["points"])
    assert "plot" not in body


async def test_copies_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    """Card, report and plot on this side of the wire; a directory that cannot be is an error."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        good = await in_thread(lambda: run("calibrate", "--output", str(tmp_path / "a" / "b")))
        bad = await in_thread(lambda: run("calibrate", "--output", "/proc/none"))
    assert 0 == good.exit_code, good.output
    texts = (MEASURED.card, MEASURED.report, MEASURED.plot)
    for suffix, text in zip((".toml", ".md", ".svg"), texts, strict=True):
        assert text == (tmp_path / "a" / "b" / f"mine-1{suffix}").read_text()
    assert 2 == bad.exit_code
    assert "--output" in bad.stderr


async def test_an_error_in_the_middle_has_its_exit_code(tmp_path: Path) -> None:
    """As every other command: one line, and a reason for programs."""
    async with serving(tmp_path) as harness:
        harness.operations.calibration_error = CalibrationRunning("a calibration runs already")
        run = runner(harness)
        result = await in_thread(lambda: run("calibrate", "--json"))
    assert 1 == result.exit_code
    assert "CALIBRATION_RUNNING" == json.loads(result.stdout)["error"]["reason"]
    assert "a calibration runs already" in result.stderr


async def test_an_operator_adopts_a_card(tmp_path: Path) -> None:
    """It says what is in force now and how it fits; an unknown one is an error."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        good = await in_thread(lambda: run("admin", "adopt-card", "mine-1"))
        bad = await in_thread(lambda: run("admin", "adopt-card", "other"))
    assert 0 == good.exit_code, good.output
    assert f"mine-1 is in force (strategic : tactical {CARD.cost_ratio:.2f} : 1)" in good.stdout
    assert (1, "") == (bad.exit_code, bad.stdout)
    assert "no rate card other" in bad.stderr


async def test_an_operator_adopts_a_quality_card(tmp_path: Path) -> None:
    """It says what is in force now and how well it tells; an unknown one is an error."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        good = await in_thread(lambda: run("admin", "adopt-quality-card", "pair-1"))
        bad = await in_thread(lambda: run("admin", "adopt-quality-card", "other"))
    assert 0 == good.exit_code, good.output
    assert "pair-1 is in force; measured on this pair" in good.stdout
    assert (1, "") == (bad.exit_code, bad.stdout)
    assert "no quality card other" in bad.stderr


async def test_a_stale_card_is_loud_where_operators_look(tmp_path: Path) -> None:
    """`status` and `budget` name the card, and what has changed since it was measured."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        shown = [
            await in_thread(lambda command=command: run(command))
            for command in ("status", "budget")
        ]
        models = await in_thread(lambda: run("models"))
    for result in shown:
        assert "STALE: threads is 2 now" in result.stdout
        assert "default-1" in result.stdout
    assert "per prompt token" in models.stdout


async def test_the_budget_tells_programs_of_the_card(tmp_path: Path) -> None:
    """As it tells people: version, ratio, fit and note."""
    async with serving(tmp_path) as harness:
        run = runner(harness)
        result = await in_thread(lambda: run("budget", "--json"))
    card = json.loads(result.stdout)["rate_card"]
    assert ("default-1", "stale", "threads is 2 now") == (
        card["version"],
        card["fit"],
        card["note"],
    )
