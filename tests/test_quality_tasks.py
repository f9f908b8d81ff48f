"""Tasks: read whole or refused by line and field, checked with limits, answers kept."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_quality_card import MODELS
from waiting import until

from sage_fed.calibrate.quality import (
    AnswerFile,
    Command,
    Exact,
    Judged,
    collect,
    job_of,
    read_tasks,
)
from sage_fed.cards.quality_card import QualityFingerprint
from sage_fed.core import (
    TIER_ROLES,
    Answer,
    Finished,
    JobSpec,
    Logprob,
    Message,
    Price,
    Route,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.errors import ConfigError, Forbidden, QueueFull

PYTHON = sys.executable


def tasks_file(directory: Path, *lines: object) -> Path:
    path = directory / "tasks.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n"
                            for line in lines))  # fmt: skip
    return path


def exact(prompt: str, answer: str, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "check": {"exact": answer}, **more}


def test_every_field_of_a_task_is_read(tmp_path: Path) -> None:
    """Prompt or messages, three kinds of check, class, length, family; empty lines are none."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    command = {"command": ["true"], "cpu_s": 1, "memory_mib": 64, "wall_s": 2.5}
    path = tasks_file(
        tmp_path,
        exact("2+3?", "5", **{"class": "sums", "max_new_tokens": 8}),
        "",
        {"messages": turns, "check": {"regex": r"^2\b"}, "held_out": "dialogues"},
        {"prompt": "Say yes.", "check": command},
    )
    first, second, third = read_tasks(path)
    assert ((Message("user", "2+3?"),), Exact("5"), "sums", 8, "") == (
        first.messages, first.check, first.task_class, first.max_new_tokens, first.held_out
    )  # fmt: skip
    assert ("any", None, "dialogues") == (
        second.task_class, second.max_new_tokens, second.held_out
    )  # fmt: skip
    assert second.check.passes("2 apples")
    assert not second.check.passes("12")
    assert Command(("true",), 1, 64, 2.5) == third.check
    assert 3 == len({first.key, second.key, third.key})


