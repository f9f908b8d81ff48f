"""Commands against a real daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from raw_http2 import RawClient
from typer.testing import CliRunner, Result
from waiting import until

from sage_fed.cli.app import build_app
from sage_fed.cli.exits import ExitCode
from sage_fed.core import DRAW_VERSION, TIER_ROLES
from sage_fed.v1 import inference_pb2, types_pb2

QUESTION = "What is 2 plus 3?"


class Shell:
    """`sage-fed ...` with the daemon's address in the environment."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.environ = {"SAGE_FED_ADDRESS": daemon.address}

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        """What the command printed, and its exit code."""
        return CliRunner(env=self.environ).invoke(build_app(), arguments, input=stdin)

    def json(self, *arguments: str) -> dict[str, object]:
        """The object that the command printed with --json."""
        result = self.run(*arguments, "--json")
        assert 0 == result.exit_code, result.output
        body: dict[str, object] = json.loads(result.stdout)
        return body

    def idle(self) -> None:
        """Wait until no job is running."""
        deadline = time.monotonic() + 30
        while json.loads(self.admin("load", "--json").stdout)["jobs"]:
            assert time.monotonic() < deadline, "a job does not end"

    def settled_uatp(self) -> int:
        """What the last job was charged, once none is running."""
        self.idle()
        entries = self.json("ledger", "--limit", "20")["entries"]
        amounts = [entry["amount_uatp"] for entry in entries if entry["kind"] == "settle"]  # type: ignore[attr-defined]
        return int(amounts[0])

    def admin(self, *arguments: str) -> Result:
        """An operator's command on the daemon's machine."""
        return self.run("admin", *arguments, "--state-dir", str(self.daemon.state_dir))


@pytest.fixture
def shell(demo_daemon: DaemonProcess) -> Shell:
    """A shell with a full purse: the daemon is shared, and other tests spend too."""
    shell = Shell(demo_daemon)
    result = shell.admin("set-budget", "local", "--balance", "5000")
    assert 0 == result.exit_code, result.output
    return shell


GREEDY = ("--temperature", "0", "--max-new-tokens", "16")


def answer(shell: Shell, *options: str) -> dict[str, object]:
    return shell.json("ask", QUESTION, *GREEDY, *options)


def test_piped_output_is_exactly_the_answer(shell: Shell) -> None:
    """A pipe gets the text and one line end; nothing about cost, on no stream."""
    text = answer(shell, "--tier", "tactical")["text"]
    result = shell.run("ask", QUESTION, *GREEDY, "--tier", "tactical")
    assert (0, f"{text}\n", "") == (result.exit_code, result.stdout, result.stderr)


def test_a_mistyped_variable_is_no_silence(shell: Shell) -> None:
    """Else who mistypes SAGE_FED_TOKEN runs as nobody, and pays from nobody's account."""
    shell.environ["SAGE_FED_TOKN"] = "x"
    result = shell.run("budget", "--json")
    assert 0 == result.exit_code
    assert "warning: SAGE_FED_TOKN is not known; did you mean SAGE_FED_TOKEN?\n" == result.stderr


def test_the_question_may_be_piped_in(shell: Shell) -> None:
    """`-`, or nothing, reads stdin."""
    text = answer(shell, "--tier", "tactical")["text"]
    outputs = [
        shell.run("ask", *words, *GREEDY, "--tier", "tactical", stdin=f"{QUESTION}\n").stdout
        for words in (("-",), ())
    ]
    assert [f"{text}\n"] * 2 == outputs


def test_json_carries_everything(shell: Shell) -> None:
    """Route, usage, timing, price, balance, tokens and log-probabilities in one object."""
    body = answer(shell, "--tier", "strategic", "--logprobs", "2")
    started, finished = body["started"], body["finished"]
    assert isinstance(started, dict)
    assert isinstance(finished, dict)
    assert {"tier": "strategic", "requested": "strategic"}.items() <= started["route"].items()
    assert DRAW_VERSION == started["route"]["draw_version"]
    assert len(body["token_ids"]) == finished["usage"]["output_tokens"]  # type: ignore[arg-type]
    assert len(body["logprobs"]) == finished["usage"]["output_tokens"]  # type: ignore[arg-type]
    assert 0 < finished["price"]["charged_uatp"] <= finished["price"]["held_uatp"]
    assert {"balance_uatp", "timing", "stop_reason"} <= finished.keys()


