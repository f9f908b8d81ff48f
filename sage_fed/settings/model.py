"""All settings of one daemon, and which combinations cannot work.

Knows nothing of files, flags or the environment (`sources`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from sage_fed.core import TIER_ROLES, Tier
from sage_fed.settings.addresses import Address, UnixSocket
from sage_fed.settings.doors import AccountSettings, AuthSettings, RateSettings, TlsSettings
from sage_fed.settings.fields import (
    AccountName,
    CachePlace,
    Device,
    EmptyIsNone,
    Endpoint,
    ListenPoint,
    Lowered,
    Real,
    Size,
    UserPath,
    Whole,
    conflict,
)
from sage_fed.settings.sections import (
    BudgetSettings,
    LedgerSettings,
    LimitSettings,
    MetricsSettings,
    RoutingSettings,
    SchedulingSettings,
    TierSettings,
    TracingSettings,
)

AUTO_CARD = "auto"
"""The value of `rate_card` that chooses by what is loaded."""

TOKENS_FILE = "tokens.toml"
"""Its name in the state directory, where no setting names another."""


class Settings(BaseSettings):
    """Everything that an operator can set. Build it with `load_settings`, never by hand."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="sage_fed_",
        env_nested_delimiter="__",
        # Variables hold plain text, one key each; JSON in a variable is not a way to set a table.
        enable_decoding=False,
    )

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
        return self.tactical if tier == Tier.TACTICAL else self.strategic

    def account_budget(self, account: str) -> BudgetSettings:
        """The budget with which `account` is opened: its own, or the common one."""
        named = self.accounts.get(account)
        return named.budget if named is not None and named.budget is not None else self.budget

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
                "nobody shows a certificate on a Unix socket: its file's mode says who may "
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
        for tier in TIER_ROLES:
            context = self.tier(tier).max_context_tokens
            if self.limits.default_new_tokens >= context:
                raise conflict(
                    f"default_new_tokens ({self.limits.default_new_tokens}) leaves no room for a "
                    f"prompt in a context of {context} tokens",
                    "limits.default_new_tokens",
                    f"{tier.name}.max_context_tokens",
                )
        return self
