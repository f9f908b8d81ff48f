"""Every key of the reference's configurations: read alike, without effect, or refused by name.

The tables below name each key that `transformers` has for the four architectures, its base class
included, and values that differ from the default. For each value the reference builds a model
from the file, and the engine loads its weights under the same file: both answer alike, or the
engine refuses by name. A key that a new version of `transformers` adds fails here until somebody
says what it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import generate, logits
from safetensors.torch import save_file
from tiny_models import Checkpoint, prompt_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sage_fed.engine import Engine, EngineOptions, load_engine, read_spec
from sage_fed.errors import ModelLoadError

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
}

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "sliding_window": None,
    "eos_token_id": 7,
}

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""In fp32, of logits that are tens apart."""

ABSENT = object()
"""The key is taken out of the file."""


@dataclass(frozen=True)
class Key:
    """What a key does, and values to try; `refused` are those that the engine does not take."""

    why: str
    values: tuple[Any, ...]
    refused: tuple[Any, ...] = ()
    together: tuple[tuple[str, Any], ...] = ()
    """Other keys, without which this one says nothing."""


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = (("use_sliding_window", True), ("sliding_window", 12))

READ: dict[str, Key] = {
    "vocab_size": Key("rows of both tables", (97, 200)),
    "hidden_size": Key("shape", (24, 96)),
    "intermediate_size": Key("shape", (64,)),
    "num_hidden_layers": Key("shape", (1, 3)),
    "num_attention_heads": Key("shape", (2, 12), refused=(5,)),
    "num_key_value_heads": Key("shape; null is one a head", (1, 3, 6, None), refused=(4,)),
    "head_dim": Key("shape; absent it is a quotient", (4, 10, 16, ABSENT), refused=(7,)),
    "hidden_act": Key("activation", ("silu", "swish"), refused=("gelu", "relu", "gelu_new")),
    "max_position_embeddings": Key("the longest context", (64, 256, ABSENT)),
    "rms_norm_eps": Key("arithmetic of the norms", (1e-5, 0.1, ABSENT)),
    "tie_word_embeddings": Key("one table or two", (True, False, ABSENT)),
    "rope_theta": Key("base frequency", (500.0, 1_000_000, ABSENT)),
    "rope_scaling": Key(
        "how positions are stretched; before `rope_parameters`; test_engine_rope has the rest",
        ({"type": "linear", "factor": 2.0}, None),
        refused=({"type": "su", "factor": 2.0},),
    ),
    "rope_parameters": Key(
        "the same in new files",
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, None, {}),
        refused=({FULL: {"rope_type": "default", "rope_theta": 500.0}},),
    ),
    "original_max_position_embeddings": Key(
        "before the one among the rotary parameters",
        (16, 64),
        together=(("rope_scaling", {"type": "yarn", "factor": 4.0}),),
    ),
    "partial_rotary_factor": Key("how much of a head turns", (1.0, None), refused=(0.5,)),
    "attention_bias": Key("biases of the projections, where the architecture asks", (True,)),
    "mlp_bias": Key("biases of the feed-forward layers, likewise", (True,)),
    "sliding_window": Key("Mistral's code, Qwen's with its flag; Llama's cache", (12, 500)),
    "use_sliding_window": Key("switches it on", (True,), together=(("sliding_window", 12),)),
    "max_window_layers": Key("from which layer on", (0, 1, 2), together=WINDOWED),
    "layer_types": Key(
        "which layers",
        ([FULL, FULL], [FULL, SLIDING], [SLIDING, SLIDING]),
        refused=([FULL], ["chunked_attention", FULL]),
        together=WINDOWED,
    ),
    "architectures": Key("absent: by the type of model", (ABSENT, None), refused=(["GPT2Model"],)),
    "model_type": Key("the architecture's", (), refused=(ABSENT, "gpt2")),
    "dtype": Key("precision is the operator's; tensors say their own", ("bfloat16", "float16")),
    "torch_dtype": Key("the older name", ("bfloat16",)),
}

WITHOUT_EFFECT: dict[str, Key] = {
    "attention_dropout": Key("training", (0.5,)),
    "initializer_range": Key("training", (0.02,)),
    "use_cache": Key("what a caller gets, not what is computed", (False,)),
    "pretraining_tp": Key("how the sums of an old Llama were split; unread since 4.5x", (2,)),
    "pad_token_id": Key("a row that training leaves alone", (3,)),
    "bos_token_id": Key("the tokenizer's and the template's", (5,)),
    "eos_token_id": Key("where a text ends, not what it is; `read_generation`", (9, [9, 10])),
    "transformers_version": Key("who wrote the file", ("4.0.0",)),
    "output_hidden_states": Key("what a caller gets", (True,)),
    "output_attentions": Key("what a caller gets", (False,)),
    "return_dict": Key("what a caller gets", (True,)),
    "id2label": Key("classifiers", ({"0": "a"},)),
    "label2id": Key("classifiers", ({"a": 0},)),
    "problem_type": Key("classifiers", ("regression",)),
    "num_labels": Key("classifiers", (5,)),
    "name_or_path": Key("a name", ("someone/else",)),
    "_name_or_path": Key("a name", ("someone/else",)),
    "attn_implementation": Key("which of the reference's kernels", ("eager",)),
    "logits_scaling": Key("another architecture's, and said to be", (8.0,)),
    "residual_multiplier": Key("another architecture's, and said to be", (0.5,)),
    "final_logit_softcapping": Key("another architecture's, and said to be", (30.0,)),
    "auto_map": Key("code, which is never run", ({"AutoConfig": "evil.Evil"},)),
}

