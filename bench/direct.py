"""The engine and the executor alone, in this process, and requests as they travel to a daemon.

Owns what the benchmarks of the daemon compare it with. Does not know what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from load_generator import Reply, stream_request
from pair.tasks import task_at

from sage_fed.core import Message, Sampling, Tier, TierState
from sage_fed.daemon.build import tier_setup
from sage_fed.device import Executor, SequenceSpec
from sage_fed.engine import generate
from sage_fed.model_files import resolve_model
from sage_fed.settings import Settings
from sage_fed.steps import BLOCK_SIZE, Engine, SampledToken
from sage_fed.text import Tokenizer
from sage_fed.v1 import inference_pb2 as pb

_GREEDY = Sampling(temperature=0.0)

RICH = ("--set", "budget.initial_atp=900000000", "--set", "budget.capacity_atp=1000000000")
"""Flags of an account that a benchmark does not run dry."""


def prompts(count: int, round_index: int) -> list[str]:
    """Prompts that no round before has had, so that no cache knows them."""
    first = 1000 * round_index
    return [f"{first + i}. {task_at(1, first + i, 'test').prompt}" for i in range(count)]


class Alone:
    """The engine, and the executor over it, in this process."""

    def __init__(self, settings: Settings) -> None:
        self._tokenizer = Tokenizer.load(resolve_model(settings.tactical.model))
        self._ids = itertools.count(1)
        self.engine: Engine | None = None
        setup = tier_setup(settings, Tier.TACTICAL, self._tokenizer)

        def load(progress: Callable[[float], None]) -> Engine:
            self.engine = setup.load(progress)
            return self.engine

        self.executor = Executor(
            {Tier.TACTICAL: replace(setup, load=load)},
            max_stream_messages_per_s=settings.limits.max_stream_messages_per_s,
        )

    async def start(self) -> None:
        """Load, or fail."""
        await self.executor.start()
        status = await self.executor.loaded(Tier.TACTICAL)
        assert status.state is TierState.READY, status

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The daemon's work too, but not on these clocks."""
        return self._tokenizer.encode_messages((Message("user", prompt),))

    def run_engine(self, asked: list[tuple[int, ...]], num_new: int) -> float:
        """Steps one after another, from the executor's idle engine; seconds."""
        assert self.engine is not None
        # Blocks from the end of the pool: the executor's prefix cache fills from its beginning.
        each = -(-(max(map(len, asked)) + num_new) // BLOCK_SIZE)
        first = self.engine.num_blocks - each * len(asked)
        return generate(self.engine, asked, _GREEDY, num_new, first_block=first).at_s[-1]

    async def run_executor(self, asked: list[tuple[int, ...]], num_new: int) -> float:
        """The device's thread and the hand-over to a reader each; seconds."""
        begun = time.perf_counter()
        await asyncio.gather(*(self.ask(tokens, num_new) for tokens in asked))
        return time.perf_counter() - begun

    async def ask(self, tokens: tuple[int, ...], num_new: int) -> tuple[float, float]:
        """One sequence: seconds to its first token and to its end."""
        spec = SequenceSpec(
            seq_id=next(self._ids),
            tier=Tier.TACTICAL,
            prompt=tokens,
            max_new_tokens=num_new,
            sampling=_GREEDY,
            ignore_eos=True,
        )
        begun = time.perf_counter()
        first: list[float] = []

        def take(_tokens: Sequence[SampledToken]) -> None:
            if not first:
                first.append(time.perf_counter())

        await self.executor.submit(spec, take)
        return first[0] - begun, time.perf_counter() - begun


def job(prompt: str, num_new: int) -> bytes:
    """One streamed greedy request as it travels."""
    return stream_request(prompt, num_new, temperature=0.0).SerializeToString()


def check(replies: list[Reply], num_new: int) -> None:
    """Every stream brought what was asked for."""
    for reply in replies:
        last = pb.GenerateStreamResponse.FromString(reply.messages[-1])
        assert last.finished.usage.output_tokens == num_new, last


def thread_cpu_s(pid: int) -> dict[int, float]:
    """Processor seconds of a process's threads; the event loop's is the process's own id."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        found[int(path.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found
