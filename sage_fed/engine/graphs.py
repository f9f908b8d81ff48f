"""The seam of CUDA graphs: work over tensors that stay where they are, done again and again.

Owns how such work is compiled and recorded. Knows nothing of models. What is captured may
neither allocate on the host nor wait for the device; in return a replay costs one launch instead
of hundreds. Compiling needs Triton and a C compiler; where one of them is absent graphs are made
of torch's own kernels, and `name` says so.
`EagerCapture` records nothing and simply does the work again, on any device: the same code over
the same static tensors, so whatever a graph would get wrong by them shows without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from sage_fed.errors import ModelLoadError

Work = Callable[[], None]
Function = Callable[..., torch.Tensor]

_WARM_UP_RUNS = 2
"""Before a capture: the first lets libraries choose and compile, the second shows they are done."""

_TRITON_CAPABILITY = (7, 0)
_RECOMPILES = 64


class GraphCapture(Protocol):
    """Compiles functions and records work; one for each engine."""

    @property
    def name(self) -> str:
        """What `ModelInfo.kernels` says of it; "" where nothing is recorded."""

    def compile(self, function: Function, *, widened: bool) -> Function:
        """The same function, faster where it can be had; only to be called by captured work.

        The first dimension of its tensor arguments is a number of rows. `widened` says that it
        multiplies by weights that are stored narrower than they are computed with.
        """

    def capture(self, work: Work) -> Work:
        """Do `work`, and return what does it again on the same tensors."""


class EagerCapture:
    """Does the work again, call by call."""

    name = ""

    def compile(self, function: Function, *, widened: bool) -> Function:  # noqa: ARG002 - as others
        """Return `function`."""
        return function

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

    def __init__(self, device: torch.device, *, compiles: bool) -> None:
        self._device = device
        self._compiles = compiles
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def name(self) -> str:
        """What it does."""
        return "compile+graphs" if self._compiles else "graphs"

    def compile(self, function: Function, *, widened: bool) -> Function:
        """Compile where Triton is there; see `GraphCapture`."""
        if not self._compiles:
            return function
        # Read at the first compilation; what is there from an earlier start is not compiled again.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_directory()))
        # A product of one row becomes a reduction, which reads weights at nearly full speed and
        # takes in what is around it, but only with tuned tiles. Of several rows, Triton's own
        # products can widen weights as they read them; for the others cuBLAS is as good.
        options = {"coordinate_descent_tuning": True, "max_autotune_gemm": widened}
        return compiled_by_rows(function, options=options)

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


def can_compile(device: torch.device) -> bool:
    """Whether what torch compiles for this device could be built and run here."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    triton = importlib.util.find_spec("triton") is not None
    capable = torch.cuda.get_device_capability(device) >= _TRITON_CAPABILITY
    return triton and capable and compiler is not None


def compiled_by_rows(function: Function, **how: Any) -> Function:  # noqa: ANN401 - torch's own
    """`function` compiled twice, by `torch.compile(**how)`: for one row, and for any number.

    All other sizes are fixed: those of a model are, and another model gets code of its own.
    """
    # Here, because it takes seconds, and most processes compile nothing.
    from torch import _dynamo as dynamo  # noqa: PLC0415

    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, **how)

    def by_rows(*arguments: Any) -> torch.Tensor:  # noqa: ANN401 - as the function's
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.dim() > 1 and len(argument) > 1:
                dynamo.maybe_mark_dynamic(argument, 0)
        # The limit is one for all models of the process, and each precision counts.
        with dynamo.config.patch(recompile_limit=_RECOMPILES):
            return compiled(*arguments)

    return by_rows


def compiled_directory() -> Path:
    """Where compiled code is kept over starts: with the service, or with the user.

    Raises:
        ModelLoadError: others could write there, and so run code as us.
    """
    service = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]  # of systemd; may list several
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(service) if service else Path(home or Path.home() / ".cache") / "sage-fed"
    directory = base / "inductor"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise ModelLoadError(f"there is no directory to keep compiled code in ({error})") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ModelLoadError(f"{directory} must belong to this user and be closed to others (0700)")
    return directory
