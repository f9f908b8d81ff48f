"""`sage-fed calibrate --quality` against a real daemon: asked, checked, written, in force."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from forked_daemon import ForkedProcess
from tasks import task_at
from typer.testing import CliRunner, Result
from waiting import until

from sage_fed.cards.quality_card import ANY_CLASS, QUALITY_FOLDER, AnswerFeatures, QualityCard
from sage_fed.cli.app import build_app
from sage_fed.cli.exits import ExitCode
from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.errors import Forbidden, InvalidField, NotFound

FLAGS = ("--set", "budget.initial_atp=1000000", "--set", "budget.capacity_atp=1000000")
NUM_TASKS = 130


def run(daemon: DaemonProcess, *arguments: str) -> Result:
    environ = {"SAGE_FED_ADDRESS": daemon.address}
    words = ("calibrate", "--state-dir", str(daemon.state_dir), *arguments)
    return CliRunner(env=environ).invoke(build_app(), words)


def entries(daemon: DaemonProcess) -> int:
    with Client(daemon.address) as client:
        return len(client.entries(5000))


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality") / "state"


@pytest.fixture(scope="module")
def daemon(state_dir: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess.start(state_dir, *FLAGS, launch=ForkedProcess)
    yield daemon
    assert 0 == daemon.stop(), daemon.log.read_text()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of every kind and grade, a few of them held out."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    found = {task.prompt: task for task in (task_at(7, i, "test") for i in range(2 * NUM_TASKS))}
    lines = [
        {"prompt": task.prompt, "check": {"exact": task.answer}, "max_new_tokens": 24}
        | ({"held_out": "late"} if index >= NUM_TASKS - 10 else {})
        for index, task in enumerate(list(found.values())[:NUM_TASKS])
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def made(daemon: DaemonProcess, tasks: Path) -> dict[str, object]:
    """A card, by the command, and adopted."""
    result = run(daemon, "--quality", str(tasks), "--adopt", "--json")
    assert 0 == result.exit_code, result.output
    body: dict[str, object] = json.loads(result.stdout)
    return body


def test_the_card_says_how_often_each_tier_is_wrong(
    daemon: DaemonProcess, made: dict[str, object]
) -> None:
    """It is a card like every other, of exactly the loaded models, with a report beside it."""
    card = QualityCard.load(str(made["version"]), daemon.state_dir / "cards")
    with Client(daemon.address) as client:
        for model in client.models():
            name = card.fingerprint.models[model.tier]
            assert (model.name, model.parameters, model.precision) == (
                name.name, name.parameters, name.precision
            )  # fmt: skip
    assert (NUM_TASKS - 10, 10) == (card.measured.num_tasks, card.measured.num_held_out)
    assert 0.1 < card.expected_error(Tier.TACTICAL) < 0.6
    assert card.classes[ANY_CLASS].evidence.auroc.value > 0.75
    path = Path(str(made["path"]))
    assert card.version == tomllib.loads(path.read_text())["version"]
    report = path.with_suffix(".md").read_text()
    assert "## Held out: `late`" in report
    assert f"# Quality card {card.version}" in report


def test_a_doubtful_answer_is_told_from_a_sound_one(
    daemon: DaemonProcess, made: dict[str, object]
) -> None:
    """What a job's own log-probabilities say goes through the card to P(wrong)."""
    card = QualityCard.load(str(made["version"]), daemon.state_dir / "cards")
    doubts = []
    with Client(daemon.address) as client:
        for prompt in ("What is 2+3?", "Reverse QXWZKJVBGHTRPL."):
            answer = client.generate(
                prompt, tier="tactical", temperature=0.0, max_new_tokens=24, top_logprobs=2
            )
            doubts.append(card.p_wrong("any", AnswerFeatures.of(answer.logprobs)))
    assert doubts[0] < 0.3 < 0.7 < doubts[1]


def test_a_cascade_doubts_as_the_card_does(daemon: DaemonProcess, made: dict[str, object]) -> None:
    """It says the P(wrong) that the card has for the very answer that the tactical tier gives."""
    card = QualityCard.load(str(made["version"]), daemon.state_dir / "cards")
    with Client(daemon.address) as client:
        for prompt in ("What is 2+3?", "Reverse QXWZKJVBGHTRPL.", "Sort KDHAQZ."):
            ask = {"temperature": 0.0, "max_new_tokens": 24}
            alone = client.generate(prompt, tier="tactical", top_logprobs=2, **ask)
            cascade = client.generate(prompt, mode="cascade", max_error=1.0, **ask)
            expected = card.p_wrong("any", AnswerFeatures.of(alone.logprobs))
            assert expected == pytest.approx(cascade.finished.error_probability, abs=1e-6)


