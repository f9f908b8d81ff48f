"""One checkpoint's tokenizer: conversations and text to ids, ids to text.

Owns the chat template and the promise that nothing a client writes becomes a control token.
Does not know tiers, jobs or the model that consumes the ids.
Fails with `ModelLoadError` at load and with `InvalidField` for a prompt that cannot be encoded.

Encoding is blocking (seconds for megabytes): call it in a thread. A `Tokenizer` may be used
from any number of threads at once: nothing but its caches changes after construction, its two Rust
tokenizers release the interpreter lock while they encode, and the flags that `transformers`
flips per call (the cause of its "Already borrowed") are never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import jinja2
import tokenizers

from sage_fed.core import Message
from sage_fed.errors import InvalidField
from sage_fed.text.control import ControlEncoder, control_tokens, num_ids, unknown_ids
from sage_fed.text.decoding import ByteDecoder, IncrementalDecoder, WindowDecoder
from sage_fed.text.length import LengthBound
from sage_fed.text.source import TokenizerSource, locate_tokenizer, read_source
from sage_fed.text.template import ChatTemplate
from sage_fed.text.traced import Traced, own_text

ROLES = ("system", "user", "assistant")

_MAX_ROLES = 64
"""Sequences of roles that are known to be shown: short conversations are most of them."""

_PROBES = (
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user"),
    ("user",),
)
"""Who speaks in the conversations that show what a template writes."""

_MARKS = ("sagefedprobe", "zyqxwvk", "0918273645", "\u00e4\u00f6\u00fc")
"""Harmless texts that no template writes and that survive trimming and changes of case; the first
that spells no added token shows what the template writes."""

_TIMES = {"system": 1, "user": 2, "assistant": 3}
"""How often a probe's message says the mark, by who speaks."""


