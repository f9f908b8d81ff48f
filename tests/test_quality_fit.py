"""What is fitted to judged answers: the map, the measures, the card and its report."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_quality_card import MODELS, saved

from sage_fed.calibrate.quality import Exact, Judged, QualityTask, TierAnswer
from sage_fed.calibrate.quality_fit import (
    MIN_TASKS,
    Fit,
    auroc,
    brier,
    calibration_error,
    fit_card,
    fit_map,
    interval,
    pool_adjacent_violators,
    reliability,
    report_of,
    share_of,
)
from sage_fed.cards.quality_card import (
    ANY_CLASS,
    AnswerFeatures,
    QualityCard,
    QualityFingerprint,
)
from sage_fed.core import TIER_ROLES, Message, Tier
from sage_fed.errors import ConfigError

NOW = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)

cases = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=2, max_size=40)


def arrays(pairs: Sequence[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for x, _ in pairs]), np.array([wrong for _, wrong in pairs])


def judged(
    num_tasks: int,
    truth: Callable[[float], float],
    *,
    task_class: str = "sums",
    held_out: str = "",
    seed: int = 0,
) -> list[Judged]:
    """Answers whose mean log-probability decides, by `truth`, how often they are wrong."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(num_tasks):
        mean = -float(rng.exponential(0.5))
        features = AnswerFeatures(4, float(rng.normal()), 2 * mean, mean, mean, 4 * mean)
        task = QualityTask(
            (Message("user", f"{task_class} {seed} {index}"),),
            Exact("x"),
            task_class,
            held_out=held_out,
        )
        wrong = rng.random() < truth(mean)
        found.append(
            Judged(
                task,
                {"tactical": TierAnswer("x", features, 1_000_000, 12),
                 "strategic": TierAnswer("x", features, 6_000_000, 12)},
                {"tactical": not wrong, "strategic": not wrong or bool(rng.random() < 0.5)},
            )
        )  # fmt: skip
    return found


def logistic(mean: float) -> float:
    return 1 / (1 + math.exp(4 + 6 * mean))


def fitted(answers: Sequence[Judged]) -> Fit:
    return fit_card(
        answers,
        TIER_ROLES,
        QualityFingerprint.of(MODELS),
        tasks_sha256="ab" * 32,
        software="sage-fed 1",
        now=NOW,
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=7))
def test_pooling_finds_the_nearest_sequence_that_does_not_rise(
    pairs: list[tuple[int, int]],
) -> None:
    """By the min-max formula of isotonic regression, which computes it in another way."""
    values = np.array([value for value, _ in pairs], dtype=float)
    weights = np.array([weight for _, weight in pairs], dtype=float)

    def mean(low: int, high: int) -> float:
        part = slice(low, high + 1)
        return float(np.average(values[part], weights=weights[part]))

    n = len(values)
    expected = [
        min(max(mean(low, high) for high in range(at, n)) for low in range(at + 1))
        for at in range(n)
    ]
    found = np.empty(n)
    for part in pool_adjacent_violators(values, weights):
        found[part] = np.average(values[part], weights=weights[part])
    assert pytest.approx(expected) == found.tolist()


@given(cases)
def test_a_map_falls_and_keeps_the_share_of_wrong_answers(pairs: list[tuple[float, bool]]) -> None:
    """Strictly between 0 and 1 where both kinds occur; its mean is about what was seen."""
    scores, wrong = arrays(pairs)
    found = fit_map(scores, wrong)
    assert all(a > b for a, b in zip(found.values, found.values[1:], strict=False))
    assert all(a < b for a, b in zip(found.scores, found.scores[1:], strict=False))
    assert len(pairs) == found.counts.sum()
    if 0 < wrong.sum() < len(wrong):
        assert all(0 < value < 1 for value in found.values)
    mean = float(np.average(found.values, weights=found.counts))
    assert mean == pytest.approx(float(wrong.mean()), abs=0.3)


@given(cases)
def test_auroc_is_what_counting_pairs_gives(pairs: list[tuple[float, bool]]) -> None:
    """A wrong answer and a right one: which has the greater doubt; ties count half."""
    doubt, wrong = arrays(pairs)
    duels = [float(a > b) + 0.5 * float(a == b) for a in doubt[wrong] for b in doubt[~wrong]]
    expected = sum(duels) / len(duels) if duels else math.nan
    assert pytest.approx(expected, nan_ok=True) == auroc(doubt, wrong)


def test_a_perfect_forecast_has_no_calibration_error() -> None:
    """And one that is off by a tenth everywhere has that error; the bins hold every answer."""
    wrong = np.arange(1000) % 10 < 3
    assert 0 == pytest.approx(calibration_error(np.full(1000, 0.3), wrong))
    assert 0.1 == pytest.approx(calibration_error(np.full(1000, 0.4), wrong))
    assert 0.21 == pytest.approx(brier(np.full(1000, 0.3), wrong))
    bins = reliability(np.linspace(0, 1, 1003), np.arange(1003) % 2 == 0)
    assert 1003 == sum(each.count for each in bins)
    assert {100, 101} == {each.count for each in bins}


def test_intervals_hold_what_they_should() -> None:
    """The bootstrap's of a mean is about two standard errors; Wilson's stays inside [0, 1]."""
    wrong = np.arange(900) % 3 == 0
    low, high = interval(lambda rows: float(wrong[rows].mean()), len(wrong))
    error = math.sqrt(1 / 3 * 2 / 3 / 900)
    assert pytest.approx((1 / 3 - 1.96 * error, 1 / 3 + 1.96 * error), abs=0.006) == (low, high)
    assert (low, high) == interval(lambda rows: float(wrong[rows].mean()), len(wrong))
    none = share_of(0, 20)
    assert 0 == none.low == none.value < none.high < 0.2


