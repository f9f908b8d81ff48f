"""The executor with the bundled pair: real forward passes, random company, the same tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from executor_rig import Listener, Tokens, read, submit
from surroundings import MODELS

from sage_fed.core import TIER_ROLES, Sampling, Tier, TierState, TierStatus
from sage_fed.device import Ended, EndReason, Executor, SequenceSpec, TierSetup
from sage_fed.engine import Engine, EngineOptions, generate, load_engine
from sage_fed.engine.cuda_graphs import EagerCapture
from sage_fed.steps import StepReport

DEADLINE_S = 90.0
VOCAB = 490


def options(tier: Tier) -> EngineOptions:
    directory = MODELS / f"demo-{tier.name}"
    return EngineOptions(str(directory), kv_cache_bytes=16 << 20, max_context_tokens=256)


@pytest.fixture(scope="module")
def alone() -> dict[Tier, Engine]:
    """One engine a tier that never sees more than one sequence."""
    return {tier: load_engine(options(tier), lambda _fraction: None) for tier in TIER_ROLES}


def sequential(engine: Engine, spec: SequenceSpec) -> list[int]:
    """The sequence's output where nothing else is on the device and nothing is cut."""
    ends = () if spec.ignore_eos else engine.eos_token_ids
    made = generate(
        engine, [spec.prompt], spec.sampling, spec.max_new_tokens, tier=spec.tier, ends=ends
    )
    return list(made.outputs[0])


def traffic(chance: random.Random, count: int) -> list[SequenceSpec]:
    """Random sequences on both tiers: greedy, sampled and penalised."""
    samplings = [
        Sampling(),
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(presence_penalty=0.7, frequency_penalty=0.4),
        Sampling(temperature=0.8, top_p=0.95, seed=5),
    ]
    return [
        SequenceSpec(
            seq_id,
            chance.choice(list(TIER_ROLES)),
            tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 90))),
            chance.randint(1, 24),
            chance.choice(samplings),
            ignore_eos=chance.random() < 0.5,
        )
        for seq_id in range(count)
    ]


async def leave(executor: Executor, stream: Listener) -> tuple[list[int], Ended]:
    """Read something, then go away."""
    first = await stream.next()
    executor.cancel(stream.spec.seq_id)
    tokens, ended = await read(stream)
    return [d.token_id for d in first.drawn] + tokens if isinstance(first, Tokens) else [], ended


class Company:
    """Lets a newcomer join a batch that is under way."""

    def __init__(self) -> None:
        self._stepped = asyncio.Event()
        self.preempted = 0

    def step_done(self, report: StepReport) -> None:
        """Somebody moved."""
        assert report.num_sequences
        self.preempted += report.num_preempted
        self._stepped.set()

    def tier_changed(self, status: TierStatus) -> None:
        """Tiers are not of interest here."""

    async def moves(self, readers: list[asyncio.Task[tuple[list[int], Ended]]]) -> None:
        """Wait for the next step, or for somebody's end."""
        self._stepped.clear()
        step = asyncio.create_task(self._stepped.wait())
        await asyncio.wait(
            [step, *(r for r in readers if not r.done())], return_when=asyncio.FIRST_COMPLETED
        )
        step.cancel()


def loading(tier: Tier) -> Callable[[Callable[[float], None]], Engine]:
    return lambda progress: load_engine(options(tier), progress)


@pytest.mark.parametrize("max_batch", range(1, 9))
async def test_company_does_not_change_a_token(alone: dict[Tier, Engine], max_batch: int) -> None:
    """Whatever joins and leaves, each stream is the sequential one or, cancelled, its beginning."""
    chance = random.Random(max_batch)
    asked = traffic(chance, 12)
    company = Company()
    executor = Executor(
        {
            tier: TierSetup(loading(tier), max_batch=max_batch, prefill_chunk_tokens=48)
            for tier in TIER_ROLES
        },
        observers=[company],
    )
    await executor.start()
    gone: set[int] = set()
    readers: list[asyncio.Task[tuple[list[int], Ended]]] = []
    async with asyncio.timeout(DEADLINE_S):
        for tier in TIER_ROLES:
            assert TierState.READY is (await executor.loaded(tier)).state
        for spec in asked:
            stream = submit(executor, spec)
            if chance.random() < 0.25:
                gone.add(spec.seq_id)
                readers.append(asyncio.create_task(leave(executor, stream)))
            else:
                readers.append(asyncio.create_task(read(stream)))
            if chance.random() < 0.3:
                await company.moves(readers)
        results = await asyncio.gather(*readers)
    loads = [executor.load(tier) for tier in TIER_ROLES]
    await executor.stop(0.0)
    for spec, (tokens, ended) in zip(asked, results, strict=True):
        expected = sequential(alone[spec.tier], spec)
        assert expected[: len(tokens)] == tokens
        if spec.seq_id not in gone:
            assert expected == tokens
            assert ended.reason in {EndReason.EOS, EndReason.LENGTH}
    assert [(0, 0, 0)] * 2 == [(o.running, o.waiting, o.kv_tokens_used) for o in loads]


