"""How much sooner the strategic tier's tokens come when the tactical tier drafts them.

What has to happen: a strategic step over a few rows takes hardly longer than one over one row,
because it reads all weights either way. So a draft of k tokens, of which each is right with
probability a, gives (1 - a^(k+1)) / (1 - a) tokens for one strategic and k tactical steps; with r
the ratio of the steps' times and v what the rows cost, tokens / (k / r + v) times as fast. On two
cores the rows saturate at about ten, so large batches gain nothing and must lose nothing.

Scenes: prompts (HumanEval, prose, or random ids) at a batch size, each in rounds of prompts of
their own, which every way is asked in turn:
`plain` without drafts, `speculative` with all sources of drafts, `free` with those that cost no
step. All are greedy or seeded; every output is compared with the plain one's, and in fp32 a
difference is an error. With `--force A` the drafter runs as ever, but what it proposes is
overwritten: the recorded token of the plain run with probability A, else a wrong one. 0 is the case
where drafts fail.

Run: python bench/speculation.py --tactical DIR --strategic DIR [--precision bf16]
     [--human-eval FILE.jsonl.gz] [--scenes humaneval:1 prose:1 ...] [--rounds 7] [--new 256]
     [--force 0.9] [--temperature 0] [--ways speculative] [--ignore-eos] [--label NAME]
     [--output FILE]
Without models: the bundled pair. Writes bench/results/speculation.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import gzip
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import report
from interference import Resident

from sage_fed.core import Message, Sampling, Tier, TierState
from sage_fed.device import Ended, Executor, SequenceSpec, TierSetup
from sage_fed.engine import EngineOptions, load_engine, set_cpu_threads
from sage_fed.steps import InFlightStep, SampledToken, Step
from sage_fed.text import Tokenizer

T, S = Tier.TACTICAL, Tier.STRATEGIC
BUNDLED = Path(__file__).parent.parent / "sage_fed" / "models"
PATIENCE_S = 3_600.0
WARM_TOKENS = 32
WAYS = ("plain", "speculative", "free")

PROSE = (
    "Explain to a new sailor why the tide comes twice a day.",
    "Write a short letter to a neighbour who lent you a ladder.",
    "Describe a market in the early morning, before the first customers.",
    "What should a hiker know about thunderstorms in the mountains?",
    "Tell the story of a lighthouse keeper who finds a bottle on the shore.",
    "Give three reasons for and three against living without a car.",
    "How does bread rise, and what can go wrong?",
    "Write a speech for the opening of a small public library.",
    "Explain what inflation is to someone who is twelve years old.",
    "Describe the sound of a city at night.",
    "What makes a good teacher? Answer in a few paragraphs.",
    "Write about a childhood memory that has to do with snow.",
    "Why do leaves change their colour in autumn?",
    "Compare the work of a gardener with that of a programmer.",
    "Write the beginning of a detective story that is set in a bakery.",
    "How would you plan a week of meals for a family of four?",
    "Explain the difference between weather and climate.",
    "Write a polite complaint about a train that was late.",
    "What can a visitor do in a town by the sea when it rains?",
    "Describe how a bicycle is repaired after a flat tyre.",
    "Tell a fable about a crow and a well.",
    "What did people do in the evening before there was electric light?",
    "Write a review of an imaginary novel about the sea.",
    "Explain why sleep is important, and how to sleep better.",
)


@dataclass(frozen=True, slots=True)
class Scene:
    """Prompts of a kind, so many at a time."""

    kind: str
    batch: int

    @property
    def name(self) -> str:
        """What it is called in the result."""
        return f"{self.kind}:{self.batch}"


class Forced(Resident):
    """A drafter whose proposals are right with a given probability: those that were recorded."""

    def __init__(self, engine: Any, acceptance: float, num_ids: int) -> None:  # noqa: ANN401
        super().__init__(engine)
        self.recorded: dict[int, tuple[int, ...]] = {}
        self._acceptance = acceptance
        self._num_ids = num_ids

    def launch(self, step: Step, pause_after_s: float | None = None) -> InFlightStep:
        """Launch; the tokens are overwritten when they are waited for."""
        return _ForcedStep(super().launch(step, pause_after_s), step, self)

    def overwrite(self, step: Step, sampled: Sequence[SampledToken]) -> tuple[SampledToken, ...]:
        """Return other tokens for the same draws."""
        draws = [(chunk.seq_id, draw) for chunk in step.chunks for draw in chunk.draws]
        return tuple(self._token(seq_id, draw.index) for seq_id, draw in draws) or tuple(sampled)

    def _token(self, seq_id: int, index: int) -> SampledToken:
        right = self.recorded[seq_id][index : index + 1]
        # By the place alone, so that a token is right or wrong whenever it is proposed.
        chance = Random(seq_id * 1_000_003 + index)
        if right and chance.random() < self._acceptance:
            return SampledToken(seq_id, right[0])
        return SampledToken(seq_id, chance.randrange(self._num_ids))


class _ForcedStep:
    def __init__(self, running: InFlightStep, step: Step, owner: Forced) -> None:
        self._running = running
        self._step = step
        self._owner = owner

    def wait(self) -> tuple[SampledToken, ...]:
        return self._owner.overwrite(self._step, self._running.wait())

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the step has
        return getattr(self._running, name)


@dataclass(slots=True)
class Run:
    """One way through a scene once: tokens by prompt, seconds, and what was drafted."""

    seconds: float
    outputs: list[tuple[int, ...]]
    endings: list[Ended]

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return sum(map(len, self.outputs)) / self.seconds

    def figures(self) -> dict[str, float]:
        """What was drafted and accepted, and the device's time."""
        verified = sum(ended.verified_tokens for ended in self.endings)
        accepted = sum(ended.accepted_tokens for ended in self.endings)
        return {
            "tokens_per_s": self.rate,
            "output_tokens": sum(map(len, self.outputs)),
            "drafted": sum(ended.drafted_tokens for ended in self.endings),
            "verified": verified,
            "accepted": accepted,
            "acceptance": accepted / verified if verified else 0.0,
            "tactical_share": sum(e.draft_s for e in self.endings)
            / max(sum(e.draft_s + e.device_s for e in self.endings), 1e-9),
        }


