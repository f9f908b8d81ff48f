"""The small values of the settings: addresses, sizes, amounts and model names.

Owns their text forms. Knows no key, no file and no pydantic; the parsers raise `ValueError`
with a text that says what would be right, so that whoever knows the key can add it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation, localcontext
from pathlib import Path
from typing import Self

from sage_fed.core import UATP_PER_ATP

MAX_ATP = 1_000_000_000
"""Largest amount of a setting in ATP: 1e15 uATP leaves a signed 64-bit ledger room to add."""

BUNDLED_PREFIX = "bundled:"

_UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)
_ADDRESS = re.compile(
    r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})", re.ASCII
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BUNDLED_NAME = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)


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
            raise ValueError(
                "expected HOST:PORT, for example 127.0.0.1:6590, [::1]:6590 "
                "or 0.0.0.0:6590 for every interface"
            )
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


def parse_size(text: str) -> int:
    """Bytes of a size such as `512MiB`, `1.5 GiB`, `2GB` or a bare number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    scale = _UNITS.get(match["unit"].lower() or "b") if match else None
    if match is None or scale is None:
        raise ValueError("expected a size such as 512MiB, 1.5GiB, 2GB or a number of bytes")
    size = Decimal(match["number"]) * scale
    if size != size.to_integral_value():
        raise ValueError("expected a whole number of bytes")
    return int(size)


def format_size(num_bytes: int) -> str:
    """The shortest exact binary form: 536870912 -> `512MiB`; `parse_size` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _UNITS[unit.lower()]
        if num_bytes and num_bytes % scale == 0:
            return f"{num_bytes // scale}{unit}"
    return f"{num_bytes}B"


def uatp_from_atp(amount: Decimal | int | str) -> int:
    """Exact uATP of a non-negative amount in ATP.

    Raises:
        ValueError: not a number, negative, above `MAX_ATP`, or finer than one uATP;
            a budget is never rounded (prices are, upwards, in `pricing`).
    """
    try:
        atp = Decimal(amount)
    except InvalidOperation:
        raise ValueError("expected an amount in ATP, for example 2000 or 6.59") from None
    if not atp.is_finite() or not 0 <= atp <= MAX_ATP:
        raise ValueError(f"expected an amount from 0 to {MAX_ATP} ATP")
    with localcontext(prec=len(atp.as_tuple().digits) + 7):  # enough for an exact product
        uatp = atp * UATP_PER_ATP
    if uatp != uatp.to_integral_value():
        raise ValueError("expected at most 6 decimals: 0.000001 ATP is the smallest amount")
    return int(uatp)


def atp_from_uatp(amount_uatp: int) -> Decimal:
    """The exact decimal amount in ATP of an amount in uATP, without trailing zeros."""
    whole, rest = divmod(abs(amount_uatp), UATP_PER_ATP)
    text = f"{whole}.{rest:06d}".rstrip("0").rstrip(".")
    return Decimal(f"-{text}" if amount_uatp < 0 else text)


def resolve_model(name: str) -> Path | str:
    """Where a model's files are: a directory (`Path`) or a hub id (`str`).

    `bundled:NAME` is the directory `models/NAME` of the installed package; text that starts
    with `/`, `./`, `../` or `~` is a directory; `OWNER/NAME` is a hub id. Nothing is read:
    whether the files are there is found out at load.

    Raises:
        ValueError: none of the three.
    """
    if name.startswith(BUNDLED_PREFIX):
        bundled = name.removeprefix(BUNDLED_PREFIX)
        if _BUNDLED_NAME.fullmatch(bundled):
            return Path(__file__).parent.parent / "models" / bundled
    elif name.startswith(("/", "./", "../", "~")):
        return Path(name).expanduser()
    elif _HUB_ID.fullmatch(name):
        return name
    raise ValueError(
        "expected a hub id (Qwen/Qwen2.5-0.5B-Instruct), a directory that starts with /, ./, ../ "
        "or ~, or a bundled model (bundled:demo-tactical)"
    )
