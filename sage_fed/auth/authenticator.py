"""The decision of who calls, for each call.

Owns the order: a token, where one is sent, says who calls; then the certificate; then the
anonymous account. Whoever says who they are, wrongly, is refused and never somebody else.
Costs a SHA-256 and a look-up, however many tokens there are.
Fails with `Unauthenticated` and `Forbidden`.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection, Sequence

from sage_fed.auth.identity import Identity, parse_identity
from sage_fed.auth.minting import digest_of
from sage_fed.auth.register import Certificate, Register, Token
from sage_fed.core import Caller, Role
from sage_fed.errors import Forbidden, Unauthenticated
from sage_fed.settings import Settings

MAX_TOKEN_CHARS = 1024
"""A longer header is refused unread."""

_MAY: dict[Role, frozenset[Role]] = {
    Role.USER: frozenset({Role.USER, Role.ADMIN}),
    Role.MONITOR: frozenset({Role.MONITOR, Role.ADMIN}),
    Role.ADMIN: frozenset({Role.ADMIN}),
}
"""What is asked for -> who has it."""


class Authenticator:
    """Decides who calls.

    Args:
        tokens: those that hold as long as we live, such as the admin token of this machine.
        anonymous: who calls without saying who they are; None refuses them.
        register: who else may call; `use` replaces it.
        clock: the wall clock, for what expires.
    """

    def __init__(
        self,
        tokens: Sequence[Token],
        anonymous: Caller | None,
        register: Register | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._own = tuple(tokens)
        self._anonymous = anonymous
        self._clock = clock
        self._tokens: dict[bytes, Token] = {}
        self._certificates: dict[Identity, Certificate] = {}
        self._accounts: frozenset[str] = frozenset()
        self.use(register or Register())

    @classmethod
    def from_settings(cls, settings: Settings, admin: Token, register: Register) -> Authenticator:
        """Build what the settings describe, with the admin token of this machine.

        Callers without a token are let in from this machine only, and never as admins; where
        clients show certificates, an unknown one is not nobody's.
        """
        account = settings.auth.anonymous_account
        local = settings.listen.is_loopback and settings.tls.client_ca is None
        anonymous = Caller(account, Role.USER) if account and local else None
        return cls([admin], anonymous, register)

    def use(self, register: Register) -> None:
        """Let in those of `register` from now on, and nobody else but our own."""
        tokens = (*self._own, *register.tokens)
        callers = [token.caller for token in tokens]
        callers += [certificate.caller for certificate in register.certificates]
        # A monitor runs no jobs: it needs no budget.
        self._accounts = frozenset(c.account for c in callers if c.role is not Role.MONITOR)
        self._tokens = {token.digest: token for token in tokens}
        self._certificates = {
            parse_identity(certificate.identity): certificate
            for certificate in register.certificates
        }

    def accounts(self) -> frozenset[str]:
        """Return every account that may call: each needs a budget."""
        nobody = {self._anonymous.account} if self._anonymous is not None else set()
        return self._accounts | nobody

    @property
    def anonymous(self) -> Caller | None:
        """Who calls without saying who they are; None where such calls are refused."""
        return self._anonymous

    @property
    def num_tokens(self) -> int:
        """Tokens that are let in, the admin token of this machine aside."""
        return len(self._tokens) - len(self._own)

    def caller(
        self, authorization: Sequence[str | bytes], identities: Collection[Identity] | None = None
    ) -> Caller:
        """Return who calls, from the values of the `authorization` header (none or one).

        Args:
            authorization: the header's values.
            identities: the names in the client's certificate, which TLS has verified; None
                where clients show none.

        Raises:
            Unauthenticated: no token where one is needed, a malformed header, or a token or
                certificate that nobody has. A wrong one is refused even where none is needed.
        """
        if authorization:
            return self._bearer(authorization)
        if identities is not None:
            return self._certified(identities)
        if self._anonymous is None:
            raise Unauthenticated("send a token: authorization: Bearer <token>")
        return self._anonymous

    def _bearer(self, authorization: Sequence[str | bytes]) -> Caller:
        digest = digest_of(_token_of(authorization))
        token = self._tokens.get(digest)
        # What the look-up's time could tell is about digests, which nobody can choose; the
        # comparison that decides takes the same time for every digest.
        if not hmac.compare_digest(token.digest if token is not None else bytes(32), digest):
            token = None
        if token is None:
            raise Unauthenticated("nobody has this token")
        if self._clock() >= token.expires_s:
            raise Unauthenticated("this token has expired; ask the operator for another one")
        return token.caller

    def _certified(self, identities: Collection[Identity]) -> Caller:
        found = {
            known.caller
            for name in identities
            if (known := self._certificates.get(name)) is not None
            and self._clock() < known.expires_s
        }
        if len(found) > 1:
            raise Unauthenticated("the certificate names several callers; send a token as well")
        if not found:
            raise Unauthenticated("the certificate names nobody who may call")
        return found.pop()


def require_role(caller: Caller, role: Role) -> None:
    """Refuse a caller without the role; an admin may do all that others may.

    Raises:
        Forbidden: the caller may not do this.
    """
    if caller.role not in _MAY[role]:
        raise Forbidden(f"account {caller.account} is no {role.value}, but {caller.role.value}")


def _token_of(authorization: Sequence[str | bytes]) -> bytes:
    """Return the token of one `Bearer` header."""
    if len(authorization) > 1:
        raise Unauthenticated("send one authorization header, not several")
    value = authorization[0]
    text = value.encode() if isinstance(value, str) else value
    scheme, _, token = text.partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token or len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated("the authorization header must be: Bearer <token>")
    return token
