"""What the device is called, for provenance: the part of it that only torch can say.

Fails with `ModelLoadError` where the device is absent.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sage_fed.engine.devices import resolve_device


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
