"""What a reader of a job's stream finds: in order, merged where it may be, and never late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fake_engine import WAIT_S
from service_harness import DELTAS, FINISHED, STARTED

from sage_fed.broker.mailbox import JobStream, merge
from sage_fed.broker.pace import Pace
from sage_fed.core import Delta, Event
from sage_fed.errors import DeviceBusy

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
