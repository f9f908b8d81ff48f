"""What a reader of a job's stream finds: in order, merged where it may be, and never late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from fake_engine import WAIT_S
from service_harness import DELTAS, FINISHED, STARTED

from sage_fed.core import Delta, Event, Logprob
from sage_fed.errors import DeviceBusy
from sage_fed.jobs.mailbox import MOST_IN_MESSAGE, JobStream, merge, split
from sage_fed.jobs.pace import AWAY_S, COUNT_S, Pace

NEVER = 1e-6
"""Messages a second: nobody's second delta is due while a test runs."""


def opened(pace: Pace | None = None) -> JobStream:
    """A stream of an accepted job."""
    stream = JobStream(on_cancel=lambda: None, pace=pace or Pace(0))
    stream.start(STARTED)
    return stream


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
        stream.push(delta)
        assert await take(events) == delta
    stream.end(FINISHED)
    assert await take(events) == FINISHED
    with pytest.raises(StopAsyncIteration):
        await take(events)


async def test_the_first_delta_and_the_ending_do_not_wait_for_their_turn() -> None:
    """What came between them shares one message, and nothing of it is lost or late."""
    stream = opened(Pace(NEVER))
    events = aiter(stream)
    assert await take(events) == STARTED
    stream.push(DELTAS[0])
    assert await take(events) == DELTAS[0]
    waiting = asyncio.ensure_future(anext(events))
    for delta in DELTAS[1:]:
        stream.push(delta)
        await asyncio.sleep(0)
        assert not waiting.done()
    stream.end(FINISHED)
    assert await asyncio.wait_for(waiting, WAIT_S) == merge(list(DELTAS[1:]))
    assert await take(events) == FINISHED


async def test_a_stream_whose_turn_has_come_goes_on_by_itself() -> None:
    """Its tokens gather until then, and need no further one to be sent."""
    stream = opened(Pace(20))
    events = aiter(stream)
    assert await take(events) == STARTED
    for delta in DELTAS:
        stream.push(delta)
        assert await take(events) == delta


async def test_streams_share_the_messages_until_they_are_left() -> None:
    """Who has left, read to its end or not, slows nobody down any more."""
    pace = Pace(100)
    first, second = opened(pace), opened(pace)
    assert pace.interval_s == 0
    for stream in (first, second):
        assert await take(aiter(stream)) == STARTED
    assert pace.interval_s == pytest.approx(0.02)
    first.cancel()
    first.cancel()
    assert pace.interval_s == pytest.approx(0.01)
    second.cancel()
    assert pace.interval_s == 0


async def test_an_error_ends_a_stream_that_waits_for_its_turn() -> None:
    """With the output that was made before it."""
    stream = opened(Pace(NEVER))
    events = aiter(stream)
    assert await take(events) == STARTED
    stream.push(DELTAS[0])
    assert await take(events) == DELTAS[0]
    stream.push(DELTAS[1])
    stream.end(DeviceBusy("later", 1.0))
    assert await take(events) == DELTAS[1]
    with pytest.raises(DeviceBusy):
        await take(events)


async def test_a_whole_answer_is_read_at_once() -> None:
    """Started, one delta with everything, and the ending; no turns and no parts."""
    stream = opened(Pace(NEVER))
    answer = asyncio.ensure_future(stream.answer())
    for delta in DELTAS:
        await asyncio.sleep(0)
        stream.push(delta)
    stream.end(FINISHED)
    assert await asyncio.wait_for(answer, WAIT_S) == (STARTED, merge(list(DELTAS)), FINISHED)


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
    stream.push(DELTAS[0])
    stream.end(DeviceBusy("later", 1.0))
    with pytest.raises(DeviceBusy):
        await asyncio.wait_for(answer, WAIT_S)


async def test_who_takes_nothing_has_no_share_of_the_messages() -> None:
    """A reader that went off with a message is counted for a second, and again when it is back."""
    now = 1000.0
    pace = Pace(100, lambda: now)
    away, there = Peer(), Peer()
    pace.join(away)
    pace.join(there)
    assert pace.interval_s == pytest.approx(0.02)
    away.away_since_s = now
    now += AWAY_S - COUNT_S
    assert pace.interval_s == pytest.approx(0.02)
    now += COUNT_S
    assert pace.interval_s == pytest.approx(0.01)
    away.away_since_s = 0.0
    now += COUNT_S
    assert pace.interval_s == pytest.approx(0.02)
    there.away_since_s = away.away_since_s = now
    now += AWAY_S
    assert pace.interval_s == 0
    pace.leave(there)
    pace.leave(away)
    assert pace.interval_s == 0


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
        stream.push(delta)
    await coming
    assert stream.away_since_s > 0
    assert (0, STARTED.job_id) == (stream.kept_bytes, stream.job_id)
    plain, rich = Delta("a", (1,), (), 5), Delta("b", (2, 3), (DELTAS[0].logprobs[0],) * 2, 7)
    stream.push(plain)
    few = stream.kept_bytes
    stream.push(rich)
    assert stream.kept_bytes > 3 * few > 0
    stream.cancel()
    assert stream.kept_bytes == 0


class Peer:
    """A stream, as far as the pace looks at it."""

    away_since_s = 0.0


def long_delta(num_tokens: int, top: int) -> Delta:
    """Output with as many alternatives for each token."""
    best = Logprob(7, -0.5, tuple((i, -1.0) for i in range(top)))
    return Delta("é" * 3 * num_tokens, tuple(range(num_tokens)), (best,) * num_tokens, num_tokens)


async def test_what_a_slow_reader_finds_fits_into_messages() -> None:
    """As many as it takes, at once, and together they say everything."""
    stream = opened(Pace(NEVER))
    part = long_delta(300, 20)
    for number in range(10):
        stream.push(replace(part, output_tokens=300 * (number + 1)))
    stream.end(FINISHED)
    events = [event async for event in stream]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert 1 < len(deltas)
    assert all(delta.size <= MOST_IN_MESSAGE for delta in deltas)
    assert merge(deltas) == Delta(
        part.text * 10, part.token_ids * 10, part.logprobs * 10, output_tokens=3000
    )


@pytest.mark.parametrize(("num_tokens", "top"), [(3, 20), (5000, 20), (70_000, 0)])
def test_one_long_delta_is_split_into_messages(num_tokens: int, top: int) -> None:
    """A kept result is one, whatever it was sent in before."""
    whole = replace(long_delta(num_tokens, top), output_tokens=num_tokens + 4)
    parts = list(split(whole))
    assert all(part.size <= MOST_IN_MESSAGE + 2 * (top + 2) for part in parts)
    assert whole == merge(parts)
    assert [part.output_tokens for part in parts] == [
        4 + len([i for part in parts[: n + 1] for i in part.token_ids]) for n in range(len(parts))
    ]
