"""What a client asks for, who asks, the decision for a job, and what a job's client is told.

A caller's trace is the W3C header `traceparent`, parsed; what is not exactly such a header is no
trace, and never an error: a caller's tracing must not be able to fail its request.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from sage_fed.core.money import Price
from sage_fed.core.tiers import Phase, PhaseTokens, Tier, TierLoad


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
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


DRAW_VERSION = 2
"""Of how a token follows from (logits, sampling, seed, index): 1 inverted the cumulative sum, 2 is
Gumbel-max. A change of any bit of it is a new version."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling with every default resolved; what the engine runs, or what a checkpoint sets."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without any randomness."""
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on the tokens before it, which the host then has to know."""
        return self.repetition_penalty != 1.0 or self.counts_output

    @property
    def counts_output(self) -> bool:
        """Whether a draw depends on how often the output has each token."""
        return bool(self.presence_penalty or self.frequency_penalty)


class Mode(enum.Enum):
    """How a job is served."""

    SINGLE = "single"
    SPECULATIVE = "speculative"
    CASCADE = "cascade"


class CascadeOutcome(enum.Enum):
    """What became of a cascade's tactical answer."""

    KEPT = "kept"
    ESCALATED = "escalated"
    UNAVAILABLE = "unavailable"


class TokenOrigin(enum.Enum):
    """Where a token of the output comes from."""

    TACTICAL = "tactical"
    ACCEPTED = "accepted"
    STRATEGIC = "strategic"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One request, validated; `requested` None is AUTO, `mode` None the daemon's choice."""

    account: str
    prompt: Prompt
    requested: Tier | None = None
    allow_downgrade: bool = False
    max_cost_uatp: int | None = None
    complexity: float | None = None
    priority: Priority = Priority.NORMAL
    client_request_id: str = ""
    sampling: SamplingRequest = field(default_factory=SamplingRequest)
    # By which a quality card knows how often such answers are wrong; "" is any.
    task_class: str = ""
    mode: Mode | None = None
    max_error: float | None = None
    accept_revisions: bool = False
    # How long the caller's own call waits, its trace, and whether the answer is to be one message,
    # which has a limit: no part of what is asked for, so a repeated request may have others.
    call_deadline_s: float | None = field(default=None, compare=False)
    trace: TraceContext | None = field(default=None, compare=False)
    one_reply: bool = field(default=False, compare=False)

    @property
    def deadline_s(self) -> float | None:
        """Seconds from arrival until the job is stopped: the sooner of the job's and the call's."""
        deadlines = (self.sampling.deadline_s, self.call_deadline_s)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)


PAYLOAD_FIELDS = (
    "account",
    "prompt.messages",
    "prompt.token_ids",
    "requested",
    "allow_downgrade",
    "max_cost_uatp",
    "complexity",
    "priority",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.min_p",
    "sampling.repetition_penalty",
    "sampling.seed",
    "sampling.max_new_tokens",
    "sampling.stop",
    "sampling.ignore_eos",
    "sampling.top_logprobs",
    "sampling.deadline_s",
    "sampling.stop_token_ids",
    "sampling.presence_penalty",
    "sampling.frequency_penalty",
    "task_class",
    "mode",
    "max_error",
    "accept_revisions",
)
"""The fields that say what a request asks for: two with equal ones are the same request.

A field that a request leaves at its default is not hashed, so a new one may be added here without
a new version of the hash; a name here and a default never change.
"""


@dataclass(frozen=True, slots=True)
class OpenReply:
    """One reply that waits for its reader, as an operator sees it.

    `account` is whose call it is; an address where the method needs no caller. `ended` says that
    only gRPC still keeps it, until its reader or its connection is gone.
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
    """One accepted job that has not ended, as an operator sees it; `tier` is its stage's now."""

    job_id: str
    account: str
    tier: Tier
    priority: Priority
    age_s: float
    prompt_tokens: int
    output_tokens: int
    held_uatp: int
    mode: Mode = Mode.SINGLE


@dataclass(frozen=True, slots=True)
class Route:
    """The decision for one job; `reason` is a stable code and a metric label.

    The same seed gives the same text only under the same `draw_version`; 0: it is not known.
    """

    tier: Tier
    reason: str
    requested: Tier | None
    downgraded: bool = False
    mode: Mode = Mode.SINGLE
    draw_version: int = DRAW_VERSION


