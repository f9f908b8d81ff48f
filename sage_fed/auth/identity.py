"""The names in a client's certificate, and the rules that are about them.

Owns which kind of name a rule means. A certificate may carry a DNS name, a URI, an e-mail address,
an IP address and a common name, which different people may have been allowed to choose: a rule
for one kind is never met by another. Does not know gRPC.
"""

from __future__ import annotations

import enum
import ipaddress
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
        """Return the name as it is compared: DNS names without case, addresses as numbers.

        Raises:
            ValueError: an address that is none.
        """
        if kind is NameKind.DNS:
            name = name.lower()
        elif kind is NameKind.IP:
            name = str(ipaddress.ip_address(name))
        return cls(kind, name)


_KINDS = {kind.value: kind for kind in NameKind if kind is not NameKind.PLAIN}


def parse_identity(rule: str) -> Identity:
    """Return what a rule means: `KIND:NAME`, a DNS name, or a URI with its scheme.

    Raises:
        ValueError: it is none of these; says what would be right.
    """
    if not rule or not rule.isprintable():
        raise ValueError("must be a name in the certificate")
    head, colon, name = rule.partition(":")
    if colon and head in _KINDS:
        if not name:
            raise ValueError(f"must have a name behind {head}:")
        try:
            return Identity.of(_KINDS[head], name)
        except ValueError:
            raise ValueError(f"must have an IP address behind {head}:") from None
    if _is_address(rule):
        raise ValueError(f"must say that it is an address: ip:{rule}")
    if colon:
        return Identity.of(NameKind.URI, rule)
    if "@" in rule:
        raise ValueError(f"must say that it is an e-mail address: email:{rule}")
    return Identity(NameKind.PLAIN, rule)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
