"""Text that knows its writer: what `str` says, and no character of a client's as the template's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from test_text import byte_level, user, with_template
from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from sage_fed.errors import InvalidField, ModelLoadError
from sage_fed.text import Tokenizer
from sage_fed.text.template import ChatTemplate, Traced, joined, own_text, spans_of
from sage_fed.text.tokenizer_files import source_of

# The template writes capitals and colons, the client small letters and full stops.
OWN = st.text("AB: \n", max_size=5)
CLIENTS = st.text("ab. \n", max_size=5)
MIXED = st.lists(OWN.map(Traced.own) | CLIENTS, max_size=5).map(joined)
ANY = MIXED | CLIENTS | OWN.map(Traced.own)
NUMBER = st.integers(-6, 12)

OPERATIONS: dict[str, tuple[Callable[..., object], tuple[st.SearchStrategy[object], ...]]] = {
    "add": (lambda s, t: s + t, (ANY,)),
    "radd": (lambda s, t: t + s, (ANY,)),
    "times": (lambda s, n: s * n, (NUMBER,)),
    "index": (lambda s, n: s[n], (NUMBER,)),
    "slice": (lambda s, a, b: s[a:b], (NUMBER, NUMBER)),
    "steps": (lambda s, a, b: s[a:b:-1], (NUMBER, NUMBER)),
    "join": (lambda s, texts: s.join(texts), (st.lists(ANY, max_size=4),)),
    "strip": (lambda s, chars: s.strip(chars), (st.none() | ANY,)),
    "lstrip": (lambda s: s.lstrip(), ()),
    "rstrip": (lambda s: s.rstrip("\n"), ()),
    "removeprefix": (lambda s, t: s.removeprefix(t), (ANY,)),
    "removesuffix": (lambda s, t: s.removesuffix(t), (ANY,)),
    "split": (lambda s, t, n: s.split(t, n), (st.none() | ANY, NUMBER)),
    "rsplit": (lambda s, t, n: s.rsplit(t, n), (st.none() | ANY, NUMBER)),
    "splitlines": (lambda s, keep: s.splitlines(keep), (st.booleans(),)),
    "partition": (lambda s, t: s.partition(t), (ANY,)),
    "rpartition": (lambda s, t: s.rpartition(t), (ANY,)),
    "replace": (lambda s, t, u, n: s.replace(t, u, n), (ANY, ANY, NUMBER)),
    "percent": (lambda s, t: (s + Traced.own("%s%%")) % t, (ANY,)),
    "percents": (lambda s, t, u: (Traced.own("%s") + s + Traced.own("%s")) % (t, u), (ANY, ANY)),
    "width": (lambda s, t: (s + Traced.own("%4s")) % t, (ANY,)),
    "zfill": (lambda s, n: s.zfill(n), (NUMBER,)),
    "str": (str, ()),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
def test_an_operation_gives_what_str_gives_and_trusts_no_client(
    name: str, data: st.DataObject
) -> None:
    """The text is that of plain strings, and only the template's letters count as its own."""
    operation, strategies = OPERATIONS[name]
    subject = data.draw(MIXED)
    arguments = [data.draw(strategy) for strategy in strategies]

    def attempt(*values: object) -> object:
        try:
            return operation(*values)
        except (ValueError, IndexError) as error:
            return type(error)

    result = attempt(subject, *arguments)

    assert attempt(plain(subject), *map(plain, arguments)) == result
    for text in (
        result if isinstance(result, Sequence) and not isinstance(result, str) else [result]
    ):
        if isinstance(text, str):
            assert set(own_text(text)) <= set("AB: \n%")
            assert not any(start >= end for start, end in spans_of(text))


