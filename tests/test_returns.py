"""What each mode gives for what it takes: the arithmetic, the daemon's part of it, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from service_harness import RETURNS, in_thread, serving
from test_broker import CARD, finished_of, job, rig
from test_modes import doubtful, repeating
from test_quality_card import quality_card, task_class
from typer.testing import CliRunner

from sage_fed.cli.app import build_app
from sage_fed.client import Client
from sage_fed.core import Mode, ModeReturn, ModeReturns, Phase, PhaseTokens, Route, Tier, Usage
from sage_fed.errors import NotFound
from sage_fed.jobs.returns import Experience, compare_modes

T, S = Tier.TACTICAL, Tier.STRATEGIC


def compared(
    experience: Experience | None = None,
    *,
    max_error: float = 0.3,
    cascades: bool = True,
    watts: float | None = None,
    task_class_name: str = "",
) -> tuple[ModeReturns, dict[tuple[Tier, Mode], ModeReturn]]:
    """The shipped prices on a card of three scores; prompts of 20 tokens, answers of 8."""
    found = compare_modes(
        CARD,
        quality_card(sure=task_class((0.0,), (0.02,), (0.01,))),
        experience or Experience(),
        task_class=task_class_name,
        max_error=max_error,
        cascades=cascades,
        watts=watts,
        power_note="by a test",
    )
    return found, {(one.tier, one.mode): one for one in found.modes}


def test_prices_and_accuracy_are_the_cards() -> None:
    """By hand: 20 prompt and 8 output tokens, of which a third is answered again."""
    found, modes = compared()
    assert [(T, Mode.SINGLE), (S, Mode.SINGLE), (S, Mode.SPECULATIVE), (S, Mode.CASCADE)] == (
        list(modes)
    )
    tactical_uatp, strategic_uatp = 9_000_000, 6_590_000 + 8 * 6_590_000
    assert tactical_uatp == modes[T, Mode.SINGLE].expected_uatp
    assert strategic_uatp == modes[S, Mode.SINGLE].expected_uatp
    # No draft has been accepted yet, so none is counted on.
    assert strategic_uatp == modes[S, Mode.SPECULATIVE].expected_uatp
    assert tactical_uatp + strategic_uatp // 3 == modes[S, Mode.CASCADE].expected_uatp
    assert pytest.approx(1 / 3) == found.escalated
    assert [0.5, 0.7, 0.7] == [one.accuracy for one in found.modes[:3]]
    assert pytest.approx(1 - (0.6 + 0.5 + 0.1) / 3) == modes[S, Mode.CASCADE].accuracy
    assert (0.4, 0.6) == (modes[T, Mode.SINGLE].accuracy_low, modes[T, Mode.SINGLE].accuracy_high)
    assert modes[S, Mode.CASCADE].accuracy_low is None
    assert pytest.approx(0.5 / 9) == modes[T, Mode.SINGLE].right_per_atp
    assert ("demo-1", CARD.version, "any", 30) == (
        found.quality_card, found.rate_card, found.task_class, found.num_tasks,
    )  # fmt: skip


def test_nothing_is_made_up() -> None:
    """Without a job of the mode there is no time, and without a sensor no energy."""
    found, _ = compared(watts=100.0)
    assert {None} == {one.device_s for one in found.modes} == {one.joules for one in found.modes}
    assert {0} == {one.num_jobs for one in found.modes}
    experience = Experience()
    experience.note(CARD, Route(T, "explicit", T), Usage.single(T, 5, 0, 10), 16, 0.5)
    _, modes = compared(experience)
    assert (0.4, None, 1) == (
        modes[T, Mode.SINGLE].device_s, modes[T, Mode.SINGLE].joules, modes[T, Mode.SINGLE].num_jobs
    )  # fmt: skip
    _, modes = compared(experience, watts=50.0)
    assert pytest.approx(20.0) == modes[T, Mode.SINGLE].joules
    assert pytest.approx(0.5 / 20.0) == modes[T, Mode.SINGLE].right_per_joule


def test_what_drafts_have_saved_here_is_expected_of_the_next() -> None:
    """Of speculative jobs and of escalated cascades apart; a single job says nothing of either."""
    experience = Experience()
    usage = Usage(
        5, 0, 50,
        (PhaseTokens(S, Phase.VERIFY, 40), PhaseTokens(S, Phase.DECODE, 10),
         PhaseTokens(T, Phase.DRAFT, 40)),
    )  # fmt: skip
    plain, _ = compared()
    experience.note(CARD, Route(S, "explicit", S), usage, 64, 1.0)
    assert [one.expected_uatp for one in plain.modes] == [
        one.expected_uatp for one in compared(experience)[0].modes
    ]
    experience.note(CARD, Route(S, "explicit", S, mode=Mode.SPECULATIVE), usage, 64, 1.0)
    _, modes = compared(experience)
    assert modes[S, Mode.SPECULATIVE].expected_uatp < modes[S, Mode.SINGLE].expected_uatp
    assert plain.modes[3].expected_uatp == modes[S, Mode.CASCADE].expected_uatp
    experience.note(CARD, Route(S, "cascade", S, mode=Mode.CASCADE), usage, 64, 1.0)
    assert compared(experience)[0].modes[3].expected_uatp < plain.modes[3].expected_uatp


def test_a_class_has_its_own_figures() -> None:
    """A class of sound answers escalates none; one that the card does not have is any."""
    found, modes = compared(task_class_name="sure")
    assert ("sure", 10, 0.0) == (found.task_class, found.num_tasks, found.escalated)
    assert modes[T, Mode.SINGLE].expected_uatp == modes[S, Mode.CASCADE].expected_uatp
    assert pytest.approx(0.98) == modes[S, Mode.CASCADE].accuracy
    assert "any" == compared(task_class_name="other")[0].task_class


def test_two_tokenizers_have_no_cascade() -> None:
    """What cannot be asked for is not compared."""
    assert (S, Mode.CASCADE) not in compared(cascades=False)[1]


async def test_the_daemon_compares_by_its_own_jobs(tmp_path: Path) -> None:
    """By the cards in force, the account's `max_error` and the jobs that ended here."""
    async with rig(tmp_path) as r:
        admission = r.broker._admission
        with pytest.raises(NotFound, match="quality card"):
            admission.compare_modes("local", "", None, watts=None, power_note="")
        repeating(r)
        events = [
            await r.run(job(new=40, requested=tier, mode=mode))
            for tier, mode in ((T, Mode.SINGLE), (S, Mode.SPECULATIVE))
        ]
        admission.quality = doubtful(0.5)
        found = admission.compare_modes("local", "", None, watts=10.0, power_note="")
        assert 1.0 == found.max_error
        found = admission.compare_modes("local", "", 0.1, watts=10.0, power_note="")
        assert (0.1, 1.0) == (found.max_error, found.escalated)
        modes = {(one.tier, one.mode): one for one in found.modes}
        device_s = finished_of(events[0]).timing.device_s
        assert pytest.approx(device_s / 40 * 8) == modes[T, Mode.SINGLE].device_s
        assert pytest.approx(device_s / 40 * 8 * 10) == modes[T, Mode.SINGLE].joules
        assert modes[S, Mode.SPECULATIVE].expected_uatp < modes[S, Mode.SINGLE].expected_uatp
        assert [1, 0, 1, 0] == [one.num_jobs for one in found.modes]


