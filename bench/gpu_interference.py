"""What a busy strategic tier costs the tactical one, through the real executor and scheduler.

Owns: closed loops of streams on both tiers, alone and together, and what their readers see.
Does not know: shapes, prices, gRPC.

The scenes are interleaved (alone, alone, together, and again) so that a device that changes
its clocks changes them for all. Latencies are those of a reader on the event loop; step times
are the executor's own reports.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from gpu_shapes import Plan

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.device import EndReason, Executor, SequenceSpec, TierSetup
from sage_fed.engine import Engine
from sage_fed.steps import InFlightStep, SampledToken, Step, StepKind, StepReport

_WARM_UP_SHARE = 0.2
_MIXED_PROMPT = 64
_MAX_WAITING = 512
_PATIENCE_S = 60.0
"""How long the last streams of a scene may take to end."""


class Resident:
    """An engine that outlives the executor which borrows it: `close` leaves it loaded.

    With a `stream`, its steps are queued on that one, beside those of others.
    """

    def __init__(self, engine: Engine, stream: torch.cuda.Stream | None = None) -> None:
        self._engine = engine
        self._stream = stream

    def launch(self, step: Step, pause_after_s: float | None = None) -> InFlightStep:
        """Launch, on the stream where there is one."""
        if self._stream is None:
            return self._engine.launch(step, pause_after_s)
        with torch.cuda.stream(self._stream):
            return self._engine.launch(step, pause_after_s)

    def run(self, step: Step) -> tuple[SampledToken, ...]:
        """Launch and land."""
        return self.launch(step).wait()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the engine has
        return getattr(self._engine, name)

    def close(self) -> None:
        """Do nothing; the owner closes it."""


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` closed loops of one kind of request."""

    tier: Tier
    streams: int
    prompt_tokens: int
    new_tokens: int


