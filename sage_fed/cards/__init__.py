"""Rate cards, quotes and charges: from token counts to exact integer prices."""

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
    measured_spreads,
    own_cards,
    quote,
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
    "measured_spreads",
    "own_cards",
    "quote",
]
