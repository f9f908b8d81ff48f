"""How many tokens a text has at least, by its length alone.

A token of a vocabulary stands for no more text than its longest entry does, so a text that is far
too long for a context can be refused without being encoded, which takes a hundred times as long.
That holds only where a tokenizer neither shortens a text nor joins what it does not know; of any
other nothing is said, and its texts are encoded.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import tokenizers

_KEEPING = frozenset({"ByteLevel", "Digits", "Punctuation", "Split", "Metaspace"})
"""Pre-tokenizers that cut a text and leave nothing out, unless they are told to."""


class LengthBound:
    """What one tokenizer's vocabulary says of the lengths of texts."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._bytes = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        normalizers = list(_parts(backend.normalizer, "normalizers"))
        self._composes = any(part["type"] == "NFC" for part in normalizers)
        added = backend.get_added_tokens_decoder().values()
        self._swallows_spaces = any(token.lstrip or token.rstrip for token in added)
        sound = (
            isinstance(backend.model, tokenizers.models.BPE)
            # What has no token is spelled in bytes, and not one token for all of it.
            and (self._bytes or backend.model.byte_fallback)
            and all(map(_keeps_length, normalizers))
            and all(map(_leaves_nothing_out, _parts(backend.pre_tokenizer, "pretokenizers")))
        )
        self.longest = _longest_token(backend, in_bytes=self._bytes) if sound else 0
        """Bytes (or characters, without a byte-level vocabulary) of the longest token; 0 is
        unknown."""

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` has or exceeds; 0 where nothing is known."""
        if not self.longest:
            return 0
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return 0  # it may become shorter
        if self._swallows_spaces:
            text = "".join(text.split())
        length = len(text.encode(errors="replace")) if self._bytes else len(text)
        return -(-length // self.longest)


def _longest_token(backend: tokenizers.Tokenizer, *, in_bytes: bool) -> int:
    """Return the length of the longest entry; the characters of byte-level ones are bytes."""
    added = (token.content for token in backend.get_added_tokens_decoder().values())
    own = max(map(len, backend.get_vocab(with_added_tokens=False)), default=0)
    return max(own, *(len(text.encode()) if in_bytes else len(text) for text in added), 0)


def _parts(step: Any, several: str) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - the library's
    """Return the parts of a normalizer or pre-tokenizer, sequences taken apart."""
    if step is None:
        return
    todo = [json.loads(step.__getstate__())]
    while todo:
        part = todo.pop()
        if part["type"] == "Sequence":
            todo += part[several]
        else:
            yield part


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    match normalizer:
        case {"type": "NFC" | "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(instead)}:
            return len(instead) >= len(found)
        case _:
            return False


def _leaves_nothing_out(pre_tokenizer: dict[str, Any]) -> bool:
    removes = pre_tokenizer.get("behavior") == "Removed"
    return pre_tokenizer["type"] in _KEEPING and not removes
