"""`config.json` says to the engine what it says to `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, LLAMA3, SHAPE
from transformers import AutoConfig

from sage_fed.engine.configuration import ModelSpec, read_spec
from sage_fed.engine.decoder import RopeSpec
from sage_fed.errors import ModelLoadError

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}


def by_transformers(directory: Path, architecture: str) -> ModelSpec:
    """What its configuration classes make of the file."""
    config = AutoConfig.from_pretrained(directory)
    config.standardize_rope_params()  # once more, as each computation of frequencies does
    rope = dict(config.rope_parameters)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    rope.pop("type", None)
    spec = RopeSpec(
        kind,
        theta,
        tuple(sorted((k, float(v)) for k, v in rope.items())),
        max_position=config.max_position_embeddings,
    )
    qwen2, mistral = architecture.startswith("Qwen2"), architecture.startswith("Mistral")
    bias = bool(getattr(config, "attention_bias", False)) and not mistral
    window = getattr(config, "sliding_window", None)
    # Mistral's code has one window for all layers, whatever the file says of their types.
    types = None if mistral else getattr(config, "layer_types", None)
    layers = types or ["sliding_attention"]
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        rms_eps=config.rms_norm_eps,
        max_position=spec.longest,
        rope=spec,
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=architecture.startswith("Qwen3"),
        tied_embeddings=config.tie_word_embeddings,
        sliding_window=window if "sliding_attention" in layers else None,
    )


def write(directory: Path, architecture: str, **values: object) -> Path:
    raw: dict[str, Any] = {
        **{key: SHAPE[key] for key in NEEDED},
        "num_attention_heads": 32,
        "hidden_size": 64,
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        **values,
    }
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_configuration_reads_as_it_was(tmp_path: Path, name: str) -> None:
    """Every architecture as `transformers` saves it."""
    config = CONFIGS[name]
    architecture = f"{type(config).__name__.removesuffix('Config')}ForCausalLM"
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)

    assert by_transformers(tmp_path, architecture) == read_spec(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000},
        {"sliding_window": None},
        {"sliding_window": 128},
        {"sliding_window": 128, "use_sliding_window": True},
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
        {"attention_bias": True, "tie_word_embeddings": True},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_theta": 1e4}},
        {"rope_parameters": YARN, "max_position_embeddings": 512},
        {"rope_parameters": YARN, "original_max_position_embeddings": 99},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    ],
)
def test_what_a_file_leaves_out_is_its_architectures_default(
    tmp_path: Path, architecture: str, values: dict[str, object]
) -> None:
    """Old, hand-written and sparse files mean what the configuration classes take them to mean."""
    write(tmp_path, architecture, **values)
    if architecture == "MistralForCausalLM" and values == {"num_key_value_heads": None}:
        # Its configuration class takes no null.
        assert read_spec(tmp_path).num_kv_heads == read_spec(tmp_path).num_heads
        return
    assert by_transformers(tmp_path, architecture) == read_spec(tmp_path)


@pytest.mark.parametrize("key", NEEDED)
def test_a_size_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    """A model's size is never guessed."""
    with pytest.raises(ModelLoadError, match=f"config.json has no {key}"):
        read_spec(write(tmp_path, "LlamaForCausalLM", **{key: None}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers cannot be 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"layer_types": "full", "use_sliding_window": True}, "layer_types is not a list"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"model_type": "llama"}, "model_type 'llama' is not that of Qwen2ForCausalLM"),
    ],
)
def test_a_value_of_another_kind_is_named(
    tmp_path: Path, values: dict[str, object], text: str
) -> None:
    """The message says which key holds what."""
    with pytest.raises(ModelLoadError, match=text):
        read_spec(write(tmp_path, "Qwen2ForCausalLM", **values))
