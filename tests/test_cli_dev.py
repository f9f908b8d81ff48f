"""`sage-fed dev make-checkpoint`, end to end on a real shape with one layer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sage_fed.cli.app import build_app
from sage_fed.cli.drawing import watched_bar
from sage_fed.core import Message
from sage_fed.engine import SHAPES, EngineOptions, load_engine
from sage_fed.engine.random_checkpoint import Shape
from sage_fed.text import Tokenizer


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("dev", "make-checkpoint", *arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("dev") / "half-billion"
    return path, run(str(path), "--like", "qwen2.5-0.5b", "--layers", "1", "--json")


def test_a_program_gets_one_object(made: tuple[Path, Result]) -> None:
    """With --json there is one object on stdout, and nothing beside it."""
    path, result = made
    assert (0, "") == (result.exit_code, result.stderr)
    told = json.loads(result.stdout)
    assert (str(path), 1) == (told["directory"], told["layers"])
    assert told["num_bytes"] == 2 * told["parameters"]


def test_the_head_does_the_real_amount_of_work(made: tuple[Path, Result]) -> None:
    """The tokenizer has as many ids as the real one, so as many logits are computed."""
    tokenizer = Tokenizer.load(made[0])
    assert SHAPES["qwen2.5-0.5b"].tokenizer_ids == tokenizer.num_valid_ids
    options = EngineOptions(
        str(made[0]), 1 << 22, max_context_tokens=64, num_valid_ids=tokenizer.num_valid_ids,
        precision="bf16",
    )  # fmt: skip
    assert load_engine(options, lambda _: None).info.weight_bytes > 2 * 151_665 * 896


def test_every_id_is_text_and_prompts_use_none_of_the_invented_ones(
    made: tuple[Path, Result],
) -> None:
    """A random answer streams as words; a conversation is encoded as by the small tokenizer."""
    tokenizer = Tokenizer.load(made[0])
    assert " t151664 t500" == tokenizer.decode((151_664, 500))
    ids = tokenizer.encode_messages([Message("user", "what is t1234 and 2 + 2?")])
    assert max(ids) < 500


def test_the_help_names_every_shape() -> None:
    """What can be asked for is told."""
    text = run("--help").output
    assert all(name.removeprefix("qwen2.5") in text for name in SHAPES)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--like", "gpt-2"), "--like"),
        (("--like", "qwen2.5-7b", "--dtype", "int4"), "--dtype"),
        (("--like", "qwen2.5-0.5b", "--layers", "25"), "the 24 of qwen2.5-0.5b"),
    ],
)
def test_what_there_is_not_is_a_usage_error(
    tmp_path: Path, arguments: tuple[str, ...], culprit: str
) -> None:
    """The option is named, with what it could be."""
    result = run(str(tmp_path / "m"), *arguments)
    assert 2 == result.exit_code
    assert culprit in result.stderr


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    """Exit code 1 and one line, nothing before it: what is there, and what to do about it."""
    result = run(str(tmp_path), "--like", "qwen2.5-0.5b")
    assert 1 == result.exit_code
    (line,) = result.stderr.splitlines()
    assert tmp_path.name in line
    assert "remove it or name another" in line


def test_a_log_gets_the_size_and_no_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a terminal stderr is one line, size and free room, before anything is written."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(64, 1, 2, 1, 128, 512, tied=True, tokenizer_ids=512))
    result = run(str(tmp_path / "m"), "--like", "tiny")
    assert 0 == result.exit_code, result.output
    (line,) = result.stderr.splitlines()
    assert "are free" in line


class Terminal(io.StringIO):
    """A stream that says it is watched."""

    def isatty(self) -> bool:
        """It does."""
        return True


@pytest.mark.parametrize(
    ("stream", "as_json", "shown"),
    [(Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)],
)
def test_progress_is_for_whoever_watches(
    stream: io.StringIO, as_json: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar on a terminal; nothing beside an object, nothing in a log."""
    monkeypatch.setattr("sys.stderr", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with watched_bar(as_json=as_json) as show:
        show(0.25, "a quarter")
    assert shown == bool(stream.getvalue())
    assert shown == ("25 %" in stream.getvalue())
