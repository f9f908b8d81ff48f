"""Rotary position embeddings: frequencies of each scaling, and their application.

The rotation pairs element i with i + head_dim / 2, as the Hugging Face layout of the
weights expects. Tables are computed in fp32 and stored in the model's type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

SUPPORTED_ROPE: dict[str, frozenset[str]] = {
    # kind -> the parameters it cannot do without
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Base frequency and scaling; `scaling` holds (name, value) as in `config.json`."""

    kind: str
    theta: float
    scaling: tuple[tuple[str, float], ...] = ()


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
    """Inverse frequencies, fp32 [head_dim / 2], and the factor of cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    scaling = dict(rope.scaling)
    if rope.kind == "linear":
        return plain / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope.theta, head_dim, scaling)
    return plain, 1.0


def _llama3(plain: torch.Tensor, scaling: Mapping[str, float]) -> torch.Tensor:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    ramp = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * plain / factor + ramp * plain


def _yarn(
    plain: torch.Tensor, theta: float, head_dim: int, scaling: Mapping[str, float]
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by wavelength, attention scaled by its factor."""
    factor = scaling["factor"]
    context = scaling["original_max_position_embeddings"]

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
    scale = scaling.get("attention_factor")
    if scale is None:
        mscale, mscale_all = scaling.get("mscale", 0.0), scaling.get("mscale_all_dim", 0.0)
        if mscale and mscale_all:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            scale = _mscale(factor, 1.0)
    return plain / factor * ramp + plain * (1 - ramp), scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
