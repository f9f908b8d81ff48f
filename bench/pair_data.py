"""Training data of the bundled pair: conversations made of tasks, cut into padded micro-batches.

Owns: the mix of families and grades per tier, chat rendering, which tokens carry loss.
Does not know: models and optimisers. A step's data is a pure function of (tier, seed, step), so a
resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from pair_tokenizer import END_OF_TEXT, SYSTEM_PROMPTS
from torch import Tensor
from transformers import Qwen2Tokenizer

from sage_fed.tasks import FAMILIES, GRADES, Split, Task, generate

NUM_EXAMPLES_PER_STEP = 128
NUM_MICRO_BATCHES = 8
_SYSTEM_SHARE = 0.08
_SECOND_TURN_SHARE = 0.08

# Families that a model of this size learns late get more of the examples.
_FAMILY_WEIGHTS = {
    "add": 2.0,
    "subtract": 2.0,
    "largest": 0.8,
    "reverse": 0.8,
    "sort": 0.8,
    "count": 1.6,
    "pick": 1.6,
    "shift": 0.8,
    "lookup": 1.4,
    "follow": 1.4,
    "brackets": 0.6,
}
_GRADE_WEIGHTS = {"tactical": (4, 4, 3, 1), "strategic": (3, 4, 4, 3)}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows padded on the right, and where loss is taken.

    token_ids: [batch, length] int64. places: [num_places] int64 flat positions in `token_ids` whose
    next token is `targets`. rows: [num_places] int64, the row of each place. weights: [num_places]
    float32, one over the root of the row's number of places: with equal weights the families with
    long answers took nearly all of the gradient, and one-token answers were not learnt.
    """

    token_ids: Tensor
    places: Tensor
    targets: Tensor
    rows: Tensor
    weights: Tensor


def _conversation(tasks: list[Task], system: str | None) -> list[tuple[str, bool]]:
    """ChatML as pieces of text, each with whether it carries loss: answers and their end do."""
    pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)] if system else []
    for turn, task in enumerate(tasks):
        opening = "" if turn == 0 else "\n"
        user = f"{opening}<|im_start|>user\n{task.prompt}<|im_end|>\n<|im_start|>assistant\n"
        pieces += [(user, False), (f"{task.answer}<|im_end|>", True)]
    return pieces


def micro_batches(
    tokenizer: Qwen2Tokenizer, conversations: list[list[tuple[str, bool]]], num: int
) -> list[MicroBatch]:
    """Encode, sort by length and cut into `num` batches, so that little is padding."""
    flat = [text for pieces in conversations for text, _ in pieces]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    rows: list[tuple[list[int], list[bool]]] = []
    for pieces in conversations:
        ids: list[int] = []
        loss: list[bool] = []
        for _, carries_loss in pieces:
            piece = next(encoded)
            ids += piece
            loss += [carries_loss] * len(piece)
        rows.append((ids, loss))
    rows.sort(key=lambda row: len(row[0]))
    size = -(-len(rows) // num)
    pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return [_pad(rows[start : start + size], pad) for start in range(0, len(rows), size)]


def _pad(rows: list[tuple[list[int], list[bool]]], pad: int) -> MicroBatch:
    length = max(len(ids) for ids, _ in rows) - 1
    token_ids, places, targets, owners, weights = [], [], [], [], []
    for row, (ids, loss) in enumerate(rows):
        token_ids.append((ids[:-1] + [pad] * length)[:length])
        for position in range(1, len(ids)):
            if loss[position]:
                places.append(row * length + position - 1)
                targets.append(ids[position])
                owners.append(row)
                weights.append(sum(loss) ** -0.5)
    columns = (token_ids, places, targets, owners, weights)
    return MicroBatch(*(torch.tensor(column) for column in columns))


def training_step(tokenizer: Qwen2Tokenizer, tier: str, seed: int, step: int) -> list[MicroBatch]:
    """The micro-batches of one optimiser step."""
    rng = Random(f"{tier} {seed} {step}")
    names, weights = tuple(_FAMILY_WEIGHTS), tuple(_FAMILY_WEIGHTS.values())
    conversations = []
    for _ in range(NUM_EXAMPLES_PER_STEP):
        num_turns = 2 if rng.random() < _SECOND_TURN_SHARE else 1
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
        tasks = [
            generate(
                rng,
                rng.choices(names, weights)[0],
                rng.choices(GRADES, _GRADE_WEIGHTS[tier])[0],
                "train",
            )
            for _ in range(num_turns)
        ]
        conversations.append(_conversation(tasks, system))
    return micro_batches(tokenizer, conversations, NUM_MICRO_BATCHES)


def probe(
    tokenizer: Qwen2Tokenizer, family: str, grade: int, split: Split, num_tasks: int
) -> MicroBatch:
    """One batch of single-turn tasks from a cell of the accuracy table."""
    rng = Random(f"probe {family} {grade}")
    tasks = [generate(rng, family, grade, split) for _ in range(num_tasks)]
    return micro_batches(tokenizer, [_conversation([task], None) for task in tasks], 1)[0]


assert set(_FAMILY_WEIGHTS) == set(FAMILIES), "every trained family needs its weight"
