"""One checkpoint's tokenizer: conversations and text to ids, ids to text.

Owns the promise that nothing a client writes becomes a control token: the encoder knows each
control token by a secret spelling in place of its own, and only where the template wrote a token's
own spelling is it put into its secret form, so that what a client spells stays plain text. Owns
also the least number of tokens of a text by its length, so that a text far too long for a context
is refused without the hundred times longer work of encoding it.
Does not know tiers, jobs or the model that consumes the ids.
Fails with `ModelLoadError` at load and with `InvalidField` for a prompt that cannot be encoded.

Encoding is blocking (seconds for megabytes): call it in a thread. A `Tokenizer` may be used
from any number of threads at once: nothing but its caches changes after construction, its two Rust
tokenizers release the interpreter lock while they encode, and the flags that `transformers`
flips per call (the cause of its "Already borrowed") are never touched.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from sage_fed.core import Message
from sage_fed.errors import InvalidField, ModelLoadError
from sage_fed.text.decoding import ByteDecoder, IncrementalDecoder, WindowDecoder
from sage_fed.text.template import ChatTemplate, Traced, own_text, spans_of
from sage_fed.text.tokenizer_files import TokenizerSource, locate_tokenizer, read_source

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

_PRIVATE = 0xF0000
"""A private-use plane of Unicode; its first characters spell the secret."""

_DIGITS = 16
_SHAPE = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)  # noqa: RUF001 - DeepSeek's full-width bars
"""How control tokens look that a tokenizer does not declare special."""

_KEEPING = frozenset({"ByteLevel", "Digits", "Punctuation", "Split", "Metaspace"})
"""Pre-tokenizers that cut a text and leave nothing out, unless they are told to."""

_FILE = "tokenizer.json"
_COPIED = ("tokenizer_config.json", "chat_template.jinja")
_SPACE = "\u0120"  # how byte-level vocabularies spell it


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
        return alike and self.has_tokens_of(other)

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether every text has the same ids here and there, whatever the templates are."""
        if self is other:
            return True
        # Before a vocabulary is written out twice, which takes a large one a tenth of a second.
        alike = self.num_valid_ids == other.num_valid_ids
        return alike and self._source.backend.to_str() == other._source.backend.to_str()

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


def control_tokens(backend: tokenizers.Tokenizer, templates: Iterable[str]) -> dict[str, int]:
    """Return the spellings and ids of the tokens that no client may write.

    Those are the special ones; those of the added ones that a template writes (`templates` are its
    source, and texts of its own making) unless they are blank, as tokens for runs of spaces are;
    and those that look like `<|this|>`. A single character that is in the vocabulary anyway is a
    word, whatever it is declared: it cannot be written in another way.
    """
    written = "\n".join(templates)
    return {
        token.content: id_
        for id_, token in backend.get_added_tokens_decoder().items()
        if (
            token.special
            or (token.content.strip() and token.content in written)
            or _SHAPE.fullmatch(token.content)
        )
        and not (len(token.content) == 1 and _is_word(backend, token.content))
    }


@dataclass(frozen=True, slots=True)
class Hit:
    """A control token in a text that the template wrote."""

    start: int
    end: int
    token: str


