"""How fast weights come to where they are used, beside how fast the files can be read at all.

Physics first: a start cannot be faster than reading the checkpoint's bytes once. From the page
cache that is copying them (`cat FILE >/dev/null`, one core); from the disk it is the disk. What
is served in other numbers is quantised and packed on the way, which can hide behind the reading
as long as it is faster. A start from kept weights (`weights_cache`) has fewer bytes to read.

Memory has its price, too: a page that the machine has never had, or that a virtual machine has
given back to its host, takes many times as long to be found as one that was just freed. So each
process loads twice: `load_s` includes the finding, `again_s` has the memory of the first load,
which is what the engine's own work takes. And each start waits until the memory of the one before
it is nobody's: without that, whoever comes second looks fast.

Each start is a process of its own; starts and `cat` take turns (A B A B ...), so that a machine
that speeds up or slows down meets all of them. "cold" drops the files from the page cache first
(posix_fadvise, no root needed). Memory is the kernel's own high-water mark over the final size.

Run: python bench/load.py [CHECKPOINT ...] [--repeats 3] [--quick] [--cold]
Without a checkpoint a random 0.5B is written to a temporary directory. Writes
bench/results/load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from rich.console import Console
from rich.table import Table

from sage_fed.engine import SHAPES, plan_checkpoint, write_checkpoint
from sage_fed.text import write_padded_tokenizer

PRECISIONS = ("bf16", "int8", "int4")
KEPT = ("int8", "int4")
TOKENIZER = Path(__file__).parents[1] / "sage_fed" / "models" / "demo-tactical"
MIB, GB = 2**20, 10**9
REST_S = 4.0
"""Between starts: a Linux guest gives free memory back to its host after two seconds."""

CHILD = """
import json, sys, time
began = time.perf_counter()
from sage_fed.engine import EngineOptions, load_engine
imported = time.perf_counter()

def kib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

