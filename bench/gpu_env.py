"""Where and with what a GPU run was made, and the device's own limits.

Owns: date, versions, commit, device and driver, clocks and power where readable; the measured
rates of reading memory and of multiplying matrices, which every share is stated against.
Every reading is optional: on unified-memory devices and in containers parts of it are absent.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch

from sage_fed import __version__
from sage_fed.engine import read_bandwidth_bytes_per_s

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "triton", "transformers", "safetensors", "huggingface-hub", "grpcio", "apsw",
    "pydantic", "prometheus-client",
)  # fmt: skip
_SMI_FIELDS = (
    "name", "driver_version", "vbios_version", "pstate", "persistence_mode", "mig.mode.current",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Everything a figure has to carry."""
    found: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": {
            "cpu": report.cpu_model(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "sage-fed": __version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "torch": {
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["torch"] |= {
            "cudnn": torch.backends.cudnn.version(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "architectures": torch.cuda.get_arch_list(),
        }
        found["gpu"] = {
            name: getattr(properties, name, None)
            for name in (
                "name", "total_memory", "multi_processor_count", "L2_cache_size",
                "major", "minor", "is_integrated",
            )
        }  # fmt: skip
        found["telemetry"] = telemetry(device)
    return found


def telemetry(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature now, as the driver tells them; None where it does not."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # Not the index: CUDA_VISIBLE_DEVICES renumbers torch's devices and not the driver's.
    which = ("-i", f"GPU-{uuid}") if uuid else ()
    # A driver that does not know one of the fields refuses them all.
    for fields in (_SMI_FIELDS, _SMI_FIELDS[:2]):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        values = said.stdout.strip().splitlines()[0].split(",")
        return dict(zip(fields, map(str.strip, values), strict=False))
    return None


def limits(device: torch.device, read_bytes: int, matrix: int) -> dict[str, Any]:
    """What the device can do: bytes read per second, matrix operations per second.

    Reading is tried as a sum and as the matrix-vector product that decoding is; the faster is
    the limit. `engine_read` is what the daemon's own gauge compares itself with.
    """
    with torch.inference_mode():
        rates = _memory_rates(device, read_bytes)
        rates["engine_read"] = read_bandwidth_bytes_per_s(str(device))
        left = torch.randn(matrix, matrix, device=device).bfloat16()
        right = torch.randn(matrix, matrix, device=device).bfloat16()
        multiply_s = median_s(device, lambda: left @ right)
    return {
        "bytes_per_s": {name: round(rate) for name, rate in rates.items()},
        "read_limit_bytes_per_s": round(max(rates["sum"], rates["matrix_vector"])),
        "bf16_matrix_flops_per_s": round(2 * matrix**3 / multiply_s),
    }


def _memory_rates(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second; a copy reads and writes, and both count."""
    width = min(8192, nbytes // 2**12)
    values = torch.empty(nbytes // 2 // width, width, dtype=torch.bfloat16, device=device)
    values.normal_()
    vector = torch.randn(width, device=device).bfloat16()
    other = torch.empty_like(values)
    return {
        "sum": values.nbytes / median_s(device, values.sum),
        "matrix_vector": values.nbytes / median_s(device, lambda: torch.mv(values, vector)),
        "copy": 2 * values.nbytes / median_s(device, lambda: other.copy_(values)),
    }


def median_s(device: torch.device, work: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of `work` on the device: timed by its own events where it has them."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            began_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=15, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "sage_fed", "bench")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")
