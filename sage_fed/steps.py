"""What the scheduler asks of an engine for one step, and what the engine answers.

Floor 0, so that `scheduler` (no torch) and `engine` (no queues) need not know each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.core import Logprob, Sampling, Tier

BLOCK_SIZE = 16
"""Tokens in one KV block; a sequence owns whole blocks."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose the token that follows a chunk.

    `index` counts the sequence's output tokens; with `sampling.seed` it determines the
    random number, so the choice does not depend on what else is in the batch.
    `seen` are the token ids that a repetition penalty applies to; empty when it is 1.
    """

    sampling: Sampling
    index: int
    seen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: a piece of its prompt, or its newest token.

    `start` is the position of `token_ids[0]`; every earlier position is in the cache already.
    `blocks` are the sequence's KV blocks in order, enough for `start + len(token_ids)`.
    `draw` is None where no token is wanted yet (a prompt piece that is not the last).
    """

    seq_id: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one tier's engine over a ragged batch of chunks."""

    tier: Tier
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model in this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token chosen for a chunk with a `draw`; `logprob` only where it was asked for."""

    seq_id: int
    token_id: int
    logprob: Logprob | None = None
