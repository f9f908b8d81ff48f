"""Stop strings in a stream of text.

Knows text only, no tokens. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Ends a text before the first stop string that it completes.

    The stop string that is complete first wins, of two at once the longer; so the outcome does
    not depend on how the text is cut into pieces, and generation ends as early as it can.
    Only what may yet become a stop string is held back. Knuth-Morris-Pratt: constant time
    a character and stop string, amortised. `stops` are not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match at once"
        self._stops = tuple(stops)
        self._failures = tuple(_failure_table(stop) for stop in stops)
        self._states = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string ended it); not called after a match."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        for end in range(len(self._held) + 1, len(buffer) + 1):
            matched = self._advance(buffer[end - 1])
            if matched:
                self._held = ""
                return buffer[: end - matched], True
        certain = len(buffer) - max(self._states, default=0)
        self._held = buffer[certain:]
        return buffer[:certain], False

    def finish(self) -> str:
        """What was held back; the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """The length of the longest stop string that `char` completes, or 0."""
        matched = 0
        for i, (stop, failure) in enumerate(zip(self._stops, self._failures, strict=True)):
            state = self._states[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            state += stop[state] == char
            self._states[i] = state
            if state == len(stop):
                matched = max(matched, state)
        return matched


def _failure_table(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper prefix that is a suffix."""
    table = [0] * len(stop)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[i] != stop[state]:
            state = table[state - 1]
        state += stop[i] == stop[state]
        table[i] = state
    return tuple(table)
