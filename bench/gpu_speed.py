"""How fast each tier is alone, as a share of what the device could do.

Owns: decode and prefill steps of chosen sizes on a resident pair, their times, the bytes and
operations that each has to move, launch overhead, the ratio between the tiers.
Does not know: schedulers and streams; a step here is what the executor would hand over.

A step's time is the executor's: from the call to the tokens on the host; beside it stands that of
a step behind which the next is in flight already, which is what the device alone takes. Both
tiers are timed one after the other at every point, so a device that changes its clocks changes
them for both.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import gpu_env
import torch
from gpu_shapes import Plan, Shape, hollow, random_engine

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

_GREEDY = Draw(Sampling(), 0)
_SPREAD_TOKENS = 16
"""Contexts of a batch differ by up to this many tokens, as those of real streams do."""

Left = Callable[[], float]
"""Seconds that the part has left."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """As many as the largest batch, each with a filled context of its own on scattered blocks."""

    tier: Tier
    shape: Shape
    engine: Engine
    tokens: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...]

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of cache that one token takes over all layers."""
        return self.engine.info.kv_cache_bytes / (self.engine.num_blocks * BLOCK_SIZE)

    def decode(self, lengths: Sequence[int]) -> Step:
        """The step that adds token `length` to each sequence, which attends to `length`."""
        return self._step(
            Chunk(i, length - 1, (self.tokens[i][length - 1],), self.blocks[i], (_GREEDY,))
            for i, length in enumerate(lengths)
        )

    def prefill(self, number: int, start: int, tokens: int, *, draws: bool = True) -> Step:
        """The step that feeds one sequence's tokens from `start` on."""
        piece = self.tokens[number][start : start + tokens]
        drawn = (_GREEDY,) if draws else ()
        return self._step([Chunk(number, start, piece, self.blocks[number], drawn)])

    def _step(self, chunks: Iterable[Chunk]) -> Step:
        return Step(self.tier, tuple(chunks))


