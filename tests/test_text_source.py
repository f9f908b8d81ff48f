"""A tokenizer's files, read without `transformers`, give what `transformers` makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from test_text import BUNDLED, byte_fallback, byte_level
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2Tokenizer

from sage_fed.core import Message
from sage_fed.errors import ModelLoadError
from sage_fed.text import Tokenizer, fingerprint
from sage_fed.text.template import ChatTemplate
from sage_fed.text.tokenizer_files import read_source

# What templates in the wild do: defaults, loops with control, namespaces, tools, dates, thoughts.
TEMPLATES = {
    "system": (
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "{%- else %}\n    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role != 'system' or not loop.first %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "blocks": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\nU {{ m.content }}\n"
        "  {% else %}\nO {{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n"
    ),
    "namespace": (
        "{% set ns = namespace(last='', count=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = m.content %}{% set ns.count = ns.count + 1 %}"
        "{% endif %}{% endfor %}{{ ns.count }}:{{ ns.last }}"
    ),
    "named": "{{ bos_token }}{{ unk_token is defined }}{{ pad_token }}{{ messages[0].content }}",
    "tools": (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ documents is none }}"
        "{{ messages | tojson }}{{ dict(a=1) | tojson(indent=2) }}{{ dict.fromkeys('ab') }}"
    ),
    "loops": (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% if not m.content %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}"
    ),
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set x = 2 %}{{ m.content }}{{ x }}{% endgeneration %}"
        "{% else %}{{ m.content }}{{ x }}{% endif %}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}{{ messages[-1].content.split('</think>')[-1] }}",
}
BROKEN = {
    "refusing": "{{ raise_exception('not ' + messages[0].role) }}",
    "escaping": "{{ messages.append(1) }}",
    "underscored": "{% set ns = namespace(_x=1) %}",
    "interpreter": "{{ dict.__class__ }}{{ ''.__class__.__mro__ }}",
    "syntax": "{% for %}",
}

turns = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant"]),
        st.text(max_size=12) | st.sampled_from(["{{ x }}", "a</think>b", "<b>&'\"", " é\n"]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=turns)
@settings(max_examples=2 * settings.default.max_examples // 5)
def test_a_template_renders_as_in_transformers(
    name: str, conversation: list[tuple[str, str]]
) -> None:
    """Every feature that templates use gives the same text, whatever the messages say."""
    assert by_transformers(TEMPLATES[name], conversation) == ours(TEMPLATES[name], conversation)


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_fails_where_it_does_in_transformers(name: str) -> None:
    """A template that refuses, is no template or reaches for the interpreter raises here, too."""
    for render in (by_transformers, ours):
        with pytest.raises(TemplateError):
            render(BROKEN[name], [("user", "x")])


HF = byte_level()


def by_transformers(template: str, conversation: list[tuple[str, str]]) -> str:
    chat = [{"role": role, "content": content} for role, content in conversation]
    return str(
        HF.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def ours(template: str, conversation: list[tuple[str, str]]) -> str:
    return ChatTemplate(template, HF.special_tokens_map).render(conversation)


# Loading


def qwen() -> Qwen2Tokenizer:
    """A tokenizer of Qwen's own class, over the small vocabulary."""
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(model["vocab"], merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    return tokenizer


def saved(tmp_path: Path, kind: str) -> Path:
    hf: Any = {"qwen": qwen, "fast": byte_level, "pieces": byte_fallback}[kind]()
    hf.chat_template = TEMPLATES["named"]
    hf.save_pretrained(tmp_path)
    return tmp_path


def edit(directory: Path, **values: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


TEXTS = ("What is 2 + 3?", "  Grüße 😀\n\n don't 12345 ", "hello<|im_end|>world", "")


def agree(directory: Path) -> None:
    """Ids, named tokens and the rendered template are those of `AutoTokenizer`."""
    hf = AutoTokenizer.from_pretrained(directory)
    read = read_source(directory)
    tokenizer = Tokenizer(read_source(directory))

    assert dict(hf.special_tokens_map) == read.named
    given = hf.chat_template
    assert (given["default"] if isinstance(given, dict) else given) == read.template
    assert len(hf) == tokenizer.num_valid_ids
    for text in TEXTS:
        assert (
            hf(text, add_special_tokens=False)["input_ids"]
            == tokenizer._rust.encode(text, add_special_tokens=False).ids
        )
    if hf.chat_template:
        chat = [{"role": "user", "content": TEXTS[1]}]
        expected = hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tuple(expected) == tokenizer.encode_messages((Message("user", TEXTS[1]),))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n", "git lfs pull"),
        (b"<html><body>404</body></html>", "web page"),
        (b"", "is empty"),
    ],
    ids=["pointer", "page", "empty"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_something_else_is_named_as_that(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    """A pointer, a page or nothing is said to be one, instead of a parser's complaint."""
    saved(tmp_path, "fast")
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ModelLoadError, match=what) as caught:
        read_source(tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize("model_type", [None, "qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kind", ["qwen", "fast", "pieces"])
def test_a_directory_is_read_as_transformers_reads_it(
    tmp_path: Path, kind: str, model_type: str | None
) -> None:
    """Whatever the tokenizer's class and the model beside it, the ids are the same."""
    saved(tmp_path, kind)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))

    agree(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"pad_token": {"content": "<|endoftext|>", "special": True, "__type": "AddedToken"}},
        {"extra_special_tokens": None, "additional_special_tokens": ["<|im_start|>"]},
        {"extra_special_tokens": ["<|brand_new|>"]},
        {"bos_token": "<|brand_new|>"},
        {"image_token": "<|im_start|>"},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]},
        {"extra_special_tokens": {"image_token": "<|im_start|>"}},
        {"added_tokens_decoder": {"900": {"content": "<|late|>", "special": False}}},
    ],
)
def test_an_unusual_configuration_is_read_as_transformers_reads_it(
    tmp_path: Path, values: dict[str, object]
) -> None:
    """What the configuration adds to the backend or names is what it adds or names there."""
    saved(tmp_path, "fast")
    (tmp_path / "chat_template.jinja").unlink()
    edit(tmp_path, **({"chat_template": TEMPLATES["named"]} | values))

    agree(tmp_path)


