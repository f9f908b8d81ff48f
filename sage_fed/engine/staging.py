"""What crosses between host and device: one copy to it and one copy back per step.

Owns the packing of a step's integers and doubles, and the copy of its results.
On CUDA both copies go through pinned memory and only queue: a pageable copy would wait for
everything that the device still has to do. Torch's own allocator of pinned memory gives a
buffer out again only when the copies from it are done, so nothing here is reused too early.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

Vectors = Sequence[torch.Tensor]


class Packer:
    """Collects vectors of 64-bit numbers on the host and moves them in one copy."""

    def __init__(self) -> None:
        self._values = array("q")
        self._sizes: list[int] = []

    def add(self, values: Sequence[int]) -> int:
        """Append a vector; returns its index in what `move` returns."""
        self._values.extend(values)
        self._sizes.append(len(values))
        return len(self._sizes) - 1

    def add_doubles(self, values: array[float]) -> int:
        """Append a vector of doubles; read it with `.view(torch.float64)`."""
        self._values.frombytes(values.tobytes())
        self._sizes.append(len(values))
        return len(self._sizes) - 1

    def move(self, device: torch.device) -> Vectors:
        """All vectors, int64 on `device`, in the order of `add`."""
        if not self._values:
            empty = torch.empty(0, dtype=torch.int64, device=device)
            return [empty] * len(self._sizes)
        packed = torch.frombuffer(self._values, dtype=torch.int64)
        if device.type != "cpu":
            packed = pinned_like(packed).copy_(packed).to(device, non_blocking=True)
        return packed.split_with_sizes(self._sizes)


class Landing:
    """A tensor on its way to the host; `device_s` is what the device took since `begin`.

    Constructed behind the work on the device's current stream, whose results it waits for.
    On the CPU everything is there already and no time is known.
    """

    def __init__(
        self,
        results: torch.Tensor | None,
        begin: torch.cuda.Event | None,
        device: torch.device,
    ) -> None:
        self._begin = begin
        self._end: torch.cuda.Event | None = None
        # A copy here, too: the next step may use the memory before this one is read.
        self._results = None if results is None else results.clone() if begin is None else results
        if begin is not None:
            if results is not None:
                self._results = pinned_like(results).copy_(results, non_blocking=True)
            self._end = _marked(device)

    def wait(self) -> torch.Tensor | None:
        """The results on the host, once they are there: the step's only wait for the device."""
        if self._end is not None:
            self._end.synchronize()
        return self._results

    @property
    def device_s(self) -> float | None:
        """Seconds between `begin` and the results; None where the device has no clock."""
        if self._begin is None or self._end is None:
            return None
        return float(self._begin.elapsed_time(self._end)) / 1e3


def begin(device: torch.device) -> torch.cuda.Event | None:
    """Mark where a step's time begins: behind whatever the device still has to do."""
    if device.type != "cuda":
        return None
    return _marked(device)


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Host memory of the same shape and type that the device can reach by itself."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def _marked(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own
    event.record(torch.cuda.current_stream(device))
    return event
