"""Amounts, phases, prices and budgets; integer uATP everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from sage_fed.core.tiers import Tier

UATP_PER_ATP = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What a job cost; `rate_card` was frozen at admission."""

    charged_uatp: int
    held_uatp: int
    rate_card: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What one tier would ask for a job: the prompt's price and a price per output token.

    Integers of one rate card, so every price made from them is exact. Of an unread prompt, which is
    longer than any tier takes, `prompt_tokens` are the fewest that it can have.
    """

    tier: Tier
    prompt_tokens: int
    max_new_tokens: int
    prompt_uatp: int
    decode_uatp: int
    unread: bool = False

    @property
    def worst_case_uatp(self) -> int:
        """The price if every token is made."""
        return self.prompt_uatp + self.max_new_tokens * self.decode_uatp

    def tokens_within(self, amount_uatp: int) -> int:
        """The largest `max_new_tokens` that `amount_uatp` would cover; 0 where none is."""
        return max(0, (amount_uatp - self.prompt_uatp) // self.decode_uatp)


@dataclass(frozen=True, slots=True)
class Budget:
    """One account's books at one instant, refill included."""

    account: str
    balance_uatp: int
    held_uatp: int
    discharged_uatp: int
    capacity_uatp: int
    refill_uatp_per_s: int
    strategic_floor_uatp: int
