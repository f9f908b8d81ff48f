"""Quantised weights: the numbers, where they lie, and their products in torch.

The numbers are defined here, and every kernel has to agree with them. They are pure functions of
rows, so row ranges of a fused layer can be quantised as they arrive:
int8: symmetric per output channel. scale = max|w| / 127 in fp32, q = round(w / scale), to even.
int4: groups of 32 inputs, the last one padded with zeros. q in 0..15 stands for (q - 8) * scale.
scale = -e / 8 rounded to bf16, e being the element of the largest magnitude, with its sign (the
positive one of two): so the extreme is met exactly by the longer side of -8..7, which costs
11 % less error than max|w| / 7 on normal weights. Two to a byte, the even input in the low half.
fp8: e4m3 per output channel. scale = max|w| / 448 in fp32.

Products: integer weights are exact in bf16, so scales are applied to products. On the CPU ATen's
kernel for packed int4 serves where shapes suit it. On CUDA a decode step reads every weight once,
so they are read narrow: int8 is widened where it is multiplied (compiled, that is one kernel; else
the widened copy is written and read again); int4 goes through ATen's kernel of Tensor Cores in
groups of 32 (sm_80 and newer, bf16 only); fp8 of one row is widened like int8, several rows are
multiplied as fp8 with a scale per token.
Fails with torch's out-of-memory errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.linear import Linear, LinearBuilder
from sage_fed.engine.machine import allocate

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


class WidenedLinear:
    """Int8 or float8 `values` [out, in], widened for a product; `scales` fp32 [out].

    The bias is in the compute type, or None. `block` rows are widened at a time, or all of them:
    where a compiler makes one kernel of it, none is ever stored wide.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        block: int | None = None,
    ) -> None:
        self._values = values
        self._scales = scales
        self._bias = bias
        rows = values.shape[0]
        size = block or rows
        self._blocks = [slice(i, i + size) for i in range(0, rows, size)]

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._values, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        # Some rows at a time: widened weights stay in the cache, and are never all there.
        # (ATen's _weight_int8pack_mm is no faster for one token, and reads beyond odd shapes.)
        # Narrow numbers are exact in bf16; their scales would not be, so they come after.
        parts = [F.linear(x, self._values[block].to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return _scaled(y, self._scales, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        wide = dequantise_int8(self._values[indices], self._scales[indices])
        return wide.to(torch.bfloat16)


class Int4Linear:
    """`packed` uint8 [out, groups * 16], `scales` bf16 [out, groups], dequantised for a product."""

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        block: int,
    ) -> None:
        self._packed = packed
        self._scales = scales
        self._bias = bias
        self._in_features = in_features
        self._blocks = [slice(i, i + block) for i in range(0, packed.shape[0], block)]

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._packed, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        parts = [F.linear(x, self._weights(block).to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        return self._weights(indices).to(torch.bfloat16)

    def _weights(self, which: slice | torch.Tensor) -> torch.Tensor:
        wide = dequantise_int4(self._packed[which], self._scales[which])
        return wide[:, : self._in_features]


class AtenInt4Linear:
    """Int4 in ATen's packing for the CPU; `grid` is bf16 [groups, out, 2]: scale and zero."""

    def __init__(self, packed: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = packed
        self._grid = grid
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._packed, self._grid, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001 - an operator's name
            x.contiguous(), self._packed, GROUP, self._grid
        )
        return y if self._bias is None else y.add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as the others
        """Never asked: heads are not int4."""
        raise AssertionError("an int4 layer was asked for rows")


class Fp8Linear:
    """`values` float8 [out, in], `scales` fp32 [out]; activations get a scale per token."""

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._values = values
        self._scales = scales
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        return _nbytes(self._values, self._scales, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        narrow, scales = quantise_fp8(x)
        y: torch.Tensor = torch._scaled_mm(  # noqa: SLF001 - its only name
            narrow,
            self._values.t(),
            scale_a=scales[:, None],
            scale_b=self._scales[None, :],
            bias=self._bias,
            out_dtype=x.dtype,
        )
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        wide = dequantise_fp8(self._values[indices], self._scales[indices])
        return wide.to(torch.bfloat16)


def _scaled(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = y.float().mul_(scales)
    if bias is not None:
        wide.add_(bias)
    return wide.to(y.dtype)


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


_INNER_TILES = (8, 4, 2)
"""How many tiles of 16 inputs one thread of the int4 kernel takes; more is faster."""

_INT4_CAPABILITY = (8, 0)
_INT4_OUTPUTS = 8


def int8_linear(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A layer of int8 [out, in] with fp32 scales [out]."""
    return WidenedLinear(values, scales, bias)


def fp8_linear(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A layer of float8_e4m3fn [out, in] with fp32 scales [out]."""
    return RowwiseFp8Linear(values, scales, bias)


def int4_linear(
    packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, in_features: int
) -> Linear | None:
    """A layer of canonical int4; None where ATen's kernel does not take its shape, or the device.

    Takes as much memory again until `packed` is let go.
    """
    tiles = next((n for n in _INNER_TILES if in_features % (16 * n) == 0), None)
    capable = torch.cuda.get_device_capability(packed.device) >= _INT4_CAPABILITY
    if tiles is None or not capable or packed.shape[0] % _INT4_OUTPUTS:
        return None
    tiled = torch.ops.aten._convert_weight_to_int4pack(high_first(packed), tiles)  # noqa: SLF001 - an operator's name
    return TiledInt4Linear(tiled, scale_grid(scales), bias)


def high_first(packed: torch.Tensor) -> torch.Tensor:
    """Canonical bytes with their halves exchanged: this kernel has the even input in the high."""
    return (packed << 4) | (packed >> 4)


def scale_grid(scales: torch.Tensor) -> torch.Tensor:
    """[groups, out, 2] bf16 of scales [out, groups]: w = (q - 8) * scale + zero, and no zeros."""
    return torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=-1).contiguous()


class RowwiseFp8Linear:
    """float8 weights: widened for one row, multiplied as they are for several."""

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._one = WidenedLinear(values, scales, bias)
        self._several = Fp8Linear(values, scales, bias)

    @property
    def nbytes(self) -> int:
        """Device memory of the weights, which both have."""
        return self._one.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        # Uncompiled, widening would write and read five bytes for each that is stored.
        if x.shape[0] == 1 and torch.compiler.is_compiling():
            return self._one(x)
        return self._several(x)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        return self._one.rows(indices)


class TiledInt4Linear:
    """`tiled` int4 as ATen's CUDA kernel has it, `grid` bf16 [groups, out, 2]."""

    def __init__(self, tiled: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._tiled = tiled
        self._grid = grid
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        bias = 0 if self._bias is None else self._bias.nbytes
        return self._tiled.nbytes + self._grid.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(  # noqa: SLF001 - an operator's name
            x.contiguous(), self._tiled, GROUP, self._grid
        )
        return y if self._bias is None else y + self._bias

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as the others
        """Never asked: heads are not int4."""
        raise AssertionError("an int4 layer was asked for rows")


_PANELS = 16 * 64
"""ATen packs int4 in panels of 64 outputs, so some panels at a time can be packed in place."""

_BLOCK_ELEMENTS = 2**18  # 1 MiB in fp32
_SERIAL_ELEMENTS = 2**15  # up to here torch does an operation on one thread
_BLOCK_ELEMENTS_CUDA = 2**25
_QUANTISE = {
    "int8": quantise_int8,
    "int4": quantise_int4,
    "fp8": quantise_fp8,
}


class QuantisedFormat:
    """Layers of one kind (int8, int4 or fp8) on one device, run by torch.

    `compute` is the type of activations and biases.
    """

    def __init__(self, kind: str, compute: torch.dtype, device: torch.device) -> None:
        self._kind = kind
        self._compute = compute
        self._device = device

    @property
    def layout(self) -> str:
        """Canonical numbers, a row after the other, on every device."""
        return f"rows-{self._kind}-1"

    def builder(
        self,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        gated: bool = False,  # noqa: ARG002 - rows stay in their order
    ) -> LinearBuilder:
        """Allocate the layer; pieces are quantised as they arrive."""
        groups = num_groups(in_features)
        width, dtype = {
            "int8": (in_features, torch.int8),
            "int4": (groups * GROUP // 2, torch.uint8),
            "fp8": (in_features, torch.float8_e4m3fn),
        }[self._kind]
        storage = {"values": allocate((out_features, width), dtype, self._device)}
        if self._kind == "int4":
            storage["scales"] = allocate((out_features, groups), torch.bfloat16, self._device)
        else:
            storage["scales"] = torch.empty(out_features, device=self._device)
        if bias:
            storage["bias"] = torch.empty(out_features, dtype=self._compute, device=self._device)
        return _QuantisedBuilder(self._kind, in_features, storage)


class _QuantisedBuilder:
    def __init__(self, kind: str, in_features: int, storage: dict[str, torch.Tensor]) -> None:
        self._kind = kind
        self._in_features = in_features
        self._quantise = _QUANTISE[kind]
        self.storage: Mapping[str, torch.Tensor] = storage

    def memory(self, first_row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor | None:  # noqa: ARG002 - every checkpoint is in other numbers
        return None

    def place_weight(self, first_row: int, rows: torch.Tensor) -> None:
        values, scales = self.storage["values"], self.storage["scales"]
        rows = rows.to(values.device, non_blocking=True)
        # Few rows at a time: what is in between stays in the cache, and no operation is worth
        # waking threads for, which on a busy machine takes longer than the work.
        elements = _SERIAL_ELEMENTS if values.device.type == "cpu" else _BLOCK_ELEMENTS_CUDA
        for start in range(0, rows.shape[0], step := max(1, elements // rows.shape[1])):
            part = rows[start : start + step]
            target = slice(first_row + start, first_row + start + part.shape[0])
            values[target], scales[target] = self._quantise(part)

    def place_bias(self, first_row: int, values: torch.Tensor) -> None:
        target = self.storage["bias"][first_row : first_row + values.shape[0]]
        target.copy_(values, non_blocking=True)

    def build(self) -> Linear:
        values, scales = self.storage["values"], self.storage["scales"]
        bias = self.storage.get("bias")
        block = _rows_of(self._in_features, values.device)
        if values.is_cuda and (fast := self._for_cuda(values, scales, bias)) is not None:
            return fast
        if self._kind == "int8":
            return WidenedLinear(values, scales, bias, block=block)
        if self._kind == "fp8":
            return Fp8Linear(values, scales, bias)
        suits = values.shape[0] % 16 == 0 and self._in_features % GROUP == 0
        if values.device.type == "cpu" and suits:
            return AtenInt4Linear(_packed_by_aten_(values), scale_grid(scales), bias)
        return Int4Linear(values, scales, bias, in_features=self._in_features, block=block)

    def _for_cuda(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> Linear | None:
        if self._kind == "int8":
            return int8_linear(values, scales, bias)
        if self._kind == "fp8":
            return fp8_linear(values, scales, bias)
        return int4_linear(values, scales, bias, self._in_features)


def _rows_of(in_features: int, device: torch.device) -> int:
    """Rows to widen at once."""
    elements = _BLOCK_ELEMENTS if device.type == "cpu" else _BLOCK_ELEMENTS_CUDA
    return max(1, elements // in_features)


def _packed_by_aten_(canonical: torch.Tensor) -> torch.Tensor:
    """Rearrange canonical int4 in its own memory, some panels at a time."""
    for start in range(0, canonical.shape[0], _PANELS):
        panels = canonical[start : start + _PANELS]
        wide = unpack_int4(panels).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1)  # noqa: SLF001 - an operator's name
        panels.view(-1).copy_(packed.view(-1))
    return canonical