FAULTS: list[tuple[object, str]] = [
    ("{", "not JSON"),
    ("[]", "must be an object"),
    ({"check": {"exact": "5"}}, "prompt: give one of prompt and messages"),
    (exact("x", "y", messages=[]), "prompt: give one of prompt and messages"),
    (exact(" ", "y"), "prompt: must be a text that is not empty"),
    (exact("\ud800", "y"), "prompt: is not Unicode text"),
    ({"messages": [], "check": {"exact": "5"}}, "messages: must be a list"),
    ({"messages": [{"role": "king", "content": "x"}], "check": {"exact": "5"}},
     "messages[0].role: must be one of system, user, assistant"),
    ({"messages": [{"role": "user"}], "check": {"exact": "5"}}, "messages[0].content: must be"),
    ({"messages": ["x"], "check": {"exact": "5"}}, "messages[0].must be an object"),
    ({"prompt": "x"}, "check: is missing"),
    ({"prompt": "x", "check": {}}, "check: give one of exact, regex and command"),
    ({"prompt": "x", "check": {"exact": "1", "regex": "1"}}, "check: give one of"),
    ({"prompt": "x", "check": {"exact": 5}}, "check.exact: must be a text"),
    ({"prompt": "x", "check": {"regex": "("}}, "check.regex: missing )"),
    ({"prompt": "x", "check": {"exact": "1", "cpu_s": 1}}, "check.cpu_s: is a limit of a command"),
    ({"prompt": "x", "check": {"command": "true"}}, "check.command: must be a list"),
    ({"prompt": "x", "check": {"command": ["true", 1]}}, "check.command[1]: must be a text"),
    ({"prompt": "x", "check": {"command": ["no-such-program"]}},
     "check.command[0]: there is no program no-such-program"),
    ({"prompt": "x", "check": {"command": ["true"], "cpu_s": True}}, "check.cpu_s: must be"),
    ({"prompt": "x", "check": {"command": ["true"], "memory_mib": 0}}, "check.memory_mib: must be"),
    ({"prompt": "x", "check": {"command": ["true"], "wall_s": 1e9}}, "check.wall_s: must be above"),
    (exact("x", "y", luck=1), "luck: unknown field; there are prompt,"),
    ({"prompt": "x", "check": {"exact": "1", "luck": 1}}, "check.luck: unknown field"),
    (exact("x", "y", **{"class": "Sums of"}), "class: must be"),
    (exact("x", "y", max_new_tokens=0), "max_new_tokens: must be a whole number"),
    (exact("x", "y", max_new_tokens=True), "max_new_tokens: must be a whole number"),
    (exact("x", "y", held_out=3), "held_out: must be"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_a_bad_line_is_refused_by_number_and_field(
    tmp_path: Path, line: object, message: str
) -> None:
    """Whatever stands around it: nothing of the file is run."""
    path = tasks_file(tmp_path, exact("2+3?", "5"), line, exact("2+4?", "6"))
    with pytest.raises(ConfigError) as raised:
        read_tasks(path)
    assert f"{path}:2: {message}" in raised.value.message


def test_a_file_without_tasks_is_refused(tmp_path: Path) -> None:
    """As is one that is not there."""
    with pytest.raises(ConfigError, match="there is no task in it"):
        read_tasks(tasks_file(tmp_path, "", ""))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_tasks(tmp_path / "absent")


def test_an_exact_answer_may_have_white_space_around_it() -> None:
    """None inside; a regular expression is searched for."""
    assert Exact("a b").passes(" a b\n")
    assert not Exact("a b").passes("a  b")


def python(code: str, **limits: float) -> Command:
    return Command((PYTHON, "-I", "-c", code), **limits)  # type: ignore[arg-type]


def test_a_command_reads_the_answer_and_judges_by_its_exit() -> None:
    """On stdin, as UTF-8."""
    check = python("import sys; sys.exit(sys.stdin.buffer.read().decode() != 'gr\\u00fcn')")
    assert check.passes("grün")
    assert not check.passes("blau")


def test_a_command_that_reads_nothing_may_be_right() -> None:
    """Also of an answer that is longer than a pipe holds."""
    assert python("pass").passes("x" * 1_000_000)


def test_a_command_runs_in_an_empty_folder_without_our_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its environment has no variable of ours, and the folder is gone afterwards."""
    monkeypatch.setenv("SAGE_FED_TOKEN", "secret")
    seen = tmp_path / "seen"
    code = f"""
import os, json
json.dump([os.getcwd(), os.listdir(), sorted(os.environ)], open({str(seen)!r}, 'w'))
"""
    assert python(code).passes("")
    folder, files, names = json.loads(seen.read_text())
    assert [] == files
    assert not Path(folder).exists()
    assert "SAGE_FED_TOKEN" not in names
    assert {"HOME", "PATH", "TMPDIR"} <= set(names)


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        ("while True: pass", {"cpu_s": 1, "wall_s": 60.0}),
        ("import time; time.sleep(600)", {"wall_s": 0.5}),
        ("x = bytearray(2**30)", {"memory_mib": 256}),
        ("open('big', 'wb').write(b'x' * 2**27)", {}),
        ("raise SystemExit(3)", {}),
    ],
    ids=["cpu", "wall", "memory", "file", "exit"],
)
def test_a_command_beyond_its_limits_finds_the_answer_wrong(
    code: str, limits: dict[str, float]
) -> None:
    """CPU, wall clock, memory, the size of a file; and any exit but 0."""
    began_s = time.monotonic()
    assert not python(code, **limits).passes("x")
    assert time.monotonic() - began_s < 60


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    """A child of its group does not outlive the check."""
    pid_file = tmp_path / "pid"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(pid_file)!r}, 'w').write(str(child.pid))
"""
    assert python(code).passes("")
    pid = int(pid_file.read_text())
    until(lambda: not _runs(pid), "the child has ended")


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


# Answers


def reply(text: str) -> Answer:
    tokens = tuple(
        Logprob(i, -0.1 * (i + 1), ((i, -0.1 * (i + 1)), (99, -3.0))) for i in range(len(text))
    )
    started = Started("job", Route(Tier.TACTICAL, "REQUESTED", None), 1, 1, 1, 1)
    finished = Finished(
        StopReason.END_OF_TEXT, Usage(1, 0, 1), Timing(0, 0, 0, 0, 0), Price(7, 9, "card"), 1
    )
    return Answer(started, text, (), tokens, finished)


class Echo:
    """Answers with the prompt, and counts what it was asked; `fails` raises first."""

    def __init__(self, fails: Sequence[Exception] = ()) -> None:
        self.asked: list[tuple[str, Tier | None]] = []
        self._fails = list(fails)
        self._lock = threading.Lock()

    def __call__(self, job: JobSpec) -> Answer:
        with self._lock:
            self.asked.append((job.prompt.messages[-1].content, job.requested))
            if self._fails:
                raise self._fails.pop(0)
        return reply(job.prompt.messages[-1].content)


def run(directory: Path, ask: Echo, num_tasks: int = 20, parallel: int = 4) -> tuple[Judged, ...]:
    lines = [exact(f"{i}", f"{i}" if i % 2 else "no") for i in range(num_tasks)]
    tasks = read_tasks(tasks_file(directory, *lines))
    with AnswerFile.of(directory, QualityFingerprint.of(MODELS)) as kept:
        return collect(
            tasks, TIER_ROLES, ask, kept, temperature=0.0, parallel=parallel,
            progress=lambda _share, _text: None,
        )  # fmt: skip


def test_every_tier_is_asked_every_task_once(tmp_path: Path) -> None:
    """In the order of the tasks, whatever order the answers came in."""
    ask = Echo()
    found = run(tmp_path, ask)
    assert [f"{i}" for i in range(20)] == [each.answers["tactical"].text for each in found]
    assert [i % 2 == 1 for i in range(20)] == [each.right["strategic"] for each in found]
    assert 40 == len(ask.asked) == len(set(ask.asked))
    assert 7 == found[0].answers["tactical"].charged_uatp


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What was answered is not asked, nor paid for, again; the result is the same."""
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "a", Echo())

    class Breaks(Echo):
        def __call__(self, job: JobSpec) -> Answer:
            if len(self.asked) >= 13:
                raise KeyboardInterrupt
            return super().__call__(job)

    first = Breaks()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", first, parallel=1)
    second = Echo()
    assert whole == run(tmp_path / "b", second)
    assert not set(first.asked) & set(second.asked)
    assert 40 == len({*first.asked, *second.asked})
    third = Echo()
    assert whole == run(tmp_path / "b", third)
    assert [] == third.asked


def test_a_line_that_was_cut_is_asked_again(tmp_path: Path) -> None:
    """What a crash left of it harms no other answer."""
    whole = run(tmp_path, Echo())
    (path,) = tmp_path.glob("answers-*.jsonl")
    assert 0 == path.stat().st_mode & 0o077, "answers are the user's own"
    path.write_bytes(path.read_bytes()[:-30])
    again = Echo()
    assert whole == run(tmp_path, again)
    assert 1 == len(again.asked)
    once_more = Echo()
    assert whole == run(tmp_path, once_more)
    assert [] == once_more.asked


def test_a_refusal_that_says_when_is_obeyed(tmp_path: Path) -> None:
    """A full queue is no end; another error is, and what was answered is kept."""
    ask = Echo([QueueFull("full", 0.01), QueueFull("full", 0.01)])
    assert 20 == len(run(tmp_path, ask))
    assert 42 == len(ask.asked)
    (tmp_path / "b").mkdir()
    with pytest.raises(Forbidden):
        run(tmp_path / "b", Echo([Forbidden("no")]))
    with pytest.raises(QueueFull):
        run(tmp_path / "b", Echo([QueueFull("full")]))


def test_a_task_is_the_same_job_every_time(tmp_path: Path) -> None:
    """With a seed of its own, so that an answer drawn at a temperature can be repeated."""
    first, second = read_tasks(tasks_file(tmp_path, exact("a", "b"), exact("c", "d")))
    job = job_of(first, Tier.TACTICAL, 0.7)
    assert job == job_of(first, Tier.TACTICAL, 0.7)
    assert job.sampling.seed != job_of(second, Tier.TACTICAL, 0.7).sampling.seed
    assert (0.7, 2) == (job.sampling.temperature, job.sampling.top_logprobs)
