"""From judged answers to a quality card: the fit, its evidence, and the report.

Owns the arithmetic: isotonic regression by pooling adjacent violators, the choice of a score by
cross-validation, AUROC, expected calibration error, Brier score, bootstrap intervals, accuracy
against cost. All randomness is of a fixed seed, so equal answers give equal cards.
Folds are by what is asked, so a question that is asked twice is never on both sides.
A card appears whole or not at all, and never in the place of another.
Does not know the daemon. Fails with `ConfigError` where the answers cannot carry a card.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sage_fed.calibrate.quality import Judged
from sage_fed.cards.quality_card import (
    ANY_CLASS,
    AnswerFeatures,
    AnswerTokens,
    Estimate,
    Evidence,
    Measured,
    QualityCard,
    QualityFingerprint,
    TaskClass,
    quality_card_text,
    quality_cards,
)
from sage_fed.core import UATP_PER_ATP, Tier
from sage_fed.errors import CannotWrite, ConfigError
from sage_fed.trusted_files import create_file

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

FOLDS = 5
MIN_TASKS = 100
"""Of a class; fewer tell nothing of a probability."""

MIN_OF_A_KIND = 10
"""Wrong and right answers of the lowest tier that a class needs, each."""

BINS = 10
"""Of equal counts, for reliability."""

SAMPLES = 1000
"""Of a bootstrap."""

SHARES = tuple(i / 10 for i in range(11))
"""Of tasks that are escalated, for the curve of accuracy against cost."""

_PRIOR_TASKS = 1.0
"""Tasks of the class's own share of wrong answers that are added to each block of the map: a
block of five right answers does not say that the sixth cannot be wrong."""

_DIGITS = 6
_SEED = 20261201
_RIDGE = 1e-3
_NEWTON_STEPS = 25

_FEATURES = tuple(field.name for field in fields(AnswerFeatures))
_SINGLE = ("least_margin", "least_logprob", "low_logprob", "mean_logprob", "total_logprob")
"""The scores that are tried alone; beside them, all features weighted (a logistic regression)."""

COMBINED = "all features"


# Measures


def auroc(doubt: Array, wrong: Flags) -> float:
    """Return the probability that a wrong answer has the greater doubt; ties count half.

    NaN where all are wrong or none is.
    """
    num_wrong = int(wrong.sum())
    num_right = len(wrong) - num_wrong
    if not num_wrong or not num_right:
        return math.nan
    _, inverse, counts = np.unique(doubt, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = float(ranks[wrong].sum()) - num_wrong * (num_wrong + 1) / 2
    return above / (num_wrong * num_right)


def brier(p_wrong: Array, wrong: Flags) -> float:
    """Return the mean squared error of the probabilities."""
    return float(np.mean((p_wrong - wrong) ** 2))


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of like P(wrong): how many, its mean, and the share that was wrong."""

    count: int
    p_wrong: float
    wrong: float