def test_a_seed_repeats_a_sampled_answer(shell: Shell) -> None:
    """The same seed gives the same tokens."""
    options = ("--temperature", "1.5", "--seed", "11", "--ignore-eos", "--tier", "tactical")
    first, second = (shell.json("ask", QUESTION, *options, "--max-new-tokens", "16") for _ in "ab")
    assert first["token_ids"] == second["token_ids"]


def test_a_request_id_is_charged_once(shell: Shell) -> None:
    """The second request of the same id is answered from the books."""
    options = ("--tier", "tactical", "--request-id", "cli-once")
    first, second = answer(shell, *options), answer(shell, *options)
    assert [False, True] == [body["started"]["replayed"] for body in (first, second)]  # type: ignore[index]
    assert first["text"] == second["text"]


def test_a_cost_cap_refuses_with_its_own_exit_code(shell: Shell) -> None:
    """Exit code 3 and one line; --json names the reason."""
    result = shell.run("ask", QUESTION, "--tier", "strategic", "--max-cost", "0.5", "--json")
    assert 3 == result.exit_code
    assert "CANNOT_AFFORD" == json.loads(result.stdout)["error"]["reason"]
    assert result.stderr.startswith("refused: ")
    assert 1 == len(result.stderr.splitlines())


def test_a_bad_field_is_named(shell: Shell) -> None:
    """The daemon's refusal of a value reaches the user with the field's name."""
    result = shell.run("ask", QUESTION, "--temperature", "-3")
    assert 2 == result.exit_code
    assert "temperature" in result.stderr


def test_a_downgrade_is_said(shell: Shell) -> None:
    """With leave given, the cheaper tier answers and the reply says so."""
    route = shell.json(
        "ask", QUESTION, *GREEDY, "--tier", "strategic", "--max-cost", "60", "--allow-downgrade"
    )["started"]["route"]  # type: ignore[index]
    assert ("tactical", True) == (route["tier"], route["downgraded"])


def test_a_quote_costs_nothing(shell: Shell) -> None:
    """Every way's worst case and a decision, and no entry in the books."""
    before = shell.json("ledger", "--limit", "1")
    quoted = shell.json("quote", QUESTION, "--complexity", "1")
    ways = [(way["tier"], way["mode"]) for way in quoted["tiers"]]  # type: ignore[attr-defined]
    # The bundled quality card is of the demo's models, so it can say what a cascade is worth.
    strategic = [("strategic", mode) for mode in ("single", "speculative", "cascade")]
    assert [("tactical", "single"), *strategic] == ways
    for way in quoted["tiers"]:  # type: ignore[attr-defined]
        assert 0 < way["expected_uatp"] <= way["worst_case_uatp"]
        assert 0 < way["expected_error"] < 1
        assert "estimated_s" in way
    assert "strategic" == quoted["decision"]["tier"]  # type: ignore[index]
    kinds = {entry["kind"] for entry in _entries_since(shell, before)}
    assert kinds <= {"refill"}
    assert "would run on" in shell.run("quote", QUESTION).stdout
    refused = shell.run("quote", QUESTION, "--max-cost", "0").stdout
    assert "would be refused" in refused
    assert "would run on" not in refused


def _entries_since(shell: Shell, before: dict[str, object]) -> list[dict[str, object]]:
    newest: int = before["entries"][0]["entry_id"]  # type: ignore[index]
    entries = shell.json("ledger", "--limit", "100")["entries"]
    assert isinstance(entries, list)
    return [entry for entry in entries if entry["entry_id"] > newest]


def test_a_job_is_in_the_books(shell: Shell) -> None:
    """The hold, the settlement and the release of the rest, under the job's id."""
    body = answer(shell, "--tier", "tactical", "--stop", "zzz")
    job_id = body["started"]["job_id"]  # type: ignore[index]
    entries = shell.json("ledger", "--limit", "100")["entries"]
    mine = [entry for entry in entries if entry["job_id"] == job_id]  # type: ignore[attr-defined]
    kinds = {entry["kind"] for entry in mine}
    assert {"hold", "settle"} <= kinds <= {"hold", "settle", "release"}
    output = shell.run("ledger").stdout
    assert job_id in output
    assert {"held", "spent"} <= set(output.split())
    assert {"charged", "discharged"}.isdisjoint(output.split())


def test_the_budget(shell: Shell) -> None:
    """Balance, capacity and refill of the caller's account."""
    body = shell.json("budget")
    assert ("local", 5_000_000_000) == (body["account"], body["capacity_uatp"])
    output = shell.run("budget").stdout
    assert "5,000.00 ATP" in output
    assert re.search(r"^spent +[\d,.]+ ATP \(as ADP\)$", output, re.MULTILINE)


