"""Rate cards: prices per token by tier and phase, and the strict TOML files that they live in.

Owns the format, read whole or refused, and the one place where money is rounded: a card's decimal
ATP become whole uATP per token, upwards, when it is read. Pricing is integer arithmetic after that.
A card that a calibration wrote says what it was measured on (`Fingerprint`) and how (`Measured`).
Knows neither accounts nor routes. Fails with `ConfigError` naming the file and the key.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from decimal import ROUND_CEILING, Decimal, localcontext
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

import tomlkit
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, core_schema

from sage_fed.core import (
    TIER_ROLES,
    UATP_PER_ATP,
    MeasuredPoint,
    ModelInfo,
    Offer,
    Phase,
    Program,
    Tier,
    Usage,
)
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import open_trusted, os_error

DEFAULT_CARD = "thor-fp16-2025-11-05"
BUNDLED_CARDS = Path(__file__).parent
MAX_SPREAD = 0.5
"""A relative spread above which a price is no figure: the quartiles of its rounds lie more than a
factor of three apart (from half to one and a half of the median), so the machine's other work was
timed, not the engine's."""

MAX_PRICE_ATP = 1_000_000
"""Above any real price; keeps every sum far inside the ledger's 64 bits."""

_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PRICE = re.compile(r"[0-9]{1,20}(\.[0-9]{1,60})?")
_NESTED = ("lines", "models")
"""Fields by tier whose keys stand in the table above them in the file."""

_MAX_CARD_BYTES = 2**20
"""Many times any card; what is larger is another file."""


# The values of a card's keys; a validator's context is the sequence of tiers to read.


def or_else(message: str) -> WrapValidator:
    """Refuse what does not validate with this text."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - TOML's
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("card", message) from None

    return WrapValidator(check)


def _price_uatp(text: object) -> int:
    """Return a decimal of ATP as whole uATP, rounded up: the only rounding of money."""
    if not isinstance(text, str):
        raise PydanticCustomError(
            "card", 'must be a decimal in quotes, like "6.59": binary floats round'
        )
    # Decimal alone would also take other scripts' digits, underscores and exponents.
    price = Decimal(text) if _PRICE.fullmatch(text) else Decimal(0)
    if not 0 < price <= MAX_PRICE_ATP:
        raise PydanticCustomError(
            "card",
            "{text} is not a decimal above 0 and at most {most}",
            {"text": repr(text), "most": MAX_PRICE_ATP},
        )
    # The context's own rounding of long decimals has to go up, too.
    with localcontext(rounding=ROUND_CEILING):
        return int((price * UATP_PER_ATP).to_integral_value())


def _tier(name: str, info: ValidationInfo[Sequence[Tier]]) -> Tier:
    for tier in info.context:
        if tier.name == name:
            return tier
    known = " or ".join(f'"{tier.name}"' for tier in info.context)
    raise PydanticCustomError("card", "must be {known}", {"known": known})


def _all_of(table: object, names: Iterable[str]) -> object:
    """Refuse a table that lacks one of these keys."""
    for name in names:
        if isinstance(table, dict) and name not in table:
            raise PydanticCustomError("key", "is missing", {"key": name})
    return table


def _stripped(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("card", "must not be empty")
    return text.strip()


T = TypeVar("T")
Text = Annotated[str, Strict(), AfterValidator(_stripped)]
Count = Annotated[int, Strict(), Field(ge=0), or_else("must be a whole number of at least 0")]
Positive = Annotated[int, Strict(), Field(ge=1), or_else("must be a whole number of at least 1")]
Number = Annotated[
    float, Strict(), Field(ge=0, allow_inf_nan=False), or_else("must be a number of at least 0")
]
ByTier = Annotated[
    Mapping[Annotated[Tier, PlainValidator(_tier)], T],
    BeforeValidator(lambda table, info: _all_of(table, [tier.name for tier in info.context])),
    AfterValidator(MappingProxyType),
]
ByPhase = Annotated[
    Mapping[Phase, T],
    BeforeValidator(lambda table: _all_of(table, [phase.value for phase in Phase])),
    AfterValidator(MappingProxyType),
]


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

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    uatp: Annotated[int, BeforeValidator(_price_uatp), Field(alias="price_atp")]
    basis: Basis
    source: Text
    spread: Number | None = None


@dataclass(frozen=True, slots=True)
class ModelPrint:
    """A model's shape, as far as it decides what a step costs, and whose code computes it."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    architecture: Text
    parameters: Positive
    step_bytes: Positive
    kv_token_bytes: Positive
    precision: Text
    kernels: Text


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a measured price belongs to: the device, the engine and the models that were loaded.

    A price measured on one is no price on another. Only what changes the speed counts: not the
    models' names, not the sizes of pools and queues. `threads` are those of one forward pass on
    the CPU, 0 on a GPU; `engine` is our version.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    device: Text
    threads: Count
    engine: Text
    models: ByTier[ModelPrint]

    @classmethod
    def of(
        cls, device: str, threads: int, engine: str, models: Mapping[Tier, ModelInfo]
    ) -> Fingerprint:
        """Return the fingerprint of what is loaded."""
        keys = [field.name for field in fields(ModelPrint)]
        prints = {
            tier: ModelPrint(*(getattr(models[tier], key) for key in keys))
            for tier in sorted(models)
        }
        return cls(" ".join(device.split()), threads, engine, MappingProxyType(prints))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same for the same fields on any machine."""
        text = json.dumps(as_toml(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Return what is not the same: `tactical.precision is fp32, the card's is bf16`."""
        mine, theirs = self._flat(), other._flat()
        return tuple(
            f"{key} is {theirs.get(key, 'absent')}, the card's is {mine.get(key, 'absent')}"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        )

    def _flat(self) -> dict[str, object]:
        models = {
            f"{tier.name}.{key}": value
            for tier, model in self.models.items()
            for key, value in asdict(model).items()
        }
        return {"device": self.device, "threads": self.threads, "engine": self.engine, **models}


