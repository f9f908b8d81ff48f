"""Parcels: what shares one, what waits for the loop's rest, and what never does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from fake_engine import WAIT_S

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.device import Ended, EndReason
from sage_fed.device.messages import Handover, Parcel, rest_s
from sage_fed.steps import SampledToken, StepKind, StepReport

LONG_S = 3600.0
REST_S = 0.3
"""Long enough that steps one after the other are within it on any machine."""
ENDED = Ended(7, EndReason.LENGTH, submitted_s=0.0, ended_s=1.0)


@dataclass
class Post:
    """A handover on the running loop, and the parcels that were opened."""

    rest_s: float
    opened: list[Parcel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handover = Handover(
            asyncio.get_running_loop(), self.opened.append, lambda: self.rest_s
        )

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids by parcel."""
        return [[d.token_id for d in parcel.drawn.get(7, ())] for parcel in self.opened]

    async def step(self, token_id: int, *, num_prefill_tokens: int = 0) -> None:
        """A step draws a token; then the loop has nothing more to do but to rest."""
        self.handover.put(drawn=[drawn(token_id)], report=report(num_prefill_tokens))
        self.handover.send()
        await turns()

    async def until_opened(self, count: int) -> None:
        """Wait for a parcel that no step sends."""
        async with asyncio.timeout(WAIT_S):
            while len(self.opened) < count:  # noqa: ASYNC110 - a parcel tells nobody but us
                await asyncio.sleep(0.001)


async def turns() -> None:
    """Everything that is ready runs."""
    for _ in range(3):
        await asyncio.sleep(0)


def drawn(token_id: int) -> SampledToken:
    return SampledToken(seq_id=7, token_id=token_id)


def report(num_prefill_tokens: int) -> StepReport:
    return StepReport(
        tier=Tier.TACTICAL,
        kind=StepKind.PREFILL if num_prefill_tokens else StepKind.DECODE,
        num_steps=1,
        num_prefill_tokens=num_prefill_tokens,
        num_decode_tokens=0 if num_prefill_tokens else 1,
        num_sequences=1,
        elapsed_s=0.0005,
    )


async def test_without_a_rest_every_step_is_opened_at_once() -> None:
    post = Post(rest_s=0.0)
    for token_id in range(5):
        await post.step(token_id)
    assert [[0], [1], [2], [3], [4]] == post.tokens


async def test_tokens_that_come_faster_share_a_parcel_and_need_no_further_step() -> None:
    post = Post(rest_s=REST_S)
    for token_id in range(6):
        await post.step(token_id)
    assert [[0], [1]] == post.tokens, "the second one showed how fast they come"
    await post.until_opened(3)
    assert [[0], [1], [2, 3, 4, 5]] == post.tokens


async def test_a_rest_follows_a_rest_while_tokens_come() -> None:
    post = Post(rest_s=REST_S)
    for token_id in range(3):
        await post.step(token_id)
    await post.until_opened(3)
    post.rest_s = LONG_S
    await post.step(3)
    assert [[0], [1], [2]] == post.tokens, "it rests again after what it opened late"


async def test_slow_steps_never_wait() -> None:
    post = Post(rest_s=0.01)
    for token_id in range(3):
        await post.step(token_id)
        await asyncio.sleep(0.03)
    assert [[0], [1], [2]] == post.tokens


@pytest.mark.parametrize("what", ["ending", "first token", "news", "closed"])
async def test_what_somebody_waits_for_is_opened_at_once_with_all_before_it(what: str) -> None:
    post = Post(rest_s=LONG_S)
    for token_id in range(4):
        await post.step(token_id)
    assert [[0], [1]] == post.tokens
    if what == "ending":
        post.handover.put(ended=[ENDED])
    elif what == "first token":
        post.handover.put(report=report(num_prefill_tokens=12))
    elif what == "news":
        post.handover.put(status=TierStatus(Tier.TACTICAL, TierState.FAILED))
    else:
        post.handover.put(closed=EndReason.SHUTDOWN)
    post.handover.send()
    await turns()
    assert [[0], [1], [2, 3]] == post.tokens
    await post.step(4)
    assert 3 == len(post.opened), "what came in between does not end the rest"


async def test_an_ending_that_was_put_is_not_forgotten_by_a_later_step() -> None:
    post = Post(rest_s=LONG_S)
    for token_id in range(3):
        await post.step(token_id)
    post.handover.put(ended=[ENDED])
    await post.step(3)
    assert [ENDED] == post.opened[-1].ended
    post.handover.put(drawn=[drawn(4)], report=report(num_prefill_tokens=12))
    await post.step(5)
    assert [[0], [1], [2, 3], [4, 5]] == post.tokens, "nor is a first token"


def test_a_rest_is_what_lies_between_messages_of_a_stream_within_bounds() -> None:
    assert 0.0 == rest_s(32, 0.0), "no limit on messages"
    assert 0.001 == rest_s(1, 2000.0), "a timer's shortest"
    assert 0.004 == rest_s(8, 2000.0)
    assert 0.016 == rest_s(256, 2000.0), "a stop string waits no longer"
