"""The settings of one daemon: what can be set, and where each value came from.

Floor 0. `sections`, `doors` and `model` say which keys exist, `fields` how one value is read,
`sources` lays flags over environment, file and profile (with `layers` and `credentials`),
`problems` words a mistake, `table` prints,
`values` and `addresses` hold the small parsers that others use too.
Pydantic stops here: the rest of the house reads frozen values.
Fails with `ConfigError`, whose text names every offending key, its origin and what is allowed.
"""

from __future__ import annotations

from sage_fed.settings.addresses import Address, UnixSocket, parse_listen
from sage_fed.settings.doors import AccountSettings, AuthSettings, RateSettings, TlsSettings
from sage_fed.settings.model import AUTO_CARD, Settings
from sage_fed.settings.sections import (
    PRECISIONS,
    BudgetSettings,
    LedgerSettings,
    LimitSettings,
    MetricsSettings,
    RoutingSettings,
    SchedulingSettings,
    TierSettings,
    TracingSettings,
)
from sage_fed.settings.sources import Effective, load_settings, profile_names
from sage_fed.settings.table import KeyDescription, describe
from sage_fed.settings.values import (
    atp_from_uatp,
    format_size,
    parse_account,
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