def reliability(p_wrong: Array, wrong: Flags, bins: int = BINS) -> tuple[Bin, ...]:
    """Return bins of equal counts (one more or less) in the order of P(wrong)."""
    order = np.argsort(p_wrong, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return tuple(
        Bin(len(part), float(p_wrong[part].mean()), float(wrong[part].mean())) for part in parts
    )


def calibration_error(p_wrong: Array, wrong: Flags, bins: int = BINS) -> float:
    """Return the expected calibration error: the bins' distances from the diagonal, weighted."""
    found = reliability(p_wrong, wrong, bins)
    return math.fsum(b.count * abs(b.p_wrong - b.wrong) for b in found) / len(p_wrong)


def interval(measure: Callable[[Indices], float], num_tasks: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of a measure over tasks drawn with replacement."""
    rng = np.random.default_rng(_SEED)
    drawn = np.array(
        [measure(rng.integers(0, num_tasks, num_tasks)) for _ in range(SAMPLES)], dtype=float
    )
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (math.nan, math.nan)
    return float(low), float(high)


def share_of(count: int, total: int) -> Estimate:
    """Return a share with its Wilson interval, which stays inside [0, 1]."""
    z = 1.959963984540054
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half /= 1 + z * z / total
    return _estimate(share, centre - half, centre + half)


def _estimate(value: float, low: float, high: float) -> Estimate:
    def bounded(x: float) -> float:
        return round(min(1.0, max(0.0, x)), _DIGITS)

    # A percentile interval may miss its own figure by a hair.
    return Estimate(bounded(value), bounded(min(low, value)), bounded(max(high, value)))


# The map


@dataclass(frozen=True, slots=True)
class Blocks:
    """An isotonic map: scores in ascending order, the value at each, and its weight."""

    scores: Array
    values: Array
    counts: Array

    def at(self, scores: Array) -> Array:
        """Return the values there, interpolated, and beyond both ends those of the ends."""
        return np.asarray(np.interp(scores, self.scores, self.values), dtype=float)


def pool_adjacent_violators(values: Array, weights: Array) -> list[slice]:
    """Return the blocks whose means are the nearest sequence that does not rise (least squares)."""
    blocks: list[tuple[float, float, int]] = []  # weighted sum, weight, begin
    for at, (value, weight) in enumerate(zip(values, weights, strict=True)):
        total, mass, begin = float(value * weight), float(weight), at
        while blocks and blocks[-1][0] / blocks[-1][1] <= total / mass:
            before, before_mass, begin = blocks.pop()
            total, mass = total + before, mass + before_mass
        blocks.append((total, mass, begin))
    ends = [begin for _, _, begin in blocks[1:]] + [len(values)]
    return [slice(block[2], end) for block, end in zip(blocks, ends, strict=True)]


def fit_map(scores: Array, wrong: Flags) -> Blocks:
    """Return the isotonic map from score to P(wrong), which does not rise.

    Blocks are shrunk a little to the share of all (`_PRIOR_TASKS`), so none says 0 or 1.
    """
    rounded = np.round(scores, _DIGITS)
    points, inverse = np.unique(rounded, return_inverse=True)
    counts = np.bincount(inverse).astype(float)
    sums = np.bincount(inverse, weights=wrong.astype(float))
    blocks = Blocks(points, sums / counts, counts)
    blocks = _pooled(blocks, pool_adjacent_violators(blocks.values, counts))
    base = float(wrong.mean())
    shrunk = (blocks.values * blocks.counts + base * _PRIOR_TASKS) / (blocks.counts + _PRIOR_TASKS)
    # A short block moves further than a long one, perhaps past its neighbour.
    blocks = Blocks(blocks.scores, shrunk, blocks.counts)
    return _pooled(blocks, pool_adjacent_violators(shrunk, blocks.counts))


def _pooled(blocks: Blocks, slices: Sequence[slice]) -> Blocks:
    mass = np.array([blocks.counts[part].sum() for part in slices])

    def mean(values: Array) -> Array:
        sums = [float((values[part] * blocks.counts[part]).sum()) for part in slices]
        return np.asarray(np.array(sums) / mass, dtype=float)

    return Blocks(mean(blocks.scores), mean(blocks.values), mass)


# The score


def features_of(judged: Sequence[Judged], tier: str) -> Array:
    """Return a row of features for each task, in the order of `AnswerFeatures`."""
    rows = [[getattr(j.answers[tier].features, key) for key in _FEATURES] for j in judged]
    return np.array(rows, dtype=float)


def _weights_of(name: str, features: Array, wrong: Flags) -> Array:
    """Return the weights of a score by its name, fitted where it has any."""
    if name != COMBINED:
        return np.array([float(key == name) for key in _FEATURES])
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    rows = np.column_stack([(features - centre) / scale, np.ones(len(features))])
    right = (~wrong).astype(float)
    found = np.zeros(rows.shape[1])
    penalty = np.full(rows.shape[1], _RIDGE * len(rows))
    penalty[-1] = 0.0
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(rows @ found, -30, 30)))
        gradient = rows.T @ (right - p) - penalty * found
        curvature = (rows * (p * (1 - p))[:, None]).T @ rows + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        found += step
        if float(np.abs(step).max()) < 1e-8:
            break
    return np.array(found[:-1] / scale, dtype=float)


def folds_of(judged: Sequence[Judged], folds: int = FOLDS) -> Indices:
    """Return every task's fold, by what is asked."""
    return np.array([int(j.task.key, 16) % folds for j in judged], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Sample:
    """A class's answers of the lowest tier as arrays; row i is task i."""

    features: Array
    wrong: Flags
    folds: Indices

    def where(self, rows: Flags) -> Sample:
        """Return some of the rows."""
        return Sample(self.features[rows], self.wrong[rows], self.folds[rows])


def _apart(sample: Sample, name: str) -> Array:
    """Return P(wrong) of each row by a map that was fitted to the other folds."""
    p_wrong = np.empty(len(sample.wrong))
    for fold in np.unique(sample.folds):
        mine = sample.folds == fold
        others = sample.where(~mine)
        weights = _weights_of(name, others.features, others.wrong)
        blocks = fit_map(others.features @ weights, others.wrong)
        p_wrong[mine] = blocks.at(sample.features[mine] @ weights)
    return p_wrong


def choose_score(sample: Sample) -> tuple[str, Mapping[str, float]]:
    """Return the score with the least Brier score out of its folds, and that of each."""
    tried = {name: brier(_apart(sample, name), sample.wrong) for name in (*_SINGLE, COMBINED)}
    return min(tried, key=lambda name: tried[name]), MappingProxyType(tried)


def out_of_fold(sample: Sample) -> Array:
    """Return P(wrong) of each row as one not yet seen has it: score and map by other folds."""
    p_wrong = np.empty(len(sample.wrong))
    for fold in np.unique(sample.folds):
        mine = sample.folds == fold
        others = sample.where(~mine)
        name, _ = choose_score(others)
        weights = _weights_of(name, others.features, others.wrong)
        blocks = fit_map(others.features @ weights, others.wrong)
        p_wrong[mine] = blocks.at(sample.features[mine] @ weights)
    return p_wrong


# A card


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Tasks of which the most doubtful share is escalated: accuracy and cost a task.

    `mixture` is the accuracy of escalating the same share at random.
    """

    share: float
    atp: float
    accuracy: Estimate
    mixture: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True, slots=True)
class ClassFit:
    """A class's map, and what the report says of it beyond the card."""

    known: TaskClass
    score: str
    tried: Mapping[str, float]
    bins: tuple[Bin, ...]
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A family that nothing was fitted to, judged by the card's map of all tasks."""

    family: str
    num_tasks: int
    errors: Mapping[Tier, Estimate]
    auroc: Estimate | None
    """None where all answers are of one kind."""
    calibration_error: Estimate
    brier: Estimate
    base_brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A card with all that its report says."""

    card: QualityCard
    classes: Mapping[str, ClassFit]
    held_out: tuple[HeldOut, ...]
    left_out: Mapping[str, str]
    """The classes that have no map of their own, and why."""


def fit_card(
    judged: Sequence[Judged],
    tiers: Sequence[Tier],
    fingerprint: QualityFingerprint,
    *,
    tasks_sha256: str,
    software: str,
    now: dt.datetime,
) -> Fit:
    """Fit a card to what was judged, under the version that it would like to have.

    `tiers` are those that were asked, the lowest first. Takes seconds.

    Raises:
        ConfigError: too few tasks, or too few of them answered wrongly, or rightly.
    """
    counted = [each for each in judged if not each.task.held_out]
    classes: dict[str, ClassFit] = {}
    left_out: dict[str, str] = {}
    names = sorted({each.task.task_class for each in counted} - {ANY_CLASS})
    for name in (ANY_CLASS, *names):
        own = [each for each in counted if name in (ANY_CLASS, each.task.task_class)]
        lacking = _lacking(own, tiers[0])
        if lacking and name == ANY_CLASS:
            raise ConfigError(f"these tasks make no quality card: {lacking}")
        if lacking:
            left_out[name] = lacking
        else:
            classes[name] = _fit_class(own, tiers)
    any_class = classes[ANY_CLASS]
    held_out = [each for each in judged if each.task.held_out]
    families = sorted({each.task.held_out for each in held_out})
    models = [fingerprint.models[tier] for tier in tiers]
    evidence = any_class.known.evidence
    card = QualityCard(
        version=_stem(models[0].name, models[-1].name, now),
        title=" and ".join(f"{model.name} ({model.precision})" for model in models),
        created=now.date(),
        provenance=(
            f"{len(counted)} tasks asked of both tiers through the daemon, answers checked; "
            f"isotonic maps of {any_class.score}, chosen by {FOLDS}-fold cross-validation of the "
            f"Brier score. Out of fold: AUROC {evidence.auroc.value:.3f}, expected calibration "
            f"error {evidence.calibration_error.value:.3f}, Brier {evidence.brier.value:.3f} "
            f"against {evidence.base_brier:.3f} of the base rate."
        ),
        fingerprint=fingerprint,
        measured=Measured(
            at=now,
            software=software,
            tasks_sha256=tasks_sha256,
            num_tasks=len(counted),
            num_held_out=len(held_out),
        ),
        classes=MappingProxyType({name: fit.known for name, fit in classes.items()}),
    )
    return Fit(
        card,
        MappingProxyType(classes),
        tuple(
            _judge_family([e for e in held_out if e.task.held_out == family], card, tiers)
            for family in families
        ),
        MappingProxyType(left_out),
    )


def _stem(lowest: str, deepest: str, now: dt.datetime) -> str:
    """Return what a version begins with: both models and the day, in a card's alphabet."""
    tail = f"-{now:%Y-%m-%d}"
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{lowest}-{deepest}".lower()).strip("-.")
    return f"{slug[: 48 - len(tail)].strip('-.') or 'quality'}{tail}"


def _lacking(own: Sequence[Judged], tier: Tier) -> str:
    """Return what a class lacks to have a map; "" for nothing."""
    num_wrong = sum(not each.right[tier.name] for each in own)
    if len(own) < MIN_TASKS:
        return f"{len(own)} tasks, and {MIN_TASKS} are needed"
    if num_wrong < MIN_OF_A_KIND:
        return f"{tier.name} answers {num_wrong} wrongly, and {MIN_OF_A_KIND} are needed"
    if len(own) - num_wrong < MIN_OF_A_KIND:
        return f"{tier.name} answers {len(own) - num_wrong} rightly, and {MIN_OF_A_KIND} are needed"
    if len(Counter(folds_of(own))) < 2:
        return "all tasks ask the same"
    return ""


def _fit_class(own: Sequence[Judged], tiers: Sequence[Tier]) -> ClassFit:
    lowest, deepest = tiers[0].name, tiers[-1].name
    wrong = {t.name: np.array([not each.right[t.name] for each in own]) for t in tiers}
    sample = Sample(features_of(own, lowest), wrong[lowest], folds_of(own))
    score, tried = choose_score(sample)
    weights = _weights_of(score, sample.features, sample.wrong)
    scores = sample.features @ weights
    blocks = fit_map(scores, sample.wrong)
    # The deepest tier's answers by the same score, at the same places.
    deepest_map = fit_map(scores, wrong[deepest]).at(blocks.scores)
    p_wrong = out_of_fold(sample)
    known = TaskClass(
        num_tasks=len(own),
        weights=MappingProxyType(
            {key: float(w) for key, w in zip(_FEATURES, weights, strict=True) if w}
        ),
        scores=tuple(float(x) for x in blocks.scores),
        p_wrong=tuple(float(x) for x in np.round(blocks.values, _DIGITS)),
        p_wrong_deepest=tuple(float(x) for x in np.round(deepest_map, _DIGITS)),
        counts=tuple(int(x) for x in blocks.counts),
        errors=MappingProxyType(
            {tier: share_of(int(wrong[tier.name].sum()), len(own)) for tier in tiers}
        ),
        tokens=MappingProxyType({tier: _tokens(own, tier, scores, blocks) for tier in tiers}),
        evidence=_evidence(p_wrong, sample.wrong),
    )
    uatp = {t.name: np.array([e.answers[t.name].charged_uatp for e in own]) for t in tiers}
    curve = tuple(
        curve_point(share, p_wrong, (~wrong[lowest], ~wrong[deepest]),
                     (uatp[lowest], uatp[deepest]))
        for share in SHARES
    )  # fmt: skip
    return ClassFit(known, score, tried, reliability(p_wrong, sample.wrong), curve)


def _tokens(own: Sequence[Judged], tier: Tier, scores: Array, blocks: Blocks) -> AnswerTokens:
    """Return a tier's mean tokens: of all prompts, and of the answers of each block."""
    answers = [each.answers[tier.name] for each in own]
    output = np.array([float(each.features.num_tokens) for each in answers])
    # A block is a run of tasks in the order of their scores.
    order = np.argsort(np.round(scores, _DIGITS), kind="stable")
    ends = np.cumsum(blocks.counts).astype(np.int64)
    begins = np.concatenate(([0], ends[:-1]))
    means = np.add.reduceat(output[order], begins) / blocks.counts
    prompt = float(np.mean([each.prompt_tokens for each in answers]))
    return AnswerTokens(round(prompt, 3), tuple(float(x) for x in np.round(means, 3)))


def _evidence(p_wrong: Array, wrong: Flags) -> Evidence:
    return Evidence(
        folds=FOLDS,
        auroc=_measured(auroc, p_wrong, wrong),
        calibration_error=_measured(calibration_error, p_wrong, wrong),
        brier=_measured(brier, p_wrong, wrong),
        base_brier=_base_brier(wrong),
    )


def _measured(measure: Callable[[Array, Flags], float], p_wrong: Array, wrong: Flags) -> Estimate:
    drawn = interval(lambda rows: measure(p_wrong[rows], wrong[rows]), len(wrong))
    return _estimate(measure(p_wrong, wrong), *drawn)


def _base_brier(wrong: Flags) -> float:
    base = float(wrong.mean())
    return round(base * (1 - base), _DIGITS)


def curve_point(
    share: float, p_wrong: Array, right: tuple[Flags, Flags], uatp: tuple[Array, Array]
) -> CurvePoint:
    """Return what escalating the most doubtful share gives; both tiers' answers are paid for."""
    count = round(share * len(p_wrong))
    escalated = np.zeros(len(p_wrong), dtype=bool)
    escalated[np.argsort(-p_wrong, kind="stable")[:count]] = True
    outcome = np.where(escalated, right[1], right[0]).astype(float)
    # What chance would give: each task escalated with the probability `share`.
    chance = (1 - share) * right[0] + share * right[1]
    cost = uatp[0] + np.where(escalated, uatp[1], 0)
    n = len(p_wrong)
    accuracy = float(outcome.mean())
    gain_low, gain_high = interval(lambda i: float((outcome - chance)[i].mean()), n)
    return CurvePoint(
        share=share,
        atp=float(cost.mean()) / UATP_PER_ATP,
        accuracy=_estimate(accuracy, *interval(lambda i: float(outcome[i].mean()), n)),
        mixture=float(chance.mean()),
        gain_low=gain_low,
        gain_high=gain_high,
    )


def _judge_family(own: Sequence[Judged], card: QualityCard, tiers: Sequence[Tier]) -> HeldOut:
    lowest = tiers[0].name
    wrong = np.array([not each.right[lowest] for each in own])
    p_wrong = np.array([card.p_wrong(ANY_CLASS, each.answers[lowest].features) for each in own])
    return HeldOut(
        family=own[0].task.held_out,
        num_tasks=len(own),
        errors=MappingProxyType(
            {t: share_of(sum(not e.right[t.name] for e in own), len(own)) for t in tiers}
        ),
        auroc=_measured(auroc, p_wrong, wrong) if 0 < wrong.sum() < len(wrong) else None,
        calibration_error=_measured(calibration_error, p_wrong, wrong),
        brier=_measured(brier, p_wrong, wrong),
        base_brier=_base_brier(wrong),
        bins=reliability(p_wrong, wrong),
    )


# Files


def save(fit: Fit, directory: Path) -> tuple[Fit, Path]:
    """Write the card and its report, under its version or that with the first free number behind.

    `directory` is that of quality cards, and is there. Returns the fit as it was named, and the
    card's file. Blocks.

    Raises:
        CannotWrite: nothing was written, or only the card.
    """
    taken = set(quality_cards(directory.parent))
    wanted = fit.card.version
    numbered = (f"{wanted}-{number}" for number in itertools.count(2))
    try:
        for version in itertools.chain([wanted], numbered):
            card, path = replace(fit.card, version=version), directory / f"{version}.toml"
            if version not in taken and create_file(path, quality_card_text(card)):
                named = replace(fit, card=card)
                path.with_suffix(".md").write_text(report_of(named), encoding="utf-8")
                return named, path
    except OSError as error:
        raise CannotWrite(f"{directory} cannot be written: {error.strerror}") from error
    raise AssertionError("there is always a free number")


# The report


def report_of(fit: Fit) -> str:
    """Return the page, in Markdown: tables first, the curves of every class, the held out last."""
    card = fit.card
    mine = card.fingerprint
    lines = [
        f"# Quality card {card.version}",
        "",
        f"{card.title}.",
        card.provenance,
        "",
        (
            f"Measured {card.measured.at:%Y-%m-%d %H:%M} UTC with {card.measured.software}, on "
            f"tasks of SHA-256 `{card.measured.tasks_sha256}`."
        ),
        (
            f"Fingerprint `{mine.digest}`: temperature {mine.temperature:g}, adapter "
            f"{mine.adapter or 'none'}, grammar {mine.grammar or 'none'}."
        ),
        (
            "All figures are out of fold: each answer is judged by a score and a map that were "
            "chosen and fitted without it. Intervals are 95 %, by bootstrap over tasks; those of "
            "error rates are Wilson's."
        ),
        "",
        *_summary(fit),
    ]
    for name, why in fit.left_out.items():
        lines.append(f"- `{name}` has no map of its own and is read as `{ANY_CLASS}`: {why}.")
    for name, each in fit.classes.items():
        lines += ["", *_class_section(name, each)]
    for family in fit.held_out:
        lines += ["", *_held_out_section(family)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield _row(headings)
    yield _row(["---"] * len(headings))
    yield from (_row(row) for row in rows)


def _of(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}-{estimate.high:.{digits}f})"


def _percent(estimate: Estimate) -> str:
    low, high = f"{100 * estimate.low:.1f}", f"{100 * estimate.high:.1f}"
    return f"{100 * estimate.value:.1f} % ({low}-{high})"


def _points(share: float) -> str:
    # Plus zero: what rounds to nothing has no sign.
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _summary(fit: Fit) -> Iterator[str]:
    tiers = sorted(fit.card.fingerprint.models)
    headings = ["class", "tasks", *(f"{t.name} wrong" for t in tiers), "AUROC"]
    rows = []
    for name, each in fit.classes.items():
        known = each.known
        evidence = known.evidence
        rows.append(
            [
                name,
                str(known.num_tasks),
                *(_percent(known.errors[t]) for t in tiers),
                _of(evidence.auroc),
                _of(evidence.calibration_error),
                _of(evidence.brier),
                f"{evidence.base_brier:.3f}",
                each.score,
            ]
        )
    more = ["calibration error", "Brier", "base rate's Brier", "score"]
    yield from _table([*headings, *more], rows)


def _class_section(name: str, fit: ClassFit) -> Iterator[str]:
    tried = ", ".join(f"{key} {value:.4f}" for key, value in fit.tried.items())
    yield f"## `{name}`"
    yield ""
    yield f"Brier score out of fold by score: {tried}."
    yield ""
    yield from _reliability(fit.bins)
    yield ""
    yield "The most doubtful share is answered again by the deepest tier; both answers are paid"
    yield "for, as two jobs: a cascade, whose draft tokens cost less, costs no more."
    yield ""
    rows = [
        [
            f"{100 * point.share:.0f} %",
            f"{point.atp:.2f}",
            _percent(point.accuracy),
            f"{100 * point.mixture:.1f} %",
            (
                f"{_points(point.accuracy.value - point.mixture)} "
                f"({_points(point.gain_low)} to {_points(point.gain_high)})"
            ),
        ]
        for point in fit.curve
    ]
    yield from _table(
        ["escalated", "ATP a task", "right", "right at random", "gain in points"], rows
    )


def _reliability(bins: Sequence[Bin]) -> Iterator[str]:
    rows = [[str(b.count), f"{b.p_wrong:.3f}", f"{b.wrong:.3f}", f"`{_drawn(b)}`"] for b in bins]
    yield from _table(["answers", "P(wrong)", "were wrong", "0 . 0.5 . 1"], rows)


def _drawn(one: Bin) -> str:
    """A bar of what was wrong, with a mark where P(wrong) is."""
    width = 40
    bar = ["#" if (at + 0.5) / width <= one.wrong else "." for at in range(width)]
    bar[min(width - 1, int(one.p_wrong * width))] = "|"
    return "".join(bar)


def _held_out_section(family: HeldOut) -> Iterator[str]:
    wrong = ", ".join(f"{tier.name} {_percent(of)}" for tier, of in family.errors.items())
    figures = (
        f"AUROC {'-' if family.auroc is None else _of(family.auroc)}, calibration error "
        f"{_of(family.calibration_error)}, Brier {_of(family.brier)} against "
        f"{family.base_brier:.3f} of its own base rate"
    )
    yield f"## Held out: `{family.family}`"
    yield ""
    yield f"{family.num_tasks} tasks that nothing was fitted to, read as `{ANY_CLASS}`."
    yield f"Wrong: {wrong}. {figures}."
    yield ""
    yield from _reliability(family.bins)