def test_it_is_in_force_and_shown(daemon: DaemonProcess, made: dict[str, object]) -> None:
    """By `status`, and by a metric."""
    assert (True, "") == (made["adopted"], made["refused"])
    with Client(daemon.address) as client:
        status = client.status()
    assert made["version"] == status.quality_card
    assert f"measured on this pair with {NUM_TASKS - 10} tasks" in status.quality_card_note
    environ = {"SAGE_FED_ADDRESS": daemon.address}
    shown = CliRunner(env=environ).invoke(build_app(), ("status",)).stdout
    assert f"quality card  {made['version']}: measured on this pair" in shown


def test_what_each_mode_returns_is_of_the_card_and_of_the_jobs_here(
    daemon: DaemonProcess, made: dict[str, object]
) -> None:
    """Accuracy by the card, prices by the rate card; time of the jobs that asked the tasks."""
    card = QualityCard.load(str(made["version"]), daemon.state_dir / "cards")
    environ = {"SAGE_FED_ADDRESS": daemon.address}
    asked = ("models", "--roi", "--json", "--max-error", "0.1")
    found = json.loads(CliRunner(env=environ).invoke(build_app(), asked).stdout)
    assert (card.version, "any", 0.1) == (
        found["quality_card"], found["task_class"], found["max_error"],
    )  # fmt: skip
    assert card.cascade("any", 0.1).escalated == pytest.approx(found["escalated"])
    modes = {(one["tier"], one["mode"]): one for one in found["modes"]}
    tactical, strategic = (modes[tier.name, "single"] for tier in TIER_ROLES)
    assert {("strategic", mode) for mode in ("single", "speculative", "cascade")} < modes.keys()
    for tier, one in zip(TIER_ROLES, (tactical, strategic), strict=True):
        assert one["accuracy"] == pytest.approx(1 - card.expected_error(tier))
        assert one["num_jobs"] >= NUM_TASKS
        assert one["device_s"] > 0
        assert (one["joules"] is None) == (found["watts"] is None)
    assert tactical["expected_uatp"] <= modes["strategic", "cascade"]["expected_uatp"]
    assert tactical["right_per_atp"] > strategic["right_per_atp"]
    assert found["power_note"]


def test_tasks_are_ordinary_jobs_and_asked_once(
    daemon: DaemonProcess, made: dict[str, object], tasks: Path, tmp_path: Path
) -> None:
    """The books have one settlement for each answer; a second run asks, and pays, nothing."""
    assert made["version"]
    with Client(daemon.address) as client:
        settled = [e for e in client.entries(5000) if e.kind.value == "settle"]
    assert len(settled) >= 2 * NUM_TASKS
    before = entries(daemon)
    again = run(daemon, "--quality", str(tasks), "--output", str(tmp_path / "copies"))
    assert 0 == again.exit_code, again.output
    assert before == entries(daemon)
    copies = {path.name for path in (tmp_path / "copies").iterdir()}
    (version,) = {name.rsplit(".", 1)[0] for name in copies}
    assert {f"{version}.toml", f"{version}.md"} == copies
    assert version != made["version"], "no card takes another's place"
    command = f"sage-fed admin adopt-quality-card {version} --state-dir"
    assert command in " ".join(again.stdout.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', ":2: check: is missing"),
        ('{"prompt": "x", "check": {"regex": "["}}', ":2: check.regex: "),
    ],
)
def test_a_bad_line_is_refused_before_anything_is_asked(
    daemon: DaemonProcess, tmp_path: Path, line: str, message: str
) -> None:
    """By its number and field, with the exit code of a bad configuration."""
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "What is 2+3?", "check": {"exact": "5"}}\n' + line)
    before = entries(daemon)
    result = run(daemon, "--quality", str(path))
    assert ExitCode.USAGE == result.exit_code
    assert f"{path}{message}" in result.stderr
    assert before == entries(daemon)