def test_a_stop_token_ends_the_answer_before_it(shell: Shell) -> None:
    """`--stop-token-id` may be repeated; an id that the model lacks is refused by the option."""
    ask = ("ask", "tell", "--tier", "tactical", "--temperature", "0", "--ignore-eos")
    whole = shell.json(*ask, "--max-new-tokens", "12")["token_ids"]
    assert isinstance(whole, list)
    stop = whole[5]
    body = shell.json(
        *ask, "--max-new-tokens", "12", "--stop-token-id", "0", "--stop-token-id", str(stop)
    )
    assert whole[: whole.index(stop)] == body["token_ids"]
    assert "stop_token" == body["finished"]["stop_reason"]  # type: ignore[index]
    refused = shell.run(*ask, "--stop-token-id", "500")
    assert 2 == refused.exit_code
    assert "--stop-token-id: 500 is not a token of this model" in refused.stderr


def test_models_and_status(shell: Shell) -> None:
    """Both tiers with their models, ready, and the ratio of their prices."""
    listed = shell.json("models")["models"]
    assert isinstance(listed, list)
    assert [tier.name for tier in TIER_ROLES] == [model["tier"] for model in listed]
    assert {"Qwen2ForCausalLM"} == {model["architecture"] for model in listed}
    status = shell.json("status")
    assert 6.59 == status["cost_ratio"]
    assert ["ready", "ready"] == [tier["state"] for tier in status["tiers"]]  # type: ignore[attr-defined]
    assert "Qwen2ForCausalLM" in shell.run("models").stdout
    assert "<|endoftext|> (497), <|im_end|> (499)" in shell.run("models").stdout
    assert "6.59" in shell.run("status").stdout


def test_the_operator_uses_the_token_of_this_machine(shell: Shell) -> None:
    """`admin` finds the daemon's token in its state directory, and never prints it."""
    result = shell.admin("load", "--json")
    assert 0 == result.exit_code, result.output
    assert {"tiers", "jobs", "held_uatp", "unread"} <= json.loads(result.stdout).keys()
    assert shell.daemon.admin_token not in result.output


def test_a_new_account(shell: Shell) -> None:
    """`admin set-budget` creates an account with the given terms."""
    result = shell.admin(
        "set-budget", "robot", "--balance", "12.5", "--capacity", "100", "--refill", "0.5",
        "--strategic-floor", "1", "--json",
    )  # fmt: skip
    assert 0 == result.exit_code, result.output
    body = json.loads(result.stdout)
    assert ("robot", 12_500_000, 100_000_000, 500_000, 1_000_000) == (
        body["account"], body["balance_uatp"], body["capacity_uatp"], body["refill_uatp_per_s"],
        body["strategic_floor_uatp"],
    )  # fmt: skip


def test_what_is_not_read_is_shown_and_ended_by_name(shell: Shell) -> None:
    """The call, the account, the connection; each name that is shown can be ended."""
    stream = "/sage_fed.v1.InferenceService/GenerateStream"
    job = types_pb2.JobSpec(text="hello", tier=types_pb2.TIER_TACTICAL)
    body = inference_pb2.GenerateStreamRequest(job=job).SerializeToString()
    with RawClient(shell.daemon.address, window=0) as client:
        client.widen(client.call("/grpc.health.v1.Health/Watch", b""))
        client.call(stream, body)

        def unread() -> list[dict[str, object]]:
            shown: list[dict[str, object]] = json.loads(shell.admin("load", "--json").stdout)[
                "unread"
            ]
            return [reply for reply in shown if reply["connection"] == client.name]

        until(lambda: bool(unread()))
        (reply,) = unread()
        assert ("local", stream.removeprefix("/")) == (reply["account"], reply["method"])
        table = shell.admin("load").stdout
        assert all(str(reply[name]) in table for name in ("call_id", "job_id", "connection"))
        assert "1 reply unread" in table
        # The job has ended by itself: it is its unread answer that the job's name ends now.
        assert 0 == shell.admin("abort", str(reply["job_id"])).exit_code
        until(lambda: unread()[0]["ended"] is True)
        assert 0 == shell.admin("abort", str(reply["call_id"])).exit_code
        assert 0 == shell.admin("abort", client.name).exit_code
        client.until(lambda: client.closed)
        assert 1 == shell.admin("abort", client.name).exit_code


