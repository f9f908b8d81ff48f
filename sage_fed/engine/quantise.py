"""What the quantised numbers are: the one definition that every kernel has to agree with.

Pure functions of rows of weights, on any device; a row never depends on its neighbours, so
row ranges of a fused layer can be quantised as they arrive. Knows no layer and no kernel.

int8: symmetric per output channel. scale = max|w| / 127 in fp32, q = round(w / scale), to even.
int4: groups of 32 inputs, the last one padded with zeros. q in 0..15 stands for (q - 8) * scale.
scale = -e / 8 rounded to bf16, e being the element of the largest magnitude, with its sign (the
positive one of two): so the extreme is met exactly by the longer side of -8..7, which costs
11 % less error than max|w| / 7 on normal weights. Two to a byte, the even input in the low half.
fp8: e4m3 per output channel. scale = max|w| / 448 in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

GROUP = 32
"""Inputs that share a scale in int4."""

_INT8_MAX = 127.0
_NO_FRACTIONS = 1.5 * 2.0**23
_FP8_MAX = 448.0


def num_groups(in_features: int) -> int:
    """Groups of a row, the last one padded."""
    return -(-in_features // GROUP)


def quantise_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, in]: int8 [n, in] and fp32 scales [n]."""
    wide = rows.to(torch.float32, copy=True)
    scales = wide.abs().amax(-1) / _INT8_MAX
    values = _round(_over(wide, scales[:, None])).clamp_(-_INT8_MAX, _INT8_MAX)
    return values.to(torch.int8), scales


def dequantise_int8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [n, in] of what `quantise_int8` made."""
    return values.float().mul_(scales[:, None])


def quantise_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, in]: uint8 [n, groups * 16] and bf16 scales [n, groups]."""
    groups = num_groups(rows.shape[-1])
    padding = groups * GROUP - rows.shape[-1]
    wide = F.pad(rows.to(torch.float32, copy=True), (0, padding)).view(-1, groups, GROUP)
    highest, lowest = wide.amax(-1), wide.amin(-1)
    extreme = torch.where(highest >= -lowest, highest, lowest)
    scales = (extreme / -8.0).to(torch.bfloat16)
    values = _round(_over(wide, scales.float()[..., None])).clamp_(-8.0, 7.0).add_(8.0)
    return pack_int4(values.to(torch.uint8).view(rows.shape[0], -1)), scales


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 [n, in], two to a byte [n, in / 2]."""
    # As 16-bit numbers, the even input low: three passes over half as many, none of them strided.
    pairs = values.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Numbers 0..15 [n, in] of bytes [n, in / 2]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)


def dequantise_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [n, groups * 32] of what `quantise_int4` made; the padding is zero."""
    values = unpack_int4(packed).float().sub_(8.0).view(*scales.shape, GROUP)
    return values.mul_(scales.float()[..., None]).view(packed.shape[0], -1)


def quantise_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [n, in]: float8_e4m3fn [n, in] and fp32 scales [n]."""
    wide = rows.to(torch.float32, copy=True)
    scales = wide.abs().amax(-1) / _FP8_MAX
    values = _over(wide, scales[:, None]).clamp_(-_FP8_MAX, _FP8_MAX)
    return values.to(torch.float8_e4m3fn), scales


def dequantise_fp8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [n, in] of what `quantise_fp8` made."""
    return values.float().mul_(scales[:, None])


def _over(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Quotient, in place; what has no scale is zero, and stays it."""
    return values.div_(scales.masked_fill(scales == 0, 1.0))


def _round(values: torch.Tensor) -> torch.Tensor:
    """Round to even, in place, what is well below 2**22: beyond it fp32 has no fractions.

    `round_` does the same through MKL, whose threads wait for each other ever so long on a
    machine that has other work.
    """
    return values.add_(_NO_FRACTIONS).sub_(_NO_FRACTIONS)
