"""One engine in a process of its own: load, warm up, measure every cell, say so in JSON.

Owns: the order of one engine's measurements, its resident memory.
Does not know: the other engines; how an engine runs (its `peers_*` module).
Fails: with a traceback and a non-zero exit code, which `peers.py` records.

Run by `peers.py` as: python bench/peers_worker.py '{"engine": ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import peers_plan as plan


def measure(job: plan.Job) -> dict[str, Any]:
    """Every cell once, after a warm-up of each shape's kind."""
    module, variant = plan.ENGINES[job.engine]
    sizes = plan.SIZES[job.sizes]
    began = time.perf_counter()
    subject: plan.Subject = importlib.import_module(module).load(job, variant)
    load_s = time.perf_counter() - began

    for tokens in sizes.prompts:
        subject.run(plan.prompts(1, tokens, job.vocab, 99), 4)
    cells: dict[str, dict[str, float]] = {}
    first_tokens: list[int] = []
    for tokens in sizes.prompts:
        given = plan.prompts(1, tokens, job.vocab, job.seed)
        times, drawn = subject.run(given, sizes.new_tokens)
        cells[f"prompt {tokens}"] = plan.single(times)
        first_tokens = first_tokens or drawn[:8]
    rss = resident_bytes()
    for count in sizes.concurrent:
        # A batch size of its own may build its own kernels: two steps of it are not counted.
        warm = plan.prompts(count, sizes.concurrent_prompt, job.vocab, 77)
        subject.run(warm, 3)
        given = plan.prompts(count, sizes.concurrent_prompt, job.vocab, job.seed)
        times, _ = subject.run(given, sizes.concurrent_new)
        cells[f"concurrent {count}"] = plan.together(times)
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
    found = measure(plan.Job.parse(json.loads(sys.argv[1])))
    print(f"\n{json.dumps(found)}", flush=True)
    os._exit(0)  # some peers keep threads that no interpreter's end can join
