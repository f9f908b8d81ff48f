"""What every benchmark's result carries: when, on what, with which versions.

Owns: the envelope of a result and its file under `bench/results/`.
Does not know: what was measured.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "grpcio", "uvloop", "apsw", "transformers", "prometheus-client")


def cpu_model() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def envelope(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result with date, machine and versions."""
    return {
        "benchmark": name,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": platform.python_version(),
            "sage-fed": importlib.metadata.version("sage-fed"),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        **result,
    }


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """The number of values; of two or more also p50, p99 and the largest, times `scale`."""
    if len(values) < 2:
        return {"n": len(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = {"p50": cuts[49], "p99": cuts[98], "max": max(values)}
    return {"n": len(values)} | {name: float(f"{v * scale:.6g}") for name, v in found.items()}


def write(name: str, result: dict[str, Any], path: Path | None) -> None:
    """Write the enveloped result to its file, and print it as one line of JSON."""
    body = envelope(name, result)
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
    print(json.dumps(body))
