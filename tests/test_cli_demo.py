"""`sage-fed demo` from beginning to end, and when its daemon cannot start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sage_fed.cli.app import build_app
from sage_fed.cli.demo import plan
from sage_fed.cli.options import ledger_file
from sage_fed.client import Client
from sage_fed.errors import CannotConnect
from sage_fed.ledger import check


def demo(state_dir: Path) -> Result:
    return CliRunner().invoke(build_app(), ["demo", "--state-dir", str(state_dir)])


def test_the_demo_shows_everything_and_balances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request is answered or refused as planned, and the books that it leaves balance."""
    # The demo shows what is shipped, whatever else is set.
    monkeypatch.setenv("SAGE_FED_PROFILE", "no-such-profile")
    result = demo(tmp_path)
    assert 0 == result.exit_code, result.output
    output = " ".join(result.stdout.split())
    expected = (
        "ready on 127.0.0.1:", "the account starts with 2,0",
        "refills 5 ATP/s; prompt tokens cost too",
        "auto_complex", "downgrade_max_cost", "refused: above_max_cost",
        "sage_fed_time_to_first_token_seconds_count", "sage_fed_atp_charged_total",
        'sage_fed_cost_ratio{phase="decode",source="card"} 6.59', "books balance",
        "sage-fed serve --profile demo",
    )  # fmt: skip
    assert [] == [words for words in expected if words not in output]
    assert (
        sum(not request.expects_refusal for request in plan()) == check(ledger_file(tmp_path)).jobs
    )


def test_a_demo_without_a_daemon_fails(tmp_path: Path) -> None:
    """A daemon that dies ends the demo with 1 and the daemon's own last words."""
    ledger_file(tmp_path).write_text("this is no ledger")
    result = demo(tmp_path)
    assert 1 == result.exit_code
    assert "the daemon ended with exit code" in result.stderr
    assert "ledger.db" in result.stderr


def test_a_closed_terminal_leaves_no_daemon(tmp_path: Path) -> None:
    """SIGHUP ends the demo, and the demo ends its daemon."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "sage_fed.cli", "demo", "--state-dir", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    endpoint = tmp_path / "endpoint.json"
    deadline = time.monotonic() + 60
    while not endpoint.exists():
        # Across processes the file is the only event there is.
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    listen = json.loads(endpoint.read_text())["listen"]
    demo.send_signal(signal.SIGHUP)
    assert 128 + signal.SIGHUP == demo.wait(60)
    with Client(listen) as client, pytest.raises(CannotConnect):
        client.status()
