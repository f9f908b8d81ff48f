"""Tensors from files into their places: read ahead by threads, taken by the caller.

What the place keeps as the file has it is read straight to where it stays; all else goes
through a few reused buffers (pinned for CUDA, where copies run behind the host). Large tensors
come in pieces, so memory stays bounded and progress moves.
Knows neither names nor formats. Fails with `ModelLoadError`, or with what a place raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sage_fed.engine.memory import allocate
from sage_fed.engine.tensor_file import DTYPES, Stored, TensorFile
from sage_fed.engine.weights import Place

_PIECE_BYTES = 8 * 2**20
_READERS = 2  # finding fresh pages and copying into them keeps more than one core busy
_AHEAD = 2 * _READERS
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one tensor of a file, and the place that they belong to."""

    file: TensorFile
    stored: Stored
    place: Place
    first_row: int
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows together."""
        return (self.num_rows, *self.stored.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.num_rows * self._row_nbytes

    @property
    def offset(self) -> int:
        """Where in the file it begins."""
        return self.stored.offset + self.first_row * self._row_nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Type in the file."""
        return DTYPES[self.stored.type_name]

    @property
    def _row_nbytes(self) -> int:
        return self.stored.nbytes // self.stored.shape[0]


def pieces_of(file: TensorFile, stored: Stored, place: Place) -> list[Piece]:
    """A tensor in pieces of some megabytes; only the rows that the place wants."""
    if not stored.nbytes or not place.num_rows:
        return []
    each = max(1, _PIECE_BYTES * stored.shape[0] // stored.nbytes)
    return [
        Piece(file, stored, place, first, min(each, place.num_rows - first))
        for first in range(0, place.num_rows, each)
    ]


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
        memory = piece.place.memory(piece.first_row, piece.num_rows, piece.dtype)
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
