"""The machine that a model runs on: devices, threads, memory, and a directory for what is kept.

A device that was named is that one or an error; only `auto` leaves the choice to what is there.
Threads of a forward pass on the CPU are a setting of the process. Weights lie in large pages where
the kernel gives them: a gigabyte in small ones takes longer to be found than to be read. The
directory for compiled kernels and quantised weights is one that no other user may write, because
what is found there is run, or served.
Fails with `ModelLoadError` for a device, and with `OSError` for the directory; what the system
does not tell about memory is None.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sage_fed.errors import ConfigError, ModelLoadError
from sage_fed.trusted_files import require_trusted


def resolve_device(name: str) -> torch.device:
    """Return the device that was asked for.

    Raises:
        ModelLoadError: it is none, or it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"device {name!r} is not a device; use cpu or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ModelLoadError(f"device {name!r} is not supported; use cpu or cuda:N")
    index = device.index or 0
    if index >= (count := _cuda_devices()):
        raise ModelLoadError(
            f"device {name} was asked for, but {_torch_build()} sees {count} CUDA devices; "
            "ask for cpu if that is what you want"
        )
    return torch.device("cuda", index)


def device_at_hand() -> tuple[str, str]:
    """Return the first CUDA device, or else the CPU and why; in words, "" for no reason."""
    if _cuda_devices():
        return "cuda:0", ""
    return "cpu", f"{_torch_build()} sees no CUDA device"


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _torch_build() -> str:
    cuda = torch.version.cuda
    return f"torch ({'built without CUDA' if cuda is None else f'for CUDA {cuda}'})"


def set_cpu_threads(num_threads: int) -> None:
    """Use `num_threads` for one forward pass on the CPU; 0 leaves torch's own choice."""
    if num_threads:
        torch.set_num_threads(num_threads)


_LARGE_NBYTES = 8 * 2**20
"""From here on a mapping of its own pays; four large pages of 2 MiB."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor whose values are undefined (zeros where it is a mapping of its own)."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE_NBYTES or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


_PEAK_RESET = "5"  # proc(5), clear_refs: the peak resident size becomes the present one


def memory_used_bytes(device_name: str) -> int | None:
    """What torch has allocated on a GPU; None on the CPU.

    What is resident there does not tell one model from the next: freed memory is used again, and
    pages of a mapped file count from their first use.
    """
    device = resolve_device(device_name)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def host_available_bytes() -> int | None:
    """What the host could give to a process without swapping."""
    return _kernel_says(Path("/proc/meminfo"), "MemAvailable:")


def begin_host_peak() -> bool:
    """Forget the peak so far; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text(_PEAK_RESET)
    except OSError:
        return False
    return True


def host_peak_bytes() -> int | None:
    """The most that was resident since `begin_host_peak`."""
    return _kernel_says(Path("/proc/self/status"), "VmHWM:")


def _kernel_says(path: Path, key: str) -> int | None:
    """Bytes of a line in KiB."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def default_directory(name: str) -> Path:
    """`name` under $CACHE_DIRECTORY (systemd's), $XDG_CACHE_HOME/sage-fed or ~/.cache/sage-fed.

    Raises:
        OSError: there is no home.
    """
    named = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]  # systemd may list several
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(named) if named else Path(home or Path.home() / ".cache") / "sage-fed") / name
    except RuntimeError as error:
        raise OSError(str(error)) from error


def private(directory: Path) -> Path:
    """The directory, made if need be, which is this user's and closed to others (0700).

    Raises:
        OSError: it cannot be made, or others may use it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if status.st_mode & 0o077:
        raise PermissionError(
            f"{directory} must belong to this user and be closed to others (0700)"
        )
    try:
        require_trusted("cache", directory, status, {os.geteuid()})
    except ConfigError as error:
        raise PermissionError(error.message) from None
    return directory


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """`name` as its maker calls it; `threads` of one forward pass on the CPU, 0 on a GPU.

    `gpu_uuid` is how the driver knows a GPU, whatever its number is here; "" for a CPU.
    """

    name: str
    threads: int
    gpu_uuid: str = ""


def describe_device(device_name: str) -> DeviceDescription:
    """Describe the device that is served from."""
    device = resolve_device(device_name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceDescription(properties.name, 0, f"GPU-{properties.uuid}")
    cores = len(os.sched_getaffinity(0))
    return DeviceDescription(f"{_cpu_name()}, {cores} CPUs", torch.get_num_threads())


def _cpu_name() -> str:
    """The CPU's name; boards without one in /proc/cpuinfo name themselves in the device tree."""
    try:
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    except OSError:
        return platform.processor() or platform.machine()