REFUSED: dict[str, Key] = {
    "chunk_size_feed_forward": Key("no reader in these architectures", (0,), refused=(16,)),
    "is_causal": Key("masks: each token sees those behind it", (True,), refused=(False,)),
    "attention_chunk_size": Key("the cache: attention in chunks", (None,), refused=(12,)),
    "kv_sharing_modes": Key("the cache: layers that share it", (None,), refused=(["reuse"],)),
    "is_encoder_decoder": Key("another kind of model", (False,), refused=(True,)),
    "quantization_config": Key(
        "other numbers than the tensors' own", (None,), refused=({"quant_method": "gptq"},)
    ),
    "per_layer_config": Key(
        "layers of other shapes", (None,), refused=({"0": {"intermediate_size": 64}},)
    ),
    "transformers_weights": Key("another file", (None,), refused=("other.safetensors",)),
    "text_config": Key("a part of a larger model", (None,), refused=({"hidden_size": 24},)),
}

KEYS = READ | WITHOUT_EFFECT | REFUSED


def cases() -> Iterator[Any]:
    for name in FAMILIES:
        for key, told in KEYS.items():
            for value in (*told.values, *told.refused):
                shown = "absent" if value is ABSENT else json.dumps(value)
                yield pytest.param(name, key, value, id=f"{name[:-11]}-{key}-{shown[:40]}")


def write(directory: Path, name: str, **values: object) -> dict[str, Any]:
    raw = {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        **BASE,
        **values,
    }
    raw = {key: value for key, value in raw.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(raw))
    return raw


def reference_of(directory: Path) -> Checkpoint:
    """A random model under the file, saved beside it; raises where transformers refuses it."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    # What it hands out beside logits, its tensors' type and its kernel are not what is compared.
    config.output_hidden_states = False
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.normal_(1.0, 0.2)
    model.generation_config.use_cache = True
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(directory, model)


def load(directory: Path) -> Engine:
    """Load as far as the engine goes: a context that it refuses, it says how to shorten."""
    options = EngineOptions(str(directory), kv_cache_bytes=1 << 24, kernels="torch")
    context = min(read_spec(directory).max_position, 256)
    try:
        return load_engine(dataclasses.replace(options, max_context_tokens=context), lambda _: None)
    except ModelLoadError as error:
        shorter = re.search(r"set max_context_tokens to (\d+) or less", error.message)
        if shorter is None:
            raise
    options = dataclasses.replace(options, max_context_tokens=int(shorter[1]))
    return load_engine(options, lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key", "value"), list(cases()))
def test_a_key_means_what_it_means_to_transformers(
    tmp_path: Path, name: str, key: str, value: object
) -> None:
    """Alike, or refused by name; never another answer."""
    told = KEYS[key]
    write(tmp_path, name, **dict(told.together) | {key: value})
    # Its class takes no null, as those of its relatives do, where older versions took one alike.
    untried = (name, key, value) == ("MistralForCausalLM", "num_key_value_heads", None)
    if untried:
        return
    if value in told.refused:
        with contextlib.suppress(Exception):
            reference_of(tmp_path)  # so that weights cannot be what the engine misses
        with pytest.raises(ModelLoadError) as caught:
            load(tmp_path)
        assert "safetensors" not in caught.value.message, caught.value.message
        return
    reference = reference_of(tmp_path)

    engine = load(tmp_path)  # a shorter context, where that is what it says

    room = engine.max_context_tokens
    prompt = tuple(token % 90 for token in prompt_of(min(room - 6, 60)))
    num_new = min(room - len(prompt), 5)
    expected = reference.logits(prompt)[-1]
    torch.testing.assert_close(logits(engine, prompt), expected - expected.mean(), **CLOSE)
    # Step by step, too: a cache may have windows of its own.
    assert reference.greedy(prompt, num_new) == generate(engine, prompt, num_new)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_without_effect_changes_nothing_that_the_engine_reads(
    tmp_path: Path, name: str
) -> None:
    """The same model, whatever it says; that the reference says so, too, is the slower walk's."""
    write(tmp_path, name)
    plain = read_spec(tmp_path)
    for key, told in WITHOUT_EFFECT.items():
        for value in told.values:
            write(tmp_path, name, **{key: value})
            assert plain == read_spec(tmp_path), key


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_followed_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Before a weight is read; the value that changes nothing is taken."""
    for key, told in REFUSED.items():
        write(tmp_path, name, **{key: told.values[0]})
        read_spec(tmp_path)
        for value in told.refused:
            write(tmp_path, name, **{key: value})
            with pytest.raises(ModelLoadError, match=key.removesuffix("ization_config")):
                read_spec(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_reference_is_in_a_table(name: str) -> None:
    """A new version's new key is read, without effect or refused, and somebody has to say which."""
    fields = {field.name for field in dataclasses.fields(FAMILIES[name])}  # type: ignore[arg-type]
    saved = set(FAMILIES[name]().to_dict())

    assert set() == {key for key in fields | saved if not key.startswith("__")} - KEYS.keys()


def test_a_key_is_in_one_table() -> None:
    """And each table's values are tried: a key without any would show nothing."""
    assert len(KEYS) == len(READ) + len(WITHOUT_EFFECT) + len(REFUSED)
    assert all(key.values or key.refused for key in KEYS.values())


@pytest.mark.parametrize(
    "key", ["logits_scaling", "residual_multiplier", "final_logit_softcapping"]
)
def test_a_key_of_another_architecture_is_said_to_be_unread(tmp_path: Path, key: str) -> None:
    """Transformers ignores it in silence; whoever made the file meant something by it."""
    write(tmp_path, "LlamaForCausalLM", **{key: WITHOUT_EFFECT[key].values[0]})
    assert f"config.json: {key} is" in "\n".join(read_spec(tmp_path).remarks)
