"""The first thing a token meets: its row of a table, of its own or of the head.

Fails never: ids are checked where a step is laid out.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sage_fed.engine.linear import Linear


class Embedding(Protocol):
    """Vectors by token id."""

    @property
    def nbytes(self) -> int:
        """Device memory of its own."""

    @property
    def num_ids(self) -> int:
        """Ids from 0 on that have a vector."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [tokens, hidden_size] of int64 [tokens], freshly allocated."""


class TableEmbedding:
    """A table [vocab_size, hidden_size] in the compute type."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @property
    def nbytes(self) -> int:
        """Device memory of the table."""
        return self.table.nbytes

    @property
    def num_ids(self) -> int:
        """The whole vocabulary."""
        return self.table.shape[0]

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        return self.table.index_select(0, ids)


class TiedEmbedding:
    """The rows of a head, whatever it is stored in: there is no second copy."""

    def __init__(self, head: Linear, num_ids: int) -> None:
        self._head = head
        self._num_ids = num_ids

    @property
    def nbytes(self) -> int:
        """Nothing: the head has it."""
        return 0

    @property
    def num_ids(self) -> int:
        """The ids that the head has logits for."""
        return self._num_ids

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head."""
        return self._head.rows(ids)
