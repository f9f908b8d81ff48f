"""Quality cards: an answer's features, P(wrong), and the file that is read back as it was."""

from __future__ import annotations

import datetime as dt
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_fed.cards.quality_card import (
    ANY_CLASS,
    FEATURES,
    QUALITY_FOLDER,
    AnswerFeatures,
    AnswerTokens,
    Estimate,
    Evidence,
    FeatureCollector,
    Measured,
    QualityCard,
    QualityFingerprint,
    TaskClass,
    quality_card_text,
    quality_cards,
    readable_cards,
)
from sage_fed.core import TIER_ROLES, Logprob, ModelInfo, Tier
from sage_fed.errors import ConfigError

MODELS = {
    tier: ModelInfo(
        name=f"demo-{tier.name}",
        revision="",
        architecture="Qwen2ForCausalLM",
        parameters=1000,
        precision="bf16",
        kernels="native",
        device="cpu",
        weight_bytes=1,
        step_bytes=1,
        kv_cache_bytes=1,
        kv_token_bytes=1,
        load_s=1.0,
    )
    for tier in TIER_ROLES
}
HALF = Estimate(0.5, 0.4, 0.6)
EVIDENCE = Evidence(5, Estimate(0.9, 0.8, 1.0), Estimate(0.01, 0.0, 0.02), HALF, 0.25)


def task_class(
    scores: tuple[float, ...] = (-2.0, -1.0, 0.0),
    p_wrong: tuple[float, ...] = (0.9, 0.5, 0.1),
    deepest: tuple[float, ...] = (0.6, 0.5, 0.05),
) -> TaskClass:
    """A class whose score is the least margin."""
    counts = tuple(10 for _ in scores)
    errors = {Tier.TACTICAL: HALF, Tier.STRATEGIC: Estimate(0.3, 0.2, 0.4)}
    tokens = {tier: AnswerTokens(20.0, tuple(8.0 for _ in scores)) for tier in TIER_ROLES}
    return TaskClass(
        *(sum(counts), {"least_margin": 1.0}, scores, p_wrong, deepest, counts, errors, tokens),
        EVIDENCE,
    )


def quality_card(**classes: TaskClass) -> QualityCard:
    """A card of these classes, and of one for any."""
    return QualityCard(
        version="demo-1",
        title="demo",
        created=dt.date(2026, 12, 1),
        provenance="made by a test",
        fingerprint=QualityFingerprint.of(MODELS),
        measured=Measured(dt.datetime(2026, 12, 1, tzinfo=dt.UTC), "sage-fed 1", "ab" * 32, 30, 0),
        classes={ANY_CLASS: task_class(), **classes},
    )


def saved(card: QualityCard, directory: Path) -> Path:
    """Write it where the operator's own cards are; returns that directory."""
    folder = directory / QUALITY_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"{card.version}.toml").write_text(quality_card_text(card))
    return directory


def answer(margin: float, num_tokens: int = 1) -> AnswerFeatures:
    return AnswerFeatures(num_tokens, margin, -0.1, -0.1, -0.1, -0.1 * num_tokens)


def token(logprob: float, other: float) -> Logprob:
    return Logprob(7, logprob, ((7, logprob), (8, other)))


probabilities = st.floats(0, 1)
logprobs = st.builds(token, st.floats(-20, 0), st.floats(-20, 0))
falling = st.lists(probabilities, min_size=1, max_size=8).map(
    lambda values: tuple(sorted(values, reverse=True))
)


@st.composite
def maps(draw: st.DrawFn) -> TaskClass:
    """Any map that a file may hold."""
    size = draw(st.integers(1, 8))
    finite = st.floats(-1e6, 1e6)
    scores = draw(st.lists(finite, min_size=size, max_size=size, unique=True))
    shares = st.lists(probabilities, min_size=size, max_size=size)
    first, second = (tuple(sorted(draw(shares), reverse=True)) for _ in range(2))
    return task_class(tuple(sorted(scores)), first, second)


@given(maps(), st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=20))
def test_a_surer_answer_is_never_likelier_wrong(known: TaskClass, margins: list[float]) -> None:
    """P(wrong) is a probability that does not rise with the score, for either tier."""
    card = quality_card(sums=known)
    for p_wrong in (card.p_wrong, card.p_wrong_escalated):
        found = [p_wrong("sums", answer(margin)) for margin in sorted(margins)]
        assert all(0 <= value <= 1 for value in found)
        assert sorted(found, reverse=True) == found


