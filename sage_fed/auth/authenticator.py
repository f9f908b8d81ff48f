"""Who calls, for each call, and how many calls that account may make.

Owns the order: a token, where one is sent, says who calls; then the certificate; then the
anonymous account. A wrong token or certificate is refused, never taken for another caller.
Owns which kind of a certificate's name a rule means: a certificate may carry a DNS name, a URI, an
e-mail address, an IP address and a common name, which different people may have chosen, so a rule
for one kind never matches another.
Costs a SHA-256 and a look-up, however many tokens there are. Does not know gRPC or any file.
Fails with `Unauthenticated`, `Forbidden` and `RateLimited`, before anything is parsed or held.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage_fed.core import Caller, Role, counted
from sage_fed.errors import Forbidden, RateLimited, Unauthenticated
from sage_fed.settings import Settings

MAX_TOKEN_CHARS = 1024
"""A longer header is refused unread."""

_MAY: dict[Role, frozenset[Role]] = {
    Role.USER: frozenset({Role.USER, Role.ADMIN}),
    Role.MONITOR: frozenset({Role.MONITOR, Role.ADMIN}),
    Role.ADMIN: frozenset({Role.ADMIN}),
}
"""What is asked for -> who has it."""


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token as we know it: its SHA-256 digest (32 bytes), and whom it stands for.

    `expires_s` is in seconds since 1970.
    """

    digest: bytes
    caller: Caller
    expires_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Certificate:
    """A rule about the names in clients' certificates (`parse_identity`), and whom it means."""

    identity: str
    caller: Caller
    expires_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Register:
    """Who may call."""

    tokens: tuple[Token, ...] = ()
    certificates: tuple[Certificate, ...] = ()

    @property
    def accounts(self) -> frozenset[str]:
        """Every account that needs a budget: a monitor runs no jobs."""
        callers = [token.caller for token in self.tokens]
        callers += [certificate.caller for certificate in self.certificates]
        return frozenset(c.account for c in callers if c.role is not Role.MONITOR)


def digest_of(token: str | bytes) -> bytes:
    """Return what is kept of a token (32 bytes); a plain SHA-256, as random bits need no salt."""
    return hashlib.sha256(token.encode() if isinstance(token, str) else token).digest()


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

        Callers without a token are accepted from this machine only, and never as admins, and
        nowhere where clients show certificates.
        """
        account = settings.auth.anonymous_account
        local = settings.listen.is_loopback and settings.tls.client_ca is None
        anonymous = Caller(account, Role.USER) if account and local else None
        return cls([admin], anonymous, register)

    def use(self, register: Register) -> None:
        """Accept the callers of `register` from now on, and our own, but no others."""
        tokens = (*self._own, *register.tokens)
        self._accounts = Register(tokens, register.certificates).accounts
        self._tokens = {token.digest: token for token in tokens}
        self._certificates = {
            parse_identity(certificate.identity): certificate
            for certificate in register.certificates
        }

    def accounts(self) -> frozenset[str]:
        """Return every account that may call: each needs a budget."""
        return self._accounts | ({self._anonymous.account} if self._anonymous else set())

    @property
    def anonymous(self) -> Caller | None:
        """Who calls without saying who they are; None where such calls are refused."""
        return self._anonymous

    @property
    def num_tokens(self) -> int:
        """Tokens that hold, the admin token of this machine aside."""
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
                certificate that is unknown. A wrong one is refused even where none is needed.
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
        # What the look-up's time could tell is about digests, which cannot be chosen; the
        # comparison that decides takes the same time for every digest.
        if not hmac.compare_digest(token.digest if token is not None else bytes(32), digest):
            token = None
        if token is None:
            raise Unauthenticated("this token is unknown")
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
            raise Unauthenticated("the certificate names no caller")
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


class NameKind(enum.Enum):
    """Where in a certificate a name stands; the value is what a rule begins with."""

    DNS = "dns"
    URI = "uri"
    EMAIL = "email"
    IP = "ip"
    COMMON_NAME = "cn"
    PLAIN = ""
    """A rule without a kind: a DNS name, or the common name where there are no others."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One name of one kind, in the form in which equal ones are equal."""

    kind: NameKind
    name: str

    @classmethod
    def of(cls, kind: NameKind, name: str) -> Identity:
        """Return the name as it is compared: host names without case, addresses as numbers.

        Raises:
            ValueError: an address that is none.
        """
        if kind in (NameKind.DNS, NameKind.PLAIN):
            name = name.lower()
        elif kind is NameKind.IP:
            name = str(ipaddress.ip_address(name))
        return cls(kind, name)

    @property
    def widest(self) -> Identity:
        """The same for two rules that one certificate may meet: a plain name is a DNS name too."""
        return Identity(NameKind.DNS, self.name) if self.kind is NameKind.PLAIN else self


_KINDS = {kind.value: kind for kind in NameKind if kind is not NameKind.PLAIN}

