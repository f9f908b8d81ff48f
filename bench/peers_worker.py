"""One engine in a process of its own: load, warm up, measure every cell, say so in JSON.

Owns: the engines by name, the sizes of every measurement, prompts, the order of one engine's
measurements, its resident memory, the arithmetic from token times to rates. Standard library
only: it runs under the peers' own interpreter too.
Does not know: how an engine runs (its `peers_*` module).
Fails: with a traceback and a non-zero exit code, which `peers.py` records.

Run by `peers.py` as: python bench/peers_worker.py '{"engine": ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ENGINES: dict[str, tuple[str, str]] = {
    # name -> (worker module, variant)
    "sage_fed fp32": ("peers_ours", "fp32"),
    "sage_fed bf16": ("peers_ours", "bf16"),
    "sage_fed int8": ("peers_ours", "int8"),
    "sage_fed int4": ("peers_ours", "int4"),
    "transformers generate bf16": ("peers_transformers", "generate"),
    "transformers continuous bf16": ("peers_transformers", "continuous"),
    "llama.cpp BF16": ("peers_llama", "BF16"),
    "llama.cpp Q8_0": ("peers_llama", "Q8_0"),
    "llama.cpp Q4_0": ("peers_llama", "Q4_0"),
    "OpenVINO fp16": ("peers_openvino", "fp16"),
    "OpenVINO int8": ("peers_openvino", "int8"),
}

DEFAULT_ENGINES = tuple(name for name in ENGINES if name != "sage_fed fp32")
"""Nobody else here computes in fp32, so it says nothing beside them."""

OURS = "peers_ours"
OWN_PYTHON = frozenset({OURS, "peers_transformers"})
"""Modules that run under this project's interpreter; the others under the peers'."""

PRECISION_PEERS: dict[str, tuple[str, ...]] = {
    "sage_fed bf16": (
        "transformers generate bf16",
        "transformers continuous bf16",
        "llama.cpp BF16",
        "OpenVINO fp16",
    ),
    "sage_fed int8": ("llama.cpp Q8_0", "OpenVINO int8"),
    "sage_fed int4": ("llama.cpp Q4_0",),
}
"""Whom each of our precisions is compared with: as many bits a weight, or next to it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Prompt lengths and new tokens of one sequence, and of concurrent ones."""

    prompts: tuple[int, ...]
    new_tokens: int
    concurrent: tuple[int, ...]
    concurrent_prompt: int
    concurrent_new: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(
            max(self.prompts) + self.new_tokens, self.concurrent_prompt + self.concurrent_new
        )


FULL = Sizes((32, 512), 100, (1, 4, 8, 16, 32), 32, 64)
QUICK = Sizes((32, 512), 32, (1, 8, 32), 32, 16)
TINY = Sizes((8, 24), 6, (1, 3), 8, 4)
SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}

Times = list[list[float]]
"""For each sequence, when each of its tokens came, in seconds since all were submitted."""


class Subject(Protocol):
    """One engine with the checkpoint loaded: what a worker module's `load` returns."""

    versions: dict[str, str]
    notes: dict[str, str]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Times, list[int]]:
        """Decode greedily, without an end-of-text; times, and the first sequence's tokens."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker process is told. `checkpoint` is a safetensors directory."""

    engine: str
    checkpoint: Path
    converted: Path
    sizes: str
    threads: int
    vocab: int
    seed: int

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Job:
        """From the JSON of the command line."""
        paths = {name: Path(raw[name]) for name in ("checkpoint", "converted")}
        return cls(**{**raw, **paths})


def prompts(count: int, tokens: int, vocab: int, seed: int) -> list[list[int]]:
    """Random ids; no two sequences share a prefix, so that no cache of prefixes can help."""
    source = random.Random(f"{seed} {count} {tokens}")
    # Low ids are special tokens to some engines.
    return [[source.randrange(vocab // 8, vocab) for _ in range(tokens)] for _ in range(count)]


def single(times: Times) -> dict[str, float]:
    """Time to the first token, and the rate of those after it."""
    (stamps,) = times
    return {
        "ttft_s": stamps[0],
        "decode_tokens_per_s": (len(stamps) - 1) / (stamps[-1] - stamps[0]),
    }


def together(times: Times) -> dict[str, float]:
    """Tokens per second of all sequences from when the last of them has its first token."""
    began = max(stamps[0] for stamps in times)
    ended = max(stamps[-1] for stamps in times)
    late = sum(1 for stamps in times for stamp in stamps if stamp > began)
    return {"tokens_per_s": late / (ended - began), "all_prefilled_s": began}


def measure(job: Job) -> dict[str, Any]:
    """Every cell once, after a warm-up of each shape's kind."""
    module, variant = ENGINES[job.engine]
    sizes = SIZES[job.sizes]
    began = time.perf_counter()
    subject: Subject = importlib.import_module(module).load(job, variant)
    load_s = time.perf_counter() - began

    for tokens in sizes.prompts:
        subject.run(prompts(1, tokens, job.vocab, 99), 4)
    cells: dict[str, dict[str, float]] = {}
    first_tokens: list[int] = []
    for tokens in sizes.prompts:
        given = prompts(1, tokens, job.vocab, job.seed)
        times, drawn = subject.run(given, sizes.new_tokens)
        cells[f"prompt {tokens}"] = single(times)
        first_tokens = first_tokens or drawn[:8]
    rss = resident_bytes()
    for count in sizes.concurrent:
        # A batch size of its own may build its own kernels: two steps of it are not counted.
        warm = prompts(count, sizes.concurrent_prompt, job.vocab, 77)
        subject.run(warm, 3)
        given = prompts(count, sizes.concurrent_prompt, job.vocab, job.seed)
        times, _ = subject.run(given, sizes.concurrent_new)
        cells[f"concurrent {count}"] = together(times)
    return {
        "engine": job.engine,
        "load_s": load_s,
        "rss_bytes": rss,
        "rss_concurrent_bytes": resident_bytes(),
        "versions": subject.versions,
        "notes": subject.notes,
        "first_tokens": first_tokens,
        "cells": cells,
    }


def resident_bytes() -> int:
    """This process's memory, pages of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    found = measure(Job.parse(json.loads(sys.argv[1])))
    print(f"\n{json.dumps(found)}", flush=True)
    os._exit(0)  # some peers keep threads that no interpreter's end can join
