"""The native kernels' shared library: compiled once a machine, loaded, and its C interface.

Owns the compiler's command line, the cache directory and the structs, which mirror `model.h`; their
sizes are compared when the library is loaded. A cached library is used only if it belongs to us,
lies in a directory that no other user may enter, and has the checksum that was noted when it was
built. Every call releases the GIL for as long as it lasts. Pointers are plain integers: the caller
keeps the memory behind them alive.
What keeps the kernels from being had is returned as `Unavailable`.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from sage_fed.engine.machine import default_directory, private

_LOG = logging.getLogger(__name__)

KINDS = {"bf16": 0, "int8": 1, "int4": 2, "fp32": 3}
SOURCE_TYPES = {"bfloat16": 0, "float16": 1, "float32": 2}


class LinearStruct(ctypes.Structure):
    """`Linear` of model.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int32),
        ("gated", c_int32),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of model.h."""

    _fields_ = (
        ("qkv", LinearStruct),
        ("out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("kv", c_void_p),
    )


class ModelStruct(ctypes.Structure):
    """`Model` of model.h."""

    _fields_ = (
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("valid_ids", c_int64),
        ("eps", c_float),
        ("block_size", c_int32),
        ("alone_us", c_float),
        ("fp32", c_int32),
        ("embedding_type", c_int32),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("rotary", c_void_p),
        ("layers", POINTER(LayerStruct)),
        ("head", LinearStruct),
    )


class ChunkStruct(ctypes.Structure):
    """`Chunk` of model.h."""

    _fields_ = (
        ("start", c_int64),
        ("num_rows", c_int64),
        ("first_block", c_int64),
        ("draws", c_int64),
    )


class StepStruct(ctypes.Structure):
    """`Step` of model.h."""

    _fields_ = (
        ("token_ids", c_void_p),
        ("chunks", c_void_p),
        ("blocks", c_void_p),
        ("num_tokens", c_int64),
        ("num_chunks", c_int64),
        ("logits", c_void_p),
        ("best", c_void_p),
    )


class DrawRowStruct(ctypes.Structure):
    """`DrawRow` of model.h."""

    _fields_ = (
        ("key", c_int64),
        ("top_p", c_double),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("log_min_p", c_float),
    )


_DONE, _NO_MEMORY = 0, 1
_NEVER_S = -1.0

_STRUCTS = (LinearStruct, LayerStruct, ModelStruct, ChunkStruct, StepStruct, DrawRowStruct)


class Library:
    """The loaded kernels, working on `num_threads` threads.

    All libraries of a process with the same number share one pool of threads.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        self.dll = dll = ctypes.CDLL(str(path))
        """What takes neither threads nor memory is called as it is."""
        linear = POINTER(LinearStruct)
        for name, result, arguments in (
            ("sf_abi_sizes", None, [POINTER(c_int64)]),
            ("sf_pool_get", c_void_p, [c_int32]),
            ("sf_pool_release", None, [c_void_p]),
            ("sf_read", c_int32, [c_void_p, c_void_p, c_int64]),
            ("sf_linear_nbytes", c_int64, [linear]),
            ("sf_linear_columns", c_int64, [linear]),
            ("sf_linear_clear", None, [linear]),
            (
                "sf_linear_pack",
                c_int32,
                [c_void_p, linear, c_int64, c_int64, c_void_p, c_int32],
            ),
            ("sf_linear_place_bias", None, [linear, c_int64, c_int64, c_void_p]),
            ("sf_linear_row", None, [linear, c_int64, c_void_p]),
            ("sf_linear_apply", c_int32, [c_void_p, linear, c_void_p, c_int64, c_void_p]),
            ("sf_session_new", c_void_p, [POINTER(ModelStruct), c_void_p]),
            ("sf_session_free", None, [c_void_p]),
            ("sf_session_run", c_int32, [c_void_p, POINTER(StepStruct), c_double]),
            (
                "sf_draw",
                c_int32,
                [c_void_p, c_void_p, c_int64, c_int64, POINTER(DrawRowStruct), c_int64, c_void_p],
            ),
            ("sf_gumbel", None, [c_void_p, c_int64, c_void_p]),
        ):
            function = getattr(dll, name)
            function.restype = result
            function.argtypes = arguments
        sizes = (c_int64 * len(_STRUCTS))()
        dll.sf_abi_sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(struct) for struct in _STRUCTS], "model.h has changed"
        pool = dll.sf_pool_get(num_threads)
        if not pool:
            raise MemoryError("the kernels' threads cannot be started")
        self._pool = c_void_p(pool)

    def __del__(self) -> None:
        if pool := getattr(self, "_pool", None):
            self.dll.sf_pool_release(pool)

    def read(self, data: int, nbytes: int) -> None:
        """Read memory once, with every thread; `nbytes` is a multiple of 256."""
        self.dll.sf_read(self._pool, data, nbytes)

    def linear_pack(
        self, linear: LinearStruct, first_row: int, count: int, source: int, source_type: int
    ) -> None:
        """Pack `count` contiguous rows, quantising them on the way."""
        failed = self.dll.sf_linear_pack(
            self._pool, byref(linear), first_row, count, source, source_type
        )
        if failed:
            raise MemoryError("no memory to pack weights")

    def linear_apply(self, linear: LinearStruct, x: int, rows: int, y: int) -> None:
        """fp32 y [rows, n] = x [rows, k] W^T + b."""
        if self.dll.sf_linear_apply(self._pool, byref(linear), x, rows, y):
            raise MemoryError("no memory for a product")

    def session_new(self, model: ModelStruct) -> int:
        """A model that can be run; the memory behind the struct's pointers must outlive it."""
        session = self.dll.sf_session_new(byref(model), self._pool)
        if not session:
            raise MemoryError("no memory for a session")
        return int(session)

    def session_free(self, session: int) -> None:
        """Free a session's own memory; keeps the threads until then."""
        self.dll.sf_session_free(session)

    def session_run(
        self, session: int, step: StepStruct | None, pause_after_s: float | None
    ) -> bool:
        """Begin a step, or go on with the last one; False where it paused between layers.

        What `step` points to has to stay until this returns True.

        Raises:
            MemoryError: there is none for the step, which is as if it had not begun.
        """
        pause_s = _NEVER_S if pause_after_s is None else pause_after_s
        said = self.dll.sf_session_run(session, None if step is None else byref(step), pause_s)
        if said == _NO_MEMORY:
            raise MemoryError("no memory for a step's activations")
        return bool(said == _DONE)

    def draw(
        self,
        logits: int,
        stride: int,
        num_ids: int,
        rows: ctypes.Array[DrawRowStruct],
        tokens: int,
    ) -> None:
        """Write int64 tokens [rows] for fp32 logits [rows, num_ids]; -1 where they aren't numbers.

        The logits' rows are `stride` numbers apart.

        Raises:
            MemoryError: there is none for a row's candidates.
        """
        if self.dll.sf_draw(self._pool, logits, stride, num_ids, rows, len(rows), tokens):
            raise MemoryError("no memory to draw tokens")

    def gumbel(self, counters: int, count: int, noise: int) -> None:
        """Write the fp32 noise of `count` (a multiple of 16) uint32 counters."""
        self.dll.sf_gumbel(counters, count, noise)