class _PointTable(BaseModel):
    """One of `[[measured.points]]`."""

    model_config = ConfigDict(extra="forbid")

    tier: Annotated[Tier, PlainValidator(_tier)]
    phase: Phase
    batch: Positive
    context_tokens: Count
    tokens: Positive
    step_s: Number
    spread: Number | None = None
    rounds: Positive
    co_resident_s: Number | None = None

    def point(self) -> MeasuredPoint:
        """Return it; cards of earlier versions say 0 for the spread of a single round."""
        point = MeasuredPoint(**dict(self))
        return point if self.rounds > 1 else replace(point, spread=None)


Point = Annotated[
    MeasuredPoint,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            _PointTable.point, handler(_PointTable)
        )
    ),
]


@dataclass(frozen=True, slots=True)
class Measured:
    """When and how a card was measured: evidence for its prices, from which nothing is charged.

    `cost_ratio` is the median over `rounds` paired rounds, `spread` half of their interquartile
    range over it, `error` its standard error relative to it. `token_s` are the device seconds
    that 1 ATP stands for. `conditions` are readings by name, as many as this machine gave.
    `warning` says which prices rest on too few or too uneven rounds, "" where none does.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    at: Annotated[AwareDatetime, Strict()]
    took_s: Number
    token_s: Number
    cost_ratio: Number
    spread: Number
    error: Number
    rounds: Positive
    read_bandwidth_bytes_per_s: Number
    load_s: ByTier[Number]
    conditions: Annotated[Mapping[str, Text], AfterValidator(MappingProxyType)]
    points: tuple[Point, ...]
    warning: Text = ""


@dataclass(frozen=True, slots=True)
class RateCard:
    """One version of the prices; immutable, and frozen for a job at its admission.

    A card that a calibration wrote knows what it was measured on, and how.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    version: Text
    title: Text
    created: Annotated[dt.date, Strict(), or_else("must be a date")]
    device: Text
    software: Text
    provenance: Text
    lines: ByTier[ByPhase[Rate]]
    fingerprint: Fingerprint | None = None
    measured: Measured | None = None

    @classmethod
    def load(
        cls,
        name: str | Path = DEFAULT_CARD,
        directory: Path | None = None,
        tiers: Sequence[Tier] = TIER_ROLES,
    ) -> RateCard:
        """Read a card by its version, or by the path of its file; blocks.

        A version is looked for in `directory` (the operator's own cards), then among the
        bundled ones. The card prices each of `tiers`. Raises `ConfigError`.
        """
        return _parse(_find(name, directory), tiers)

    @property
    def rates(self) -> Mapping[Tier, Mapping[Phase, int]]:
        """Prices in uATP per token, by tier and phase."""
        return {
            tier: {phase: rate.uatp for phase, rate in rates.items()}
            for tier, rates in self.lines.items()
        }

    def doubts(self) -> str:
        """Return which measured prices are no figures (`MAX_SPREAD`), in words; "" for none."""
        spreads = measured_spreads(self.lines)
        if self.measured is not None:
            spreads.append(("the ratio", self.measured.spread))
        return ", ".join(
            f"{name} ±{spread:.0%}"
            for name, spread in spreads
            if spread is not None and spread > MAX_SPREAD
        )

    def cost_ratio(self, phase: Phase = Phase.DECODE) -> float:
        """Return the deepest tier's price of a token of this phase over the lowest one's."""
        return self.lines[max(self.lines)][phase].uatp / self.lines[min(self.lines)][phase].uatp


