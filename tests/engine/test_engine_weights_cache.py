"""Quantised weights kept for the next start: equal, checked, bounded, never half."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import logits
from tiny_models import Checkpoint, prompt_of

from sage_fed.engine import EngineOptions, load_engine
from sage_fed.errors import ModelLoadError

Checkpoints = Callable[[str], Checkpoint]
PROMPT = prompt_of(30)


@pytest.fixture
def model(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2-untied").path, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def answer(model: Path, cache: Path | str, **options: object) -> torch.Tensor:
    """Logits of one prompt after a start with the cache."""
    return logits(load(model, cache, **options), PROMPT)


def load(model: Path, cache: Path | str, **options: object):
    chosen = {"precision": "int4", "kernels": "torch"} | options
    return load_engine(
        EngineOptions(str(model), 1 << 22, weights_cache=str(cache), **chosen), lambda _: None
    )


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def garble(path: Path) -> None:
    """Take every weight out of a checkpoint's file, which still looks the same from outside."""
    status = path.stat()
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(bytes(status.st_size - start))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen3-biased"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_next_start_reads_what_the_first_has_kept(
    checkpoint: Checkpoints, tmp_path: Path, precision: str, name: str, kernels: str
) -> None:
    """The same logits to the last bit, also where the checkpoint has lost its weights since."""
    model = Path(shutil.copytree(checkpoint(name).path, tmp_path / "model"))
    options = {"precision": precision, "kernels": kernels}
    without = answer(model, "off", **options)
    first = answer(model, tmp_path / "cache", **options)
    assert torch.equal(without, first)
    assert 1 == len(entries(tmp_path / "cache"))
    garble(model / "model.safetensors")
    assert torch.equal(without, answer(model, tmp_path / "cache", **options))


def test_dense_weights_are_not_kept(model: Path, cache: Path) -> None:
    """The checkpoint has them already."""
    answer(model, cache, precision="bf16")
    assert not cache.exists()


def test_a_changed_checkpoint_is_read_again(model: Path, cache: Path) -> None:
    """A file that was written anew is another one, and its old entry goes."""
    answer(model, cache)
    old = entries(cache)
    garble(model / "model.safetensors")
    os.utime(model / "model.safetensors")
    assert answer(model, cache).abs().max() < 1e-5
    assert 1 == len(entries(cache))
    assert old != entries(cache)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other key", "open to others"])
def test_a_damaged_entry_is_made_again(
    model: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, and the same answer as ever."""
    expected = answer(model, cache)
    (path,) = entries(cache)
    raw = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(raw[:-50])
        case "bit":
            path.write_bytes(raw[:-50] + bytes([raw[-50] ^ 4]) + raw[-49:])
        case "empty":
            path.write_bytes(b"")
        case "other key":
            path.write_bytes(raw.replace(b"rows-int4", b"rows-int5", 1))
        case "open to others":
            cache.chmod(0o777)
    assert torch.equal(expected, answer(model, cache))
    assert "made again" in caplog.text
    if damage == "open to others":
        assert "0700" in caplog.text
        return
    caplog.clear()
    assert torch.equal(expected, answer(model, cache))
    assert "made again" not in caplog.text


def test_precisions_and_tokenizers_have_entries_of_their_own(model: Path, cache: Path) -> None:
    """What is stored differently is another entry; the same is not."""
    for options in ({}, {"precision": "int8"}, {"num_valid_ids": 128}, {}):
        answer(model, cache, **options)
    assert 3 == len(entries(cache))


def test_the_least_recently_used_are_removed(
    checkpoint: Checkpoints, tmp_path: Path, cache: Path
) -> None:
    """All entries together stay within the bound, and what was used last stays."""
    source = checkpoint("llama").path
    models = [Path(shutil.copytree(source, tmp_path / name)) for name in "abc"]
    answer(models[0], cache)
    (first,) = entries(cache)
    room = 2 * first.stat().st_size + 1000
    answer(models[1], cache, weights_cache_bytes=room)
    (second,) = set(entries(cache)) - {first}
    os.utime(first, ns=(0, 2**60))
    os.utime(second, ns=(0, 2**59))
    answer(models[0], cache, weights_cache_bytes=room)  # reading is a use
    os.utime(second, ns=(0, 2**59))
    answer(models[2], cache, weights_cache_bytes=room)
    assert 2 == len(entries(cache))
    assert first in entries(cache)
    assert second not in entries(cache)


def test_what_does_not_fit_is_not_kept(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is served all the same, and the warning has the numbers."""
    answer(model, cache, weights_cache_bytes=1000)
    assert [] == entries(cache)
    assert "1,000 may be used" in caplog.text


def test_progress_rises_through_reading_and_keeping(model: Path, cache: Path) -> None:
    """And through a start that finds a damaged entry half way."""
    for damaged in (False, False, True):
        if damaged:
            (path,) = entries(cache)
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        shares: list[float] = []
        options = EngineOptions(
            str(model), 1 << 22, precision="int8", kernels="torch", weights_cache=str(cache)
        )
        load_engine(options, shares.append)
        assert sorted(shares) == shares
        assert 1.0 == shares[-1]


def test_a_start_that_is_given_up_keeps_nothing(model: Path, cache: Path) -> None:
    """An exception from the progress callback leaves no file behind."""

    def give_up(share: float) -> None:
        if share > 0.75:
            raise RuntimeError("nobody waits")

    options = EngineOptions(
        str(model), 1 << 22, precision="int8", kernels="torch", weights_cache=str(cache)
    )
    with pytest.raises(RuntimeError, match="nobody"):
        load_engine(options, give_up)
    assert [] == entries(cache)


KILLED = """
import os, signal, sys
from sage_fed.engine import EngineOptions, load_engine

def die(share):
    if share > 0.75:
        os.kill(os.getpid(), signal.SIGKILL)

options = EngineOptions(sys.argv[1], 1 << 22, precision="int4", kernels="torch",
                        weights_cache=sys.argv[2])
load_engine(options, die)
"""


def test_a_process_killed_while_it_writes_leaves_no_entry(model: Path, cache: Path) -> None:
    """What it left is not taken for weights, and the next start removes it."""
    done = subprocess.run([sys.executable, "-c", KILLED, model, cache], check=False, timeout=100)
    assert -signal.SIGKILL == done.returncode
    assert [".partial"] == [path.suffix for path in entries(cache)]
    assert torch.equal(answer(model, "off"), answer(model, cache))
    assert [".safetensors"] == [path.suffix for path in entries(cache)]


def test_the_users_own_place_is_private(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is $XDG_CACHE_HOME/sage-fed/weights, or systemd's directory, closed to others."""
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    answer(model, "auto")
    place = tmp_path / "home" / "sage-fed" / "weights"
    assert 1 == len(entries(place))
    assert 0o700 == place.stat().st_mode & 0o777
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'systemd'}:{tmp_path / 'other'}")
    answer(model, "auto")
    assert 1 == len(entries(tmp_path / "systemd" / "weights"))


def test_a_checkpoint_that_is_gone_is_said_as_ever(model: Path, cache: Path) -> None:
    """Kept weights are no model of their own."""
    answer(model, cache)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors"):
        load(model, cache)
