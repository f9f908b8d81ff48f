"""How often streams may write, so that all of them together leave the event loop to others.

A message costs gRPC and the event loop some hundred microseconds, whatever is in it. Where many
streams, or a very fast model, make more tokens than there are messages to send them in, tokens
share a message; a first token and an ending never wait.
Owns the set of streams that write. Knows nothing of what they write.
"""

from __future__ import annotations


class Pace:
    """The messages a second that all streams share, evenly.

    Args:
        max_stream_messages_per_s: of all streams together; 0 is no limit.
    """

    def __init__(self, max_stream_messages_per_s: float) -> None:
        self._max_stream_messages_per_s = max_stream_messages_per_s
        self._streams: set[object] = set()

    @property
    def interval_s(self) -> float:
        """What lies at least between two messages of one stream, now."""
        if not self._max_stream_messages_per_s:
            return 0.0
        return len(self._streams) / self._max_stream_messages_per_s

    def join(self, stream: object) -> None:
        """Count a stream that begins to write."""
        self._streams.add(stream)

    def leave(self, stream: object) -> None:
        """Count it no more; it may never have begun."""
        self._streams.discard(stream)
