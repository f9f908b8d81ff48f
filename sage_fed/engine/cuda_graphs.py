"""The forward pass by CUDA graphs: a step is padded to a bucket, copied in, and replayed.

Owns the buckets (so many sequences with so many new tokens each, and block tables of one width),
their static inputs, and what is captured over them: one launch instead of hundreds. One new token
each is decoding; more are drafts to be verified, and a graph has the logits of every row. Padding
rows are whole: token 0 at position 0 of a scratch block that belongs to no sequence, cut off from
the results. What fits no bucket runs as it comes, token for token the same. Compiling needs Triton
and a C compiler; without them graphs are made of torch's own kernels, and `name` says so.
`EagerCapture` records nothing and does the same work again on any device, so that a mistake in the
static tensors shows without a GPU.
Draws nothing. Fails with torch's out-of-memory error.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.attention import Heads, KVCache
from sage_fed.engine.batch import Batch, BatchBuilder, Packer, add_slots, blocks_used, pinned_like
from sage_fed.engine.decoder import Decoder, Forwarded, Pass, Queued, TorchForward, resolved
from sage_fed.engine.machine import default_directory, private
from sage_fed.engine.sampling import best_of
from sage_fed.errors import ModelLoadError
from sage_fed.steps import BLOCK_SIZE, Chunk


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
        self.newest = newest
        """Where an engine leaves what it has drawn, for the next step."""
        self._scratch_block = scratch_block
        self._dtype = dtype
        self._buckets: Buckets | None = None
        self._graphs: dict[Bucket, tuple[StaticBatch, Work]] = {}
        self._logits: torch.Tensor | None = None
        self._best: torch.Tensor | None = None

    def prepare(self, buckets: Buckets, num_ids: int, progress: Callable[[float], None]) -> None:
        """Capture every bucket, largest first: the others then fit the memory it has taken."""
        device = self.newest.device
        rows = max(bucket.rows for bucket in buckets.all)
        self._logits = torch.empty(rows, num_ids, dtype=self._dtype, device=device)
        self._best = torch.empty(rows, dtype=torch.int64, device=device)
        order = sorted(buckets.all, key=lambda b: (b.rows, b.blocks), reverse=True)
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
        drawing = tuple(index for index, chunk in enumerate(chunks) for _ in chunk.draws)
        if not drawing:
            return Forwarded(None, (), ())
        assert self._logits is not None
        assert self._best is not None
        rows = bucket.drawn(chunks)
        if rows == range(len(rows)):
            logits, best = self._logits[: len(rows)], self._best[: len(rows)]
        else:
            packer = Packer()
            packer.add(rows)
            (at,) = packer.move(self._logits.device)
            logits, best = self._logits.index_select(0, at), self._best.index_select(0, at)
        draws = tuple(draw for chunk in chunks for draw in chunk.draws)
        return Forwarded(logits, draws, drawing, best)

    def _work(self, bucket: Bucket, static: StaticBatch) -> Work:
        assert self._logits is not None
        assert self._best is not None
        logits_out, best_out = self._logits[: bucket.rows], self._best[: bucket.rows]

        def work() -> None:
            static.group.prepare()
            batch = replace(static.batch, token_ids=resolved(static.batch.token_ids, self.newest))
            logits = self._decoder.logits(self._decoder.forward(batch))
            logits_out.copy_(logits)
            best_out.copy_(best_of(logits))

        return work


Work = Callable[[], None]
Function = Callable[..., torch.Tensor]

_WARM_UP_RUNS = 2
"""Before a capture: the first lets libraries choose and compile, the second shows they are done."""

_TRITON_CAPABILITY = (7, 0)
_RECOMPILES = 64


class GraphCapture(Protocol):
    """Compiles functions and records work; one for each engine."""

    @property
    def name(self) -> str:
        """What `ModelInfo.kernels` says of it; "" where nothing is recorded."""

    def compile(self, function: Function, *, widened: bool) -> Function:
        """The same function, faster where it can be had; only to be called by captured work.

        The first dimension of its tensor arguments is a number of rows. `widened` says that it
        multiplies by weights that are stored narrower than they are computed with.
        """

    def capture(self, work: Work) -> Work:
        """Do `work`, and return what does it again on the same tensors."""


class EagerCapture:
    """Does the work again, call by call."""

    name = ""

    def compile(self, function: Function, *, widened: bool) -> Function:  # noqa: ARG002 - as others
        """Return `function`."""
        return function

    def capture(self, work: Work) -> Work:
        """Return `work`, once done."""
        work()
        return work


class CudaCapture:
    """CUDA graphs that share one pool of memory: they never run at the same time.

    Captured on a stream of their own, replayed on the current one. Another thread may use the
    device meanwhile (the other tier serves while this one loads), so only this thread's calls
    are checked for what a capture forbids.
    """

    def __init__(self, device: torch.device, *, compiles: bool) -> None:
        self._device = device
        self._compiles = compiles
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def name(self) -> str:
        """What it does."""
        return "compile+graphs" if self._compiles else "graphs"

    def compile(self, function: Function, *, widened: bool) -> Function:
        """Compile where Triton is there; see `GraphCapture`."""
        if not self._compiles:
            return function
        # Read at the first compilation; what is there from an earlier start is not compiled again.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_directory()))
        # A product of one row becomes a reduction, which reads weights at nearly full speed and
        # takes in what is around it, but only with tuned tiles. Of several rows, Triton's own
        # products can widen weights as they read them; for the others cuBLAS is as good.
        options = {"coordinate_descent_tuning": True, "max_autotune_gemm": widened}
        return compiled_by_rows(function, options=options)

    def capture(self, work: Work) -> Work:
        """Warm up, record; the returned replay only queues."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                work()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`: it collects garbage and empties the cache at every entry.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay


def can_compile(device: torch.device) -> bool:
    """Whether what torch compiles for this device could be built and run here."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    triton = importlib.util.find_spec("triton") is not None
    capable = torch.cuda.get_device_capability(device) >= _TRITON_CAPABILITY
    return triton and capable and compiler is not None


def compiled_by_rows(function: Function, **how: Any) -> Function:  # noqa: ANN401 - torch's own
    """`function` compiled twice, by `torch.compile(**how)`: for one row, and for any number.

    All other sizes are fixed: those of a model are, and another model gets code of its own.
    """
    # Here, because it takes seconds, and most processes compile nothing.
    from torch import _dynamo as dynamo  # noqa: PLC0415

    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, **how)

    def by_rows(*arguments: Any) -> torch.Tensor:  # noqa: ANN401 - as the function's
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.dim() > 1 and len(argument) > 1:
                dynamo.maybe_mark_dynamic(argument, 0)
        # The limit is one for all models of the process, and each precision counts.
        with dynamo.config.patch(recompile_limit=_RECOMPILES):
            return compiled(*arguments)

    return by_rows


def compiled_directory() -> Path:
    """Where compiled code is kept over starts: with the service, or with the user.

    Raises:
        ModelLoadError: others could write there, and so run code as us.
    """
    try:
        return private(default_directory("inductor"))
    except PermissionError as error:
        raise ModelLoadError(str(error)) from error
    except OSError as error:
        raise ModelLoadError(f"there is no directory to keep compiled code in ({error})") from error


_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_BATCHES_BEYOND = 32
"""Above the listed ones, every multiple: a padded row costs little beside so many others."""

_NARROWEST_BLOCKS = 16

VERIFIED_TOKENS = (2, 3, 5, 9, 17)
"""New tokens a sequence that are captured beside one: drafts of 1, 2, 4, 8 and 16 and the token
before them. A longer one has work enough to hide its launches."""

_MOST_VERIFIED_ROWS = 80
"""Of one bucket: up to there a step still takes little more than reading the weights does, so that
padding is nearly free; and every row has logits of its own, a third of a megabyte."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """`batch` sequences, `tokens` new ones each, `blocks` of context each."""

    batch: int
    tokens: int
    blocks: int

    @property
    def rows(self) -> int:
        """Tokens of a step, padding included; a sequence's stand together."""
        return self.batch * self.tokens

    def drawn(self, chunks: Sequence[Chunk]) -> range | list[int]:
        """The rows that are drawn from, in the chunks' order; a range if they are the first."""
        rows: list[int] = []
        for index, chunk in enumerate(chunks):
            end = index * self.tokens + len(chunk.token_ids)
            rows.extend(range(end - len(chunk.draws), end))
        first = range(len(rows))
        return first if rows == list(first) else rows


class Buckets:
    """Every bucket up to the largest step.

    `tokens` are the numbers of new tokens: 1 is decoding, more is verifying, of at most 80 rows.
    Beyond the narrowest, a bucket whose tables hold more than `capacity_blocks` is left out:
    gathering them would take more memory than a layer's whole cache, for padding that a ragged
    step does without.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_context_tokens: int,
        capacity_blocks: int,
        tokens: Sequence[int] = (1,),
    ) -> None:
        self._batches = _batches(max_batch)
        self._tokens = sorted(tokens)
        self._widths = _widths(-(-max_context_tokens // BLOCK_SIZE))
        self.all = tuple(
            Bucket(batch, count, width)
            for width in self._widths
            for count in self._tokens
            for batch in self._batches
            if count == 1 or batch * count <= _MOST_VERIFIED_ROWS
            if batch * width <= capacity_blocks or width == self._widths[0]
        )
        self._prepared = frozenset(self.all)

    def fit(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The smallest bucket that holds the chunks, where there is one worth its padding."""
        longest = max(len(chunk.token_ids) for chunk in chunks)
        width = max(map(blocks_used, chunks))
        batch = _at_least(self._batches, len(chunks))
        tokens = _at_least(self._tokens, longest)
        blocks = _at_least(self._widths, width)
        if batch is None or tokens is None or blocks is None:
            return None
        real = sum(len(chunk.token_ids) for chunk in chunks)
        verifies = any(len(chunk.draws) > 1 for chunk in chunks)
        if tokens > 1 and not verifies and 2 * real < len(chunks) * tokens:
            return None
        bucket = Bucket(batch, tokens, blocks)
        return bucket if bucket in self._prepared else None