def measured_spreads(
    lines: Mapping[Tier, Mapping[Phase, Rate]],
) -> list[tuple[str, float | None]]:
    """Return the measured prices' names and spreads; a drafted token's is the decoded one's."""
    return [
        (f"{tier.name} {phase.value}", rate.spread)
        for tier, rates in lines.items()
        for phase, rate in rates.items()
        if rate.basis is Basis.MEASURED and phase is not Phase.DRAFT
    ]


def quote(card: RateCard, tier: Tier, prompt_tokens: int, max_new_tokens: int) -> Offer:
    """Return what `tier` would ask for a job of this size, nothing of it being cached."""
    rates = card.lines[tier]
    return Offer(
        tier=tier,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        prompt_uatp=prompt_tokens * rates[Phase.PREFILL].uatp,
        decode_uatp=rates[Phase.DECODE].uatp,
    )


def quote_program(card: RateCard, program: Program) -> Offer:
    """Return what a job asks for if every stage of it runs; `Offer.tier` answers last."""
    *earlier, answer = (
        quote(card, stage.tier, len(stage.prompt), stage.max_new_tokens) for stage in program.stages
    )
    return replace(answer, earlier=tuple(earlier))


def charge(card: RateCard, usage: Usage) -> int:
    """Return the price in uATP of what was done; never above what its program asked for."""
    return sum(charge_by_tier(card, usage).values())


def charge_by_tier(card: RateCard, usage: Usage) -> dict[Tier, int]:
    """Return each tier's part of the price.

    What speculation did (drafts, their verification, and the verifying tier's own tokens) is that
    tier's, and costs at most what its tokens cost without it: drafts that fail beyond that are the
    house's loss.
    """
    parts: Counter[Tier] = Counter()
    drafted_uatp = 0
    speculated = any(done.phase in (Phase.VERIFY, Phase.DRAFT) for done in usage.by_phase)
    verifier = max((done.tier for done in usage.by_phase), default=None) if speculated else None
    for done in usage.by_phase:
        price_uatp = card.lines[done.tier][done.phase].uatp * done.tokens
        own = done.tier == verifier and done.phase in (Phase.VERIFY, Phase.DECODE)
        if own or done.phase is Phase.DRAFT:
            drafted_uatp += price_uatp
        else:
            parts[done.tier] += price_uatp
    if verifier is not None:
        parts[verifier] += min(drafted_uatp, single_uatp(card, usage, verifier))
    return dict(parts)


def single_uatp(card: RateCard, usage: Usage, tier: Tier) -> int:
    """Return what the output would have cost on a tier that makes every token by itself."""
    return usage.output_tokens * card.lines[tier][Phase.DECODE].uatp


def price_in_single(card: RateCard, usage: Usage, tier: Tier) -> int:
    """Return what the same prompt and output would have cost with every token made by `tier`."""
    rates = card.lines[tier]
    prompt_uatp = rates[Phase.PREFILL].uatp * (usage.prompt_tokens - usage.cached_tokens)
    cached_uatp = rates[Phase.CACHED].uatp * usage.cached_tokens
    return prompt_uatp + cached_uatp + single_uatp(card, usage, tier)


def available_cards(directory: Path | None = None) -> tuple[str, ...]:
    """Return the versions that `RateCard.load` finds by name."""
    folders = (BUNDLED_CARDS, directory) if directory else (BUNDLED_CARDS,)
    return tuple(sorted({path.stem for folder in folders for path in folder.glob("*.toml")}))


def own_cards(
    directory: Path, tiers: Sequence[Tier] = TIER_ROLES
) -> tuple[tuple[RateCard, ...], tuple[ConfigError, ...]]:
    """Read the operator's own cards; those that cannot be read come back as their errors."""
    cards: list[RateCard] = []
    errors: list[ConfigError] = []
    for path in sorted(directory.glob("*.toml")):
        try:
            cards.append(RateCard.load(path.stem, directory, tiers))
        except ConfigError as error:
            errors.append(error)
    return tuple(cards), tuple(errors)


