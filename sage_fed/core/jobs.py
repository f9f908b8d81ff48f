"""What a client asks for, and a job that runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sage_fed.core.tiers import Tier
from sage_fed.core.tracing import TraceContext


class Priority(enum.IntEnum):
    """Order of an account's own jobs: a higher one starts first, and may interrupt a lower one."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of the two: a conversation to be templated, or token ids as they are."""

    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Sampling fields as the client sent them; None is "the model's default"."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    deadline_s: float | None = None
    # Younger than request ids that may be asked for again: no part of the `repr`, so that a
    # payload hash without it is the one of before.
    stop_token_ids: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling with every default resolved; what the engine runs."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without any randomness."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One request, validated; `requested` None is AUTO."""

    account: str
    prompt: Prompt
    requested: Tier | None = None
    allow_downgrade: bool = False
    max_cost_uatp: int | None = None
    complexity: float | None = None
    priority: Priority = Priority.NORMAL
    client_request_id: str = ""
    sampling: SamplingRequest = field(default_factory=SamplingRequest)
    # How long the caller's own call waits. No part of the job's identity: a repeated request
    # has another one, and must still be recognised (`repr` feeds the payload hash).
    call_deadline_s: float | None = field(default=None, compare=False, repr=False)
    # The caller's trace; for the same reason no part of the identity.
    trace: TraceContext | None = field(default=None, compare=False, repr=False)
    # Whether the answer is to be one message, which has a limit; neither part of the identity.
    one_reply: bool = field(default=False, compare=False, repr=False)

    @property
    def deadline_s(self) -> float | None:
        """Seconds from arrival until the job is stopped: the sooner of the job's and the call's."""
        deadlines = (self.sampling.deadline_s, self.call_deadline_s)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)


@dataclass(frozen=True, slots=True)
class OpenReply:
    """One reply that waits for its reader, as an operator sees it.

    `account` is whose call it is; an address where the method asks nobody. `ended` says that only
    gRPC still keeps it, until its reader or its connection is gone.
    """

    call_id: str
    account: str
    connection: str
    method: str
    job_id: str
    age_s: float
    unread_s: float
    unread_bytes: int
    ended: bool


@dataclass(frozen=True, slots=True)
class RunningJob:
    """One accepted job that has not ended, as an operator sees it."""

    job_id: str
    account: str
    tier: Tier
    priority: Priority
    age_s: float
    prompt_tokens: int
    output_tokens: int
    held_uatp: int
