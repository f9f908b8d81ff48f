"""The seam between a step and what computes it: chunks in, logits of the wanted rows out.

Owns the words (`Forward`, `Forwarded`) and torch's way of doing it, on any device.
Knows nothing of sampling, sequences or time. Fails with torch's own out-of-memory error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sage_fed.engine.batch import Batch, BatchBuilder
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


class Pass(Protocol):
    """A pass under way."""

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on to the end; or pause between two layers, and None.

        With `pause_after_s` it goes on by as many layers as that time is enough for, and by one.
        """


class Forward(Protocol):
    """One model's forward pass and its KV cache, on one device."""

    @property
    def num_parts(self) -> int:
        """Into how many parts a pass can be divided; 1 where it never pauses."""

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Lay out a pass that extends the cache; one that was not finished is forgotten.

        Where it never pauses, `advance` queues or does it; results may still be on their way.
        """


@dataclass(frozen=True, slots=True)
class Queued:
    """A pass that is on the device as a whole."""

    forwarded: Forwarded

    def advance(self, pause_after_s: float | None) -> Forwarded:
        """Return what it leaves; there is nothing to pause between."""
        del pause_after_s
        return self.forwarded


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

    @property
    def num_parts(self) -> int:
        """The layers; 1 where a launch only queues, so that the host's clock says nothing."""
        return self._decoder.num_layers if self._newest is None else 1

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Begin; see `Forward`."""
        batch = self._batches.build(chunks)
        if batch.pending:
            assert self._newest is not None
            batch = replace(batch, token_ids=resolved(batch.token_ids, self._newest))
        return TorchPass(self._decoder, batch)


class TorchPass:
    """A pass that goes on layer by layer."""

    def __init__(self, decoder: Decoder, batch: Batch) -> None:
        self._decoder = decoder
        self._batch = batch
        self._layers = decoder.layers(batch)
        self._hidden: torch.Tensor | None = None

    def advance(self, pause_after_s: float | None) -> Forwarded | None:
        """Go on; see `Pass`."""
        begun_s = layer_begun_s = time.monotonic()
        for hidden in self._layers:
            self._hidden = hidden
            if pause_after_s is None:
                continue
            now = time.monotonic()
            # The next layer is taken to be as long as this one.
            if now + (now - layer_begun_s) - begun_s > pause_after_s:
                return None
            layer_begun_s = now
        return self._forwarded()

    def _forwarded(self) -> Forwarded:
        batch, hidden = self._batch, self._hidden
        if not batch.draws:
            return Forwarded(None, (), ())
        assert hidden is not None
        if batch.rows is not None:
            hidden = hidden.index_select(0, batch.rows)
        return Forwarded(self._decoder.logits(hidden), batch.draws, batch.drawing)


def resolved(token_ids: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """`token_ids` with each -1 - i replaced by `newest[i]`."""
    return torch.where(token_ids < 0, newest[(-1 - token_ids).clamp_min(0)], token_ids)
