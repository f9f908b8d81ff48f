"""Rotary scaling is `transformers`' to the last bit; its longest context is its recipe's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import generate
from tiny_models import SHAPE, edit_json, prompt_of, save_random
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sage_fed.engine import Engine, EngineOptions, load_engine, read_spec
from sage_fed.engine.decoder import rotary_table
from sage_fed.errors import ModelLoadError

HEAD_DIM = 64
ORIGINAL = "original_max_position_embeddings"
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    ORIGINAL: 8192,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 32 for i in range(32)],
    "long_factor": [2.0 + i / 8 for i in range(32)],
    ORIGINAL: 4096,
}


def write(directory: Path, values: dict[str, object], kind: str = "Qwen2ForCausalLM") -> Path:
    """A configuration with heads of 64; what is None is left out."""
    raw = {
        "architectures": [kind],
        "model_type": kind.removesuffix("ForCausalLM").lower(),
        "vocab_size": 64,
        "hidden_size": 2 * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    }
    said = {key: value for key, value in (raw | values).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def reference_table(directory: Path, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as the reference's own module has them."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    return cos[0], sin[0]


SCALINGS: list[tuple[str, dict[str, object]]] = [
    ("none", {}),
    ("theta", {"rope_theta": 10000}),
    ("theta absent", {"rope_theta": None}),
    ("theta inside", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("linear 2.5", {"rope_scaling": {"rope_type": "linear", "factor": 2.5, ORIGINAL: 8192}}),
    ("llama3", {"rope_scaling": LLAMA3, "max_position_embeddings": 131072}),
    ("llama 3.2", {"rope_scaling": LLAMA3 | {"factor": 32.0}, "max_position_embeddings": 131072}),
    ("llama3 odd", {"rope_scaling": LLAMA3 | {"factor": 3.3, "high_freq_factor": 5.5}}),
    ("yarn", {"rope_scaling": YARN}),
    ("yarn, old name", {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}}),
    ("yarn, new place", {"rope_parameters": YARN | {"rope_theta": 5e5}}),
    ("yarn, both places", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}),
    ("yarn, no original", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("yarn, original beside", {"rope_scaling": YARN, ORIGINAL: 4096}),
    ("yarn, 2.5", {"rope_scaling": YARN | {"factor": 2.5}}),
    ("yarn, attention_factor", {"rope_scaling": YARN | {"attention_factor": 0.75}}),
    ("yarn, null", {"rope_scaling": YARN | {"attention_factor": None, "beta_fast": None}}),
    ("yarn, mscale", {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}}),
    ("yarn, mscale alone", {"rope_scaling": YARN | {"mscale": 0.707}}),
    ("yarn, mscale of 0", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}}),
    ("yarn, betas", {"rope_scaling": YARN | {"beta_fast": 24, "beta_slow": 2.0}}),
    ("yarn, equal betas", {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 4}}),
    ("yarn, not truncated", {"rope_scaling": YARN | {"truncate": False}}),
    ("yarn, small theta", {"rope_scaling": YARN, "rope_theta": 1000.0}),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("dynamic 3.7", {"rope_scaling": {"type": "dynamic", "factor": 3.7}}),
    ("longrope", {"rope_scaling": LONGROPE, "max_position_embeddings": 131072}),
    ("longrope, factor", {"rope_scaling": LONGROPE | {"factor": 16.0}}),
    ("longrope, attention_factor", {"rope_scaling": LONGROPE | {"attention_factor": 1.1}}),
]


@pytest.mark.parametrize("kind", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("values", [v for _, v in SCALINGS], ids=[n for n, _ in SCALINGS])
def test_cosines_and_sines_are_the_references(
    tmp_path: Path, values: dict[str, object], kind: str
) -> None:
    """Every kind of scaling with each of its parameters, at near and far positions: bit by bit."""
    write(tmp_path, values, kind)
    spec = read_spec(tmp_path)
    context = min(spec.rope.constant_up_to or spec.max_position, 131072)
    positions = torch.cat((torch.arange(64), torch.arange(context - 64, context)))

    table = rotary_table(spec.rope, HEAD_DIM, context, torch.float32, torch.device("cpu"))

    cos, sin = reference_table(tmp_path, positions)
    half = HEAD_DIM // 2
    ours = table[positions, :, 0]
    assert torch.equal(cos, ours[:, 0])
    assert torch.equal(sin[:, half:], ours[:, 1, half:])
    assert torch.equal(-sin[:, :half], ours[:, 1, :half])


@pytest.mark.parametrize(
    ("values", "longest"),
    [
        # As published: https://huggingface.co/Qwen/Qwen2.5-7B-Instruct, "Processing Long Texts".
        ({"rope_scaling": YARN}, 131072),
        # The same for Qwen3, whose configuration leaves room for the answer.
        ({"rope_scaling": YARN, "max_position_embeddings": 40960}, 131072),
        ({"rope_scaling": YARN, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": YARN | {"factor": 2.5}}, 81920),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 65536),
        ({"rope_scaling": YARN, ORIGINAL: 8192}, 32768),
        # vicuna-7b-v1.5-16k; `max_position_embeddings` is not to be changed with these.
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 4096},
            16384,
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 4.0, ORIGINAL: 4096},
                "max_position_embeddings": 16384,
            },
            16384,
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 65536),
        # Models that were trained so name the scaled length: Llama 3.1's is not 8 x 8,192.
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": LONGROPE, "max_position_embeddings": 131072}, 131072),
        ({}, 32768),
    ],
)
def test_the_longest_context_is_what_the_recipe_means(
    tmp_path: Path, values: dict[str, object], longest: int
) -> None:
    """`factor` times the original length, where the configuration's own length is left alone."""
    assert longest == read_spec(write(tmp_path, values)).max_position


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su' is not supported"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "'None' is not supported"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' lacks factor"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor cannot be '4'"),
        ({"rope_scaling": YARN | {"factor": True}}, "factor cannot be True"),
        ({"rope_scaling": YARN | {"factor": 0}}, "factor cannot be 0"),
        ({"rope_scaling": YARN | {"beta_fast": [32]}}, r"beta_fast cannot be \[32\]"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate cannot be 1"),
        ({"rope_scaling": YARN | {ORIGINAL: -1}}, f"{ORIGINAL} cannot be -1"),
        ({"rope_theta": 0}, "rope_theta cannot be 0"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, "short_factor of longrope has"),
        ({"rope_scaling": LONGROPE | {"long_factor": None}}, "long_factor of longrope has"),
        ({"rope_parameters": {"full_attention": YARN}}, "one set for all layers"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"head_dim": 63}, "heads of 63"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, values: dict[str, object], text: str
) -> None:
    """No parameter is dropped because it is of another type."""
    with pytest.raises(ModelLoadError, match=text):
        read_spec(write(tmp_path, values))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rope_scaling": YARN | {"mrope_section": [16, 8]}}, "does not read mrope_section"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "does not read factor"),
        ({"rope_scaling": YARN, "max_position_embeddings": 65536}, "longest context is 131,072"),
    ],
)
def test_what_contradicts_itself_is_said(
    tmp_path: Path, values: dict[str, object], text: str
) -> None:
    """Transformers warns of these, too, and computes the same."""
    assert text in "\n".join(read_spec(write(tmp_path, values)).remarks)


