"""The tables of the settings: their keys, types, ranges and meanings.

Owns the rules inside one table; what holds between tables is in `model`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from sage_fed.core import resolve_model
from sage_fed.settings.fields import (
    Amount,
    EmptyIsNone,
    ModelName,
    Real,
    Revision,
    Section,
    Size,
    Url,
    Whole,
    conflict,
)
from sage_fed.settings.values import uatp_from_atp

PrecisionName = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8"]
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)
"""What a model may be held in."""
MAX_HOLD_TTL_S = 30 * 86_400.0
"""What the ledger takes at most; also the longest deadline, which a hold has to cover."""


_FIELD_BYTES = 16
"""A protobuf field's tag and length, and a role, at most."""

_OTHER_FIELDS_BYTES = 4096
"""The numbers of a request, and fields of clients that are newer than we are."""


class TierSettings(Section):
    """One tier: its model, its memory and the size of its queues and batches."""

    model: ModelName = Field(
        description="Hub id, directory (starts with /, ./, ../ or ~) or bundled:NAME."
    )
    revision: Annotated[Revision | None, EmptyIsNone] = Field(
        default=None,
        description="Commit of the hub repository, 40 hexadecimal digits; a hub id needs it.",
    )
    precision: PrecisionName = Field(
        description="Number format of the weights; int8, int4 and fp8 compute and cache in bf16."
    )
    kv_cache_bytes: Size = Field(
        gt=0, description="Memory of the KV cache, allocated at start; for example 512MiB."
    )
    max_context_tokens: Whole = Field(gt=0, description="Prompt and output of one job, in tokens.")
    max_batch: Whole = Field(gt=0, description="Sequences that run at once.")
    max_waiting: Whole = Field(
        ge=0, description="Jobs that may wait to start; one more is refused with a retry delay."
    )
    prefill_chunk_tokens: Whole = Field(
        gt=0, description="Most prompt tokens in one step; smaller keeps other streams smoother."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep prompts' and answers' KV blocks; the account's next job that begins "
        "with the same tokens pays the cached price for them.",
    )
    kv_overcommit: Real = Field(
        default=1.0,
        ge=1.0,
        le=64.0,
        description="How far outputs are expected to fall short of max_new_tokens; above 1 more "
        "jobs run at once, and one is interrupted and computed again where memory runs out.",
    )

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if isinstance(resolve_model(self.model), str) and self.revision is None:
            raise conflict(
                f"{self.model} is a hub id and needs a pinned revision: the 40 hexadecimal digits "
                f"of a commit of its repository; if it is a directory, write ./{self.model}",
                "revision",
                "model",
            )
        return self


class SchedulingSettings(Section):
    """How the two tiers share the device."""

    tactical_share: Real = Field(
        default=0.5,
        ge=0.05,
        le=0.95,
        description="Tactical tier's part of device time while both have work; more makes its "
        "answers steadier and strategic ones slower.",
    )
    step_timeout_s: Real = Field(
        default=60.0,
        ge=1.0,
        le=3600.0,
        description="Seconds that the device may work without a sign of life; then its jobs end "
        "with UNAVAILABLE, systemd's watchdog is no longer fed, and after as long again the daemon "
        "exits with 1.",
    )


class RoutingSettings(Section):
    """When a request that leaves the choice to the daemon goes to the strategic tier."""

    complexity_threshold: Real = Field(
        default=0.5, ge=0, le=1, description="Client's complexity hint from which on AUTO thinks."
    )
    strategic_prompt_tokens: Whole = Field(
        default=1024, gt=0, description="Prompt length in tokens from which on AUTO thinks."
    )


