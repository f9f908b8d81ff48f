"""The kernels' shared library: compiled once a machine, found again at the next start.

Owns the compiler's command line and the cache directory. A cached library is used only if it
belongs to us, lies in a directory that nobody else may enter, and has the checksum that was
noted when it was built. Knows nothing of what the library does.
Never fails loudly: what keeps the kernels from being had is returned as `Unavailable`.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sage_fed.engine.cache_directory import default_directory, private

_LOG = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
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
            # Whoever had the lock before may just have built it.
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
    """Our own directory: whoever could write there could run code as us."""
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
