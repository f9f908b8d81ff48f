"""Commands that need no daemon: settings, the audit of the books, and usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
from typer.testing import CliRunner, Result

from sage_fed import __version__
from sage_fed.cli import build_app
from sage_fed.cli.paths import ledger_file
from sage_fed.ledger import AccountTerms, HoldRequest, Ledger

NOBODY = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAGE_FED_ADDRESS", "SAGE_FED_TOKEN", "SAGE_FED_CONFIG", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(build_app(), arguments, input=stdin)


async def write_books(state_dir: Path) -> Path:
    """Books with an account, a settled job and a voided one."""
    path = ledger_file(state_dir)
    ledger = await Ledger.open(path)
    await ledger.ensure_account("local", AccountTerms(10**9, 0, 0, 10**8))
    for job_id in ("job-1", "job-2"):
        await ledger.hold(HoldRequest(job_id, "local", 5_000_000, "default-1", "tactical"))
    await ledger.settle("job-1", 3_000_000, "length", b"")
    await ledger.void("job-2", "test")
    await ledger.close()
    return path


def test_version() -> None:
    """`version` prints the package's version."""
    assert (0, f"sage-fed {__version__}\n") == ((result := run("version")).exit_code, result.output)


def test_help_tells_the_exit_codes() -> None:
    """A script's author finds the codes where the commands are listed."""
    assert "3 refused by the budget" in " ".join(run("--help").output.split())


def test_the_command_line_does_not_load_the_engine() -> None:
    """Importing every command pulls in neither torch nor pydantic nor the drawing of tables."""
    code = (
        "import sys, sage_fed.cli; "
        "print(sorted({'torch', 'transformers', 'pydantic', 'rich.console'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


def test_config_prints_where_values_come_from(tmp_path: Path) -> None:
    """Each key has its value and its origin: flag, environment, file, profile or default."""
    file = tmp_path / "sage-fed.toml"
    file.write_text("drain_grace_s = 7\n")
    result = CliRunner(env={"SAGE_FED_LOG_LEVEL": "error"}).invoke(
        build_app(),
        ["config", "--profile", "demo", "--config", str(file), "--listen", "127.0.0.1:7777",
         "--set", "limits.max_jobs=9", "--json"],
    )  # fmt: skip
    settings = json.loads(result.stdout)
    picked = {
        key: (settings[key]["value"], settings[key]["origin"])
        for key in (
            "listen", "limits.max_jobs", "log_level", "drain_grace_s", "device",
            "ledger.hold_ttl_s",
        )
    }  # fmt: skip
    assert {
        "listen": ("127.0.0.1:7777", "flag"),
        "limits.max_jobs": ("9", "flag"),
        "log_level": ("error", "environment SAGE_FED_LOG_LEVEL"),
        "drain_grace_s": ("7.0", f"file {file}"),
        "device": ("cpu", "profile demo"),
        "ledger.hold_ttl_s": ("7200.0", "default"),
    } == picked


def test_config_as_a_table(tmp_path: Path) -> None:
    """On paper each line has the key, the value and the origin."""
    lines = run("config", "--profile", "demo", "--state-dir", str(tmp_path)).output.splitlines()
    (line,) = [line for line in lines if line.startswith("state_dir")]
    assert ["state_dir", str(tmp_path), "flag"] == line.split()


@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_wrong_setting_is_one_line_that_names_it(command: str) -> None:
    """No traceback: exit code 2, the key, where it came from, what would be right."""
    result = run(command, "--profile", "demo", "--set", "tactical.max_bach=3")
    assert 2 == result.exit_code
    assert "tactical.max_bach" in result.stderr
    assert "Traceback" not in result.output


def test_serve_without_auth_stays_on_this_machine() -> None:
    """A listener beyond loopback without tokens is refused before anything is loaded."""
    result = run("serve", "--profile", "demo", "--listen", "0.0.0.0:6590")
    assert 2 == result.exit_code
    assert "auth.tokens_file" in result.stderr


async def test_the_audit_of_sound_books(tmp_path: Path) -> None:
    """Balanced books: exit code 0, and what was looked at."""
    await write_books(tmp_path)
    result = run("ledger", "check", "--state-dir", str(tmp_path), "--json")
    report = json.loads(result.stdout)
    assert (0, 1, 2, 0, []) == (
        result.exit_code, report["accounts"], report["jobs"], report["open_holds"],
        report["violations"],
    )  # fmt: skip


async def test_the_audit_finds_a_changed_balance(tmp_path: Path) -> None:
    """Somebody gave themselves ATP behind the ledger's back: exit code 1, in words."""
    path = await write_books(tmp_path)
    db = apsw.Connection(str(path))
    db.execute("UPDATE account SET charged_uatp = charged_uatp + 1")
    db.close()
    result = run("ledger", "check", "--state-dir", str(tmp_path))
    assert 1 == result.exit_code
    assert "violation: account local: charged" in result.stdout
    assert result.stdout.endswith("the books do not balance\n")


def test_the_audit_needs_books(tmp_path: Path) -> None:
    """A state directory without a ledger is a wrong directory, not a clean bill."""
    result = run("ledger", "check", "--state-dir", str(tmp_path))
    assert 2 == result.exit_code
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    [("ask", "x"), ("quote", "x"), ("budget",), ("ledger",), ("models",), ("status",), ("chat",)],
)
def test_nobody_at_the_address(command: tuple[str, ...]) -> None:
    """Exit code 4, and how to start the daemon."""
    result = run(*command, "--address", NOBODY, stdin="hello\n")
    assert 4 == result.exit_code
    assert f"cannot connect to {NOBODY}" in result.stderr
    assert "sage-fed serve --profile demo" in result.stderr


def test_an_error_for_a_program() -> None:
    """With --json stdout has an object with a stable reason, also when nothing answers."""
    result = run("status", "--json", "--address", NOBODY)
    assert "CANNOT_CONNECT" == json.loads(result.stdout)["error"]["reason"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "x", "--max-cost", "much"),
        ("ask", "x", "--tier", "huge"),
        ("ask", "x", "--complexity", "3"),
        ("ask", "-"),
        ("serve", "--set", "nothing"),
        ("frobnicate",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """What cannot be understood is refused before anybody is asked."""
    assert 2 == run(*arguments, stdin="").exit_code


def test_admin_says_where_it_looked_for_the_token(tmp_path: Path) -> None:
    """Without a token and without a daemon's state directory: which file is missing."""
    result = run("admin", "load", "--state-dir", str(tmp_path))
    assert 2 == result.exit_code
    assert "admin.token" in result.stderr.replace("\n", "")