class ControlEncoder:
    """Text to ids; thread-safe.

    `control` are the spellings and ids of the control tokens, `unknown` is the id that an unknown
    character honestly is, in a vocabulary that has no bytes.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, control: Mapping[str, int], unknown: int | None
    ) -> None:
        added = sorted(backend.get_added_tokens_decoder().items())
        secret = "".join(chr(_PRIVATE + secrets.randbelow(_DIGITS)) for _ in range(_DIGITS))
        if any(_PRIVATE <= ord(char) < _PRIVATE + 0x10000 for _, t in added for char in t.content):
            # One that ends as the secret begins would swallow part of it.
            raise ModelLoadError("a token of its tokenizer is spelled in private-use characters")
        self._secret = secret
        self._backend = _sharing_vocabulary(backend)
        self._spelled = _alternation(control)
        self._alone = {token.content for _, token in added if token.single_word}
        self._secrets = {
            content: f"{secret}{chr(_PRIVATE + _DIGITS + id_)}"
            for id_, content in enumerate(control)
        }
        # New tokens get ids from here on, which no other token has, whatever gaps there are.
        self._first_new = num_ids(backend)
        gaps = self._first_new - backend.get_vocab_size(with_added_tokens=False)
        fill = [tokenizers.AddedToken(f"{secret}{i}", normalized=False) for i in range(gaps)]
        known = {id_: _respelled(token, self._secrets) for id_, token in added}
        self._backend.add_tokens([*fill, *known.values()])
        self._id_of = {
            self._backend.token_to_id(token.content): id_ for id_, token in known.items()
        }
        self._control_ids = frozenset(control.values())
        self._unknown = unknown

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids; a control token is one where the text's spans say a template wrote it.

        Raises:
            InvalidField: the vocabulary has no other way to write what a client spelled.
        """
        if self._secret in text:
            raise InvalidField("job.chat", "a message cannot be told from a control token")
        hits = self.hits(text)
        plain = str.__str__(text)
        pieces: list[str] = []
        position = 0
        for hit in hits:
            pieces += (plain[position : hit.start], self._secrets[hit.token])
            position = hit.end
        pieces.append(plain[position:])
        (encoding,) = self._backend.encode_batch_fast(["".join(pieces)], add_special_tokens=False)
        ids: list[int] = []
        num_control = 0
        for raw in encoding.ids:
            id_ = self._id_of.get(raw, raw)
            ids.append(id_)
            if raw not in self._id_of and id_ in self._control_ids and id_ != self._unknown:
                raise InvalidField(
                    "job.chat", "a message spells a control token that this tokenizer cannot escape"
                )
            num_control += raw in self._id_of and id_ in self._control_ids
        if num_control != len(hits):
            raise InvalidField("job.chat", "this model's control tokens cannot be encoded")
        return tuple(ids)

    def hits(self, text: str) -> list[Hit]:
        """Return the control tokens that a template wrote, in order."""
        plain = str.__str__(text)
        return [
            Hit(found.start(), found.end(), found[0])
            for start, end in spans_of(text)
            for found in self._spelled.finditer(plain, start, end)
            if found[0] not in self._alone or _stands_alone(plain, found.start(), found.end())
        ]


def num_ids(backend: tokenizers.Tokenizer) -> int:
    """Return one above the largest id; asking for the whole vocabulary takes far longer."""
    count = int(backend.get_vocab_size(with_added_tokens=True))
    if None not in map(backend.id_to_token, range(count)):
        return count
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def unknown_ids(backend: tokenizers.Tokenizer, num_ids: int) -> tuple[int, ...]:
    """Return the ids below `num_ids` that stand for no token."""
    if num_ids == backend.get_vocab_size(with_added_tokens=True):
        return ()
    return tuple(id_ for id_ in range(num_ids) if backend.id_to_token(id_) is None)


def _sharing_vocabulary(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer without added tokens: a copy of the vocabulary takes long to make."""
    sibling = tokenizers.Tokenizer(backend.model)
    sibling.normalizer = backend.normalizer
    sibling.pre_tokenizer = backend.pre_tokenizer
    sibling.post_processor = backend.post_processor
    sibling.decoder = backend.decoder
    return sibling


def _respelled(token: tokenizers.AddedToken, spellings: Mapping[str, str]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        spellings.get(token.content, token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _is_word(backend: tokenizers.Tokenizer, char: str) -> bool:
    """Whether the vocabulary has this character without its being an added token."""
    plain = _sharing_vocabulary(backend).encode(char, add_special_tokens=False).ids
    return plain == [backend.token_to_id(char)]


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no letter, digit or underscore touches it."""
    around = text[max(start - 1, 0) : start] + text[end : end + 1]
    return re.search(r"\w", around) is None


def _alternation(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first, as the tokenizer does; nothing if empty."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class LengthBound:
    """The least number of tokens that a text of some length has.

    A token stands for no more text than the longest entry of the vocabulary. That holds only where
    the tokenizer neither shortens a text nor joins what it does not know; of any other nothing is
    said, and its texts are encoded.
    """

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


def write_padded_tokenizer(source: Path, directory: Path, num_ids: int) -> None:
    """Write the tokenizer of `source` to `directory`, with ids up to `num_ids`.

    A small tokenizer on a real shape would leave most of the head's rows out, and a speed test
    would be too good. The invented tokens are words such as " t1234": every id that such a model
    draws is text, and none is ever the encoding of a prompt, because no merge leads to it.

    Raises:
        ValueError: the tokenizer has more ids than that already.
    """
    tokenizer = json.loads((source / _FILE).read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = [token["id"] for token in tokenizer["added_tokens"]]
    first = max(*vocabulary.values(), *added) + 1
    if first > num_ids:
        raise ValueError(f"the tokenizer has {first} ids, more than {num_ids}")
    vocabulary |= {f"{_SPACE}t{number}": number for number in range(first, num_ids)}
    text = json.dumps(tokenizer, ensure_ascii=False)
    (directory / _FILE).write_text(text, encoding="utf-8")
    for name in _COPIED:
        shutil.copy(source / name, directory / name)
