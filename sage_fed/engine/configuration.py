"""A checkpoint's `config.json`: its values, with its architecture's defaults for absent ones.

Owns what an architecture says where the file does not, as the configuration classes of
`transformers` have it (a test compares the two); those take a second to import, and may run code
that comes with a checkpoint. Knows no weights and no device.
Fails with a `ModelLoadError` that names the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sage_fed.core import HEAD_BYTES, misnomer
from sage_fed.errors import ModelLoadError

T = TypeVar("T", int, float, bool, str)

_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Traits:
    """What an architecture fixes by its code, and what it assumes where its file is silent.

    `qkv_bias` None: `attention_bias` of the file says it. `num_kv_heads` None: as many as there
    are heads. `head_dim` None: the hidden size over the heads. `sliding_window` is None or the
    window's length; `windowed_by_flag`: only where `use_sliding_window` is set.
    """

    model_type: str
    max_position: int
    qkv_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    windowed_by_flag: bool = False


SUPPORTED: dict[str, Traits] = {
    "Qwen2ForCausalLM": Traits(
        model_type="qwen2",
        max_position=32768,
        qkv_bias=True,
        num_kv_heads=32,
        sliding_window=4096,
        windowed_by_flag=True,
    ),
    "Qwen3ForCausalLM": Traits(
        model_type="qwen3",
        max_position=32768,
        qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        windowed_by_flag=True,
    ),
    "LlamaForCausalLM": Traits(model_type="llama", max_position=2048, mlp_bias=True),
    "MistralForCausalLM": Traits(
        model_type="mistral",
        max_position=131072,
        qkv_bias=False,
        num_kv_heads=8,
        sliding_window=4096,
    ),
}


_REFUSED: Mapping[str, tuple[object, str]] = {
    # Keys that change what a model computes, or which weights it has, and that the engine does not
    # follow: the value that changes nothing, and what any other is.
    "transformers_weights": (None, "names other files as the weights"),
    "per_layer_config": (None, "gives layers shapes of their own"),
    "is_encoder_decoder": (False, "is that of an encoder with its decoder"),
    "text_config": (None, "is that of a model of more than text"),
    "chunk_size_feed_forward": (0, "cuts the feed-forward layers"),
    # `transformers` reads these in any architecture: its masks the first, its cache the others.
    "is_causal": (True, "has every token see those behind it"),
    "attention_chunk_size": (None, "attends chunk by chunk"),
    "kv_sharing_modes": (None, "shares the cache between layers"),
}

_FOREIGN: Mapping[str, object] = {
    # Keys by which other architectures change what they compute, and the value that changes
    # nothing; the code of those in `SUPPORTED` reads none of them, in `transformers` as here.
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "moe_intermediate_size": None,
    "no_rope_layers": None,
    "num_experts": None,
    "num_local_experts": None,
    "qk_layernorm": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1.0,
    "use_qk_norm": False,
}


class Configuration:
    """The values of one `config.json`; what is absent or null reads as the default given."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def has(self, key: str) -> bool:
        """Whether the file has the key, be it null."""
        return key in self._raw

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """Return a whole number of at least `low`; without a default it has to be there."""
        value = self._value(key, default, int)
        if value < low:
            raise ModelLoadError(f"config.json: {key} cannot be {value}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number; a whole one will do."""
        value = self._raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return self._value(key, default, float)

    def flag(self, key: str) -> bool:
        """Return a truth, false where the file says nothing."""
        return self._value(key, False, bool)

    def text(self, key: str, default: str) -> str:
        """Return a text."""
        return self._value(key, default, str)

    def listed(self, key: str) -> list[Any] | None:
        """Return a list, or None."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, list):
            raise ModelLoadError(f"config.json: {key} is not a list")
        return value

    def foreign(self) -> Iterator[str]:
        """Say which values are meant for another architecture than the file names."""
        for key, neutral in _FOREIGN.items():
            value = self._raw.get(key)
            if value is not None and value != neutral:
                yield f"config.json: {key} is {value!r}, which this architecture does not read"

    def rope(self) -> dict[str, Any]:
        """Return the rotary parameters, of new files and of old; `rope_theta` is there."""
        raw = self._raw.get("rope_scaling") or self._raw.get("rope_parameters") or {}
        if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
            raise ModelLoadError("config.json: rope_parameters are not one set for all layers")
        beside: dict[str, Any] = {"rope_theta": self.number("rope_theta", _DEFAULT_THETA)}
        if self._raw.get("partial_rotary_factor") is not None:
            beside["partial_rotary_factor"] = self._raw["partial_rotary_factor"]
        # A null is no value; a kind of null is not "default", and refused as a kind.
        kinds = {"rope_type", "type"}
        return beside | {k: v for k, v in raw.items() if v is not None or k in kinds}

    def _value(self, key: str, default: T | None, kind: type[T]) -> T:
        value = self._raw.get(key)
        if value is None:
            if default is None:
                raise ModelLoadError(f"config.json has no {key}")
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ModelLoadError(f"config.json: {key} is {value!r}, which is no {kind.__name__}")
        return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of a checkpoint holds.

    Raises:
        ModelLoadError: it cannot be read, is something else than its name says, or no object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    if (odd := misnomer(content[:HEAD_BYTES], is_text=True)) is not None:
        raise ModelLoadError(f"{path.name} {odd}")
    try:
        raw = json.loads(content.decode())
    except ValueError as error:
        raise ModelLoadError(f"{path.name} is not JSON: {error}") from error
    except RecursionError as error:
        raise ModelLoadError(f"{path.name} is not JSON of any sensible depth") from error
    if not isinstance(raw, dict):
        raise ModelLoadError(f"{path.name} is not a JSON object")
    return raw


def read_configuration(directory: Path) -> tuple[str, Configuration]:
    """Return the architecture that `directory/config.json` names, and its values.

    Raises:
        ModelLoadError: no or a broken file, an architecture that the engine cannot run, or
            weights that are quantised already.
    """
    raw = read_object(directory / "config.json")
    named = raw.get("architectures")
    if not named:  # then `transformers` goes by the type of model
        model_type = raw.get("model_type")
        by_type = {traits.model_type: name for name, traits in SUPPORTED.items()}
        named = [by_type.get(str(model_type), model_type or "none")]
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
    if raw.get("model_type") != SUPPORTED[architecture].model_type:
        raise ModelLoadError(
            f"config.json: model_type {raw.get('model_type')!r} is not that of {architecture}"
        )
    for key, (neutral, what) in _REFUSED.items():
        if (value := raw.get(key)) is not None and value != neutral:
            raise ModelLoadError(
                f"{architecture}: config.json {what} ({key}), which is not supported"
            )
    return architecture, Configuration(raw)
