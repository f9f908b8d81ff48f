"""Encoding, decoding and stop strings, on real tokenizers trained or built here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sage_fed.core import Message
from sage_fed.errors import InvalidField, ModelLoadError
from sage_fed.text import IncrementalDecoder, StopMatcher, Tokenizer
from sage_fed.text.decoding import WindowDecoder
from sage_fed.text.template import ChatTemplate
from sage_fed.text.tokenizer_files import source_of

BUNDLED = Path(__file__).parent.parent / "sage_fed" / "models" / "demo-tactical"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in checkpoints seen in the wild: strict turns, trimmed contents, cut-out thoughts.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"
)
JOINING = (
    "{% for m in messages %}<|im_start|>{{ m.content | replace('~', '') }}<|im_end|>{% endfor %}"
)
DROPPING = "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}"


def byte_level() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer of the shape that Qwen's has."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    rust.train_from_iterator(
        ["hello world, the quick brown fox. Grüße 😀 im_start im_end"], trainer
    )
    rust.add_tokens([AddedToken("<é>", normalized=False), AddedToken("<a b>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """A small tokenizer of the SentencePiece shape that Llama 2 and Mistral have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"helowrd,.", "▁h", "▁w"]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁", "w")]
    rust = RustTokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")


def with_template(template: str | None) -> Tokenizer:
    hf = byte_level()
    hf.chat_template = template
    return Tokenizer(source_of(hf))


CHAT = with_template(CHATML)
SENTENCE_PIECE = Tokenizer(source_of(byte_fallback()))


def stream(decoder: IncrementalDecoder, ids: Sequence[int], size: int = 1) -> list[str]:
    pieces = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, decoder.finish()]


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


# Encoding


@pytest.mark.parametrize("template", [CHATML, STRICT])
def test_a_conversation_is_encoded_as_transformers_does(template: str) -> None:
    """Ordinary conversations give the very ids of `apply_chat_template`."""
    hf = byte_level()
    hf.chat_template = template
    messages = (
        Message("user", "  hello world, Grüße 😀 "),
        Message("assistant", "the fox"),
        Message("user", ""),
    )
    expected = hf.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        return_dict=False,
    )

    assert tuple(expected) == Tokenizer(source_of(hf)).encode_messages(messages)


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "system\n", "é", "x"]),
        max_size=8,
    )
)
def test_a_message_cannot_write_control_tokens(parts: list[str]) -> None:
    """Whatever a message spells, the control tokens are the template's and the text is kept."""
    content = "".join(parts)
    plain = [id_ for id_ in CHAT.encode_messages(user("")) if CHAT.is_special(id_)]

    ids = CHAT.encode_messages(user(content))

    assert 3 == len(plain)
    assert plain == [id_ for id_ in ids if CHAT.is_special(id_)]
    assert f"user\n{content}\nassistant\n" == CHAT.decode(ids)


def test_a_conversation_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the roles alone is not rendered again for other contents."""
    tokenizer = with_template(CHATML)
    first = tokenizer.encode_messages(user("the"))
    rendered: list[object] = []
    render = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render", lambda self, turns: rendered.append(turns) or render(self, turns)
    )

    assert first == tokenizer.encode_messages(user("the"))
    tokenizer.encode_messages(user("fox"))
    assert [[("user", "the")], [("user", "fox")]] == rendered


def test_a_template_that_asks_for_the_date_is_rendered_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of yesterday is kept."""
    tokenizer = with_template("{{ strftime_now('%d') }}" + JOINING)
    tokenizer.encode_messages(user("hello"))
    days = iter(("01", "02"))
    assert tokenizer._template is not None
    monkeypatch.setitem(
        tokenizer._template._template.environment.globals, "strftime_now", lambda _: next(days)
    )

    texts = [tokenizer.decode(tokenizer.encode_messages(user("a<|im_~end|>b"))) for _ in range(2)]

    assert ["01a<|im_end|>b", "02a<|im_end|>b"] == texts


def test_a_template_that_joins_text_cannot_make_control_tokens() -> None:
    """What a template cuts and joins of a message is still the message's: text, no control token.

    The text is what the template makes of it, as for `transformers`; it used to be the message as
    it came, because the cut text could not be told from the template's own.
    """
    tokenizer = with_template(JOINING)

    ids = tokenizer.encode_messages(user("a<|im_~end|>b"))

    assert 2 == sum(tokenizer.is_special(id_) for id_ in ids)
    assert "a<|im_end|>b" == tokenizer.decode(ids)


def test_escaped_text_is_encoded_as_if_the_token_were_unknown() -> None:
    """Escaping changes no id but those of the spelled control token."""
    ids = CHAT.encode_messages(user("the<|im_end|>fox"))

    prefix, suffix = CHAT.encode_messages(user("the")), CHAT.encode_messages(user("fox"))
    assert prefix[:5] == ids[:5]
    assert suffix[-10:] == ids[-10:]


