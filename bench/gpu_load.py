"""From safetensors on local disk to a model that serves: seconds, beside the disk's own.

Owns: a process for each start. The first finds no compiled
code, the second finds that of the first. Both find the checkpoint in the page cache or not, as
`dropped` says; `disk_bytes_per_s` is a plain read of the file before them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import Written
from gpu_shapes import Plan

_START = """
import dataclasses, json, sys, time
began = time.perf_counter()
from sage_fed.engine import EngineOptions, load_engine
folder, kv, device, kernels, context, ids, batch = sys.argv[1:]
options = EngineOptions(folder, int(kv), device, "bf16", kernels=kernels,
    max_context_tokens=int(context), num_valid_ids=int(ids), max_batch=int(batch))
imported = time.perf_counter()
engine = load_engine(options, lambda _: None)
ready = time.perf_counter()
engine.close()
print(json.dumps({"import_s": imported - began, "ready_s": ready - began,
    **dataclasses.asdict(engine.info)}))
"""


def load(
    plan: Plan, device: str, kernels: str, checkpoint: Written, left: Callable[[], float]
) -> dict[str, Any]:
    """Start twice from the strategic shape's checkpoint."""
    if device != "cpu":
        torch.cuda.empty_cache()
    file = checkpoint.weights
    _drop(file)
    rate = _read_rate(file)
    starts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="sage-fed-gpu-") as cache:
        for number in ("first", "second"):
            if left() <= 0:
                break
            dropped = _drop(file)
            start = _start(
                checkpoint.path, Path(cache), plan, device=device, kernels=kernels, left_s=left()
            )
            starts[number] = start | {"dropped": dropped}
    for start in starts.values():
        rest_s = start["load_s"] - start["capture_s"]
        start["share_of_disk"] = checkpoint.nbytes / rest_s / rate
    return {
        "checkpoint_bytes": checkpoint.nbytes,
        "written_s": checkpoint.seconds,
        "disk_bytes_per_s": rate,
        **starts,
    }


def _start(
    model: Path, cache: Path, plan: Plan, *, device: str, kernels: str, left_s: float
) -> dict[str, Any]:
    shape = plan.strategic
    kernels = "torch" if device == "cpu" else kernels
    values = (shape.kv_cache_bytes, device, kernels, shape.max_context, shape.valid_ids, 16)
    said = subprocess.run(
        [sys.executable, "-c", _START, str(model), *map(str, values)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache),
             "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=left_s + 60.0, check=False,
    )  # fmt: skip
    if said.returncode:
        raise RuntimeError(said.stderr[-1500:])
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def _drop(file: Path) -> bool:
    """Take the file out of the page cache; False where the system does not let us say."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        try:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    return True


def _read_rate(file: Path) -> float:
    """Bytes per second of a plain read, in pieces."""
    buffer = bytearray(64 * 2**20)
    began, total = time.perf_counter(), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            total += count
    return total / (time.perf_counter() - began)