async def test_two_steps_in_flight_change_no_token(alone: dict[Tier, Engine]) -> None:
    """With engines whose draws stay on the device, ends of text and cancels between the steps."""
    chance = random.Random(12)
    asked = traffic(chance, 16)
    engines: dict[Tier, Engine] = {}

    def pipelined(tier: Tier) -> Callable[[Callable[[float], None]], Engine]:
        def load(progress: Callable[[float], None]) -> Engine:
            torch = replace(options(tier), kernels="torch")
            engines[tier] = load_engine(torch, progress, EagerCapture())
            return engines[tier]

        return load

    executor = Executor(
        {
            tier: TierSetup(pipelined(tier), max_batch=5, prefill_chunk_tokens=48)
            for tier in TIER_ROLES
        }
    )
    await executor.start()
    async with asyncio.timeout(DEADLINE_S):
        for tier in TIER_ROLES:
            assert TierState.READY is (await executor.loaded(tier)).state
            assert engines[tier].pipelined
        streams = [submit(executor, spec) for spec in asked]
        readers = [
            leave(executor, stream) if i % 5 == 4 else read(stream)
            for i, stream in enumerate(streams)
        ]
        results = await asyncio.gather(*readers)
    loads = [executor.load(tier) for tier in TIER_ROLES]
    await executor.stop(0.0)
    for i, (spec, (tokens, ended)) in enumerate(zip(asked, results, strict=True)):
        expected = sequential(alone[spec.tier], spec)
        assert expected[: len(tokens)] == tokens
        if i % 5 != 4:
            assert expected == tokens
            assert ended.reason in {EndReason.EOS, EndReason.LENGTH}
    assert [(0, 0, 0)] * 2 == [(o.running, o.waiting, o.kv_tokens_used) for o in loads]


@pytest.mark.parametrize("tier", TIER_ROLES)
async def test_a_draft_changes_no_token(alone: dict[Tier, Engine], tier: Tier) -> None:
    """Right, wrong from some token on, or wrong at once: rows of one chunk are the model's own."""
    chance = random.Random(5)
    samplings = (Sampling(temperature=0.0), Sampling(temperature=0.8, seed=3))
    asked: list[SequenceSpec] = []
    for seq_id, right in enumerate((20, 7, 0, 20, 7, 0)):
        prompt = tuple(chance.randrange(VOCAB) for _ in range(30))
        sampling = samplings[seq_id % 2]
        plain = SequenceSpec(seq_id, tier, prompt, 21, sampling, ignore_eos=True)
        own = sequential(alone[tier], plain)
        draft = (*own[:right], *((token_id + 1) % VOCAB for token_id in own[right:20]))
        asked.append(replace(plain, speculates=True, draft_tokens=tuple(draft)))
    executor = Executor({tier: TierSetup(loading(tier))})
    await executor.start()
    async with asyncio.timeout(DEADLINE_S):
        assert TierState.READY is (await executor.loaded(tier)).state
        results = await asyncio.gather(*(read(submit(executor, spec)) for spec in asked))
    await executor.stop(0.0)
    for spec, (tokens, _) in zip(asked, results, strict=True):
        assert sequential(alone[tier], spec) == tokens
    for right, (_, ended) in zip((20, 7, 0) * 2, results, strict=True):
        assert min(right, 4) <= ended.accepted_tokens <= ended.verified_tokens


@pytest.mark.parametrize("tier", TIER_ROLES)
async def test_a_prompt_found_again_gives_the_same_tokens(
    alone: dict[Tier, Engine], tier: Tier
) -> None:
    """A hit reads keys and values that another sequence stored, cut where chunks ended then."""
    chance = random.Random(3)
    system = tuple(chance.randrange(VOCAB) for _ in range(75))
    asked = [
        SequenceSpec(seq_id, tier, (*system, *tail), 24, ignore_eos=True, account="a")
        for seq_id, tail in enumerate([(), (5,), tuple(range(20, 41)), (), (5, 6), (5,)])
    ]
    executor = Executor({tier: TierSetup(loading(tier), prefill_chunk_tokens=37)})
    await executor.start()
    results: list[tuple[list[int], Ended]] = []
    async with asyncio.timeout(DEADLINE_S):
        assert TierState.READY is (await executor.loaded(tier)).state
        results.append(await read(submit(executor, asked[0])))
        results += await asyncio.gather(*(read(submit(executor, spec)) for spec in asked[1:]))
    await executor.stop(0.0)
    for spec, (tokens, _) in zip(asked, results, strict=True):
        assert sequential(alone[tier], spec) == tokens
    assert [0, 64, 64, 64, 64, 64] == [ended.cached_tokens for _, ended in results]


@pytest.mark.parametrize("tier", TIER_ROLES)
async def test_an_interruption_changes_no_token(alone: dict[Tier, Engine], tier: Tier) -> None:
    """Recomputed keys and values continue every kind of sampling where it was."""
    chance = random.Random(8)
    samplings = [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(presence_penalty=0.7, frequency_penalty=0.4),
        Sampling(temperature=0.9, top_p=0.9, seed=11, top_logprobs=0),
    ]
    asked = [
        SequenceSpec(
            seq_id,
            tier,
            tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 60))),
            40,
            samplings[seq_id % 3],
            ignore_eos=True,
            prefix_cache=seq_id % 2 == 0,
        )
        for seq_id in range(8)
    ]
    watch = Company()
    small = replace(options(tier), kv_cache_bytes=(20 if tier == Tier.TACTICAL else 80) * 16384)
    setup = TierSetup(
        lambda progress: load_engine(small, progress), prefill_chunk_tokens=37, kv_overcommit=8.0
    )
    executor = Executor({tier: setup}, observers=[watch])
    await executor.start()
    async with asyncio.timeout(DEADLINE_S):
        assert TierState.READY is (await executor.loaded(tier)).state
        readers = [read(submit(executor, spec)) for spec in asked]
        results = await asyncio.gather(*readers)
    await executor.stop(0.0)
    assert 0 < watch.preempted
    for spec, (tokens, ended) in zip(asked, results, strict=True):
        assert sequential(alone[tier], spec) == tokens
        assert (len(spec.prompt), 40) == (ended.prompt_tokens, ended.output_tokens)