@given(maps(), st.floats(-1e7, 1e7), probabilities)
def test_a_card_says_the_same_in_and_out_of_its_file(
    tmp_path_factory: pytest.TempPathFactory, known: TaskClass, margin: float, max_error: float
) -> None:
    """Every figure survives the file to the last bit, and so does every decision."""
    card = quality_card(sums=known)
    read = QualityCard.load("demo-1", saved(card, tmp_path_factory.mktemp("cards")))
    assert card == read
    features = answer(margin)
    assert card.p_wrong("sums", features) == read.p_wrong("sums", features)
    assert card.cascade("sums", max_error) == read.cascade("sums", max_error)


@given(st.lists(logprobs, max_size=30), st.integers(0, 30))
def test_features_are_the_same_however_an_answer_arrives(
    tokens: list[Logprob], asked_after: int
) -> None:
    """One by one with a question in between, all at once, and without regard to order."""
    collector = FeatureCollector()
    for index, each in enumerate(tokens):
        if index == asked_after:
            collector.features()
        collector.add(each)
    assert AnswerFeatures.of(tokens) == collector.features()
    assert AnswerFeatures.of(reversed(tokens)) == collector.features()


def test_features_are_what_they_say() -> None:
    """The margin is to the best other token; the low quantile is of one token in ten."""
    tokens = [token(-0.1 * i, -0.1 * i - 1) for i in range(20)] + [token(-3.0, -1.0)]
    found = AnswerFeatures.of(tokens)
    assert (21, -2.0, -3.0) == (found.num_tokens, found.least_margin, found.least_logprob)
    assert pytest.approx(-1.8) == found.low_logprob
    assert pytest.approx(-22.0) == found.total_logprob
    assert pytest.approx(-22.0 / 21) == found.mean_logprob


def test_between_two_scores_p_wrong_is_interpolated() -> None:
    """It stands still outside of them; an answer without a token is the least sure."""
    card = quality_card()
    asked = [card.p_wrong("any", answer(margin)) for margin in (-9.0, -2.0, -1.5, -0.5, 0.0, 3.0)]
    assert pytest.approx([0.9, 0.9, 0.7, 0.3, 0.1, 0.1]) == asked
    assert 0.9 == card.p_wrong("any", answer(0.0, num_tokens=0))


def test_a_class_that_was_not_measured_is_any() -> None:
    """So is a job that names none."""
    card = quality_card(sums=task_class(p_wrong=(0.3, 0.2, 0.1)))
    sure = answer(-5.0)
    asked = [card.p_wrong(name, sure) for name in ("sums", "poems", "any", "")]
    assert [0.3, 0.9, 0.9, 0.9] == asked


@pytest.mark.parametrize(
    ("margin", "max_error", "escalates"),
    [(-2.0, 0.5, True), (-2.0, 0.95, False), (-1.0, 0.2, False), (0.0, 0.07, True)],
)
def test_only_what_gets_better_is_escalated(
    margin: float, max_error: float, escalates: bool
) -> None:
    """Above the limit, and where the deepest tier is expected to be wrong less often."""
    assert escalates == quality_card().escalates("any", answer(margin), max_error)


def test_a_cascade_is_expected_to_do_what_it_does_to_the_measured_tasks() -> None:
    """The share that it escalates, and the errors of kept and escalated answers together."""
    card = quality_card()
    outlook = card.cascade("any", 0.6)
    assert (1 / 3, (0.6 + 0.5 + 0.1) / 3) == pytest.approx((outlook.escalated, outlook.error))
    assert 0 == card.cascade("any", 1.0).escalated
    assert (0.5, 0.3) == tuple(card.expected_error(tier) for tier in TIER_ROLES)


@given(maps(), st.lists(probabilities, min_size=2, max_size=5))
def test_a_higher_limit_escalates_no_more(known: TaskClass, limits: list[float]) -> None:
    """And expects no fewer errors: what a router may rely on."""
    card = quality_card(sums=known)
    found = [card.cascade("sums", limit) for limit in sorted(limits)]
    for lower, higher in itertools.pairwise(found):
        assert lower.escalated >= higher.escalated
        assert lower.error <= higher.error + 1e-12


