"""A text is never said to have more tokens than it has."""

from __future__ import annotations

import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from surroundings import MODELS
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sage_fed.core import Message
from sage_fed.text import Tokenizer
from sage_fed.text.tokenizer import LengthBound

TOKENIZER = Tokenizer.load(MODELS / "demo-tactical")


def bpe(*, byte_level: bool = True) -> tokenizers.Tokenizer:
    """A vocabulary whose longest entry has four characters."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else ["a", "b", "▁"]
    vocab = {text: i for i, text in enumerate([*sorted(alphabet), "aa", "aaaa"])}
    model = models.BPE(vocab, [("a", "a"), ("aa", "aa")], byte_fallback=not byte_level)
    backend = tokenizers.Tokenizer(model)
    if byte_level:
        backend.decoder = decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@given(st.lists(st.text(max_size=40), min_size=1, max_size=3))
@example(["e\u0301" * 30])
@example([" " * 39])
@example(["<|im_start|>" * 3])
def test_a_conversation_has_at_least_so_many_tokens(contents: list[str]) -> None:
    messages = [Message("user", content) for content in contents]
    assert TOKENIZER.least_tokens(messages) <= len(TOKENIZER.encode_messages(messages))


def test_a_long_text_has_many() -> None:
    """The bound is of use: a tenth of the truth or so, without the work."""
    messages = [Message("user", "lorem ipsum " * 10_000)]
    assert TOKENIZER.least_tokens(messages) >= 120_000 // 13


def test_the_longest_token_is_counted_in_bytes_where_tokens_are() -> None:
    bound = LengthBound(bpe())
    assert 4 == bound.longest
    assert (2, 4) == (bound.least_tokens("aaaaa"), bound.least_tokens("éééééééé"))
    added = bpe()
    added.add_special_tokens([tokenizers.AddedToken("<|ende|>", special=True)])
    assert 8 == LengthBound(added).longest
    assert 3 == LengthBound(bpe(byte_level=False)).least_tokens("é" * 9)


def test_a_tokenizer_that_shortens_texts_says_nothing() -> None:
    """Its texts are encoded, as every text was."""
    strips, removes, joins = bpe(), bpe(), bpe(byte_level=False)
    strips.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    removes.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    joins.model = models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)
    for backend in (strips, removes, joins):
        assert 0 == LengthBound(backend).least_tokens("a" * 1000)


def test_spaces_that_a_token_swallows_do_not_count() -> None:
    backend = bpe()
    backend.add_special_tokens([tokenizers.AddedToken("<|u|>", special=True, rstrip=True)])
    assert 1 == LengthBound(backend).least_tokens("<|u|>" + " " * 1000)


def test_a_text_that_becomes_shorter_when_composed_says_nothing() -> None:
    backend = bpe()
    backend.normalizer = normalizers.NFC()
    bound = LengthBound(backend)
    assert 250 == bound.least_tokens("a" * 1000)
    assert 0 == bound.least_tokens("e\u0301" * 1000)
