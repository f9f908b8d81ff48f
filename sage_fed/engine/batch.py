"""One step's ragged batch as tensors: which token goes where, and who attends to what.

Owns the order of rows (first the chunks of one token, grouped by context length, then the longer
ones), and the crossing to the device and back: one copy each. On CUDA both go through pinned memory
and only queue; torch gives a pinned buffer out again only when its copies are done. Knows no
weights. A chunk that contradicts itself is a bug of the caller (assert).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sage_fed.engine.attention import (
    AttentionGroup,
    ContextGroup,
    DecodeGroup,
    Heads,
    PromptGroup,
)
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw

_SMALLEST_GROUP_BLOCKS = 16
"""Decode contexts up to this many blocks share one gather; above it, contexts within a factor
of two do, which bounds what padding a short context beside a long one can cost."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A step on the device.

    `token_ids`, `positions` and `slots` are int64 [tokens]. `stale` are the slots behind the
    newest token of a block that was just entered, to be cleared before the pass.
    `rows` selects the tokens whose logits are wanted, one for each of `draws`; None is all.
    `drawing[i]` is the index, in the step, of the chunk that `draws[i]` belongs to.
    `pending` says that some of `token_ids` are below 0: -1 - i is what the newest step drew in
    its i-th draw, wherever that is now.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    stale: torch.Tensor | None
    groups: tuple[AttentionGroup, ...]
    rows: torch.Tensor | None
    draws: tuple[Draw, ...]
    drawing: tuple[int, ...]
    pending: bool


class BatchBuilder:
    """Lays out steps for one model; `dtype` is that of its attention masks.

    Token ids down to `-pending_rows` are taken for pending ones; see `Batch`.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        vocab_size: int,
        max_context_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        pending_rows: int = 0,
    ) -> None:
        self._pending_rows = pending_rows
        self._heads = heads
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._dtype = dtype
        self._device = device

    def build(self, chunks: Sequence[Chunk]) -> Batch:
        """Lay out `chunks` and move them to the device."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        stale: list[int] = []
        rows: list[int] = []
        drawing: list[int] = []
        draws: list[Draw] = []
        packer = Packer()
        plans: list[Callable[[Vectors], AttentionGroup]] = []
        for members in _layout(chunks):
            first = len(token_ids)
            for index in members:
                chunk = chunks[index]
                self.check(chunk)
                token_ids += chunk.token_ids
                positions += range(chunk.start, chunk.start + len(chunk.token_ids))
                add_slots(chunk, slots, stale)
                count = len(chunk.draws)
                rows += range(len(token_ids) - count, len(token_ids))
                drawing += [index] * count
                draws += chunk.draws
            group_rows = slice(first, len(token_ids))
            plans.append(self._plan([chunks[index] for index in members], group_rows, packer))
        common = [packer.add(v) for v in (token_ids, positions, slots, stale, rows)]
        vectors = packer.move(self._device)
        on_device = [vectors[index] for index in common]
        return Batch(
            token_ids=on_device[0],
            positions=on_device[1],
            slots=on_device[2],
            stale=on_device[3] if stale else None,
            groups=tuple(plan(vectors) for plan in plans),
            rows=on_device[4] if len(rows) < len(token_ids) else None,
            draws=tuple(draws),
            drawing=tuple(drawing),
            pending=min(token_ids) < 0,
        )

    def check(self, chunk: Chunk) -> None:
        """Assert that a chunk does not contradict itself, before any of it is on the device."""
        check(chunk, -self._pending_rows, self._vocab_size, self._max_context_tokens)

    def _plan(
        self, members: Sequence[Chunk], rows: slice, packer: Packer
    ) -> Callable[[Vectors], AttentionGroup]:
        """Pack a group's vectors; the group itself can be built once they are on the device."""
        if len(members[0].token_ids) == 1:
            return self._plan_decode(members, rows, packer)
        (chunk,) = members
        if chunk.start == 0:
            return lambda _: PromptGroup(rows, self._heads)
        blocks = packer.add(chunk.blocks[: blocks_used(chunk)])
        return lambda vectors: ContextGroup(
            rows, self._heads, vectors[blocks], chunk.start, self._dtype
        )

    def _plan_decode(
        self, members: Sequence[Chunk], rows: slice, packer: Packer
    ) -> Callable[[Vectors], AttentionGroup]:
        width = max(blocks_used(chunk) for chunk in members)
        table: list[int] = []
        for chunk in members:
            used = chunk.blocks[: blocks_used(chunk)]
            # Padded with the sequence's own first block: what strangers left in a block that
            # it has not entered yet must not be read, not even to be masked.
            table += used + used[:1] * (width - len(used))
        lengths = [chunk.start + 1 for chunk in members]
        blocks_at, lengths_at = packer.add(table), packer.add(lengths)
        return lambda vectors: DecodeGroup(
            rows,
            self._heads,
            vectors[blocks_at],
            vectors[lengths_at],
            context_slots=width * BLOCK_SIZE,
            uniform_length=lengths[0] if len(set(lengths)) == 1 else None,
            dtype=self._dtype,
        )


def check(chunk: Chunk, lowest_id: int, num_ids: int, max_context_tokens: int) -> None:
    """Assert that a chunk does not contradict itself.

    An index out of bounds would crash native kernels, and on CUDA takes the whole process's
    context down.
    """
    end = chunk.start + len(chunk.token_ids)
    assert chunk.token_ids, "a chunk without tokens"
    assert min(chunk.token_ids) >= lowest_id, "a token id below the vocabulary"
    assert max(chunk.token_ids) < num_ids, "a token id beyond the vocabulary"
    assert end <= len(chunk.blocks) * BLOCK_SIZE, "a chunk without blocks for its tokens"
    assert end <= max_context_tokens, "a chunk beyond the context"
    assert len(chunk.draws) <= len(chunk.token_ids), "more draws than tokens"


def _layout(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Indices of the chunks that attend together, group by group."""
    decode: dict[int, list[int]] = {}
    longer: list[list[int]] = []
    for index, chunk in enumerate(chunks):
        if len(chunk.token_ids) == 1:
            blocks = max(blocks_used(chunk), _SMALLEST_GROUP_BLOCKS)
            decode.setdefault((blocks - 1).bit_length(), []).append(index)
        else:
            longer.append([index])
    return [*decode.values(), *longer]


def blocks_used(chunk: Chunk) -> int:
    """Blocks of the sequence that hold its tokens, the chunk's own included."""
    return -(-(chunk.start + len(chunk.token_ids)) // BLOCK_SIZE)


def add_slots(chunk: Chunk, slots: list[int], stale: list[int]) -> None:
    """Append the cache slots of the chunk's tokens, and the stale ones behind the newest."""
    blocks, end = chunk.blocks, chunk.start + len(chunk.token_ids)
    if len(chunk.token_ids) == 1:
        block, offset = divmod(chunk.start, BLOCK_SIZE)
        slots.append(blocks[block] * BLOCK_SIZE + offset)
    else:
        slots += [
            blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(chunk.start, end)
        ]
    newest, used = slots[-1], (end - 1) % BLOCK_SIZE + 1
    if chunk.start <= end - used:  # the newest block was entered by this chunk
        stale += range(newest + 1, newest + 1 + BLOCK_SIZE - used)


Vectors = Sequence[torch.Tensor]


class Packer:
    """Collects vectors of 64-bit numbers on the host and moves them in one copy."""

    def __init__(self) -> None:
        self._values = array("q")
        self._sizes: list[int] = []

    def add(self, values: Sequence[int]) -> int:
        """Append a vector; returns its index in what `move` returns."""
        self._values.extend(values)
        self._sizes.append(len(values))
        return len(self._sizes) - 1

    def add_doubles(self, values: array[float]) -> int:
        """Append a vector of doubles; read it with `.view(torch.float64)`."""
        self._values.frombytes(values.tobytes())
        self._sizes.append(len(values))
        return len(self._sizes) - 1

    def move(self, device: torch.device) -> Vectors:
        """All vectors, int64 on `device`, in the order of `add`."""
        if not self._values:
            empty = torch.empty(0, dtype=torch.int64, device=device)
            return [empty] * len(self._sizes)
        packed = torch.frombuffer(self._values, dtype=torch.int64)
        if device.type != "cpu":
            packed = pinned_like(packed).copy_(packed).to(device, non_blocking=True)
        return packed.split_with_sizes(self._sizes)


class ResultCopy:
    """A tensor on its way to the host; `device_s` is what the device took since `begin`.

    Constructed behind the work on the device's current stream, whose results it waits for.
    On the CPU everything is there already and no time is known.
    """

    def __init__(
        self,
        results: torch.Tensor | None,
        begin: torch.cuda.Event | None,
        device: torch.device,
    ) -> None:
        self._begin = begin
        self._end: torch.cuda.Event | None = None
        # A copy here, too: the next step may use the memory before this one is read.
        self._results = None if results is None else results.clone() if begin is None else results
        if begin is not None:
            if results is not None:
                self._results = pinned_like(results).copy_(results, non_blocking=True)
            self._end = _marked(device)

    def wait(self) -> torch.Tensor | None:
        """The results on the host, once they are there: the step's only wait for the device."""
        if self._end is not None:
            self._end.synchronize()
        return self._results

    @property
    def device_s(self) -> float | None:
        """Seconds between `begin` and the results; None where the device has no clock."""
        if self._begin is None or self._end is None:
            return None
        return float(self._begin.elapsed_time(self._end)) / 1e3


def begin(device: torch.device) -> torch.cuda.Event | None:
    """Mark where a step's time begins: behind whatever the device still has to do."""
    if device.type != "cuda":
        return None
    return _marked(device)


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Host memory of the same shape and type that the device can reach by itself."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def _marked(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's own
    event.record(torch.cuda.current_stream(device))
    return event
