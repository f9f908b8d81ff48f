"""Measured cards: written, read back, and matched by what they were measured on."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_fed.cards.rate_card import Basis, Fingerprint, Measured, RateCard, card_text, own_cards
from sage_fed.core import TIER_ROLES, MeasuredPoint, ModelInfo, Phase, Tier
from sage_fed.errors import ConfigError

INFO = ModelInfo(
    name="a", revision="", architecture="Qwen2ForCausalLM", parameters=494_000_000,
    precision="bf16", kernels="native", device="cpu", weight_bytes=10**9, step_bytes=988_000_000,
    kv_cache_bytes=2**20, kv_token_bytes=12_288, load_s=1.5,
)  # fmt: skip
PRINT = Fingerprint.of("AMD EPYC, 2 cores", 2, "0.1.0", dict.fromkeys(TIER_ROLES, INFO))
POINT = MeasuredPoint(Tier.TACTICAL, Phase.DECODE, 1, 32, 1, 0.0213, 0.004, 40, 0.0215)
MEASURED = Measured(
    at=dt.datetime(2026, 11, 23, 15, 0, tzinfo=dt.UTC),
    took_s=61.5,
    token_s=0.0213,
    cost_ratio=6.25,
    spread=0.01,
    error=0.002,
    rounds=40,
    read_bandwidth_bytes_per_s=4.5e10,
    load_s={Tier.TACTICAL: 1.5, Tier.STRATEGIC: 22.0},
    conditions={"driver": "none", "cpu frequency (MHz)": '2600 "boost"\n'},
    points=(
        POINT,
        replace(POINT, tier=Tier.STRATEGIC, co_resident_s=None),
        replace(POINT, batch=2, spread=None, rounds=1),
    ),
    warning="not a quiet machine",
)
CARD = replace(RateCard.load(), version="own", fingerprint=PRINT, measured=MEASURED)


def saved(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


def test_a_card_that_was_written_reads_back_as_the_same(tmp_path: Path) -> None:
    """Prices, fingerprint, conditions and every point, to the last digit."""
    card = RateCard.load(saved(tmp_path, card_text(CARD)))
    # A text loses its outer blanks, in every card.
    expected = replace(
        MEASURED, conditions={**MEASURED.conditions, "cpu frequency (MHz)": '2600 "boost"'}
    )
    assert replace(CARD, measured=expected) == card


def test_each_price_keeps_its_spread(tmp_path: Path) -> None:
    """One that was measured once has none; a card without a warning reads back without one."""
    rates = dict(CARD.lines[Tier.TACTICAL])
    rates[Phase.DECODE] = replace(rates[Phase.DECODE], basis=Basis.MEASURED, spread=0.7)
    rates[Phase.PREFILL] = replace(rates[Phase.PREFILL], basis=Basis.MEASURED, spread=0.5)
    rates[Phase.VERIFY] = replace(rates[Phase.VERIFY], basis=Basis.MEASURED, spread=None)
    rates[Phase.DRAFT] = replace(rates[Phase.DRAFT], basis=Basis.MEASURED, spread=0.9)
    card = replace(
        CARD,
        lines={**CARD.lines, Tier.TACTICAL: rates},
        measured=replace(MEASURED, warning="", conditions={}, spread=0.6),
    )
    again = RateCard.load(saved(tmp_path, card_text(card)))
    assert card == again
    # Half is still a figure; a drafted token's price is the decoded one's, and said once.
    assert "tactical decode ±70%, the ratio ±60%" == again.doubts()


def test_a_card_is_found_by_the_path_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by one that is only a name in the working directory."""
    saved(tmp_path, card_text(CARD))
    monkeypatch.chdir(tmp_path)
    for name in ("own.toml", "./own.toml", tmp_path / "own.toml", str(tmp_path / "own.toml")):
        assert "own" == RateCard.load(name).version


