"""The seam between a step and what computes it: chunks in, logits of the wanted rows out.

Owns the words (`Forward`, `Forwarded`) and torch's way of doing it, on any device.
Knows nothing of sampling, sequences or time. Fails with torch's own out-of-memory error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sage_fed.engine.batch import BatchBuilder
from sage_fed.engine.decoder import Decoder
from sage_fed.steps import Chunk, Draw


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a pass over a step's chunks has left to choose from.

    `logits` is [len(draws), valid ids] of a floating type, or None where no chunk has a draw.
    `drawing[i]` is the index, in the step, of the chunk that `draws[i]` belongs to.
    `best`, where the pass has found it already, is the argmax of each row.
    """

    logits: torch.Tensor | None
    draws: tuple[Draw, ...]
    drawing: tuple[int, ...]
    best: torch.Tensor | None = None


class Forward(Protocol):
    """One model's forward pass and its KV cache, on one device."""

    def run(self, chunks: Sequence[Chunk]) -> Forwarded:
        """Queue or do the pass, extending the cache; results may still be on their way."""


class TorchForward:
    """The pass as torch operations, on whatever device the weights are.

    Where there is a `newest`, int64 on the device, a token id of -1 - i stands for
    `newest[i]`: a token that the host need not have seen yet.
    """

    def __init__(
        self, batches: BatchBuilder, decoder: Decoder, newest: torch.Tensor | None = None
    ) -> None:
        self._batches = batches
        self._decoder = decoder
        self._newest = newest

    def run(self, chunks: Sequence[Chunk]) -> Forwarded:
        """Run; see `Forward`."""
        batch = self._batches.build(chunks)
        if batch.pending:
            assert self._newest is not None
            batch = replace(batch, token_ids=resolved(batch.token_ids, self._newest))
        hidden = self._decoder.forward(batch)
        if not batch.draws:
            return Forwarded(None, (), ())
        if batch.rows is not None:
            hidden = hidden.index_select(0, batch.rows)
        return Forwarded(self._decoder.logits(hidden), batch.draws, batch.drawing)


def resolved(token_ids: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """`token_ids` with each -1 - i replaced by `newest[i]`."""
    return torch.where(token_ids < 0, newest[(-1 - token_ids).clamp_min(0)], token_ids)
