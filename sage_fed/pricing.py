"""Rate cards, quotes and charges: from token counts to exact integer prices.

Owns the one place where money is rounded: a card's decimal ATP become whole uATP per token,
upwards, when the card is read; everything after that is integer arithmetic.
Knows neither accounts nor routes. Fails with `ConfigError` naming the file and the key.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation, localcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sage_fed.core import UATP_PER_ATP, Offer, Phase, Tier, Usage
from sage_fed.errors import ConfigError

DEFAULT_CARD = "thor-fp16-2025-11-05"
BUNDLED_CARDS = Path(__file__).parent / "cards"
_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_PRICE_ATP = 1_000_000
"""Above any real price; keeps every sum far inside the ledger's 64 bits."""


class Basis(enum.Enum):
    """Whether a price was measured on the card's device or set by its author."""

    MEASURED = "measured"
    DECLARED = "declared"


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one token of a tier and phase, and where it comes from."""

    uatp: int
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True)
class RateCard:
    """One version of the prices; immutable, and frozen for a job at its admission."""

    version: str
    title: str
    created: dt.date
    device: str
    software: str
    provenance: str
    lines: Mapping[Tier, Mapping[Phase, Rate]]

    @classmethod
    def load(cls, name: str | Path = DEFAULT_CARD, directory: Path | None = None) -> RateCard:
        """Reads a card by its version, or by the path of its file.

        A version is looked for in `directory` (the operator's own cards), then among the
        bundled ones. Blocking. Raises `ConfigError`.
        """
        return _parse(_find(name, directory))

    @property
    def rates(self) -> Mapping[Tier, Mapping[Phase, int]]:
        """Prices in uATP per token, by tier and phase."""
        return {
            tier: {phase: rate.uatp for phase, rate in rates.items()}
            for tier, rates in self.lines.items()
        }

    def cost_ratio(self, phase: Phase = Phase.DECODE) -> float:
        """Strategic over tactical price of a token of this phase."""
        strategic, tactical = self.lines[Tier.STRATEGIC][phase], self.lines[Tier.TACTICAL][phase]
        return strategic.uatp / tactical.uatp


def quote(card: RateCard, tier: Tier, prompt_tokens: int, max_new_tokens: int) -> Offer:
    """What `tier` would ask for a job of this size, nothing of it being cached."""
    rates = card.lines[tier]
    return Offer(
        tier=tier,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        prompt_uatp=prompt_tokens * rates[Phase.PREFILL].uatp,
        decode_uatp=rates[Phase.DECODE].uatp,
    )


def worst_case(card: RateCard, tier: Tier, prompt_tokens: int, max_new_tokens: int) -> int:
    """The most uATP that a job of this size can cost; what is held for it."""
    return quote(card, tier, prompt_tokens, max_new_tokens).worst_case_uatp


def charge(card: RateCard, tier: Tier, usage: Usage) -> int:
    """The price in uATP of what was done; never above the worst case of the same bounds."""
    assert 0 <= usage.cached_tokens <= usage.prompt_tokens, "cached tokens are prompt tokens"
    rates = card.lines[tier]
    return (
        (usage.prompt_tokens - usage.cached_tokens) * rates[Phase.PREFILL].uatp
        + usage.cached_tokens * rates[Phase.CACHED].uatp
        + usage.output_tokens * rates[Phase.DECODE].uatp
    )


def available_cards(directory: Path | None = None) -> tuple[str, ...]:
    """The versions that `RateCard.load` finds by name."""
    folders = (BUNDLED_CARDS, directory) if directory else (BUNDLED_CARDS,)
    return tuple(sorted({path.stem for folder in folders for path in folder.glob("*.toml")}))


def _find(name: str | Path, directory: Path | None) -> Path:
    if isinstance(name, Path) or "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
    else:
        if not _VERSION.fullmatch(name):
            raise ConfigError(f"rate_card: {name!r} is neither a card's version nor a path")
        bundled = BUNDLED_CARDS / f"{name}.toml"
        own = directory / bundled.name if directory else bundled
        # Prices in the books are named by version: one name must not mean two cards.
        if own != bundled and own.is_file() and bundled.is_file():
            raise ConfigError(f"{own}: {name} is a bundled card's version; give it another")
        path = own if own.is_file() else bundled
    if not path.is_file():
        known = ", ".join(available_cards(directory))
        raise ConfigError(f"rate_card: there is no card {name}; there are {known}")
    return path


def _parse(path: Path) -> RateCard:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a readable rate card: {error}") from error
    reader = _Reader(path, "", table)
    card = RateCard(
        version=reader.text("version"),
        title=reader.text("title"),
        created=reader.date("created"),
        device=reader.text("device"),
        software=reader.text("software"),
        provenance=reader.text("provenance"),
        lines=MappingProxyType({tier: _rates(reader.table(tier.value)) for tier in Tier}),
    )
    reader.finish()
    if card.version != path.stem or not _VERSION.fullmatch(card.version):
        reader.fail("version", f"must be the file's name, {path.stem}, in a-z 0-9 . _ -")
    return card


def _rates(reader: _Reader) -> Mapping[Phase, Rate]:
    rates = {phase: _rate(reader.table(phase.value)) for phase in Phase}
    reader.finish()
    # Else a cached prompt could cost more than the hold, which is made for an uncached one.
    if rates[Phase.CACHED].uatp > rates[Phase.PREFILL].uatp:
        reader.fail("cached.price_atp", "must not be above prefill.price_atp")
    return MappingProxyType(rates)


def _rate(reader: _Reader) -> Rate:
    rate = Rate(
        uatp=reader.price_uatp("price_atp"),
        basis=reader.basis("basis"),
        source=reader.text("source"),
    )
    reader.finish()
    return rate


class _Reader:
    """Takes typed values out of one TOML table; every complaint names file and key."""

    def __init__(self, path: Path, prefix: str, values: dict[str, Any]) -> None:
        self._path = path
        self._prefix = prefix
        self._values = values
        self._taken: set[str] = set()

    def fail(self, key: str, message: str) -> None:
        raise ConfigError(f"{self._path}: {self._prefix}{key}: {message}")

    def finish(self) -> None:
        """Refuses keys that nobody took: a misspelt one must not pass in silence."""
        for key in sorted(self._values.keys() - self._taken):
            self.fail(key, "unknown key")

    def table(self, key: str) -> _Reader:
        return _Reader(self._path, f"{self._prefix}{key}.", self._take(key, dict, "a table"))

    def text(self, key: str) -> str:
        value = str(self._take(key, str, "a text")).strip()
        if not value:
            self.fail(key, "must not be empty")
        return value

    def date(self, key: str) -> dt.date:
        value: dt.date = self._take(key, dt.date, "a date")
        return value

    def basis(self, key: str) -> Basis:
        value = self.text(key)
        if value not in {basis.value for basis in Basis}:
            self.fail(key, 'must be "measured" or "declared"')
        return Basis(value)

    def price_uatp(self, key: str) -> int:
        """A decimal of ATP as whole uATP, rounded up: the only rounding of money."""
        text = str(self._take(key, str, 'a decimal in quotes, like "6.59": binary floats round'))
        try:
            price = Decimal(text)
        except InvalidOperation:
            price = Decimal("NaN")
        if not price.is_finite() or not 0 < price <= _MAX_PRICE_ATP:
            self.fail(key, f"{text!r} is not a decimal above 0 and at most {_MAX_PRICE_ATP}")
        # The context's own rounding of long decimals has to go up, too.
        with localcontext(rounding=ROUND_CEILING):
            return int((price * UATP_PER_ATP).to_integral_value())

    def _take(self, key: str, kind: type, wanted: str) -> Any:  # noqa: ANN401 - TOML's values
        self._taken.add(key)
        if key not in self._values:
            self.fail(key, "is missing")
        value = self._values[key]
        if not isinstance(value, kind):
            self.fail(key, f"must be {wanted}")
        return value
