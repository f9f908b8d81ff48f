"""Which decoder a checkpoint holds: its shape, its rotary scaling, its biases.

Owns what the engine's forward pass can run, out of what `configuration` reads.
Knows no weights and no device. Anything that the forward pass would compute wrongly is
refused here with a `ModelLoadError` that names it, before a byte of weights is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_fed.engine.configuration import SUPPORTED, Configuration, Traits, read_configuration
from sage_fed.engine.rotary import SUPPORTED_ROPE, RopeSpec
from sage_fed.errors import ModelLoadError

_ORIGINAL = "original_max_position_embeddings"
_MAY_BE_ZERO = frozenset(
    {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
_NO_WINDOW = 2**63
"""What a window of null reads as."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a decoder that its forward pass depends on, weights aside.

    `sliding_window` is None where no layer uses one. `remarks` say where the configuration
    contradicts itself, or says what nothing reads.
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
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kv_width(self) -> int:
        """Elements that one token adds to one layer's cache, K and V together."""
        return 2 * self.num_kv_heads * self.head_dim


def read_spec(directory: Path) -> ModelSpec:
    """Read `directory/config.json` into a `ModelSpec`.

    Raises:
        ModelLoadError: no or broken configuration, or one that the engine cannot run.
    """
    architecture, config = read_configuration(directory)
    traits = SUPPORTED[architecture]
    activation = config.text("hidden_act", "silu")
    if activation not in {"silu", "swish"}:
        raise ModelLoadError(f"{architecture}: activation {activation!r}; only 'silu' is supported")
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = _num_kv_heads(architecture, config, num_heads)
    num_layers = config.integer("num_hidden_layers")
    head_dim = config.integer("head_dim", traits.head_dim or hidden_size // num_heads)
    rope, remarks = _rope(architecture, config, traits, head_dim)
    attention_bias = config.flag("attention_bias")
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_eps=config.number("rms_norm_eps", 1e-6),
        max_position=rope.longest,
        rope=rope,
        qkv_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
        out_bias=attention_bias if traits.qkv_bias is None else False,
        mlp_bias=traits.mlp_bias and config.flag("mlp_bias"),
        qk_norm=traits.qk_norm,
        tied_embeddings=config.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(config, traits, num_layers),
        remarks=(*remarks, *config.foreign()),
    )


def _num_kv_heads(architecture: str, config: Configuration, num_heads: int) -> int:
    # A file that says null means as many as there are heads; one that says nothing, the default.
    silent = None if config.has("num_key_value_heads") else SUPPORTED[architecture].num_kv_heads
    num_kv_heads = config.integer("num_key_value_heads", silent or num_heads)
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"{architecture}: {num_kv_heads} KV heads do not divide {num_heads} attention heads"
        )
    return num_kv_heads


def _rope(
    architecture: str, config: Configuration, traits: Traits, head_dim: int
) -> tuple[RopeSpec, tuple[str, ...]]:
    """Read the rotary scaling, and what is to be said of it."""
    if head_dim % 2:
        raise ModelLoadError(f"{architecture}: heads of {head_dim}, an odd size, cannot turn")
    raw: dict[str, Any] = config.rope()
    kind = str(raw.pop("rope_type", raw.pop("type", "default")))
    raw.pop("type", None)
    if kind not in SUPPORTED_ROPE:
        raise ModelLoadError(
            f"{architecture}: rotary scaling {kind!r} is not supported; "
            f"the engine runs {', '.join(sorted(SUPPORTED_ROPE))}"
        )
    if raw.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{architecture}: partial rotary embeddings are not supported")
    max_position = config.integer("max_position_embeddings", traits.max_position)
    parameters = SUPPORTED_ROPE[kind]
    unread = sorted(raw.keys() - parameters.read)
    given = {key: value for key, value in raw.items() if key in parameters.read}
    short_factor = _factors(kind, given, head_dim) if kind == "longrope" else ()
    if _ORIGINAL in parameters.needed:
        # One beside the parameters goes before one among them, as in Phi-3's files.
        given[_ORIGINAL] = config.integer(_ORIGINAL, given.get(_ORIGINAL, max_position))
    if missing := parameters.needed - given.keys() - {"short_factor", "long_factor"}:
        raise ModelLoadError(
            f"{architecture}: rotary scaling {kind!r} lacks {', '.join(sorted(missing))}"
        )
    numbers = {key: _rope_number(key, value) for key, value in given.items()}
    rope = RopeSpec(
        kind=kind,
        theta=numbers.pop("rope_theta"),
        scaling=tuple(sorted(numbers.items())),
        short_factor=short_factor,
        max_position=max_position,
    )
    return rope, tuple(_rope_remarks(rope, unread))


