"""Every precision of both shapes: how fast, how near to its bytes, and the ratio between tiers.

Owns: one engine at a time, captured, and the same one with its graphs left alone; decode at the
plan's batches, tokens by either way, what loading and capturing took. Does not know: correctness
against a reference (`gpu_correctness`).

A narrower precision reads fewer bytes, so it has to be faster by about their ratio: int8 1.9, int4
3.3 of bf16 with its int8 head. The ratio between the tiers is that of their bytes where a step is
all reading, and falls towards that of their layers where it is all launching; `fit` says which.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_env
import torch
from gpu_shapes import Filling, Plan, Shape, random_engine
from gpu_speed import Left, Sequences, decode_point, fill, fit, ratios

from sage_fed.core import TIER_ROLES, Sampling, Tier
from sage_fed.engine import Engine
from sage_fed.engine.cuda_graphs import GraphForward
from sage_fed.steps import Chunk, Draw, Step

_CONTEXT = 128
_EQUAL_TOKENS = 24


def precisions(plan: Plan, device: torch.device, kernels: str, left: Left) -> dict[str, Any]:
    """Both tiers in every precision that time and device allow; the others are `cut`."""
    read = gpu_env.limits(device, plan.read_bytes, plan.matrix)["read_limit_bytes_per_s"]
    # Only what is measured here is captured: the largest batch, one width.
    plan = dataclasses.replace(plan, contexts=(_CONTEXT,), prefills=(_CONTEXT // 2, _CONTEXT))
    rows: dict[str, Any] = {}
    cut: list[str] = []
    for precision in plan.precisions:
        pair: list[Sequences] = []
        decode: list[dict[str, Any]] = []
        for tier, shape in ((Tier.STRATEGIC, plan.strategic), (Tier.TACTICAL, plan.tactical)):
            if left() <= 0:
                cut.append(f"{precision} {tier.name}")
                continue
            build = partial(random_engine, device=str(device), precision=precision, kernels=kernels)
            try:
                row, sequences = _one(tier, shape, plan, read, build)
            except Exception as error:
                if type(error).__name__ == "PartTimeout":  # `gpu`'s own, which is `__main__`
                    raise
                row = {"error": f"{type(error).__name__}: {error}"[:1000], "equal": False}
            else:
                pair.insert(0, sequences)
                decode += row["decode"]
            rows.setdefault(precision, {})[tier.name] = row
        if len(pair) == 2:
            rows[precision]["fit"] = fit(pair, decode)
            rows[precision]["ratio"] = ratios(decode, ("batch", "context"))
    measured = [
        row for tiers in rows.values() for row in (tiers.get(t.name) for t in TIER_ROLES) if row
    ]
    return {
        "ok": all(row["equal"] for row in measured),
        "read_limit_bytes_per_s": read,
        "precisions": rows,
        "speedup_over_bf16": _speedups(rows),
        "cut": cut,
    }


def _one(
    tier: Tier,
    shape: Shape,
    plan: Plan,
    read: float,
    build: Callable[..., tuple[Engine, Filling]],
) -> tuple[dict[str, Any], Sequences]:
    small = dataclasses.replace(shape, max_context=2 * _CONTEXT)
    began = time.perf_counter()
    engine, _ = build(small, seed=tier.rank, max_batch=max(plan.precision_batches))
    built_s = time.perf_counter() - began
    try:
        batches = dataclasses.replace(plan, batches=plan.precision_batches)
        sequences = fill(tier, small, engine, batches)
        decode = [decode_point(sequences, b, _CONTEXT, plan, read) for b in plan.precision_batches]
        captured = _answers(engine, sequences)
        forward = engine._forward  # noqa: SLF001 - to leave its graphs alone
        assert isinstance(forward, GraphForward)
        forward._buckets = None  # noqa: SLF001 - likewise
        plain = _answers(engine, sequences)
        eager = [
            decode_point(sequences, b, _CONTEXT, plan, read) for b in plan.precision_batches[:2]
        ]
    finally:
        engine.close()
    same = sum(a == b for a, b in zip(captured, plain, strict=True))
    row = {
        # Random weights make near ties: the first tokens have to agree, the last ones may part.
        "equal": captured[0] == plain[0],
        "equal_tokens": same,
        "of_tokens": len(plain),
        "info": dataclasses.asdict(engine.info),
        "built_s": built_s,
        "decode": decode,
        "uncaptured": eager,
    }
    return row, sequences


def _answers(engine: Engine, sequences: Sequences) -> list[int]:
    """Greedy tokens of one sequence behind its filled context."""
    start = _CONTEXT - 1
    token, answer = sequences.tokens[0][start], []
    for number in range(_EQUAL_TOKENS):
        position = start - _EQUAL_TOKENS + number
        chunk = Chunk(0, position, (token,), sequences.blocks[0], (Draw(Sampling(), number),))
        (drawn,) = engine.run(Step(sequences.tier, (chunk,)))
        token = drawn.token_id
        answer.append(token)
    return answer


def _speedups(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Times of bf16 over each other precision's, at batch 1."""
    found: dict[str, dict[str, float]] = {}
    for precision in rows:
        for tier in TIER_ROLES:
            base, own = (
                _batch_1(rows.get(name, {}).get(tier.name)) for name in ("bf16", precision)
            )
            if base and own and precision != "bf16":
                found.setdefault(precision, {})[tier.name] = base / own
    return found


def _batch_1(row: dict[str, Any] | None) -> float | None:
    decode: Sequence[dict[str, Any]] = (row or {}).get("decode") or ()
    return next((r["in_flight_s"] or r["median_s"] for r in decode if r["batch"] == 1), None)
