"""What each precision costs in quality, next to what it gains in speed, against bf16.

Physics first: decoding one sequence reads every weight once, so int8 can at most halve, and int4
at most quarter, the time of bf16; what is lost is how well four or eight bits stand for a weight.
Small models lose more: their layers have fewer weights to average an error over, and their
weights say more each.

Quality, on the bundled pair: questions of every family and grade with their true answers, each
answer token predicted from the true ones before it. That yields logits (largest error and KL
divergence against bf16), the perplexity of the answers, and the accuracy: greedy decoding gives
the exact answer if and only if the best token is the true one at every place of it.
On a checkpoint with random weights the same for random tokens, accuracy and perplexity aside.
Speed: decode steps of one sequence on each checkpoint given, in turns (A B A B ...).
"auto" kernels are the native ones where this machine has them; they round activations to 8 bits
for int8 and int4, which torch's do not.

Run: python bench/precision.py [--checkpoint DIR ...] [--questions 8] [--quick]
Writes bench/results/precision.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import report
import torch
from pair.tasks import ALL_FAMILIES, FAMILIES, GRADES, generate
from rich.console import Console
from rich.table import Table

from sage_fed.core import Message, Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw
from sage_fed.text import Tokenizer

MODELS = Path(__file__).parents[1] / "sage_fed" / "models"
PAIR = ("demo-tactical", "demo-strategic")
REFERENCE = ("bf16", "auto")
CASES = (
    REFERENCE, ("fp32", "auto"), ("fp16", "auto"), ("int8", "auto"), ("int4", "auto"),
    ("int8", "torch"), ("int4", "torch"),
)  # fmt: skip
BATCH = 32
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what truly follows it; `trained` is False for a family that never was."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    trained: bool = True


def questions(tokenizer: Tokenizer, each: int) -> list[Text]:
    """`each` test questions of every family and grade, with their answers."""
    (end,) = tokenizer._rust.encode("<|im_end|>").ids  # noqa: SLF001 - a template's own token
    texts = []
    for family in ALL_FAMILIES:
        for grade in GRADES:
            rng = Random(f"precision {family} {grade}")
            for _ in range(each):
                task = generate(rng, family, grade, "test")
                prompt = tokenizer.encode_messages([Message("user", task.prompt)])
                answer = (*tokenizer.encode_text(task.answer), end)
                texts.append(Text(prompt, answer, family in FAMILIES))
    return texts


def random_texts(num_ids: int, count: int) -> list[Text]:
    """Random tokens: what a model of random weights has learnt as much about as anything."""
    rng = Random(1)
    ids = [[rng.randrange(num_ids) for _ in range(48)] for _ in range(count)]
    return [Text(tuple(row[:32]), tuple(row[32:])) for row in ids]


def load(path: Path, precision: str, kernels: str, num_ids: int | None = None) -> Engine:
    """The model, for contexts of 512 tokens."""
    options = EngineOptions(
        str(path), 256 * MIB, precision=precision, kernels=kernels, max_context_tokens=512,
        num_valid_ids=num_ids,
    )  # fmt: skip
    return load_engine(options, lambda _: None)


@torch.inference_mode()
def logits_of(engine: Engine, texts: Sequence[Text]) -> list[torch.Tensor]:
    """Logits [len(answer), ids] at each place of each answer, fp32."""
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for first in range(0, len(texts), BATCH):
        batch = range(first, min(first + BATCH, len(texts)))
        blocks, used = {}, 0
        for i in batch:
            need = -(-(len(texts[i].prompt) + len(texts[i].answer)) // BLOCK_SIZE)
            blocks[i] = tuple(range(used, used + need))
            used += need
        assert used <= engine.num_blocks
        for place in range(max(len(texts[i].answer) for i in batch)):
            going = [i for i in batch if place < len(texts[i].answer)]
            for i, row in zip(going, _step(engine, texts, blocks, going, place), strict=True):
                found[i].append(row)
    return [torch.stack(rows) for rows in found]


def _step(
    engine: Engine,
    texts: Sequence[Text],
    blocks: dict[int, tuple[int, ...]],
    going: Sequence[int],
    place: int,
) -> list[torch.Tensor]:
    """The logits after the prompts (place 0), or after one more true token each."""
    chunks = []
    for i in going:
        prompt, answer = texts[i].prompt, texts[i].answer
        tokens, start = (
            (prompt, 0) if not place else ((answer[place - 1],), len(prompt) + place - 1)
        )
        chunks.append(Chunk(i, start, tokens, blocks[i], (Draw(Sampling(), place),)))
    forward = engine._forward  # noqa: SLF001 - clients get tokens, never bare logits
    assert forward is not None
    forwarded = forward.begin(chunks).advance(None)
    assert forwarded.logits is not None
    rows = forwarded.logits.float().clone()
    at = {index: row for row, index in enumerate(forwarded.drawing)}
    return [rows[at[number]] for number in range(len(chunks))]


def quality(
    texts: Sequence[Text], ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """One precision against the reference, on the same texts."""
    kl, worst, same, places, surprise, right = 0.0, 0.0, 0, 0, 0.0, 0
    for text, logits, expected in zip(texts, ours, reference, strict=True):
        p, q = expected.log_softmax(-1), logits.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        shift = (logits - logits.mean(-1, keepdim=True)) - (
            expected - expected.mean(-1, keepdim=True)
        )
        worst = max(worst, float(shift.abs().max()))
        best, answer = logits.argmax(-1), torch.tensor(text.answer)
        same += int((best == expected.argmax(-1)).sum())
        surprise -= float(q.gather(-1, answer[:, None]).sum()) if text.trained else 0.0
        right += text.trained and bool((best == answer).all())
        places += len(text.answer)
    trained = [text for text in texts if text.trained]
    return {
        "max_logit_error": worst,
        "mean_kl": kl / places,
        "same_best_token": same / places,
        "perplexity": math.exp(surprise / sum(len(text.answer) for text in trained)),
        "accuracy": right / len(trained),
        "num_questions": len(trained),
        "num_tokens": places,
    }


def measure_quality(path: Path, texts: Sequence[Text], num_ids: int | None) -> list[dict[str, Any]]:
    """Every case on one model."""
    rows: list[dict[str, Any]] = []
    reference: list[torch.Tensor] = []
    for precision, kernels in CASES:
        engine = load(path, precision, kernels, num_ids)
        logits = logits_of(engine, texts)
        reference = reference or logits
        rows.append(
            {
                "precision": precision,
                "kernels": engine.info.kernels,
                "step_bytes": engine.info.step_bytes,
                **quality(texts, logits, reference),
            }
        )
        engine.close()
    return rows


def decode_s(engine: Engine, steps: int) -> float:
    """Median seconds of a decode step of one sequence, after 32 tokens of prompt."""
    text = random_texts(400, 1)[0]
    blocks = {0: tuple(range(512 // BLOCK_SIZE))}
    with torch.inference_mode():
        _step(engine, [text], blocks, [0], 0)
        took = []
        long = Text(text.prompt, text.answer * 20)
        for place in range(1, steps + 5):
            began = time.perf_counter()
            _step(engine, [long], blocks, [0], place)
            took.append(time.perf_counter() - began)
    return statistics.median(took[4:])


def measure_speed(path: Path, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Decode tokens per second by case, in turns; each case is loaded anew in each round."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for precision, kernels in CASES:
            engine = load(path, precision, kernels)
            seconds.setdefault(f"{precision} {engine.info.kernels}", []).append(
                decode_s(engine, steps)
            )
            engine.close()
    return {
        case: {
            "decode_tokens_per_s": 1 / statistics.median(each),
            "slowest": 1 / max(each),
            "fastest": 1 / min(each),
        }
        for case, each in seconds.items()
    }


def table(model: dict[str, Any]) -> Table:
    """What a person reads."""
    drawn = Table(
        "precision", "kernels", "max logit error", "mean KL", "same best", "perplexity", "accuracy",
        "decode tok/s", "step MB", title=model["model"],
    )  # fmt: skip
    for row in model["quality"]:
        speed = model["speed"].get(f"{row['precision']} {row['kernels']}", {})
        drawn.add_row(
            row["precision"], row["kernels"], f"{row['max_logit_error']:.3f}",
            f"{row['mean_kl']:.5f}", f"{row['same_best_token']:.3%}", f"{row['perplexity']:.3f}",
            f"{row['accuracy']:.1%}", f"{speed.get('decode_tokens_per_s', math.nan):.1f}",
            f"{row['step_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return drawn


def main() -> int:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--questions", type=int, default=8, help="per family and grade")
    parser.add_argument("--rounds", type=int, default=3, help="of the speed")
    parser.add_argument("--steps", type=int, default=40, help="decode steps of a round")
    parser.add_argument("--quick", action="store_true", help="one question, one round, few steps")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    each, rounds, steps = (1, 1, 8) if args.quick else (args.questions, args.rounds, args.steps)
    models: list[dict[str, Any]] = []
    for path in [*(MODELS / name for name in PAIR), *args.checkpoint]:
        bundled = path.parent == MODELS
        tokenizer = Tokenizer.load(path)
        num_ids = tokenizer.num_valid_ids
        texts = questions(tokenizer, each) if bundled else random_texts(num_ids, 4 * each)
        models.append(
            {
                "model": path.name,
                "texts": "questions" if bundled else "random tokens",
                "quality": measure_quality(path, texts, num_ids),
                "speed": measure_speed(path, rounds, steps),
            }
        )
        Console(stderr=True, width=120).print(table(models[-1]))
    report.write("precision", {"reference": REFERENCE[0], "models": models}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
