"""Measures the bundled pair on test questions and writes the table of its model card.

    python bench/pair/evaluate.py

Greedy decoding by `transformers` from the shipped files, float32 arithmetic on their bfloat16
weights, exact match, every family by grade, the family that was held out of training too.
Writes `bench/results/pair_accuracy.json` and `sage_fed/models/MODEL_CARD.md`.
Does not know: how the models were trained, beyond what their training log says.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import sys
from pathlib import Path
from random import Random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch
import transformers
from card import render_card
from rich.console import Console
from rich.progress import track
from tasks import ALL_FAMILIES, GRADES, Task, generate, is_correct
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "sage_fed" / "models"
RESULTS = REPOSITORY / "bench" / "results"
TIERS = ("tactical", "strategic")
_MAX_NEW_TOKENS = 20
_Z = 1.959963984540054  # two-sided 95 %


def wilson_interval(num_correct: int, num_tasks: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); it stays inside [0, 1]."""
    share, z2 = num_correct / num_tasks, _Z**2
    centre = (share + z2 / (2 * num_tasks)) / (1 + z2 / num_tasks)
    spread = math.sqrt(share * (1 - share) / num_tasks + z2 / (4 * num_tasks**2))
    spread *= _Z / (1 + z2 / num_tasks)
    return centre - spread, centre + spread


def test_tasks(family: str, grade: int, num_tasks: int) -> list[Task]:
    """The fixed test questions of one cell, no prompt twice.

    The easiest grade of `brackets` has fewer different prompts than are asked for; a cell then
    holds those that a generous number of draws has found.
    """
    rng = Random(f"evaluation {family} {grade}")
    by_prompt: dict[str, Task] = {}
    for _ in range(30 * num_tasks):
        task = generate(rng, family, grade, "test")
        by_prompt[task.prompt] = task
        if len(by_prompt) == num_tasks:
            break
    return list(by_prompt.values())


def answers(model: PreTrainedModel, tokenizer: object, prompts: list[str]) -> list[str]:
    """Greedy replies to single-turn prompts, all in one batch padded on the left."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    batch = tokenizer(rendered, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    replies = output[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(replies, skip_special_tokens=True))


def evaluate(tier: str, num_tasks: int, console: Console) -> dict[str, object]:
    """One tier's cells and what its files weigh."""
    folder = MODELS / f"demo-{tier}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cells = []
    every = [(family, grade) for family in ALL_FAMILIES for grade in GRADES]
    for family, grade in track(every, tier, console=console, disable=not console.is_terminal):
        tasks = test_tasks(family, grade, num_tasks)
        replies = answers(model, tokenizer, [task.prompt for task in tasks])
        num_correct = sum(map(is_correct, tasks, replies))
        low, high = wilson_interval(num_correct, len(tasks))
        cells.append(
            {
                "family": family,
                "grade": grade,
                "num_correct": num_correct,
                "num_tasks": len(tasks),
                "accuracy": num_correct / len(tasks),
                "low": low,
                "high": high,
            }
        )
    return {
        "num_params": sum(p.numel() for p in model.parameters()),
        "num_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "config": {
            key: getattr(model.config, key)
            for key in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
                "tie_word_embeddings",
            )
        },
        "training": json.loads((RESULTS / f"pair_training_{tier}.json").read_text()),
        "cells": cells,
    }


def machine() -> str:
    """The processor's name and how many cores this process may use."""
    names = {
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return f"{', '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores"


def main() -> int:
    """Evaluate both tiers, write the JSON and the card, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tasks", type=int, default=200, help="test questions per cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    result = {
        "benchmark": "pair_accuracy",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "tiers": {tier: evaluate(tier, args.num_tasks, console) for tier in TIERS},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pair_accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    card = render_card(result)
    (MODELS / "MODEL_CARD.md").write_text(card)
    console.print(card)
    means = {
        tier: sum(cell["accuracy"] for cell in of["cells"]) / len(of["cells"])
        for tier, of in result["tiers"].items()
    }
    print(json.dumps({"benchmark": "pair_accuracy", "mean_accuracy": means}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
