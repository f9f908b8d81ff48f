"""The settings of one daemon: what can be set, and where each value came from.

Floor 0. `settings` says which keys exist and which combinations cannot work, `loading` lays flags
over environment, file and profile, words a mistake and prints, `values` parses single values.
Pydantic stops here: the other packages read frozen values.
Fails with `ConfigError`, whose text names every offending key, its origin and what is allowed.
"""

from __future__ import annotations

from sage_fed.settings.loading import (
    Effective,
    load_settings,
    profile_names,
)
from sage_fed.settings.settings import (
    AUTO_CARD,
    NO_CARD,
    PRECISIONS,
    AccountSettings,
    LimitSettings,
    Settings,
    TlsSettings,
)
from sage_fed.settings.values import (
    atp_from_uatp,
    parse_account,
    uatp_from_atp,
)

__all__ = [
    "AUTO_CARD",
    "NO_CARD",
    "PRECISIONS",
    "AccountSettings",
    "Effective",
    "LimitSettings",
    "Settings",
    "TlsSettings",
    "atp_from_uatp",
    "load_settings",
    "parse_account",
    "profile_names",
    "uatp_from_atp",
]
