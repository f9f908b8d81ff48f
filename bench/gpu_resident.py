"""Both models on one device at once: what memory they take, and whether they compute at all.

Owns: building the pair, the memory's account, a run of both with finite probabilities and ids
that the tokenizer knows. Does not know: a reference (random weights of this size have none
here; `gpu_correctness` has the small ones).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from random import Random
from typing import Any

import torch
from gpu_correctness import ids, ragged
from gpu_shapes import Filling, Plan

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine
from sage_fed.steps import BLOCK_SIZE, SampledToken

_PROMPTS = (5, 40, 17, 100)
"""Tokens of each; one sequence joins late, one leaves early."""


def resident(
    build: Callable[[], dict[Tier, Engine]],
    fillings: Mapping[Tier, Filling],
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """Build the pair, then run tactical, strategic and tactical again on the same prompts."""
    before = _memory(device)
    began = time.perf_counter()
    engines = build()
    built_s = time.perf_counter() - began
    built = _memory(device)
    shapes = {Tier.TACTICAL: plan.tactical, Tier.STRATEGIC: plan.strategic}
    prompts = {tier: _prompts(min(shape.valid_ids, shape.vocab)) for tier, shape in shapes.items()}
    sampling = Sampling(top_logprobs=1)
    answers: dict[Tier, dict[int, list[SampledToken]]] = {}
    for tier, engine in engines.items():
        answers[tier] = ragged(engine, prompts[tier], 64, sampling)
    once = answers[Tier.TACTICAL]
    again = ragged(engines[Tier.TACTICAL], prompts[Tier.TACTICAL], 64, sampling)
    models = {
        tier.name: {
            **asdict(engine.info),
            "kv_tokens": engine.num_blocks * BLOCK_SIZE,
            "filled": asdict(fillings[tier]),
            **_verdict(answers[tier], shapes[tier].valid_ids),
        }
        for tier, engine in engines.items()
    }
    good = all(
        model["finite"] and model["valid_ids"] and model["distinct_ids"] > 1
        and not model["filled"]["not_finite"] and not model["filled"]["denormal"]
        for model in models.values()
    )  # fmt: skip
    return {
        "ok": good,
        "built_s": built_s,
        "models": models,
        "tactical_repeatable": all(ids(once[job]) == ids(again[job]) for job in once),
        "memory": {"before": before, "built": built, "after_steps": _memory(device)},
    }


def _prompts(num_ids: int) -> dict[int, tuple[int, ...]]:
    random = Random(num_ids)
    return {
        job: tuple(random.randrange(num_ids) for _ in range(length))
        for job, length in enumerate(_PROMPTS)
    }


def _verdict(answers: Mapping[int, list[SampledToken]], valid_ids: int) -> dict[str, Any]:
    """A NaN or an infinity in any logit of a row makes its log-probability not finite."""
    drawn = [d for row in answers.values() for d in row]
    return {
        "tokens": len(drawn),
        "finite": all(d.logprob and math.isfinite(d.logprob.logprob) for d in drawn),
        "valid_ids": all(0 <= d.token_id < valid_ids for d in drawn),
        "distinct_ids": len({d.token_id for d in drawn}),
    }


def _memory(device: torch.device) -> dict[str, int] | None:
    """Bytes on the device; None on the CPU, where the process shares them with everything."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {
        "free": free,
        "total": total,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
    }
