"""From token counts to exact integer prices: what a job would ask for, and what it did cost."""

from __future__ import annotations

from sage_fed.cards.card import RateCard
from sage_fed.core import Offer, Phase, Tier, Usage


def quote(card: RateCard, tier: Tier, prompt_tokens: int, max_new_tokens: int) -> Offer:
    """What `tier` would ask for a job of this size, nothing of it being cached."""
    rates = card.lines[tier]
    return Offer(
        tier=tier,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        prompt_uatp=prompt_tokens * rates[Phase.PREFILL].uatp,
        decode_uatp=rates[Phase.DECODE].uatp,
    )


def worst_case(card: RateCard, tier: Tier, prompt_tokens: int, max_new_tokens: int) -> int:
    """The most uATP that a job of this size can cost; what is held for it."""
    return quote(card, tier, prompt_tokens, max_new_tokens).worst_case_uatp


def charge(card: RateCard, tier: Tier, usage: Usage) -> int:
    """The price in uATP of what was done; never above the worst case of the same bounds."""
    assert 0 <= usage.cached_tokens <= usage.prompt_tokens, "cached tokens are prompt tokens"
    rates = card.lines[tier]
    return (
        (usage.prompt_tokens - usage.cached_tokens) * rates[Phase.PREFILL].uatp
        + usage.cached_tokens * rates[Phase.CACHED].uatp
        + usage.output_tokens * rates[Phase.DECODE].uatp
    )
