"""Reading weights: broken files, files that change, bounded memory, progress by bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sage_fed.engine import EngineOptions, load_engine, plan_checkpoint, write_checkpoint
from sage_fed.engine.random_checkpoint import Shape
from sage_fed.engine.tensor_file import TensorFile, header_bytes, pieces_of, read_pieces
from sage_fed.engine.weights import Place
from sage_fed.errors import ModelLoadError

CPU = torch.device("cpu")
MIB = 2**20


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[object], begin: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "culprit"),
    [
        (b"{", b"", "not JSON"),
        (b"[]", b"", "no object"),
        ({"a": 5}, b"", "where a is"),
        ({"a": entry([2], 0, 8)}, b"1234", "4 of its 77 bytes are missing"),
        ({"a": entry([2], 0, 8)}, b"123456789", "tells of"),
        ({"a": entry([3], 0, 8)}, b"12345678", "as many bytes"),
        ({"a": entry([2], 4, 12)}, b"123456789012", "follow"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", "follow"),
        ({"a": entry([2], 8, 0)}, b"12345678", "impossible"),
        ({"a": entry([-2], 0, 8)}, b"12345678", "impossible"),
        ({"a": entry([True], 0, 4)}, b"1234", "impossible"),
        ({"a": entry(["2"], 0, 8)}, b"12345678", "impossible"),
        (b'{"a":1,"a":2}', b"", "a twice"),
        ({"__metadata__": 5}, b"", "metadata"),
    ],
)
def test_a_broken_header_is_refused(
    tmp_path: Path, header: object, data: bytes, culprit: str
) -> None:
    """Whatever a stranger's file says of itself, no byte is read from where it should not be."""
    path = write_raw(tmp_path / "odd.safetensors", header, data)
    with pytest.raises(ModelLoadError, match=rf"odd\.safetensors.*({culprit})"):
        TensorFile(path)


@pytest.mark.parametrize("length", [10**18, 101])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    """A length from nowhere allocates nothing."""
    with pytest.raises(ModelLoadError, match="does not fit"):
        TensorFile(write_raw(tmp_path / "m.safetensors", b"{}" * 10, length=length))
    (tmp_path / "empty.safetensors").write_bytes(b"123")
    with pytest.raises(ModelLoadError, match="too short"):
        TensorFile(tmp_path / "empty.safetensors")


def test_our_header_is_what_safetensors_reads(tmp_path: Path) -> None:
    """And the other way round: its files open here, with the same tensors in the same places."""
    tensors = {
        "w": torch.randn(3, 5).bfloat16(),
        "q": torch.arange(7, dtype=torch.int8),
        "s": torch.randn(4),
    }
    path = tmp_path / "ours.safetensors"
    raw = b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(header_bytes(tensors, {"made": "here"}) + raw)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensors[name], tensor)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"made": "there"})
    with TensorFile(path) as ours, TensorFile(tmp_path / "theirs.safetensors") as theirs:
        assert ({"made": "here"}, {"made": "there"}) == (ours.metadata, theirs.metadata)
        assert ours.tensors.keys() == theirs.tensors.keys()


