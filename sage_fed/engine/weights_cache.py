"""Quantised weights as they lie in memory, kept for the next start.

A 7B in int4 is then a quarter of the bytes to read, and nothing has to be quantised again.
Owns the files: one a model, in the safetensors form, named by what it was made of and how;
written whole or not at all, checked when read, old ones removed. Never a pickle.
Knows neither layers nor formats. Fails never: what cannot be kept is a warning, and what cannot
be used is a warning and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from sage_fed.engine.cache_directory import private
from sage_fed.engine.stream import Piece, pieces_of, read_pieces
from sage_fed.engine.tensor_file import Stored, TensorFile, header_bytes
from sage_fed.engine.weights import Place
from sage_fed.errors import ModelLoadError

_FORMAT = 2
_PIECE_BYTES = 32 * 2**20
_SPARE_BYTES = 2 * 2**30  # left free on the file system
_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")

Placed = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What an entry was made of and how; another text is another entry.

    `origin` is the checkpoint's directory: an entry of an older state of it is superseded.
    """

    text: str
    origin: str

    @property
    def name(self) -> str:
        """The entry's file name."""
        return f"{hashlib.sha256(self.text.encode()).hexdigest()[:32]}.safetensors"


def cache_key(files: tuple[Path, ...], *, made: tuple[object, ...]) -> CacheKey:
    """The key of weights made from `files`, which are only looked at, not read.

    `made` says how: the layout, the number of ids, which tensor is embedding and head in one.
    Size, time of change, inode and header say whether a file is still the same.

    Raises:
        ModelLoadError: a file cannot be opened, or is broken.
    """
    sources = []
    for path in files:
        with TensorFile(path) as file:
            status = path.stat()
            header = hashlib.sha256(repr(file.tensors).encode()).hexdigest()
        sources.append((path.name, status.st_size, status.st_mtime_ns, status.st_ino, header))
    text = json.dumps([_FORMAT, list(made), sources])
    return CacheKey(text, str(files[0].parent.resolve()))