@dataclass(slots=True)
class Pair:
    """Both engines in one executor, and the sequences that are run on them."""

    executor: Executor
    num_new: int
    temperature: float
    drafter: Forced | None = None
    ways: Sequence[str] = WAYS
    ignore_eos: bool = False
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        batch: int,
        way: str,
        recorded: Sequence[tuple[int, ...]],
        num_new: int | None = None,
    ) -> Run:
        """Run the prompts, `batch` at a time; each ends after `num_new` tokens or by itself."""
        waiting = list(enumerate(prompts))[::-1]
        outputs: dict[int, tuple[int, ...]] = {}
        endings: dict[int, Ended] = {}
        begun = time.monotonic()

        async def client() -> None:
            while waiting:
                index, prompt = waiting.pop()
                seq_id = next(self._ids)
                if self.drafter is not None:
                    self.drafter.recorded[seq_id] = recorded[index] if recorded else ()
                outputs[index], endings[index] = await self._one(
                    seq_id, prompt, way, index, num_new or self.num_new
                )

        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as clients:
            for _ in range(batch):
                clients.create_task(client())
        seconds = time.monotonic() - begun
        order = range(len(prompts))
        return Run(seconds, [outputs[i] for i in order], [endings[i] for i in order])

    async def _one(
        self, seq_id: int, prompt: tuple[int, ...], way: str, seed: int, num_new: int
    ) -> tuple[tuple[int, ...], Ended]:
        spec = SequenceSpec(
            seq_id, S, prompt, num_new,
            sampling=Sampling(temperature=self.temperature, seed=seed),
            prefix_cache=False,  # every way prefills
            ignore_eos=self.ignore_eos,
            speculates=way != "plain",
            drafter=T if way == "speculative" else None,
        )  # fmt: skip
        tokens: list[int] = []
        ended = await self.executor.submit(
            spec, lambda sampled: tokens.extend(one.token_id for one in sampled)
        )
        return tuple(tokens), ended


async def measure(
    pair: Pair, scenes: Mapping[Scene, list[tuple[int, ...]]], rounds: int, exact: bool
) -> dict[str, Any]:
    """Every scene, every way in every round; medians, ranges and ratios to `plain`."""
    found: dict[str, Any] = {}
    for scene, prompts in scenes.items():
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        count = len(prompts) // rounds
        warm = prompts[: scene.batch]
        for way in pair.ways:
            recorded = (await pair.run(warm, scene.batch, "plain", (), WARM_TOKENS)).outputs
            await pair.run(warm, scene.batch, way, recorded, WARM_TOKENS)
        differing, compared = 0, 0
        for number in range(rounds):
            asked = prompts[number * count : (number + 1) * count]
            plain = await pair.run(asked, scene.batch, "plain", ())
            rows["plain"].append(plain.figures())
            for way in pair.ways[1:]:
                run = await pair.run(asked, scene.batch, way, plain.outputs)
                rows[way].append(run.figures())
                compared += len(asked)
                differing += sum(a != b for a, b in zip(plain.outputs, run.outputs, strict=True))
        if exact and differing:
            raise RuntimeError(
                f"{scene.name}: {differing} outputs differ from those without drafts"
            )
        ratios = {
            way: [
                r["tokens_per_s"] / p["tokens_per_s"]
                for r, p in zip(rows[way], rows["plain"], strict=True)
            ]
            for way in pair.ways[1:]
        }
        seconds = {
            way: sum(row["output_tokens"] / row["tokens_per_s"] for row in rows[way])
            for way in rows
        }
        tokens = {way: sum(row["output_tokens"] for row in rows[way]) for way in rows}
        found[scene.name] = {
            "ways": {way: over_rounds(each) for way, each in rows.items()},
            "times_plain": {way: spread(values) for way, values in ratios.items()},
            "times_plain_over_all": {
                way: float(
                    f"{tokens[way] / seconds[way] / (tokens['plain'] / seconds['plain']):.5g}"
                )
                for way in pair.ways[1:]
            },
            "outputs_compared": compared,
            "outputs_differing": differing,
        }
        print(json.dumps({scene.name: found[scene.name]["times_plain"]}), flush=True)
    return found


