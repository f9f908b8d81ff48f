"""Drafts by a smaller model, ours beside assisted generation of transformers, on one pair.

Both run the same models in bf16 on the same prompts, greedily, one at a time, in interleaved
rounds; each is measured against itself without drafts. transformers makes its drafts with the
default schedule of `assistant_model` (it starts at 20 tokens and follows a confidence threshold),
and with a constant number of tokens.

Run: python bench/peers_speculation.py --tactical DIR --strategic DIR --human-eval FILE.jsonl.gz
     [--rounds 3] [--new 128] [--scenes humaneval prose] [--constant 4] [--output FILE]
Writes bench/results/peers_speculation.json.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import report
import torch
from speculation import Pair, S, T, opened, over_rounds, prompts_of, spread
from transformers import AutoModelForCausalLM, PreTrainedModel

from sage_fed.text import Tokenizer

OURS = ("plain", "speculative")


class Assisted:
    """transformers' `generate` on both models, with and without the assistant."""

    def __init__(self, tactical: str, strategic: str) -> None:
        self._assistant = _model(tactical)
        self._model = _model(strategic)

    def run(
        self, prompt: Sequence[int], num_new: int, num_drafted: int | None, *, assisted: bool
    ) -> tuple[tuple[int, ...], float]:
        """Return the new tokens, and how long they took.

        `num_drafted` is a constant number of draft tokens; None leaves the default schedule.
        """
        given = self._assistant.generation_config
        given.num_assistant_tokens = 20 if num_drafted is None else num_drafted
        given.num_assistant_tokens_schedule = "constant" if num_drafted else "heuristic"
        given.assistant_confidence_threshold = 0.0 if num_drafted else 0.4
        ids = torch.tensor([list(prompt)])
        began = time.monotonic()
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_new,
            assistant_model=self._assistant if assisted else None,
        )
        return tuple(made[0, len(prompt) :].tolist()), time.monotonic() - began


def _model(directory: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.eval()
    return model


async def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tactical", required=True)
    parser.add_argument("--strategic", required=True)
    parser.add_argument("--human-eval", type=Path, required=True)
    parser.add_argument("--scenes", nargs="+", default=["humaneval", "prose"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--constant", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.strategic)
    found = {}
    with torch.inference_mode():
        theirs = Assisted(args.tactical, args.strategic)
        async with opened({T: args.tactical, S: args.strategic}, "bf16", tokenizer) as (
            executor,
            engines,
        ):
            pair = Pair(executor, args.new, 0.0, ways=OURS)
            for kind in args.scenes:
                prompts = prompts_of(kind, args.rounds, tokenizer, args.human_eval, 256)
                found[kind] = await measure(pair, theirs, prompts, args.new, args.constant)
            kernels = engines[S].info.kernels
    report.write(
        "peers_speculation",
        {
            "models": [args.tactical.rpartition("/")[2], args.strategic.rpartition("/")[2]],
            "precision": "bf16",
            "kernels": kernels,
            "new_tokens": args.new,
            "rounds": args.rounds,
            "scenes": found,
        },
        args.output,
    )


async def measure(
    pair: Pair, theirs: Assisted, prompts: Sequence[tuple[int, ...]], num_new: int, constant: int
) -> dict[str, object]:
    """Each prompt in every way; tokens a second, and as multiples of each one's own without."""
    others: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], float]]] = {
        "transformers plain": lambda p: theirs.run(p, num_new, None, assisted=False),
        "transformers assisted": lambda p: theirs.run(p, num_new, None, assisted=True),
        f"transformers assisted, {constant} tokens": lambda p: theirs.run(
            p, num_new, constant, assisted=True
        ),
    }
    for way in OURS:
        await pair.run(prompts[:1], 1, way, ())
    for way in others.values():
        way(prompts[0][:8])
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    equal: dict[str, int] = defaultdict(int)
    for prompt in prompts:
        first: dict[str, tuple[int, ...]] = {}
        for way in OURS:
            run = await pair.run([prompt], 1, way, ())
            rows[f"ours {way}"].append({"tokens_per_s": run.rate})
            equal[f"ours {way}"] += run.outputs[0] == first.setdefault("ours", run.outputs[0])
        for name, generate in others.items():
            tokens, seconds = generate(prompt)
            rows[name].append({"tokens_per_s": len(tokens) / seconds})
            equal[name] += tokens == first.setdefault("theirs", tokens)
    return {
        "tokens_per_s": {name: over_rounds(each)["tokens_per_s"] for name, each in rows.items()},
        "times_plain": {
            name: spread(
                [
                    one["tokens_per_s"] / plain["tokens_per_s"]
                    for one, plain in zip(
                        each,
                        rows["ours plain" if name.startswith("ours") else "transformers plain"],
                        strict=True,
                    )
                ]
            )
            for name, each in rows.items()
        },
        "outputs_equal_to_its_plain": dict(equal),
        "outputs": len(prompts),
    }


if __name__ == "__main__":
    asyncio.run(main())
