r"""This engine beside llama.cpp, OpenVINO and `transformers`, on one random-weight checkpoint.

Physics first. One decoded token reads every weight once: 0.99 GB in bf16, half of it in int8, a
quarter and a bit in int4, so a machine that reads 45 GB/s cannot decode one sequence of the
0.5B shape faster than 45, 90 and some 160 tokens/s. Concurrent sequences share that reading, so
their limit is arithmetic, as it is for a prompt: about 1 GFLOP a token.

Each engine runs in a process of its own, one at a time, with the same threads, prompts (random
ids, no shared prefixes) and lengths, greedily and without an end-of-text. The rounds interleave
(A B C, A B C, ...) and every figure is the median over them; `spread` is (max - min) / median.
A peer that is not installed, or that fails, is in the table and the JSON as that. A ratio above 1
is ahead of the best peer of as many bits a weight; for times to the first token it is the peer's
time over ours.

Run: python bench/peers.py --peers-python PEERS/bin/python [--rounds 3] [--engines NAME ...]
Writes bench/results/peers.json. Three rounds of everything take 20 to 25 minutes on two cores,
the first run 3 minutes more for the checkpoint and its conversions, which are kept in --folder.
`--quick` is one short round (4 minutes); `--shape tiny` is a test of the script.

The peers' interpreter, on Debian 12 with gcc and cmake (llama.cpp builds for this CPU):
    python3 -m venv PEERS
    CMAKE_ARGS="-DGGML_NATIVE=ON" PEERS/bin/pip install --no-binary llama-cpp-python \
        llama-cpp-python
    PEERS/bin/pip install torch==2.13.0 openvino openvino-genai openvino-tokenizers nncf gguf \
        transformers==5.5.4 safetensors
    PEERS/bin/pip install --no-deps optimum==2.3.0 optimum-intel==2.2.0
`transformers` itself is measured under the interpreter that runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers_ours  # puts this checkout on the path
import peers_worker as plan
import report
from rich.console import Console
from rich.table import Table

from sage_fed.engine import SHAPES as REAL_SHAPES
from sage_fed.engine import plan_checkpoint, write_checkpoint
from sage_fed.engine.random_checkpoint import Shape

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORKER_S = 900.0
CONVERT_S = 900.0
_CONVERTERS = {"peers_llama": "llama", "peers_openvino": "openvino"}


SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": REAL_SHAPES["qwen2.5-0.5b"],
    "qwen2.5-1.5b": REAL_SHAPES["qwen2.5-1.5b"],
    "tiny": Shape(128, 2, 2, 1, 256, 1024, tied=True, tokenizer_ids=1024),
}
_TOKENIZER = ROOT / "sage_fed" / "models" / "demo-tactical"


@dataclass
class Found:
    """What is known of one engine: why it is missing, or what each round measured."""

    missing: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked for."""

    shape: str
    folder: Path
    peers_python: Path | None
    threads: int
    sizes: str
    rounds: int

    def python(self, module: str) -> Path | None:
        """The interpreter of a worker module; None where the peers have none."""
        return Path(sys.executable) if module in plan.OWN_PYTHON else self.peers_python


def measure(run: Run, engines: Sequence[str]) -> tuple[dict[str, Found], dict[str, Any]]:
    """Convert what has to be, then every engine once a round."""
    checkpoint = make_checkpoint(run.shape, run.folder)
    converted = run.folder / f"{run.shape}-converted"
    found = {name: Found(missing(name, run)) for name in engines}
    say("\n".join(f"{name}: {f.missing}" for name, f in found.items() if f.missing))
    notes = _convert(run, found, checkpoint, converted)
    for index in range(run.rounds):
        for name, engine in found.items():
            if engine.missing:
                continue
            say(f"round {index + 1} of {run.rounds}: {name}")
            job = {
                "engine": name, "checkpoint": str(checkpoint), "converted": str(converted),
                "sizes": run.sizes, "threads": run.threads, "seed": index,
                "vocab": SHAPES[run.shape].vocab,
            }  # fmt: skip
            module, _ = plan.ENGINES[name]
            record, failure = call(run, module, "peers_worker.py", [json.dumps(job)], WORKER_S)
            if record is None:
                engine.missing = failure
            else:
                engine.rounds.append(record | {"load_1min": os.getloadavg()[0]})
    return found, notes


