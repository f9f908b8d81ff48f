"""How often streams may write, so that all of them together leave the event loop to others.

A message costs gRPC and the event loop some hundred microseconds, whatever is in it. Where many
streams, or a very fast model, make more tokens than there are messages to send them in, tokens
share a message; a first token and an ending never wait.
A stream whose reader takes nothing sends nothing: it is given no share until the reader is back.
Owns the set of streams that write. Knows nothing of what they write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

AWAY_S = 1.0
"""A reader that has not come back from a message for so long takes nothing."""

COUNT_S = 0.25
"""How long a count of the readers that take something is good for."""


class Reading(Protocol):
    """A stream of the pace."""

    @property
    def away_since_s(self) -> float:
        """When its reader went off with a message (`time.monotonic()`); 0 while it waits."""


class Pace:
    """The messages a second that all streams share, evenly.

    Args:
        max_stream_messages_per_s: of all streams together; 0 is no limit.
        clock: `time.monotonic`.
    """

    def __init__(
        self, max_stream_messages_per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_stream_messages_per_s = max_stream_messages_per_s
        self._clock = clock
        self._streams: set[Reading] = set()
        self._num_away = 0
        self._counted_s = 0.0

    @property
    def interval_s(self) -> float:
        """What lies at least between two messages of one stream, now."""
        if not self._max_stream_messages_per_s:
            return 0.0
        now = self._clock()
        if now - self._counted_s >= COUNT_S:
            # Counted now and then: a timer for each message would cost as much as the message.
            self._counted_s = now
            self._num_away = sum(is_away(stream, now) for stream in self._streams)
        return max(len(self._streams) - self._num_away, 0) / self._max_stream_messages_per_s

    def join(self, stream: Reading) -> None:
        """Count a stream that begins to write."""
        self._streams.add(stream)

    def leave(self, stream: Reading) -> None:
        """Count it no more; it may never have begun."""
        self._streams.discard(stream)


def is_away(stream: Reading, now: float) -> bool:
    """Whether the stream's reader takes nothing."""
    since = stream.away_since_s
    return since > 0.0 and now - since >= AWAY_S