def _batches(largest: int) -> list[int]:
    sizes = {size for size in _BATCHES if size < largest} | {largest}
    sizes.update(range(_BATCHES[-1] + _BATCHES_BEYOND, largest, _BATCHES_BEYOND))
    return sorted(sizes)


def _widths(largest: int) -> list[int]:
    """Powers of two, so that at most half of what is gathered is padding."""
    sizes = {largest}
    width = _NARROWEST_BLOCKS
    while width < largest:
        sizes.add(width)
        width *= 2
    return sorted(sizes)


def _at_least(sizes: Sequence[int], needed: int) -> int | None:
    index = bisect_left(sizes, needed)
    return sizes[index] if index < len(sizes) else None


_STALE_SLOTS = BLOCK_SIZE - 1
"""A sequence's newest block was entered with at least one token."""


class StaticGroup:
    """Attention of `batch` sequences with `tokens` new ones each; see `AttentionGroup`.

    Every shape follows from the bucket. Who attends to what follows from the positions, on the
    device; `prepare` works it out once a step. `tables` is int64 [batch * blocks].
    """

    def __init__(
        self,
        bucket: Bucket,
        heads: Heads,
        positions: torch.Tensor,
        tables: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._bucket = bucket
        self._heads = heads
        self._positions = positions
        self._tables = tables
        self._dtype = dtype
        self._mask: torch.Tensor | None = None

    def prepare(self) -> None:
        """Make the step's mask [batch, 1, group * tokens or 1, slots]."""
        bucket = self._bucket
        slots = torch.arange(bucket.blocks * BLOCK_SIZE, device=self._positions.device)
        hidden = slots > self._positions.view(bucket.batch, bucket.tokens, 1)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, -math.inf)
        if bucket.tokens > 1:
            mask = mask.repeat(1, self._heads.group, 1)
        self._mask = mask[:, None]

    def release(self) -> None:
        """Forget the mask: a graph that was captured has its own."""
        self._mask = None

    def attend(self, layer: int, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Attend; see `AttentionGroup`."""
        batch, tokens, heads = self._bucket.batch, self._bucket.tokens, self._heads
        shape = (batch, tokens, heads.kv, heads.group, qkv.shape[-1])
        queries = qkv[:, : heads.query].view(shape).permute(0, 2, 3, 1, 4)
        keys, values = cache.gather(layer, self._tables, batch)
        # A KV head's query heads, at each of the tokens, are that head's queries.
        out = F.scaled_dot_product_attention(
            queries.reshape(batch, heads.kv, heads.group * tokens, -1),
            keys,
            values,
            attn_mask=self._mask,
        )
        out = out.view(batch, heads.kv, heads.group, tokens, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * tokens, -1)


class StaticBatch:
    """The inputs of one bucket in one buffer, which one copy fills."""

    def __init__(
        self,
        bucket: Bucket,
        heads: Heads,
        *,
        scratch_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._bucket = bucket
        self._scratch_block = scratch_block
        rows = bucket.rows
        sizes = (rows, rows, rows, bucket.batch * bucket.blocks, bucket.batch * _STALE_SLOTS)
        self._buffer = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        token_ids, positions, slots, tables, stale = self._buffer.split_with_sizes(sizes)
        self.group = StaticGroup(bucket, heads, positions, tables, dtype)
        self.batch = Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            stale=stale,
            groups=(self.group,),
            rows=None,
            draws=(),
            drawing=(),
            pending=True,
        )
        self.fill(())

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Queue the inputs of `chunks`, and of as many padding rows as are left."""
        bucket, scratch = self._bucket, self._scratch_block
        token_ids, positions, slots = array("q"), array("q"), array("q")
        tables, stale = array("q"), array("q")
        for chunk in chunks:
            count = len(chunk.token_ids)
            padding = bucket.tokens - count
            token_ids.extend((*chunk.token_ids, *(0,) * padding))
            positions.extend((*range(chunk.start, chunk.start + count), *(0,) * padding))
            own: list[int] = []
            behind: list[int] = []
            add_slots(chunk, own, behind)
            slots.extend((*own, *(scratch * BLOCK_SIZE,) * padding))
            stale.extend(behind)
            used = chunk.blocks[: blocks_used(chunk)]
            # Padded with the sequence's own first block: what strangers left in others must
            # not be read, not even to be masked.
            tables.extend((*used, *used[:1] * (bucket.blocks - len(used))))
        empty = bucket.batch - len(chunks)
        token_ids.extend((0,) * (empty * bucket.tokens))
        positions.extend((0,) * (empty * bucket.tokens))
        slots.extend((scratch * BLOCK_SIZE,) * (empty * bucket.tokens))
        tables.extend((scratch,) * (empty * bucket.blocks))
        stale.extend((scratch * BLOCK_SIZE,) * (bucket.batch * _STALE_SLOTS - len(stale)))
        for more in (positions, slots, tables, stale):
            token_ids.extend(more)
        packed = torch.frombuffer(token_ids, dtype=torch.int64)
        if self._buffer.is_cuda:
            packed = pinned_like(packed).copy_(packed)
        self._buffer.copy_(packed, non_blocking=True)