@dataclass(slots=True)
class Seen:
    """What happened in a scene after its warm-up; seconds and counts by tier."""

    from_s: float = 0.0
    until_s: float = 0.0
    tokens: dict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    first_s: dict[Tier, list[float]] = field(default_factory=lambda: defaultdict(list))
    gap_s: dict[Tier, list[float]] = field(default_factory=lambda: defaultdict(list))
    step_s: dict[tuple[Tier, StepKind], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    device_s: dict[Tier, float] = field(default_factory=lambda: defaultdict(float))

    def within(self, now: float) -> bool:
        """Whether `now` counts."""
        return self.from_s <= now <= self.until_s

    def step_done(self, report: StepReport) -> None:
        """Executor's observer."""
        if self.within(time.perf_counter()):
            mean_s = report.elapsed_s / report.num_steps
            self.step_s[report.tier, report.kind] += [mean_s] * report.num_steps
            self.device_s[report.tier] += report.elapsed_s

    def tier_changed(self, status: TierStatus) -> None:
        """Executor's observer."""


class Scene:
    """One executor over resident engines; `run` puts a load on it."""

    def __init__(
        self, engines: dict[Tier, Engine], valid_ids: int, seed: int, max_batch: int
    ) -> None:
        self._engines = engines
        self._max_batch = max_batch
        self._valid_ids = valid_ids
        self._random = Random(seed)
        self._ids = itertools.count(1)

    async def run(self, loads: Sequence[Load], seconds: float) -> Seen:
        """Serve `loads` for a while, then cancel what is left and wait for its endings."""
        seen = Seen()
        setups = {
            tier: TierSetup(_ready(engine), self._max_batch, _MAX_WAITING)
            for tier, engine in self._engines.items()
        }
        executor = Executor(setups, observers=(seen,))
        await executor.start()
        try:
            async with asyncio.timeout(seconds + _PATIENCE_S):
                for tier in setups:
                    status = await executor.loaded(tier)
                    if status.state is not TierState.READY:
                        raise RuntimeError(f"the {tier.name} tier is {status}")
                now = time.perf_counter()
                seen.from_s = now + _WARM_UP_SHARE * seconds
                seen.until_s = now + seconds
                async with asyncio.TaskGroup() as group:
                    for load in loads:
                        prompts = self._prompts(load)
                        for _ in range(load.streams):
                            group.create_task(self._stream(executor, load, prompts, seen))
        finally:
            await executor.stop(0.0)
        return seen

    def _prompts(self, load: Load) -> Iterator[tuple[int, ...]]:
        """Prompts made beforehand: making them must not take the event loop's time."""
        prompts = [
            tuple(self._random.randrange(self._valid_ids) for _ in range(load.prompt_tokens))
            for _ in range(16)
        ]
        return itertools.cycle(prompts)

    async def _stream(
        self, executor: Executor, load: Load, prompts: Iterator[tuple[int, ...]], seen: Seen
    ) -> None:
        while (begun := time.perf_counter()) < seen.until_s:
            spec = SequenceSpec(
                next(self._ids), load.tier, next(prompts), load.new_tokens, ignore_eos=True,
                prefix_cache=False,  # the prompts repeat, and their prefill is the load
            )  # fmt: skip
            last: float | None = None

            def take(tokens: Sequence[SampledToken], seq_id: int = spec.seq_id) -> None:
                nonlocal last
                now, count = time.perf_counter(), len(tokens)
                if seen.within(now):
                    seen.tokens[load.tier] += count
                    if last is None:
                        seen.first_s[load.tier].append(now - begun)
                    else:
                        seen.gap_s[load.tier] += [(now - last) / count] * count
                last = now
                if now > seen.until_s:
                    executor.cancel(seq_id)

            ended = await executor.submit(spec, take)
            if ended.reason not in {EndReason.LENGTH, EndReason.CANCELLED}:
                raise RuntimeError(f"a {load.tier.name} sequence ended {ended.reason.value}")


def mixed(streams: int, plan: Plan) -> tuple[Load, ...]:
    """`streams` short requests at once, half of them to each tier; of one the tactical has it."""
    deep = streams // 2
    loads = (
        Load(Tier.TACTICAL, streams - deep, _MIXED_PROMPT, plan.new_tokens),
        Load(Tier.STRATEGIC, deep, _MIXED_PROMPT, plan.new_tokens),
    )
    return tuple(load for load in loads if load.streams)


def interference(
    engines: dict[Tier, Engine], plan: Plan, valid_ids: int, left: Callable[[], float]
) -> dict[str, Any]:
    """All scenes of all rounds, then the loads that the daemon will be put under."""
    tactical = Load(Tier.TACTICAL, plan.tactical_streams, _MIXED_PROMPT, plan.new_tokens)
    strategic = Load(Tier.STRATEGIC, plan.strategic_streams, plan.strategic_prompt, plan.new_tokens)
    scenes = {
        "tactical_alone": (tactical,),
        "strategic_alone": (strategic,),
        "together": (tactical, strategic),
    }
    samples: dict[str, list[Seen]] = {name: [] for name in scenes}
    resident: dict[Tier, Any] = {tier: Resident(engine) for tier, engine in engines.items()}
    scene = Scene(resident, valid_ids, seed=7, max_batch=max(plan.batches))
    apart = _apart(engines, valid_ids, max(plan.batches))
    samples |= {name: [] for name in apart}
    for number in range(plan.rounds):
        if number and left() < (3 + len(apart)) * plan.scene_s:
            break
        for name, loads in scenes.items():
            samples[name].append(asyncio.run(scene.run(loads, plan.scene_s)))
        for name, pair in apart.items():
            seen = asyncio.run(_run_apart(pair, (tactical, strategic), plan.scene_s))
            samples[name].append(seen)
    by_streams = {}
    for streams in plan.mixed_streams:
        if left() < plan.mixed_alone_s:
            break
        seen = asyncio.run(scene.run(mixed(streams, plan), plan.mixed_alone_s))
        by_streams[str(streams)] = {
            tier.name: tokens / (seen.until_s - seen.from_s) for tier, tokens in seen.tokens.items()
        }
    found = {name: summary(parts) for name, parts in samples.items()}
    return {
        "rounds": len(samples["together"]),
        "loads": {
            load.tier.name: {
                "streams": load.streams, "prompt_tokens": load.prompt_tokens,
                "new_tokens": load.new_tokens,
            }
            for load in (tactical, strategic)
        },
        **found,
        "cost": cost(found, "together"),
        "cost_without_interleaving": {name: cost(found, name) for name in apart},
        "mixed_tokens_per_s_by_streams": by_streams,
    }  # fmt: skip


def summary(parts: Sequence[Seen]) -> dict[str, Any]:
    """One scene over its rounds."""
    wall_s = sum(seen.until_s - seen.from_s for seen in parts)
    tiers = {}
    for tier in TIER_ROLES:
        gaps = [s for seen in parts for s in seen.gap_s[tier]]
        if not gaps:
            continue
        steps = {
            kind.value: percentiles([s for seen in parts for s in seen.step_s[tier, kind]])
            for kind in StepKind
        }
        tiers[tier.name] = {
            "tokens_per_s": sum(seen.tokens[tier] for seen in parts) / wall_s,
            "inter_token_s": percentiles(gaps),
            "first_token_s": percentiles([s for seen in parts for s in seen.first_s[tier]]),
        }
        if device_s := sum(seen.device_s[tier] for seen in parts):  # only an executor reports it
            tiers[tier.name] |= {
                "step_s": {kind: times for kind, times in steps.items() if times["n"]},
                "device_share": device_s / wall_s,
            }
    return tiers


def _apart(engines: dict[Tier, Engine], valid_ids: int, max_batch: int) -> dict[str, list[Scene]]:
    """Both tiers without their scheduler: two threads, and two streams where there are any."""
    found = {"two_threads": dict.fromkeys(engines)}
    if all(engine.info.device != "cpu" for engine in engines.values()):
        found["two_streams"] = {
            tier: torch.cuda.Stream(engine.info.device) for tier, engine in engines.items()
        }
    return {
        name: [
            Scene({tier: Resident(engines[tier], stream)}, valid_ids, 7 + tier.rank, max_batch)  # type: ignore[dict-item] # stands in for one
            for tier, stream in streams.items()
        ]
        for name, streams in found.items()
    }


async def _run_apart(pair: Sequence[Scene], loads: Sequence[Load], seconds: float) -> Seen:
    """Each tier in an executor of its own, at the same time; what both saw."""
    runs = (scene.run((load,), seconds) for scene, load in zip(pair, loads, strict=True))
    first, *others = await asyncio.gather(*runs)
    for other in others:
        for name in ("tokens", "first_s", "gap_s", "step_s", "device_s"):
            getattr(first, name).update(getattr(other, name))
    return first


def cost(found: dict[str, dict[str, Any]], scene: str) -> dict[str, float | None]:
    """How much slower and how much less, together against alone; None where nothing was seen."""
    tier = Tier.TACTICAL.name
    alone, together = found["tactical_alone"].get(tier), found[scene].get(tier)
    deep_alone = found["strategic_alone"].get(Tier.STRATEGIC.name)
    deep_together = found[scene].get(Tier.STRATEGIC.name)
    rows: dict[str, float | None] = {}
    for name in ("inter_token_s", "first_token_s"):
        for point in ("p50", "p99"):
            before = alone[name].get(point) if alone else None
            after = together[name].get(point) if together else None
            rows[f"tactical_{name}_{point}_times"] = after / before if before and after else None
    rows["strategic_tokens_per_s_lost_share"] = (
        1 - deep_together["tokens_per_s"] / deep_alone["tokens_per_s"]
        if deep_alone and deep_together
        else None
    )
    return rows


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """p50, p99, the largest and the number."""
    if len(values) < 2:
        return {"n": len(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"n": len(values), "p50": cuts[49], "p99": cuts[98], "max": max(values)}


def _ready(engine: Engine) -> Callable[[Callable[[float], None]], Engine]:
    return lambda _: engine