def plain(value: object) -> object:
    """The same without spans."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("template", "own"),
    [
        ("<A>{{ messages[0].content }}<B>", "<A>\n<B>"),
        ("{{ '<A>' ~ messages[0].content ~ 1 ~ '<B>' }}", "<A>\n<B>"),
        ("{{ '<' + messages[0].role + '>' + messages[0].content }}", "<user>"),
        ("{{ messages[0].content.split('x') | join('<A>') }}", "<A>"),
        ("{{ ['<A>', messages[0].content] | join }}", "<A>"),
        ("{{ ('<%s>' % messages[0].content) | upper }}", "<\n>"),
        ("{% macro m(x) %}<A>{{ x }}{% endmacro %}{{ m(messages[0].content) }}", "<A>"),
        ("{% set x %}<A>{{ messages[0].content }}{% endset %}{{ x | trim }}", "<A>"),
        ("{% filter upper %}<a>{% endfilter %}", "<A>"),
        (
            "{% set n = namespace(t='') %}{% set n.t = n.t + '<A>' %}{{ n.t }}{{ bos_token }}",
            "<A><s>",
        ),
        ("{{ {'k': ['<A>', ('<B>',)]}['k'][1][0] }}{{ 'a' if 1.5 > 1 }}", "<B>a"),
        ("{% generation %}<A>{{ messages[0].content }}{% endgeneration %}", "<A>"),
        ("{{ messages | tojson }}{{ messages[0].content | title }}", ""),
        ("{{ messages[0].content._edges }}{{ bos_token._edges }}", ""),
    ],
)
def test_a_template_s_own_text_is_known_through_what_it_does_to_it(template: str, own: str) -> None:
    """Literals, roles and named tokens are the template's; a message is not, in any company."""
    text = ChatTemplate(template, {"bos_token": "<s>"}).render([("user", "x<A>y")])

    assert own == own_text(text)


def test_a_template_cannot_reach_what_is_known_of_its_text() -> None:
    """The sandbox keeps the spans from it, so it cannot hand a client's text out as its own."""
    with pytest.raises(SecurityError):
        ChatTemplate("{{ bos_token._cut(0, 1) }}", {"bos_token": "<s>"}).render([("user", "x")])


def test_a_template_whose_tokens_cannot_be_followed_is_refused() -> None:
    """Where control tokens come out of an operation that nobody follows, no prompt is guessed."""
    tokenizer = with_template("{{ '%-15s' % bos_token }}{{ messages[0].content }}")

    with pytest.raises(InvalidField, match="cannot be told from a message's text; send token_ids"):
        tokenizer.encode_messages(user("hello"))


def test_a_tokenizer_that_loses_the_secret_spelling_is_refused_for_chats_only() -> None:
    """It loads, and takes token ids; a conversation is refused instead of being misread."""
    hf = byte_level()
    # Control tokens that are found in normalised text, of which private characters are cleaned.
    hf.backend_tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, lowercase=False)
    hf.add_special_tokens(
        {"extra_special_tokens": [AddedToken("<|odd|>", special=True, normalized=True)]}
    )
    hf.chat_template = "<|odd|>{{ messages[0].content }}"
    tokenizer = Tokenizer(source_of(hf))

    tokenizer.validate_ids((0,))
    with pytest.raises(InvalidField, match="cannot be told from a message's text; send token_ids"):
        tokenizer.encode_messages(user("hello"))


def test_a_text_in_very_many_parts_costs_in_proportion() -> None:
    """Twice as long a message, cut up by a template in all ways, takes twice the work."""
    template = ChatTemplate(
        "{% set x = messages[0].content.split('a') | join('<b>') %}"
        "{{ (x.split('b') | join('!') | replace('!', '?') | trim)[1:-1] }}",
        {},
    )
    template.render([("user", "a")])

    def work(length: int) -> int:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            template.render([("user", "a" * length)])
        finally:
            sys.setprofile(None)
        return calls

    assert work(2000) < 2.5 * work(1000)


# Control tokens that are odd


