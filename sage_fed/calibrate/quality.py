"""A user's own tasks, asked of both tiers and checked: what a quality card is fitted to.

Owns the file of tasks (one JSON object a line, refused by line and field before anything runs),
how an answer is checked, and the file in which answers are kept, so that an interrupted run goes
on where it stopped. Tasks are asked through whatever `ask` is given: ordinary jobs, priced and
budgeted as any. A check by a command runs it with limits, not in a sandbox: it sees what this
process's user sees.
Knows neither the client nor the fit (`quality_fit`). Fails with `ConfigError` naming the line, and
as `ask` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from sage_fed.cards.quality_card import (
    ANY_CLASS,
    TOP_LOGPROBS,
    AnswerFeatures,
    QualityFingerprint,
    is_task_class,
)
from sage_fed.core import Answer, JobSpec, Message, Mode, Prompt, SamplingRequest, Tier
from sage_fed.errors import CannotWrite, ConfigError, Retryable

MAX_TASKS = 100_000
MAX_LINE_BYTES = 2**20
MAX_NEW_TOKENS = 1_000_000

MAX_COMMAND_S = 600.0
MAX_COMMAND_MIB = 65_536

PATIENCE_S = 600.0
"""How long a task waits for a daemon that says when to come again, refill by refill."""

_ROLES = ("system", "user", "assistant")


# Checks


@dataclass(frozen=True, slots=True)
class Exact:
    """The answer is this text, white space around both aside."""

    text: str

    def passes(self, answer: str) -> bool:
        """Return whether the answer is right."""
        return answer.strip() == self.text.strip()


@dataclass(frozen=True, slots=True)
class Matches:
    """The pattern is found in the answer; anchors are the pattern's own."""

    pattern: re.Pattern[str]

    def passes(self, answer: str) -> bool:
        """Return whether the answer is right."""
        return self.pattern.search(answer) is not None


