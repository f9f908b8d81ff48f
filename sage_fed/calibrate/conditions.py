"""What the machine says of itself: versions, clocks, power mode, load. Every reading is optional.

Owns where each reading is found. A file or a tool that is not there leaves its line out, and
nothing of it decides a price. Blocks for as long as the slowest tool, at most `_TOOL_S` each.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

_TOOL_S = 5.0
_PACKAGES = ("sage-fed", "torch", "transformers", "triton")
_FILES = {
    "cpu governor": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "cpu clock (kHz)": "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
    "cpu clock, highest (kHz)": "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
    "power profile": "/sys/firmware/acpi/platform_profile",
    "huge pages": "/sys/kernel/mm/transparent_hugepage/enabled",
    "nvidia driver": "/proc/driver/nvidia/version",
    "jetson release": "/etc/nv_tegra_release",
    "board": "/proc/device-tree/model",
}
_GPU_FIELDS = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit",
    "temperature.gpu",
)  # fmt: skip


def read_conditions(*, cuda_index: int | None) -> dict[str, str]:
    """Return the readings by name; `cuda_index` None is a device that is no GPU."""
    readings = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    for package in _PACKAGES:
        try:
            readings[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, path in _FILES.items():
        readings[name] = _file(path)
    readings["cpu clock (MHz)"] = _cpu_mhz()
    if cuda_index is not None:
        query = f"--query-gpu={','.join(_GPU_FIELDS)}"
        values = _tool("nvidia-smi", f"--id={cuda_index}", query, "--format=csv,noheader")
        for field, value in zip(_GPU_FIELDS, values.split(","), strict=False):
            readings[f"gpu {field}"] = value.strip()
        readings["power mode"] = _tool("nvpmodel", "-q").replace("\n", " ")
    return {name: value for name, value in readings.items() if value}


def _cpu_mhz() -> str:
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "cpu MHz":
            return value.strip()
    return ""


def _file(path: str) -> str:
    """The file's first line; "" where it cannot be read."""
    lines = _lines(path)
    return lines[0].strip("\0 \t") if lines else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _tool(name: str, *arguments: str) -> str:
    """A tool's output; "" where it is not there, fails or does not come back."""
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - a constant command
            [path, *arguments], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
