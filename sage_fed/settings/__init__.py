"""The settings of one daemon: what can be set, and where each value came from.

Floor 0. `settings` says which keys exist and which combinations cannot work, `loading` lays flags
over environment, file and profile, words a mistake and prints, `values` parses single values.
Pydantic stops here: the other packages read frozen values.
Fails with `ConfigError`, whose text names every offending key, its origin and what is allowed.
"""

from __future__ import annotations

from sage_fed.settings.loading import (
    Effective,
    KeyDescription,
    describe,
    load_settings,
    profile_names,
)
from sage_fed.settings.settings import (
    AUTO_CARD,
    PRECISIONS,
    AccountSettings,
    AuthSettings,
    BudgetSettings,
    LedgerSettings,
    LimitSettings,
    MetricsSettings,
    RateSettings,
    RoutingSettings,
    SchedulingSettings,
    Settings,
    TierSettings,
    TlsSettings,
    TracingSettings,
)
from sage_fed.settings.values import (
    Address,
    UnixSocket,
    atp_from_uatp,
    format_size,
    parse_account,
    parse_listen,
    parse_size,
    uatp_from_atp,
)

__all__ = [
    "AUTO_CARD",
    "PRECISIONS",
    "AccountSettings",
    "Address",
    "AuthSettings",
    "BudgetSettings",
    "Effective",
    "KeyDescription",
    "LedgerSettings",
    "LimitSettings",
    "MetricsSettings",
    "RateSettings",
    "RoutingSettings",
    "SchedulingSettings",
    "Settings",
    "TierSettings",
    "TlsSettings",
    "TracingSettings",
    "UnixSocket",
    "atp_from_uatp",
    "describe",
    "format_size",
    "load_settings",
    "parse_account",
    "parse_listen",
    "parse_size",
    "profile_names",
    "uatp_from_atp",
]