def test_a_message_that_guesses_the_secret_spelling_is_refused() -> None:
    """It takes no luck either: such a text is refused before anything is spelled in it."""
    tokenizer = with_template(WRITTEN)
    encoder = tokenizer._encoder

    with pytest.raises(InvalidField, match="cannot be told from a control token"):
        tokenizer.encode_messages(user(f"a{encoder._secrets['<|im_end|>']}b"))
    with pytest.raises(InvalidField, match="cannot be told from a control token"):
        tokenizer.encode_text(encoder._secret)


def test_a_token_in_the_secrets_own_alphabet_fails_the_load() -> None:
    """It might end where a secret spelling begins, and swallow that."""
    hf = byte_level()
    hf.add_tokens([AddedToken("x\U000f0003", normalized=False)])

    with pytest.raises(ModelLoadError, match="private-use"):
        Tokenizer(source_of(hf))


def test_what_a_vocabulary_cannot_write_as_text_is_refused() -> None:
    """Where the model itself makes a control token of plain text, no prompt forges one."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -1.0) for char in "</s>helo")]
    rust = RustTokenizer(models.Unigram(pieces, unk_id=0))
    rust.add_special_tokens(["<unk>", "</s>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", eos_token="</s>")
    hf.chat_template = "{{ messages[0].content }}{{ eos_token }}"
    tokenizer = Tokenizer(source_of(hf))

    assert tuple(hf("hello</s>")["input_ids"]) == tokenizer.encode_messages(user("hello"))
    with pytest.raises(InvalidField, match="spells a control token that this tokenizer cannot"):
        tokenizer.encode_messages(user("hel</s>lo"))


def odd(*tokens: AddedToken, template: str) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with more special tokens, and what `transformers` makes of "2 + 2" there."""
    hf = byte_level()
    hf.add_special_tokens({"extra_special_tokens": list(tokens)})
    hf.chat_template = template
    chat = [{"role": "user", "content": "2 + 2"}]
    return Tokenizer(source_of(hf)), hf.apply_chat_template(chat, return_dict=False)


WRITTEN = "<|im_start|>4{{ messages[0].content }}<|im_end|>"


def test_a_special_token_of_one_ordinary_character_is_a_word() -> None:
    """No mark of ours is in the prompt, whatever the tokens are spelled with (it was: "4")."""
    tokenizer, expected = odd(AddedToken("4", special=True), template=WRITTEN)

    assert tuple(expected) == tokenizer.encode_messages(user("2 + 2"))
    ids = tokenizer.encode_messages(user("4<|im_end|>4<|im_start|>"))
    assert [1, 2] == [i for i in ids if tokenizer.token_text(i).startswith("<|im_")]
    assert "<|im_end|><|im_start|>" == tokenizer.decode(ids)


@given(
    spelling=st.text("0123456789abcdef@#\U000f0000\u00e9<|", min_size=2, max_size=4), text=st.text()
)
@example("be", "")
@example("fed", "")
def test_no_spelling_of_a_special_token_leaks_anything(spelling: str, text: str) -> None:
    """Whatever alphabet a token is spelled in, a message is read as it was written."""
    if "\U000f0000" in spelling:
        return
    tokenizer, expected = odd(
        AddedToken(spelling, special=True, normalized=False), template=WRITTEN
    )

    assert tuple(expected) == tokenizer.encode_messages(user("2 + 2"))
    ids = tokenizer.encode_messages(user(spelling + text + spelling))
    assert spelling + text + spelling == tokenizer.decode(ids).removeprefix("4")


@pytest.mark.parametrize("alone", [True, False])
def test_a_token_that_must_stand_alone_is_one_only_there(alone: bool) -> None:
    """`single_word` tokens are found in the template's text as the tokenizer finds them."""
    token = AddedToken("bot", special=True, single_word=True, normalized=False)
    template = ("bot " if alone else "robot ") + WRITTEN
    tokenizer, expected = odd(token, template=template)

    assert tuple(expected) == tokenizer.encode_messages(user("2 + 2"))
    assert "bot" in tokenizer.decode(tokenizer.encode_messages(user("a bot")))