def place_in(target: torch.Tensor, num_rows: int, *, directly: bool) -> Place:
    def take(first: int, rows: torch.Tensor) -> None:
        target[first : first + rows.shape[0]].copy_(rows)

    def memory(first: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        return target[first : first + count] if directly and dtype == target.dtype else None

    return Place(tuple(target.shape), num_rows, take, memory)


@pytest.mark.parametrize("directly", [True, False])
def test_large_tensors_come_in_pieces(tmp_path: Path, directly: bool) -> None:
    """All wanted rows arrive, no other is read, and progress moves within a tensor."""
    w = torch.randn(4100, 2053).bfloat16()
    save_file({"w": w, "small": torch.ones(3)}, tmp_path / "m.safetensors")
    target, small = torch.zeros_like(w), torch.zeros(3)
    told: list[tuple[int, int]] = []
    with TensorFile(tmp_path / "m.safetensors") as file:
        pieces = pieces_of(file, file.tensors["w"], place_in(target, 4000, directly=directly))
        pieces += pieces_of(file, file.tensors["small"], place_in(small, 3, directly=directly))
        read_pieces(pieces, CPU, lambda done, total: told.append((done, total)))
    assert torch.equal(w[:4000], target[:4000])
    assert not target[4000:].any()
    assert torch.equal(torch.ones(3), small)
    total = 4000 * 2053 * 2 + 12
    assert (total, total) == told[-1]
    assert len(told) > 2
    assert sorted(told) == told


def test_a_place_that_fails_stops_the_reading(tmp_path: Path) -> None:
    """The error comes out as it is, and nothing is read into freed memory afterwards."""
    w = torch.randn(5000, 2000)
    save_file({"w": w}, tmp_path / "m.safetensors")
    target = torch.zeros_like(w)

    def full(first: int, rows: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(f"{first} {rows.shape}")

    place = Place((5000, 2000), 5000, full, lambda *_: None)
    with TensorFile(tmp_path / "m.safetensors") as file:
        with pytest.raises(torch.OutOfMemoryError):
            read_pieces(pieces_of(file, file.tensors["w"], place), CPU, lambda *_: None)
        before = target.clone()
        read_pieces(
            pieces_of(file, file.tensors["w"], place_in(target, 5000, directly=True)),
            CPU,
            lambda *_: None,
        )
    assert not before.any()
    assert torch.equal(w, target)


def change_while_reading(path: Path, change: Callable[[Path], object]) -> str:
    """Load, and change the weights' file at the first report of progress after they are open."""
    changed = False

    def progress(share: float) -> None:
        nonlocal changed
        if share > 0 and not changed:
            changed = True
            change(path / "model.safetensors")

    with pytest.raises(ModelLoadError) as caught:
        load_engine(EngineOptions(str(path), 1 << 22, max_context_tokens=32), progress)
    return caught.value.message


TWO_LAYERS = Shape(256, 12, 4, 2, 4096, 4096, tied=False, max_position=128)


@pytest.fixture(scope="module")
def some_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "m"
    plan = plan_checkpoint(TWO_LAYERS)
    write_checkpoint(plan, path, seed=0, progress=lambda _: None, complete=lambda _: None)
    return path


@pytest.mark.parametrize("how", ["cut", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_named(some_megabytes: Path, how: str) -> None:
    """A download that is still running, or a second one over it, never becomes a model."""
    file = some_megabytes / "model.safetensors"
    whole = file.read_bytes()
    change = {
        "cut": lambda path: path.write_bytes(whole[: len(whole) // 2]),
        "rewritten": lambda path: path.write_bytes(whole + b"x"),
    }[how]
    try:
        text = change_while_reading(some_megabytes, change)
    finally:
        file.write_bytes(whole)
    assert "model.safetensors was" in text


MEASURE = """
import resource, sys
import torch
torch.set_num_threads(1)
from sage_fed.engine import EngineOptions, load_engine

def kib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

options = EngineOptions(sys.argv[1], 1 << 22, precision=sys.argv[2], max_context_tokens=64,
                        kernels=sys.argv[3])
load_engine(options, lambda _: None).close()  # what importing and the first use take
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kib("VmRSS")
engine = load_engine(options, lambda _: None)
print(1024 * (kib("VmHWM") - before), engine.info.weight_bytes + engine.info.kv_cache_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory there was")
@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8", "int4"])
def test_the_host_never_holds_much_more_than_the_model(tmp_path: Path, precision: str) -> None:
    """At the peak at most a few pieces above the final size, far below one shard of 80 MB."""
    shape = Shape(1024, 4, 8, 4, 8192, 32000, tied=False, max_position=128)
    plan = plan_checkpoint(shape, max_shard_bytes=80_000_000)
    assert len(plan.shards) > 4
    path = tmp_path / "m"
    write_checkpoint(plan, path, seed=0, progress=lambda _: None, complete=lambda _: None)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), precision, "torch"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    peak, final = map(int, done.stdout.split())
    assert final > plan.parameters * {"bf16": 2, "fp32": 4, "int8": 1, "int4": 0.6}[precision]
    assert peak - final < 72 * MIB