def fill(tier: Tier, shape: Shape, engine: Engine, plan: Plan) -> Sequences:
    """Prefill every sequence to the longest context, and the first to the longest prompt."""
    random = Random(shape.name)
    lengths = [max(plan.contexts)] * max(plan.batches)
    lengths[0] = max(*plan.contexts, *plan.prefills)
    order = list(range(engine.num_blocks))
    random.shuffle(order)
    blocks = [tuple(order.pop() for _ in range(-(-n // BLOCK_SIZE))) for n in lengths]
    tokens = [tuple(random.randrange(shape.valid_ids) for _ in range(n)) for n in lengths]
    sequences = Sequences(tier, shape, engine, tuple(tokens), tuple(blocks))
    for number, length in enumerate(lengths):
        for start in range(0, length, plan.chunk_tokens):
            engine.run(sequences.prefill(number, start, plan.chunk_tokens, draws=False))
    return sequences


def speed(
    pair: Sequence[Sequences], plan: Plan, device: torch.device, left: Left
) -> dict[str, Any]:
    """Every point of both tiers; points that no time was left for are listed as `cut`."""
    limits = gpu_env.limits(device, plan.read_bytes, plan.matrix)
    read, flops = limits["read_limit_bytes_per_s"], limits["bf16_matrix_flops_per_s"]
    decode: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    cut: list[str] = []
    overhead = [launches(s, plan, device) for s in pair]
    for start, tokens in _prefill_points(plan):
        for s in pair:
            if left() <= 0:
                cut.append(f"prefill {s.tier.name} {start}+{tokens}")
                continue
            timed = times(s, s.prefill(0, start, tokens), plan)
            needed = s.shape.prefill_flops(tokens, start)
            rate = needed / timed["median_s"]
            prefill.append(
                {
                    "tier": s.tier.name, "cached": start, "tokens": tokens, **timed,
                    "tokens_per_s": tokens / timed["median_s"], "flops": needed,
                    "share_of_matrix_rate": rate / flops,
                }
            )  # fmt: skip
    # The most wanted first, in case that time runs out: short contexts, then longer ones.
    for context in plan.contexts:
        for batch in plan.batches:
            for s in pair:
                if left() <= 0:
                    cut.append(f"decode {s.tier.name} {batch}x{context}")
                    continue
                decode.append(decode_point(s, batch, context, plan, read))
    return {
        "limits": limits,
        "decode": decode,
        "prefill": prefill,
        "overhead": overhead,
        "fit": fit(pair, decode),
        "ratio": ratios(decode, ("batch", "context")) + ratios(prefill, ("cached", "tokens")),
        "cut": cut,
        "telemetry_after": gpu_env.telemetry(device),
    }


def decode_point(s: Sequences, batch: int, context: int, plan: Plan, read: float) -> dict[str, Any]:
    """One batch at one context: its time beside that of the bytes that it has to read."""
    lengths = [context - i % _SPREAD_TOKENS for i in range(batch)]
    timed = times(s, s.decode(lengths), plan)
    nbytes = s.engine.info.step_bytes + sum(lengths) * s.kv_bytes_per_token
    return {
        "tier": s.tier.name, "batch": batch, "context": context, **timed,
        "tokens_per_s": batch / timed["median_s"], "bytes": round(nbytes),
        "share_of_read_limit": nbytes / read / timed["median_s"],
        "share_in_flight": nbytes / read / (timed["in_flight_s"] or timed["median_s"]),
    }  # fmt: skip


def times(s: Sequences, step: Step, plan: Plan) -> dict[str, Any]:
    """Median and spread (the middle half over the median) of a step that is run repeatedly."""
    for _ in range(3):
        s.engine.run(step)
    taken: list[float] = []
    until = time.perf_counter() + plan.point_s
    while len(taken) < plan.repeats and (len(taken) < 3 or time.perf_counter() < until):
        began = time.perf_counter()
        s.engine.run(step)
        taken.append(time.perf_counter() - began)
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {
        "median_s": median, "min_s": min(taken), "spread": (high - low) / median, "n": len(taken),
        "in_flight_s": in_flight_s(s, step, len(taken)),
    }  # fmt: skip


def in_flight_s(s: Sequences, step: Step, repeats: int) -> float | None:
    """Seconds a step where the next is launched before one lands; None where that is never so."""
    if not s.engine.pipelined:
        return None
    flights = deque([s.engine.launch(step)])
    began = time.perf_counter()
    for _ in range(repeats):
        flights.append(s.engine.launch(step))
        flights.popleft().wait()
    taken = time.perf_counter() - began
    flights.popleft().wait()
    return taken / repeats


def launches(s: Sequences, plan: Plan, device: torch.device) -> dict[str, Any]:
    """What one decoded token costs besides its bytes.

    A model of as many layers that is next to empty takes what launching and the host take.
    Where the device's profiler works, kernels and the time that they keep it busy as well.
    """
    shape = hollow(s.shape)
    engine, _ = random_engine(shape, str(device), plan.precision, seed=1, max_batch=1)
    tokens = tuple(range(32))
    empty = Sequences(s.tier, shape, engine, (tokens,), ((0, 1),))
    timed = times(empty, empty.decode([32]), plan)
    engine.close()
    found = {
        "tier": s.tier.name,
        "layers": s.shape.layers,
        "hollow_step": timed,
        "per_layer_s": timed["median_s"] / s.shape.layers,
    }
    if device.type == "cuda":
        try:
            found["kernels"] = _profile(s, s.decode([min(plan.contexts)]))
        except Exception as error:  # noqa: BLE001 - profilers are absent in many ways
            found["kernels"] = {"error": f"{type(error).__name__}: {error}"}
    return found


def _profile(s: Sequences, step: Step) -> dict[str, Any]:
    """Kernels of one step and how long they ran; their time over the step's is "busy"."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    runs = 5
    s.engine.run(step)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            s.engine.run(step)
    on_device = [e for e in profiler.key_averages() if e.device_type.name == "CUDA"]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    return {
        "per_step": sum(event.count for event in on_device) / runs,
        "busy_s": sum(event.self_device_time_total for event in on_device) / runs / 1e6,
        "longest": [
            {
                "name": e.key[:80],
                "count": e.count / runs,
                "s": e.self_device_time_total / runs / 1e6,
            }
            for e in on_device[:8]
        ],
    }


def fit(pair: Sequence[Sequences], decode: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """`t = overhead x layers + bytes / rate` through both tiers' batch 1 at the shortest context.

    Two points and two unknowns, the form that explains the published 6.59. None where the
    tiers' layers are so alike, or the times so odd, that it has no solution above zero.
    """
    first = {row["tier"]: row for row in reversed(decode) if row["batch"] == 1}
    if len(first) < 2:
        return None
    (l1, b1, t1), (l2, b2, t2) = (
        (s.shape.layers, first[s.tier.name]["bytes"], first[s.tier.name]["median_s"]) for s in pair
    )
    determinant = l1 * b2 - l2 * b1
    if determinant == 0:
        return None
    per_layer = (t1 * b2 - t2 * b1) / determinant
    per_byte = (l1 * t2 - l2 * t1) / determinant
    if per_byte <= 0:
        return None
    return {"overhead_per_layer_s": per_layer, "bytes_per_s": 1 / per_byte}


def ratios(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Strategic over tactical time at each point that both were measured at."""
    phase = "decode" if "batch" in keys else "prefill"
    work = "bytes" if phase == "decode" else "flops"
    tactical = {tuple(r[k] for k in keys): r for r in rows if r["tier"] == Tier.TACTICAL.name}
    found = []
    for row in rows:
        other = tactical.get(tuple(row[k] for k in keys))
        if row["tier"] == Tier.TACTICAL.name or other is None:
            continue
        found.append(
            {
                "phase": phase,
                **{key: row[key] for key in keys},
                "ratio": row["median_s"] / other["median_s"],
                "ratio_of_work": row[work] / other[work],
            }
        )
    return found


def _prefill_points(plan: Plan) -> list[tuple[int, int]]:
    """(cached, tokens): fresh prompts, and one piece behind a long cached prefix."""
    longest = max(*plan.contexts, *plan.prefills)
    piece = sorted(plan.prefills)[len(plan.prefills) // 2]
    return [*((0, tokens) for tokens in plan.prefills), (longest - piece, piece)]