def test_aborting_what_does_not_run(shell: Shell) -> None:
    """An unknown job is said to be unknown, with exit code 1."""
    result = shell.admin("abort", "no-such-job")
    assert (1, "there is no no-such-job to end\n") == (result.exit_code, result.stdout)


def test_an_ordinary_account_is_no_operator(shell: Shell) -> None:
    """A wrong token is an error that does not repeat the token."""
    result = shell.run("admin", "load", "--token", "guessed-secret")
    assert 1 == result.exit_code
    assert "guessed-secret" not in result.output


def test_the_books_balance_beside_the_running_daemon(shell: Shell) -> None:
    """`ledger check` reads the books of a daemon that has them open."""
    answer(shell)
    result = shell.run("ledger", "check", "--state-dir", str(shell.daemon.state_dir))
    assert (0, "the books balance") == (result.exit_code, result.stdout.splitlines()[-1])


def test_chat_remembers(shell: Shell) -> None:
    """Each piped line is a turn; the prompt of the second one holds the first."""
    script = f"/tier tactical\n{QUESTION}\n{QUESTION}\n/reset\n{QUESTION}\n/budget\n/quit\nunread\n"
    before = shell.json("ledger", "--limit", "1")
    result = shell.run("chat", "--max-new-tokens", "8", stdin=script)
    assert 0 == result.exit_code, result.output
    assert "tier tactical" in result.stderr
    assert "ATP left" in result.stderr
    held = [
        int(entry["amount_uatp"])  # type: ignore[call-overload] # JSON
        for entry in reversed(_entries_since(shell, before))
        if entry["kind"] == "hold"
    ]
    first, second, after_reset = held
    assert first == after_reset < second


def ask_for_much(shell: Shell) -> subprocess.Popen[bytes]:
    """`ask` in a process of its own, for an answer that takes a while."""
    return subprocess.Popen(
        [sys.executable, "-m", "sage_fed.cli", "ask", QUESTION, "--tier", "strategic",
         "--ignore-eos", "--max-new-tokens", "512", "--temperature", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **shell.environ},
    )  # fmt: skip


def test_an_interrupted_question_is_cancelled(shell: Shell) -> None:
    """Ctrl-C: exit code 130, and the daemon goes on without the job."""
    process = ask_for_much(shell)
    assert process.stdout is not None
    # The first character is the event: the job is running then.
    first = process.stdout.read(1)
    process.send_signal(2)
    rest, errors = process.communicate(timeout=30)
    assert (130, b"") == (process.returncode, errors)
    assert first
    assert len(rest) < 512


def test_a_drained_daemon_leaves_with_0(tmp_path: Path) -> None:
    """`admin drain` ends the daemon, and afterwards nobody answers."""
    daemon = DaemonProcess.start(tmp_path / "state")
    shell = Shell(daemon)
    assert (0, "draining, 0 jobs still run\n") == (
        (result := shell.admin("drain")).exit_code, result.stdout,
    )  # fmt: skip
    assert 0 == daemon.process.wait(30)
    assert 4 == shell.run("status").exit_code


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """`serve` with a wrong directory: a setting that cannot work (78), and no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "sage_fed.cli", "serve", "--profile", "demo",
         "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
         "--state-dir", str(tmp_path / "state"),
         "--set", f"strategic.model={tmp_path}/no-such-model"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ExitCode.CONFIG == done.returncode
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_of_an_answer(shell: Shell) -> None:
    """`ask | head -c 1`: a quiet end with 141, and the job is cancelled, not made for nobody."""
    process = ask_for_much(shell)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert b"" == process.stderr.read()
    process.stderr.close()
    assert 141 == process.wait(30)
    assert shell.settled_uatp() < 512 * 6_590_000


def test_an_answer_that_cannot_be_written(shell: Shell) -> None:
    """A full disk: exit code 1 and one line, not the text of an exception."""
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m sage_fed.cli ask hi --max-new-tokens 4 >/dev/full'],
        capture_output=True, text=True, check=False, env={**os.environ, **shell.environ},
    )  # fmt: skip
    expected = "error: the output cannot be written: No space left on device\n"
    assert (1, expected) == (done.returncode, done.stderr)


def test_no_job_is_said_in_words(shell: Shell) -> None:
    """An empty list is a sentence, not the head of a table."""
    shell.idle()
    output = shell.admin("load").stdout
    assert "no job is running" in output
    assert "priority" not in output
