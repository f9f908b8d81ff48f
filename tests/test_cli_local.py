"""Commands that need no daemon: settings, the audit of the books, and usage."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
from holds import asked
from typer.testing import CliRunner, Result

from sage_fed import __version__
from sage_fed.cli import operate
from sage_fed.cli.app import build_app
from sage_fed.cli.options import ledger_file
from sage_fed.core import Phase, PhaseTokens, Tier
from sage_fed.ledger import AccountTerms, Ledger

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
    ledger = await Ledger(path).open()
    await ledger.ensure_account("local", AccountTerms(10**9, 0, 0, 10**8))
    for job_id in ("job-1", "job-2"):
        await ledger.hold(*asked(job_id, "local", 5_000_000, "default-1", "tactical"))
    await ledger.settle("job-1", 3_000_000, "length", b"")
    await ledger.void("job-2", "test")
    await ledger.close()
    return path


def test_an_entry_says_what_was_computed_by_tier() -> None:
    """A tier's phases together, tiers in their order."""
    usage = (
        PhaseTokens(Tier.TACTICAL, Phase.DRAFT, 1_200),
        PhaseTokens(Tier.STRATEGIC, Phase.PREFILL, 12),
        PhaseTokens(Tier.STRATEGIC, Phase.VERIFY, 1_200),
    )
    expected = "tactical 1,200 draft; strategic 12 prefill + 1,200 verify"
    assert (expected, "-") == (operate._usage_text(usage), operate._usage_text(()))


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version(argument: str) -> None:
    """The package's version, with Python's and torch's as installed: what a report needs."""
    result = run(argument)
    python, torch = platform.python_version(), importlib.metadata.version("torch")
    expected = f"sage-fed {__version__} (Python {python}, torch {torch})\n"
    assert (0, expected, "") == (result.exit_code, result.stdout, result.stderr)


def test_help_tells_the_exit_codes() -> None:
    """A script's author finds the codes where the commands are listed."""
    assert "3 refused by the budget" in " ".join(run("--help").output.split())


def test_the_command_line_does_not_load_the_engine() -> None:
    """Importing every command pulls in neither torch nor pydantic nor the drawing of tables."""
    code = (
        "import sys, sage_fed.cli.app; "
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
        "limits.max_jobs": (9, "flag"),
        "log_level": ("error", "environment SAGE_FED_LOG_LEVEL"),
        "drain_grace_s": (7.0, f"file {file}"),
        "device": ("cpu", "profile demo"),
        "ledger.hold_ttl_s": (7200.0, "default"),
    } == picked


def test_config_has_the_types_of_json(tmp_path: Path) -> None:
    """Numbers, booleans, null and tables are themselves; sizes are bytes, amounts ATP."""
    file = tmp_path / "sage-fed.toml"
    file.write_text(
        '[accounts.arm]\nrole = "user"\n[budget]\ncapacity_atp = 6.59\ninitial_atp = 2\n'
        "refill_atp_per_s = 0.000001\nstrategic_floor_atp = 0\n"
    )
    more = ("--set", "tactical.kv_cache_bytes=64MiB", "--state-dir", str(tmp_path))
    settings = json.loads(
        run("config", "--profile", "demo", "--config", str(file), "--json", *more).stdout
    )
    picked = {
        key: settings[key]["value"]
        for key in (
            "tactical.kv_cache_bytes", "tactical.prefix_cache", "tls.certificate", "state_dir",
            "cpu_threads", "budget.capacity_atp", "budget.initial_atp", "budget.refill_atp_per_s",
            "accounts.arm.role", "routing.complexity_threshold",
        )
    }  # fmt: skip
    assert {
        "tactical.kv_cache_bytes": 64 * 2**20,
        "tactical.prefix_cache": True,
        "tls.certificate": None,
        "state_dir": str(tmp_path),
        "cpu_threads": picked["cpu_threads"],
        "budget.capacity_atp": 6.59,
        "budget.initial_atp": 2,
        "budget.refill_atp_per_s": 1e-06,
        "accounts.arm.role": "user",
        "routing.complexity_threshold": picked["routing.complexity_threshold"],
    } == picked
    assert (int, float) == (
        type(picked["cpu_threads"]), type(picked["routing.complexity_threshold"]),
    )  # fmt: skip
    without = json.loads(run("config", "--profile", "demo", "--json").stdout)
    assert {} == without["accounts"]["value"]


