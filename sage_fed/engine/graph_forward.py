"""The pass by graphs: a step is padded to its bucket, copied in, and replayed.

Owns the graphs and their shared outputs. Knows no sampling. What fits no bucket goes the plain
way, token by token the same. Fails with torch's own out-of-memory error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sage_fed.engine.attention import Heads
from sage_fed.engine.batch import BatchBuilder
from sage_fed.engine.buckets import Bucket, Buckets
from sage_fed.engine.decoder import Decoder
from sage_fed.engine.forward import Forwarded, Pass, Queued, TorchForward, resolved
from sage_fed.engine.graphs import GraphCapture, Work
from sage_fed.engine.staging import Packer
from sage_fed.engine.static_batch import StaticBatch
from sage_fed.steps import Chunk


class GraphForward:
    """The pass by the graph of the step's bucket; by `plain` where it has none.

    `prepare` captures every bucket; until then all steps are plain. Outputs are shared by the
    graphs: what a step leaves in them is good until the next one is queued.
    """

    def __init__(
        self,
        plain: TorchForward,
        batches: BatchBuilder,
        decoder: Decoder,
        heads: Heads,
        capture: GraphCapture,
        *,
        newest: torch.Tensor,
        scratch_block: int,
        dtype: torch.dtype,
    ) -> None:
        self._plain = plain
        self._batches = batches
        self._decoder = decoder
        self._heads = heads
        self._capture = capture
        self._newest = newest
        self._scratch_block = scratch_block
        self._dtype = dtype
        self._buckets: Buckets | None = None
        self._graphs: dict[Bucket, tuple[StaticBatch, Work]] = {}
        self._logits: torch.Tensor | None = None
        self._best: torch.Tensor | None = None

    def prepare(self, buckets: Buckets, num_ids: int, progress: Callable[[float], None]) -> None:
        """Capture every bucket, largest first: the others then fit the memory it has taken."""
        device = self._newest.device
        rows = max(bucket.batch for bucket in buckets.all)
        self._logits = torch.empty(rows, num_ids, dtype=self._dtype, device=device)
        self._best = torch.empty(rows, dtype=torch.int64, device=device)
        order = sorted(buckets.all, key=lambda b: (b.batch * b.tokens, b.blocks), reverse=True)
        for number, bucket in enumerate(order):
            static = StaticBatch(
                bucket,
                self._heads,
                scratch_block=self._scratch_block,
                dtype=self._dtype,
                device=device,
            )
            replay = self._capture.capture(self._work(bucket, static))
            static.group.release()
            self._graphs[bucket] = (static, replay)
            progress((number + 1) / len(order))
        self._buckets = buckets

    @property
    def num_parts(self) -> int:
        """1: a graph is replayed as a whole."""
        return 1

    def begin(self, chunks: Sequence[Chunk]) -> Pass:
        """Begin, and where there is a graph queue it; see `Forward`."""
        bucket = self._buckets.fit(chunks) if self._buckets else None
        if bucket is None:
            return self._plain.begin(chunks)
        return Queued(self._replay(bucket, chunks))

    def _replay(self, bucket: Bucket, chunks: Sequence[Chunk]) -> Forwarded:
        for chunk in chunks:
            self._batches.check(chunk)
        static, replay = self._graphs[bucket]
        static.fill(chunks)
        replay()
        drawing = tuple(index for index, chunk in enumerate(chunks) if chunk.draw is not None)
        if not drawing:
            return Forwarded(None, (), ())
        assert self._logits is not None
        assert self._best is not None
        logits, best = self._logits[: len(chunks)], self._best[: len(chunks)]
        if len(drawing) < len(chunks):
            packer = Packer()
            packer.add(drawing)
            (rows,) = packer.move(logits.device)
            logits, best = logits.index_select(0, rows), best.index_select(0, rows)
        draws = tuple(chunk.draw for chunk in chunks if chunk.draw is not None)
        return Forwarded(logits, draws, drawing, best)

    def _work(self, bucket: Bucket, static: StaticBatch) -> Work:
        assert self._logits is not None
        assert self._best is not None
        logits_out, best_out = self._logits[: bucket.batch], self._best[: bucket.batch]

        def work() -> None:
            static.group.prepare()
            batch = replace(static.batch, token_ids=resolved(static.batch.token_ids, self._newest))
            hidden = self._decoder.forward(batch)
            if batch.rows is not None:
                hidden = hidden.index_select(0, batch.rows)
            logits = self._decoder.logits(hidden)
            logits_out.copy_(logits)
            best_out.copy_(logits.argmax(-1))

        return work