def over_rounds(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return median and range of each figure."""
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {
        name: float(f"{value:.5g}")
        for name, value in (
            ("median", statistics.median(values)), ("least", min(values)), ("most", max(values)),
        )
    }  # fmt: skip


def prompts_of(
    kind: str, count: int, tokenizer: Tokenizer, human_eval: Path | None, longest: int
) -> list[tuple[int, ...]]:
    """Return `count` encoded prompts of a kind, none longer than `longest` tokens."""
    if kind == "random":
        chance, num_ids = Random(5), min(1000, tokenizer.num_valid_ids)
        return [tuple(chance.choices(range(num_ids), k=min(64, longest))) for _ in range(count)]
    if kind == "humaneval":
        assert human_eval is not None, "--human-eval FILE.jsonl.gz is needed"
        with gzip.open(human_eval, "rt") as lines:
            texts = [f"Complete this function.\n{json.loads(line)['prompt']}" for line in lines]
    else:
        texts = list(PROSE)
    encoded = [tokenizer.encode_messages((Message("user", text),)) for text in texts]
    short = [prompt for prompt in encoded if len(prompt) <= longest]
    return list(itertools.islice(itertools.cycle(short), count))


@contextlib.asynccontextmanager
async def opened(
    models: Mapping[Tier, str],
    precision: str,
    tokenizer: Tokenizer,
    force: float | None = None,
    threads: int = 0,
) -> AsyncIterator[tuple[Executor, dict[Tier, Resident]]]:
    """Both models on the CPU, in an executor that takes sequences."""
    set_cpu_threads(threads)
    engines: dict[Tier, Resident] = {}
    for tier, directory in models.items():
        options = EngineOptions(
            directory, 2 << 30, precision=precision, max_context_tokens=2048,
            num_valid_ids=tokenizer.num_valid_ids,
        )  # fmt: skip
        engine = load_engine(options, lambda _: None)
        forced = tier == T and force is not None
        engines[tier] = Forced(engine, force, 1000) if forced else Resident(engine)
    executor = Executor(
        {tier: TierSetup(_lend(engine), 32, 512) for tier, engine in engines.items()}
    )
    await executor.start()
    try:
        for tier in engines:
            status = await executor.loaded(tier)
            if status.state is not TierState.READY:
                raise RuntimeError(f"the {tier.name} tier is {status}")
        yield executor, engines
    finally:
        await executor.stop(0.0)


async def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tactical", default=str(BUNDLED / "demo-tactical"))
    parser.add_argument("--strategic", default=str(BUNDLED / "demo-strategic"))
    parser.add_argument(
        "--precision", default="bf16", choices=("fp32", "bf16", "fp16", "int8", "int4")
    )
    parser.add_argument("--human-eval", type=Path)
    parser.add_argument("--scenes", nargs="+", default=["prose:1"])
    parser.add_argument("--prompts", type=int, default=0, help="of each round; 0: one batch")
    parser.add_argument("--longest-prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--force", type=float)
    parser.add_argument("--ways", nargs="+", default=WAYS[1:], choices=WAYS[1:])
    parser.add_argument(
        "--ignore-eos", action="store_true", help="every output has its full length"
    )
    parser.add_argument("--label", help="keep the file's other runs, and add this one")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.strategic)
    scenes = {}
    for name in args.scenes:
        kind, batch = name.split(":")
        scene = Scene(kind, int(batch))
        count = args.rounds * (args.prompts or scene.batch)
        scenes[scene] = prompts_of(kind, count, tokenizer, args.human_eval, args.longest_prompt)
    async with opened(
        {T: args.tactical, S: args.strategic}, args.precision, tokenizer, args.force, args.threads
    ) as (executor, engines):
        drafter = engines[T]
        pair = Pair(
            executor,
            args.new,
            args.temperature,
            drafter if isinstance(drafter, Forced) else None,
            (WAYS[0], *args.ways),
            args.ignore_eos,
        )
        found = await measure(pair, scenes, args.rounds, exact=args.precision == "fp32")
    run = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "models": {tier.name: engine.info.name for tier, engine in engines.items()},
        "precision": args.precision,
        "kernels": {tier.name: engine.info.kernels for tier, engine in engines.items()},
        "new_tokens": args.new,
        "ignore_eos": args.ignore_eos,
        "temperature": args.temperature,
        "forced_acceptance": args.force,
        "rounds": args.rounds,
        "scenes": found,
    }
    path = args.output or report.RESULTS / "speculation.json"
    runs = json.loads(path.read_text())["runs"] if args.label and path.exists() else {}
    report.write("speculation", {"runs": runs | {args.label or args.precision: run}}, path)


def _lend(engine: Resident) -> Callable[[Callable[[float], None]], Any]:
    return lambda _progress: engine


if __name__ == "__main__":
    asyncio.run(main())
