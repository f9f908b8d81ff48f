"""Quality cards: from an answer's own log-probabilities to the probability that it is wrong.

Owns the features of an answer, the card that maps them by task class to P(wrong), and the strict
TOML files that cards live in (folder `quality` beside the rate cards). A card is measured
(`sage_fed.calibrate.quality`) on the models, precision, temperature, adapter and grammar of its
`fingerprint`, and says how well it tells wrong answers from right ones. Everything here is pure
arithmetic; no card makes an answer better.
Knows neither jobs nor routes. Fails with `ConfigError` naming the file and the key.
"""

from __future__ import annotations

import bisect
import datetime as dt
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NoReturn

import tomlkit
from pydantic import (
    AfterValidator,
    AwareDatetime,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)

from sage_fed.cards.rate_card import (
    BUNDLED_CARDS,
    ByTier,
    Count,
    Number,
    Positive,
    Text,
    as_toml,
    complaint,
    is_version,
    or_else,
)
from sage_fed.core import TIER_ROLES, Logprob, ModelInfo, ModelStatus, Tier
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import open_trusted, os_error

QUALITY_FOLDER = "quality"
"""Its name in the folder of the rate cards, the operator's and the bundled ones."""

ANY_CLASS = "any"
"""The class of tasks whose job names none; every card has it, measured on all tasks."""

TOP_LOGPROBS = 2
"""The alternatives a job has to ask for, so that every token's margin is known."""

LOW_QUANTILE = 0.1
"""The share of an answer's tokens that are at most as probable as its `low_logprob`."""

_MAX_CARD_BYTES = 2**20
"""Many times any card; what is larger is another file."""

_TASK_CLASS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_task_class(name: str) -> bool:
    """Return whether a name may be a task class."""
    return _TASK_CLASS.fullmatch(name) is not None


# An answer


@dataclass(frozen=True, slots=True)
class AnswerFeatures:
    """What an answer's own log-probabilities look like; natural logarithms, higher is surer.

    `least_margin` is the least of its tokens' distances to the best other token (negative where
    a drawn token was not the best), `least_logprob` that of its least probable token,
    `low_logprob` the `LOW_QUANTILE` of its tokens'. All are 0 for an answer without a token.
    """

    num_tokens: int
    least_margin: float
    least_logprob: float
    low_logprob: float
    mean_logprob: float
    total_logprob: float

    @classmethod
    def of(cls, logprobs: Iterable[Logprob]) -> AnswerFeatures:
        """Return the features of a whole answer, generated with `TOP_LOGPROBS` alternatives."""
        collector = FeatureCollector()
        for logprob in logprobs:
            collector.add(logprob)
        return collector.features()


class FeatureCollector:
    """An answer's features while it is generated; a few microseconds a token."""

    def __init__(self) -> None:
        self._ascending: list[float] = []
        self._least_margin = math.inf

    def add(self, logprob: Logprob) -> None:
        """Take the answer's next token."""
        others = [value for token_id, value in logprob.top if token_id != logprob.token_id]
        assert others, f"each token comes with its {TOP_LOGPROBS} best"
        self._least_margin = min(self._least_margin, logprob.logprob - max(others))
        bisect.insort(self._ascending, logprob.logprob)

    def features(self) -> AnswerFeatures:
        """Return the features of the tokens so far."""
        values = self._ascending
        if not values:
            return AnswerFeatures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        # Exact, so that the order in which a sum is taken is nothing that a card depends on.
        total = math.fsum(values)
        return AnswerFeatures(
            num_tokens=len(values),
            least_margin=self._least_margin,
            least_logprob=values[0],
            low_logprob=values[int(LOW_QUANTILE * (len(values) - 1))],
            mean_logprob=total / len(values),
            total_logprob=total,
        )


FEATURES = tuple(field.name for field in fields(AnswerFeatures))


# A card


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError
    return value


Finite = Annotated[float, Strict(), Field(allow_inf_nan=False), or_else("must be a finite number")]
Share = Annotated[float, Strict(), AfterValidator(_share), or_else("must be a number from 0 to 1")]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    value: Share
    low: Share
    high: Share


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model, as far as it decides what is answered."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: Text
    revision: Annotated[str, Strict()]
    architecture: Text
    parameters: Positive
    precision: Text


