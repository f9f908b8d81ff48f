"""Log lines: what never gets into one, and who may stall whom."""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from sage_fed.errors import ConfigError
from sage_fed.logs import MAX_PENDING, clean, logging_to, reads_journal, story_of

HOSTILE = (
    ("two\nlines", "two\\nlines"),
    ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
    ("\r\u2028\u202eright", "\\r\\u2028\\u202eright"),
    ("authorization: Bearer abc.DEF-123", "authorization: Bearer ***"),
    ("the token sagefed_Zm9v_b-ar9 leaked", "the token sagefed_*** leaked"),
    ("plain words, Grüße, 日本", "plain words, Grüße, 日本"),
)


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_a_line_is_one_line_without_secrets(text: str, expected: str) -> None:
    """What would start a line, repaint a terminal or let somebody in is written otherwise."""
    assert expected == clean(text)


class Captured(logging.Handler):
    """Lines as the handler's format makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(self.format(record))


@pytest.fixture
def own() -> logging.Logger:
    """A logger of ours."""
    return logging.getLogger("sage_fed.tests")


def test_json_lines_are_objects_with_the_job(
    own: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    """Time, level, logger, message, and what is known of the job, by name."""
    with logging_to("info", as_json=True):
        own.warning("%s ended\nbadly", "job-1", extra={"job_id": "job-1"})
        own.debug("not asked for")
    (line,) = capfd.readouterr().err.splitlines()
    said = json.loads(line)
    assert ("WARNING", "sage_fed.tests", "job-1 ended\\nbadly", "job-1") == (
        said["level"], said["logger"], said["message"], said["job_id"],
    )  # fmt: skip
    assert said["time"].endswith("+00:00")


def test_pretty_lines_are_cleaned_as_well(own: logging.Logger) -> None:
    """Whoever shows them."""
    shown = Captured()
    with logging_to("info", as_json=False, handler=shown):
        for text, _ in HOSTILE:
            own.info("%s", text)
    assert [expected for _, expected in HOSTILE] == shown.lines


def fail(words: str) -> Exception:
    """An error that quotes what it choked on, with a cause that does, too."""
    try:
        choke(words)
    except ValueError as error:
        return error
    raise AssertionError


def choke(words: str) -> None:
    try:
        {}[words]
    except KeyError as cause:
        raise ValueError(words) from cause


def test_an_exception_is_told_without_its_words(own: logging.Logger) -> None:
    """Frames and types of the whole chain; the words may quote a prompt, so debug has them only."""
    shown = Captured()
    with logging_to("info", as_json=False, handler=shown):
        own.error("it failed", exc_info=fail("my secret prompt"))
        logging.getLogger("asyncio").error(
            "never retrieved\nfuture: ValueError('my secret prompt')"
        )
    assert "my secret prompt" not in "\n".join(shown.lines)
    assert "in fail" in shown.lines[0]
    assert all(kind in shown.lines[0] for kind in ("ValueError", "KeyError"))
    assert "never retrieved" == shown.lines[1]
    with logging_to("debug", as_json=False, handler=shown):
        own.error("it failed", exc_info=fail("my secret prompt"))
    assert "my secret prompt" in shown.lines[-1]


def test_our_own_errors_and_the_systems_keep_their_words() -> None:
    """They are written for it: a setting's name, a file's."""
    assert "ConfigError: tls.key: unreadable" in story_of(ConfigError("tls.key: unreadable"))
    assert "No such file" in story_of(FileNotFoundError(2, "No such file"))


def test_a_stuck_reader_stalls_nobody_and_what_is_lost_is_counted(own: logging.Logger) -> None:
    """Callers never wait; when lines are taken again, the first says how many are missing."""
    taken, stuck = threading.Event(), threading.Event()

    class Stuck(Captured):
        def emit(self, record: logging.LogRecord) -> None:
            taken.set()
            stuck.wait(60)
            super().emit(record)

    shown = Stuck()
    with logging_to("info", as_json=False, handler=shown):
        own.info("first")
        assert taken.wait(20)
        for number in range(MAX_PENDING + 7):
            own.info("%d", number)
        stuck.set()
        pending = next(h for h in logging.getLogger().handlers if hasattr(h, "queue")).queue
        assert isinstance(pending, queue.Queue)
        while pending.qsize() > MAX_PENDING // 2:
            taken.wait(0.01)
        own.info("last")
    assert ["the log was read too slowly: 7 lines lost", "last"] == shown.lines[-2:]


def test_the_journal_is_known_by_what_systemd_says(tmp_path: Path) -> None:
    """JOURNAL_STREAM names the device and inode of the stream; another stream is not it."""
    with (tmp_path / "journal").open("w") as journal, (tmp_path / "pipe").open("w") as pipe:
        stat = os.fstat(journal.fileno())
        environ = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        assert reads_journal(environ, journal)
        assert not reads_journal(environ, pipe)
        assert not reads_journal({}, journal)
    assert not reads_journal(environ, io.StringIO())


def test_a_journal_gets_priorities(
    own: logging.Logger, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`journalctl -p warning` works, and `-o cat` is still one object a line."""
    stat = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    with os.fdopen(os.dup(2), "w") as journal:
        monkeypatch.setattr("sage_fed.logs.sys", SimpleNamespace(stderr=journal))
        with logging_to("info", as_json=True):
            own.error("no")
            own.info("yes")
    prefixes = [line.partition("{")[0] for line in capfd.readouterr().err.splitlines()]
    assert ["<3>", "<6>"] == prefixes