class LimitSettings(Section):
    """Bounds of one request and of all, checked before anything is allocated."""

    max_message_bytes: Annotated[
        Annotated[Size, Field(ge=1024, le=2**31 - 1)] | None, EmptyIsNone
    ] = Field(
        default=None,
        description="Largest gRPC message received; what the other limits can take, if not set.",
    )
    max_prompt_chars: Whole = Field(
        default=200_000, gt=0, description="Characters of all messages together."
    )
    max_messages: Whole = Field(
        default=256, gt=0, le=512, description="Messages of one conversation."
    )
    max_stop_strings: Whole = Field(
        default=16, ge=0, le=256, description="Stop strings of one request."
    )
    max_stop_token_ids: Whole = Field(
        default=16, ge=0, le=256, description="Stop tokens of one request."
    )
    max_stop_chars: Whole = Field(default=128, gt=0, description="Characters of one stop string.")
    max_top_logprobs: Whole = Field(
        default=20, ge=0, description="Alternatives reported per token."
    )
    max_new_tokens: Whole = Field(
        default=4096, gt=0, description="Most output tokens that a request may ask for."
    )
    default_new_tokens: Whole = Field(
        default=512, gt=0, description="Output tokens of a request that does not say."
    )
    max_request_id_chars: Whole = Field(
        default=128, gt=0, le=256, description="Characters of a client request id."
    )
    max_deadline_s: Real = Field(
        default=3600.0,
        gt=0,
        le=MAX_HOLD_TTL_S,
        description="Longest deadline that a request may ask for.",
    )
    max_jobs: Whole = Field(
        default=512, gt=0, description="Jobs accepted and not ended, over all tiers and accounts."
    )
    max_waiting_calls: Whole = Field(
        default=512,
        gt=0,
        description="Prompts of one account that may wait to be encoded; one more is refused.",
    )
    max_waiting_chars: Whole = Field(
        default=4_000_000, gt=0, description="Their characters together; some seconds of work."
    )
    max_account_calls: Whole = Field(
        default=1024, gt=0, description="Calls that one account may have open at once."
    )
    max_account_unread: Whole = Field(
        default=64,
        gt=0,
        description="Replies that one account may leave unread for a second; those beyond it are "
        "ended, and its next calls refused.",
    )
    max_account_unread_bytes: Size = Field(
        default=64 * 2**20, gt=0, description="What they, and the answers behind them, may take."
    )
    max_receiving_bytes: Size = Field(
        default=128 * 2**20,
        gt=0,
        description="What requests may take while they arrive, all together, each counted as the "
        "largest message; others wait unread.",
    )
    max_connections: Whole = Field(
        default=1024, gt=0, le=1_000_000, description="Connections, of all addresses."
    )
    max_connections_per_address: Whole = Field(
        default=256, gt=0, description="Connections of one address; one more is not answered."
    )
    max_connection_calls: Whole = Field(
        default=512, gt=0, le=2**31 - 1, description="Calls that one connection carries at once."
    )
    receive_timeout_s: Real = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="How long a request may take to arrive, and a connection to be made.",
    )
    write_timeout_s: Real = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="How long a reply may wait for its reader; then its call and its job end.",
    )
    idle_connection_s: Real = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="A connection without a call is closed after so long; clients make another "
        "with their next call.",
    )
    max_stream_messages_per_s: Real = Field(
        default=2000.0,
        ge=0,
        description="Stream messages a second, of all streams together: beyond it tokens share "
        "one, and are handed to streams no more often. 0 is no limit.",
    )

    @property
    def largest_message_bytes(self) -> int:
        """`max_message_bytes`, or what the largest request that the other limits allow can take."""
        if self.max_message_bytes is not None:
            return self.max_message_bytes
        # A character is four bytes of UTF-8 at most, a token id five of a varint.
        stops = self.max_stop_strings * (4 * self.max_stop_chars + _FIELD_BYTES)
        stops += self.max_stop_token_ids * _FIELD_BYTES
        messages = self.max_messages * 3 * _FIELD_BYTES
        request_id = 4 * self.max_request_id_chars
        return 5 * self.max_prompt_chars + messages + stops + request_id + _OTHER_FIELDS_BYTES

    @model_validator(mode="after")
    def _default_within_maximum(self) -> Self:
        if self.default_new_tokens > self.max_new_tokens:
            raise conflict(
                f"default_new_tokens ({self.default_new_tokens}) must be at most max_new_tokens "
                f"({self.max_new_tokens})",
                "default_new_tokens",
                "max_new_tokens",
            )
        return self


class BudgetSettings(Section):
    """What an account starts with and how it refills; amounts in ATP, exact to 0.000001."""

    initial_atp: Amount = Field(description="Balance of a new account.")
    capacity_atp: Amount = Field(gt=0, description="Refill stops at this balance.")
    refill_atp_per_s: Amount = Field(description="Refill per second.")
    strategic_floor_atp: Amount = Field(
        description="Below this balance an account gets tactical work only."
    )

    @property
    def initial_uatp(self) -> int:
        """`initial_atp` in uATP."""
        return uatp_from_atp(self.initial_atp)

    @property
    def capacity_uatp(self) -> int:
        """`capacity_atp` in uATP."""
        return uatp_from_atp(self.capacity_atp)

    @property
    def refill_uatp_per_s(self) -> int:
        """`refill_atp_per_s` in uATP per second."""
        return uatp_from_atp(self.refill_atp_per_s)

    @property
    def strategic_floor_uatp(self) -> int:
        """`strategic_floor_atp` in uATP."""
        return uatp_from_atp(self.strategic_floor_atp)

    @model_validator(mode="after")
    def _within_capacity(self) -> Self:
        for key in ("initial_atp", "strategic_floor_atp"):
            amount = getattr(self, key)
            if amount > self.capacity_atp:
                raise conflict(
                    f"{key} ({amount}) must be at most capacity_atp ({self.capacity_atp})",
                    key,
                    "capacity_atp",
                )
        return self


class LedgerSettings(Section):
    """How long the ledger waits and remembers."""

    hold_ttl_s: Real = Field(
        default=7200.0,
        gt=0,
        le=MAX_HOLD_TTL_S,
        description="A hold older than this is given back if its job is gone.",
    )
    commit_timeout_s: Real = Field(
        default=5.0,
        gt=0,
        le=60,
        description="A commit that takes longer is a disk that hangs: health says NOT_SERVING and "
        "jobs are refused until it ends.",
    )
    result_retention_s: Real = Field(
        default=86_400.0,
        ge=0,
        le=3660 * 86_400.0,
        description="How long a finished request id can be replayed.",
    )
    entry_retention_s: Real = Field(
        default=30 * 86_400.0,
        ge=0,
        le=3660 * 86_400.0,
        description="How long entries are kept one by one, at least as long as request ids; older "
        "ones are folded into one row per account and day.",
    )
    account_reads: Whole = Field(
        default=16,
        gt=0,
        le=1024,
        description="Reads of the books that an account may have waiting; one more is refused.",
    )


class TracingSettings(Section):
    """Where OpenTelemetry traces go; the extra `sage-fed[otel]` makes them."""

    otlp_endpoint: Annotated[Url | None, EmptyIsNone] = Field(
        default=None,
        description="URL of an OTLP/HTTP collector, such as http://127.0.0.1:4318/v1/traces; "
        "without one nothing is traced.",
    )
    sample_ratio: Real = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of requests that is traced where the caller has not decided.",
    )


class MetricsSettings(Section):
    """What Prometheus may see."""

    per_account_balance: bool = Field(
        default=False, description="One balance series per account; off keeps names out of metrics."
    )
    public: bool = Field(
        default=False,
        description="Beyond this machine anyone may scrape; otherwise it takes a token whose role "
        "is monitor or admin. On a loopback address it is open.",
    )
