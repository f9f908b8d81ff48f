"""Text forms of single values: sizes, amounts and account names.

Knows no key, no file and no pydantic; the parsers raise `ValueError` with a text that says what
would be right, and the caller adds the key.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation, localcontext

from sage_fed.core import UATP_PER_ATP

MAX_ATP = 1_000_000_000
"""Largest amount of a setting in ATP: 1e15 uATP leaves a signed 64-bit ledger room to add."""

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
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)


def parse_account(text: str) -> str:
    """Check the name of an account; `ValueError` says what would be right."""
    if _ACCOUNT.fullmatch(text) is None:
        raise ValueError(
            "expected 1 to 64 lower-case letters, digits, - or _, the first a letter or digit"
        )
    return text


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
