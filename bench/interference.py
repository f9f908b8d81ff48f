"""What a saturated strategic tier costs the tactical one, and what the sharing costs it in turn.

What has to happen: at an even share of the device's time a tactical token takes twice as long as
alone. A strategic step holds the device for as long as it takes to read its weights, and a piece
of a prompt for longer; where it can pause between layers, a token that comes meanwhile waits for
a part of that, about as long as a tactical step, and else for all of it. The baseline is what one
gets without it: two threads, each driving one engine as fast as it can, sharing the device as the
operating system likes.

Scenes, interleaved A B C D E F A B C D E F: the tactical tier alone, the strategic tier alone, the
same beside a tactical tier that is loaded and has nothing to do (what pausing for nobody costs),
both in one executor, the same where the strategic streams speculate and the tactical tier drafts
for them beside its own stream, both in two executors that know nothing of each other. The
strategic tier is saturated by 16 streams of 512-token prompts, each followed by the next at once;
no prefill is spared by a prefix cache. Figures are medians over the rounds with the smallest and
the largest beside them. Strategic throughput counts every token that was fed to the model, prompts
too, by the executor's own reports.

Run: python bench/interference.py --tactical DIR --strategic DIR [--precision bf16]
     [--rounds 3] [--seconds 40] [--tactical-share 0.5] [--threads 0] [--quick]
Six scenes a round, so rounds x seconds x 6 plus the loading. Without models: the bundled pair.
Writes bench/results/interference.json.

`on_gpu` is the same for two engines that are resident on a GPU, a part of `gpu.py`: the tactical
tier alone, the strategic one alone, both in one executor, in two threads, and on two streams;
each figure is over all rounds together.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import report
import torch
from load_generator import Load, before, closed_loop

from sage_fed.core import TIER_ROLES, Tier, TierState, TierStatus
from sage_fed.device import EndReason, Executor, SequenceSpec, TierSetup
from sage_fed.engine import Engine, EngineOptions, load_engine, set_cpu_threads
from sage_fed.steps import InFlightStep, SampledToken, Step, StepKind, StepReport

if TYPE_CHECKING:
    from gpu_models import Plan

T, S = Tier.TACTICAL, Tier.STRATEGIC
BUNDLED = Path(__file__).parent.parent / "sage_fed" / "models"
WARM_UP_SHARE = 0.25
PATIENCE_S = 120.0
"""How long the last steps of a scene may take to land."""

_MAX_WAITING = 512
_MIXED_PROMPT = 64

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Scene:
    """Loads on one executor, or `apart` on one for each tier; `idle` tiers have none.

    The strategic tier `speculates`: the tactical one drafts for it, and so does earlier text.
    """

    name: str
    loads: tuple[Load, ...]
    apart: bool = False
    idle: tuple[Tier, ...] = ()
    speculates: bool = False


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
        """Launch, and wait for the tokens."""
        return self.launch(step).wait()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the engine has
        return getattr(self._engine, name)

    def close(self) -> None:
        """Do nothing; the owner closes it."""


@dataclass(slots=True)
class Seen:
    """What happened between two instants, by tier; an executor's observer."""

    from_s: float = 0.0
    until_s: float = 0.0
    fed: dict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    delivered: dict[Tier, int] = field(default_factory=lambda: defaultdict(int))
    busy_s: dict[Tier, float] = field(default_factory=lambda: defaultdict(float))
    first_s: dict[Tier, list[float]] = field(default_factory=lambda: defaultdict(list))
    gap_s: dict[Tier, list[float]] = field(default_factory=lambda: defaultdict(list))
    step_s: dict[tuple[Tier, StepKind], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @property
    def wall_s(self) -> float:
        """How long it was looked at."""
        return self.until_s - self.from_s

    def within(self, now: float) -> bool:
        """Whether `now` counts."""
        return self.from_s <= now <= self.until_s

    def step_done(self, done: StepReport) -> None:
        """Count a step's tokens and time."""
        if self.within(time.monotonic()):
            self.fed[done.tier] += done.num_prefill_tokens + done.num_decode_tokens
            self.fed[done.tier] += done.num_draft_tokens + done.num_verify_tokens
            self.busy_s[done.tier] += done.elapsed_s
            mean_s = done.elapsed_s / done.num_steps
            self.step_s[done.tier, done.kind] += [mean_s] * done.num_steps

    def tier_changed(self, status: TierStatus) -> None:
        """Tiers are not of interest here."""

    def figures(self, tier: Tier) -> Figures:
        """Rates, latencies in milliseconds and the device's share of one tier."""
        steps = [s for kind in StepKind for s in self.step_s[tier, kind]]
        return {
            "fed_tokens_per_s": self.fed[tier] / self.wall_s,
            "output_tokens_per_s": self.delivered[tier] / self.wall_s,
            "busy_share": self.busy_s[tier] / self.wall_s,
            "longest_step_ms": 1e3 * max(steps, default=0.0),
            **_in_ms("inter_token", self.gap_s[tier]),
            **_in_ms("first_token", self.first_s[tier]),
        }


class Stage:
    """Resident engines, and the loads that are put on them."""

    def __init__(
        self,
        engines: Mapping[Tier, Resident],
        valid_ids: int,
        *,
        tactical_share: float = 0.5,
        max_batch: int = 64,
    ) -> None:
        self._engines = engines
        self._valid_ids = valid_ids
        self._tactical_share = tactical_share
        self._max_batch = max_batch
        self._random = Random(17)
        self._ids = itertools.count(1)

    def play(self, scene: Scene, seconds: float) -> Seen:
        """Serve a scene's loads for a while, then stop."""
        return asyncio.run(self._play(scene, seconds))

    async def _play(self, scene: Scene, seconds: float) -> Seen:
        seen = Seen()
        tiers = [load.tier for load in scene.loads]
        groups = [[tier] for tier in tiers] if scene.apart else [[*tiers, *scene.idle]]
        async with AsyncExitStack() as stack:
            executors: dict[Tier, Executor] = {}
            for group in groups:
                executor = Executor(
                    {
                        tier: TierSetup(self._lend(tier), self._max_batch, _MAX_WAITING)
                        for tier in group
                    },
                    observers=(seen,),
                    tactical_share=self._tactical_share,
                )
                await executor.start()
                stack.push_async_callback(executor.stop, 0.0)
                for tier in group:
                    status = await executor.loaded(tier)
                    if status.state is not TierState.READY:
                        raise RuntimeError(f"the {tier.name} tier is {status}")
                    executors[tier] = executor
            now = time.monotonic()
            seen.from_s, seen.until_s = now + WARM_UP_SHARE * seconds, now + seconds
            clients = []
            for load in scene.loads:
                # Made beforehand: making them must not take the event loop's time.
                prompts = itertools.cycle([self._prompt(load) for _ in range(16)])
                stream = partial(
                    self._stream,
                    executors[load.tier],
                    load,
                    prompts.__next__,
                    seen,
                    speculates=scene.speculates and load.tier == S,
                )
                clients += [stream] * load.streams
            async with asyncio.timeout(seconds + PATIENCE_S):
                await closed_loop(clients, before(seen.until_s))
        return seen

    def _lend(self, tier: Tier) -> Callable[[Callable[[float], None]], Any]:
        return lambda _: self._engines[tier]

    def _prompt(self, load: Load) -> tuple[int, ...]:
        return tuple(self._random.choices(range(self._valid_ids), k=load.prompt_tokens))

    async def _stream(
        self,
        executor: Executor,
        load: Load,
        prompt: Callable[[], tuple[int, ...]],
        seen: Seen,
        begun: float,
        *,
        speculates: bool,
    ) -> None:
        spec = SequenceSpec(
            next(self._ids), load.tier, prompt(), load.new_tokens, ignore_eos=True,
            prefix_cache=False,  # the prompts repeat, and their prefill is the load
            speculates=speculates,
            drafter=T if speculates else None,
        )  # fmt: skip
        last: float | None = None

        def take(tokens: Sequence[SampledToken]) -> None:
            nonlocal last
            now, count = time.monotonic(), len(tokens)
            if seen.within(now):
                seen.delivered[load.tier] += count
                if last is None:
                    seen.first_s[load.tier].append(now - begun)
                else:
                    seen.gap_s[load.tier] += [(now - last) / count] * count
            last = now

        ending = executor.submit(spec, take)
        stop = asyncio.get_running_loop().call_later(
            max(seen.until_s - begun, 0.0), executor.cancel, spec.seq_id
        )
        ended = await ending
        stop.cancel()
        if ended.reason not in {EndReason.LENGTH, EndReason.CANCELLED}:
            raise RuntimeError(f"a {load.tier.name} sequence ended {ended.reason.value}")


def measure(stage: Stage, scenes: Sequence[Scene], rounds: int, seconds: float) -> dict[str, Any]:
    """Every scene in every round; per scene and tier each figure's median and range."""
    found: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for scene in scenes:
            seen = stage.play(scene, seconds)
            for load in scene.loads:
                found[scene.name][load.tier.name].append(seen.figures(load.tier))
    return {
        name: {tier: _over_rounds(rows) for tier, rows in tiers.items()}
        for name, tiers in found.items()
    }


def compare(found: dict[str, Any]) -> dict[str, float | None]:
    """How many times as long the tactical tier waits, and how much of the strategic is left."""
    rows: dict[str, float | None] = {}
    for figure in ("fed_tokens_per_s", "output_tokens_per_s"):
        rows[f"strategic_{figure}_beside_idle_kept"] = _ratio(
            found["strategic_beside_idle"][S.name], found["strategic_alone"][S.name], figure
        )
    for name in ("together", "together_speculating", "apart"):
        for figure in (
            "inter_token_p50_ms", "inter_token_p99_ms", "first_token_p50_ms", "first_token_p99_ms",
        ):  # fmt: skip
            rows[f"tactical_{figure[:-3]}_{name}_times"] = _ratio(
                found[name][T.name], found["tactical_alone"][T.name], figure
            )
        for figure in ("fed_tokens_per_s", "output_tokens_per_s"):
            rows[f"strategic_{figure}_{name}_kept"] = _ratio(
                found[name][S.name], found["strategic_alone"][S.name], figure
            )
    return rows


def show(found: dict[str, Any], ratios: dict[str, float | None]) -> None:
    """A table for people."""
    from rich.console import Console  # noqa: PLC0415 - not where a GPU is
    from rich.table import Table  # noqa: PLC0415

    columns = {
        "ITL p50 ms": "inter_token_p50_ms",
        "ITL p99 ms": "inter_token_p99_ms",
        "TTFT p50 ms": "first_token_p50_ms",
        "TTFT p99 ms": "first_token_p99_ms",
        "fed tok/s": "fed_tokens_per_s",
        "out tok/s": "output_tokens_per_s",
        "longest step ms": "longest_step_ms",
    }
    table = Table("scene", "tier", *columns)
    for name, tiers in found.items():
        for tier, figures in tiers.items():
            cells = (figures.get(figure) for figure in columns.values())
            table.add_row(name, tier, *(f"{c['median']:,.1f}" if c else "-" for c in cells))
    console = Console()
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name}: {'-' if ratio is None else f'{ratio:.2f}'}")


