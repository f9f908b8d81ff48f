"""From a stream of token ids to a stream of text: whole characters, cut at stop strings.

Asks two questions of a vocabulary; knows no jobs. Cannot fail: what is no UTF-8 becomes
replacement characters, as in the decoding of the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 64


class Vocabulary(Protocol):
    """What a decoder asks of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a byte-level token adds to the text; empty for special and meaningless ids."""


class IncrementalDecoder:
    """Turns one stream of token ids into text, whole characters only.

    The pieces of `push` and the rest from `finish` join to `Vocabulary.decode` of all ids.
    Constant time a token, amortised.
    """

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete; empty where they end inside a character."""
        raise NotImplementedError

    def finish(self) -> str:
        """What is left at the end: replacement characters for a character cut short."""
        raise NotImplementedError


class ByteDecoder(IncrementalDecoder):
    """For byte-level vocabularies (Qwen, Llama 3): every token is bytes, so UTF-8 decides."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """See `IncrementalDecoder`."""
        return self._utf8.decode(b"".join(map(self._vocabulary.token_bytes, token_ids)))

    def finish(self) -> str:
        """See `IncrementalDecoder`."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder(IncrementalDecoder):
    """For every other vocabulary (SentencePiece: Llama 2, Mistral): decodes a sliding window.

    The tokens of the last piece are decoded again before the new ones, so that effects of a
    text's beginning (a stripped space) do not repeat in its middle; the method of TGI and vLLM.
    A window that adds no text or ends inside a character waits, at most `_MAX_HELD_TOKENS` tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._read = 0
        """Tokens of the window whose text has been given out."""

    def push(self, token_ids: Sequence[int]) -> str:
        """See `IncrementalDecoder`."""
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """See `IncrementalDecoder`."""
        before = self._vocabulary.decode(self._window[: self._read])
        return self._vocabulary.decode(self._window)[len(before) :]

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._vocabulary.decode(self._window[: self._read])
        now = self._vocabulary.decode(self._window)
        held = len(self._window) - self._read
        complete = len(now) > len(before) and not now.endswith(_REPLACEMENT)
        if not complete and held < _MAX_HELD_TOKENS:
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return now[len(before) :]


class StopMatcher:
    """Ends a text before the first stop string that it completes.

    The stop string that is complete first wins, of two at once the longer; so the outcome does
    not depend on how the text is cut into pieces, and generation ends as early as it can.
    Only what may yet become a stop string is held back. `stops` are not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match at once"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string ended it); not called after a match."""
        buffer = self._held + text
        hits = [(at + len(s), at) for s in self._stops if (at := buffer.find(s)) >= 0]
        if hits:
            self._held = ""
            return buffer[: min(hits)[1]], True
        certain = len(buffer) - max((_begun(s, buffer) for s in self._stops), default=0)
        self._held = buffer[certain:]
        return buffer[:certain], False

    def finish(self) -> str:
        """What was held back; the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _begun(stop: str, text: str) -> int:
    """The length of the longest proper prefix of `stop` that `text` ends with."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
