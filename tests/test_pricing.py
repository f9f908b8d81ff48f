"""Rate cards and the arithmetic of prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_fed.cards.rate_card import (
    BUNDLED_CARDS,
    DEFAULT_CARD,
    Basis,
    RateCard,
    available_cards,
    charge,
    quote,
)
from sage_fed.core import TIER_ROLES, UATP_PER_ATP, Phase, Tier, Usage
from sage_fed.errors import ConfigError

SHIPPED = RateCard.load()
TIERS = (*TIER_ROLES, Tier(2, "deep"))
CARD = replace(SHIPPED, lines={**SHIPPED.lines, TIERS[2]: SHIPPED.lines[Tier.STRATEGIC]})
TOKENS = st.integers(0, 200_000)


def changed(tmp_path: Path, *edits: tuple[str, str], name: str = "own") -> Path:
    """A copy of the default card as a file of its own, with replacements (each hits once)."""
    text = (BUNDLED_CARDS / f"{DEFAULT_CARD}.toml").read_text()
    for old, new in ((f'version = "{DEFAULT_CARD}"', f'version = "{name}"'), *edits):
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return path


# Cards


def test_the_default_card_prices_a_strategic_token_at_6_59() -> None:
    """The published ratio is what ships, marked as measured, with where it comes from."""
    assert DEFAULT_CARD == CARD.version
    assert UATP_PER_ATP == CARD.rates[Tier.TACTICAL][Phase.DECODE]
    assert 6_590_000 == CARD.rates[Tier.STRATEGIC][Phase.DECODE]
    assert 6.59 == CARD.cost_ratio()
    assert Basis.MEASURED is CARD.lines[Tier.STRATEGIC][Phase.DECODE].basis
    assert "13.39 s" in CARD.lines[Tier.STRATEGIC][Phase.DECODE].source
    assert "Thor" in CARD.device


def test_every_bundled_card_loads_under_its_own_name() -> None:
    """Each file among the shipped cards is complete and findable by its version."""
    assert DEFAULT_CARD in available_cards()
    for version in available_cards():
        assert version == RateCard.load(version).version


def test_a_card_is_found_in_the_operators_directory(tmp_path: Path) -> None:
    """An own card is found by version in the given directory, and by path from anywhere."""
    path = changed(tmp_path, ('"6.59"', '"5"'))

    assert 5.0 == RateCard.load("own", tmp_path).cost_ratio()
    assert 5.0 == RateCard.load(path).cost_ratio()
    assert 5.0 == RateCard.load(str(path)).cost_ratio()
    assert DEFAULT_CARD == RateCard.load(DEFAULT_CARD, tmp_path).version
    assert {"own", DEFAULT_CARD} <= set(available_cards(tmp_path))


def test_prices_are_rounded_up_to_whole_uatp(tmp_path: Path) -> None:
    """A fraction of a uATP costs a whole one, so nothing is ever free."""
    path = changed(tmp_path, ('"0.005"', '"0.0000000001"'), ('"6.59"', '"6.59' + "0" * 40 + '1"'))

    rates = RateCard.load(path).rates

    assert 1 == rates[Tier.TACTICAL][Phase.CACHED]
    assert 6_590_001 == rates[Tier.STRATEGIC][Phase.DECODE]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('price_atp = "6.59"', "price_atp = 6.59", "strategic.decode.price_atp: must be a decimal"),
        ('price_atp = "6.59"', 'price_atp = "x"', "strategic.decode.price_atp: 'x' is not"),
        ('price_atp = "6.59"', 'price_atp = "NaN"', "strategic.decode.price_atp: 'NaN' is not"),
        ('price_atp = "6.59"', 'price_atp = "0"', "strategic.decode.price_atp: '0' is not"),
        ('price_atp = "6.59"', 'price_atp = "-1"', "strategic.decode.price_atp: '-1' is not"),
        ('price_atp = "6.59"', 'price_atp = "1e9"', "strategic.decode.price_atp: '1e9' is not"),
        ('price_atp = "6.59"', 'prise_atp = "6"', "strategic.decode.price_atp: is missing"),
        ("[strategic.decode]", "[strategic.decide]", "strategic.decode: is missing"),
        ("[tactical.decode]", "[tactical.x]\n[tactical.decode]", "tactical.x: unknown key"),
        ("[tactical.decode]", "[x]\n[tactical.decode]", "x: unknown key"),
        ('basis = "measured"', 'basis = "guessed"', "tactical.decode.basis: must be"),
        ('basis = "measured"', 'basis = "measured"\nx = 1', "tactical.decode.x: unknown key"),
        ('"0.005"', '"0.06"', "tactical.cached.price_atp: must not be above prefill"),
        ("created = 2025-11-05", 'created = "yesterday"', "created: must be a date"),
        ('device = "', 'device = " "\nx = "', "device: must not be empty"),
        ('version = "own"', 'version = "other"', "version: must be the file's name, own"),
        ('version = "own"', "version = ", "not a readable rate card"),
    ],
)
def test_a_bad_card_names_the_key(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """Whatever is wrong with a card, the daemon does not start, and the text says where."""
    path = changed(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

    with pytest.raises(ConfigError) as caught:
        RateCard.load(path)

    assert complaint in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["no-such-card", "../escape", "UPPER", "", "missing.toml"])
def test_an_unknown_card_is_a_configuration_error(name: str, tmp_path: Path) -> None:
    """A name that leads nowhere is refused, naming the setting."""
    with pytest.raises(ConfigError, match="rate_card"):
        RateCard.load(name, tmp_path)


def test_an_own_card_cannot_take_a_bundled_cards_name(tmp_path: Path) -> None:
    """The books name cards by version, so one version must not mean two prices."""
    changed(tmp_path, name=DEFAULT_CARD)

    with pytest.raises(ConfigError, match="bundled card's version"):
        RateCard.load(DEFAULT_CARD, tmp_path)


# Prices


@pytest.mark.parametrize(
    ("usage", "expected_uatp"),
    [
        (Usage.single(Tier.TACTICAL, 0, 0, 100), 100_000_000),
        (Usage.single(Tier.STRATEGIC, 0, 0, 100), 659_000_000),
        (Usage.single(Tier.TACTICAL, 40, 0, 1), 3_000_000),
        (Usage.single(Tier.TACTICAL, 40, 20, 0), 1_100_000),
        (Usage.single(Tier.STRATEGIC, 1, 1, 0), 32_950),
        (Usage.single(Tier.STRATEGIC, 0, 0, 0), 0),
    ],
)
def test_usage_is_priced_by_phase(usage: Usage, expected_uatp: int) -> None:
    """Prompt, cached and output tokens each cost their own rate, exactly."""
    assert expected_uatp == charge(CARD, usage)


@given(st.sampled_from(TIERS), TOKENS, TOKENS, st.data())
def test_the_charge_never_exceeds_the_worst_case(
    tier: Tier, prompt_tokens: int, max_new_tokens: int, data: st.DataObject
) -> None:
    """Whatever a job within its bounds did, the hold covers it; doing all of it uses it up."""
    done = data.draw(st.integers(0, prompt_tokens))
    cached = data.draw(st.integers(0, done))
    usage = Usage.single(tier, done, cached, data.draw(st.integers(0, max_new_tokens)))
    held = quote(CARD, tier, prompt_tokens, max_new_tokens).worst_case_uatp

    assert 0 <= charge(CARD, usage) <= held
    assert held == charge(CARD, Usage.single(tier, prompt_tokens, 0, max_new_tokens))


@given(st.sampled_from(TIERS), TOKENS, TOKENS, st.integers(1, 1000))
def test_more_work_costs_more_and_caching_costs_less(
    tier: Tier, prompt_tokens: int, output_tokens: int, more: int
) -> None:
    """Prices are strictly monotone in prompt and output, and fall with the cached share."""
    base = charge(CARD, Usage.single(tier, prompt_tokens, 0, output_tokens))

    assert base < charge(CARD, Usage.single(tier, prompt_tokens + more, 0, output_tokens))
    assert base < charge(CARD, Usage.single(tier, prompt_tokens, 0, output_tokens + more))
    cached = min(more, prompt_tokens)
    assert base >= charge(CARD, Usage.single(tier, prompt_tokens, cached, output_tokens))


@given(st.sampled_from(TIERS), TOKENS, TOKENS, st.integers(0, 10**13))
def test_an_offer_knows_what_an_amount_would_cover(
    tier: Tier, prompt_tokens: int, max_new_tokens: int, amount_uatp: int
) -> None:
    """`tokens_within` is the largest output that the amount pays for, prompt included."""
    fits = quote(CARD, tier, prompt_tokens, max_new_tokens).tokens_within(amount_uatp)

    assert quote(CARD, tier, prompt_tokens, fits + 1).worst_case_uatp > amount_uatp
    assert not fits or quote(CARD, tier, prompt_tokens, fits).worst_case_uatp <= amount_uatp