@dataclass(frozen=True, slots=True)
class Refusal:
    """A named "no"; `retry_after_s` None means that waiting does not help.

    Where that is the reason, `estimate_s` is how long the job would take, `denied_uatp` what it
    could cost, `allowed_jobs` how many the account may run at once.
    """

    reason: str
    message: str
    retry_after_s: float | None = None
    estimate_s: float | None = None
    denied_uatp: int = 0
    allowed_jobs: int = 0


@dataclass(frozen=True, slots=True)
class RouteQuote:
    """What one mode would cost at most, and is expected to cost, to err and to take.

    `estimated_s` is of every token and no draft, None until the tiers have been measured;
    `expected_error` is None without a quality card.
    """

    tier: Tier
    worst_case_uatp: int
    affordable: bool
    estimated_s: float | None
    mode: Mode = Mode.SINGLE
    expected_uatp: int = 0
    expected_error: float | None = None


@dataclass(frozen=True, slots=True)
class Quote:
    """What a job would cost, by tier and mode, and which decision would be taken now."""

    decision: Route | Refusal
    tiers: tuple[RouteQuote, ...]
    rate_card: str
    prompt_tokens: int
    max_new_tokens: int
    balance_uatp: int


@dataclass(frozen=True, slots=True)
class ModeReturn:
    """What an answer in one mode costs and takes on average, and how often it is right.

    On a quality card's tasks, of `output_tokens` each. The cascade's accuracy is expected, not
    counted, and has no interval. `num_jobs` of this mode have ended since the daemon's start: what
    drafts save, and `device_s`, rest on them. `joules` is None where the power cannot be read, or
    no job has run.
    """

    tier: Tier
    mode: Mode
    expected_uatp: int
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    output_tokens: float
    right_per_atp: float
    num_jobs: int
    device_s: float | None
    joules: float | None
    right_per_joule: float | None


@dataclass(frozen=True, slots=True)
class ModeReturns:
    """Every mode's return on a quality card's tasks, by the rate card in force.

    Of `num_tasks` tasks of `task_class` a cascade with `max_error` escalates the share `escalated`.
    `watts` is the device's power while it works; `power_note` says where it was read, or why it is
    not known.
    """

    quality_card: str
    rate_card: str
    task_class: str
    num_tasks: int
    max_error: float
    escalated: float
    watts: float | None
    power_note: str
    modes: tuple[ModeReturn, ...]


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
    """Token counts of one job.

    The first three are of the answer that its client got. `by_phase` is all that was computed
    for it, on any tier: the price is its sum over the rate card. Kinds that did not occur are left
    out.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    by_phase: tuple[PhaseTokens, ...] = ()

    @classmethod
    def single(
        cls,
        tier: Tier,
        prompt: int,
        cached: int,
        output: int,
        *,
        verified: int = 0,
        accepted: int = 0,
        drafted: int = 0,
        drafter: Tier | None = None,
    ) -> Usage:
        """Return the usage of one sequence.

        `cached` of the `prompt` tokens were not computed. Of the `output`, `accepted` tokens are
        draft tokens, of which `verified` were scored and `drafted` were made by the `drafter`; the
        others were decoded.
        """
        assert 0 <= cached <= prompt, "cached tokens are prompt tokens"
        assert 0 <= accepted <= min(verified, output), "what is accepted was verified"
        phases = {
            Phase.PREFILL: prompt - cached,
            Phase.CACHED: cached,
            Phase.VERIFY: verified,
            Phase.DECODE: output - accepted,
        }
        counts = [PhaseTokens(tier, phase, tokens) for phase, tokens in phases.items() if tokens]
        if drafter is not None and drafted:
            counts.append(PhaseTokens(drafter, Phase.DRAFT, drafted))
        return cls(prompt, cached, output, tuple(counts))

    def then(self, answer: Usage) -> Usage:
        """Return the usage of a job that did this before it made `answer`."""
        return replace(answer, by_phase=self.by_phase + answer.by_phase)


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Durations of one sequence of a job on its tier, in seconds, as `Timing` has the job's.

    `draft_s` is the device time of its `drafter`, on that tier; `device_s` is without it.
    It began `begin_s` after the job's arrival. Of its `verified_tokens`, which were drafted,
    `accepted_tokens` are in its output; its drafter made `drafted_tokens`, also some of those.
    """

    tier: Tier
    queue_s: float
    prefill_s: float
    decode_s: float
    device_s: float
    drafter: Tier | None = None
    draft_s: float = 0.0
    begin_s: float = 0.0
    drafted_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one job in seconds; 0.0 for a phase that was not reached.

    `device_s` is the job's part of its steps' device time: over all jobs it adds up to the time
    that the device was busy. `stages` is what each of its sequences took of that, in their order.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    total_s: float
    device_s: float = 0.0
    stages: tuple[StageTiming, ...] = ()


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
    """Output since the last event; `output_tokens` is cumulative.

    `origins` is empty where one tier makes all tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    output_tokens: int
    origins: tuple[TokenOrigin, ...] = ()

    @property
    def size(self) -> int:
        """About how many numbers it has: how long it takes to translate."""
        alternatives = 1 + len(self.logprobs[-1].top) if self.logprobs else 0
        return len(self.token_ids) + alternatives * len(self.logprobs)


@dataclass(frozen=True, slots=True)
class Revised:
    """What was streamed from token `from_token` on is replaced by the deltas that follow."""

    from_token: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One sequence of a job on one tier.

    One that speculates verifies what is drafted for it: `draft_tokens` (an answer that is known),
    what earlier text suggests, and what the `drafter` makes, a tier, where there is one.
    `needs_logprobs`: what follows is decided by them, whether the client asked for any or not.
    """

    tier: Tier
    prompt: tuple[int, ...]
    max_new_tokens: int
    draft_tokens: tuple[int, ...] = ()
    speculates: bool = False
    drafter: Tier | None = None
    needs_logprobs: bool = False