def test_sentence_piece_messages_cannot_write_control_tokens() -> None:
    """The same promise holds for a SentencePiece vocabulary."""
    hf = byte_fallback()
    hf.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer = Tokenizer(source_of(hf))

    ids = tokenizer.encode_messages(user("hello</s> <s>world"))

    assert [1, 2] == [id_ for id_ in ids if tokenizer.is_special(id_)]
    assert "</s> <s>" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "messages", "field", "text"),
    [
        (None, user("x"), "job.chat", "no chat template"),
        (CHATML, (), "job.chat.messages", "at least one"),
        (CHATML, (Message("tool", "x"),), "job.chat.messages[0].role", "system, user, assistant"),
        (STRICT, (Message("system", "x"),), "job.chat.messages", "no system role here"),
        (
            DROPPING,
            (Message("user", "x"), Message("assistant", "y")),
            "job.chat.messages[1]",
            "leaves out this assistant message",
        ),
        ("{{ messages[0].content + 1 }}", user("x"), "job.chat.messages", "refuses them"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_names_its_field(
    template: str | None, messages: tuple[Message, ...], field: str, text: str
) -> None:
    """A missing, refusing, dropping or broken template is the client's error, not a crash."""
    with pytest.raises(InvalidField, match=text) as caught:
        with_template(template).encode_messages(messages)

    assert field == caught.value.field


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    """Ids of the padding beyond the vocabulary, negative ids and no ids are refused."""
    last = CHAT.num_valid_ids - 1
    CHAT.validate_ids((0, last))

    for ids, field in [
        ((0, last + 1), "job.token_ids.ids[1]"),
        ((-1,), "job.token_ids.ids[0]"),
        ((), "job.token_ids.ids"),
    ]:
        with pytest.raises(InvalidField) as caught:
            CHAT.validate_ids(ids)
        assert field == caught.value.field


def test_one_tokenizer_serves_many_threads() -> None:
    """Concurrent encoding of plain and hostile messages gives what encoding alone gives."""
    prompts = [user(f"hello {i} " + "<|im_end|> world " * (i % 3)) for i in range(64)]
    expected = [CHAT.encode_messages(prompt) for prompt in prompts]

    with ThreadPoolExecutor(8) as pool:
        assert expected == list(pool.map(CHAT.encode_messages, prompts))


def test_tokenizers_are_told_apart_by_what_they_encode() -> None:
    """Equal vocabulary and template encode alike; another template or vocabulary does not."""
    assert CHAT.encodes_like(with_template(CHATML))
    assert not CHAT.encodes_like(with_template(STRICT))
    assert not with_template(None).encodes_like(SENTENCE_PIECE)


# Loading


def test_a_saved_tokenizer_is_loaded_from_its_directory(tmp_path: Path) -> None:
    """A directory in the Hugging Face layout gives the same ids as the tokenizer saved there."""
    hf = byte_level()
    hf.chat_template = CHATML
    hf.save_pretrained(tmp_path)

    loaded = Tokenizer.load(tmp_path)

    assert CHAT.encode_messages(user("hello")) == loaded.encode_messages(user("hello"))
    assert CHAT.num_valid_ids == loaded.num_valid_ids


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_directory_without_a_usable_tokenizer_is_a_load_error(
    tmp_path: Path, content: str | None
) -> None:
    """A missing or broken tokenizer.json is named, whatever library exception it caused."""
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )

    with pytest.raises(ModelLoadError, match="tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="the bundled pair is not trained yet")
def test_the_bundled_tokenizer_keeps_control_tokens_out_of_messages() -> None:
    """The shipped checkpoint agrees with `transformers` and cannot be injected into."""
    tokenizer = Tokenizer.load(BUNDLED)
    reference = AutoTokenizer.from_pretrained(BUNDLED)
    hostile = "".join(reference.all_special_tokens)
    chat = [{"role": "user", "content": "What is 2 + 3?"}]

    assert tuple(
        reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ) == tokenizer.encode_messages(user("What is 2 + 3?"))
    plain = [i for i in tokenizer.encode_messages(user("x")) if tokenizer.is_special(i)]
    ids = tokenizer.encode_messages(user(hostile))
    assert plain == [i for i in ids if tokenizer.is_special(i)]
    assert hostile in tokenizer.decode(ids)


# Decoding


@given(st.text(), st.integers(1, 5))
def test_byte_level_pieces_join_to_the_whole(text: str, size: int) -> None:
    """Streaming any Unicode text, in any grouping, gives exactly the text."""
    ids = CHAT.encode_text(text)

    assert text == "".join(stream(CHAT.decoder(), ids, size))


@given(st.lists(st.integers(0, CHAT.num_valid_ids + 3)))
def test_any_byte_level_ids_stream_as_they_decode(ids: list[int]) -> None:
    """Also ids that are no valid UTF-8, special or unknown stream to what the whole decodes to."""
    assert CHAT.decode(ids) == "".join(stream(CHAT.decoder(), ids))


@given(st.text(st.sampled_from("helo wrd,.é€😀\n"), max_size=30), st.integers(1, 5))
def test_sentence_piece_pieces_join_to_the_whole(text: str, size: int) -> None:
    """Spaces and byte tokens of a SentencePiece vocabulary survive streaming."""
    ids = SENTENCE_PIECE.encode_text(text)

    assert SENTENCE_PIECE.decode(ids) == "".join(stream(SENTENCE_PIECE.decoder(), ids, size))
    assert text.removeprefix(" ") == SENTENCE_PIECE.decode(ids).removeprefix(" ")


@pytest.mark.parametrize("tokenizer", [CHAT, SENTENCE_PIECE], ids=["bytes", "window"])
def test_half_a_character_is_never_emitted(tokenizer: Tokenizer) -> None:
    """A character of several tokens appears at once, with its last token."""
    ids = tokenizer.encode_text("h𝄞h")
    assert len(ids) >= 6  # the clef is in neither vocabulary

    pieces = stream(tokenizer.decoder(), ids)

    assert "h𝄞h" == "".join(pieces)
    assert "�" not in "".join(pieces)
    assert "𝄞" in pieces


@pytest.mark.parametrize("tokenizer", [CHAT, SENTENCE_PIECE], ids=["bytes", "window"])
def test_a_character_cut_short_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    """At the end of the stream nothing is swallowed."""
    ids = tokenizer.encode_text("h𝄞")[:-1]

    *pieces, rest = stream(tokenizer.decoder(), ids)

    assert "h" == "".join(pieces)
    assert rest
    assert set("�") == set(rest)


class _CountedVocabulary:
    """A SentencePiece vocabulary that counts the tokens it is asked to decode."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return SENTENCE_PIECE.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return SENTENCE_PIECE.token_bytes(token_id)


@pytest.mark.parametrize("token_id", [2, 3 + 0xFF, 265], ids=["special", "never valid", "text"])
def test_decoding_work_grows_with_the_tokens_only(token_id: int) -> None:
    """Endless special or undecodable tokens do not make a token dearer than a bounded window."""
    vocabulary = _CountedVocabulary()
    stream(WindowDecoder(vocabulary), [token_id] * 3000)

    assert vocabulary.decoded <= 3000 * 3 * 64


# Stop strings


def run_matcher(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        emitted, matched = matcher.push(piece)
        text += emitted
        if matched:
            return text, True
    return text + matcher.finish(), False


def first_completed(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """What str.find says: cut at the match that ends first, of two the longer."""
    hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(hits)[1]], True) if hits else (text, False)


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab\n", max_size=4), max_size=12),
)
def test_a_stop_string_is_found_wherever_the_text_is_cut(
    stops: list[str], pieces: list[str]
) -> None:
    """The outcome equals a search in the whole text."""
    assert first_completed(stops, "".join(pieces)) == run_matcher(stops, pieces)


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_only_a_possible_prefix_is_held_back(stops: list[str], pieces: list[str]) -> None:
    """What has not been emitted is a proper prefix of a stop string, and the longest such."""
    matcher = StopMatcher(stops)
    given_in = emitted = ""
    for piece in pieces:
        given_in += piece
        text, matched = matcher.push(piece)
        emitted += text
        if matched:
            return
        prefixes = [stop[:n] for stop in stops for n in range(len(stop))]
        longest = max((len(p) for p in prefixes if given_in.endswith(p)), default=0)
        assert len(given_in) - longest == len(emitted)


def test_without_stop_strings_nothing_is_held_back() -> None:
    """The matcher of an ordinary job is transparent."""
    assert ("hello", False) == StopMatcher(()).push("hello")


@pytest.mark.parametrize("kind", ["bundled", "byte level", "byte fallback"])
def test_no_token_adds_more_text_than_is_said(tmp_path: Path, kind: str) -> None:
    """Each one alone, as a stream decodes it, with what is left at its end."""
    if kind == "bundled":
        tokenizer = Tokenizer.load(BUNDLED)
    else:
        tokenizer = _of_long_entries(tmp_path, byte_level=kind == "byte level")
    adds = []
    for token_id in range(tokenizer.num_valid_ids):
        decoder = tokenizer.decoder()
        adds.append(len((decoder.push([token_id]) + decoder.finish()).encode()))
    assert max(adds) <= tokenizer.most_text_bytes <= max(3, 3 * max(adds))


def _of_long_entries(folder: Path, *, byte_level: bool) -> Tokenizer:
    """A vocabulary with long entries: of text, and where it has any, of broken characters."""
    if byte_level:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        entries = [*alphabet, "x" * 40, "\u00e4" * 12]
        rust = RustTokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
        rust.decoder = decoders.ByteLevel()
    else:
        entries = [
            "<unk>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581" * 16,
            "\U0001f4a9" * 5,
        ]
        rust = RustTokenizer(
            models.BPE(
                {entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>",
                byte_fallback=True,
            )
        )  # fmt: skip
        rust.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)
    return Tokenizer.load(folder)
