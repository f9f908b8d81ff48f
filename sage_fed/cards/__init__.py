"""Rate cards, quotes and charges: from token counts to exact integer prices.

Owns the one place where money is rounded: a card's decimal ATP become whole uATP per token,
upwards, when the card is read (`card`); everything after that is integer arithmetic (`charges`).
Knows neither accounts nor routes.
"""

from sage_fed.cards.rate_card import (
    BUNDLED_CARDS,
    DEFAULT_CARD,
    MAX_SPREAD,
    Basis,
    Fingerprint,
    Measured,
    ModelPrint,
    Rate,
    RateCard,
    available_cards,
    card_text,
    charge,
    is_version,
    own_cards,
    quote,
    worst_case,
)

__all__ = [
    "BUNDLED_CARDS",
    "DEFAULT_CARD",
    "MAX_SPREAD",
    "Basis",
    "Fingerprint",
    "Measured",
    "ModelPrint",
    "Rate",
    "RateCard",
    "available_cards",
    "card_text",
    "charge",
    "is_version",
    "own_cards",
    "quote",
    "worst_case",
]
