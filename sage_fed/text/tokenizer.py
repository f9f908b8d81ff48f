"""One checkpoint's tokenizer: conversations and text to ids, ids to text.

Owns the chat template and the promise that nothing a client writes becomes a control token.
Does not know tiers, jobs or the model that consumes the ids.
Fails with `ModelLoadError` at load and with `InvalidField` for a prompt that cannot be encoded.

Encoding is blocking (seconds for megabytes): call it in a thread. A `Tokenizer` may be used
from any number of threads at once: nothing but its caches changes after construction, its two Rust
tokenizers release the interpreter lock while they encode, and the flags that `transformers`
flips per call (the cause of its "Already borrowed") are fixed in two of them instead, which
share one vocabulary.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
import tokenizers

from sage_fed.core import Message
from sage_fed.errors import InvalidField
from sage_fed.text.decoding import ByteDecoder, IncrementalDecoder, WindowDecoder
from sage_fed.text.length import LengthBound
from sage_fed.text.source import TokenizerSource, locate_tokenizer, read_source
from sage_fed.text.template import ChatTemplate

ROLES = ("system", "user", "assistant")

_MAX_SKELETONS = 64
"""Sequences of roles whose skeletons are kept: short conversations are most of them."""


class Tokenizer:
    """The tokenizer and chat template of one checkpoint. Thread-safe.

    `num_valid_ids` is one above the largest id that has a meaning; a model's padded
    vocabulary is larger, and its logits beyond this are noise.
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._rust = source.backend
        self._rust.no_truncation()
        self._rust.no_padding()
        self._literal = _sibling(source.backend)
        self._literal.encode_special_tokens = True
        self._byte_level = isinstance(source.backend.decoder, tokenizers.decoders.ByteLevel)
        self._byte_of = _byte_alphabet()
        added = self._rust.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._special_text = _alternation(self._special)
        # Where a vocabulary has no bytes, an unknown character honestly is the unk token.
        unk = source.named.get("unk_token")
        self._unk_id: int | None = None if unk is None else self._rust.token_to_id(unk)
        self._control_ids = self._special_ids - {self._unk_id}
        self._bytes: dict[int, bytes] = {}
        self.num_valid_ids = _num_ids(self._rust)
        self._length = LengthBound(self._rust)
        self._source = source
        self._template = ChatTemplate(source.template, source.named) if source.template else None
        # Rendering is most of an encoding: what depends on the roles alone is rendered once.
        timeless = self._template is not None and self._template.timeless
        self._skeleton = lru_cache(_MAX_SKELETONS if timeless else 0)(self._render_skeleton)

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> Tokenizer:
        """Reads it from a local directory or, pinned to `revision`, from the hub.

        Blocking. Never runs code of the checkpoint. Raises `ModelLoadError`.
        """
        return cls(read_source(locate_tokenizer(source, revision)))

    def warm_up(self) -> None:
        """Compile the template, which takes tens of milliseconds, before a conversation comes.

        One that is broken says so to each conversation; token ids need none.
        """
        with contextlib.suppress(InvalidField):
            self.encode_messages([Message("user", "?")])

    def encodes_like(self, other: Tokenizer) -> bool:
        """Whether every conversation has the same ids here and there."""
        mine, its = self._source, other._source
        alike = (mine.template, mine.named) == (its.template, its.named)
        # Before a vocabulary is written out twice, which takes a large one a tenth of a second.
        alike = alike and self.num_valid_ids == other.num_valid_ids
        return alike and mine.backend.to_str() == its.backend.to_str()

    def encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation under the chat template, ready for the assistant's turn.

        Equal to `transformers`' `apply_chat_template`, except that special tokens spelled out
        in a message stay plain text. Raises `InvalidField` where the model has no template,
        or one that refuses or leaves out a message.
        """
        self._check(messages)
        skeleton = self._skeleton(tuple(message.role for message in messages))
        if (left_out := skeleton.left_out) is not None:
            raise InvalidField(
                f"job.chat.messages[{left_out}]",
                f"the model's chat template leaves out this {messages[left_out].role} message",
            )
        nonce, specials = skeleton.nonce, tuple(self._special)
        turns = [(message.role, message.content) for message in messages]
        if any(self._special_text.search(content) for _, content in turns):
            numbers = {text: f"{nonce}#{i}#" for i, text in enumerate(specials)}
            turns = [
                (role, self._special_text.sub(lambda hit: numbers[hit[0]], content))
                for role, content in turns
            ]
        text = self._render(turns)
        # A template may cut and join contents so that a control token comes into being that
        # it did not write; then the contents go in untouched by it.
        if self._special_text.findall(text) != skeleton.controls:
            text = skeleton.text
        if nonce not in text and (ids := self._encode_marked(text, skeleton.controls)) is not None:
            return ids
        contents = [message.content for message in messages]
        return self._encode_pieces(text, _Marks(nonce, specials, contents))

    def least_tokens(self, messages: Sequence[Message]) -> int:
        """Return a number of tokens that a conversation has or exceeds, without encoding it."""
        self._check(messages)
        turns = [(message.role, message.content) for message in messages]
        return self._length.least_tokens(self._render(turns))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of bare text: no template, and special tokens spelled out stay plain text."""
        ids = self._literal.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if any(id_ in self._special_ids and id_ != self._unk_id for id_ in ids):
            raise InvalidField(
                "job.chat", "a message spells a control token that this tokenizer cannot escape"
            )
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens and without any clean-up of spaces."""
        return str(self._rust.decode(list(token_ids), skip_special_tokens=True))

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one stream of ids."""
        return ByteDecoder(self) if self._byte_level else WindowDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        """What a byte-level token adds to the text; empty for special and meaningless ids."""
        known = self._bytes.get(token_id)
        if known is None:
            # Streams ask for every token, and a vocabulary has an end.
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        token = self._rust.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:
            return token.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special_ids

    def validate_ids(self, token_ids: Sequence[int]) -> None:
        """Refuses an empty prompt and ids without a meaning, with `InvalidField`."""
        if not token_ids:
            raise InvalidField("job.token_ids.ids", "give at least one token id")
        # In C: a context may have a hundred thousand, of which mostly none is wrong.
        if min(token_ids) >= 0 and max(token_ids) < self.num_valid_ids:
            return
        for i, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.num_valid_ids:
                raise InvalidField(
                    f"job.token_ids.ids[{i}]",
                    f"{token_id} is not a token of this model; ids are 0 to "
                    f"{self.num_valid_ids - 1}",
                )

    def _check(self, messages: Sequence[Message]) -> None:
        if self._template is None:
            raise InvalidField("job.chat", "this model has no chat template; send token_ids")
        if not messages:
            raise InvalidField("job.chat.messages", "give at least one message")
        for i, message in enumerate(messages):
            if message.role not in ROLES:
                raise InvalidField(f"job.chat.messages[{i}].role", f"one of {', '.join(ROLES)}")

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        assert self._template is not None
        try:
            return self._template.render(turns)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            reason = str(error)[:200]
            raise InvalidField(
                "job.chat.messages", f"the model's chat template refuses them: {reason}"
            ) from error

    def _render_skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        # Unguessable, so that no message can contain a mark.
        nonce = secrets.token_hex(8)
        marks = [f"{nonce}@{i}@" for i in range(len(roles))]
        text = self._render(list(zip(roles, marks, strict=True)))
        left_out = next((i for i, mark in enumerate(marks) if mark not in text), None)
        return _Skeleton(nonce, text, self._special_text.findall(text), left_out)

    def _encode_marked(self, text: str, controls: Sequence[str]) -> tuple[int, ...] | None:
        """Encodes text whose special tokens are `controls`, the template's own.

        None where the tokenizer sees more of them than the text spells (it normalises first).
        """
        ids = self._rust.encode_batch_fast([text], add_special_tokens=False)[0].ids
        found = sum(map(self._control_ids.__contains__, ids))
        spelled = sum(self._special[control] != self._unk_id for control in controls)
        return tuple(ids) if found == spelled else None

    def _encode_pieces(self, text: str, marks: _Marks) -> tuple[int, ...]:
        """Encodes the template's control tokens one by one and what is between them literally."""
        ids: list[int] = []
        position = 0
        for hit in self._special_text.finditer(text):
            ids += self.encode_text(marks.restore(text[position : hit.start()]))
            ids.append(self._special[hit[0]])
            position = hit.end()
        ids += self.encode_text(marks.restore(text[position:]))
        return tuple(ids)


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A template rendered with a mark in place of each content; the same for the same roles.

    `controls` are the control tokens that the template writes, `left_out` is the first message
    that it does not show.
    """

    nonce: str
    text: str
    controls: list[str]
    left_out: int | None


class _Marks:
    """Puts back what was replaced by marks: whole contents and special tokens' spellings."""

    def __init__(self, nonce: str, specials: Sequence[str], contents: Sequence[str]) -> None:
        self._pattern = re.compile(rf"{nonce}(?:#(\d+)#|@(\d+)@)")
        self._specials = specials
        self._contents = contents

    def restore(self, text: str) -> str:
        return self._pattern.sub(self._original, text)

    def _original(self, mark: re.Match[str]) -> str:
        return self._specials[int(mark[1])] if mark[1] else self._contents[int(mark[2])]


def _sibling(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer with flags of its own that shares the vocabulary: a copy takes long to make."""
    sibling = tokenizers.Tokenizer(backend.model)
    sibling.normalizer = backend.normalizer
    sibling.pre_tokenizer = backend.pre_tokenizer
    sibling.post_processor = backend.post_processor
    sibling.decoder = backend.decoder
    added = backend.get_added_tokens_decoder()
    sibling.add_tokens([token for _, token in sorted(added.items())])
    assert sibling.get_added_tokens_decoder() == added, "added tokens are numbered in order"
    return sibling


def _num_ids(backend: tokenizers.Tokenizer) -> int:
    """One above the largest id; asking for the whole vocabulary takes far longer."""
    count = int(backend.get_vocab_size(with_added_tokens=True))
    if None not in map(backend.id_to_token, range(count)):
        return count
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def _alternation(texts: Sequence[str] | dict[str, int]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first, as the tokenizer does; nothing if empty."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
