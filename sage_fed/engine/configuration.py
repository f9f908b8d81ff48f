"""What a checkpoint's JSON files say: its decoder's shape, its rotary scaling, its own sampling.

Owns what the engine's forward pass can run, the defaults of each architecture for what a file
leaves out (as the configuration classes of `transformers` have them; a test compares the two), and
the tokens that end a text. Knows no weights and no device.
Anything that would be computed wrongly is refused with a `ModelLoadError` that names the key,
before a byte of weights is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sage_fed.core import Sampling
from sage_fed.errors import ModelLoadError
from sage_fed.model_files import HEAD_BYTES, misnomer

ORIGINAL_LENGTH = "original_max_position_embeddings"
_MAY_BE_ZERO = frozenset(
    {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
)
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
_NO_WINDOW = 2**63
"""What a window of null reads as."""


_ANYWHERE = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class RopeKind:
    """A way to scale: the parameters it cannot do without, and those that it may have."""

    needed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()

    @property
    def read(self) -> frozenset[str]:
        """Every parameter that it reads, or that says the same of any."""
        return self.needed | self.optional | _ANYWHERE


SUPPORTED_ROPE: dict[str, RopeKind] = {
    "default": RopeKind(),
    # No formula of this one reads the original length; published files have it, and mean it.
    "linear": RopeKind(frozenset({"factor"}), frozenset({ORIGINAL_LENGTH})),
    "dynamic": RopeKind(frozenset({"factor"})),
    "llama3": RopeKind(
        frozenset({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH})
    ),
    "yarn": RopeKind(
        frozenset({"factor", ORIGINAL_LENGTH}),
        frozenset(
            {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
    ),
    "longrope": RopeKind(
        frozenset({"short_factor", "long_factor", ORIGINAL_LENGTH}),
        frozenset({"factor", "attention_factor"}),
    ),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Base frequency and scaling; `scaling` holds (name, value) as in `config.json`.

    `short_factor` divides each frequency (longrope). `max_position` is the configuration's
    `max_position_embeddings`.
    """

    kind: str
    theta: float
    scaling: tuple[tuple[str, float], ...] = ()
    short_factor: tuple[float, ...] = ()
    max_position: int = 0

    @property
    def longest(self) -> int:
        """The longest context that the configuration means.

        A recipe that adds `factor` and leaves `max_position_embeddings` alone, as the scalings'
        authors publish it, means that many times the original length. Configurations of the
        kinds that models are trained with name the scaled length themselves.
        """
        scaling = dict(self.scaling)
        if self.kind in {"linear", "dynamic", "yarn"}:
            return int(scaling.get(ORIGINAL_LENGTH, self.max_position) * scaling["factor"])
        return self.max_position

    @property
    def constant_up_to(self) -> int | None:
        """The length beyond which frequencies depend on how long a sequence is; None: never."""
        if self.kind == "dynamic":
            return self.max_position
        return int(dict(self.scaling)[ORIGINAL_LENGTH]) if self.kind == "longrope" else None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a decoder that its forward pass depends on, weights aside.

    `sliding_window` is None where no layer uses one. `end_token_ids` end a text.
    `remarks` say where the configuration contradicts itself, or says what nothing reads.
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
    end_token_ids: frozenset[int] = field(default=frozenset(), compare=False)
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
        end_token_ids=config.end_token_ids(),
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
    if ORIGINAL_LENGTH in parameters.needed:
        # One beside the parameters goes before one among them, as in Phi-3's files.
        given[ORIGINAL_LENGTH] = config.integer(
            ORIGINAL_LENGTH, given.get(ORIGINAL_LENGTH, max_position)
        )
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
    original = dict(rope.scaling).get(ORIGINAL_LENGTH, rope.max_position)
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

    def end_token_ids(self) -> frozenset[int]:
        """Return the ids that end a text."""
        return _token_ids(self._raw.get("eos_token_id"))

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


_TOP_K = 50.0
"""What `transformers` takes where a checkpoint samples and names no other; 0 is none."""

_UNREAD: Mapping[str, object] = {
    # Ways to generate that the engine does not have, and the value that changes nothing.
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "top_n_sigma": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


def read_generation(
    directory: Path, end_token_ids: frozenset[int]
) -> tuple[Sampling, frozenset[int], tuple[str, ...]]:
    """The defaults; the ids that end a text, `end_token_ids` of config.json among them; remarks.

    Those say which of a checkpoint's own ways to generate are not followed.

    Raises:
        ModelLoadError: a file that cannot be read or holds impossible values.
    """
    path = directory / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    remarks = tuple(
        f"generation_config.json: {key} is set, which the engine does not follow"
        for key, neutral in _UNREAD.items()
        if generation.get(key) not in (None, neutral)
    )
    ends = end_token_ids | _token_ids(generation.get("eos_token_id"))
    return _defaults(generation), ends, remarks


def _defaults(generation: dict[str, Any]) -> Sampling:
    sampled = bool(generation.get("do_sample"))
    defaults = Sampling(
        temperature=_number(generation, "temperature", 1.0) if sampled else 0.0,
        top_p=_number(generation, "top_p", 1.0) if sampled else 1.0,
        top_k=int(_number(generation, "top_k", _TOP_K)) if sampled else 0,
        min_p=_number(generation, "min_p", 0.0) if sampled else 0.0,
        repetition_penalty=_number(generation, "repetition_penalty", 1.0),
    )
    for name, valid in (
        ("temperature", defaults.temperature >= 0),
        ("top_p", 0 < defaults.top_p <= 1),
        ("top_k", defaults.top_k >= 0),
        ("min_p", 0 <= defaults.min_p <= 1),
        ("repetition_penalty", defaults.repetition_penalty > 0),
    ):
        if not valid:
            value = getattr(defaults, name)
            raise ModelLoadError(f"generation_config.json: {name} cannot be {value}")
    return defaults


def _number(generation: dict[str, Any], name: str, default: float) -> float:
    value = generation.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"generation_config.json: {name} is not a number")
    return float(value)


def _token_ids(raw: object) -> frozenset[int]:
    values = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if not all(isinstance(value, int) for value in values):
        raise ModelLoadError("eos_token_id is neither a token id nor a list of them")
    return frozenset(values)