def _over_rounds(rows: Sequence[Figures]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {
        name: {"median": statistics.median(v), "least": min(v), "most": max(v), "rounds": len(v)}
        for name, v in values.items()
    }


def _in_ms(name: str, seconds: Sequence[float]) -> Figures:
    """p50 and p99 in milliseconds, and of how many; nothing where nothing was seen."""
    found = report.percentiles(seconds, 1e3)
    if "p50" not in found:
        return {}
    return {
        f"{name}_p50_ms": found["p50"],
        f"{name}_p99_ms": found["p99"],
        f"{name}_n": float(len(seconds)),
    }


def _ratio(over: dict[str, Any], under: dict[str, Any], figure: str) -> float | None:
    if figure not in over or not (base := under.get(figure, {}).get("median")):
        return None
    return float(over[figure]["median"] / base)


def mixed(streams: int, plan: Plan) -> tuple[Load, ...]:
    """`streams` short requests at once, half of them to each tier; of one the tactical has it."""
    deep = streams // 2
    loads = (
        Load(T, streams - deep, _MIXED_PROMPT, plan.new_tokens),
        Load(S, deep, _MIXED_PROMPT, plan.new_tokens),
    )
    return tuple(load for load in loads if load.streams)


def on_gpu(
    engines: dict[Tier, Engine], plan: Plan, valid_ids: int, left: Callable[[], float]
) -> dict[str, Any]:
    """All scenes of all rounds, then the loads that the daemon will be put under.

    `left` tells the seconds that may still be used.
    """
    tactical = Load(T, plan.tactical_streams, _MIXED_PROMPT, plan.new_tokens)
    strategic = Load(S, plan.strategic_streams, plan.strategic_prompt, plan.new_tokens)
    stage = _stage(engines, plan, valid_ids)
    together = Scene("together", (tactical, strategic))
    apart = Scene("two_threads", (tactical, strategic), apart=True)
    scenes = [
        (Scene("tactical_alone", (tactical,), idle=(S,)), stage),
        (Scene("strategic_alone", (strategic,), idle=(T,)), stage),
        (together, stage),
        (apart, stage),
    ]
    if all(engine.info.device != "cpu" for engine in engines.values()):
        streams = {tier: torch.cuda.Stream(engine.info.device) for tier, engine in engines.items()}
        beside = _stage(engines, plan, valid_ids, streams)
        scenes.append((Scene("two_streams", apart.loads, apart=True), beside))
    samples: dict[str, list[Seen]] = {scene.name: [] for scene, _ in scenes}
    for number in range(plan.rounds):
        if number and left() < len(scenes) * plan.scene_s:
            break
        for scene, its_stage in scenes:
            samples[scene.name].append(its_stage.play(scene, plan.scene_s))
    by_streams = {}
    for count in plan.mixed_streams:
        if left() < plan.mixed_alone_s:
            break
        seen = stage.play(
            Scene("mixed", mixed(count, plan), idle=tuple(engines)), plan.mixed_alone_s
        )
        by_streams[str(count)] = {
            tier.name: tokens / seen.wall_s for tier, tokens in seen.delivered.items()
        }
    found = {name: summary(parts) for name, parts in samples.items()}
    return {
        "rounds": len(samples["together"]),
        "loads": _loads(tactical, strategic),
        **found,
        "cost": cost(found, "together"),
        "cost_without_interleaving": {
            scene.name: cost(found, scene.name) for scene, _ in scenes if scene.apart
        },
        "mixed_tokens_per_s_by_streams": by_streams,
    }


def _stage(
    engines: Mapping[Tier, Engine],
    plan: Plan,
    valid_ids: int,
    streams: Mapping[Tier, torch.cuda.Stream] = MappingProxyType({}),
) -> Stage:
    resident = {tier: Resident(engine, streams.get(tier)) for tier, engine in engines.items()}
    return Stage(resident, valid_ids, max_batch=max(plan.batches))


def _loads(*loads: Load) -> dict[str, dict[str, int]]:
    return {
        load.tier.name: {
            "streams": load.streams,
            "prompt_tokens": load.prompt_tokens,
            "new_tokens": load.new_tokens,
        }
        for load in loads
    }


def summary(parts: Sequence[Seen]) -> dict[str, Any]:
    """One scene over its rounds."""
    wall_s = sum(seen.wall_s for seen in parts)
    tiers = {}
    for tier in TIER_ROLES:
        gaps = [s for seen in parts for s in seen.gap_s[tier]]
        if not gaps:
            continue
        steps = {
            kind.value: report.percentiles([s for seen in parts for s in seen.step_s[tier, kind]])
            for kind in StepKind
        }
        tiers[tier.name] = {
            "tokens_per_s": sum(seen.delivered[tier] for seen in parts) / wall_s,
            "inter_token_s": report.percentiles(gaps),
            "first_token_s": report.percentiles([s for seen in parts for s in seen.first_s[tier]]),
        }
        if busy_s := sum(seen.busy_s[tier] for seen in parts):  # only an executor reports it
            tiers[tier.name] |= {
                "step_s": {kind: times for kind, times in steps.items() if times["n"]},
                "device_share": busy_s / wall_s,
            }
    return tiers


def cost(found: dict[str, dict[str, Any]], scene: str) -> dict[str, float | None]:
    """How much slower and how much less, together against alone; None where nothing was seen."""
    tier = T.name
    alone, together = found["tactical_alone"].get(tier), found[scene].get(tier)
    deep_alone = found["strategic_alone"].get(S.name)
    deep_together = found[scene].get(S.name)
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


def _engine(model: Path, tier: Tier, args: argparse.Namespace, load: Load, context: int) -> Engine:
    tokens = load.prompt_tokens + load.new_tokens
    options = EngineOptions(
        str(model),
        # Room for all streams and some for what is kept; the pool's size is no part of this.
        kv_cache_bytes=args.kv_mib * 2**20,
        device=args.device,
        precision=args.precision,
        max_context_tokens=-(-context // 16) * 16,
        max_batch=load.streams,
    )
    engine = load_engine(options, lambda _: None)
    if engine.num_blocks * 16 < tokens * load.streams:
        raise SystemExit(f"--kv-mib {args.kv_mib} does not hold the {tier.name} tier's streams")
    return engine


def _vocabulary(model: Path) -> int:
    size: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return size


def main() -> None:
    """Load both, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tactical", type=Path, default=BUNDLED / "demo-tactical")
    parser.add_argument("--strategic", type=Path, default=BUNDLED / "demo-strategic")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of a forward pass; 0 is torch's")
    parser.add_argument("--kv-mib", type=int, default=1024, help="KV cache of each tier")
    parser.add_argument("--tactical-share", type=float, default=0.5)
    parser.add_argument("--tactical-streams", type=int, default=1)
    parser.add_argument("--strategic-streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--quick", action="store_true", help="one short round, to see it work")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 3.0
    if args.threads:
        set_cpu_threads(args.threads)
    tactical = Load(T, args.tactical_streams, 64, 64)
    strategic = Load(S, args.strategic_streams, 512, 64)
    # The drafter holds what it drafts for.
    context = max(load.prompt_tokens + load.new_tokens for load in (tactical, strategic))
    engines = {
        T: _engine(args.tactical, T, args, tactical, context),
        S: _engine(args.strategic, S, args, strategic, context),
    }
    scenes = (
        Scene("tactical_alone", (tactical,)),
        Scene("strategic_alone", (strategic,)),
        Scene("strategic_beside_idle", (strategic,), idle=(T,)),
        Scene("together", (tactical, strategic)),
        Scene("together_speculating", (tactical, strategic), speculates=True),
        Scene("apart", (tactical, strategic), apart=True),
    )
    vocabulary = min(_vocabulary(args.tactical), _vocabulary(args.strategic))
    stage = Stage(
        {tier: Resident(engine) for tier, engine in engines.items()},
        vocabulary,
        tactical_share=args.tactical_share,
    )
    found = measure(stage, scenes, args.rounds, args.seconds)
    ratios = compare(found)
    show(found, ratios)
    result = {
        "models": {
            tier.name: {
                "name": engine.info.name, "parameters": engine.info.parameters,
                "precision": engine.info.precision, "kernels": engine.info.kernels,
                "device": engine.info.device,
            }
            for tier, engine in engines.items()
        },
        "loads": _loads(tactical, strategic),
        "threads": args.threads, "tactical_share": args.tactical_share,
        "rounds": args.rounds, "seconds": args.seconds,
        "scenes": found, "compared": ratios,
    }  # fmt: skip
    report.write("interference", result, args.output)


if __name__ == "__main__":
    main()
