"""`sage-fed dev make-checkpoint`, end to end on a real shape with one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sage_fed.cli.app import build_app
from sage_fed.core import Message
from sage_fed.engine import SHAPES, EngineOptions, load_engine
from sage_fed.text import Tokenizer


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("dev", "make-checkpoint", *arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("dev") / "half-billion"
    return path, run(str(path), "--like", "qwen2.5-0.5b", "--layers", "1", "--json")


def test_it_says_what_it_takes_before_it_writes(made: tuple[Path, Result]) -> None:
    """Size and free room come first, then progress, and with --json one object on stdout."""
    path, result = made
    assert 0 == result.exit_code
    first, *rest = result.stderr.splitlines()
    assert "are free" in first
    assert "100 %" in rest[-1]
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
    """Exit code 1 and one line that names it."""
    result = run(str(tmp_path), "--like", "qwen2.5-0.5b")
    assert 1 == result.exit_code
    assert tmp_path.name in result.stderr
