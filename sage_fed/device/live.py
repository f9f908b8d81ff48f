"""The sequences that were accepted and have not ended: one stream each.

Owns them until their ending, which is the device's word, or ours where it has none to say: then
what was delivered is all that is known. Hands a step's tokens to some streams in each turn of the
event loop, so that however many there are, others get their turns between them.
Event loop only. Cannot fail.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sage_fed.device.stream import TokenStream
from sage_fed.device.words import Ended, EndReason, SequenceSpec
from sage_fed.steps import SampledToken

_STREAMS_A_TURN = 32
"""A stream takes some 5 µs to hand its tokens, and its reader some 100 to write them."""


class LiveStreams:
    """Streams by sequence id; `clock` is the executor's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._streams: dict[int, TokenStream] = {}
        # What has come and not been handed over yet, in order.
        self._come: dict[int, list[SampledToken]] = {}
        self._ended: dict[int, Ended] = {}
        self._turn_is_due = False

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[TokenStream]:
        """Those that live now; they may end meanwhile."""
        return iter(tuple(self._streams.values()))

    def find(self, seq_id: int) -> TokenStream | None:
        """Return the stream of a sequence that has not ended."""
        return self._streams.get(seq_id)

    def open(self, spec: SequenceSpec, submitted_s: float) -> TokenStream:
        """Return the stream of a sequence that was accepted."""
        stream = self._streams[spec.seq_id] = TokenStream(spec, submitted_s)
        return stream

    def take(self, drawn: Mapping[int, Sequence[SampledToken]], ended: Iterable[Ended]) -> None:
        """Take in the device's news; of a sequence that has ended here, they are not heard."""
        for seq_id, tokens in drawn.items():
            self._come.setdefault(seq_id, []).extend(tokens)
        for ending in ended:
            self._come.setdefault(ending.seq_id, [])
            self._ended[ending.seq_id] = ending
        if not self._turn_is_due:
            self._hand_over(_STREAMS_A_TURN)

    def _next_turn(self) -> None:
        self._turn_is_due = False
        self._hand_over(_STREAMS_A_TURN)

    def _hand_over(self, most: int) -> None:
        """Hand over what came first, and the rest in the loop's next turns."""
        for seq_id in tuple(itertools.islice(self._come, most)):
            tokens = self._come.pop(seq_id)
            ending = self._ended.pop(seq_id, None)
            stream = self._streams.get(seq_id)
            if stream is None:
                continue
            if tokens:
                stream.push(tokens)
            if ending is not None:
                del self._streams[seq_id]
                stream.end(ending)
        if self._come and not self._turn_is_due:
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def end_all(self, reason: EndReason) -> None:
        """End what the device's thread did not end itself."""
        self._hand_over(len(self._come))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(
                Ended(
                    seq_id=stream.spec.seq_id,
                    reason=reason,
                    submitted_s=stream.submitted_s,
                    ended_s=self._clock(),
                    output_tokens=stream.num_tokens,
                )
            )

    async def wait_ended(self) -> None:
        """Wait until all that live now have ended."""
        for stream in self:
            await stream.wait_ended()
