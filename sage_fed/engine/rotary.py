"""Rotary position embeddings: frequencies of each scaling, and their application.

The rotation pairs element i with i + head_dim / 2, as the Hugging Face layout of the
weights expects. Tables are computed in fp32 and stored in the model's type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_ANYWHERE = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"


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
    "linear": RopeKind(frozenset({"factor"}), frozenset({_ORIGINAL})),
    "dynamic": RopeKind(frozenset({"factor"})),
    "llama3": RopeKind(frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL})),
    "yarn": RopeKind(
        frozenset({"factor", _ORIGINAL}),
        frozenset(
            {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        ),
    ),
    "longrope": RopeKind(
        frozenset({"short_factor", "long_factor", _ORIGINAL}),
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
            return int(scaling.get(_ORIGINAL, self.max_position) * scaling["factor"])
        return self.max_position

    @property
    def constant_up_to(self) -> int | None:
        """The length beyond which frequencies depend on how long a sequence is; None: never."""
        if self.kind == "dynamic":
            return self.max_position
        return int(dict(self.scaling)[_ORIGINAL]) if self.kind == "longrope" else None


def rotary_table(
    rope: RopeSpec, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Tabulate cosines and signed sines: [positions, 2, 1, head_dim].

    The sines of the first half are negated, so that rotating is
    `x * cos + roll(x, head_dim / 2) * sin`.
    """
    frequencies, scale = _frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)
    return table.unsqueeze(2).to(device=device, dtype=dtype)


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `heads` [tokens, heads, head_dim] in place; cos and sin are [tokens, 1, head_dim]."""
    rolled = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(rolled, sin)


def _frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, fp32 [head_dim / 2], and the factor of cosines and sines.

    Operation by operation as `transformers` has them, so that the bits are the same: at position
    100,000 the last one of a frequency is a hundredth of a turn.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    scaling = dict(rope.scaling)
    if rope.kind == "linear":
        return plain / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(rope.theta, exponents, head_dim, scaling)
    if rope.kind == "longrope":
        return _longrope(rope, exponents)
    # Dynamic scaling begins beyond `max_position`, where nothing is served.
    return plain, 1.0


def _llama3(plain: torch.Tensor, scaling: Mapping[str, float]) -> torch.Tensor:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling[_ORIGINAL]
    wavelength = 2 * math.pi / plain
    ramp = (context / wavelength - low) / (high - low)
    between = (1 - ramp) * plain / factor + ramp * plain
    scaled = torch.where(wavelength > context / low, plain / factor, plain)
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, scaled)


def _yarn(
    theta: float, exponents: torch.Tensor, head_dim: int, scaling: Mapping[str, float]
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by wavelength, attention scaled by its factor."""
    factor, context = scaling["factor"], scaling[_ORIGINAL]

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = dimension(scaling.get("beta_fast") or 32.0)
    high = dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp's width must not be zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    wavelengths = theta**exponents
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    scale = scaling.get("attention_factor")
    if scale is None:
        mscale, mscale_all = scaling.get("mscale", 0.0), scaling.get("mscale_all_dim", 0.0)
        if mscale and mscale_all:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            scale = _mscale(factor, 1.0)
    return frequencies, scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: RopeSpec, exponents: torch.Tensor) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv 2402.13753) up to the original length, which its short factors are for."""
    scaling = dict(rope.scaling)
    factor = scaling.get("factor", rope.max_position / scaling[_ORIGINAL])
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = 1.0
        if factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(scaling[_ORIGINAL]))
    short = torch.tensor(rope.short_factor, dtype=torch.float32)
    return 1.0 / (short * rope.theta**exponents), scale
