"""One job's output: tokens to text, cut at a stop string, and kept for the result.

Owns the stream's decoder and stop matcher. Knows no queues, clocks or money.
"""

from __future__ import annotations

from collections.abc import Sequence

from sage_fed.core import Delta, Logprob
from sage_fed.steps import SampledToken
from sage_fed.text import IncrementalDecoder, StopMatcher


class Output:
    """What a job has delivered so far."""

    def __init__(self, decoder: IncrementalDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._matcher = StopMatcher(stops)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprob] = []

    @property
    def num_tokens(self) -> int:
        """Tokens delivered so far."""
        return len(self._token_ids)

    def push(self, drawn: Sequence[SampledToken]) -> tuple[Delta, bool]:
        """Return what these tokens add, and whether a stop string ended the text.

        Tokens behind the one that completes a stop string are dropped: never delivered, so
        never charged.
        """
        if not self._stops:
            return self._push_whole(drawn), False
        pieces: list[str] = []
        first, matched = len(self._token_ids), False
        first_logprob = len(self._logprobs)
        for token in drawn:
            self._token_ids.append(token.token_id)
            if token.logprob is not None:
                self._logprobs.append(token.logprob)
            text, matched = self._matcher.push(self._decoder.push((token.token_id,)))
            pieces.append(text)
            if matched:
                break
        return self._delta("".join(pieces), first, first_logprob), matched

    def _push_whole(self, drawn: Sequence[SampledToken]) -> Delta:
        """Take tokens together: nothing but a stop string cares where one ends."""
        first, first_logprob = len(self._token_ids), len(self._logprobs)
        ids = [token.token_id for token in drawn]
        self._token_ids += ids
        self._logprobs += [token.logprob for token in drawn if token.logprob is not None]
        return self._delta(self._decoder.push(ids), first, first_logprob)

    def finish(self) -> tuple[Delta, bool]:
        """Return the text that was held back, now that no more tokens come."""
        text, matched = self._matcher.push(self._decoder.finish())
        if not matched:
            text += self._matcher.finish()
        return self._delta(text, len(self._token_ids), len(self._logprobs)), matched

    def whole(self) -> Delta:
        """Return everything delivered as one delta."""
        return Delta(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            output_tokens=len(self._token_ids),
        )

    def _delta(self, text: str, first: int, first_logprob: int) -> Delta:
        self._text.append(text)
        return Delta(
            text=text,
            token_ids=tuple(self._token_ids[first:]),
            logprobs=tuple(self._logprobs[first_logprob:]),
            output_tokens=len(self._token_ids),
        )
