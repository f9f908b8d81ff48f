"""The smallest thing that can drive an engine: it owns the blocks and builds the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sage_fed.core import Logprob, Sampling, Tier
from sage_fed.engine import Engine
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

GREEDY = Sampling()


@dataclass
class Running:
    """One sequence: its prompt, how far it has got, and the blocks it owns."""

    seq_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    num_new: int
    blocks: tuple[int, ...]
    pieces: list[int]
    done: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it has all the tokens it was started for."""
        return len(self.output) >= self.num_new

    def chunk(self) -> Chunk:
        """What it wants next: a piece of its prompt, or its newest token."""
        if self.output:
            tokens, last = (self.output[-1],), True
        else:
            size = self.pieces.pop(0) if self.pieces else len(self.prompt)
            tokens = self.prompt[self.done : self.done + size]
            last = self.done + len(tokens) == len(self.prompt)
        seen = (*self.prompt, *self.output) if self.sampling.repetition_penalty != 1 else ()
        counts = tuple(Counter(self.output).items()) if self.sampling.counts_output else ()
        draws = (Draw(self.sampling, len(self.output), seen, counts),) if last else ()
        return Chunk(self.seq_id, self.done, tokens, self.blocks, draws)


class Driver:
    """Sequences on one engine; each step advances whichever the caller names."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.free = list(range(engine.num_blocks))
        self.running: dict[int, Running] = {}
        self.finished: dict[int, Running] = {}

    def add(
        self,
        seq_id: int,
        prompt: tuple[int, ...],
        num_new: int,
        sampling: Sampling = GREEDY,
        pieces: Sequence[int] = (),
    ) -> None:
        """Start a sequence whose prompt is fed in `pieces` (all at once without)."""
        needed = -(-(len(prompt) + num_new) // BLOCK_SIZE)
        blocks = tuple(self.free.pop() for _ in range(needed))
        self.running[seq_id] = Running(seq_id, prompt, sampling, num_new, blocks, list(pieces))

    def step(self, *seq_ids: int) -> None:
        """Advance `seq_ids`, or every running sequence, by one step."""
        moving = [self.running[i] for i in seq_ids or self.running]
        chunks = [sequence.chunk() for sequence in moving]
        drawn = self.engine.run(Step(Tier.TACTICAL, tuple(chunks)))
        assert [c.seq_id for c in chunks if c.draws] == [d.seq_id for d in drawn]
        for sequence, chunk in zip(moving, chunks, strict=True):
            sequence.done += len(chunk.token_ids)
        for choice in drawn:
            sequence = self.running[choice.seq_id]
            sequence.output.append(choice.token_id)
            sequence.logprobs.append(choice.logprob)
            if sequence.finished:
                self.end(choice.seq_id)

    def end(self, seq_id: int) -> None:
        """Take a sequence out and free its blocks."""
        sequence = self.running.pop(seq_id)
        self.free.extend(sequence.blocks)
        self.finished[seq_id] = sequence

    def finish(self) -> Mapping[int, tuple[int, ...]]:
        """Run until nothing runs; outputs by sequence."""
        while self.running:
            self.step()
        return {i: tuple(sequence.output) for i, sequence in self.finished.items()}


def generate(
    engine: Engine,
    prompt: tuple[int, ...],
    num_new: int,
    sampling: Sampling = GREEDY,
    pieces: Sequence[int] = (),
) -> tuple[int, ...]:
    """One sequence alone, from its prompt to its last token."""
    driver = Driver(engine)
    driver.add(0, prompt, num_new, sampling, pieces)
    return driver.finish()[0]


def logits(engine: Engine, prompt: tuple[int, ...], pieces: Sequence[int] = ()) -> torch.Tensor:
    """Logits after a prompt, less their mean, from what every client can ask for."""
    driver = Driver(engine)
    driver.add(0, prompt, 1, Sampling(top_logprobs=1 << 20), pieces)
    driver.finish()
    logprob = driver.finished[0].logprobs[0]
    assert logprob is not None
    values = torch.tensor([value for _, value in sorted(logprob.top)])
    return values - values.mean()