def test_an_older_cards_single_round_has_no_spread(tmp_path: Path) -> None:
    """It said 0, which is what a perfectly quiet machine would have."""
    text = card_text(CARD).replace("rounds = 1\n", "spread = 0.0\nrounds = 1\n")
    measured = RateCard.load(saved(tmp_path, text)).measured
    assert measured is not None
    assert [(40, 0.004), (40, 0.004), (1, None)] == [(p.rounds, p.spread) for p in measured.points]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    seconds=st.floats(1e-9, 1e9),
    uatp=st.integers(1, 10**12),
)
def test_any_text_time_and_price_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, seconds: float, uatp: int
) -> None:
    """A machine's own words may hold quotes, control codes and backslashes."""
    lines = {
        tier: {phase: replace(rate, uatp=uatp, source=text) for phase, rate in rates.items()}
        for tier, rates in CARD.lines.items()
    }
    measured = replace(MEASURED, token_s=seconds, conditions={text.strip(): text.strip()})
    card = replace(CARD, lines=lines, measured=measured, title=text)
    read = RateCard.load(saved(tmp_path_factory.mktemp("card"), card_text(card)))
    assert text.strip() == read.title
    assert card.rates == read.rates
    assert measured == read.measured


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("threads = 2", "threads = 3", "fingerprint.id: must be"),
        ("threads = 2", "threads = -1", "fingerprint.threads: must be a whole number"),
        ("threads = 2", "threads = true", "fingerprint.threads: must be a whole number"),
        ("threads = 2", "threads = 2\nx = 1", "fingerprint.x: unknown key"),
        ("parameters = 494000000", "parameters = 0", "fingerprint.tactical.parameters: must be"),
        ("took_s = 61.5", "took_s = nan", "measured.took_s: must be a number"),
        ("took_s = 61.5", "took_s = -1", "measured.took_s: must be a number"),
        ("at = 2026-11-23T15:00:00Z", "at = 2026-11-23T15:00:00", "measured.at: must have an"),
        ("batch = 1", "batch = 0", "measured.points[0].batch: must be"),
        ("batch = 1", "batch = 1\nx = 1", "measured.points[0].x: unknown key"),
        ("[[measured.points]]", "[measured.points]", "measured.points: must be an array"),
    ],
)
def test_a_bad_measured_card_names_the_key(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    """A fingerprint that was edited by hand is refused like any other mistake."""
    text = card_text(replace(CARD, measured=replace(MEASURED, points=(POINT,))))
    assert old in text
    with pytest.raises(ConfigError) as caught:
        RateCard.load(saved(tmp_path, text.replace(old, new, 1)))
    assert complaint in caught.value.message


def test_a_fingerprint_is_the_same_wherever_it_is_taken() -> None:
    """Names, pools and load times do not change a price, so they do not change it."""
    other = replace(INFO, name="b", kv_cache_bytes=1, load_s=9.0, weight_bytes=1, revision="f" * 40)
    again = Fingerprint.of(" AMD  EPYC, 2 cores", 2, "0.1.0", dict.fromkeys(TIER_ROLES, other))
    assert (PRINT, PRINT.digest, ()) == (again, again.digest, PRINT.differences(again))


@pytest.mark.parametrize(
    ("field", "value"),
    [("precision", "int8"), ("kernels", "torch"), ("parameters", 1), ("step_bytes", 1),
     ("kv_token_bytes", 1), ("architecture", "LlamaForCausalLM")],
)  # fmt: skip
def test_what_changes_the_speed_changes_the_fingerprint(field: str, value: object) -> None:
    """And the difference is told by name."""
    models = {Tier.TACTICAL: INFO, Tier.STRATEGIC: replace(INFO, **{field: value})}  # type: ignore[arg-type]
    other = Fingerprint.of("AMD EPYC, 2 cores", 2, "0.1.0", models)
    assert PRINT.digest != other.digest
    (difference,) = PRINT.differences(other)
    assert difference == (f"strategic.{field} is {value}, the card's is {getattr(INFO, field)}")


@pytest.mark.parametrize(
    "text",
    [
        "a=" + "9" * 5000,
        "a=" + "[" * 20_000 + "]" * 20_000,
        "#" * (2**20 + 1),
        "\x00",
    ],
    ids=["an integer of too many digits", "nested too deeply", "too large", "no TOML"],
)
def test_a_hostile_card_is_passed_over_and_the_others_are_read(tmp_path: Path, text: str) -> None:
    """Whatever lies among the operator's cards is named as unreadable; it stops nothing."""
    (tmp_path / "hostile.toml").write_text(text, encoding="utf-8")
    cards, errors = own_cards(tmp_path)
    assert () == cards
    assert ["hostile.toml" in str(error) for error in errors] == [True]


TIERS = (*TIER_ROLES, Tier(2, "deep"))


def tiered(number: int) -> RateCard:
    """A measured card of one, two or three tiers."""
    tiers = TIERS[:number]
    rates = CARD.lines[Tier.STRATEGIC]
    return replace(
        CARD,
        lines={
            tier: {
                phase: replace(rate, uatp=rate.uatp << tier.rank) for phase, rate in rates.items()
            }
            for tier in tiers
        },
        fingerprint=Fingerprint.of("CPU", 2, "1", dict.fromkeys(tiers, INFO)),
        measured=replace(
            MEASURED,
            load_s=dict.fromkeys(tiers, 1.5),
            points=tuple(replace(POINT, tier=tier) for tier in tiers),
            conditions={},
        ),
    )


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_card_has_as_many_tiers_as_the_daemon(tmp_path: Path, number: int) -> None:
    """It reads back whole, and its ratio is the deepest tier's price over the lowest one's."""
    card = tiered(number)
    path = saved(tmp_path, card_text(card))
    assert card == RateCard.load(path, tiers=TIERS[:number])
    assert 2 ** (number - 1) == card.cost_ratio()


@pytest.mark.parametrize(
    ("written", "wanted", "complaint"),
    [(1, 2, "strategic: is missing"), (2, 3, "deep: is missing"), (3, 2, "deep: unknown key")],
)
def test_a_card_of_other_tiers_is_refused(
    tmp_path: Path, written: int, wanted: int, complaint: str
) -> None:
    """A tier without prices, or prices of no tier, are named."""
    path = saved(tmp_path, card_text(tiered(written)))
    with pytest.raises(ConfigError, match=complaint):
        RateCard.load(path, tiers=TIERS[:wanted])


def test_another_number_of_tiers_is_another_fingerprint() -> None:
    """What only one of them has is named as absent from the other."""
    two, three = (Fingerprint.of("CPU", 2, "1", dict.fromkeys(TIERS[:n], INFO)) for n in (2, 3))
    assert "deep.kernels is native, the card's is absent" in two.differences(three)
    assert "deep.kernels is absent, the card's is native" in three.differences(two)


@pytest.mark.parametrize("price", ["\u0663", "1_0", "1e-9", "0." + "1" * 100_000, "+1", " "])
def test_a_price_is_plain_digits(tmp_path: Path, price: str) -> None:
    """What only a lenient parser takes for a number is refused as a price, by its key."""
    text = card_text(CARD).replace('price_atp = "1"', f'price_atp = "{price}"', 1)
    with pytest.raises(ConfigError, match=r"tactical\.\w+\.price_atp: .* is not a decimal"):
        RateCard.load(saved(tmp_path, text))


def test_a_number_beyond_all_floats_is_refused(tmp_path: Path) -> None:
    """An absurd whole number is a refused key, not a crash."""
    text = card_text(CARD).replace("took_s = 61.5", f"took_s = {10**400}")
    with pytest.raises(ConfigError, match=r"measured\.took_s: must be a number"):
        RateCard.load(saved(tmp_path, text))
