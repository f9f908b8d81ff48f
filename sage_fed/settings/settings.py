"""All settings of one daemon: keys, types, ranges, meanings, and which combinations cannot work.

Owns the rules inside one table and between tables. Pydantic stops here and in `loading`.
Knows nothing of files, flags or the environment.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sage_fed.core import TIER_ROLES, Address, Role, Tier, UnixSocket, parse_listen
from sage_fed.model_files import resolve_model
from sage_fed.settings.values import parse_account, parse_size, uatp_from_atp


class Section(BaseModel):
    """A frozen table of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule across `keys`, each relative to the model that raises it."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


def _number(value: object) -> object:
    # Otherwise `true` would quietly count as 1.
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic collects ValueError only
    return value


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _address(value: object) -> object:
    if isinstance(value, Address):
        return value
    return Address.parse(value if isinstance(value, str) else "")


def _listen(value: object) -> object:
    if isinstance(value, (Address, UnixSocket)):
        return value
    return parse_listen(value if isinstance(value, str) else "")


def _amount(value: Decimal) -> Decimal:
    uatp_from_atp(value)
    return value


def _model(value: str) -> str:
    resolve_model(value)
    return value


def _revision(value: str) -> str:
    if re.fullmatch("[0-9a-f]{40}", value) is None:
        raise ValueError("expected a commit of the hub repository: 40 hexadecimal digits")
    return value


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value) is None:
        raise ValueError("expected cpu, auto or cuda:N, for example cuda:0")
    return "cuda:0" if value == "cuda" else value


def _account_or_nobody(value: str) -> str:
    return parse_account(value) if value else value


def _path(value: object) -> object:
    if value == "":
        raise ValueError("expected a path")
    return value


def _cache_place(value: str) -> str:
    if value not in {"auto", "off"} and not Path(value).expanduser().is_absolute():
        raise ValueError("expected auto, off or an absolute directory")
    return value


def _url(value: str) -> str:
    if re.fullmatch(r"https?://[^\s/]+(/\S*)?", value) is None:
        raise ValueError("expected a URL, for example http://127.0.0.1:4318/v1/traces")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


Whole = Annotated[int, BeforeValidator(_number)]
"""A whole number; its range is the field's."""

Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
"""A finite number, for durations in seconds and shares."""

Size = Annotated[int, BeforeValidator(_number), BeforeValidator(_size)]
"""Bytes, written `512MiB` or as a number."""

Amount = Annotated[Decimal, BeforeValidator(_number), AfterValidator(_amount)]
"""ATP, not negative and exact to one uATP."""

Endpoint = Annotated[Address, BeforeValidator(_address)]
"""`HOST:PORT`, or `[IPV6]:PORT`."""

ListenPoint = Annotated[Address | UnixSocket, BeforeValidator(_listen)]
"""The same, or `unix:/PATH`."""

UserPath = Annotated[Path, BeforeValidator(_path), AfterValidator(Path.expanduser)]
"""A path in which a leading `~` is the home directory."""

EmptyIsNone = BeforeValidator(_empty_is_none)
"""An empty text unsets an optional value: the environment has no other way to say it."""