def test_a_fingerprint_names_what_was_measured() -> None:
    """Another precision is a difference; another device or another load is none."""
    mine = QualityFingerprint.of(MODELS)
    assert () == mine.differences(MODELS)
    moved = {t: replace(info, device="cuda:0", kernels="torch") for t, info in MODELS.items()}
    assert () == mine.differences(moved)
    coarser = {**MODELS, Tier.TACTICAL: replace(MODELS[Tier.TACTICAL], precision="int4")}
    assert ("tactical.precision is int4, the card's is bf16",) == mine.differences(coarser)
    assert QualityFingerprint.of(MODELS, temperature=0.7).digest != mine.digest


def test_a_card_is_about_jobs_that_sample_alike() -> None:
    """Temperature, adapter and grammar are those of the measurement."""
    card = quality_card()
    assert card.covers(0.0)
    assert not card.covers(0.7)
    assert not card.covers(0.0, adapter="pirate")
    assert not card.covers(0.0, grammar="json")


FAULTS = [
    ("p_wrong = [0.9,", "p_wrong = [1.1,", "p_wrong[0]: must be a number from 0 to 1"),
    ("p_wrong = [0.9,", "p_wrong = [nan,", "p_wrong[0]: must be a number from 0 to 1"),
    ("p_wrong = [0.9,", "p_wrong = [0.3,", "any.p_wrong: must not rise"),
    ("p_wrong = [0.9,", "p_wrong = [", "any.p_wrong: must be as many as the scores"),
    ("scores = [-2.0,", "scores = [2.0,", "any.scores: must ascend"),
    ("scores = [-2.0,", "scores = [inf,", "scores[0]: must be a finite number"),
    ("counts = [10,", "counts = [11,", "any.counts: must add up to num_tasks, 30"),
    ("least_margin = 1.0", "luck = 1.0", f"any.weights: must be of {', '.join(FEATURES)}"),
    ("temperature = 0.0", "temperature = 0.5", "fingerprint.id: must be "),
    ("output = [8.0,", "output = [", "any.tokens.tactical.output: must be as many as the scores"),
    ("[classes.any]", "[classes.sums]", "classes.any: is missing"),
    ('version = "demo-1"', 'version = "demo-2"', "version: must be the file's name, demo-1"),
    ('title = "demo"', 'title = "demo"\nluck = 1', "luck: unknown key"),
    ("num_tasks = 30", "num_tasks = true", "must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_a_faulty_file_is_refused_by_its_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    """Whole or not at all: the error names the file, the key and what it must be."""
    directory = saved(quality_card(), tmp_path)
    path = directory / QUALITY_FOLDER / "demo-1.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace("[classes.any", new[:-1]) if old == "[classes.any]"
                    else text.replace(old, new, 1))  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        QualityCard.load("demo-1", directory)
    assert message in raised.value.message
    assert str(path) in raised.value.message


def test_cards_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    """The others are still read, and known by their versions."""
    directory = saved(quality_card(), tmp_path)
    (directory / QUALITY_FOLDER / "broken.toml").write_text("version = ")
    own, bundled, errors = readable_cards(directory)
    assert ["demo-1"] == [card.version for card in own]
    assert "demo-1" not in {card.version for card in bundled}
    assert ["broken.toml"] == [str(error).split(":")[1].strip().split("/")[-1] for error in errors]
    assert {"broken", "demo-1"} <= set(quality_cards(directory))


def test_a_card_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    """By version; what is no version cannot lead to another file."""
    directory = saved(quality_card(), tmp_path)
    with pytest.raises(ConfigError, match=r"there is no card mine; there are .*demo-1"):
        QualityCard.load("mine", directory)
    with pytest.raises(ConfigError, match="neither a card's version nor a path"):
        QualityCard.load("Mine Own", directory)


def test_the_bundled_pair_has_a_card_that_tells() -> None:
    """Measured on tasks of no training: calibrated, and better than the base rate at telling."""
    cards, errors = readable_cards(Path("/nonexistent"))[1:]
    assert () == errors
    (card,) = cards
    assert {"demo-tactical", "demo-strategic"} == {
        model.name for model in card.fingerprint.models.values()
    }
    evidence = card.classes[ANY_CLASS].evidence
    assert card.measured.num_tasks >= 2000
    assert card.measured.num_held_out >= 2000
    assert evidence.calibration_error.value <= 0.05
    assert evidence.auroc.value >= 0.75
    assert evidence.brier.high < evidence.base_brier
    assert card.cascade(ANY_CLASS, 0.3).error < card.expected_error(Tier.TACTICAL)