def load_library(num_threads: int) -> Library | Unavailable:
    """Build the kernels if need be and load them; blocks."""
    began = time.monotonic()
    built = build_library()
    if isinstance(built, Unavailable):
        return built
    if built.compiled:
        _LOG.info("compiled the CPU kernels in %.1f s", time.monotonic() - began)
    try:
        return Library(built.path, num_threads)
    except (OSError, AttributeError, MemoryError) as error:
        return Unavailable(f"the compiled kernels cannot be loaded ({error})")


_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_TIMEOUT_S = 300.0
_DIGEST_CHARS = 20
_ERROR_CHARS = 300
_KEPT = 8


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why this machine does not have the kernels; `hardware`: no compiler could help."""

    reason: str
    hardware: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """The library's file; `compiled` is False where it was found."""

    path: Path
    compiled: bool


def build_library() -> Built | Unavailable:
    """Find the library or compile it, which takes some seconds."""
    cpu = _cpu_flags()
    if isinstance(cpu, Unavailable):
        return cpu
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in {".cpp", ".h"})
    key = _digest(platform.libc_ver(), cpu, _FLAGS, *((p.name, p.read_bytes()) for p in sources))
    compiler = _compiler()
    directory = _cache_directory()
    if isinstance(directory, Unavailable):
        return directory
    if (found := _cached(directory, key, compiler)) is not None:
        return Built(found, compiled=False)
    if compiler is None:
        return Unavailable("there is no C++ compiler (CXX, c++, g++ or clang++)")
    target = directory / f"{key}-{_identity(compiler)}.so"
    try:
        with _alone(directory):
            # The lock's owner before may just have built it.
            if (found := _cached(directory, key, compiler)) is not None:
                return Built(found, compiled=False)
            _LOG.info("compiling the CPU kernels, once for this machine and version")
            return _compile(compiler, sources, target)
    except OSError as error:
        return Unavailable(f"they cannot be built ({error})")