class WeightsCache:
    """Entries in one directory, together at most `max_bytes`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    def has(self, key: CacheKey) -> bool:
        """Whether there is an entry to try."""
        return (self._directory / key.name).is_file()

    def read(self, key: CacheKey, storage: Mapping[str, torch.Tensor], placed: Placed) -> bool:
        """Fill `storage` from the entry; False, with `storage` undefined, where it is no good.

        Errors of the device and of `placed` come out as they are.
        """
        path = self._directory / key.name
        try:
            private(self._directory)
            with TensorFile(path) as file:
                _check(file, key, storage)
                pieces: list[Piece] = []
                for name, stored in file.tensors.items():
                    raw = Stored("U8", (stored.nbytes,), stored.offset, stored.nbytes)
                    pieces += pieces_of(file, raw, _place_of(storage[name]))
                device = next(iter(storage.values())).device
                read_pieces(pieces, device, placed)
                file.check_unchanged()
                _check_sums(file, storage)
            os.utime(path)  # the least recently used are removed first
        except (ModelLoadError, OSError) as error:
            _LOG.warning("the kept weights cannot be used and are made again: %s", error)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return False
        return True

    def write(self, key: CacheKey, storage: Mapping[str, torch.Tensor], placed: Placed) -> None:
        """Keep `storage`; errors of `placed` come out as they are, and nothing is kept then."""
        nbytes = sum(tensor.nbytes for tensor in storage.values())
        partial = self._directory / f"{key.name}.{os.getpid()}.partial"
        try:
            private(self._directory)
            self._remove_leftovers()
            self._make_room(key, nbytes)
            metadata = {"key": key.text, "origin": key.origin, "sums": _checksums(storage)}
            try:
                with partial.open("wb") as file:
                    partial.chmod(0o600)
                    file.write(header_bytes(storage, metadata))
                    _write_all(file, storage, nbytes, placed)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self._directory / key.name)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("the weights cannot be kept for the next start: %s", error)

    def _make_room(self, key: CacheKey, nbytes: int) -> None:
        """Remove superseded entries, then the least recently used until there is room."""
        entries = sorted(self._entries(), key=lambda path: path.stat().st_mtime_ns)
        for path in tuple(entries):
            if path.name == key.name or _is_superseded(path, key):
                path.unlink(missing_ok=True)
                entries.remove(path)
        while entries and sum(p.stat().st_size for p in entries) + nbytes > self._max_bytes:
            entries.pop(0).unlink(missing_ok=True)
        free = shutil.disk_usage(self._directory).free
        if nbytes > self._max_bytes or nbytes + _SPARE_BYTES > free:
            raise OSError(f"they take {nbytes:,} bytes; {self._max_bytes:,} may be used, and "
                          f"{free:,} are free on the file system")  # fmt: skip

    def _entries(self) -> Iterator[Path]:
        return self._directory.glob("*.safetensors")

    def _remove_leftovers(self) -> None:
        """Remove what a process that is gone was writing when it was killed."""
        for path in self._directory.glob("*.partial"):
            pid = path.name.split(".")[-2]
            if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
                path.unlink(missing_ok=True)


def _check(file: TensorFile, key: CacheKey, storage: Mapping[str, torch.Tensor]) -> None:
    if file.metadata.get("key") != key.text:
        raise ModelLoadError(f"{file.name} was made of something else")
    there = {name: stored.nbytes for name, stored in file.tensors.items()}
    if there != {name: tensor.nbytes for name, tensor in storage.items()}:
        raise ModelLoadError(f"{file.name} holds other tensors")


def _check_sums(file: TensorFile, storage: Mapping[str, torch.Tensor]) -> None:
    if _checksums(storage) != file.metadata.get("sums"):
        raise ModelLoadError(f"{file.name} does not hold what was written to it")


def _is_superseded(path: Path, key: CacheKey) -> bool:
    """Whether an entry is of other files at the same place; a broken one is as good as gone."""
    try:
        with TensorFile(path) as file:
            made_of = json.loads(file.metadata["key"])
            now = json.loads(key.text)
            same = made_of[0] == now[0] and made_of[-1] == now[-1]
            return file.metadata["origin"] == key.origin and not same
    except (ModelLoadError, ValueError, KeyError, IndexError, TypeError):
        return True


def _place_of(tensor: torch.Tensor) -> Place:
    """All bytes of a tensor as a place."""
    raw = tensor.view(-1).view(torch.uint8)

    def take(first: int, rows: torch.Tensor) -> None:
        raw[first : first + rows.shape[0]].copy_(rows, non_blocking=True)

    def memory(first: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:  # noqa: ARG001 - bytes
        return raw[first : first + count] if raw.device.type == "cpu" else None

    return Place((raw.shape[0],), raw.shape[0], take, memory)


def _checksums(storage: Mapping[str, torch.Tensor]) -> str:
    """A 64-bit sum of each tensor, at the speed of memory: finds rot, not malice."""
    sums = []
    for tensor in storage.values():
        raw = tensor.view(-1).view(torch.uint8)
        whole = raw.nbytes // 8 * 8
        words = (
            raw[:whole].view(torch.int64).sum() if whole else raw.new_zeros((), dtype=torch.int64)
        )
        sums.append(words + raw[whole:].sum(dtype=torch.int64))
    return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()


def _write_all(
    file: BinaryIO, storage: Mapping[str, torch.Tensor], nbytes: int, placed: Placed
) -> None:
    done = 0
    for tensor in storage.values():
        raw = tensor.view(-1).view(torch.uint8)
        for first in range(0, raw.shape[0], _PIECE_BYTES):
            piece = raw[first : first + _PIECE_BYTES].to(_CPU)
            file.write(piece.numpy().data)
            done += piece.nbytes
            placed(done, nbytes)
