"""The settings of one daemon: what can be set, and where each value came from.

Floor 0. `model` says which keys exist, `sources` layers flags, environment, file and profile,
`problems` turns a mistake into one readable error, `values` holds the small parsers.
Pydantic stops here: the rest of the house reads frozen values.
Fails with `ConfigError`, whose text names every offending key, its origin and what is allowed.
"""

from __future__ import annotations

from sage_fed.settings.model import (
    AccountSettings,
    AuthSettings,
    BudgetSettings,
    LedgerSettings,
    LimitSettings,
    MetricsSettings,
    RoutingSettings,
    Settings,
    TierSettings,
)
from sage_fed.settings.sources import Effective, load_settings
from sage_fed.settings.table import KeyDescription, describe
from sage_fed.settings.values import (
    Address,
    atp_from_uatp,
    format_size,
    parse_size,
    resolve_model,
    uatp_from_atp,
)

__all__ = [
    "AccountSettings",
    "Address",
    "AuthSettings",
    "BudgetSettings",
    "Effective",
    "KeyDescription",
    "LedgerSettings",
    "LimitSettings",
    "MetricsSettings",
    "RoutingSettings",
    "Settings",
    "TierSettings",
    "atp_from_uatp",
    "describe",
    "format_size",
    "load_settings",
    "parse_size",
    "resolve_model",
    "uatp_from_atp",
]
