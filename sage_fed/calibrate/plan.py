"""Which steps a calibration times: the points of each tier, as far as its pools allow them.

Pure. Speed does not depend on what the tokens say, so a context is blocks that nobody filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from sage_fed.core import Phase, Sampling, Tier
from sage_fed.device import TierLimits, blocks_for
from sage_fed.steps import BLOCK_SIZE, Chunk, Draw, Step

SHORT_TOKENS = 40
"""The reference context: short, and in the middle of a block, as most positions are."""

LONG_TOKENS = 1032
LONG_BATCH = 8
SHORT_PREFILL_TOKENS = 32
LONG_PREFILL_TOKENS = 512
CACHED_CHUNK_TOKENS = 32
VERIFY_TOKENS = (4, 8)
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step: `batch` sequences with `context_tokens` in the cache, fed `tokens` each."""

    tier: Tier
    phase: Phase
    batch: int
    context_tokens: int
    tokens: int

    @property
    def label(self) -> str:
        """For a person: `tactical decode x8, context 40`."""
        fed = f"x{self.batch}" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{self.tier.name} {self.phase.value} {fed}, context {self.context_tokens}"

    @property
    def num_blocks(self) -> int:
        """KV blocks that its step needs."""
        return self.batch * blocks_for(self.context_tokens + self.tokens)

    @property
    def sets_a_price(self) -> bool:
        """Whether a price hangs on it; the reference's does too, and has rounds of its own."""
        return self.phase is not Phase.DECODE

    def step(self) -> Step:
        """Return the step; its blocks are numbered from 0, sequence after sequence."""
        each = blocks_for(self.context_tokens + self.tokens)
        draw = Draw(Sampling(), 0)
        return Step(
            self.tier,
            tuple(
                Chunk(
                    seq_id=-1 - index,
                    start=self.context_tokens,
                    # Ids below 256 are in every vocabulary.
                    token_ids=tuple((index + 7 * i) % 256 for i in range(self.tokens)),
                    blocks=tuple(range(index * each, (index + 1) * each)),
                    draw=draw,
                )
                for index in range(self.batch)
            ),
        )


def reference_of(tier: Tier, limits: TierLimits) -> Point:
    """Return the point whose token is a tier's output token: decode, alone, short context."""
    return Point(tier, Phase.DECODE, 1, min(SHORT_TOKENS, _longest(limits) // 2), 1)


def points_of(tier: Tier, limits: TierLimits) -> tuple[Point, ...]:
    """Return a tier's points, the reference first; only those that its limits allow."""
    short = reference_of(tier, limits).context_tokens
    long = _long_context(limits)
    points = [Point(tier, Phase.DECODE, batch, short, 1) for batch in _batches(limits.max_batch)]
    if long:
        batches = {1, min(LONG_BATCH, limits.max_batch)}
        points += [Point(tier, Phase.DECODE, batch, long, 1) for batch in sorted(batches)]
    lengths = _prompts(min(LONG_PREFILL_TOKENS, limits.prefill_chunk_tokens, _longest(limits)))
    points += [Point(tier, Phase.PREFILL, 1, 0, length) for length in lengths]
    if long and lengths:
        points.append(Point(tier, Phase.CACHED, 1, long, lengths[0]))
    points += [Point(tier, Phase.VERIFY, 1, short, length) for length in VERIFY_TOKENS]
    return tuple(
        point
        for point in points
        if point.num_blocks <= limits.num_blocks
        and point.context_tokens + point.tokens <= limits.max_context_tokens
    )


def interleaved(tiers: Iterable[tuple[Point, ...]]) -> tuple[Point, ...]:
    """Return A B A B: what slows the machine down for a while meets both tiers alike."""
    return tuple(point for pair in zip_longest(*tiers) for point in pair if point is not None)


def _batches(max_batch: int) -> list[int]:
    largest = min(max_batch, MAX_BATCH)
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    return powers if powers[-1] == largest else [*powers, largest]


def _prompts(longest: int) -> list[int]:
    """Lengths of prompts: enough of them that a slope through all can do without any one."""
    lengths = {min(SHORT_PREFILL_TOKENS, longest), *(longest // part for part in (4, 2, 1))}
    return sorted(length for length in lengths if length > 1)


def _longest(limits: TierLimits) -> int:
    return min(limits.max_context_tokens, limits.kv_tokens)


def _long_context(limits: TierLimits) -> int:
    """A context that is clearly longer than the short one; 0 where there is no room for it."""
    room = _longest(limits) - CACHED_CHUNK_TOKENS
    long = min(LONG_TOKENS, room - room % BLOCK_SIZE - BLOCK_SIZE // 2)
    return long if long >= 4 * SHORT_TOKENS else 0