_FORMS = {
    NameKind.DNS: (re.compile(r"[A-Za-z0-9._-]+"), "a host name, without * and in ASCII (xn--...)"),
    NameKind.URI: (re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.*[^:/].*"), "a URI with its scheme"),
    NameKind.EMAIL: (re.compile(r"[^@\s]+@[^@\s]+"), "an e-mail address"),
}
"""What a name of a kind looks like; others are in no certificate."""


def parse_identity(rule: str) -> Identity:
    """Return what a rule means: `KIND:NAME`, a DNS name, or a URI with its scheme.

    Raises:
        ValueError: it is none of these; says what would be right.
    """
    if not rule or not rule.isprintable():
        raise ValueError("must be a name in the certificate")
    head, colon, name = rule.partition(":")
    if colon and head in _KINDS:
        return _of_kind(_KINDS[head], name)
    if _is_address(rule):
        raise ValueError(f"must say that it is an address: ip:{rule}")
    if "://" in rule:
        _require_form(NameKind.URI, rule, "be")
        return Identity.of(NameKind.URI, rule)
    if colon:
        raise ValueError(_no_kind(head, name))
    if "@" in rule:
        raise ValueError(f"must say that it is an e-mail address: email:{rule}")
    if not _FORMS[NameKind.DNS][0].fullmatch(rule):
        raise ValueError(f"must be {_FORMS[NameKind.DNS][1]}; a common name is cn:{rule}")
    return Identity.of(NameKind.PLAIN, rule)


def _of_kind(kind: NameKind, name: str) -> Identity:
    if not name:
        raise ValueError(f"must have a name behind {kind.value}:")
    _require_form(kind, name, f"have, behind {kind.value}:,")
    try:
        return Identity.of(kind, name)
    except ValueError:
        raise ValueError(f"must have an IP address behind {kind.value}:") from None


def _require_form(kind: NameKind, name: str, verb: str) -> None:
    if kind in _FORMS and not _FORMS[kind][0].fullmatch(name):
        raise ValueError(f"must {verb} {_FORMS[kind][1]}")


def _no_kind(head: str, name: str) -> str:
    near = difflib.get_close_matches(head.lower(), _KINDS, n=1)
    kinds = ", ".join(f"{kind}:" for kind in _KINDS)
    meant = f"did you mean {near[0]}:{name}? A" if near else "a"
    return f"must begin with one of {kinds}; {meant} URI is uri:{head}:{name}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


if TYPE_CHECKING:
    from limits import RateLimitItem

CALL_BYTES = 16 * 1024
"""A message counts as one call for each 16 KiB of it that it has begun."""

_SOON_S = 0.001
"""The least that a refused caller is told to wait."""


class Throttle:
    """Counts calls; `per_minute` is how many an account may make, 0 is no limit."""

    def __init__(self, per_minute: Callable[[str], int]) -> None:
        # An eighth of a second to import, which a start without limits does not pay.
        from limits import RateLimitItemPerMinute  # noqa: PLC0415
        from limits.storage import MemoryStorage  # noqa: PLC0415
        from limits.strategies import SlidingWindowCounterRateLimiter  # noqa: PLC0415

        self._per_minute = per_minute
        self._item_of = RateLimitItemPerMinute
        self._items: dict[str, RateLimitItem | None] = {}
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, account: str) -> None:
        """Count one call, before its message is read.

        Raises:
            RateLimited: it is one too many; it says when the next one may come.
        """
        item = self._item(account)
        if item is not None and not self._limiter.hit(item, account):
            raise self._limited(item, account)

    def count_message(self, account: str, num_bytes: int) -> None:
        """Count the message of a call that was counted, for what it has beyond one call's bytes.

        One that is larger than a whole minute's calls takes a whole minute.

        Raises:
            RateLimited: it is too much; it says when the next one may come.
        """
        more = max(num_bytes - 1, 0) // CALL_BYTES
        item = self._item(account) if more else None
        if item is None:
            return
        cost = min(more, item.amount - 1)
        if cost and not self._limiter.hit(item, account, cost=cost):
            raise self._limited(item, account, cost)

    def _item(self, account: str) -> RateLimitItem | None:
        try:
            return self._items[account]
        except KeyError:
            allowed = self._per_minute(account)
            item = self._items[account] = self._item_of(allowed) if allowed else None
            return item

    def _limited(self, item: RateLimitItem, account: str, cost: int = 1) -> RateLimited:
        next_s = self._limiter.get_window_stats(item, account).reset_time - time.time()
        # The next one that falls out of the minute makes room for one.
        wait_s = next_s + (cost - 1) * item.get_expiry() / item.amount
        return RateLimited(
            f"account {account} may make {counted(item.amount, 'call')} a minute, of "
            f"{CALL_BYTES // 1024} KiB each",
            account=account,
            limit="requests_per_minute",
            allowed=item.amount,
            retry_after_s=max(wait_s, _SOON_S),
        )
