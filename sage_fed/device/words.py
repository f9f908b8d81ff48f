"""What is said of a sequence from outside: what is asked for, and how it ended.

Knows neither how far a sequence is nor who else runs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sage_fed.core import Priority, Sampling, Tier


class EndReason(enum.Enum):
    """Why a sequence ended; every submitted one ends with exactly one of these."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # noqa: S105 - a token of a text
    LENGTH = "length"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    FAILED = "failed"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """What a token counts for between accounts, by phase: its price in uATP, or its equal."""

    prefill: int = 1
    cached: int = 0
    decode: int = 1


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to run; `seq_id` is unique among those that have not ended.

    `prompt` are token ids, at least one; `max_new_tokens` is at least 1.
    `account` is whose it is: only the same account's sequences find its blocks again, and accounts
    share the tier fairly by what was served to them, which `weights` measure.
    `stop_token_ids` end it as the model's end tokens do, also where `ignore_eos` ignores those.
    `prefix_cache` False neither looks for known blocks nor leaves any behind.
    """

    seq_id: int
    tier: Tier
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    priority: Priority = Priority.NORMAL
    account: str = ""
    prefix_cache: bool = True
    weights: TokenWeights = TokenWeights()


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence's ending. Instants (`*_s` but `device_s`) are on the executor's monotonic clock.

    `started_s` is the beginning of its first step, `first_token_s` and `last_token_s` are of
    delivered tokens; None where it did not come so far.
    `prompt_tokens` have their keys and values (less than the prompt's where it ended early);
    `cached_tokens` of them were found in the prefix cache, the others were fed to the model.
    `output_tokens` were delivered (a token that ends the text is neither delivered nor counted);
    `stop_token_id` is the one of `stop_token_ids` that ended it.
    `device_s` is its part of its steps' time, by tokens: over all sequences it adds up to
    the time that the device was busy.
    """

    seq_id: int
    reason: EndReason
    submitted_s: float
    ended_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    device_s: float = 0.0
    stop_token_id: int | None = None