def test_config_as_a_table(tmp_path: Path) -> None:
    """On paper each line has the key, the value and the origin."""
    lines = run("config", "--profile", "demo", "--state-dir", str(tmp_path)).output.splitlines()
    (line,) = [line for line in lines if line.startswith("state_dir")]
    assert ["state_dir", str(tmp_path), "flag"] == line.split()


@pytest.mark.parametrize("command", ["serve", "config"])
def test_a_wrong_setting_is_one_line_that_names_it(command: str) -> None:
    """No traceback: an exit code, the key, where it came from, what would be right."""
    result = run(command, "--profile", "demo", "--set", "tactical.max_bach=3")
    assert (78 if command == "serve" else 2) == result.exit_code
    assert "tactical.max_bach" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (("--log-format", "json"), {}),
        ((), {"SAGE_FED_LOG_FORMAT": "json"}),
        ((), {}),
        (("--set", "log_format=json"), {}),
    ],
)
def test_a_failed_start_is_an_object_among_json_lines(
    arguments: tuple[str, ...], environ: dict[str, str]
) -> None:
    """Who parses the log parses its last line, too; off a terminal the log is JSON unasked."""
    result = CliRunner(env=environ).invoke(
        build_app(),
        ["serve", "--profile", "demo", "--set", "tactical.max_bach=3", "--set", "lissen=x",
         *arguments],
    )  # fmt: skip
    assert 78 == result.exit_code
    (line,) = result.stderr.splitlines()
    said = json.loads(line)
    assert ("ERROR", "sage_fed") == (said["level"], said["logger"])
    assert "tactical.max_bach" in said["message"]
    assert "lissen" in said["message"]
    assert "\\n" not in said["message"]


def test_a_failed_start_is_a_sentence_for_people() -> None:
    """Pretty lines end with a plain one."""
    result = run("serve", "--profile", "demo", "--log-format", "pretty", "--set", "lissen=x")
    assert 78 == result.exit_code
    assert result.stderr.startswith("error: lissen (flag): unknown key")


def test_serve_without_auth_stays_on_this_machine() -> None:
    """A listener beyond loopback without tokens is refused before anything is loaded."""
    result = run("serve", "--profile", "demo", "--listen", "0.0.0.0:6590")
    assert 78 == result.exit_code
    assert "auth.tokens_file" in result.stderr


async def test_the_audit_of_sound_books(tmp_path: Path) -> None:
    """Balanced books: exit code 0, and what was looked at."""
    await write_books(tmp_path)
    result = run("ledger", "check", "--state-dir", str(tmp_path), "--json")
    report = json.loads(result.stdout)
    assert (0, 1, 1, 0, []) == (
        result.exit_code, report["accounts"], report["jobs"], report["open_holds"],
        report["violations"],
    )  # fmt: skip
    said = run("ledger", "check", "--state-dir", str(tmp_path)).stdout
    assert said.startswith("1 account, 1 job, 0 open holds, 4 entries and 2 folded into days")


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
    ("command", "code"),
    [
        (("serve", "--profile", "demo"), 78),
        (("config",), 2),
        (("demo",), 2),
        (("ledger", "check"), 2),
        (("ledger", "backup", "x.db"), 2),
        (("token", "list"), 2),
        (("admin", "load"), 2),
    ],
)
def test_an_empty_state_dir_is_a_mistake(command: tuple[str, ...], code: int) -> None:
    """An unset variable of a script: nobody's books are begun in the current directory."""
    result = run(*command, "--state-dir", "")
    assert code == result.exit_code
    assert "state_dir" in result.stderr.replace("--state-dir", "state_dir")
    assert 1 == len(result.stderr.splitlines())


