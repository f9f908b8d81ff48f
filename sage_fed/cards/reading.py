"""Typed values out of a card's tables; every complaint names the file and the key.

Knows TOML's types and money's one rounding, not what a card consists of. Fails with `ConfigError`.
"""

from __future__ import annotations

import datetime as dt
import enum
import math
import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal, localcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sage_fed.core import UATP_PER_ATP
from sage_fed.errors import ConfigError

E = TypeVar("E", bound=enum.Enum)

_PRICE = re.compile(r"[0-9]{1,20}(\.[0-9]{1,60})?")

MAX_PRICE_ATP = 1_000_000
"""Above any real price; keeps every sum far inside the ledger's 64 bits."""


class Reader:
    """One table of a card."""

    def __init__(self, path: Path, prefix: str, values: dict[str, Any]) -> None:
        self._path = path
        self._prefix = prefix
        self._values = values
        self._taken: set[str] = set()

    def fail(self, key: str, message: str) -> NoReturn:
        """Refuse the card because of this key."""
        raise ConfigError(f"{self._path}: {self._prefix}{key}: {message}")

    def finish(self) -> None:
        """Refuse keys that nobody took: a misspelt one must not pass in silence."""
        for key in sorted(self._values.keys() - self._taken):
            self.fail(key, "unknown key")

    def has(self, key: str) -> bool:
        """Whether an optional key is there."""
        return key in self._values

    def table(self, key: str) -> Reader:
        """Return a table of its own."""
        return Reader(self._path, f"{self._prefix}{key}.", self._take(key, dict, "a table"))

    def tables(self, key: str) -> list[Reader]:
        """Return an array of tables."""
        values: list[Any] = self._take(key, list, "an array of tables")
        if not all(isinstance(value, dict) for value in values):
            self.fail(key, "must be an array of tables")
        return [
            Reader(self._path, f"{self._prefix}{key}[{index}].", value)
            for index, value in enumerate(values)
        ]

    def texts(self) -> dict[str, str]:
        """Return a table of nothing but texts, whatever their keys."""
        return {key: self.text(key) for key in self._values}

    def text(self, key: str) -> str:
        """Return a text, stripped; it is not empty."""
        value = str(self._take(key, str, "a text")).strip()
        if not value:
            self.fail(key, "must not be empty")
        return value

    def date(self, key: str) -> dt.date:
        """Return a day."""
        value: dt.date = self._take(key, dt.date, "a date")
        return value

    def instant(self, key: str) -> dt.datetime:
        """Return a time with its offset."""
        value: dt.datetime = self._take(key, dt.datetime, "a date and time")
        if value.tzinfo is None:
            self.fail(key, "must have an offset from UTC")
        return value

    def count(self, key: str, low: int = 0) -> int:
        """Return a whole number of at least `low`."""
        value: int = self._take(key, int, "a whole number")
        if isinstance(value, bool) or value < low:
            self.fail(key, f"must be a whole number of at least {low}")
        return value

    def number(self, key: str, low: float = 0.0) -> float:
        """Return a finite number above `low`, or equal to it where that is 0."""
        try:
            value = float(self._take(key, (int, float), "a number"))
        except OverflowError:  # a whole number beyond all floats
            value = math.inf
        if not math.isfinite(value) or value < low:
            self.fail(key, f"must be a number of at least {low:g}")
        return value

    def word(self, key: str, words: type[E]) -> E:
        """Return the value of an enum whose values are texts."""
        return words(self.choice(key, [word.value for word in words]))

    def choice(self, key: str, known: Sequence[str]) -> str:
        """Return one of the known texts."""
        value = self.text(key)
        if value not in known:
            self.fail(key, f"must be {' or '.join(f'{chr(34)}{word}{chr(34)}' for word in known)}")
        return value

    def price_uatp(self, key: str) -> int:
        """A decimal of ATP as whole uATP, rounded up: the only rounding of money."""
        text = str(self._take(key, str, 'a decimal in quotes, like "6.59": binary floats round'))
        # Decimal alone would also take other scripts' digits, underscores and exponents.
        price = Decimal(text) if _PRICE.fullmatch(text) else Decimal("NaN")
        if not price.is_finite() or not 0 < price <= MAX_PRICE_ATP:
            self.fail(key, f"{text!r} is not a decimal above 0 and at most {MAX_PRICE_ATP}")
        # The context's own rounding of long decimals has to go up, too.
        with localcontext(rounding=ROUND_CEILING):
            return int((price * UATP_PER_ATP).to_integral_value())

    def _take(self, key: str, kind: type | tuple[type, ...], wanted: str) -> Any:  # noqa: ANN401 - TOML's
        self._taken.add(key)
        if key not in self._values:
            self.fail(key, "is missing")
        value = self._values[key]
        if not isinstance(value, kind):
            self.fail(key, f"must be {wanted}")
        return value
