"""What a reader of a job's stream finds: in order, merged where it may be, and never late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fake_engine import WAIT_S
from service_harness import DELTAS, FINISHED, STARTED, merge
from surroundings import MODELS

from sage_fed.core import Delta, Event, Logprob
from sage_fed.device import Pacer
from sage_fed.device.messages import AWAY_S, COUNT_S
from sage_fed.errors import DeviceBusy
from sage_fed.jobs.outgoing import MOST_IN_MESSAGE, OutgoingStream, SequenceText
from sage_fed.text import Tokenizer

NEVER = 1e-6
"""Messages a second: nobody's second delta is due while a test runs."""


def opened(pacer: Pacer | None = None) -> OutgoingStream:
    """A stream of an accepted job."""
    stream = OutgoingStream(on_cancel=lambda: None, pacer=pacer or Pacer())
    stream.start(STARTED)
    return stream


def push(stream: OutgoingStream, delta: Delta) -> None:
    """Write what a delta says."""
    stream.push(delta.text, delta.token_ids, delta.logprobs)


async def take(events: AsyncIterator[Event]) -> Event:
    """The next event, which has to come by itself."""
    async with asyncio.timeout(WAIT_S):
        return await anext(events)


async def test_each_delta_of_an_unhurried_stream_is_its_own_message() -> None:
    """Without a limit, whoever reads in time gets a message a token."""
    stream = opened()
    events = aiter(stream)
    assert await take(events) == STARTED
    for delta in DELTAS:
        push(stream, delta)
        assert await take(events) == delta
    stream.end(FINISHED)
    assert await take(events) == FINISHED
    with pytest.raises(StopAsyncIteration):
        await take(events)


async def test_the_first_delta_and_the_ending_do_not_wait_for_their_turn() -> None:
    """What came between them shares one message, and nothing of it is lost or late."""
    stream = opened(Pacer(NEVER))
    events = aiter(stream)
    assert await take(events) == STARTED
    push(stream, DELTAS[0])
    assert await take(events) == DELTAS[0]
    waiting = asyncio.ensure_future(anext(events))
    for delta in DELTAS[1:]:
        push(stream, delta)
        await asyncio.sleep(0)
        assert not waiting.done()
    stream.end(FINISHED)
    assert await asyncio.wait_for(waiting, WAIT_S) == merge(DELTAS[1:])
    assert await take(events) == FINISHED


async def test_a_stream_whose_turn_has_come_goes_on_by_itself() -> None:
    """Its tokens gather until then, and need no further one to be sent."""
    stream = opened(Pacer(20))
    events = aiter(stream)
    assert await take(events) == STARTED
    for delta in DELTAS:
        push(stream, delta)
        assert await take(events) == delta


async def test_streams_share_the_messages_until_they_are_left() -> None:
    """Who has left, read to its end or not, slows nobody down any more."""
    pacer = Pacer(100)
    first, second = opened(pacer), opened(pacer)
    assert pacer.interval_s == 0
    for stream in (first, second):
        assert await take(aiter(stream)) == STARTED
    assert pacer.interval_s == pytest.approx(0.02)
    first.cancel()
    first.cancel()
    assert pacer.interval_s == pytest.approx(0.01)
    second.cancel()
    assert pacer.interval_s == 0


async def test_an_error_ends_a_stream_that_waits_for_its_turn() -> None:
    """With the output that was made before it."""
    stream = opened(Pacer(NEVER))
    events = aiter(stream)
    assert await take(events) == STARTED
    push(stream, DELTAS[0])
    assert await take(events) == DELTAS[0]
    push(stream, DELTAS[1])
    stream.end(DeviceBusy("later", 1.0))
    assert await take(events) == DELTAS[1]
    with pytest.raises(DeviceBusy):
        await take(events)


async def test_a_whole_answer_is_read_at_once() -> None:
    """Started, one delta with everything, and the ending; no turns and no parts."""
    stream = opened(Pacer(NEVER))
    answer = asyncio.ensure_future(stream.answer())
    for delta in DELTAS:
        await asyncio.sleep(0)
        push(stream, delta)
    stream.end(FINISHED)
    assert await asyncio.wait_for(answer, WAIT_S) == (STARTED, merge(DELTAS), FINISHED)


async def test_an_answer_without_output_is_an_empty_delta() -> None:
    """A job may end before its first token."""
    stream = opened()
    stream.end(FINISHED)
    assert await stream.answer() == (STARTED, Delta("", (), (), 0), FINISHED)


async def test_whoever_waits_for_a_whole_answer_gets_the_error_instead() -> None:
    """Also one that comes after output was made."""
    stream = opened()
    answer = asyncio.ensure_future(stream.answer())
    await asyncio.sleep(0)
    push(stream, DELTAS[0])
    stream.end(DeviceBusy("later", 1.0))
    with pytest.raises(DeviceBusy):
        await asyncio.wait_for(answer, WAIT_S)


async def test_who_takes_nothing_has_no_share_of_the_messages() -> None:
    """A reader that went off with a message is counted for a second, and again when it is back."""
    now = 1000.0
    pacer = Pacer(100, lambda: now)
    away, there = Peer(), Peer()
    pacer.join(away)
    pacer.join(there)
    assert pacer.interval_s == pytest.approx(0.02)
    away.away_since_s = now
    now += AWAY_S - COUNT_S
    assert pacer.interval_s == pytest.approx(0.02)
    now += COUNT_S
    assert pacer.interval_s == pytest.approx(0.01)
    away.away_since_s = 0.0
    now += COUNT_S
    assert pacer.interval_s == pytest.approx(0.02)
    there.away_since_s = away.away_since_s = now
    now += AWAY_S
    assert pacer.interval_s == 0
    pacer.leave(there)
    pacer.leave(away)
    assert pacer.interval_s == 0


