"""The tables of who may come in, over which wire, and how often.

Owns the rules inside one table; what holds between tables is in `model`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from sage_fed.core import Role
from sage_fed.settings.fields import (
    AccountOrNobody,
    EmptyIsNone,
    Section,
    UserPath,
    Whole,
    conflict,
)
from sage_fed.settings.sections import BudgetSettings

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
        description="Certificates that sign clients'; with it nobody connects without one.",
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
