"""Training data of the bundled pair: conversations made of tasks, cut into padded micro-batches.

Owns: the mix of families and grades per tier, chat rendering, which tokens carry loss.
Does not know: models and optimisers. A step's data is a pure function of (tier, seed, step), so a
resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from drills import draw_dense_drill, draw_drill
from tasks import FAMILIES, GRADES, Split, Task, generate
from tokenizer import END_OF_TEXT, SYSTEM_PROMPTS
from torch import Tensor
from transformers import Qwen2Tokenizer

NUM_EXAMPLES_PER_STEP = 64
NUM_MICRO_BATCHES = 6
_SYSTEM_SHARE = 0.08
_SECOND_TURN_SHARE = 0.08

_LATE_FAMILIES = ("count", "pick", "lookup", "follow")
_BASE_WEIGHTS = {
    "add": 1.6,
    "subtract": 1.6,
    "largest": 1.0,
    "reverse": 0.8,
    "sort": 0.8,
    "count": 1.3,
    "pick": 1.3,
    "shift": 0.8,
    "lookup": 1.3,
    "follow": 1.2,
    "brackets": 0.7,
}
# Families that a model of this size learns late, if at all, get more of the examples for a while.
_LATE_WEIGHTS = {
    name: weight * (1.8 if name in _LATE_FAMILIES else 1.0)
    for name, weight in _BASE_WEIGHTS.items()
}
# The last phase is for precision on what can be learnt in the time.
_LAST_WEIGHTS = _BASE_WEIGHTS | {
    "subtract": 2.0,
    "reverse": 1.4,
    "sort": 1.2,
    "shift": 1.2,
    "count": 0.8,
    "lookup": 0.8,
    "follow": 0.8,
}


@dataclass(frozen=True, slots=True)
class Phase:
    """What examples are drawn from, from step `start` on.

    The grades of `easy_families` begin easy at step `easy_start`, as long questions reuse what
    short ones teach. Of all examples `drill_share` are drills (see `drills`).
    """

    start: int
    weights: dict[str, float]
    easy_families: tuple[str, ...]
    easy_start: int
    drill_share: float = 0.0
    dense_drills: bool = False


_PHASES = {
    "tactical": (
        Phase(0, _BASE_WEIGHTS, tuple(_BASE_WEIGHTS), 0),
        Phase(4400, _LATE_WEIGHTS, _LATE_FAMILIES, 4400, 0.35),
    ),
    "strategic": (
        Phase(0, _LATE_WEIGHTS, _LATE_FAMILIES, 0, 0.2),
        Phase(300, _LATE_WEIGHTS, _LATE_FAMILIES, 0, 0.35, dense_drills=True),
        Phase(700, _LAST_WEIGHTS, (), 0),
    ),
}
_EASY_GRADES = (8.0, 4.0, 1.0, 0.5)
_GRADE_WEIGHTS = {"tactical": (4.0, 4.0, 3.0, 1.5), "strategic": (3.0, 4.0, 4.0, 3.0)}
_NUM_EASY_STEPS = {"tactical": 2000, "strategic": 800}


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
        pieces += [
            (opening + _user_turn(task.prompt), False),
            (f"{task.answer}<|im_end|>", True),
        ]
    return pieces


def _user_turn(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


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


def _grade_weights(tier: str, phase: Phase, family: str | None, step: int) -> list[float]:
    """From easy to the tier's own mix as the steps go by; None stands for drills."""
    begins_easy = family is None or family in phase.easy_families
    share = min(1.0, (step - phase.easy_start) / _NUM_EASY_STEPS[tier]) if begins_easy else 1.0
    pairs = zip(_EASY_GRADES, _GRADE_WEIGHTS[tier], strict=True)
    return [
        (1 - share) * easy / sum(_EASY_GRADES) + share * own / sum(_GRADE_WEIGHTS[tier])
        for easy, own in pairs
    ]


def training_step(tokenizer: Qwen2Tokenizer, tier: str, seed: int, step: int) -> list[MicroBatch]:
    """The micro-batches of one optimiser step."""
    rng = Random(f"{tier} {seed} {step}")
    phase = max((p for p in _PHASES[tier] if p.start <= step), key=lambda p: p.start)
    names, weights = tuple(phase.weights), tuple(phase.weights.values())
    draw = draw_dense_drill if phase.dense_drills else draw_drill
    conversations = []
    for _ in range(NUM_EXAMPLES_PER_STEP):
        if phase.drill_share and rng.random() < phase.drill_share:
            drill = draw(rng, _grade_weights(tier, phase, None, step))
            conversations.append([(_user_turn(drill.prompt), False), *drill.pieces])
            continue
        num_turns = 2 if rng.random() < _SECOND_TURN_SHARE else 1
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
        tasks = []
        for _ in range(num_turns):
            family = rng.choices(names, weights)[0]
            grade = rng.choices(GRADES, _grade_weights(tier, phase, family, step))[0]
            tasks.append(generate(rng, family, grade, "train"))
        conversations.append(_conversation(tasks, system))
    return micro_batches(tokenizer, conversations, NUM_MICRO_BATCHES)


def probe(
    tokenizer: Qwen2Tokenizer, family: str, grade: int, split: Split, num_tasks: int
) -> MicroBatch:
    """One batch of single-turn tasks from a cell of the accuracy table."""
    rng = Random(f"probe {family} {grade}")
    tasks = [generate(rng, family, grade, split) for _ in range(num_tasks)]
    return micro_batches(tokenizer, [_conversation([task], None) for task in tasks], 1)[0]


assert set(_BASE_WEIGHTS) == set(FAMILIES), "every trained family needs its weight"
