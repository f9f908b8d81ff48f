"""Which rate card is in force, by setting, by what is loaded and by an operator's word."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_pricing_cards import CARD, INFO, MEASURED
from test_quality_card import MODELS, quality_card, saved

from sage_fed.cards.quality_card import QUALITY_FOLDER, QualityCard, QualityFingerprint
from sage_fed.cards.rate_card import (
    DEFAULT_CARD,
    MAX_SPREAD,
    Basis,
    Fingerprint,
    RateCard,
    card_text,
    own_cards,
)
from sage_fed.core import (
    TIER_ROLES,
    CardFit,
    ModelInfo,
    Phase,
    QualityCardStatus,
    Tier,
    TierState,
    TierStatus,
)
from sage_fed.daemon.build import cards_in_force
from sage_fed.daemon.operations import CardInForce, QualityInForce
from sage_fed.engine import DeviceDescription
from sage_fed.errors import ConfigError, InvalidField, TierUnavailable
from sage_fed.metrics import Metrics
from sage_fed.settings import load_settings

SHIPPED = RateCard.load()


def fingerprint(models: Mapping[Tier, ModelInfo]) -> Fingerprint:
    return Fingerprint.of("AMD EPYC, 2 cores", 2, "0.1.0", models)


def measured(version: str, day: int = 1, **model: object) -> RateCard:
    models = {tier: replace(INFO, **model) for tier in TIER_ROLES}  # type: ignore[arg-type]
    at = dt.datetime(2026, 11, day, tzinfo=dt.UTC)
    return replace(
        CARD,
        version=version,
        fingerprint=fingerprint(models),
        measured=replace(MEASURED, at=at, warning=""),
    )


class Desk:
    """A card in force, what was said of it, and what the planner was told to use."""

    def __init__(self, setting: str, card: RateCard, *own: RateCard) -> None:
        self.metrics = Metrics()
        self.cards = CardInForce(setting, card, own, fingerprint, self.metrics)
        self.used: list[str] = []
        self.cards.use = lambda card: self.used.append(card.version)
        self.times: list[Mapping[Tier, Mapping[int, float]]] = []
        self.cards.use_times = self.times.append

    def load(self, *tiers: Tier) -> None:
        """The tiers get ready, one after the other."""
        for tier in tiers or TIER_ROLES:
            self.cards.tier_changed(TierStatus(tier, TierState.LOADING, 0.5))
            self.cards.tier_changed(TierStatus(tier, TierState.READY, 1.0, INFO))

    @property
    def stale(self) -> float:
        """The gauge."""
        value = self.metrics.registry.get_sample_value("sage_fed_rate_card_stale")
        assert value is not None
        return value

    @property
    def shown(self) -> set[str]:
        """The versions that metrics call in force."""
        return {
            sample.labels["version"]
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "sage_fed_rate_card_info"
        }


def test_a_card_that_was_measured_here_fits(caplog: pytest.LogCaptureFixture) -> None:
    """Known only when both tiers are loaded; then nobody is warned."""
    desk = Desk("own", measured("own"))
    desk.load(Tier.TACTICAL)
    assert CardFit.UNKNOWN is desk.cards.fit
    desk.load(Tier.STRATEGIC)
    assert (CardFit.MEASURED, 0.0, []) == (desk.cards.fit, desk.stale, desk.used)
    assert [] == [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_card_that_was_measured_here_tells_what_steps_take_by_rows() -> None:
    """Once what is loaded is known; a card of another machine, or a noisy one, tells nothing."""
    desk = Desk("own", measured("own"))
    desk.load(Tier.TACTICAL)
    assert [] == desk.times
    desk.load(Tier.STRATEGIC)
    (times,) = desk.times
    assert {1, 2} == times[Tier.TACTICAL].keys()
    assert {1} == times[Tier.STRATEGIC].keys()
    for other in (SHIPPED, measured("other", precision="fp32"), under_load("noisy", 1)):
        desk = Desk(other.version, other)
        desk.load()
        assert [] == desk.times


def test_a_noisy_measurement_is_told_wherever_its_card_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Chosen by the setting, by fingerprint or by an operator: status and log repeat it."""
    noisy = measured("noisy")
    assert noisy.measured is not None
    noisy = replace(noisy, measured=replace(noisy.measured, warning="strategic prefill ±40%"))
    for setting, card in (("noisy", noisy), ("auto", SHIPPED), (DEFAULT_CARD, SHIPPED)):
        caplog.clear()
        desk = Desk(setting, card, noisy)
        desk.load()
        if setting == DEFAULT_CARD:
            desk.cards.adopt(noisy)
        assert (CardFit.MEASURED, "noisy") == (desk.cards.fit, desk.cards.card.version)
        assert "WARNING: strategic prefill ±40%" in desk.cards.status.note
        (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
        assert "strategic prefill ±40%" in warning.getMessage()


def test_a_stale_card_is_a_loud_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It stays in force, and log, metric and status say what has changed."""
    desk = Desk("own", measured("own", precision="int8"))
    desk.load()
    assert (CardFit.STALE, 1.0) == (desk.cards.fit, desk.stale)
    assert desk.cards.note.startswith(
        "measured on another pair (2 differences): tactical.precision is bf16, the card's is int8; "
    )
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "own IS STALE" in warning.getMessage()
    assert {"own"} == desk.shown


def test_many_differences_are_counted_and_listed_below(caplog: pytest.LogCaptureFixture) -> None:
    """Two are enough for a line; the log, and who reads the whole note, get all."""
    desk = Desk("own", measured("own", precision="int8", kernels="torch", parameters=3))
    desk.load()
    head, *all_of_them = desk.cards.note.split("\n")
    assert "another pair (6 differences)" in head
    assert 2 == head.count("the card's is")
    assert 6 == len(all_of_them)
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert all(difference in warning.getMessage() for difference in all_of_them)


def test_the_shipped_card_is_selectable_and_says_what_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was measured elsewhere, openly so: that is no warning."""
    desk = Desk(DEFAULT_CARD, SHIPPED, measured("own"))
    desk.load()
    assert (DEFAULT_CARD, CardFit.DECLARED, 0.0) == (
        desk.cards.card.version,
        desk.cards.fit,
        desk.stale,
    )
    assert "calibrate" in desk.cards.note
    assert [] == [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_auto_takes_the_newest_that_fits() -> None:
    """Not one that is newer but was measured on something else; jobs are priced by it at once."""
    own = (measured("a", 1), measured("c", 3), measured("b", 2), measured("d", 4, kernels="torch"))
    desk = Desk("auto", SHIPPED, *own, replace(SHIPPED, version="declared"))
    assert DEFAULT_CARD == desk.cards.status.version
    desk.load()
    assert ("c", CardFit.MEASURED, 0.0) == (desk.cards.card.version, desk.cards.fit, desk.stale)
    assert (["c"], {"c"}) == (desk.used, desk.shown)


def under_load(version: str, day: int) -> RateCard:
    """A card that fits, of a machine that did something else meanwhile."""
    card = measured(version, day)
    prefill = replace(
        card.lines[Tier.TACTICAL][Phase.PREFILL], basis=Basis.MEASURED, spread=MAX_SPREAD + 0.6
    )
    tactical = {**card.lines[Tier.TACTICAL], Phase.PREFILL: prefill}
    return replace(card, lines={**card.lines, Tier.TACTICAL: tactical})


def test_auto_passes_over_what_was_measured_under_load(caplog: pytest.LogCaptureFixture) -> None:
    """An older sound card prices instead; the log names the newer one and the price."""
    desk = Desk("auto", SHIPPED, measured("sound", 1), under_load("loud", 2))
    desk.load()
    assert ("sound", CardFit.MEASURED) == (desk.cards.card.version, desk.cards.fit)
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "loud IS PASSED OVER" in warning.getMessage()
    assert "tactical prefill ±110%" in warning.getMessage()


def test_auto_with_nothing_but_noise_prices_by_the_shipped_card(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stale, loudly, and the note says why the own one is not in force."""
    desk = Desk("auto", SHIPPED, under_load("loud", 2))
    desk.load()
    assert (DEFAULT_CARD, CardFit.STALE, 1.0) == (
        desk.cards.card.version,
        desk.cards.fit,
        desk.stale,
    )
    assert "own card loud fits, and was measured under load" in desk.cards.status.note
    assert any("IS STALE" in record.getMessage() for record in caplog.records)


def test_an_operator_may_choose_it_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """By name or at run time: it is in force, and not without a word."""
    for setting, card in (("loud", under_load("loud", 2)), ("auto", SHIPPED)):
        caplog.clear()
        desk = Desk(setting, card)
        desk.load()
        if setting == "auto":
            desk.cards.adopt(under_load("loud", 2))
        assert ("loud", CardFit.MEASURED) == (desk.cards.card.version, desk.cards.fit)
        assert any("loud WAS MEASURED UNDER LOAD" in r.getMessage() for r in caplog.records)


def test_an_older_cards_ratio_is_looked_at_too() -> None:
    """It has no spread for each price; the shipped card, which was declared, has no doubts."""
    card = measured("old")
    assert card.measured is not None
    loud = replace(card, measured=replace(card.measured, spread=1.4))
    assert ("", "", "the ratio ±140%") == (SHIPPED.doubts(), card.doubts(), loud.doubts())


def test_auto_without_a_fitting_card_falls_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """Prices that were asked to be measured and are not: the shipped ones, and a warning."""
    desk = Desk("auto", SHIPPED, measured("d", 4, parameters=3))
    desk.load()
    assert (DEFAULT_CARD, CardFit.STALE, 1.0) == (
        desk.cards.card.version,
        desk.cards.fit,
        desk.stale,
    )
    assert any("IS STALE" in record.getMessage() for record in caplog.records)


def test_an_operator_adopts_a_card_at_run_time() -> None:
    """New jobs are priced by it from then on, and a tier that loads again does not undo it."""
    desk = Desk("auto", SHIPPED, measured("a"))
    desk.load()
    desk.cards.adopt(measured("new", precision="fp32"))
    assert (["a", "new"], {"new"}) == (desk.used, desk.shown)
    assert (CardFit.STALE, 1.0) == (desk.cards.fit, desk.stale)
    other = replace(INFO, load_s=5.0)
    desk.cards.tier_changed(TierStatus(Tier.TACTICAL, TierState.READY, 1.0, other))
    assert "new" == desk.cards.card.version


def test_own_cards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """The others are read all the same."""
    (tmp_path / "good.toml").write_text(card_text(measured("good")))
    (tmp_path / "bad.toml").write_text("version = ")
    cards, errors = own_cards(tmp_path)
    assert (["good"], 1) == ([card.version for card in cards], len(errors))
    assert "bad.toml" in errors[0].message
    assert ((), ()) == own_cards(tmp_path / "absent")


class QualityDesk:
    """A quality card in force, and what decisions were told to use."""

    def __init__(
        self, *own: QualityCard, bundled: Sequence[QualityCard] = (), auto: bool = True
    ) -> None:
        self.metrics = Metrics()
        cards = (*own, *bundled)
        self.quality = QualityInForce(
            cards, self.metrics, num_own=len(own), num_tiers=len(TIER_ROLES), auto=auto
        )
        self.used: list[str] = []
        self.quality.use = lambda card: self.used.append(card.version if card else "")

    def load(self, **model: object) -> None:
        for tier in TIER_ROLES:
            info = replace(MODELS[tier], **model)  # type: ignore[arg-type]
            self.quality.tier_changed(TierStatus(tier, TierState.READY, 1.0, info))

    @property
    def stale(self) -> float | None:
        return self.metrics.registry.get_sample_value("sage_fed_quality_card_stale")


def quality(version: str, day: int = 1, **model: object) -> QualityCard:
    models = {tier: replace(MODELS[tier], **model) for tier in TIER_ROLES}  # type: ignore[arg-type]
    card = quality_card()
    at = dt.datetime(2026, 11, day, tzinfo=dt.UTC)
    return replace(
        card,
        version=version,
        fingerprint=QualityFingerprint.of(models),
        measured=replace(card.measured, at=at),
    )


def test_the_newest_quality_card_of_the_loaded_models_is_in_force() -> None:
    """An own one before a bundled one, once every tier is loaded; until then there is none."""
    desk = QualityDesk(
        quality("old", 1), quality("new", 2), quality("other", 3, precision="int4"),
        bundled=[quality("shipped", 9)],
    )  # fmt: skip
    assert QualityCardStatus("", "the models are not loaded yet") == desk.quality.status
    desk.quality.tier_changed(
        TierStatus(Tier.TACTICAL, TierState.READY, 1.0, MODELS[Tier.TACTICAL])
    )
    assert [] == desk.used
    desk.load()
    assert ["new"] == desk.used
    assert "new" == desk.quality.status.version
    assert "AUROC 0.90, calibration error 0.010" in desk.quality.status.note
    only_shipped = QualityDesk(quality("other", 3, precision="int4"), bundled=[quality("shipped")])
    only_shipped.load()
    assert ["shipped"] == only_shipped.used


def test_a_quality_card_of_other_models_is_dropped_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one that was asked for is a warning and a metric; none at all is only said."""
    named = QualityDesk(quality("mine", precision="int4"), auto=False)
    named.load()
    assert ([], "", 1.0) == (named.used, named.quality.status.version, named.stale)
    assert "mine is dropped: measured on another pair" in named.quality.status.note
    assert "tactical.precision is bf16, the card's is int4" in named.quality.status.note
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "QUALITY CARD mine is dropped" in warning.getMessage()
    caplog.clear()
    anything = QualityDesk(quality("mine", precision="int4"))
    anything.load()
    assert ("", 0.0) == (anything.quality.status.version, anything.stale)
    assert "sage-fed calibrate --quality" in anything.quality.status.note
    none = QualityDesk(auto=False)
    none.load()
    assert QualityCardStatus("", "none is wanted") == none.quality.status
    assert [] == [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_model_that_comes_back_as_another_loses_its_quality_card() -> None:
    """And has it again when it is itself again: the users of the card hear of both."""
    desk = QualityDesk(quality("mine"))
    desk.load()
    desk.load(precision="int8")
    desk.load()
    assert ["mine", "", "mine"] == desk.used


def test_an_operator_adopts_only_a_quality_card_that_fits() -> None:
    """Not before the models are loaded, nor one of others; what is in force stays."""
    desk = QualityDesk(quality("mine"))
    with pytest.raises(TierUnavailable):
        desk.quality.adopt(quality("next"))
    desk.load()
    with pytest.raises(InvalidField, match=r"tactical\.precision is bf16, the card's is int4"):
        desk.quality.adopt(quality("next", precision="int4"))
    assert "mine" == desk.quality.status.version
    desk.quality.adopt(quality("next"))
    assert ["mine", "next"] == desk.used


def test_the_setting_names_a_quality_card(tmp_path: Path) -> None:
    """By version, by path, or off; a broken own one is passed over by auto and refused by name."""
    own = tmp_path / "cards"
    own.mkdir(mode=0o700)
    saved(quality_card(), own)
    (own / QUALITY_FOLDER / "broken.toml").write_text("version = ")

    def wanted(value: str) -> QualityInForce:
        settings = load_settings(
            {"state_dir": str(tmp_path), "quality_card": value, "profile": "demo"}, {}, None
        ).settings
        return cards_in_force(settings, DeviceDescription("cpu", 1), Metrics())[1]

    for value in ("demo-1", str(own / QUALITY_FOLDER / "demo-1.toml"), "auto"):
        quality = wanted(value)
        for tier in TIER_ROLES:
            quality.tier_changed(TierStatus(tier, TierState.READY, 1.0, MODELS[tier]))
        assert "demo-1" == quality.status.version
    assert "none is wanted" == wanted("off").note
    with pytest.raises(ConfigError, match="not a readable quality card"):
        wanted("broken")