@dataclass(frozen=True, slots=True)
class QualityFingerprint:
    """What a card's figures belong to: the models and how they were asked.

    Device, kernels and engine change an answer only at near-ties, so they do not count.
    `temperature` 0 is greedy; an empty `adapter` or `grammar` is none.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    models: ByTier[ModelName]
    temperature: Number = 0.0
    adapter: Annotated[str, Strict()] = ""
    grammar: Annotated[str, Strict()] = ""

    @classmethod
    def of(
        cls,
        models: Mapping[Tier, ModelInfo] | Mapping[Tier, ModelStatus],
        *,
        temperature: float = 0.0,
        adapter: str = "",
        grammar: str = "",
    ) -> QualityFingerprint:
        """Return the fingerprint of these loaded models, asked so."""
        keys = [field.name for field in fields(ModelName)]
        names = {
            tier: ModelName(*(getattr(models[tier], key) for key in keys))
            for tier in sorted(models)
        }
        return cls(MappingProxyType(names), float(temperature), adapter, grammar)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same for the same fields on any machine."""
        text = json.dumps(as_toml(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, models: Mapping[Tier, ModelInfo]) -> tuple[str, ...]:
        """Return what is not the card's: `tactical.precision is fp32, the card's is bf16`."""
        mine, theirs = self._flat(), QualityFingerprint.of(models)._flat()  # noqa: SLF001 - its own
        return tuple(
            f"{key} is {theirs.get(key, 'absent')}, the card's is {mine.get(key, 'absent')}"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        )

    def _flat(self) -> dict[str, object]:
        return {
            f"{tier.name}.{key}": value or "none"
            for tier, model in self.models.items()
            for key, value in asdict(model).items()
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """How well a class's map told wrong answers from right ones, on answers it was not fitted to.

    By cross-validation in `folds`. `auroc` is the probability that a wrong answer looks more
    doubtful than a right one; `calibration_error` the mean distance between P(wrong) and the
    share that was wrong, over bins of equal counts; `brier` the mean squared error of P(wrong),
    `base_brier` that of the class's share of wrong answers.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    folds: Positive
    auroc: Estimate
    calibration_error: Estimate
    brier: Estimate
    base_brier: Share


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """How many tokens a tier's prompts have, and its answers by the score of the lowest's; means.

    What an answer costs is these by the rate card in force: a card of quality has no prices.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    prompt: Number
    output: tuple[Number, ...]


@dataclass(frozen=True, slots=True)
class TaskClass:
    """The map of one class of tasks: a score of the features, and P(wrong) by score.

    `weights` make the score, by feature; more is surer. Between the `scores`, in ascending order,
    P(wrong) of the lowest tier's answer (`p_wrong`) and of the deepest tier's in its place
    (`p_wrong_deepest`) are interpolated; outside they stand still. `counts` are the tasks that
    each score was fitted to, `errors` the tiers' shares of wrong answers, `tokens` how long prompts
    and answers were.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    num_tasks: Positive
    weights: Annotated[Mapping[str, Finite], AfterValidator(MappingProxyType)]
    scores: tuple[Finite, ...]
    p_wrong: tuple[Share, ...]
    p_wrong_deepest: tuple[Share, ...]
    counts: tuple[Positive, ...]
    errors: ByTier[Estimate]
    tokens: ByTier[AnswerTokens]
    evidence: Evidence

    def escalated(self, max_error: float) -> tuple[bool, ...]:
        """Return for each score whether an answer there is escalated, as `escalates` says."""
        pairs = zip(self.p_wrong, self.p_wrong_deepest, strict=True)
        return tuple(first > max_error and second < first for first, second in pairs)

    def mean_output(self, tier: Tier, chosen: Sequence[bool] | None = None) -> float:
        """Return a tier's output tokens a task; only answers at the chosen scores count."""
        output = self.tokens[tier].output
        used = chosen or (True,) * len(output)
        parts = zip(self.counts, output, used, strict=True)
        return math.fsum(count * mean for count, mean, one in parts if one) / sum(self.counts)

    def score(self, features: AnswerFeatures) -> float:
        """Return how sure the answer looks."""
        return math.fsum(weight * getattr(features, key) for key, weight in self.weights.items())

    def read(self, p_wrong: Sequence[float], features: AnswerFeatures) -> float:
        """Return P(wrong) by one of the maps; an answer without a token is the least sure."""
        if features.num_tokens == 0:
            return p_wrong[0]
        score = self.score(features)
        above = bisect.bisect_right(self.scores, score)
        if above == 0:
            return p_wrong[0]
        if above == len(self.scores):
            return p_wrong[-1]
        low, high = self.scores[above - 1], self.scores[above]
        part = (score - low) / (high - low)
        first, second = p_wrong[above - 1], p_wrong[above]
        # Held between both ends: roundings must not break the order.
        value = first + part * (second - first)
        return min(max(value, second), first)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a cascade is expected to do: the share that it escalates, and of wrong answers."""

    escalated: float
    error: float


@dataclass(frozen=True, slots=True)
class Measured:
    """When, on which tasks and by what a card was measured."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    at: Annotated[AwareDatetime, Strict()]
    software: Text
    tasks_sha256: Text
    num_tasks: Positive
    num_held_out: Count = 0


@dataclass(frozen=True, slots=True)
class QualityCard:
    """One version of what is known about a pair's answers; immutable."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    version: Text
    title: Text
    created: Annotated[dt.date, Strict(), or_else("must be a date")]
    provenance: Text
    fingerprint: QualityFingerprint
    measured: Measured
    classes: Annotated[Mapping[str, TaskClass], AfterValidator(MappingProxyType)]

    @classmethod
    def load(
        cls, name: str | Path, directory: Path | None = None, tiers: Sequence[Tier] = TIER_ROLES
    ) -> QualityCard:
        """Read a card by its version, or by the path of its file; blocks.

        `directory` is that of the operator's own rate cards. Raises `ConfigError`.
        """
        return _parse(_find(name, directory), tiers)

    def p_wrong(self, task_class: str, features: AnswerFeatures) -> float:
        """Return the probability that an answer of the lowest tier is wrong."""
        known = self.of_class(task_class)
        return known.read(known.p_wrong, features)

    def p_wrong_escalated(self, task_class: str, features: AnswerFeatures) -> float:
        """Return the same of the deepest tier's answer, should it replace this one."""
        known = self.of_class(task_class)
        return known.read(known.p_wrong_deepest, features)

    def escalates(self, task_class: str, features: AnswerFeatures, max_error: float) -> bool:
        """Return whether an answer is too doubtful, and the deepest tier's is expected better."""
        doubt = self.p_wrong(task_class, features)
        return doubt > max_error and self.p_wrong_escalated(task_class, features) < doubt

    def expected_error(self, tier: Tier, task_class: str = ANY_CLASS) -> float:
        """Return the share of a tier's answers that are expected to be wrong."""
        return self.of_class(task_class).errors[tier].value

    def cascade(self, task_class: str, max_error: float) -> Outlook:
        """Return what escalating by `escalates` is expected to do to the class's tasks."""
        known = self.of_class(task_class)
        escalates = known.escalated(max_error)
        errors = [
            count * (second if again else first)
            for count, first, second, again in zip(
                known.counts, known.p_wrong, known.p_wrong_deepest, escalates, strict=True
            )
        ]
        total = sum(known.counts)
        num_escalated = sum(
            count for count, again in zip(known.counts, escalates, strict=True) if again
        )
        return Outlook(num_escalated / total, min(1.0, math.fsum(errors) / total))

    def of_class(self, task_class: str) -> TaskClass:
        """Return the class's map; that of all tasks where the card has none of its own."""
        return self.classes.get(task_class or ANY_CLASS) or self.classes[ANY_CLASS]

    def covers(self, temperature: float, adapter: str = "", grammar: str = "") -> bool:
        """Return whether a job that samples so is like those that were measured."""
        mine = self.fingerprint
        return (mine.temperature, mine.adapter, mine.grammar) == (temperature, adapter, grammar)


# Files


def quality_cards(directory: Path | None = None) -> tuple[str, ...]:
    """Return the versions that `QualityCard.load` finds by name."""
    files = (path for folder in _folders(directory) for path in folder.glob("*.toml"))
    return tuple(sorted({path.stem for path in files}))


def readable_cards(
    directory: Path, tiers: Sequence[Tier] = TIER_ROLES
) -> tuple[tuple[QualityCard, ...], tuple[QualityCard, ...], tuple[ConfigError, ...]]:
    """Read the operator's own cards, the bundled ones, and the errors of those that cannot be."""
    found: tuple[list[QualityCard], ...] = ([], [])
    errors: list[ConfigError] = []
    for folder, cards in zip(_folders(directory), found, strict=True):
        for path in sorted(folder.glob("*.toml")):
            try:
                cards.append(QualityCard.load(path.stem, directory, tiers))
            except ConfigError as error:
                errors.append(error)
    own, bundled = found
    return tuple(own), tuple(bundled), tuple(errors)


def quality_card_text(card: QualityCard) -> str:
    """Return the TOML of a card, which `QualityCard.load` reads back as the same card."""
    table = as_toml(card)
    table["fingerprint"] = {"id": card.fingerprint.digest, **table["fingerprint"]}
    document = tomlkit.document()
    document.add(
        tomlkit.comment("A card is never edited: a change is a new file with a new version.")
    )
    document.update(table)
    return tomlkit.dumps(document)


def _folders(directory: Path | None) -> tuple[Path, ...]:
    parents = (BUNDLED_CARDS,) if directory is None else (directory, BUNDLED_CARDS)
    return tuple(parent / QUALITY_FOLDER for parent in parents)


def _find(name: str | Path, directory: Path | None) -> Path:
    if isinstance(name, Path) or "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
    else:
        if not is_version(name):
            raise ConfigError(f"quality_card: {name!r} is neither a card's version nor a path")
        paths = [folder / f"{name}.toml" for folder in _folders(directory)]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise ConfigError(f"{found[0]}: {name} is a bundled card's version; give it another")
        path = found[0] if found else paths[0]
    if not path.is_file():
        known = ", ".join(quality_cards(directory)) or "none"
        raise ConfigError(f"quality_card: there is no card {name}; there are {known}")
    return path


def _read(path: Path) -> str:
    """Return a card's text, which only the operator may have written: it decides who answers."""
    if path.parent == BUNDLED_CARDS / QUALITY_FOLDER:
        return path.read_text(encoding="utf-8")
    with open_trusted("quality_card", path) as file:
        text = file.read(_MAX_CARD_BYTES + 1)
    if len(text) > _MAX_CARD_BYTES:
        raise ConfigError(f"quality_card: {path}: more than {_MAX_CARD_BYTES} bytes are no card")
    return text.decode()


def _parse(path: Path, tiers: Sequence[Tier]) -> QualityCard:
    try:
        table = tomllib.loads(_read(path))
    except OSError as error:
        raise os_error(f"quality_card: {path}: not a readable quality card", error) from error
    except (ValueError, RecursionError) as error:
        # ValueError: broken TOML or UTF-8, and an integer of more digits than Python reads.
        raise ConfigError(f"quality_card: {path}: not a readable quality card: {error}") from error

    def refuse(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{path}: {key}: {message}")

    digest = None
    fingerprint: dict[str, Any] | object = table.get("fingerprint")
    if isinstance(fingerprint, dict):
        digest = fingerprint.pop("id", None)
        if "models" in fingerprint:
            refuse("fingerprint.models", "unknown key")
        models = {t.name: fingerprint.pop(t.name) for t in tiers if t.name in fingerprint}
        fingerprint["models"] = models
    try:
        card = TypeAdapter(QualityCard).validate_python(table, context=tiers)
    except ValidationError as error:
        refuse(*complaint(error))
    if card.version != path.stem or not is_version(card.version):
        refuse("version", f"must be the file's name, {path.stem}, in a-z 0-9 . _ -")
    if digest != card.fingerprint.digest:
        expected = card.fingerprint.digest
        refuse("fingerprint.id", f"must be {expected}, which is what the other keys give")
    if ANY_CLASS not in card.classes:
        refuse(f"classes.{ANY_CLASS}", "is missing")
    for name, known in card.classes.items():
        if not is_task_class(name):
            refuse(f"classes.{name}", "must be a name in a-z 0-9 . _ -")
        for key, message in _faults(known):
            refuse(f"classes.{name}.{key}", message)
    return card


def _faults(known: TaskClass) -> Iterable[tuple[str, str]]:
    """Yield what of a class is wrong, by key."""
    if not known.weights or not known.weights.keys() <= set(FEATURES):
        yield "weights", f"must be of {', '.join(FEATURES)}"
    if not known.scores:
        yield "scores", "must not be empty"
    if any(a >= b for a, b in pairwise(known.scores)):
        yield "scores", "must ascend"
    for key in ("p_wrong", "p_wrong_deepest", "counts"):
        if len(getattr(known, key)) != len(known.scores):
            yield key, "must be as many as the scores"
    for key in ("p_wrong", "p_wrong_deepest"):
        if any(a < b for a, b in pairwise(getattr(known, key))):
            yield key, "must not rise: a surer answer is not wrong more often"
    for tier, tokens in known.tokens.items():
        if len(tokens.output) != len(known.scores):
            yield f"tokens.{tier.name}.output", "must be as many as the scores"
    if sum(known.counts) != known.num_tasks:
        yield "counts", f"must add up to num_tasks, {known.num_tasks}"