async def test_a_reader_is_away_from_an_event_to_the_next() -> None:
    """What is kept for it meanwhile is known, and let go where it leaves for good."""
    stream = opened()
    events = aiter(stream)
    assert stream.away_since_s == 0
    assert await take(events) == STARTED
    assert stream.away_since_s > 0
    coming = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    assert stream.away_since_s == 0
    for delta in DELTAS:
        push(stream, delta)
    await coming
    assert stream.away_since_s > 0
    assert (0, STARTED.job_id) == (stream.kept_bytes, stream.job_id)
    for num_unread in (1, 2):
        push(stream, DELTAS[1])
        assert stream.kept_bytes > 150 * num_unread
    stream.cancel()
    assert stream.kept_bytes == 0


async def test_what_is_kept_for_a_reader_grows_with_the_alternatives() -> None:
    """A token with log-probabilities is some hundred bytes more."""
    plain, rich = opened(), opened()
    plain.push("ab", (1, 2))
    rich.push("ab", (1, 2), (DELTAS[0].logprobs[0],) * 2)
    assert rich.kept_bytes > 2 * plain.kept_bytes > 0


@pytest.mark.parametrize("leaves_first", [False, True])
async def test_an_ended_stream_keeps_only_what_may_still_be_read(leaves_first: bool) -> None:
    """A handler that hangs in its last write keeps no output, whichever of both comes first."""
    stream = opened()
    events = aiter(stream)
    assert await take(events) == STARTED
    push(stream, DELTAS[0])
    assert await take(events) == DELTAS[0]
    push(stream, DELTAS[1])
    assert stream.whole() == merge(DELTAS[:2])
    if leaves_first:
        stream.cancel()
        push(stream, DELTAS[2])
        assert stream.whole() == merge(DELTAS), "the job is settled by it"
    stream.end(FINISHED)
    if not leaves_first:
        assert await take(events) == DELTAS[1]
        assert await take(events) == FINISHED
        stream.cancel()
    assert ([], [], []) == (stream._pieces, stream._token_ids, stream._logprobs)
    assert stream.kept_bytes == 0
    assert stream.num_tokens == (4 if leaves_first else 3)


class Peer:
    """A reader, as far as the pacer looks at it."""

    away_since_s = 0.0


def long_delta(num_tokens: int, top: int) -> Delta:
    """Output with as many alternatives for each token."""
    best = Logprob(7, -0.5, tuple((i, -1.0) for i in range(top)))
    return Delta("é" * 3 * num_tokens, tuple(range(num_tokens)), (best,) * num_tokens, num_tokens)


async def test_what_a_slow_reader_finds_fits_into_messages() -> None:
    """As many as it takes, at once, and together they say everything."""
    stream = opened(Pacer(NEVER))
    part = long_delta(300, 20)
    for _ in range(10):
        push(stream, part)
    stream.end(FINISHED)
    events = [event async for event in stream]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert 1 < len(deltas)
    assert all(delta.size <= MOST_IN_MESSAGE for delta in deltas)
    assert merge(deltas) == Delta(
        part.text * 10, part.token_ids * 10, part.logprobs * 10, output_tokens=3000
    )


@pytest.mark.parametrize(("num_tokens", "top"), [(3, 20), (5000, 20), (70_000, 0)])
async def test_a_long_output_is_split_into_messages(num_tokens: int, top: int) -> None:
    """A kept result is written at once, whatever it was sent in before."""
    stream = opened()
    stream.push("", (1,) * 4, long_delta(4, top).logprobs)
    whole = long_delta(num_tokens, top)
    push(stream, whole)
    stream.end(FINISHED)
    parts = [event async for event in stream if isinstance(event, Delta)]
    assert all(part.size <= MOST_IN_MESSAGE + 2 * (top + 2) for part in parts)
    said = merge(parts)
    assert (whole.text, 4 + num_tokens) == (said.text, said.output_tokens)
    assert whole.token_ids == said.token_ids[4:]
    assert [part.output_tokens for part in parts] == [
        len([i for part in parts[: n + 1] for i in part.token_ids]) for n in range(len(parts))
    ]


@pytest.mark.parametrize("stop", [(), ("no such text",)])
async def test_each_log_probability_is_delivered_once(stop: tuple[str, ...]) -> None:
    """A delta has those of its own tokens, with stop strings to look for or without."""
    text = SequenceText(Tokenizer.load(MODELS / "demo-tactical").decoder(), stop)
    stream = opened()
    events = aiter(stream)
    assert await take(events) == STARTED
    deltas = []
    for ids in ([20], [21, 22, 23], [24, 25]):
        piece, count = text.push(ids)
        assert count == len(ids)
        stream.push(piece, ids, [Logprob(token_id, -1.0) for token_id in ids])
        deltas.append(await take(events))
    assert [[20], [21, 22, 23], [24, 25]] == [
        [entry.token_id for entry in delta.logprobs] for delta in deltas if isinstance(delta, Delta)
    ]
    assert [1, 4, 6] == [delta.output_tokens for delta in deltas if isinstance(delta, Delta)]
    assert list(range(20, 26)) == [entry.token_id for entry in stream.whole().logprobs]
