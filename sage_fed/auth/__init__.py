"""Who calls, and what they may do.

`authenticator` decides for each call, `register` reads the file of who may call, `identity` the
names in certificates, `minting` makes tokens, `throttle` counts calls. Only SHA-256 digests are
kept; no token is ever logged or put into an error. Does not know gRPC.
Fails with `Unauthenticated`, `Forbidden` and `RateLimited` for callers, `ConfigError` for the
operator's files.
"""

from __future__ import annotations

from sage_fed.auth.authenticator import Authenticator, require_role
from sage_fed.auth.identity import Identity, NameKind, parse_identity
from sage_fed.auth.minting import ADMIN_TOKEN_FILE, digest_of, mint_admin_token, new_token
from sage_fed.auth.register import Certificate, Register, Token, read_register
from sage_fed.auth.throttle import Throttle

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
