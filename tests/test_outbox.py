"""The outbox: what shares a batch, what waits for the loop's rest, and what never does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from fake_engine import WAIT_S

from sage_fed.core import Tier, TierState, TierStatus
from sage_fed.device import Ended, EndReason
from sage_fed.device.messages import SEQUENCES_A_TURN, Batch, Outbox, Pacer
from sage_fed.steps import SampledToken, StepKind, StepReport

LONG_S = 3600.0
REST_S = 0.3
"""Long enough that steps one after the other are within it on any machine."""
ENDED = Ended(7, EndReason.LENGTH, submitted_s=0.0, ended_s=1.0)


@dataclass
class Post:
    """An outbox on the running loop, and the batches that were delivered."""

    rest_s: float
    read: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outbox = Outbox(asyncio.get_running_loop(), self.read.append, lambda: self.rest_s)

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids by batch."""
        return [[t.token_id for t in batch.tokens.get(7, ())] for batch in self.read]

    async def step(self, token_id: int, *, num_prefill_tokens: int = 0) -> None:
        """A step samples a token; then the loop has nothing more to do but to rest."""
        self.outbox.put(tokens=[sampled(token_id)], report=report(num_prefill_tokens))
        self.outbox.send()
        await turns()

    async def until_read(self, count: int) -> None:
        """Wait for a batch that no step sends."""
        async with asyncio.timeout(WAIT_S):
            while len(self.read) < count:  # noqa: ASYNC110 - a batch is told to us only
                await asyncio.sleep(0.001)


async def turns() -> None:
    """Everything that is ready runs."""
    for _ in range(3):
        await asyncio.sleep(0)


def sampled(token_id: int) -> SampledToken:
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


async def test_without_a_rest_every_step_is_read_at_once() -> None:
    post = Post(rest_s=0.0)
    for token_id in range(5):
        await post.step(token_id)
    assert [[0], [1], [2], [3], [4]] == post.tokens


async def test_tokens_that_come_faster_share_a_batch_and_need_no_further_step() -> None:
    post = Post(rest_s=REST_S)
    for token_id in range(6):
        await post.step(token_id)
    assert [[0], [1]] == post.tokens, "the second one showed how fast they come"
    await post.until_read(3)
    assert [[0], [1], [2, 3, 4, 5]] == post.tokens


async def test_a_rest_follows_a_rest_while_tokens_come() -> None:
    post = Post(rest_s=REST_S)
    for token_id in range(3):
        await post.step(token_id)
    await post.until_read(3)
    post.rest_s = LONG_S
    await post.step(3)
    assert [[0], [1], [2]] == post.tokens, "it rests again after what it read late"


async def test_slow_steps_never_wait() -> None:
    post = Post(rest_s=0.01)
    for token_id in range(3):
        await post.step(token_id)
        await asyncio.sleep(0.03)
    assert [[0], [1], [2]] == post.tokens


@pytest.mark.parametrize("what", ["ending", "first token", "news", "closed"])
async def test_what_must_not_wait_is_read_at_once_with_all_before_it(what: str) -> None:
    post = Post(rest_s=LONG_S)
    for token_id in range(4):
        await post.step(token_id)
    assert [[0], [1]] == post.tokens
    if what == "ending":
        post.outbox.put(ended=[ENDED])
    elif what == "first token":
        post.outbox.put(report=report(num_prefill_tokens=12))
    elif what == "news":
        post.outbox.put(status=TierStatus(Tier.TACTICAL, TierState.FAILED))
    else:
        post.outbox.put(closed=EndReason.SHUTDOWN)
    post.outbox.send()
    await turns()
    assert [[0], [1], [2, 3]] == post.tokens
    await post.step(4)
    assert 3 == len(post.read), "what came in between does not end the rest"


async def test_an_ending_that_was_put_is_not_forgotten_by_a_later_step() -> None:
    post = Post(rest_s=LONG_S)
    for token_id in range(3):
        await post.step(token_id)
    post.outbox.put(ended=[ENDED])
    await post.step(3)
    assert {7: ENDED} == post.read[-1].ended
    post.outbox.put(tokens=[sampled(4)], report=report(num_prefill_tokens=12))
    await post.step(5)
    assert [[0], [1], [2, 3], [4, 5]] == post.tokens, "nor is a first token"


def test_a_rest_is_what_lies_between_messages_of_a_stream_within_bounds() -> None:
    assert 0.0 == Pacer().rest_s(32), "no limit on messages"
    assert 0.001 == Pacer(2000.0).rest_s(1), "a timer's shortest"
    assert 0.004 == Pacer(2000.0).rest_s(8)
    assert 0.016 == Pacer(2000.0).rest_s(256), "a stop string waits no longer"


def step_of(num_sequences: int, token_id: int) -> list[SampledToken]:
    return [SampledToken(seq_id, token_id) for seq_id in range(num_sequences)]


async def test_a_step_of_many_sequences_is_read_in_several_turns() -> None:
    """In order, each sequence's own tokens together, and an ending with the last of them."""
    post = Post(rest_s=LONG_S)
    given: dict[int, list[int]] = {}
    post.outbox.put(tokens=step_of(100, 5))
    post.outbox.send()
    await asyncio.sleep(0)
    assert list(range(SEQUENCES_A_TURN)) == list(post.read[0].tokens)
    # Another step comes before the first is read; one sequence ends in it.
    ended = replace(ENDED, seq_id=99)
    post.outbox.put(tokens=step_of(100, 6), ended=[ended])
    post.outbox.send()
    await post.until_read(5)
    assert all(len(batch.tokens) <= SEQUENCES_A_TURN for batch in post.read)
    for batch in post.read:
        assert {99: ended} == batch.ended if 99 in batch.tokens else not batch.ended
        for seq_id, tokens in batch.tokens.items():
            given.setdefault(seq_id, []).extend(token.token_id for token in tokens)
    assert {seq_id: [5, 6] for seq_id in range(100)} == given


async def test_a_flush_and_a_last_word_bring_all_that_was_put() -> None:
    """A device that fails takes nothing back that it said before."""
    for last_word in (False, True):
        post = Post(rest_s=LONG_S)
        post.outbox.put(tokens=step_of(100, 5))
        if last_word:
            post.outbox.put(closed=EndReason.FAILED)
            post.outbox.send()
            await turns()
        else:
            post.outbox.flush()
        assert [100] == [len(batch.tokens) for batch in post.read]
