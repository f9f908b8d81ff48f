"""One sequence: what was asked for, how far it is, and how it ended.

Owns a sequence's position, its output's length and its account of device time.
Knows nothing of other sequences, of queues or of the device.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sage_fed.core import Priority, Sampling, Tier
from sage_fed.scheduler.blocks import blocks_for
from sage_fed.steps import Chunk, Draw


class EndReason(enum.Enum):
    """Why a sequence ended; every submitted one ends with exactly one of these."""

    EOS = "eos"
    LENGTH = "length"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to run; `seq_id` is unique among those that have not ended.

    `prompt` are token ids, at least one; `max_new_tokens` is at least 1.
    """

    seq_id: int
    tier: Tier
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    priority: Priority = Priority.NORMAL

    @property
    def num_blocks(self) -> int:
        """KV blocks of the worst case, which are reserved before the first step."""
        return blocks_for(len(self.prompt) + self.max_new_tokens)


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence's ending. Instants (`*_s` but `device_s`) are on the executor's monotonic clock.

    `started_s` is the beginning of its first step, `first_token_s` and `last_token_s` are of
    delivered tokens; None where it did not come so far.
    `prompt_tokens` were fed to the model (less than the prompt's where it ended early),
    `output_tokens` were delivered (an end-of-text token is neither delivered nor counted).
    `device_s` is its part of its steps' time, by tokens: over all sequences it adds up to
    the time that the device was busy.
    """

    seq_id: int
    reason: EndReason
    submitted_s: float
    started_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    device_s: float


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence between `add` and its ending; `order` is its place among all that were added."""

    spec: SequenceSpec
    submitted_s: float
    order: int
    blocks: tuple[int, ...] = ()
    num_cached: int = 0
    num_output: int = 0
    newest_token: int | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    device_s: float = 0.0
    cancelled: EndReason | None = None
    _seen: tuple[int, ...] = ()
    _seen_set: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.spec.sampling.repetition_penalty != 1.0:
            self._seen = tuple(dict.fromkeys(self.spec.prompt))
            self._seen_set.update(self._seen)

    @property
    def prefill_left(self) -> int:
        """Prompt tokens that have not been fed to the model."""
        return max(len(self.spec.prompt) - self.num_cached, 0)

    def next_chunk(self, prefill_limit: int) -> Chunk:
        """Return the newest token, or at most `prefill_limit` tokens of what is left to prefill."""
        if not self.prefill_left:
            assert self.newest_token is not None
            token_ids: tuple[int, ...] = (self.newest_token,)
            draws = True
        else:
            assert prefill_limit > 0
            token_ids = self.spec.prompt[self.num_cached : self.num_cached + prefill_limit]
            draws = len(token_ids) == self.prefill_left
        return Chunk(
            seq_id=self.spec.seq_id,
            start=self.num_cached,
            token_ids=token_ids,
            blocks=self.blocks,
            draw=Draw(self.spec.sampling, self.num_output, self._seen) if draws else None,
        )

    def append(self, token_id: int, now: float) -> None:
        """Note a drawn token that is delivered."""
        self.newest_token = token_id
        self.num_output += 1
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        self._note_seen(token_id)

    def ended(self, reason: EndReason, now: float) -> Ended:
        """Return the ending as it looks at `now`."""
        return Ended(
            seq_id=self.spec.seq_id,
            reason=reason,
            submitted_s=self.submitted_s,
            started_s=self.started_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            ended_s=now,
            prompt_tokens=min(self.num_cached, len(self.spec.prompt)),
            output_tokens=self.num_output,
            device_s=self.device_s,
        )

    def _note_seen(self, token_id: int) -> None:
        # Kept as a tuple of distinct ids that grows rarely, because each step's Draw holds it.
        if self.spec.sampling.repetition_penalty == 1.0 or token_id in self._seen_set:
            return
        self._seen_set.add(token_id)
        self._seen = (*self._seen, token_id)
