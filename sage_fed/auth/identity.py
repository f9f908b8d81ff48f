"""The names in a client's certificate, and the rules that are about them.

Owns which kind of name a rule means. A certificate may carry a DNS name, a URI, an e-mail address,
an IP address and a common name, which different people may have been allowed to choose: a rule
for one kind is never met by another. Does not know gRPC.
"""

from __future__ import annotations

import difflib
import enum
import ipaddress
import re
from dataclasses import dataclass


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
"""What a name of a kind looks like; one that does not is in no certificate, and lets nobody in."""


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