def _factors(kind: str, given: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Take the two lists of factors out of `given`; the short ones are returned."""
    lists = []
    for key in ("short_factor", "long_factor"):
        values = given.pop(key, None)
        if not isinstance(values, list) or len(values) != head_dim // 2:
            raise ModelLoadError(
                f"config.json: {key} of {kind} has to be a list of {head_dim // 2} numbers"
            )
        lists.append(tuple(_rope_number(key, value) for value in values))
    return lists[0]


def _rope_number(key: str, value: object) -> float:
    """Return a rotary parameter; whether a correction range is truncated is one, too."""
    is_number = isinstance(value, int | float) and (isinstance(value, bool) == (key == "truncate"))
    number = float(value) if isinstance(value, int | float) and is_number else math.nan
    if not math.isfinite(number) or (number <= 0 and key not in _MAY_BE_ZERO):
        raise ModelLoadError(f"config.json: rotary parameter {key} cannot be {value!r}")
    return number


def _rope_remarks(rope: RopeSpec, unread: list[str]) -> Iterator[str]:
    if unread:
        yield f"config.json: rotary scaling {rope.kind!r} does not read {', '.join(unread)}"
    original = dict(rope.scaling).get(_ORIGINAL, rope.max_position)
    if rope.kind == "yarn" and rope.max_position not in (int(original), rope.longest):
        yield (
            f"config.json has max_position_embeddings {rope.max_position:,}, and rotary scaling "
            f"'yarn' of {original:,.0f} positions to {rope.longest:,}; the longest context is "
            f"{rope.longest:,}"
        )


def _sliding_window(config: Configuration, traits: Traits, num_layers: int) -> int | None:
    """Return the length of the window that some layer attends in, if any does.

    Llama's code has no windows, but the cache of `transformers` makes one for any architecture
    whose file names it: what it generates and what it computes at once differ from there on.
    """
    silent = not config.has("sliding_window")
    window = traits.sliding_window if silent else config.integer("sliding_window", _NO_WINDOW)
    if window == _NO_WINDOW or (traits.windowed_by_flag and not config.flag("use_sliding_window")):
        window = None
    layer_types = config.listed("layer_types")
    if layer_types is None:
        # The first `max_window_layers` attend to everything.
        full = config.integer("max_window_layers", 28, low=0) if traits.windowed_by_flag else 0
        return window if full < num_layers else None
    if strange := {str(kind) for kind in layer_types} - _LAYER_TYPES:
        raise ModelLoadError(f"config.json: layers of type {', '.join(sorted(strange))}")
    if len(layer_types) != num_layers:
        raise ModelLoadError(f"config.json: {len(layer_types)} layer_types of {num_layers} layers")
    sliding = "sliding_attention" in layer_types
    if sliding and window is None:
        raise ModelLoadError(
            "config.json: layer_types has sliding_attention, and there is no window: "
            "sliding_window is null, or use_sliding_window is not set"
        )
    # Mistral's code has one window for all layers, whatever their types say.
    every = traits.sliding_window is not None and not traits.windowed_by_flag
    return window if sliding or every else None
