"""Control tokens: which ones there are, and an encoder that only a template can make write them.

Owns the promise that nothing a client writes becomes a control token. The encoder knows each
control token by a secret spelling in place of its own; a text's own spellings of them are put in
their secret form where the template wrote them, and the whole is encoded at once. So what a client
spells is plain text, and everything else is encoded as the tokenizer itself would.
Fails with `InvalidField` for a text that cannot be encoded without forging one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import tokenizers

from sage_fed.errors import InvalidField, ModelLoadError
from sage_fed.text.traced import spans_of

_PRIVATE = 0xF0000
"""A private-use plane of Unicode; its first characters spell the secret."""

_DIGITS = 16
_SHAPE = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)  # noqa: RUF001 - DeepSeek's full-width bars
"""How control tokens look that a tokenizer does not declare special."""


def control_tokens(backend: tokenizers.Tokenizer, templates: Iterable[str]) -> dict[str, int]:
    """Return the spellings and ids of the tokens that no client may write.

    Those are the special ones; those of the added ones that a template writes (`templates` are its
    source, and texts of its own making) unless they are blank, as tokens for runs of spaces are;
    and those that look like `<|this|>`. A single character that is in the vocabulary anyway is a
    word, whatever it is declared: nobody could write it in another way.
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
        # New tokens get ids from here on, which are nobody else's, whatever gaps there are.
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