def test_too_few_tasks_make_no_card(daemon: DaemonProcess, tmp_path: Path) -> None:
    """With the reason; what was answered is kept."""
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "What is 2+4?", "check": {"exact": "6"}}\n')
    result = run(daemon, "--quality", str(path))
    assert ExitCode.USAGE == result.exit_code
    assert "1 tasks, and 100 are needed" in result.stderr


def test_an_interrupt_ends_it_soon_and_keeps_what_was_answered(
    daemon: DaemonProcess, made: dict[str, object], tmp_path: Path
) -> None:
    """Exit code 130; no hold stays open, and the next run asks only the rest."""
    path = tmp_path / "tasks.jsonl"
    num_tasks = 3000
    path.write_text(
        "".join(
            f'{{"prompt": "What is {1000 + i}+{5000 - i}?", "check": {{"exact": "6000"}}}}\n'
            for i in range(num_tasks)
        )
    )
    kept = Path(str(made["answers"]))
    before = len(kept.read_text().splitlines())
    environ = {key: value for key, value in os.environ.items() if "SAGE_FED" not in key}
    words = ("calibrate", "--quality", str(path), "--state-dir", str(daemon.state_dir))
    process = subprocess.Popen(
        [sys.executable, "-m", "sage_fed.cli", *words, "--address", daemon.address],
        env=environ,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: len(kept.read_text().splitlines()) > before + 20, "answers come")
    process.send_signal(signal.SIGINT)
    assert ExitCode.INTERRUPTED == process.wait(30)
    asked = len(kept.read_text().splitlines()) - before
    assert 20 < asked < 2 * num_tasks
    with Client(daemon.address, daemon.admin_token) as operator:
        until(lambda: operator.load().held_uatp == 0, "every hold is closed")


def test_quality_has_no_quick_form(daemon: DaemonProcess, tasks: Path) -> None:
    """A usage error, before anything is done."""
    result = run(daemon, "--quality", str(tasks), "--quick")
    assert ExitCode.USAGE == result.exit_code
    assert "--quality has no quick form" in result.stderr


def test_only_an_operator_adopts_a_card_that_is_there_and_fits(
    daemon: DaemonProcess, made: dict[str, object]
) -> None:
    """A path is no version, a user no operator; what is in force stays."""
    own = daemon.state_dir / "cards" / QUALITY_FOLDER
    text = Path(str(made["path"])).read_text()
    (own / "other.toml").write_text(
        text.replace(str(made["version"]), "other").replace('"fp32"', '"int4"')
    )
    with Client(daemon.address, daemon.admin_token) as operator, Client(daemon.address) as user:
        with pytest.raises(NotFound, match=str(made["version"])):
            operator.adopt_quality_card("no-such-card")
        with pytest.raises(InvalidField, match="is not a quality card's version"):
            operator.adopt_quality_card("../../etc/passwd")
        with pytest.raises(InvalidField, match="cannot be read; see the log"):
            operator.adopt_quality_card("other")
        with pytest.raises(Forbidden):
            user.adopt_quality_card(str(made["version"]))
        assert made["version"] == user.status().quality_card
    (own / "other.toml").unlink()


def test_a_restart_keeps_the_card_that_fits_and_drops_another(
    made: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`auto` finds an own card again; with other models it says what is different, if named."""
    state_dir = tmp_path_factory.mktemp("restarted") / "state"
    folder = state_dir / "cards" / QUALITY_FOLDER
    folder.mkdir(parents=True, mode=0o700)
    version = str(made["version"])
    (folder / f"{version}.toml").write_text(Path(str(made["path"])).read_text())
    seen = []
    for flags in ((), ("--set", f"quality_card={version}", "--set", "tactical.precision=bf16"),
                  ("--set", "quality_card=off")):  # fmt: skip
        daemon = DaemonProcess.start(state_dir, *flags, launch=ForkedProcess)
        with Client(daemon.address) as client:
            status = client.status()
            seen.append((status.quality_card, status.quality_card_note))
        assert 0 == daemon.stop(), daemon.log.read_text()
    assert version == seen[0][0]
    assert "" == seen[1][0]
    assert f"{version} is dropped: measured on another pair" in seen[1][1]
    assert "tactical.precision is bf16, the card's is fp32" in seen[1][1]
    assert ("", "none is wanted") == seen[2]