def _no_more(_answer: Delta, _planned: Stage) -> Stage | None:
    return None


@dataclass(frozen=True, slots=True)
class Program:
    """The stages that a job may run, in order, and the decision between them.

    `decide` is shown what a stage made and the next one as planned. It returns that one with its
    draft tokens, and the client sees nothing of what was made so far; or None: that is the answer.
    """

    stages: tuple[Stage, ...]
    decide: Callable[[Delta, Stage], Stage | None] = _no_more
    doubt: Callable[[Delta], float] | None = None
    """The probability that an answer is wrong, which `decide` goes by."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers in whose queues it needs places, each once; a drafter waits in none."""
        return tuple(dict.fromkeys(stage.tier for stage in self.stages))


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream."""

    stop_reason: StopReason
    usage: Usage
    timing: Timing
    price: Price
    balance_uatp: int
    cascade: CascadeOutcome | None = None
    error_probability: float | None = None


Event = Started | Delta | Finished | Revised


class Role(enum.Enum):
    """What a caller may do: users spend their own budget, admins operate the daemon as well.

    A monitor reads the metrics, and nothing else.
    """

    USER = "user"
    ADMIN = "admin"
    MONITOR = "monitor"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the account that pays, and the role."""

    account: str
    role: Role


# Version 00, and later ones, which may append fields: https://www.w3.org/TR/trace-context/.
_TRACEPARENT = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?",
    re.ASCII,
)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in whose trace a request stands; ids in lower-case hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(header: str) -> TraceContext | None:
    """Return the context of a `traceparent` header; None for one that is malformed."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or (header.startswith("00-") and len(header) != 55):
        return None
    trace_id, span_id, flags = match.groups()
    return TraceContext(trace_id, span_id, sampled=bool(int(flags, 16) & _SAMPLED))


@dataclass(frozen=True, slots=True)
class Answer:
    """One job's whole answer."""

    started: Started
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A prompt's tokens, and the longest context (prompt and output) of the tier."""

    prompt_tokens: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What runs and waits now; `held_uatp` is over all accounts.

    `unread` are replies that have waited for their readers for a second or longer.
    """

    tiers: tuple[TierLoad, ...]
    jobs: tuple[RunningJob, ...]
    held_uatp: int
    unread: tuple[OpenReply, ...] = ()
    open_calls: int = 0
    connections: int = 0


TierName = Literal["auto", "tactical", "strategic"]
PriorityName = Literal["low", "normal", "high"]
ModeName = Literal["single", "speculative", "cascade"]


class JobFields(TypedDict, total=False):
    """A job but for its prompt, as keyword arguments: `JobSpec` and `SamplingRequest`."""

    tier: Tier | TierName | None
    allow_downgrade: bool
    max_cost_uatp: int | None
    complexity: float | None
    priority: Priority | PriorityName
    task_class: str
    client_request_id: str
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    stop: Sequence[str] | str | None
    ignore_eos: bool
    top_logprobs: int | None
    deadline_s: float | None
    stop_token_ids: Sequence[int] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    mode: Mode | ModeName | None
    max_error: float | None
    accept_revisions: bool
