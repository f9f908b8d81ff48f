"""The sequences that were accepted and have not ended: one stream each.

Owns them until their ending, which is the device's word, or ours where it has none to say: then
what was delivered is all that is known. Event loop only. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sage_fed.executor.stream import TokenStream
from sage_fed.scheduler import Ended, EndReason, SequenceSpec
from sage_fed.steps import Drawn


class LiveStreams:
    """Streams by sequence id; `clock` is the executor's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._streams: dict[int, TokenStream] = {}

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

    def take(self, drawn: Mapping[int, Sequence[Drawn]], ended: Iterable[Ended]) -> None:
        """Take in the device's news; of a sequence that has ended here, they are not heard."""
        for seq_id, tokens in drawn.items():
            if stream := self._streams.get(seq_id):
                stream.push(tokens)
        for ending in ended:
            if stream := self._streams.pop(ending.seq_id, None):
                stream.end(ending)

    def end_all(self, reason: EndReason) -> None:
        """End what the device's thread did not end itself."""
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
