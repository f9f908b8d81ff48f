"""Which keys exist, their types, ranges and meanings, and which combinations cannot work.

Owns the rules inside one set of settings; knows nothing of files, flags or the environment
(`sources`). A rule across several keys raises `conflict`, which names them all.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from sage_fed.core import Role, Tier
from sage_fed.settings.values import (
    Address,
    format_size,
    parse_size,
    resolve_model,
    uatp_from_atp,
)


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule across `keys`, each relative to the model that raises it."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


def _address(value: object) -> object:
    return Address.parse(value) if isinstance(value, str) else value


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    # Otherwise `true` would quietly count as 1.
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")  # noqa: TRY004 - pydantic's protocol
    return value


def _amount(value: Decimal) -> Decimal:
    uatp_from_atp(value)
    return value


def _model(value: str) -> str:
    resolve_model(value)
    return value


def _device(value: str) -> str:
    return "cuda:0" if value == "cuda" else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


# NoDecode: the environment holds plain text here, not JSON.
Endpoint = Annotated[Address, NoDecode, BeforeValidator(_address)]
Size = Annotated[
    int,
    BeforeValidator(_whole),
    BeforeValidator(_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
]
Amount = Annotated[Decimal, BeforeValidator(_whole), AfterValidator(_amount)]
Whole = Annotated[int, BeforeValidator(_whole)]
Seconds = Annotated[float, BeforeValidator(_whole), Field(allow_inf_nan=False)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
AccountName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Device = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda(:\d+)?)$"), AfterValidator(_device)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class TierSettings(_Section):
    """One tier: its model, its memory and the size of its queues and batches."""

    model: Annotated[str, AfterValidator(_model)] = Field(
        description="Hub id, directory (starts with /, ./, ../ or ~) or bundled:NAME."
    )
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = Field(
        default=None,
        description="Commit of the hub repository, 40 hexadecimal digits; a hub id needs it.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        description="Number format of weights and KV cache."
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

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if isinstance(resolve_model(self.model), str) and self.revision is None:
            raise conflict(
                f"{self.model} is a hub id and needs a pinned revision: the 40 hexadecimal digits "
                "of a commit of its repository",
                "revision",
                "model",
            )
        return self


class RoutingSettings(_Section):
    """When a request that leaves the choice to the daemon goes to the strategic tier."""

    complexity_threshold: Annotated[float, BeforeValidator(_whole)] = Field(
        default=0.5, ge=0, le=1, description="Client's complexity hint from which on AUTO thinks."
    )
    strategic_prompt_tokens: Whole = Field(
        default=1024, gt=0, description="Prompt length in tokens from which on AUTO thinks."
    )


class LimitSettings(_Section):
    """Bounds of one request and of all, checked before anything is allocated."""

    max_message_bytes: Size = Field(
        default=4 * 2**20, ge=1024, le=2**31 - 1, description="Largest gRPC message received."
    )
    max_prompt_chars: Whole = Field(
        default=200_000, gt=0, description="Characters of all messages together."
    )
    max_messages: Whole = Field(default=256, gt=0, description="Messages of one conversation.")
    max_stop_strings: Whole = Field(default=16, ge=0, description="Stop strings of one request.")
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
        default=128, gt=0, description="Characters of a client request id."
    )
    max_deadline_s: Seconds = Field(
        default=3600.0, gt=0, description="Longest deadline that a request may ask for."
    )
    max_jobs: Whole = Field(
        default=512, gt=0, description="Jobs accepted and not ended, over all tiers and accounts."
    )

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


class BudgetSettings(_Section):
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


class AccountSettings(_Section):
    """One named account."""

    role: Role = Field(
        default=Role.USER, description="user, or admin for the operator's commands too."
    )
    budget: BudgetSettings | None = Field(
        default=None, description="Its own budget, all four keys; without it, [budget] holds."
    )


class AuthSettings(_Section):
    """Who may call."""

    tokens_file: UserPath | None = Field(
        default=None, description="TOML file with the SHA-256 of each bearer token, its account."
    )
    anonymous_account: AccountName | Literal[""] = Field(
        default="local",
        description="Account of callers without a token on a loopback address; empty refuses them.",
    )


class LedgerSettings(_Section):
    """How long the ledger waits and remembers."""

    hold_ttl_s: Seconds = Field(
        default=7200.0, gt=0, description="A hold older than this is given back."
    )
    result_retention_s: Seconds = Field(
        default=86_400.0, ge=0, description="How long a finished request id can be replayed."
    )


class MetricsSettings(_Section):
    """What Prometheus may see."""

    per_account_balance: bool = Field(
        default=False, description="One balance series per account; off keeps names out of metrics."
    )


class Settings(BaseSettings):
    """Everything that an operator can set. Build it with `load_settings`, never by hand."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        env_prefix="sage_fed_",
        env_nested_delimiter="__",
    )

    profile: str = Field(description="Packaged set of values under all others.")
    listen: Endpoint = Field(
        default=Address("127.0.0.1", 6590), description="HOST:PORT of the gRPC API."
    )
    metrics_listen: Endpoint = Field(
        default=Address("127.0.0.1", 9659), description="HOST:PORT of the Prometheus endpoint."
    )
    state_dir: UserPath = Field(
        description="Ledger and admin token; $STATE_DIRECTORY, $XDG_STATE_HOME/sage-fed or "
        "~/.local/state/sage-fed."
    )
    device: Device = Field(
        default="cuda:0", description="cuda:N or cpu; a CUDA device that is absent fails the start."
    )
    cpu_threads: Whole = Field(
        default=0, ge=0, le=1024, description="Threads of one forward pass on CPU; 0 is torch's."
    )
    tactical: TierSettings = Field(description="The fast tier.")
    strategic: TierSettings = Field(description="The deep tier.")
    rate_card: str = Field(
        default="default-1", min_length=1, description="Version of a rate card, or its path."
    )
    cards_dir: UserPath | None = Field(
        default=None, description="Directory of the operator's own rate cards."
    )
    routing: RoutingSettings = Field(default=RoutingSettings(), description="AUTO's rules.")
    limits: LimitSettings = Field(default=LimitSettings(), description="Bounds of requests.")
    budget: BudgetSettings = Field(description="Budget of an account that has none of its own.")
    accounts: dict[AccountName, AccountSettings] = Field(
        default={}, description="Accounts with a role or a budget of their own."
    )
    auth: AuthSettings = Field(default=AuthSettings(), description="Who may call.")
    ledger: LedgerSettings = Field(default=LedgerSettings(), description="The books.")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="What is exported.")
    drain_grace_s: Seconds = Field(
        default=30.0, ge=0, description="How long running streams may finish after SIGTERM."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        Field(default="info", description="Least severe level that is logged.")
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature, as the next ones
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` has layered; a bare constructor reads no environment."""
        return (init_settings,)

    def tier(self, tier: Tier) -> TierSettings:
        """The settings of `tier`."""
        return self.tactical if tier is Tier.TACTICAL else self.strategic

    def account_budget(self, account: str) -> BudgetSettings:
        """The budget with which `account` is opened: its own, or the common one."""
        named = self.accounts.get(account)
        return named.budget if named is not None and named.budget is not None else self.budget

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if not self.listen.is_loopback and self.auth.tokens_file is None:
            raise conflict(
                f"listening on {self.listen}, beyond this machine, needs auth.tokens_file",
                "listen",
                "auth.tokens_file",
            )
        if self.listen == self.metrics_listen and self.listen.port != 0:
            raise conflict(
                f"listen and metrics_listen are both {self.listen}; give them different ports",
                "listen",
                "metrics_listen",
            )
        return self
