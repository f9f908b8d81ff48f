"""Rate cards: where they are found, how a file becomes one, how one becomes a file.

Owns the format: strict TOML, read whole or refused. Prices become whole uATP when a card is
read; everything after that is integer arithmetic (`charges`).
Fails with `ConfigError` naming the file and the key.

From token counts to exact integer prices: what a job would ask for, and what it did cost.

What a measured price belongs to: the device, the engine and the two models that were loaded.

A price measured on one is no price on another, so a card carries the fingerprint of what it was
measured on, and the daemon compares it with what it has loaded. Only what changes the speed
counts: not the models' names, not the sizes of pools and queues.

A card's `[measured]`: when, under which conditions, and every point that was timed.

Evidence for the prices, not prices: nothing is charged from it.

Typed values out of a card's tables; every complaint names the file and the key.

Knows TOML's types and money's one rounding, not what a card consists of. Fails with `ConfigError`.

A rate card as the text of its file: what `RateCard.load` reads back as the same card.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_CEILING, Decimal, localcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    MeasuredPoint,
    ModelInfo,
    Offer,
    Phase,
    Tier,
    Usage,
)
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


@dataclass(frozen=True, slots=True)
class ModelPrint:
    """A model's shape, as far as it decides what a step costs, and whose code computes it."""

    architecture: str
    parameters: int
    step_bytes: int
    kv_token_bytes: int
    precision: str
    kernels: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`threads` are those of one forward pass on the CPU, 0 on a GPU; `engine` is our version."""

    device: str
    threads: int
    engine: str
    models: Mapping[Tier, ModelPrint]

    @classmethod
    def of(
        cls, device: str, threads: int, engine: str, models: Mapping[Tier, ModelInfo]
    ) -> Fingerprint:
        """Return the fingerprint of what is loaded."""
        return cls(
            device=" ".join(device.split()),
            threads=threads,
            engine=engine,
            models=MappingProxyType(
                {
                    tier: ModelPrint(
                        *(getattr(models[tier], field.name) for field in fields(ModelPrint))
                    )
                    for tier in TIER_ROLES
                }
            ),
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same for the same fields on any machine."""
        text = json.dumps(self._plain(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """What is not the same, in words: `tactical.precision is fp32 here, bf16 there`."""
        mine, theirs = _flat(self._plain()), _flat(other._plain())
        return tuple(
            f"{key} is {theirs[key]}, the card's is {mine[key]}"
            for key in mine
            if mine[key] != theirs[key]
        )

    def _plain(self) -> dict[str, object]:
        return {
            "device": self.device,
            "threads": self.threads,
            "engine": self.engine,
            **{tier.name: asdict(self.models[tier]) for tier in TIER_ROLES},
        }


def read_fingerprint(reader: Reader) -> Fingerprint:
    """Read a card's `[fingerprint]`; its `id` has to be that of its fields."""
    fingerprint = Fingerprint(
        device=reader.text("device"),
        threads=reader.count("threads"),
        engine=reader.text("engine"),
        models=MappingProxyType({tier: _model(reader.table(tier.name)) for tier in TIER_ROLES}),
    )
    if reader.text("id") != fingerprint.digest:
        reader.fail("id", f"must be {fingerprint.digest}, which is what the other keys give")
    reader.finish()
    return fingerprint


def _model(reader: Reader) -> ModelPrint:
    model = ModelPrint(
        architecture=reader.text("architecture"),
        parameters=reader.count("parameters", 1),
        step_bytes=reader.count("step_bytes", 1),
        kv_token_bytes=reader.count("kv_token_bytes", 1),
        precision=reader.text("precision"),
        kernels=reader.text("kernels"),
    )
    reader.finish()
    return model


def _flat(plain: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True, slots=True)
class Measured:
    """`cost_ratio` is the median over `rounds` paired rounds, `spread` their relative one.

    `spread` is half of the interquartile range over the median; `error` is the standard error
    of the median, relative to it. `token_s` are the device seconds that 1 ATP stands for.
    `conditions` are readings by name, as many as this machine gave. `warning` says which prices
    rest on too few or too uneven rounds, "" where none does.
    """

    at: dt.datetime
    took_s: float
    token_s: float
    cost_ratio: float
    spread: float
    error: float
    rounds: int
    read_bandwidth_bytes_per_s: float
    load_s: Mapping[Tier, float]
    conditions: Mapping[str, str]
    points: tuple[MeasuredPoint, ...]
    warning: str = ""


def read_measured(reader: Reader) -> Measured:
    """Read the table."""
    loads = reader.table("load_s")
    measured = Measured(
        at=reader.instant("at"),
        took_s=reader.number("took_s"),
        token_s=reader.number("token_s"),
        cost_ratio=reader.number("cost_ratio"),
        spread=reader.number("spread"),
        error=reader.number("error"),
        rounds=reader.count("rounds", 1),
        read_bandwidth_bytes_per_s=reader.number("read_bandwidth_bytes_per_s"),
        load_s=MappingProxyType({tier: loads.number(tier.name) for tier in TIER_ROLES}),
        conditions=MappingProxyType(reader.table("conditions").texts()),
        points=tuple(_read_point(point) for point in reader.tables("points")),
        warning=reader.text("warning") if reader.has("warning") else "",
    )
    loads.finish()
    reader.finish()
    return measured


def _read_point(reader: Reader) -> MeasuredPoint:
    rounds = reader.count("rounds", 1)
    spread = reader.number("spread") if rounds > 1 or reader.has("spread") else None
    point = MeasuredPoint(
        tier=Tier.named(reader.choice("tier", [tier.name for tier in TIER_ROLES])),
        phase=reader.word("phase", Phase),
        batch=reader.count("batch", 1),
        context_tokens=reader.count("context_tokens"),
        tokens=reader.count("tokens", 1),
        step_s=reader.number("step_s"),
        # Cards of earlier versions say 0 where there was one round.
        spread=spread if rounds > 1 else None,
        rounds=rounds,
        co_resident_s=reader.number("co_resident_s") if reader.has("co_resident_s") else None,
    )
    reader.finish()
    return point


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


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def card_text(card: RateCard) -> str:
    """Return the TOML of a card."""
    lines = [
        "# A card is never edited: a change is a new file with a new version.",
        *_pairs(
            version=card.version,
            title=card.title,
            created=card.created,
            device=card.device,
            software=card.software,
            provenance=card.provenance,
        ),
    ]
    for tier in TIER_ROLES:
        for phase in Phase:
            rate = card.lines[tier][phase]
            lines += _table(
                f"{tier.name}.{phase.value}",
                price_atp=f"{Decimal(rate.uatp) / UATP_PER_ATP:f}",
                basis=rate.basis.value,
                source=rate.source,
                **({} if rate.spread is None else {"spread": rate.spread}),
            )
    if card.fingerprint is not None:
        lines += _fingerprint(card.fingerprint)
    if card.measured is not None:
        lines += _measured(card.measured)
    return "\n".join(lines) + "\n"


def _fingerprint(fingerprint: Fingerprint) -> list[str]:
    lines = _table(
        "fingerprint",
        id=fingerprint.digest,
        device=fingerprint.device,
        threads=fingerprint.threads,
        engine=fingerprint.engine,
    )
    for tier in TIER_ROLES:
        model = fingerprint.models[tier]
        lines += _table(
            f"fingerprint.{tier.name}",
            architecture=model.architecture,
            parameters=model.parameters,
            step_bytes=model.step_bytes,
            kv_token_bytes=model.kv_token_bytes,
            precision=model.precision,
            kernels=model.kernels,
        )
    return lines


def _measured(measured: Measured) -> list[str]:
    lines = _table(
        "measured",
        at=measured.at,
        took_s=measured.took_s,
        token_s=measured.token_s,
        cost_ratio=measured.cost_ratio,
        spread=measured.spread,
        error=measured.error,
        rounds=measured.rounds,
        read_bandwidth_bytes_per_s=measured.read_bandwidth_bytes_per_s,
        **({"warning": measured.warning} if measured.warning else {}),
    )
    lines += _table(
        "measured.load_s", **{tier.name: seconds for tier, seconds in measured.load_s.items()}
    )
    lines += _table("measured.conditions", **measured.conditions)
    for point in measured.points:
        lines += ["", "[[measured.points]]", *_pairs(**_point_values(point))]
    return lines


def _point_values(point: MeasuredPoint) -> dict[str, object]:
    return {
        "tier": point.tier.name,
        "phase": point.phase.value,
        "batch": point.batch,
        "context_tokens": point.context_tokens,
        "tokens": point.tokens,
        "step_s": point.step_s,
        **({} if point.spread is None else {"spread": point.spread}),
        "rounds": point.rounds,
        **({} if point.co_resident_s is None else {"co_resident_s": point.co_resident_s}),
    }


def _table(name: str, **values: object) -> list[str]:
    return ["", f"[{name}]", *_pairs(**values)]


def _pairs(**values: object) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in values.items()]


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _value(value: object) -> str:
    match value:
        case str():
            return _text(value)
        case dt.date():  # and a datetime, which is one
            return value.isoformat()
        case int() | float():
            return repr(value)
        case _:
            raise AssertionError(f"a card has no {type(value).__name__}")


def _text(text: str) -> str:
    # A TOML basic string takes JSON's escapes, but DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