def test_a_published_recipe_is_served_beyond_the_length_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """YaRN added by hand: four times the original length, and the answers are the reference's."""
    caplog.set_level(logging.WARNING)
    shape = SHAPE | {"max_position_embeddings": 64, "num_hidden_layers": 2}
    saved = save_random(Qwen2Config(**shape), tmp_path / "model")
    edit_json(saved.path / "config.json", rope_scaling=YARN | {ORIGINAL: 64}, rope_parameters=None)
    model = AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32).eval()
    reference = type(saved)(saved.path, model)

    options = EngineOptions(model=str(saved.path), kv_cache_bytes=1 << 22)
    engine = load_engine(options, lambda _: None)

    assert 256 == engine.max_context_tokens
    assert reference.greedy(prompt_of(200), 50) == generate(engine, prompt_of(200), 50)
    assert "max_position_embeddings" not in caplog.text


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 128),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                ORIGINAL: 64,
            },
            64,
        ),
    ],
)
def test_scaling_that_depends_on_the_length_is_served_as_far_as_it_does_not(
    tmp_path: Path, scaling: dict[str, object], limit: int
) -> None:
    """Beyond that the context is refused with the setting that helps; up to it, it is right."""
    shape = SHAPE | {"max_position_embeddings": 128}
    saved = save_random(LlamaConfig(**shape, rope_parameters=scaling), tmp_path / "model")

    def load(context: int | None) -> Engine:
        options = EngineOptions(
            model=str(saved.path), kv_cache_bytes=1 << 22, max_context_tokens=context
        )
        return load_engine(options, lambda _: None)

    for context in (None, limit + 1):
        with pytest.raises(ModelLoadError, match=f"set max_context_tokens to {limit} or less"):
            load(context)
    assert saved.greedy(prompt_of(limit - 20), 20) == generate(
        load(limit), prompt_of(limit - 20), 20
    )
