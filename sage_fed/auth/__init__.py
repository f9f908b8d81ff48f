"""Who calls, and what they may do.

`authenticator` decides for each call and counts calls, `tokens_file` reads and changes the file of
who may call. Only SHA-256 digests are kept; no token is ever logged or put into an error. Does not
know gRPC.
Fails with `Unauthenticated`, `Forbidden` and `RateLimited` for callers, `ConfigError` for the
operator's files.
"""

from __future__ import annotations

from sage_fed.auth.authenticator import (
    Authenticator,
    Certificate,
    Identity,
    NameKind,
    Register,
    Throttle,
    Token,
    digest_of,
    parse_identity,
    require_role,
)
from sage_fed.auth.tokens_file import (
    ADMIN_TOKEN_FILE,
    mint_admin_token,
    new_token,
    read_register,
)

__all__ = [
    "ADMIN_TOKEN_FILE",
    "Authenticator",
    "Certificate",
    "Identity",
    "NameKind",
    "Register",
    "Throttle",
    "Token",
    "digest_of",
    "mint_admin_token",
    "new_token",
    "parse_identity",
    "read_register",
    "require_role",
]