class Tokenizer:
    """The tokenizer and chat template of one checkpoint. Thread-safe.

    `num_valid_ids` is one above the largest id that has a meaning; a model's padded
    vocabulary is larger, and its logits beyond this are noise. `unknown_ids` are those below
    it that have none.
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._rust = source.backend
        self._rust.no_truncation()
        self._rust.no_padding()
        self._byte_level = isinstance(source.backend.decoder, tokenizers.decoders.ByteLevel)
        self._byte_of = _byte_alphabet()
        added = self._rust.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._bytes: dict[int, bytes] = {}
        self.num_valid_ids = num_ids(self._rust)
        self.unknown_ids = unknown_ids(self._rust, self.num_valid_ids)
        self._length = LengthBound(self._rust)
        self.most_text_bytes = self._find_most_text_bytes()
        """Bytes of UTF-8 that one token can add to a text at most."""
        self._source = source
        self._template = ChatTemplate(source.template, source.named) if source.template else None
        self._mark = _harmless(token.content for token in added.values())
        probes = self._probes()
        unk = None if self._byte_level else source.named.get("unk_token")
        self._encoder = ControlEncoder(
            self._rust,
            control_tokens(self._rust, [source.template or "", *map(own_text, probes)]),
            # Where a vocabulary has no bytes, an unknown character honestly is the unk token.
            unknown=None if unk is None else self._rust.token_to_id(unk),
        )
        self._followed = all(map(self._encodes_as_it_is, probes))
        self.end_token_ids = self._find_end_tokens(probes)
        self._left_out = lru_cache(_MAX_ROLES)(self._find_left_out)

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> Tokenizer:
        """Reads it from a local directory or, pinned to `revision`, from the hub.

        Blocking. Never runs code of the checkpoint. Raises `ModelLoadError`.
        """
        return cls(read_source(locate_tokenizer(source, revision)))

    def encodes_like(self, other: Tokenizer) -> bool:
        """Whether every conversation has the same ids here and there."""
        mine, its = self._source, other._source
        alike = (mine.template, mine.named) == (its.template, its.named)
        # Before a vocabulary is written out twice, which takes a large one a tenth of a second.
        alike = alike and self.num_valid_ids == other.num_valid_ids
        return alike and mine.backend.to_str() == its.backend.to_str()

    def encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation under the chat template, ready for the assistant's turn.

        Equal to `transformers`' `apply_chat_template`, except that control tokens spelled out
        in a message stay plain text. Raises `InvalidField` where the model has no template,
        or one that refuses a message, or leaves it out whatever it says.
        """
        self._check(messages)
        roles = tuple(message.role for message in messages)
        if (left_out := self._left_out(roles)) is not None:
            raise InvalidField(
                f"job.chat.messages[{left_out}]",
                f"the model's chat template leaves out this {roles[left_out]} message",
            )
        text = self._render([(message.role, message.content) for message in messages])
        return self._encoder.encode(text)

    def least_tokens(self, messages: Sequence[Message]) -> int:
        """Return a number of tokens that a conversation has or exceeds, without encoding it."""
        self._check(messages)
        turns = [(message.role, message.content) for message in messages]
        return self._length.least_tokens(str.__str__(self._render(turns)))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of bare text: no template, and control tokens spelled out stay plain text."""
        return self._encoder.encode(text)

    def control_id(self, text: str) -> int | None:
        """The id of the token that `decode` leaves out and `text` spells, if it spells one."""
        return self._special.get(text)

    def token_text(self, token_id: int) -> str:
        """How the tokenizer's own files spell a token; empty for an id without a meaning."""
        return self._rust.id_to_token(token_id) or ""

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

    def _find_most_text_bytes(self) -> int:
        spelled = self._rust.get_vocab(with_added_tokens=False)
        added = self._rust.get_added_tokens_decoder().values()
        most = max((len(token.content.encode()) for token in added), default=0)
        # A byte that makes no character becomes U+FFFD, which has three.
        if not self._byte_level:
            return max(3, most, max((len(token.encode()) for token in spelled), default=0))
        longest = max(map(len, spelled), default=0)
        for token in spelled:
            if 3 * len(token) > longest:
                text = bytes(self._byte_of.get(char, 0) for char in token).decode(errors="replace")
                most = max(most, len(text.encode()))
        return max(3, most)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special_ids

    def validate_ids(self, token_ids: Sequence[int]) -> None:
        """Refuses an empty prompt and ids without a meaning, with `InvalidField`."""
        if not token_ids:
            raise InvalidField("job.token_ids.ids", "give at least one token id")
        self.require_ids("job.token_ids.ids", token_ids)

    def require_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuses ids without a meaning, with an `InvalidField` of that field."""
        # In C: a context may have a hundred thousand, of which mostly none is wrong.
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.num_valid_ids):
            return
        for i, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.num_valid_ids:
                raise InvalidField(
                    f"{field}[{i}]",
                    f"{token_id} is not a token of this model; ids are 0 to "
                    f"{self.num_valid_ids - 1}",
                )

    def _check(self, messages: Sequence[Message]) -> None:
        if self._template is None:
            raise InvalidField("job.chat", "this model has no chat template; send token_ids")
        if not self._followed:
            raise InvalidField(
                "job.chat",
                "this model's chat template or tokenizer makes control tokens in a way that cannot "
                "be told from a message's text; send token_ids",
            )
        if not messages:
            raise InvalidField("job.chat.messages", "give at least one message")
        for i, message in enumerate(messages):
            if message.role not in ROLES:
                raise InvalidField(f"job.chat.messages[{i}].role", f"one of {', '.join(ROLES)}")

    def _render(self, turns: Sequence[tuple[str, str]]) -> Traced:
        assert self._template is not None
        try:
            return self._template.render(turns)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            reason = str(error)[:200]
            raise InvalidField(
                "job.chat.messages", f"the model's chat template refuses them: {reason}"
            ) from error

    def _find_left_out(self, roles: tuple[str, ...]) -> int | None:
        """The first message that the template does not show, whatever it says."""
        marks = [f"{self._mark}{i}x" for i in range(len(roles))]
        text = self._render(list(zip(roles, marks, strict=True))).lower()
        return next((i for i, mark in enumerate(marks) if mark not in text), None)

    def _probes(self) -> list[Traced]:
        """Harmless conversations, as the template renders them; those that it refuses are none."""
        rendered: list[Traced] = []
        for roles in _PROBES if self._template is not None else ():
            with contextlib.suppress(InvalidField):
                turns = [(role, self._mark * _TIMES[role]) for role in roles]
                rendered.append(self._render(turns))
        return rendered

    def _encodes_as_it_is(self, text: Traced) -> bool:
        """Whether the encoder finds every control token that the tokenizer itself finds."""
        (plain,) = self._rust.encode_batch_fast([str.__str__(text)], add_special_tokens=False)
        try:
            return tuple(plain.ids) == self._encoder.encode(text)
        except InvalidField:
            return False

    def _find_end_tokens(self, probes: Sequence[Traced]) -> frozenset[int]:
        """The named token, and the control token that the template writes behind an answer."""
        ends = {self._source.named.get("eos_token", "")}
        for text in probes:
            for hit in self._encoder.hits(text):
                if text[: hit.start].rstrip().lower().endswith(self._mark * _TIMES["assistant"]):
                    ends.add(hit.token)
        return frozenset(id_ for end in ends if (id_ := self._rust.token_to_id(end)) is not None)


def _harmless(added: Iterable[str]) -> str:
    """Return a mark in which none of the added tokens is spelled, however often it is said."""
    spelled = [token.lower() for token in added if token]
    return next((m for m in _MARKS if not any(t in m * len(t) for t in spelled)), _MARKS[0])


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