def _cpu_flags() -> str | Unavailable:
    """The CPU's own list of what it can do, which decides what `-march=native` means."""
    if platform.machine() != "x86_64":
        return Unavailable(f"they are for x86_64, and this is {platform.machine()}", hardware=True)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return Unavailable("/proc/cpuinfo cannot be read")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    if missing := [flag for flag in _CPU_FLAGS if flag not in flags]:
        return Unavailable(f"the CPU lacks {', '.join(missing)}", hardware=True)
    return " ".join(sorted(flags))


def _compiler() -> Path | None:
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        if name and (path := shutil.which(name)) is not None:
            return Path(path)
    return None


def _cache_directory() -> Path | Unavailable:
    """Our own directory: another who could write there could run code as us."""
    try:
        return private(default_directory("kernels"))
    except PermissionError as error:
        return Unavailable(str(error))
    except OSError as error:
        return Unavailable(f"there is no directory to keep them in ({error})")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait for others who build here: two tiers start together."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached(directory: Path, key: str, compiler: Path | None) -> Path | None:
    """A whole library of these sources; without a compiler any compiler's will do."""
    pattern = f"{key}-{_identity(compiler) if compiler else '*'}.so"
    return next((path for path in sorted(directory.glob(pattern)) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        noted = path.with_suffix(".sha256").read_text(encoding="utf-8")
        return path.lstat().st_uid == os.geteuid() and noted == _checksum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _compile(compiler: Path, sources: list[Path], target: Path) -> Built | Unavailable:
    units = [str(path) for path in sources if path.suffix == ".cpp"]
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            done = subprocess.run(  # noqa: S603 - the compiler that the environment names
                [str(compiler), *_FLAGS, *units, "-o", str(built)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                said = done.stderr.strip()[:_ERROR_CHARS]
                return Unavailable(f"{compiler.name} failed with {done.returncode}: {said}")
            built.with_suffix(".sha256").write_text(_checksum(built), encoding="utf-8")
            # Renamed whole, the checksum first: a reader takes no lock.
            built.with_suffix(".sha256").replace(target.with_suffix(".sha256"))
            built.replace(target)
    except subprocess.TimeoutExpired:
        return Unavailable(f"{compiler.name} took more than {_COMPILE_TIMEOUT_S:.0f} s")
    _forget_old(target.parent)
    return Built(target, compiled=True)


def _forget_old(directory: Path) -> None:
    """Keep the newest few: other versions of the package, or another machine's on a shared home."""
    newest_first = sorted(directory.glob("*.so"), key=lambda path: -path.stat().st_mtime)
    for path in newest_first[_KEPT:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)


def _identity(compiler: Path) -> str:
    """Changes when another version of the compiler is installed; costs no process."""
    real = compiler.resolve()
    status = real.stat()
    return _digest(str(real), status.st_size, status.st_mtime_ns)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_DIGEST_CHARS]
