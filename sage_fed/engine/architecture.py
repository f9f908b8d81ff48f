"""Which decoder a checkpoint holds: its shape, its rotary scaling, its biases.

Owns the list of architectures that the engine's forward pass can run, and the reading of
`config.json` through `transformers` (never with remote code).
Knows no weights and no device. Anything that the forward pass would compute wrongly is
refused here with a `ModelLoadError` that names it, before a byte of weights is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from sage_fed.engine.rotary import SUPPORTED_ROPE, RopeSpec
from sage_fed.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a decoder that its forward pass depends on, weights aside.

    `sliding_window` is None where no layer uses one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_position: int
    rope: RopeSpec
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    sliding_window: int | None

    @property
    def kv_width(self) -> int:
        """Elements that one token adds to one layer's cache, K and V together."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class _Traits:
    """What an architecture fixes by its code, not by its configuration."""

    qkv_bias: bool | None  # None: `attention_bias` of the configuration says it
    qk_norm: bool = False


SUPPORTED: dict[str, _Traits] = {
    "Qwen2ForCausalLM": _Traits(qkv_bias=True),
    "Qwen3ForCausalLM": _Traits(qkv_bias=None, qk_norm=True),
    "LlamaForCausalLM": _Traits(qkv_bias=None),
    "MistralForCausalLM": _Traits(qkv_bias=False),
}


def read_spec(directory: Path) -> ModelSpec:
    """Read `directory/config.json` into a `ModelSpec`.

    Raises:
        ModelLoadError: no or broken configuration, or one that the engine cannot run.
    """
    architecture = _architecture(directory)
    traits = SUPPORTED[architecture]
    config = _load_config(directory)
    activation = config.hidden_act
    if activation != "silu":
        raise ModelLoadError(f"{architecture}: activation {activation!r}; only 'silu' is supported")
    num_heads: int = config.num_attention_heads
    num_kv_heads: int = config.num_key_value_heads or num_heads
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"{architecture}: {num_kv_heads} KV heads do not divide {num_heads} attention heads"
        )
    attention_bias = bool(getattr(config, "attention_bias", False))
    qkv_bias = attention_bias if traits.qkv_bias is None else traits.qkv_bias
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        rms_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        rope=_rope(architecture, config),
        qkv_bias=qkv_bias,
        out_bias=qkv_bias if traits.qkv_bias is None else False,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=traits.qk_norm,
        tied_embeddings=bool(config.tie_word_embeddings),
        sliding_window=_sliding_window(config),
    )


def _architecture(directory: Path) -> str:
    """Name the architecture, from the raw JSON: an unknown one must not reach `transformers`."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError("config.json cannot be read") from error
    except ValueError as error:
        raise ModelLoadError(f"config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelLoadError("config.json is not a JSON object")
    named = raw.get("architectures") or [raw.get("model_type") or "none"]
    architecture = str(named[0]) if isinstance(named, list) else str(named)
    if architecture not in SUPPORTED:
        raise ModelLoadError(
            f"architecture {architecture} is not supported; "
            f"the engine runs {', '.join(sorted(SUPPORTED))}"
        )
    if (quantised := raw.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelLoadError(
            f"{architecture}: the checkpoint is quantised ({method}); "
            "use the original bf16, fp16 or fp32 weights"
        )
    return architecture


def _load_config(directory: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelLoadError(f"config.json cannot be used: {error}") from error
    return config


def _rope(architecture: str, config: PretrainedConfig) -> RopeSpec:
    raw: dict[str, Any] = dict(config.rope_parameters or {})
    kind = str(raw.pop("rope_type", raw.pop("type", "default")))
    raw.pop("type", None)
    if kind not in SUPPORTED_ROPE:
        raise ModelLoadError(
            f"{architecture}: rotary scaling {kind!r} is not supported; "
            f"the engine runs {', '.join(sorted(SUPPORTED_ROPE))}"
        )
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{architecture}: partial rotary embeddings are not supported")
    theta = raw.pop("rope_theta", None)
    if theta is None:
        raise ModelLoadError(f"{architecture}: config.json has no rope_theta")
    numbers = {key: float(value) for key, value in raw.items() if isinstance(value, int | float)}
    if kind in {"llama3", "yarn"}:
        numbers.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    if missing := SUPPORTED_ROPE[kind] - numbers.keys():
        raise ModelLoadError(
            f"{architecture}: rotary scaling {kind!r} lacks {', '.join(sorted(missing))}"
        )
    return RopeSpec(kind=kind, theta=float(theta), scaling=tuple(sorted(numbers.items())))


def _sliding_window(config: PretrainedConfig) -> int | None:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        return None
    return int(window)