def make_checkpoint(shape: str, folder: Path) -> Path:
    """The checkpoint of `shape` under `folder`; as it is where it is there already."""
    directory = folder / shape
    if not directory.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(
            plan_checkpoint(SHAPES[shape]),
            directory,
            seed=7,
            progress=lambda _: None,
            complete=_add_tokenizer,
        )
    return directory


def _add_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, directory / name)


def missing(name: str, run: Run) -> str:
    """Why an engine cannot be measured here; "" where it can."""
    module, variant = plan.ENGINES[name]
    if module == plan.OURS:
        return "" if variant in peers_ours.available() else f"no precision {variant} yet"
    if module == "peers_transformers":
        return ""
    if run.peers_python is None:
        return "not installed: give --peers-python"
    needs = {"peers_llama": "llama_cpp, gguf", "peers_openvino": "openvino_genai"}[module]
    probe = subprocess.run(
        [run.peers_python, "-c", f"import {needs}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return "" if probe.returncode == 0 else f"not installed: {_last_line(probe.stderr)}"


def _convert(
    run: Run, found: dict[str, Found], checkpoint: Path, converted: Path
) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for module, peer in _CONVERTERS.items():
        users = [f for name, f in found.items() if plan.ENGINES[name][0] == module]
        if all(user.missing for user in users):
            continue
        say(f"converting for {peer}")
        arguments = [str(checkpoint), str(converted)]
        record, failure = call(run, module, f"{module}.py", arguments, CONVERT_S)
        notes[peer] = record
        if record is None:
            for user in users:
                user.missing = f"conversion: {failure}"
    return notes


def call(
    run: Run, module: str, script: str, arguments: Sequence[str], limit_s: float
) -> tuple[dict[str, Any] | None, str]:
    """The JSON that a script's last line is, or what went wrong."""
    threads = str(run.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    try:
        done = subprocess.run(
            [str(run.python(module)), str(HERE / script), *arguments],
            capture_output=True, text=True, check=False, timeout=limit_s, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"not done in {limit_s:.0f} s"
    if done.returncode:
        return None, f"failed with {done.returncode}: {_last_line(done.stderr)}"
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record, ""


def summary(engine: Found) -> dict[str, Any]:
    """Medians and spreads over the rounds."""
    if not engine.rounds:
        return {"missing": engine.missing}
    last = engine.rounds[-1]
    cells = {
        name: {
            figure: middle([r["cells"][name][figure] for r in engine.rounds])
            for figure in last["cells"][name]
        }
        for name in last["cells"]
    }
    loads = {key: middle([r[key] for r in engine.rounds]) for key in ("load_s", "rss_bytes")}
    kept = {key: last[key] for key in ("versions", "notes", "first_tokens")}
    stopped = {"failed_later": engine.missing} if engine.missing else {}
    machine = [round(r["load_1min"], 2) for r in engine.rounds]
    return {"cells": cells, **loads, **kept, **stopped, "machine_load_1min": machine}


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, and the whole width of the rounds as a share of it."""
    median = statistics.median(values)
    return {"median": median, "spread": (max(values) - min(values)) / median}


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no message"])[-1][:300]


_SMALLER_IS_BETTER = frozenset({"ttft_s"})
_NOT_COMPARED = frozenset({"all_prefilled_s"})


def figures(engine: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Cell, figure, median."""
    for cell, values in engine.get("cells", {}).items():
        for figure, value in values.items():
            if figure not in _NOT_COMPARED:
                yield cell, figure, value["median"]


def ratios(engines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of our cells against the best peer that was measured there."""
    rows = []
    for ours, peers in plan.PRECISION_PEERS.items():
        theirs = {name: engines[name] for name in peers if engines.get(name, {}).get("cells")}
        for cell, figure, value in figures(engines.get(ours, {})):
            rivals = {name: _cell(engine, cell, figure) for name, engine in theirs.items()}
            if not rivals:
                continue
            smaller = figure in _SMALLER_IS_BETTER
            to = {
                name: round(theirs / value if smaller else value / theirs, 3)
                for name, theirs in rivals.items()
            }
            best = min(to, key=lambda name: to[name])
            rows.append(
                {
                    "engine": ours, "cell": cell, "figure": figure, "ours": value,
                    "best_peer": best, "best": rivals[best], "ratio": to[best],
                    "ratio_to_each": to,
                }
            )  # fmt: skip
    return rows


def _cell(engine: Mapping[str, Any], cell: str, figure: str) -> float:
    value: float = engine["cells"][cell][figure]["median"]
    return value


def show(engines: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Two tables on stderr."""
    console = Console(stderr=True, width=150, markup=False)
    cells = next((e["cells"] for e in engines.values() if e.get("cells")), {})
    singles = [cell for cell in cells if cell.startswith("prompt")]
    many = [cell for cell in cells if cell.startswith("concurrent")]
    table = Table("engine", title="medians; decode in tokens/s, first token in ms, RSS in GB")
    for cell in singles:
        for what in ("decode", "first", "prefill/s"):
            table.add_column(f"{what}\n{cell}", justify="right")
    for cell in many:
        table.add_column(cell.replace("concurrent ", "x"), justify="right")
    table.add_column("RSS", justify="right")
    for name, engine in engines.items():
        if not engine.get("cells"):
            table.add_row(name, str(engine["missing"])[:90])
            continue
        row = []
        for cell in singles:
            first_s = _cell(engine, cell, "ttft_s")
            decode = _cell(engine, cell, "decode_tokens_per_s")
            tokens = int(cell.split()[1])
            row += [f"{decode:.1f}", f"{first_s * 1e3:.0f}", f"{tokens / first_s:.0f}"]
        row += [f"{_cell(engine, cell, 'tokens_per_s'):.0f}" for cell in many]
        table.add_row(name, *row, f"{engine['rss_bytes']['median'] / 1e9:.2f}")
    console.print(table)
    versus = Table("ours", "cell", "figure", "ours", "best peer", "theirs", "ratio")
    for r in rows:
        numbers = (f"{r['ours']:.4g}", r["best_peer"], f"{r['best']:.4g}", f"{r['ratio']:.2f}")
        versus.add_row(r["engine"], r["cell"], r["figure"], *numbers)
    console.print(versus)


def main(run: Run, engines: Sequence[str], output: Path | None) -> None:
    """Measure, show, write."""
    found, notes = measure(run, engines)
    engines_found = {name: summary(engine) for name, engine in found.items()}
    compared = ratios(engines_found)
    show(engines_found, compared)
    result = {
        "shape": run.shape, "threads": run.threads, "rounds": run.rounds, "sizes": run.sizes,
        "engines": engines_found, "conversions": notes, "ratios": compared,
    }  # fmt: skip
    report.write("peers", result, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--engines", nargs="*", choices=tuple(plan.ENGINES), metavar="NAME")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="short lengths, one round")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    default = Path(tempfile.gettempdir()) / "sage-fed-peers"
    parser.add_argument("--folder", type=Path, default=default, help="keeps the checkpoint")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    asked = "tiny" if given.shape == "tiny" else "quick" if given.quick else "full"
    main(
        Run(
            given.shape,
            given.folder,
            given.peers_python,
            given.threads,
            asked,
            given.rounds or (3 if asked == "full" else 1),
        ),
        given.engines or plan.DEFAULT_ENGINES,
        given.output,
    )
