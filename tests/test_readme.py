"""The README's commands do what it says: each is taken from it and run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from surroundings import require_tool

README = (Path(__file__).parent.parent / "README.md").read_text()
BIN = Path(sys.executable).parent


def fenced(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(first_word: str) -> list[str]:
    """Shell commands that start with a word, comments and line continuations taken away."""
    lines = "\n".join(fenced("sh")).replace("\\\n", " ").splitlines()
    found = (shlex.split(line, comments=True) for line in lines)
    return [shlex.join(words) for words in found if words and words[0] == first_word]


ASKED = [line for line in commands("sage-fed") if " serve" not in line and " chat" not in line]


def run(line: str, daemon: DaemonProcess, **options: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "SAGE_FED_ADDRESS": daemon.address,
        "SAGE_FED_STATE_DIR": str(daemon.state_dir),
        "SAGE_FED_METRICS_LISTEN": urllib.parse.urlsplit(daemon.metrics_url).netloc,
    }
    return subprocess.run(
        shlex.split(line),
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def test_there_are_commands_to_run() -> None:
    """The tests below would pass on a README that they can no longer read."""
    assert len(ASKED) >= 8
    assert 1 == len(commands("buf"))
    assert ["make demo", "make test"] == commands("make")


@pytest.mark.parametrize("line", ASKED)
def test_a_command_of_the_readme_runs(line: str, demo_daemon: DaemonProcess) -> None:
    """Every command that talks to a running daemon ends with success and says something."""
    done = run(line, demo_daemon)
    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()


def test_chat_runs(demo_daemon: DaemonProcess) -> None:
    """`sage-fed chat` answers what it is given and ends with its input."""
    done = run("sage-fed chat", demo_daemon, input="What is 1 plus 2?\n")
    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()


def test_the_public_client_runs(demo_daemon: DaemonProcess) -> None:
    """`buf curl` streams an answer through reflection, without any of our code."""
    require_tool("buf")
    line = commands("buf")[0].replace("127.0.0.1:6590", demo_daemon.address)
    done = run(line, demo_daemon)
    assert 0 == done.returncode, done.stderr
    assert '"stopReason"' in done.stdout


def test_the_python_example_runs(demo_daemon: DaemonProcess) -> None:
    """The example with our client prints a stream that finishes."""
    example = fenced("python")[0].replace("127.0.0.1:6590", demo_daemon.address)
    done = run(shlex.join([sys.executable, "-c", example]), demo_daemon)
    assert 0 == done.returncode, done.stderr
    assert "Finished" in done.stdout
