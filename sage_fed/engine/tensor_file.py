"""Safetensors files: which tensor lies where, and reading them into their places.

Owns the header, which is checked as strictly as the format demands: a file comes from strangers.
Reads by position into memory that the caller owns, so that no page of the file is ever mapped: a
mapped file counts as memory of the process, and one that is cut while it is read kills it. Threads
read ahead. What a place keeps as the file has it goes straight there; all else goes through a few
reused buffers (pinned for CUDA, where copies run behind the host). Large tensors come in pieces, so
memory stays bounded and progress moves.
Knows neither names nor formats. Fails with `ModelLoadError` that names the file, or with what a
place raises.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from sage_fed.engine.machine import allocate
from sage_fed.engine.weights import Place
from sage_fed.errors import ModelLoadError
from sage_fed.model_files import HEAD_BYTES, misnomer

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; `offset` counts from the file's beginning.

    `type_name` is the header's; a type that is not in `DTYPES` has no known width.
    """

    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """An open file; `tensors` in the order in which they lie in it."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelLoadError(f"{self.name} cannot be opened: {error.strerror}") from error
        try:
            self._identity = self._identify()
            if sys.platform == "linux":
                # Or two threads that take turns look like random access.
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self.metadata, self.tensors = self._header()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from `offset` on; may be called from several threads."""
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._fd, [memory[done:]], offset + done)
            except OSError as error:
                raise ModelLoadError(f"{self.name} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelLoadError(f"{self.name} was cut short while it was read")
            done += count

    def check_unchanged(self) -> None:
        """Raise if the file was written since it was opened."""
        if self._identify() != self._identity:
            raise ModelLoadError(f"{self.name} was changed while it was read")

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _header(self) -> tuple[dict[str, str], dict[str, Stored]]:
        size = self._identity[0]
        if (odd := misnomer(self._read(min(size, HEAD_BYTES), 0), is_text=False)) is not None:
            raise ModelLoadError(f"{self.name} {odd}")
        if size < 8:
            raise self._broken("it is too short for a header")
        length = int.from_bytes(self._read(8, 0), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise self._broken(f"a header of {length} bytes does not fit into it")
        try:
            raw = json.loads(self._read(length, 8), object_pairs_hook=_unique)
        except ValueError as error:
            raise self._broken(f"its header is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise self._broken("its header is no object")
        metadata = raw.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._broken("its metadata is no object")
        tensors = {name: self._stored(name, entry, 8 + length) for name, entry in raw.items()}
        ordered = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
        end = 8 + length
        for name, stored in ordered.items():
            if stored.offset != end:
                raise self._broken(f"{name} does not follow on what lies before it")
            end += stored.nbytes
        if end > size:
            raise self._broken(
                f"{end - size:,} of its {end:,} bytes are missing; its download or copy was "
                "interrupted, fetch it again"
            )
        if end != size:
            raise self._broken(f"it has {size:,} bytes, and its header tells of {end:,}")
        return {str(key): str(value) for key, value in metadata.items()}, ordered

    def _read(self, count: int, offset: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _stored(self, name: str, entry: Any, base: int) -> Stored:  # noqa: ANN401 - JSON
        try:
            type_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(f"its header does not say where {name} is") from error
        numbers = [begin, end, *(shape if isinstance(shape, list) else [None])]
        if not all(type(number) is int and number >= 0 for number in numbers) or begin > end:
            raise self._broken(f"its header has impossible numbers for {name}")
        dtype = DTYPES.get(str(type_name))
        if dtype is not None and torch.Size(shape).numel() * dtype.itemsize != end - begin:
            raise self._broken(f"{name} does not take as many bytes as its shape says")
        return Stored(str(type_name), tuple(shape), base + begin, end - begin)

    def _broken(self, how: str) -> ModelLoadError:
        return ModelLoadError(f"{self.name} is no whole safetensors file: {how}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name, same in itertools.groupby(sorted(names)):
        if len(list(same)) > 1:
            raise ValueError(f"it holds {name} twice")
    return dict(pairs)


def header_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `tensors` one after the other, aligned to 64 bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


_PIECE_BYTES = 8 * 2**20
_READERS = 2  # finding fresh pages and copying into them keeps more than one core busy
_AHEAD = 2 * _READERS
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one tensor of a file, and the place that they belong to.

    `first_row` counts in what the place fills; `offset` and `nbytes` are of the file.
    """

    file: TensorFile
    place: Place
    first_row: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


def pieces_of(file: TensorFile, stored: Stored, place: Place) -> list[Piece]:
    """A tensor in pieces of some megabytes; only the rows that the place wants."""
    if not stored.nbytes or not place.num_rows:
        return []
    dtype, row_nbytes = DTYPES[stored.type_name], stored.nbytes // stored.shape[0]
    pieces = []
    for first in range(0, place.num_rows, each := max(1, _PIECE_BYTES // row_nbytes)):
        rows = min(each, place.num_rows - first)
        shape, at = (rows, *stored.shape[1:]), stored.offset + first * row_nbytes
        pieces.append(Piece(file, place, place.offset + first, shape, dtype, at, rows * row_nbytes))
    return pieces


def read_pieces(
    pieces: Sequence[Piece], device: torch.device, placed: Callable[[int, int], None]
) -> None:
    """Read and place everything; `placed` gets the bytes so far and the bytes of all pieces."""
    reading = _Reading(device)
    total, done = sum(piece.nbytes for piece in pieces), 0
    try:
        for piece in pieces:
            reading.begin(piece)
            if reading.num_begun == _AHEAD:
                done += reading.land()
                placed(done, total)
        while reading.num_begun:
            done += reading.land()
            placed(done, total)
    finally:
        reading.close()


class _Reading:
    """Pieces that are being read, in order; each lands before the ones begun after it."""

    def __init__(self, device: torch.device) -> None:
        self._staging = _Staging(device)
        self._begun: deque[tuple[Piece, torch.Tensor | None, Future[None]]] = deque()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="sage-fed-read")

    @property
    def num_begun(self) -> int:
        """Pieces that have not landed."""
        return len(self._begun)

    def begin(self, piece: Piece) -> None:
        """Have a piece read, to where it stays if that is possible."""
        place = piece.place
        where = (piece.first_row, piece.shape[0], piece.dtype)
        memory = place.memory(*where) if place.memory else None
        buffer = self._staging.take(piece.nbytes) if memory is None else None
        target = _bytes_of(memory if buffer is None else buffer)[: piece.nbytes]
        future = self._readers.submit(piece.file.read_into, target, piece.offset)
        self._begun.append((piece, buffer, future))

    def land(self) -> int:
        """Wait for the oldest piece and place it; returns its bytes."""
        piece, buffer, future = self._begun.popleft()
        future.result()
        if buffer is not None:
            rows = buffer[: piece.nbytes].view(piece.dtype).view(piece.shape)
            piece.place.take(piece.first_row, rows)
            self._staging.give_back(buffer)
        return piece.nbytes

    def close(self) -> None:
        """Stop reading; nothing touches buffers or places after this."""
        self._readers.shutdown(cancel_futures=True)
        self._staging.drain()


class _Staging:
    """Reused buffers; on CUDA one is free again when the device has copied what it held."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least `nbytes`."""
        size = max(nbytes, _PIECE_BYTES)
        for _ in range(len(self._free)):
            buffer, copied = self._free.popleft()
            if buffer.nbytes >= size:
                if copied is not None:
                    copied.synchronize()
                return buffer
            self._free.append((buffer, copied))
        if self._device.type == "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return allocate((size,), torch.uint8, _CPU)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The buffer's values have been taken, or are being copied by what was queued."""
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call] # as torch has it
            copied.record(torch.cuda.current_stream(self._device))
        self._free.append((buffer, copied))

    def drain(self) -> None:
        """Wait for what is being copied: the buffers' memory goes back after this."""
        for _, copied in self._free:
            if copied is not None:
                copied.synchronize()


def _bytes_of(tensor: torch.Tensor | None) -> memoryview:
    assert tensor is not None
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data
