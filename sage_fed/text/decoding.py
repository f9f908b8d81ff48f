"""From a stream of token ids to a stream of text, without ever half a character.

Knows a vocabulary through two questions only. Cannot fail: what is no UTF-8 becomes
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