def is_version(name: str) -> bool:
    """Return whether a name may be a card's version, and so can be no path."""
    return _VERSION.fullmatch(name) is not None


def _find(name: str | Path, directory: Path | None) -> Path:
    if isinstance(name, Path) or "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
    else:
        if not is_version(name):
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
    """Return a card's text, which only the operator may have written: it sets all prices."""
    if path.parent == BUNDLED_CARDS:
        return path.read_text(encoding="utf-8")
    with open_trusted("rate_card", path) as file:
        text = file.read(_MAX_CARD_BYTES + 1)
    if len(text) > _MAX_CARD_BYTES:
        raise ConfigError(f"rate_card: {path}: more than {_MAX_CARD_BYTES} bytes are no card")
    return text.decode()


def _parse(path: Path, tiers: Sequence[Tier]) -> RateCard:
    try:
        table = tomllib.loads(_read(path))
    except OSError as error:
        raise os_error(f"rate_card: {path}: not a readable rate card", error) from error
    except (ValueError, RecursionError) as error:
        # ValueError: broken TOML or UTF-8, and an integer of more digits than Python reads.
        raise ConfigError(f"rate_card: {path}: not a readable rate card: {error}") from error

    def refuse(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{path}: {key}: {message}")

    def nest(table: dict[str, Any], field: str) -> None:
        """Move the tiers' tables below a field of their own."""
        if field in table:
            refuse(field, "unknown key")
        table[field] = {t.name: table.pop(t.name) for t in tiers if t.name in table}

    nest(table, "lines")
    digest = None
    if isinstance(table.get("fingerprint"), dict):
        digest = table["fingerprint"].pop("id", None)
        nest(table["fingerprint"], "models")
    try:
        card = TypeAdapter(RateCard).validate_python(table, context=tiers)
    except ValidationError as error:
        refuse(*complaint(error))
    if card.version != path.stem or not is_version(card.version):
        refuse("version", f"must be the file's name, {path.stem}, in a-z 0-9 . _ -")
    for tier, rates in card.lines.items():
        # Else a cached prompt could cost more than the hold, which is made for an uncached one.
        if rates[Phase.CACHED].uatp > rates[Phase.PREFILL].uatp:
            refuse(f"{tier.name}.cached.price_atp", "must not be above prefill.price_atp")
    if card.fingerprint is not None and digest != card.fingerprint.digest:
        expected = card.fingerprint.digest
        refuse("fingerprint.id", f"must be {expected}, which is what the other keys give")
    return card


_MESSAGES = {
    "missing": "is missing",
    "unexpected_keyword_argument": "unknown key",
    "extra_forbidden": "unknown key",
    "string_type": "must be a text",
    "enum": "must be {expected}",
    "datetime_type": "must be a date and time",
    "timezone_aware": "must have an offset from UTC",
    "tuple_type": "must be an array of tables",
    "dict_type": "must be a table",
    "dataclass_type": "must be a table",
    "model_type": "must be an array of tables",
}


def complaint(error: ValidationError) -> tuple[str, str]:
    """Return the key that the first error is about, as the file has it, and what is wrong."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    place = [part for part in first["loc"] if part not in _NESTED]
    message = _MESSAGES.get(first["type"], first["msg"]).format_map(context)
    if first["type"] == "key":
        place.append(context["key"])
    if place[-1] == "[key]":
        place.pop()
        message = "unknown key"
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return key.removeprefix("."), message


def card_text(card: RateCard) -> str:
    """Return the TOML of a card, which `RateCard.load` reads back as the same card."""
    plain = as_toml(card)
    if card.fingerprint is not None:
        plain["fingerprint"] = {"id": card.fingerprint.digest, **plain["fingerprint"]}
    if card.measured is not None and not card.measured.warning:
        del plain["measured"]["warning"]
    document = tomlkit.document()
    document.add(
        tomlkit.comment("A card is never edited: a change is a new file with a new version.")
    )
    document.update(plain)
    return tomlkit.dumps(document)


def as_toml(value: Any) -> Any:  # noqa: ANN401 - any part of a card
    """Return a part of a card as TOML's types, under its file's keys, without what is None."""
    if isinstance(value, Tier):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {as_toml(key): as_toml(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [as_toml(item) for item in value]
    if not is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    for field in fields(value):
        item = as_toml(getattr(value, field.name))
        if field.name in _NESTED:
            plain |= item
        elif field.name == "uatp":
            plain["price_atp"] = f"{Decimal(item) / UATP_PER_ATP:f}"
        elif item is not None:
            plain[field.name] = item
    return plain