async def test_the_command_shows_every_mode_and_says_why_energy_is_missing(
    tmp_path: Path,
) -> None:
    """As a table, as one object, and as an error without a quality card."""
    async with serving(tmp_path) as harness:

        def run(*arguments: str) -> tuple[int, str, str]:
            environ = {"SAGE_FED_ADDRESS": harness.address}
            result = CliRunner(env=environ).invoke(build_app(), ("models", *arguments))
            return result.exit_code, result.stdout, result.stderr

        def ask() -> ModeReturns:
            with Client(harness.address) as client:
                return client.compare_modes(task_class="sums", max_error=0.2)

        assert RETURNS == await in_thread(ask)
        code, shown, _ = await in_thread(lambda: run("--roi"))
        code_json, text, _ = await in_thread(lambda: run("--roi", "--json", "--max-error", "0.05"))
        missing = await in_thread(lambda: run("--roi", "--task-class", "unknown"))
        wrong = await in_thread(lambda: run("--task-class", "sums"))
    assert [("sums", 0.2), ("", None), ("", 0.05)] == [
        asked[1:] for asked in harness.operations.compared
    ]
    head, tactical, cascade, *rest = shown.splitlines()
    assert 0 == code == code_json
    assert {"tier", "mode", "ATP an answer", "right"} <= {
        cell.strip() for cell in head.split("  ") if cell
    }
    for cell in ("tactical", "single", "9.00", "70.0%", "80", "100 ms", "3"):
        assert cell in tactical
    for cell in ("strategic", "cascade", "20.00", "80.0%", "40", "-"):
        assert cell in cascade
    assert any("no sensor" in line for line in rest)
    assert any("escalates 25.0% at --max-error 0.1" in line for line in rest)
    body = json.loads(text)
    assert [9_000_000, 20_000_000] == [one["expected_uatp"] for one in body["modes"]]
    assert (None, "no sensor") == (body["watts"], body["power_note"])
    assert 1 == missing[0]
    assert "no quality card" in missing[2]
    assert 2 == wrong[0]


def test_a_figure_that_is_known_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Power, joules, and right answers for a kilojoule."""
    from sage_fed.cli.operate import _print_returns  # noqa: PLC0415 - the command's own table

    one = replace(RETURNS.modes[0], joules=2.5, right_per_joule=0.28)
    _print_returns(replace(RETURNS, modes=(one,), watts=41.25, power_note="mean of nvml"))
    shown = capsys.readouterr().out
    for text in ("2.5", "280", "41.2 W, mean of nvml"):
        assert text in shown
