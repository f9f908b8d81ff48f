"""A checkpoint's own generation defaults and end-of-text tokens.

Reads `generation_config.json` where there is one; without it a model is greedy. A text ends where
that or `config.json` says: a checkpoint often forgets a token in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sage_fed.core import GenerationDefaults
from sage_fed.engine.configuration import read_object
from sage_fed.errors import ModelLoadError

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


def unread_generation(directory: Path) -> Iterator[str]:
    """Say which of a checkpoint's own ways to generate are not followed."""
    path = directory / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    for key, neutral in _UNREAD.items():
        value = generation.get(key)
        if value is not None and value != neutral:
            yield f"generation_config.json: {key} is set, which the engine does not follow"


def read_generation(directory: Path) -> tuple[GenerationDefaults, frozenset[int]]:
    """The defaults, and the ids that end a text.

    Raises:
        ModelLoadError: a file that cannot be read or holds impossible values.
    """
    path = directory / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    files = (generation, read_object(directory / "config.json"))
    ends = frozenset[int]().union(*(_token_ids(file.get("eos_token_id")) for file in files))
    return _defaults(generation), ends


def _defaults(generation: dict[str, Any]) -> GenerationDefaults:
    sampled = bool(generation.get("do_sample"))
    defaults = GenerationDefaults(
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
