"""The words of the project: jobs, routes, deltas, usage, prices.

Floor 0. Owns the frozen values that travel between floors.
Knows neither protobuf (that stops at `service`) nor torch nor SQLite.
Amounts are integer micro-ATP (`*_uatp`), durations seconds (`*_s`), counts `num_*`
or plain plurals, as in `docs/architecture.md`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

UATP_PER_ATP = 1_000_000


class Tier(enum.Enum):
    """A role that the operator binds to a model; the order is the order of depth."""

    TACTICAL = "tactical"
    STRATEGIC = "strategic"

    @property
    def depth(self) -> int:
        """0 for tactical, 1 for strategic: what "a lower tier" compares."""
        return 0 if self is Tier.TACTICAL else 1


class TierState(enum.Enum):
    """What a tier is doing; only READY admits jobs."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


class Priority(enum.IntEnum):
    """Order of starting, never of displacing: a running job is not pushed out."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class Phase(enum.Enum):
    """What kind of token is priced."""

    PREFILL = "prefill"
    CACHED = "cached"
    DECODE = "decode"
    DRAFT = "draft"
    VERIFY = "verify"


class StopReason(enum.Enum):
    """Why a job that delivered an ending stopped."""

    END_OF_TEXT = "end_of_text"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    DEADLINE = "deadline"
    ABORTED = "aborted"
    CANCELLED = "cancelled"


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

    @property
    def deadline_s(self) -> float | None:
        """Seconds from arrival until the job is stopped: the sooner of the job's and the call's."""
        deadlines = (self.sampling.deadline_s, self.call_deadline_s)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one job; `reason` is a stable code and a metric label."""

    tier: Tier
    reason: str
    requested: Tier | None
    downgraded: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A named "no"; `retry_after_s` None means that waiting does not help.

    `estimate_s` is how long the job would take, `denied_uatp` what it could cost, where that
    is the reason.
    """

    reason: str
    message: str
    retry_after_s: float | None = None
    estimate_s: float | None = None
    denied_uatp: int = 0


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
    """Durations of one job in seconds; 0.0 for a phase that was not reached."""

    queue_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Price:
    """What a job cost; `rate_card` was frozen at admission."""

    charged_uatp: int
    held_uatp: int
    rate_card: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What one tier would ask for a job: the prompt's price and a price per output token.

    Integers of one rate card, so every price made from them is exact.
    """

    tier: Tier
    prompt_tokens: int
    max_new_tokens: int
    prompt_uatp: int
    decode_uatp: int

    @property
    def worst_case_uatp(self) -> int:
        """The price if every token is made."""
        return self.prompt_uatp + self.max_new_tokens * self.decode_uatp

    def tokens_within(self, amount_uatp: int) -> int:
        """The largest `max_new_tokens` that `amount_uatp` would cover; 0 where none is."""
        return max(0, (amount_uatp - self.prompt_uatp) // self.decode_uatp)


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


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream."""

    stop_reason: StopReason
    usage: Usage
    timing: Timing
    price: Price
    balance_uatp: int


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class RouteQuote:
    """One route's worst case; `estimated_s` None until the tier has been measured."""

    tier: Tier
    worst_case_uatp: int
    affordable: bool
    estimated_s: float | None


@dataclass(frozen=True, slots=True)
class Quote:
    """What a job would cost at most, per route, and which decision would be taken now."""

    decision: Route | Refusal
    tiers: tuple[RouteQuote, ...]
    rate_card: str
    prompt_tokens: int
    max_new_tokens: int
    balance_uatp: int


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


class Role(enum.Enum):
    """What a caller may do: users spend their own budget, admins operate the daemon."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the account that pays, and the role."""

    account: str
    role: Role


@dataclass(frozen=True, slots=True)
class Budget:
    """One account's books at one instant, refill included."""

    account: str
    balance_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a checkpoint's own generation configuration says; greedy where it is silent."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model, as operators and clients see it; `revision` "" for a local directory.

    `step_bytes` are the weights that one decode step reads: all but an embedding of its own.
    """

    name: str
    revision: str
    architecture: str
    parameters: int
    precision: str
    device: str
    weight_bytes: int
    step_bytes: int
    kv_cache_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier's life: state, load progress from 0 to 1, and why it FAILED."""

    tier: Tier
    state: TierState
    load_progress: float = 0.0
    info: ModelInfo | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class TierLoad:
    """What a tier is doing now, as the executor last said; rates None until measured."""

    tier: Tier
    state: TierState
    running: int = 0
    waiting: int = 0
    waiting_limit: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    max_context_tokens: int = 0
    queued_prompt_tokens: int = 0
    decode_step_s: float | None = None
    prefill_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A tier's model: as configured, and as loaded (0 and "" until it is).

    `load_progress` goes from 0 to 1; `message` says why the tier FAILED;
    `decode_uatp` is the price of one decoded token on the card in force.
    """

    tier: Tier
    state: TierState
    name: str
    revision: str
    precision: str
    device: str
    architecture: str = ""
    parameters: int = 0
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    kv_cache_tokens: int = 0
    max_context_tokens: int = 0
    load_s: float = 0.0
    load_progress: float = 0.0
    decode_uatp: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon at a glance; `cost_ratio` is strategic over tactical decode price."""

    version: str
    uptime_s: float
    draining: bool
    device: str
    rate_card: str
    cost_ratio: float
    tiers: tuple[TierLoad, ...]
