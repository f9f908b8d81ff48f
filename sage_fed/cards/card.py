"""Rate cards: where they are found, how a file becomes one, how one becomes a file.

Owns the format: strict TOML, read whole or refused. Prices become whole uATP when a card is
read; everything after that is integer arithmetic (`charges`).
Fails with `ConfigError` naming the file and the key.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sage_fed.cards.fingerprint import Fingerprint, read_fingerprint
from sage_fed.cards.measured import Measured, read_measured
from sage_fed.cards.reading import Reader
from sage_fed.core import TIER_ROLES, Phase, Tier
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import open_trusted, os_error

DEFAULT_CARD = "thor-fp16-2025-11-05"
BUNDLED_CARDS = Path(__file__).parent.parent / "cards"
_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_CARD_BYTES = 2**20
"""Many times any card; what is larger is another file."""


MAX_SPREAD = 0.5
"""A relative spread above which a price is no figure: the quartiles of its rounds lie more than a
factor of three apart (from half to one and a half of the median), so the machine's other work was
timed, not the engine's."""


class Basis(enum.Enum):
    """Whether a price was measured on the card's device or set by its author."""

    MEASURED = "measured"
    DECLARED = "declared"


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one token of a tier and phase, and where it comes from.

    `spread` is that of the device time behind a measured price, relative to it; None where it is
    not known.
    """

    uatp: int
    basis: Basis
    source: str
    spread: float | None = None


@dataclass(frozen=True, slots=True)
class RateCard:
    """One version of the prices; immutable, and frozen for a job at its admission.

    A card that a calibration wrote knows what it was measured on, and how.
    """

    version: str
    title: str
    created: dt.date
    device: str
    software: str
    provenance: str
    lines: Mapping[Tier, Mapping[Phase, Rate]]
    fingerprint: Fingerprint | None = None
    measured: Measured | None = None

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

    def doubts(self) -> str:
        """Return which measured prices are no figures (`MAX_SPREAD`), in words; "" for none."""
        spreads = [
            (f"{tier.name} {phase.value}", rate.spread)
            for tier, rates in self.lines.items()
            for phase, rate in rates.items()
            # A drafted token's price is the decoded one's.
            if rate.basis is Basis.MEASURED and phase is not Phase.DRAFT
        ]
        if self.measured is not None:
            spreads.append(("the ratio", self.measured.spread))
        return ", ".join(
            f"{name} ±{spread:.0%}"
            for name, spread in spreads
            if spread is not None and spread > MAX_SPREAD
        )

    def cost_ratio(self, phase: Phase = Phase.DECODE) -> float:
        """Strategic over tactical price of a token of this phase."""
        strategic, tactical = self.lines[Tier.STRATEGIC][phase], self.lines[Tier.TACTICAL][phase]
        return strategic.uatp / tactical.uatp


def available_cards(directory: Path | None = None) -> tuple[str, ...]:
    """The versions that `RateCard.load` finds by name."""
    folders = (BUNDLED_CARDS, directory) if directory else (BUNDLED_CARDS,)
    return tuple(sorted({path.stem for folder in folders for path in folder.glob("*.toml")}))


def own_cards(directory: Path) -> tuple[tuple[RateCard, ...], tuple[ConfigError, ...]]:
    """Read the operator's own cards; those that cannot be read come back as their errors."""
    cards: list[RateCard] = []
    errors: list[ConfigError] = []
    for path in sorted(directory.glob("*.toml")):
        try:
            cards.append(RateCard.load(path.stem, directory))
        except ConfigError as error:
            errors.append(error)
    return tuple(cards), tuple(errors)


def is_version(name: str) -> bool:
    """Whether a name may be a card's version, and so can be no path."""
    return _VERSION.fullmatch(name) is not None


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


def _read(path: Path) -> str:
    """Return a card's text; it says what everything costs, so nobody else may have written it."""
    if path.parent == BUNDLED_CARDS:
        return path.read_text(encoding="utf-8")
    with open_trusted("rate_card", path) as file:
        text = file.read(_MAX_CARD_BYTES + 1)
    if len(text) > _MAX_CARD_BYTES:
        raise ConfigError(f"rate_card: {path}: more than {_MAX_CARD_BYTES} bytes are no card")
    return text.decode()


def _parse(path: Path) -> RateCard:
    try:
        table = tomllib.loads(_read(path))
    except OSError as error:
        raise os_error(f"rate_card: {path}: not a readable rate card", error) from error
    except (ValueError, RecursionError) as error:
        # ValueError: broken TOML or UTF-8, and an integer of more digits than Python reads.
        raise ConfigError(f"rate_card: {path}: not a readable rate card: {error}") from error
    reader = Reader(path, "", table)
    card = RateCard(
        version=reader.text("version"),
        title=reader.text("title"),
        created=reader.date("created"),
        device=reader.text("device"),
        software=reader.text("software"),
        provenance=reader.text("provenance"),
        lines=MappingProxyType({tier: _rates(reader.table(tier.name)) for tier in TIER_ROLES}),
        fingerprint=(
            read_fingerprint(reader.table("fingerprint")) if reader.has("fingerprint") else None
        ),
        measured=read_measured(reader.table("measured")) if reader.has("measured") else None,
    )
    reader.finish()
    if card.version != path.stem or not _VERSION.fullmatch(card.version):
        reader.fail("version", f"must be the file's name, {path.stem}, in a-z 0-9 . _ -")
    return card


def _rates(reader: Reader) -> Mapping[Phase, Rate]:
    rates = {phase: _rate(reader.table(phase.value)) for phase in Phase}
    reader.finish()
    # Else a cached prompt could cost more than the hold, which is made for an uncached one.
    if rates[Phase.CACHED].uatp > rates[Phase.PREFILL].uatp:
        reader.fail("cached.price_atp", "must not be above prefill.price_atp")
    return MappingProxyType(rates)


def _rate(reader: Reader) -> Rate:
    rate = Rate(
        uatp=reader.price_uatp("price_atp"),
        basis=reader.word("basis", Basis),
        source=reader.text("source"),
        spread=reader.number("spread") if reader.has("spread") else None,
    )
    reader.finish()
    return rate