def test_a_card_finds_the_score_and_the_truth_behind_it() -> None:
    """What was drawn with known probabilities is mapped to about those, and told apart."""
    fit = fitted(judged(3000, logistic))
    known = fit.classes["sums"]
    assert known.score in ("least_logprob", "low_logprob", "mean_logprob", "total_logprob",
                           "all features")  # fmt: skip
    assert known.tried["least_margin"] > min(known.tried.values()), "it was drawn at random"
    for mean in (-0.2, -0.6, -1.0, -2.0):
        features = AnswerFeatures(4, 0.0, 2 * mean, mean, mean, 4 * mean)
        assert logistic(mean) == pytest.approx(fit.card.p_wrong("sums", features), abs=0.09)
        half = fit.card.p_wrong_escalated("sums", features)
        assert logistic(mean) / 2 == pytest.approx(half, abs=0.09)
    evidence = known.known.evidence
    assert evidence.calibration_error.value < 0.04
    assert evidence.brier.value < evidence.base_brier
    assert evidence.auroc.low < evidence.auroc.value < evidence.auroc.high


def test_noise_makes_a_card_that_claims_nothing() -> None:
    """Out of fold, features that say nothing tell nothing apart: no figure is flattered."""
    evidence = fitted(judged(1000, lambda _: 0.4)).classes["sums"].known.evidence
    assert evidence.auroc.low < 0.5 < evidence.auroc.high
    assert evidence.brier.value > evidence.base_brier - 0.005


def test_the_curve_ends_at_both_tiers(tmp_path: Path) -> None:
    """No escalation is the lowest tier at its price; all is the deepest at the price of both."""
    answers = judged(400, logistic)
    fit = fitted(answers)
    curve = fit.classes["sums"].curve
    accuracy = {
        tier.name: sum(each.right[tier.name] for each in answers) / 400 for tier in TIER_ROLES
    }
    assert (accuracy["tactical"], 1.0) == pytest.approx((curve[0].accuracy.value, curve[0].atp))
    assert (accuracy["strategic"], 7.0) == pytest.approx((curve[-1].accuracy.value, curve[-1].atp))
    middle = curve[3]
    assert middle.gain_low > 0, "the doubtful ones are escalated first"
    assert middle.accuracy.value > middle.mixture
    assert fit.card == QualityCard.load(fit.card.version, saved(fit.card, tmp_path))


def test_held_out_families_are_reported_and_fitted_to_by_nothing() -> None:
    """The card is the same without them, but for their number."""
    answers = judged(500, logistic)
    fresh = judged(60, lambda _: 0.9, task_class="odd", held_out="odd", seed=1)
    alone, both = fitted(answers), fitted([*answers, *fresh])
    assert alone.card.classes == both.card.classes
    assert 60 == both.card.measured.num_held_out
    (family,) = both.held_out
    assert ("odd", 60) == (family.family, family.num_tasks)
    assert family.calibration_error.low > 0.2
    assert family.auroc is not None
    assert None is fitted([*answers, *judged(20, lambda _: 1.0, held_out="odd")]).held_out[0].auroc
    text = report_of(both)
    assert "## Held out: `odd`" in text
    assert "## Held out" not in report_of(alone)


def test_a_small_class_is_read_as_any_and_said_to_be() -> None:
    """So is one whose answers are all right: neither says anything of a probability."""
    few = judged(MIN_TASKS - 1, logistic, task_class="few", seed=2)
    right = judged(200, lambda _: 0.0, task_class="easy", seed=3)
    fit = fitted([*judged(400, logistic), *few, *right])
    assert {ANY_CLASS, "sums"} == fit.card.classes.keys()
    assert {"few": "99 tasks, and 100 are needed",
            "easy": "tactical answers 0 wrongly, and 10 are needed"} == fit.left_out  # fmt: skip
    assert "`few` has no map of its own" in report_of(fit)
    assert 699 == fit.card.classes[ANY_CLASS].num_tasks


def test_answers_that_cannot_carry_a_card_are_refused() -> None:
    """With the reason, and no card."""
    with pytest.raises(ConfigError, match="50 tasks, and 100 are needed"):
        fitted(judged(50, logistic))
    with pytest.raises(ConfigError, match="answers 0 rightly"):
        fitted(judged(200, lambda _: 1.0))


def test_a_report_says_what_the_card_says() -> None:
    """Errors with intervals, reliability, the curve; in the order of the classes."""
    fit = fitted(judged(400, logistic))
    text = report_of(fit)
    any_class = fit.card.classes[ANY_CLASS]
    wrong = any_class.errors[Tier.TACTICAL]
    assert f"{100 * wrong.value:.1f} % ({100 * wrong.low:.1f}-{100 * wrong.high:.1f})" in text
    assert f"{any_class.evidence.auroc.value:.3f} (" in text
    assert 2 == text.count(" ATP a task ")
    assert fit.card.fingerprint.digest in text


def test_the_same_answers_give_the_same_card() -> None:
    """Whatever order they came in, to the last digit."""
    answers = judged(300, logistic)
    first, second = fitted(answers), fitted(list(reversed(answers)))
    assert replace(first.card, classes={}) == replace(second.card, classes={})
    for name, known in first.card.classes.items():
        other = second.card.classes[name]
        assert pytest.approx(known.p_wrong, abs=1e-5) == other.p_wrong
        assert known.counts == other.counts
