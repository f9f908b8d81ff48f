"""The seam of CUDA graphs: work over tensors that stay where they are, done again and again.

Owns how such work is recorded. Knows nothing of models. What is captured may neither allocate
on the host nor wait for the device; in return a replay costs one launch instead of hundreds.
`EagerCapture` records nothing and simply does the work again, on any device: the same code over
the same static tensors, so whatever a graph would get wrong by them shows without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]

_WARM_UP_RUNS = 2
"""Before a capture: the first lets libraries choose and compile, the second shows they are done."""


class GraphCapture(Protocol):
    """Records work; one for each engine."""

    @property
    def name(self) -> str:
        """What `ModelInfo.kernels` says of it; "" where nothing is recorded."""

    def capture(self, work: Work) -> Work:
        """Do `work`, and return what does it again on the same tensors."""


class EagerCapture:
    """Does the work again, call by call."""

    name = ""

    def capture(self, work: Work) -> Work:
        """Return `work`, once done."""
        work()
        return work


class CudaCapture:
    """CUDA graphs that share one pool of memory: they never run at the same time.

    Captured on a stream of their own, replayed on the current one. Another thread may use the
    device meanwhile (the other tier serves while this one loads), so only this thread's calls
    are checked for what a capture forbids.
    """

    name = "graphs"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Work:
        """Warm up, record; the returned replay only queues."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                work()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`: it collects garbage and empties the cache at every entry.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay
