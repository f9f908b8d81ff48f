"""The preallocated pool of keys and values, in blocks of `BLOCK_SIZE` tokens.

Owns the layout: per layer [num_blocks * BLOCK_SIZE, 2 * kv_heads * head_dim], a token's keys
and then its values, so that one scatter stores a step's tokens and one gather reads a context.
Who owns which block is the scheduler's business. Memory is claimed once, at load: a budget in
bytes, because on unified memory "what is free" is nobody's to take.
"""

from __future__ import annotations

import torch

from sage_fed.engine.architecture import ModelSpec
from sage_fed.engine.memory import allocate
from sage_fed.errors import ModelLoadError
from sage_fed.steps import BLOCK_SIZE


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers."""
    return spec.num_layers * spec.kv_width * dtype.itemsize


def bytes_per_block(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return BLOCK_SIZE * bytes_per_token(spec, dtype)


def blocks_in_budget(
    spec: ModelSpec, dtype: torch.dtype, budget_bytes: int, max_context_tokens: int
) -> int:
    """Blocks that fit in `budget_bytes`.

    Raises:
        ModelLoadError: the budget does not hold one context; the text says what would.
    """
    block_bytes = bytes_per_block(spec, dtype)
    num_blocks = budget_bytes // block_bytes
    needed = -(-max_context_tokens // BLOCK_SIZE)
    if num_blocks < needed:
        raise ModelLoadError(
            f"a KV budget of {budget_bytes} bytes holds {num_blocks * BLOCK_SIZE} tokens, less "
            f"than one context of {max_context_tokens}; {needed * block_bytes} bytes would do, "
            "or a smaller max_context_tokens"
        )
    return num_blocks


class KVCache:
    """Keys and values of every sequence of one model.

    Raises:
        ModelLoadError: the device has no memory for it.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = num_blocks * BLOCK_SIZE
        nbytes = num_blocks * bytes_per_block(spec, dtype)
        try:
            # Written, not only reserved: a page that the kernel has yet to find is a promise
            # that another process may break, and a process that seems to grow for hours.
            self._pool = allocate((spec.num_layers, slots, spec.kv_width), dtype, device).zero_()
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # torch's and the host's out-of-memory errors on every device
            raise ModelLoadError(
                f"{device} has no memory for a KV pool of {nbytes} bytes"
            ) from error
        self._by_slot = self._pool.unbind(0)
        self._by_block = self._pool.view(spec.num_layers, num_blocks, -1).unbind(0)
        self._split = (2, spec.num_kv_heads, spec.head_dim)

    @property
    def nbytes(self) -> int:
        """Device memory of the pool."""
        return self._pool.nbytes

    @property
    def pool(self) -> torch.Tensor:
        """The whole pool [layers, slots, 2 * kv_heads * head_dim]."""
        return self._pool

    def clear(self, slots: torch.Tensor) -> None:
        """Zero `slots` in every layer.

        What a block's last owner left behind is masked, but masking does not survive a NaN:
        0 * NaN is NaN, and one sequence's overflow would spread to strangers.
        """
        self._pool.index_fill_(1, slots, 0.0)

    def store(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Write `kv` [tokens, 2 * kv_heads * head_dim] to `slots` [tokens]."""
        self._by_slot[layer].index_copy_(0, slots, kv)

    def gather(
        self, layer: int, blocks: torch.Tensor, sequences: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [sequences, kv_heads, tokens, head_dim], of whole blocks.

        `blocks` is [sequences * blocks_each]. The results are strided views of one copy.
        """
        kv = self._by_block[layer].index_select(0, blocks).view(sequences, -1, *self._split)
        keys, values = kv.transpose(1, 3).unbind(2)
        return keys, values
