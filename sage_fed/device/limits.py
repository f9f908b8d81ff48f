"""A tier's bounds: what it takes on, and what can never run on it.

Knows no sequence under way. Fails with InvalidField for what could never run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sage_fed.device.blocks import blocks_for
from sage_fed.device.sequence import Sequence
from sage_fed.device.words import SequenceSpec
from sage_fed.errors import InvalidField
from sage_fed.steps import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class TierLimits:
    """A tier's bounds; `prefill_chunk_tokens` are prompt tokens a step, over all sequences.

    `ageing_s` of waiting make up for one level of priority. An account that waits `overdue_s`
    for a start goes before all that have waited less; one that is far behind may after
    `preempt_after_s` interrupt others. A sequence is interrupted `max_preemptions` times at most.
    `prefix_cache` keeps the full blocks of sequences for later ones of the same account.
    `kv_overcommit` is by how much outputs are expected to fall short of their maximum; at 1.0
    every sequence has the blocks of its worst case from the start.
    `num_ids` are the token ids that the model can be fed, where it has fewer than its tokenizer.
    """

    num_blocks: int
    max_context_tokens: int
    max_batch: int = 16
    max_waiting: int = 64
    prefill_chunk_tokens: int = 512
    ageing_s: float = 30.0
    overdue_s: float = 60.0
    preempt_after_s: float = 5.0
    max_preemptions: int = 2
    prefix_cache: bool = True
    kv_overcommit: float = 1.0
    num_ids: int | None = None

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV blocks hold."""
        return self.num_blocks * BLOCK_SIZE

    def check(self, spec: SequenceSpec) -> None:
        """Refuse a sequence that could never run.

        Raises:
            InvalidField: naming the field that has to be smaller.
        """
        if not spec.prompt:
            raise InvalidField("prompt", "is empty")
        if spec.max_new_tokens < 1:
            raise InvalidField("sampling.max_new_tokens", "has to be at least 1")
        if self.num_ids is not None and max(spec.prompt) >= self.num_ids:
            raise InvalidField("prompt", f"holds an id beyond the model's {self.num_ids}")
        longest = min(self.max_context_tokens, self.kv_tokens)
        if len(spec.prompt) >= longest:
            raise InvalidField(
                "prompt",
                f"{len(spec.prompt)} tokens leave no room for output; "
                f"the {spec.tier.name} tier holds {longest} tokens, prompt and output together",
            )
        if len(spec.prompt) + spec.max_new_tokens > longest:
            raise InvalidField(
                "sampling.max_new_tokens",
                f"at most {longest - len(spec.prompt)} fit behind this prompt; "
                f"the {spec.tier.name} tier holds {longest} tokens, prompt and output together",
            )

    def protects(self, seq: Sequence) -> bool:
        """Whether a sequence has been interrupted often enough; it gets its worst case, too."""
        return seq.preemptions >= self.max_preemptions

    def blocks_to_start(self, seq: Sequence) -> int:
        """Return how many blocks a sequence has to have before it starts, or starts again."""
        left = seq.spec.max_new_tokens - seq.num_output
        if not self.protects(seq):
            left = math.ceil(left / self.kv_overcommit)
        return blocks_for(len(seq.token_ids) + left)
