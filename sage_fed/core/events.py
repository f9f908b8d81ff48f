"""What a client is told of its job: Started, Delta..., Finished."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sage_fed.core.money import Price
from sage_fed.core.routes import Route


class StopReason(enum.Enum):
    """Why a job that delivered an ending stopped."""

    END_OF_TEXT = "end_of_text"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    DEADLINE = "deadline"
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    STOP_TOKEN = "stop_token"  # noqa: S105 - a token of a text


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token before temperature and filters.

    `top` holds (token id, log-probability), best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one job in seconds; 0.0 for a phase that was not reached.

    `device_s` is the job's part of its steps' device time: over all jobs it adds up to the time
    that the device was busy.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float
    device_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: the job is accepted, held and queued."""

    job_id: str
    route: Route
    held_uatp: int
    prompt_tokens: int
    seed: int
    max_new_tokens: int
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """Output since the last event; `output_tokens` is cumulative."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    output_tokens: int

    @property
    def size(self) -> int:
        """About how many numbers it has: how long it takes to translate."""
        alternatives = 1 + len(self.logprobs[-1].top) if self.logprobs else 0
        return len(self.token_ids) + alternatives * len(self.logprobs)


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream."""

    stop_reason: StopReason
    usage: Usage
    timing: Timing
    price: Price
    balance_uatp: int


Event = Started | Delta | Finished
