"""Where quantised weights lie, and how they get there: quantised as they arrive.

Owns the storage that `quantised` computes with: canonical rows, and ATen's packing of int4 on
the CPU. Fails with torch's out-of-memory errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sage_fed.engine import cuda_formats, quantise
from sage_fed.engine.linear import Linear, LinearBuilder
from sage_fed.engine.memory import allocate
from sage_fed.engine.quantise import GROUP, num_groups
from sage_fed.engine.quantised import AtenInt4Linear, Fp8Linear, Int4Linear, WidenedLinear

_PANELS = 16 * 64
"""ATen packs int4 in panels of 64 outputs, so some panels at a time can be packed in place."""

_BLOCK_ELEMENTS = 2**18  # 1 MiB in fp32
_SERIAL_ELEMENTS = 2**15  # up to here torch does an operation on one thread
_BLOCK_ELEMENTS_CUDA = 2**25
_QUANTISE = {
    "int8": quantise.quantise_int8,
    "int4": quantise.quantise_int4,
    "fp8": quantise.quantise_fp8,
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
            return AtenInt4Linear(_packed_by_aten_(values), cuda_formats.scale_grid(scales), bias)
        return Int4Linear(values, scales, bias, in_features=self._in_features, block=block)

    def _for_cuda(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> Linear | None:
        if self._kind == "int8":
            return cuda_formats.int8_linear(values, scales, bias)
        if self._kind == "fp8":
            return cuda_formats.fp8_linear(values, scales, bias)
        return cuda_formats.int4_linear(values, scales, bias, self._in_features)


def _rows_of(in_features: int, device: torch.device) -> int:
    """Rows to widen at once."""
    elements = _BLOCK_ELEMENTS if device.type == "cpu" else _BLOCK_ELEMENTS_CUDA
    return max(1, elements // in_features)


def _packed_by_aten_(canonical: torch.Tensor) -> torch.Tensor:
    """Rearrange canonical int4 in its own memory, some panels at a time."""
    for start in range(0, canonical.shape[0], _PANELS):
        panels = canonical[start : start + _PANELS]
        wide = quantise.unpack_int4(panels).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1)  # noqa: SLF001 - an operator's name
        panels.view(-1).copy_(packed.view(-1))
    return canonical