ModelName = Annotated[str, AfterValidator(_model)]
Revision = Annotated[str, AfterValidator(_revision)]
Device = Annotated[str, AfterValidator(_device)]
CachePlace = Annotated[str, AfterValidator(_cache_place)]
Url = Annotated[str, AfterValidator(_url)]
AccountName = Annotated[str, AfterValidator(parse_account)]
AccountOrNobody = Annotated[str, AfterValidator(_account_or_nobody)]
Lowered = BeforeValidator(_lower)


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

    @property
    def display_name(self) -> str:
        """What clients see: the hub id, or a directory's last part; never a path."""
        source = resolve_model(self.model)
        return source.name if isinstance(source, Path) else source

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
    """How requests are served that leave the choice to the daemon.

    With a quality card of these models the cheapest way is taken that meets `max_error`; without
    one, hint and prompt length decide.
    """

    complexity_threshold: Real = Field(
        default=0.5, ge=0, le=1, description="Client's complexity hint from which on AUTO thinks."
    )
    strategic_prompt_tokens: Whole = Field(
        default=1024, gt=0, description="Prompt length in tokens from which on AUTO thinks."
    )
    max_error: Real = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Probability of a wrong answer that AUTO and cascades put up with.",
    )
    speculation: bool = Field(
        default=True,
        description="Whether jobs that name no mode verify drafts: of earlier text, and strategic "
        "ones of the tactical tier.",
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


_Calls = Annotated[Whole, Field(ge=0, le=10_000_000)]
_Jobs = Annotated[Whole, Field(ge=0, le=1_000_000)]


class RateSettings(Section):
    """How often one account may call, beside what it may spend; 0 is no limit."""

    requests_per_minute: _Calls = Field(
        default=0,
        description="Calls in any 60 s, refused ones too; a message counts once for each 16 KiB "
        "that it has begun.",
    )
    concurrent_jobs: _Jobs = Field(default=0, description="Jobs accepted and not ended.")


class OwnRateSettings(Section):
    """The same of a named account; a key that is absent is the common one."""

    requests_per_minute: Annotated[_Calls | None, EmptyIsNone] = Field(
        default=None, description="Its own; else that of [rate_limits]."
    )
    concurrent_jobs: Annotated[_Jobs | None, EmptyIsNone] = Field(
        default=None, description="Its own; else that of [rate_limits]."
    )


class AccountSettings(Section):
    """One named account."""

    role: Role = Field(
        default=Role.USER,
        description="user, admin for the operator's commands too, or monitor for metrics only.",
    )
    budget: BudgetSettings | None = Field(
        default=None, description="Its own budget, all four keys; without it, [budget] holds."
    )
    rate_limits: OwnRateSettings = Field(
        default=OwnRateSettings(), description="Its own limits; for the others [rate_limits]."
    )
    max_error: Annotated[Annotated[Real, Field(ge=0, le=1)] | None, EmptyIsNone] = Field(
        default=None, description="Its own routing.max_error."
    )


class AuthSettings(Section):
    """Who may call."""

    tokens_file: Annotated[UserPath | None, EmptyIsNone] = Field(
        default=None,
        description="TOML file of who may call: the SHA-256 of each bearer token, its account; "
        "`sage-fed token` writes it. tokens.toml in state_dir, where there is one.",
    )
    anonymous_account: AccountOrNobody = Field(
        default="local",
        description="Account of callers without a token on a loopback address or a Unix socket; "
        "empty refuses them.",
    )


class TlsSettings(Section):
    """Encryption; files in PEM, read again when they change."""

    certificate: Annotated[UserPath | None, EmptyIsNone] = Field(
        default=None, description="The server's certificate, its chain after it."
    )
    key: Annotated[UserPath | None, EmptyIsNone] = Field(
        default=None, description="Its private key, without a passphrase."
    )
    client_ca: Annotated[UserPath | None, EmptyIsNone] = Field(
        default=None,
        description="Certificates that sign clients'; with it no client connects without one.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Listen beyond this machine without a certificate: tokens and prompts can be "
        "read on the way. For networks that encrypt by themselves.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise conflict("certificate and key come together; set both", "certificate", "key")
        if self.client_ca is not None and self.certificate is None:
            raise conflict(
                "client_ca needs certificate and key: clients show theirs over TLS only",
                "client_ca",
                "certificate",
            )
        return self


AUTO_CARD = "auto"
"""The value of `rate_card` and `quality_card` that chooses by what is loaded."""

NO_CARD = "off"
"""The value of `quality_card` that wants none."""

TOKENS_FILE = "tokens.toml"
"""Its name in the state directory, where no setting names another."""


class Settings(Section):
    """Everything that an operator can set. Build it with `load_settings`, never by hand."""

    profile: str = Field(description="Packaged set of values under all others.")
    listen: ListenPoint = Field(
        default=Address("127.0.0.1", 6590),
        description="HOST:PORT of the gRPC API, or unix:/PATH.",
    )
    metrics_listen: Endpoint = Field(
        default=Address("127.0.0.1", 9659), description="HOST:PORT of the Prometheus endpoint."
    )
    state_dir: UserPath = Field(
        description="Ledger and admin token; $STATE_DIRECTORY, $XDG_STATE_HOME/sage-fed or "
        "~/.local/state/sage-fed."
    )
    device: Device = Field(
        default="cuda:0",
        description="cuda:N, which has to be there, cpu, or auto: cuda:0 or, loudly, the CPU.",
    )
    cpu_threads: Whole = Field(
        default=0, ge=0, le=1024, description="Threads of one forward pass on CPU; 0 is torch's."
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="Whose code computes: torch's, or native on CPU; auto is native where it can.",
    )
    weights_cache: CachePlace = Field(
        default="auto",
        description="Where quantised weights are kept for the next start: a directory, off, or "
        "auto: $CACHE_DIRECTORY, $XDG_CACHE_HOME/sage-fed or ~/.cache/sage-fed.",
    )
    weights_cache_bytes: Size = Field(
        default=32 * 2**30,
        gt=0,
        description="What they take at most; the least recently used are removed.",
    )
    tactical: TierSettings = Field(description="The fast tier.")
    strategic: TierSettings = Field(description="The deep tier.")
    rate_card: str = Field(
        default="thor-fp16-2025-11-05",
        min_length=1,
        description="Version of a rate card, its path, or auto: the newest own card that was "
        "measured on what is loaded, else the shipped one.",
    )
    cards_dir: Annotated[UserPath | None, EmptyIsNone] = Field(
        default=None,
        description="Directory of the operator's own rate cards, where calibrate writes; "
        "cards in state_dir.",
    )
    quality_card: str = Field(
        default=AUTO_CARD,
        min_length=1,
        description="Version of a quality card, its path, off, or auto: the newest that was "
        "measured on the loaded models, an own one (in cards_dir/quality) before a shipped one.",
    )
    routing: RoutingSettings = Field(default=RoutingSettings(), description="AUTO's rules.")
    scheduling: SchedulingSettings = Field(
        default=SchedulingSettings(), description="How the tiers share the device."
    )
    limits: LimitSettings = Field(default=LimitSettings(), description="Bounds of requests.")
    budget: BudgetSettings = Field(description="Budget of an account that has none of its own.")
    accounts: dict[AccountName, AccountSettings] = Field(
        default={}, description="Accounts with a role, a budget or limits of their own."
    )
    auth: AuthSettings = Field(default=AuthSettings(), description="Who may call.")
    tls: TlsSettings = Field(default=TlsSettings(), description="Encryption.")
    rate_limits: RateSettings = Field(
        default=RateSettings(), description="How often an account may call that has no own limits."
    )
    ledger: LedgerSettings = Field(default=LedgerSettings(), description="The books.")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="What is exported.")
    tracing: TracingSettings = Field(default=TracingSettings(), description="OpenTelemetry.")
    drain_grace_s: Real = Field(
        default=30.0, ge=0, description="How long running streams may finish after SIGTERM."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Lowered] = Field(
        default="info", description="Least severe level that is logged."
    )
    log_format: Annotated[Literal["auto", "json", "pretty"], Lowered] = Field(
        default="auto",
        description="One JSON object a line, or lines for people; auto is pretty on a terminal.",
    )

    @property
    def own_cards_dir(self) -> Path:
        """Where the operator's own cards are, set or not."""
        return self.cards_dir or self.state_dir / "cards"

    @property
    def tiers(self) -> dict[Tier, TierSettings]:
        """Return the tiers in the order of their ranks, each with its settings."""
        return {tier: getattr(self, tier.name) for tier in TIER_ROLES}

    def account_budget(self, account: str) -> BudgetSettings:
        """The budget with which `account` is opened: its own, or the common one."""
        named = self.accounts.get(account)
        return named.budget if named is not None and named.budget is not None else self.budget

    def max_error_of(self, account: str) -> float:
        """Return the probability of a wrong answer that an account puts up with."""
        own = self.accounts[account].max_error if account in self.accounts else None
        return self.routing.max_error if own is None else own

    def account_rates(self, account: str) -> RateSettings:
        """How often `account` may call: its own limits, and the common ones where it has none."""
        named = self.accounts.get(account)
        own = named.rate_limits.model_dump(exclude_none=True) if named is not None else {}
        return self.rate_limits.model_copy(update=own)

    @property
    def tokens_file(self) -> Path:
        """Where the tokens are, set or not."""
        return self.auth.tokens_file or self.state_dir / TOKENS_FILE

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if not self.listen.is_loopback:
            if self.auth.tokens_file is None and self.tls.client_ca is None:
                raise conflict(
                    f"listening on {self.listen}, beyond this machine, needs to know who may call: "
                    f"make a token (`sage-fed token create` writes {self.tokens_file}), set "
                    "auth.tokens_file or tls.client_ca, or listen on a loopback address or a Unix "
                    "socket",
                    "listen",
                    "auth.tokens_file",
                )
            self._encrypted("listen", self.listen)
        if not self.metrics_listen.is_loopback and not self.metrics.public:
            if self.auth.tokens_file is None:
                raise conflict(
                    f"metrics on {self.metrics_listen}, beyond this machine, need a token to scrape"
                    f" them: make one (`sage-fed token create --role monitor` writes "
                    f"{self.tokens_file}), set auth.tokens_file, or metrics.public where anyone "
                    "may read them",
                    "metrics_listen",
                    "auth.tokens_file",
                )
            self._encrypted("metrics_listen", self.metrics_listen)
        if isinstance(self.listen, UnixSocket) and self.tls.client_ca is not None:
            raise conflict(
                "no client shows a certificate on a Unix socket: its file's mode says who may "
                "connect; remove tls.client_ca, or listen on HOST:PORT",
                "listen",
                "tls.client_ca",
            )
        return self

    def _encrypted(self, key: str, listen: Address | UnixSocket) -> None:
        """Refuse to take tokens over a wire that others may read."""
        if self.tls.certificate is None and not self.tls.allow_plaintext:
            raise conflict(
                f"{key} is {listen}, beyond this machine, where tokens could be read on the way: "
                "set tls.certificate and tls.key, or tls.allow_plaintext on a network that "
                "encrypts by itself",
                key,
                "tls.certificate",
            )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.listen == self.metrics_listen and self.metrics_listen.port != 0:
            raise conflict(
                f"listen and metrics_listen are both {self.listen}; give them different ports",
                "listen",
                "metrics_listen",
            )
        return self

    @model_validator(mode="after")
    def _hold_covers_deadline(self) -> Self:
        if self.ledger.hold_ttl_s < self.limits.max_deadline_s:
            raise conflict(
                f"hold_ttl_s ({self.ledger.hold_ttl_s}) must be at least max_deadline_s "
                f"({self.limits.max_deadline_s}): a job may run that long",
                "ledger.hold_ttl_s",
                "limits.max_deadline_s",
            )
        return self

    @model_validator(mode="after")
    def _default_fits_context(self) -> Self:
        for tier, own in self.tiers.items():
            context = own.max_context_tokens
            if self.limits.default_new_tokens >= context:
                raise conflict(
                    f"default_new_tokens ({self.limits.default_new_tokens}) leaves no room for a "
                    f"prompt in a context of {context} tokens",
                    "limits.default_new_tokens",
                    f"{tier.name}.max_context_tokens",
                )
        return self
