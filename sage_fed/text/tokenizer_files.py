"""What a checkpoint says of its tokenizer: the backend, the named tokens, the chat template.

Owns the reading of the tokenizer's files. A byte-level tokenizer (Qwen, Llama 3) is read as its
`tokenizer.json` has it. Any other is built by `transformers`, whose rules for SentencePiece
vocabularies are too many to repeat, and which takes a second or more to import: it is imported
for those only. Never runs code of the checkpoint.
Fails with `ModelLoadError` that names the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from sage_fed.errors import ModelLoadError
from sage_fed.model_files import HEAD_BYTES, misnomer, resolve_model

_BACKEND = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_OLDER = ("special_tokens_map.json", "added_tokens.json")
"""What came before `added_tokens_decoder` in the configuration, which makes them void."""

_BINARY = ("tokenizer.model", "spiece.model")
_FILES = (_BACKEND, _CONFIG, _TEMPLATE, "vocab.json", "merges.txt", *_BINARY)
_MORE_TEMPLATES = "additional_chat_templates"
_DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model"]

_AS_IT_IS = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes of `transformers` that add nothing to `tokenizer.json`."""

_QWEN = frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"})
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How this class splits text, whatever `tokenizer.json` says."""

_ODD = frozenset({"auto_map", "fast_tokenizer_files"})
"""Keys that name other files, or code."""

_QWEN_DEFAULTS = ("unk_token", "eos_token", "pad_token")
"""Tokens that this class invents where the configuration does not even say null."""


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Everything that makes a tokenizer; `named` are its tokens by name (`eos_token`)."""

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    template: str | None


def locate_tokenizer(source: str | Path, revision: str | None) -> Path:
    """Return the directory of a tokenizer's files, downloaded if `source` is a hub id.

    Blocking. Raises `ModelLoadError`.
    """
    try:
        found = resolve_model(source)
    except ValueError as error:
        raise ModelLoadError(f"no usable tokenizer in {source}: {error}") from error
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second to import
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, OSError, ValueError) as error:
        # Not the error's text: it may hold addresses and tokens.
        why = f"it could not be downloaded ({type(error).__name__})"
        raise ModelLoadError(f"no usable tokenizer in {source}: {why}") from error


def fingerprint(directory: Path) -> bytes | None:
    """Return what is equal for two directories only if they hold the same tokenizer.

    None where that cannot be said from a few files alone.
    """
    if _has_more(directory):
        return None
    digest = hashlib.sha256()
    for name in (_BACKEND, _CONFIG, _TEMPLATE):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.digest()


def read_source(directory: Path) -> TokenizerSource:
    """Read a tokenizer. Blocking, and it holds the interpreter for a large vocabulary.

    Raises:
        ModelLoadError: no usable tokenizer there.
    """
    _refuse_misnomers(directory)
    try:
        return _as_it_is(directory) or _through_transformers(directory)
    except Exception as error:  # tokenizers raises it bare for a bad file
        raise ModelLoadError(f"no usable tokenizer in {directory}: {error}") from error


def _refuse_misnomers(directory: Path) -> None:
    """Name a file that is something else than its name says, before a parser chokes on it.

    Raises:
        ModelLoadError: a pointer of Git LFS, a web page, an empty file.
    """
    for name in (*_FILES, *_OLDER):
        try:
            with (directory / name).open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError:
            continue  # a missing file is often none that is needed
        # An empty template is a template.
        if (head or name != _TEMPLATE) and (
            odd := misnomer(head, is_text=name not in _BINARY)
        ) is not None:
            raise ModelLoadError(f"no usable tokenizer in {directory}: {name} {odd}")


def source_of(hf: Any) -> TokenizerSource:  # noqa: ANN401 - transformers does not type it
    """Return what a tokenizer of `transformers` is made of."""
    template = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    # A copy: the owner of `hf` may change its flags.
    backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
    return TokenizerSource(backend, dict(hf.special_tokens_map), template)


def _as_it_is(directory: Path) -> TokenizerSource | None:
    """Read the files without `transformers`; None where it would make something else of them."""
    config = _json_object(directory / _CONFIG)
    kind = config.get("tokenizer_class")
    # A Qwen2 model gets its own class, whatever the configuration names.
    qwen = kind in _QWEN or _json_object(directory / "config.json").get("model_type") == "qwen2"
    plain = all(key in config for key in _QWEN_DEFAULTS) if qwen else kind in _AS_IT_IS
    if not plain or _ODD.intersection(config) or _has_more(directory):
        return None
    template = config.get("chat_template")
    if (path := directory / _TEMPLATE).is_file():
        template = path.read_text(encoding="utf-8")
    path = directory / _BACKEND
    if not path.is_file() or not isinstance(template, str | None):
        return None
    backend = tokenizers.Tokenizer.from_file(str(path))
    if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
        return None
    if qwen and not _splits_like_qwen(backend):
        return None
    added = backend.get_added_tokens_decoder().values()
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        return None
    named = _named_tokens(config)
    special = {*named.values(), *map(_content, extra)}
    declared = set(map(_content, config.get("added_tokens_decoder", {}).values()))
    # What is missing in the backend, `transformers` would add to it.
    if not special <= {token.content for token in added if token.special}:
        return None
    if not declared <= {token.content for token in added}:
        return None
    return TokenizerSource(backend, named, template)


def _splits_like_qwen(backend: tokenizers.Tokenizer) -> bool:
    if not isinstance(backend.normalizer, tokenizers.normalizers.NFC):
        return False
    steps = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    expected = (
        {
            "type": "Split",
            "pattern": {"Regex": _QWEN_SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    )
    return len(steps) == len(expected) and all(
        step == step | wanted for step, wanted in zip(steps, expected, strict=True)
    )


def _has_more(directory: Path) -> bool:
    """Whether there are files beside the three that `_as_it_is` knows."""
    older = any((directory / name).is_file() for name in _OLDER)
    void = older and "added_tokens_decoder" in _json_object(directory / _CONFIG)
    return (older and not void) or (directory / _MORE_TEMPLATES).is_dir()


def _through_transformers(directory: Path) -> TokenizerSource:
    from transformers import AutoTokenizer  # noqa: PLC0415 - see the module's docstring

    hf = AutoTokenizer.from_pretrained(
        str(directory), trust_remote_code=False, local_files_only=True
    )
    if not hf.is_fast:
        raise ModelLoadError("it has no tokenizer.json; convert its tokenizer first")
    return source_of(hf)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that a template may write by name."""
    return {
        name: _content(token)
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _json_object(path: Path) -> dict[str, Any]:
    """Return a file's object; an empty one where there is no file."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(raw, dict):
        raise TypeError(f"{path.name} is not a JSON object")
    return raw
