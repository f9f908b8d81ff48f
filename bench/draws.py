"""What a draw costs beside the step whose logits it is from.

The physics: a row of 151,936 fp32 logits is 0.6 MB, which one core reads from its cache in some
20 us; noise for every id would be 152,000 counters and two logarithms each. The limit that is set
for a row is 3 % of a one-row decode step of a 0.5B in bf16; the part of the step of as many rows
stands beside it.
Logits are normal numbers of two spreads: 2.5, of which top_p = 0.9 leaves thousands of ids, and 2.5
with a hundred ids ten above, which is closer to a trained model. Each time is the median of rounds
that take the kinds in turns with the step, so that a busy machine slows all; a step's best is
beside it.

Run: python bench/draws.py --model DIR [--rounds N]. A minute; writes bench/results/draws.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from rich.console import Console
from rich.table import Table

from sage_fed.core import Sampling, Tier
from sage_fed.engine import EngineOptions, load_engine
from sage_fed.engine.native import Library, load_library
from sage_fed.engine.sampling import pick
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

NUM_IDS = 151_936
ROWS = (1, 8, 32)
CONTEXT = 32
SEEN = tuple(range(0, 3000, 10))
KINDS = {
    "temperature": Sampling(temperature=1.0),
    "top_k": Sampling(temperature=1.0, top_k=50),
    "top_p": Sampling(temperature=1.0, top_p=0.9),
    "min_p": Sampling(temperature=1.0, min_p=0.05),
    "top_k, top_p": Sampling(temperature=0.7, top_k=20, top_p=0.8),
    "penalties": Sampling(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.5),
}
LIMIT = 0.03


def seconds_of(run: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def draws_of(sampling: Sampling, rows: int) -> list[Draw]:
    """As a step has them: seeds that differ, and 300 tokens to penalise where it does."""
    seen = SEEN if sampling.penalises else ()
    counts = tuple((token, 1) for token in seen)
    return [Draw(replace(sampling, seed=row), 7, seen, counts) for row in range(rows)]


def drawn_by(
    logits: torch.Tensor, draws: list[Draw], kernels: Library | None
) -> Callable[[], object]:
    """The draw of all rows as the engine asks for it."""
    return lambda: pick(logits, draws, None, kernels)


def logits_of(name: str, rows: int) -> torch.Tensor:
    """Random logits."""
    chance = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, NUM_IDS, generator=chance) * 2.5
    if name == "peaked":
        logits[:, :100] += 10.0
    return logits


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a 0.5B checkpoint")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--torch", action="store_true", help="the draws without kernels, too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    library = load_library(torch.get_num_threads())
    if not isinstance(library, Library):
        sys.exit(f"no native kernels: {library.reason}")
    options = EngineOptions(
        str(arguments.model), 1 << 29, precision="bf16", kernels="native", max_context_tokens=1024
    )
    engine = load_engine(options, lambda _: None)
    found: list[dict[str, Any]] = []
    one_row_s = 0.0
    for rows in ROWS:
        blocks = -(-(CONTEXT + 1) // BLOCK_SIZE)
        greedy = Draw(Sampling(), 0)
        step = Step(
            Tier.TACTICAL,
            tuple(
                Chunk(i, CONTEXT, (5,), tuple(range(i * blocks, (i + 1) * blocks)), (greedy,))
                for i in range(rows)
            ),
        )
        runs: dict[tuple[str, str, str], Callable[[], object]] = {}
        for shape in ("spread", "peaked"):
            logits = logits_of(shape, rows)
            for kind, sampling in KINDS.items():
                draws = draws_of(sampling, rows)
                runs[shape, kind, "native"] = drawn_by(logits, draws, library)
                if arguments.torch:
                    runs[shape, kind, "torch"] = drawn_by(logits, draws, None)
        times: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
        steps: list[float] = []
        run_step = partial(engine.run, step)
        run_step()
        for _ in range(arguments.rounds):
            for key, run in runs.items():
                times[key].append(seconds_of(run))
            steps += [seconds_of(run_step) for _ in range(2)]
        step_s = statistics.median(steps)
        one_row_s = one_row_s or min(steps)
        for (shape, kind, by), spent in times.items():
            found.append(
                {
                    "rows": rows,
                    "logits": shape,
                    "kind": kind,
                    "by": by,
                    "draw_ms_per_row": statistics.median(spent) / rows * 1e3,
                    "best_draw_ms_per_row": min(spent) / rows * 1e3,
                    "step_ms": step_s * 1e3,
                    "best_step_ms": min(steps) * 1e3,
                    "of_step": statistics.median(spent) / step_s,
                    "of_step_by_bests": min(spent) / min(steps),
                    "row_of_one_row_step": min(spent) / rows / one_row_s,
                }
            )
    engine.close()
    table = Table(title=f"Draws from {NUM_IDS} ids; the limit is {LIMIT:.0%} of a step")
    for name in found[0]:
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=180).print(table)
    report.write(
        "draws",
        {
            "threads": torch.get_num_threads(),
            "ids": NUM_IDS,
            "limit_of_step": LIMIT,
            "measured": found,
            "over_the_limit": [
                f"{row['kind']}, {row['logits']}, {row['rows']} rows"
                for row in found
                if row["by"] == "native" and row["row_of_one_row_step"] > LIMIT
            ],
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
