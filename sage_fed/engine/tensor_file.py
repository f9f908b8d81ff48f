"""A safetensors file: which tensor lies where, and reading some of it.

Owns the header, which is checked as strictly as the format demands: a file comes from
strangers. Reads by position into memory that the caller owns, so that no page of the file is
ever mapped: a mapped file counts as memory of the process, and one that is cut while it is read
kills it. Fails with `ModelLoadError` that names the file.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from sage_fed.core import HEAD_BYTES, misnomer
from sage_fed.errors import ModelLoadError

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
                # Or two threads that take turns look like somebody who jumps about.
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
        """Raise if somebody wrote to the file since it was opened."""
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
