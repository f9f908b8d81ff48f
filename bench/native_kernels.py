"""How fast the native CPU kernels are: products by shape, and whole steps of a checkpoint.

The physics: a step with few rows reads every weight once and cannot be faster than memory; with
many rows it is bound by the cores' dot products. So the figure for few rows is bytes per second,
beside what a plain read of memory reaches in the same run, and for many rows operations per
second. Layers are taken from memory, never from the cache: together they are larger than it.
Each time is the best of several, interleaved rounds: noise only ever adds.
`torch` is oneDNN's bf16 product with the weights reordered for it.

Run: python bench/native_kernels.py [--quick] [--model DIR] [--precisions bf16,int8,int4] [--torch].
Products take a minute (20 s with --quick), steps of a 0.5B half a minute a precision.
Writes bench/results/kernels.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from rich.console import Console
from rich.table import Table

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine, read_bandwidth_bytes_per_s
from sage_fed.engine.native import Library, load_library
from sage_fed.engine.native.forward import Arena, PackedFormat
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

SHAPES = {
    "0.5B qkv": (1152, 896),
    "0.5B gate+up": (9728, 896),
    "0.5B down": (896, 4864),
    "7B gate+up": (37888, 3584),
    "7B down": (3584, 18944),
}
ROWS = (1, 4, 8, 16, 32, 512)
LAYERS_NBYTES = 160 * 2**20  # several times the last-level cache
DRAW = Draw(Sampling(), 0)


def best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of `rounds`."""
    fastest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def products(library: Library, kinds: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Bytes and operations per second of each kind, shape and number of rows."""
    found = []
    for name, (n, k) in SHAPES.items():
        weight = torch.randn(n, k) * 0.02
        for kind in kinds:
            run, nbytes = product_of(library, kind, weight)
            for rows in ROWS:
                seconds = run(rows, rounds if rows < 100 else 2)
                found.append(
                    {
                        "shape": name,
                        "kind": kind,
                        "rows": rows,
                        "seconds": seconds,
                        "bytes_per_s": nbytes / seconds,
                        "flop_per_s": 2 * rows * n * k / seconds,
                    }
                )
    return found


def product_of(
    library: Library, kind: str, weight: torch.Tensor
) -> tuple[Callable[[int, int], float], int]:
    """A function of rows and rounds to seconds for one product, and the weights' bytes."""
    n, k = weight.shape
    if kind == "torch":
        half = weight.bfloat16()
        layers = [
            torch.ops.mkldnn._reorder_linear_weight(half, 512)  # noqa: SLF001 - an operator's name
            for _ in range(max(1, LAYERS_NBYTES // half.nbytes))
        ]

        def by_torch(rows: int, rounds: int) -> float:
            x = torch.randn(rows, k).bfloat16()
            product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - an operator's name
            return best(
                lambda: [product(x, layer, None, "none", [], "") for layer in layers], rounds
            ) / len(layers)

        return by_torch, half.nbytes
    native, packed = PackedFormat(library, kind, Arena()), []
    while not packed or sum(layer.nbytes for layer in packed) < LAYERS_NBYTES:
        builder = native.builder(n, k, bias=False)
        builder.place_weight(0, weight)
        packed.append(builder.build())

    def by_us(rows: int, rounds: int) -> float:
        x, y = torch.randn(rows, k), torch.empty(rows, n)
        apply, at, to = library.linear_apply, x.data_ptr(), y.data_ptr()
        return best(lambda: [apply(layer.struct, at, rows, to) for layer in packed], rounds) / len(
            packed
        )

    return by_us, packed[0].nbytes


def steps(model: Path, precision: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of whole steps: decode by batch and context, and a prompt of 512."""
    options = EngineOptions(
        str(model), 1 << 30, precision=precision, kernels="native", max_context_tokens=4096
    )
    engine = load_engine(options, lambda _: None)
    found = []
    for batch in (1, 4, 8, 16, 32):
        for context in (32, 512):
            blocks = -(-(context + 1) // BLOCK_SIZE)
            chunks = tuple(
                Chunk(i, context, (5,), tuple(range(i * blocks, (i + 1) * blocks)), (DRAW,))
                for i in range(batch)
            )
            seconds = step_s(engine, chunks, rounds)
            found.append(
                {
                    "precision": precision,
                    "step": f"decode {batch}, context {context}",
                    "seconds": seconds,
                    "tokens_per_s": batch / seconds,
                    "bytes_per_s": engine.info.step_bytes / seconds,
                }
            )
    prompt = tuple(range(100, 612))
    seconds = step_s(engine, (Chunk(0, 0, prompt, tuple(range(33)), (DRAW,)),), 3)
    found.append(
        {
            "precision": precision,
            "step": "prompt of 512",
            "seconds": seconds,
            "tokens_per_s": 512 / seconds,
            "bytes_per_s": engine.info.step_bytes / seconds,
        }
    )
    engine.close()
    return found


def step_s(engine: Engine, chunks: tuple[Chunk, ...], rounds: int) -> float:
    """Seconds of a step, sampling included."""
    return best(lambda: engine.run(Step(Tier.TACTICAL, chunks)), rounds)


def show(title: str, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Print one table."""
    table = Table(title=title)
    names = [name for name in rows[0] if name not in {"seconds", "bytes_per_s", "flop_per_s"}]
    for name in (*names, "ms", "GB/s", "of read", "Gop/s"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[n]:.1f}" if isinstance(row[n], float) else str(row[n]) for n in names]
        rate = row["bytes_per_s"]
        speed = f"{row['flop_per_s'] / 1e9:.0f}" if "flop_per_s" in row else ""
        table.add_row(
            *cells,
            f"{row['seconds'] * 1e3:.3f}",
            f"{rate / 1e9:.1f}",
            f"{rate / bandwidth:.2f}",
            speed,
        )
    Console().print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, the small model's shapes"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint for whole steps")
    parser.add_argument("--precisions", default="bf16,int8,int4")
    parser.add_argument("--torch", action="store_true", help="oneDNN's bf16 products beside ours")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    library = load_library(torch.get_num_threads())
    if not isinstance(library, Library):
        sys.exit(f"no native kernels: {library.reason}")
    if arguments.quick:
        for name in [name for name in SHAPES if name.startswith("7B")]:
            del SHAPES[name]
    rounds = 5 if arguments.quick else 20
    precisions = arguments.precisions.split(",")
    bandwidth = max(read_bandwidth_bytes_per_s("cpu") for _ in range(5))
    kinds = [*precisions, "torch"] if arguments.torch else precisions
    by_shape = products(library, kinds, rounds)
    show(f"Products; memory is read at {bandwidth / 1e9:.1f} GB/s", by_shape, bandwidth)
    whole = []
    if arguments.model:
        for precision in precisions:
            whole += steps(arguments.model, precision, rounds)
        show("Whole steps", whole, bandwidth)
    report.write(
        "kernels",
        {
            "threads": torch.get_num_threads(),
            "read_bandwidth_bytes_per_s": bandwidth,
            "products": by_shape,
            "steps": whole,
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