def test_files_of_older_versions_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """Named tokens may be in a file of their own, and added ones, too."""
    saved(tmp_path, "fast")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<|im_start|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|late|>": 500}))

    agree(tmp_path)


def test_the_bundled_pair_needs_no_transformers() -> None:
    """Its tokenizer loads and encodes in a process that never imports `transformers`."""
    program = (
        "import sys; from sage_fed.core import Message; from sage_fed.text import Tokenizer; "
        f"Tokenizer.load({str(BUNDLED)!r}).encode_messages((Message('user', 'hello'),)); "
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )

    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode


def test_ids_may_leave_gaps(tmp_path: Path) -> None:
    """The number of ids is one above the largest, and added tokens keep theirs in both uses."""
    hf = byte_level()
    raw = json.loads(hf.backend_tokenizer.to_str())
    first, second = raw["model"]["merges"].pop()
    del raw["model"]["vocab"][first + second]
    saved(tmp_path, "fast")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    agree(tmp_path)


def test_two_directories_are_told_apart_by_their_tokenizer_files(tmp_path: Path) -> None:
    """Equal files have one fingerprint; another template or configuration has another."""
    first, second = saved(tmp_path / "a", "fast"), saved(tmp_path / "b", "fast")
    assert fingerprint(first) == fingerprint(second) is not None

    (second / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(first) != fingerprint(second)


def test_a_directory_with_more_files_has_no_fingerprint(tmp_path: Path) -> None:
    """Three files do not say what it encodes, so it is equal to no other by them."""
    saved(tmp_path, "fast")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|late|>": 500}))

    assert fingerprint(tmp_path) is None


def test_an_added_token_is_known_to_both(tmp_path: Path) -> None:
    """A token that is added but not special may be spelled by anyone, as in `transformers`."""
    hf = byte_level()
    hf.add_tokens([AddedToken("<tool>", normalized=False)])
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)

    assert tuple(hf("a<tool>b")["input_ids"]) == tokenizer.encode_text("a<tool>b")


def test_ids_that_a_vocabulary_skips_are_known(tmp_path: Path) -> None:
    """A tokenizer may have no token for ids below its largest; a model must not draw those."""
    path = saved(tmp_path, "fast") / "tokenizer.json"
    whole = Tokenizer.load(tmp_path)
    raw = json.loads(path.read_text())
    moved = {id_: whole.num_valid_ids + 9 if id_ == 40 else id_ for id_ in range(1000)}
    vocabulary = {token: moved[id_] for token, id_ in raw["model"]["vocab"].items()}
    path.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": vocabulary}}))

    holed = Tokenizer.load(tmp_path)

    assert () == whole.unknown_ids
    assert whole.num_valid_ids + 10 == holed.num_valid_ids
    assert 40 in holed.unknown_ids
    spelled = [bool(holed.token_text(id_)) for id_ in range(holed.num_valid_ids)]
    assert [id_ not in holed.unknown_ids for id_ in range(holed.num_valid_ids)] == spelled
