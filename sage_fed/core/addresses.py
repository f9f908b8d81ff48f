"""Where a daemon listens and a client connects: HOST:PORT, or a socket in the file system.

Owns their text forms; the parsers raise `ValueError` with a text that says what would be right, and
the caller adds whose address it is. Knows no name service.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

_ADDRESS = re.compile(
    r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})", re.ASCII
)
_EXPECTED = (
    "expected HOST:PORT, for example 127.0.0.1:6590, [::1]:6590 or 0.0.0.0:6590 for every interface"
)
_UNIX_PREFIX = "unix:"
_MAX_SOCKET_BYTES = 107
"""What the kernel's address of a Unix socket has room for."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP endpoint; port 0 asks the kernel for a free one (tests)."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `HOST:PORT` or `[IPV6]:PORT`; `ValueError` says what is wrong."""
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            raise ValueError(_EXPECTED)
        port = int(match["port"])
        if port > 65535:
            raise ValueError("expected a port from 0 to 65535")
        try:
            if match["ipv6"] is not None:
                return cls(str(ipaddress.IPv6Address(match["ipv6"])), port)
            if re.fullmatch(r"[\d.]+", match["host"]):
                return cls(str(ipaddress.IPv4Address(match["host"])), port)
        except ipaddress.AddressValueError:
            kind = "IPv4 address of four numbers" if match["host"] else "IPv6 address in brackets"
            raise ValueError(f"expected an {kind}") from None
        return cls(match["host"], port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; an unknown host name counts as reachable."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A socket in the file system; its directory and its mode (0660) say who may connect."""

    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `unix:/PATH`, also written `unix:///PATH`; `ValueError` says what is wrong."""
        path = text.strip().removeprefix(_UNIX_PREFIX)
        path = path.removeprefix("//")
        if not path.startswith("/") or path.endswith("/") or not path.isprintable():
            raise ValueError("expected unix:/PATH, for example unix:/run/sage-fed/sage-fed.sock")
        if len(path.encode()) > _MAX_SOCKET_BYTES:
            raise ValueError(f"expected a path of at most {_MAX_SOCKET_BYTES} bytes")
        return cls(path)

    @property
    def is_loopback(self) -> bool:
        """Always: only this machine can reach it."""
        return True

    def __str__(self) -> str:
        return f"{_UNIX_PREFIX}{self.path}"


def parse_listen(text: str) -> Address | UnixSocket:
    """Read either form."""
    if text.strip().startswith(_UNIX_PREFIX):
        return UnixSocket.parse(text)
    if _ADDRESS.fullmatch(text.strip()) is None:
        raise ValueError(f"{_EXPECTED}, or unix:/PATH for a socket of this machine")
    return Address.parse(text)