options = EngineOptions(**json.loads(sys.argv[1]))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
loading = time.perf_counter()
engine = load_engine(options, lambda _: None)
loaded = time.perf_counter()
rss, peak = kib("VmRSS"), kib("VmHWM")
info = engine.info
engine.close()
del engine
reloading = time.perf_counter()
again = load_engine(options, lambda _: None)
reloaded = time.perf_counter()
print(json.dumps({
    "import_s": imported - began, "load_s": loaded - loading, "again_s": reloaded - reloading,
    "kernels": info.kernels, "weight_bytes": info.weight_bytes, "rss_bytes": 1024 * rss,
    "peak_above_final_bytes": 1024 * (peak - rss),
}))
"""


def start(checkpoint: Path, precision: str, cache: Path | None) -> dict[str, Any]:
    """One start in a process of its own."""
    options = {
        "model": str(checkpoint),
        "precision": precision,
        "kv_cache_bytes": 128 * MIB,
        "max_context_tokens": 1024,
        "num_valid_ids": 151665,
        "weights_cache": str(cache) if cache else "off",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(options)],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def weight_files(directory: Path) -> list[Path]:
    """What a start has to read."""
    return sorted(directory.glob("*.safetensors"))


def num_bytes(directory: Path) -> int:
    """Bytes of all weights."""
    return sum(path.stat().st_size for path in weight_files(directory))


def cat_s(directory: Path) -> float:
    """Seconds of `cat` over the weights."""
    began = time.perf_counter()
    subprocess.run(
        ["cat", *map(str, weight_files(directory))], stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - began


def forget(directory: Path) -> None:
    """Drop a directory's weights from the page cache; nothing of anybody else's."""
    for path in weight_files(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure(checkpoint: Path, scratch: Path, repeats: int, *, cold: bool) -> dict[str, Any]:
    """Every way to start, in turns with `cat`."""
    cases: list[tuple[str, str, Path | None]] = [(p, p, None) for p in PRECISIONS]
    for precision in KEPT:
        kept = scratch / f"{checkpoint.name}-{precision}"
        first = start(checkpoint, precision, kept)
        cases.append((f"{precision}, kept", precision, kept))
        print(f"{precision}: keeping took {first['load_s']:.2f} s in all", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in cases}
    cats: list[float] = []
    sources = {name: kept or checkpoint for name, _, kept in cases}
    for number in range(repeats + (0 if cold else 1)):
        if cold:
            forget(checkpoint)
        cats.append(cat_s(checkpoint))
        for name, precision, kept in cases:
            if cold:
                forget(sources[name])
            time.sleep(REST_S)
            runs[name].append(start(checkpoint, precision, kept))
        if not cold and number == 0:
            # The first round has warmed the page cache.
            cats.clear()
            for each in runs.values():
                each.clear()
    read = statistics.median(cats)
    size = num_bytes(checkpoint)
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_bytes": size,
        "pages": "cold" if cold else "cached",
        "cat_s": read,
        "cat_gb_per_s": size / read / GB,
        "starts": [summary(name, runs[name], num_bytes(sources[name])) for name, _, _ in cases],
    }


def summary(name: str, runs: list[dict[str, Any]], read_bytes: int) -> dict[str, Any]:
    """Medians and spread of one way to start."""
    seconds = [run["load_s"] for run in runs]
    median = statistics.median(seconds)
    again = statistics.median(run["again_s"] for run in runs)
    return {
        "case": name,
        "kernels": runs[0]["kernels"],
        "load_s": median,
        "load_s_min_max": [min(seconds), max(seconds)],
        "again_s": again,
        "again_s_min_max": [
            min(run["again_s"] for run in runs),
            max(run["again_s"] for run in runs),
        ],
        "import_s": statistics.median(run["import_s"] for run in runs),
        "read_bytes": read_bytes,
        "read_gb_per_s": read_bytes / median / GB,
        "again_gb_per_s": read_bytes / again / GB,
        "weight_bytes": runs[0]["weight_bytes"],
        "rss_bytes": max(run["rss_bytes"] for run in runs),
        "peak_above_final_bytes": max(run["peak_above_final_bytes"] for run in runs),
    }


def table(result: dict[str, Any]) -> Table:
    """What a person reads."""
    title = (
        f"{result['checkpoint']}, {result['checkpoint_bytes'] / GB:.2f} GB, {result['pages']}: "
        f"cat {result['cat_s']:.2f} s, {result['cat_gb_per_s']:.2f} GB/s"
    )
    columns = (
        "start",
        "kernels",
        "load s",
        "again s",
        "reads GB",
        "GB/s",
        "weights MiB",
        "peak above final MiB",
    )
    drawn = Table(*columns, title=title)
    for row in result["starts"]:
        drawn.add_row(
            row["case"], row["kernels"], f"{row['load_s']:.2f}",
            f"{row['again_s']:.2f}", f"{row['read_bytes'] / GB:.2f}",
            f"{row['read_gb_per_s']:.2f}, {row['again_gb_per_s']:.2f}",
            f"{row['weight_bytes'] / MIB:.0f}",
            f"{row['peak_above_final_bytes'] / MIB:.1f}",
        )  # fmt: skip
    return drawn


def random_half_billion(directory: Path, *, quick: bool) -> Path:
    """A checkpoint of the 0.5B's shape; with four layers where it has to be quick."""
    shape = SHAPES["qwen2.5-0.5b"]
    plan = plan_checkpoint(shape, num_layers=4 if quick else None)
    path = directory / "qwen2.5-0.5b"
    write_checkpoint(
        plan,
        path,
        seed=0,
        progress=lambda _: None,
        complete=lambda made: write_padded_tokenizer(TOKENIZER, made, shape.tokenizer_ids),
    )
    return path


def main() -> int:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, and a model of 4 layers")
    parser.add_argument("--cold", action="store_true", help="measure starts from the disk too")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    results = []
    with tempfile.TemporaryDirectory(prefix="sage-fed-load-") as folder:
        scratch = Path(folder)
        checkpoints = args.checkpoint or [random_half_billion(scratch, quick=args.quick)]
        for checkpoint in checkpoints:
            for cold in (False, True) if args.cold else (False,):
                results.append(measure(checkpoint, scratch, repeats, cold=cold))
                Console(stderr=True).print(table(results[-1]))
    report.write("load", {"repeats": repeats, "models": results}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