# Limits are set by a process of its own, which then becomes the command: this one has threads,
# between whose locks no code may run after a fork.
_LIMITER = """
import os, resource, sys
cpu_s, memory, *command = sys.argv[1:]
cpu_s, memory = int(cpu_s), int(memory)
resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
os.execvp(command[0], command)
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A program that reads the answer on stdin and exits with 0 where it is right.

    It runs without a shell, in an empty folder, with `cpu_s` of CPU time, `memory_mib` of address
    space and `wall_s` in all; one that takes more has found the answer wrong. Its output is not
    kept, and processes that it leaves in its group are killed.
    """

    arguments: tuple[str, ...]
    cpu_s: int = 10
    memory_mib: int = 1024
    wall_s: float = 20.0

    def passes(self, answer: str) -> bool:
        """Return whether the answer is right; blocks for at most `wall_s`."""
        limits = (str(self.cpu_s), str(self.memory_mib * 2**20))
        with tempfile.TemporaryDirectory(prefix="sage-fed-check-") as folder:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                [sys.executable, "-I", "-c", _LIMITER, *limits, *self.arguments],
                cwd=folder,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.communicate(answer.encode(), timeout=self.wall_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                # The whole group, and also after its leader has ended.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode == 0


Check = Exact | Matches | Command


# Tasks


@dataclass(frozen=True, slots=True)
class QualityTask:
    """One question and how its answer is checked.

    `held_out` names the family of a task that nothing is fitted to; "" for one that counts.
    """

    messages: tuple[Message, ...]
    check: Check
    task_class: str = ANY_CLASS
    max_new_tokens: int | None = None
    held_out: str = ""

    @property
    def key(self) -> str:
        """16 hexadecimal digits of what is asked, by which its answers are kept."""
        asked = [[asdict(message) for message in self.messages], self.max_new_tokens]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def read_tasks(path: Path) -> tuple[QualityTask, ...]:
    """Read a file of tasks, whole; blocks.

    Raises:
        ConfigError: it cannot be read, or a line is no task; names the line and the field.
    """
    tasks: list[QualityTask] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if len(tasks) == MAX_TASKS:
                    raise ConfigError(f"{path}:{number}: more than {MAX_TASKS} tasks")
                try:
                    tasks.append(_task(line))
                except _BadTask as bad:
                    raise ConfigError(f"{path}:{number}: {bad}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not tasks:
        raise ConfigError(f"{path}: there is no task in it")
    return tuple(tasks)


def tasks_sha256(path: Path) -> str:
    """Return the digest of a file of tasks, as a card names it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _BadTask(Exception):
    """What is wrong with a line, after the field's name."""


def _task(line: bytes) -> QualityTask:
    if len(line) > MAX_LINE_BYTES:
        raise _BadTask(f"more than {MAX_LINE_BYTES} bytes")
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadTask(f"not JSON: {error}") from None
    known = ("prompt", "messages", "check", "class", "max_new_tokens", "held_out")
    _require_table(table, "", known)
    task_class = table.get("class", ANY_CLASS)
    if not isinstance(task_class, str) or not is_task_class(task_class):
        raise _BadTask("class: must be 1 to 64 of a-z 0-9 . _ -")
    most = table.get("max_new_tokens")
    if most is not None and (type(most) is not int or not 1 <= most <= MAX_NEW_TOKENS):
        raise _BadTask(f"max_new_tokens: must be a whole number from 1 to {MAX_NEW_TOKENS}")
    held_out = table.get("held_out", "")
    if not isinstance(held_out, str) or (held_out and not is_task_class(held_out)):
        raise _BadTask("held_out: must be a family's name, of a-z 0-9 . _ -")
    return QualityTask(_messages(table), _check(table.get("check")), task_class, most, held_out)


def _require_table(table: object, where: str, known: Sequence[str]) -> None:
    if not isinstance(table, dict):
        raise _BadTask(f"{where}must be an object")
    for key in table:
        if key not in known:
            raise _BadTask(f"{where}{key}: unknown field; there are {', '.join(known)}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _BadTask(f"{where}: must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadTask(f"{where}: is not Unicode text") from None
    return value


def _messages(table: Mapping[str, Any]) -> tuple[Message, ...]:
    if ("prompt" in table) == ("messages" in table):
        raise _BadTask("prompt: give one of prompt and messages")
    if "prompt" in table:
        return (Message("user", _text(table["prompt"], "prompt")),)
    turns = table["messages"]
    if not isinstance(turns, list) or not turns:
        raise _BadTask("messages: must be a list that is not empty")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        where = f"messages[{index}]."
        _require_table(turn, where, ("role", "content"))
        if turn.get("role") not in _ROLES:
            raise _BadTask(f"{where}role: must be one of {', '.join(_ROLES)}")
        messages.append(Message(turn["role"], _text(turn.get("content"), f"{where}content")))
    return tuple(messages)


def _check(table: object) -> Check:
    if table is None:
        raise _BadTask("check: is missing")
    _require_table(table, "check.", ("exact", "regex", "command", "cpu_s", "memory_mib", "wall_s"))
    assert isinstance(table, dict)
    kinds = [key for key in ("exact", "regex", "command") if key in table]
    if len(kinds) != 1:
        raise _BadTask("check: give one of exact, regex and command")
    limits = [key for key in ("cpu_s", "memory_mib", "wall_s") if key in table]
    if limits and "command" not in table:
        raise _BadTask(f"check.{limits[0]}: is a limit of a command")
    if "exact" in table:
        return Exact(_text(table["exact"], "check.exact"))
    if "regex" in table:
        try:
            return Matches(re.compile(_text(table["regex"], "check.regex")))
        except re.error as error:
            raise _BadTask(f"check.regex: {error}") from None
    return _command(table)


def _command(table: Mapping[str, Any]) -> Command:
    arguments = table["command"]
    if not isinstance(arguments, list) or not arguments:
        raise _BadTask("check.command: must be a list, the program and its arguments")
    for index, argument in enumerate(arguments):
        if not isinstance(argument, str) or "\0" in argument:
            raise _BadTask(f"check.command[{index}]: must be a text")
    if shutil.which(arguments[0]) is None:
        raise _BadTask(f"check.command[0]: there is no program {arguments[0]}")
    cpu_s, memory_mib = table.get("cpu_s", 10), table.get("memory_mib", 1024)
    wall_s = table.get("wall_s", 20.0)
    for key, value, most in (("cpu_s", cpu_s, MAX_COMMAND_S), ("memory_mib", memory_mib,
                             MAX_COMMAND_MIB)):  # fmt: skip
        if type(value) is not int or not 1 <= value <= most:
            raise _BadTask(f"check.{key}: must be a whole number from 1 to {most:.0f}")
    if type(wall_s) not in (int, float) or not 0 < wall_s <= MAX_COMMAND_S:
        raise _BadTask(f"check.wall_s: must be above 0 and at most {MAX_COMMAND_S:.0f}")
    return Command(tuple(arguments), cpu_s, memory_mib, float(wall_s))


# Answers


@dataclass(frozen=True, slots=True)
class TierAnswer:
    """What one tier answered to a task, how sure it looked, and what it cost."""

    text: str
    features: AnswerFeatures
    charged_uatp: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A task with every tier's answer, and whether each is right; the tiers by name."""

    task: QualityTask
    answers: Mapping[str, TierAnswer]
    right: Mapping[str, bool]


class AnswerFile:
    """The answers that a run has, one JSON object a line, in a file of its own fingerprint.

    What an interrupted run was writing is left out when the file is read, and asked again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[tuple[str, str], TierAnswer] = {}
        self._lock = threading.Lock()
        self._file: TextIO | None = None

    @classmethod
    def of(cls, directory: Path, fingerprint: QualityFingerprint) -> AnswerFile:
        """Return the file of these models, asked so."""
        return cls(directory / f"answers-{fingerprint.digest}.jsonl")

    @property
    def path(self) -> Path:
        """Where it is."""
        return self._path

    def __enter__(self) -> Self:
        try:
            self._read()
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            # Private: answers are the user's own.
            self._file = os.fdopen(os.open(self._path, flags, 0o600), "a", encoding="utf-8")
            if self._file.tell() and not self._ends_in_newline():
                self._file.write("\n")
        except OSError as error:
            raise CannotWrite(f"{self._path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def get(self, task: QualityTask, tier: str) -> TierAnswer | None:
        """Return a tier's answer to a task; None where it has to be asked."""
        return self._answers.get((task.key, tier))

    def put(self, task: QualityTask, tier: str, answer: TierAnswer) -> None:
        """Keep an answer; from any thread."""
        assert self._file is not None
        line = json.dumps({"task": task.key, "tier": tier, **asdict(answer)})
        with self._lock:
            self._answers[task.key, tier] = answer
            try:
                self._file.write(f"{line}\n")
                self._file.flush()
            except OSError as error:
                raise CannotWrite(f"{self._path} cannot be written: {error.strerror}") from error

    def _ends_in_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    features = AnswerFeatures(**entry["features"])
                    answer = TierAnswer(
                        str(entry["text"]),
                        features,
                        int(entry["charged_uatp"]),
                        int(entry["prompt_tokens"]),
                    )
                    self._answers[entry["task"], entry["tier"]] = answer


Ask = Callable[[JobSpec], Answer]
"""Runs one job and returns its whole answer; from any thread."""

Progress = Callable[[float, str], None]
"""Is told how far a run is, from 0 to 1, and what it does."""


def job_of(task: QualityTask, tier: Tier, temperature: float) -> JobSpec:
    """Return the ordinary job that asks a tier a task, the same for the same task."""
    return JobSpec(
        account="",
        prompt=Prompt(messages=task.messages),
        requested=tier,
        # Alone: what a tier costs with the other's drafts is the cascade's own to find out.
        mode=Mode.SINGLE,
        sampling=SamplingRequest(
            temperature=temperature,
            seed=int(task.key, 16) % 2**63,
            max_new_tokens=task.max_new_tokens,
            top_logprobs=TOP_LOGPROBS,
        ),
    )


def collect(
    tasks: Sequence[QualityTask],
    tiers: Sequence[Tier],
    ask: Ask,
    kept: AnswerFile,
    *,
    temperature: float,
    parallel: int,
    progress: Progress,
) -> tuple[Judged, ...]:
    """Ask every tier every task, and check the answers; in the order of the tasks.

    `parallel` jobs run at once. A refusal that says when to come again is obeyed, for
    `PATIENCE_S` a task; any other error ends the run, and what was answered is kept. So does
    leaving by an exception, such as an interrupt.

    Raises:
        CannotWrite: the file of answers.
        SageFedError: as `ask` does.
    """
    stop = threading.Event()
    began_s = time.monotonic()

    def judge(task: QualityTask) -> Judged:
        answers: dict[str, TierAnswer] = {}
        right: dict[str, bool] = {}
        for tier in tiers:
            answer = kept.get(task, tier.name)
            if answer is None:
                answer = _answer(ask, job_of(task, tier, temperature), stop)
                kept.put(task, tier.name, answer)
            answers[tier.name] = answer
            right[tier.name] = task.check.passes(answer.text)
        return Judged(task, answers, right)

    with ThreadPoolExecutor(parallel, "quality") as pool:
        try:
            done: dict[int, Judged] = {}
            for index, judged in _each(pool, judge, tasks, 2 * parallel):
                done[index] = judged
                rate = len(done) / max(time.monotonic() - began_s, 1e-9)
                wrong = sum(not each.right[tiers[0].name] for each in done.values())
                progress(
                    len(done) / len(tasks),
                    f"{len(done)} of {len(tasks)} tasks · {rate:.1f} a second · "
                    f"{tiers[0].name} {wrong / len(done):.0%} wrong",
                )
        except BaseException:
            stop.set()
            raise
    return tuple(done[index] for index in range(len(tasks)))


def _each(
    pool: ThreadPoolExecutor,
    judge: Callable[[QualityTask], Judged],
    tasks: Sequence[QualityTask],
    ahead: int,
) -> Iterator[tuple[int, Judged]]:
    """Yield what is judged as it comes, with no more than `ahead` begun: an error ends it soon."""
    running: dict[Future[Judged], int] = {}
    rest = iter(enumerate(tasks))
    more = True
    while more or running:
        while more and len(running) < ahead:
            following = next(rest, None)
            more = following is not None
            if following is not None:
                running[pool.submit(judge, following[1])] = following[0]
        try:
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for each in finished:
                yield running.pop(each), each.result()
        except BaseException:
            for each in running:
                each.cancel()
            raise


def _answer(ask: Ask, job: JobSpec, stop: threading.Event) -> TierAnswer:
    """Ask once, or as often as the daemon says to come again."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = ask(job)
            break
        except Retryable as refusal:
            wait_s = refusal.retry_after_s
            if wait_s is None or time.monotonic() + wait_s > give_up_s:
                raise
            if stop.wait(max(wait_s, 0.05)):
                raise
    finished = answer.finished
    return TierAnswer(
        answer.text,
        AnswerFeatures.of(answer.logprobs),
        finished.price.charged_uatp,
        finished.usage.prompt_tokens,
    )
