"""The device's own limits, and how near to them each tier and each precision comes.

Owns: what a run was made with (date, versions, commit, device, driver, clocks and power; each is
optional, because on unified-memory devices and in containers parts of it are absent); the
measured rates of reading memory and of multiplying matrices, which every share is stated against;
decode and prefill steps of chosen sizes on a resident pair, their times, bytes and operations;
launch overhead; every precision, captured and with its graphs left alone; the ratio between the
tiers. Does not know: correctness (`gpu_correctness`), schedulers and streams; a step here is what
the executor would hand over.

A step's time is the executor's: from the call to the tokens on the host; beside it stands that of
a step behind which the next is in flight already, which is what the device alone takes. Both
tiers are timed one after the other at every point, so a device that changes its clocks changes
them for both.

A narrower precision reads fewer bytes, so it has to be faster by about their ratio: int8 1.9, int4
3.3 of bf16 with its int8 head. The ratio between the tiers is that of their bytes where a step is
all reading, and falls towards that of their layers where it is all launching; `fit` says which.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import report
import torch
from gpu_models import Filling, Plan, Shape, hollow, random_engine

from sage_fed import __version__
from sage_fed.core import TIER_ROLES, Sampling, Tier
from sage_fed.engine import Engine, read_bandwidth_bytes_per_s
from sage_fed.engine.cuda_graphs import GraphForward
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "triton", "transformers", "safetensors", "huggingface-hub", "grpcio", "apsw",
    "pydantic", "prometheus-client",
)  # fmt: skip
_SMI_FIELDS = (
    "name", "driver_version", "vbios_version", "pstate", "persistence_mode", "mig.mode.current",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Everything a figure has to carry."""
    found: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": {
            "cpu": report.cpu_model(),
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "sage-fed": __version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "torch": {
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["torch"] |= {
            "cudnn": torch.backends.cudnn.version(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "architectures": torch.cuda.get_arch_list(),
        }
        found["gpu"] = {
            name: getattr(properties, name, None)
            for name in (
                "name", "total_memory", "multi_processor_count", "L2_cache_size",
                "major", "minor", "is_integrated",
            )
        }  # fmt: skip
        found["telemetry"] = telemetry(device)
    return found


def telemetry(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature now, as the driver tells them; None where it does not."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # Not the index: CUDA_VISIBLE_DEVICES renumbers torch's devices and not the driver's.
    which = ("-i", f"GPU-{uuid}") if uuid else ()
    # A driver that does not know one of the fields refuses them all.
    for fields in (_SMI_FIELDS, _SMI_FIELDS[:2]):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        values = said.stdout.strip().splitlines()[0].split(",")
        return dict(zip(fields, map(str.strip, values), strict=False))
    return None


def limits(device: torch.device, read_bytes: int, matrix: int) -> dict[str, Any]:
    """What the device can do: bytes read per second, matrix operations per second.

    Reading is tried as a sum and as the matrix-vector product that decoding is; the faster is
    the limit. `engine_read` is what the daemon's own gauge compares itself with.
    """
    with torch.inference_mode():
        rates = _memory_rates(device, read_bytes)
        rates["engine_read"] = read_bandwidth_bytes_per_s(str(device))
        left = torch.randn(matrix, matrix, device=device).bfloat16()
        right = torch.randn(matrix, matrix, device=device).bfloat16()
        multiply_s = median_s(device, lambda: left @ right)
    return {
        "bytes_per_s": {name: round(rate) for name, rate in rates.items()},
        "read_limit_bytes_per_s": round(max(rates["sum"], rates["matrix_vector"])),
        "bf16_matrix_flops_per_s": round(2 * matrix**3 / multiply_s),
    }


def _memory_rates(device: torch.device, nbytes: int) -> dict[str, float]:
    """Bytes per second; a copy reads and writes, and both count."""
    width = min(8192, nbytes // 2**12)
    values = torch.empty(nbytes // 2 // width, width, dtype=torch.bfloat16, device=device)
    values.normal_()
    vector = torch.randn(width, device=device).bfloat16()
    other = torch.empty_like(values)
    return {
        "sum": values.nbytes / median_s(device, values.sum),
        "matrix_vector": values.nbytes / median_s(device, lambda: torch.mv(values, vector)),
        "copy": 2 * values.nbytes / median_s(device, lambda: other.copy_(values)),
    }


def median_s(device: torch.device, work: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of `work` on the device: timed by its own events where it has them."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            began_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=15, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "sage_fed", "bench")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


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
    device_limits = limits(device, plan.read_bytes, plan.matrix)
    read = device_limits["read_limit_bytes_per_s"]
    flops = device_limits["bf16_matrix_flops_per_s"]
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
        "limits": device_limits,
        "decode": decode,
        "prefill": prefill,
        "overhead": overhead,
        "fit": fit(pair, decode),
        "ratio": ratios(decode, ("batch", "context")) + ratios(prefill, ("cached", "tokens")),
        "cut": cut,
        "telemetry_after": telemetry(device),
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


_CONTEXT = 128
_EQUAL_TOKENS = 24


def precisions(plan: Plan, device: torch.device, kernels: str, left: Left) -> dict[str, Any]:
    """Both tiers in every precision that time and device allow; the others are `cut`."""
    read = limits(device, plan.read_bytes, plan.matrix)["read_limit_bytes_per_s"]
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