@pytest.mark.parametrize("command", [("serve", "--profile", "demo"), ("token", "list")])
def test_a_state_dir_below_a_file_is_named(command: tuple[str, ...]) -> None:
    """Not the first file that would have been in it."""
    result = run(*command, "--state-dir", "/dev/null/x")
    assert "state_dir (flag): expected a directory" in result.stderr
    assert "tokens_file" not in result.stderr


async def test_a_backup_is_taken_and_told(tmp_path: Path) -> None:
    """One line with what is in it, for a program the same; the copy is audited like the books."""
    await write_books(tmp_path)
    copy = tmp_path / "backups" / "ledger.db"
    copy.parent.mkdir()
    first = run("ledger", "backup", str(copy), "--state-dir", str(tmp_path))
    what = "1 account, 1 job, 0 open holds, 4 entries and 2 folded into days"
    told = f"{copy}: {what}; the books balance\n"
    assert (0, told) == (first.exit_code, first.stdout)
    assert 0 == run("ledger", "check", "--state-dir", str(copy.parent)).exit_code

    again = run("ledger", "backup", str(copy), "--state-dir", str(tmp_path))
    assert (1, "") == (again.exit_code, again.stdout)
    assert "is there already" in again.stderr

    other = tmp_path / "backups" / "other.db"
    as_json = run("ledger", "backup", str(other), "--state-dir", str(tmp_path), "--json")
    answer = json.loads(as_json.stdout)
    assert (str(other), 4, []) == (
        answer["copy"], answer["report"]["entries"], answer["report"]["violations"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "x"), ("quote", "x"), ("budget",), ("ledger",), ("models",), ("status",), ("chat",),
        ("calibrate", "--token", "any"),
    ],
)  # fmt: skip
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
        ("ask", ""),
        ("quote", " "),
        ("serve", "--set", "nothing"),
        ("frobnicate",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """What cannot be understood is refused before anybody is asked."""
    assert 2 == run(*arguments, stdin="").exit_code


@pytest.mark.parametrize("words", [("",), (" \n",), ("-",)])
def test_an_empty_question_is_no_prompt(words: tuple[str, ...]) -> None:
    """Given or piped in, nothing to ask is said in the same words."""
    assert "no prompt" in run("ask", *words, stdin="").stderr


def test_admin_says_where_it_looked_for_the_token(tmp_path: Path) -> None:
    """Without a token and without a daemon's state directory: which file is missing."""
    result = run("admin", "load", "--state-dir", str(tmp_path))
    assert 2 == result.exit_code
    assert "admin.token" in result.stderr.replace("\n", "")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `sage-fed` is ours."""
    command = f'sage-fed() {{ "{sys.executable}" -m sage_fed.cli "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "line",
    [
        "sage-fed version >/dev/full",
        "sage-fed --help >/dev/full",
        "sage-fed config --json >/dev/full",
        "sage-fed config >/dev/full",
        "sage-fed version >&-",
        "sage-fed ask --json --address nonsense >&-",
    ],
)
def test_output_that_cannot_be_written_is_an_error(line: str) -> None:
    """A full disk or a closed stdout: exit code 1 and one line, whatever the command."""
    done = shell(line)
    assert 1 == done.returncode
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("error: the output cannot be written: ")


@pytest.mark.parametrize("arguments", [("config",), ("config", "--json"), ("ask", "--help")])
def test_a_reader_that_has_enough(arguments: tuple[str, ...]) -> None:
    """A pipe without a reader ends the command quietly, with the code that a shell expects."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "sage_fed.cli", *arguments],
            stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False,
        )  # fmt: skip
    assert (141, b"") == (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sage-fed ask - <&-", 2),
        ("sage-fed quote <&-", 2),
        (f"sage-fed chat --address {NOBODY} <&-", 0),
    ],
)
def test_a_closed_stdin_is_an_empty_one(line: str, code: int) -> None:
    """Nothing to ask is wrong usage, and a conversation without a turn is over."""
    done = shell(line)
    assert code == done.returncode
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_line_still_loads() -> None:
    """Before any command has begun: exit code 130 and not a word."""
    code = """
import os, signal, sys
class Impatient:
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Impatient())
from sage_fed.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "version"], capture_output=True, text=True, check=False
    )
    assert (130, "", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "line",
    [
        r"sage-fed ask $'\xff'",
        r"printf 'caf\xe9' | sage-fed ask",
        r"printf 'caf\xe9' | sage-fed quote -",
        r"printf 'caf\xe9' | LC_ALL=C.UTF-8 sage-fed ask",
    ],
)
def test_a_prompt_that_is_no_text(line: str) -> None:
    """Bytes of another encoding are wrong usage, in words that a person understands."""
    done = shell(line)
    assert (2, "") == (done.returncode, done.stdout)
    assert "the prompt is not UTF-8 text" in done.stderr


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("ask x", "--seed", "99999999999999999999999"),
        ("ask x", "--top-k", "99999999999"),
        ("ask x", "--max-new-tokens", "99999999999"),
        ("quote x", "--max-new-tokens", "99999999999"),
        ("ask x", "--logprobs", "99999999999"),
        ("ask x", "--request-id", "\udcff"),
        ("ask x", "--stop", "\udcff"),
        ("ask x", "--token", "two\nlines"),
        ("ask x", "--token", "gehe\u00efm"),
        ("budget", "--token", ""),
        ("status", "--address", ""),
        ("status", "--address", "nonsense"),
        ("status", "--address", "127.0.0.1"),
        ("status", "--address", "[::1"),
        ("status", "--address", "[::1::2]:1"),
        ("status", "--address", ":6590"),
        ("status", "--address", "127.0.0.1:99999"),
        ("status", "--address", "127.0.0.1:0"),
        ("chat", "--address", "http://127.0.0.1:6590"),
    ],
)
def test_a_value_that_cannot_travel_is_named_by_its_option(
    command: str, option: str, value: str
) -> None:
    """What no daemon could be asked: exit code 2, the option in the message, no token in it."""
    result = run(*command.split(), option, value, stdin="x\n")
    assert 2 == result.exit_code
    assert f"error: {option}: must be " in result.stderr
    assert 1 == len(result.stderr.splitlines())
    assert option != "--token" or not value or value not in result.output


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "[fe80::1%lo]:1"])
def test_addresses_that_may_be_asked(address: str) -> None:
    """A well-formed address where nobody answers is another error."""
    assert 4 == run("status", "--address", address).exit_code


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "x", "--tier", "huge"),
        ("ask", "x", "--frobnicate"),
        ("ask", "-"),
        ("frobnicate",),
        ("admin", "frobnicate"),
    ],
)
def test_wrong_usage_for_a_program(arguments: tuple[str, ...]) -> None:
    """With --json stdout has an object for wrong usage too, and stderr is one line."""
    result = run(*arguments, "--json", stdin="")
    assert 2 == result.exit_code
    assert "USAGE" == json.loads(result.stdout)["error"]["reason"]
    assert 1 == len(result.stderr.splitlines())
    assert "--help`" in result.stderr


COMMANDS = (
    *((name,) for name in ("serve", "demo", "ask", "chat", "quote", "budget", "ledger", "models",
                           "status", "calibrate", "config", "admin", "version", "install-service",
                           "uninstall-service")),
    ("ledger", "check"),
    ("ledger", "backup"),
    *(("admin", name) for name in ("load", "abort", "drain", "set-budget", "adopt-card",
                                 "adopt-quality-card")),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_tells_all(command: tuple[str, ...]) -> None:
    """Each command's help has the exit codes, and a word on each option and argument."""
    result = run(*command, "--help")
    assert (0, "") == (result.exit_code, result.stderr)
    assert "3 refused by the budget" in " ".join(result.stdout.split())
    lines = [line for line in result.stdout.splitlines() if line.startswith("  ")]
    # An option or argument without a text is alone on its line, and none follows below it.
    alone = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("  -") and "  " not in line.strip() and not below.startswith("      ")
    ]
    assert [] == alone


@pytest.mark.parametrize("command", [(), ("admin",)])
def test_a_group_without_a_command_shows_its_help(command: tuple[str, ...]) -> None:
    """`sage-fed` alone: the list of commands, and exit code 2 because nothing was done."""
    result = run(*command)
    assert 2 == result.exit_code
    assert "Commands:" in result.stderr
