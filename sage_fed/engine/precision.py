"""Precisions and kernels: what weights are stored in, what computes, and how fast memory is read.

Owns the names, what each needs of a device, the one choice of kernels from precision, device and
what was asked for, the numbers of quantised weights, where they lie, and their products in torch.
"auto" takes the fastest kernels that are there, the model's info names them, and what keeps a CPU
from the native ones is logged. The memory's bandwidth is the limit that decoding is measured
against: a step reads every weight once.

Every kernel has to agree with the numbers. They are pure functions of rows, so row ranges of a
fused layer can be quantised as they arrive:
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
Fails with `ModelLoadError`: an unknown name, or a device that cannot; and with torch's
out-of-memory errors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader of torch knows

from sage_fed.engine.linear import DenseFormat, Formats, Linear, LinearBuilder, LinearFormat
from sage_fed.engine.machine import allocate, resolve_device
from sage_fed.engine.native import Library, Unavailable, load_library
from sage_fed.engine.native.forward import Arena, PackedFormat
from sage_fed.engine.native.library import KINDS
from sage_fed.errors import ModelLoadError

_FP8_CAPABILITY = (8, 9)  # Ada and newer multiply 8-bit floats


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to hold a model.

    `compute` is the type of activations, norms, an embedding of its own and the KV cache.
    `layers` and `head` name what their matrices are stored in: dense (in `compute`), int8,
    int4 or fp8. Four bits are too few for a head: every logit is one of its rows.
    """

    name: str
    compute: torch.dtype
    layers: str = "dense"
    head: str = "dense"

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in other numbers than the checkpoint's."""
        return self.layers != "dense"


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", torch.float32),
        Precision("bf16", torch.bfloat16),
        Precision("fp16", torch.float16),
        Precision("int8", torch.bfloat16, "int8", "int8"),
        Precision("int4", torch.bfloat16, "int4", "int8"),
        Precision("fp8", torch.bfloat16, "fp8", "fp8"),
    )
}


def precision_of(name: str, device: torch.device) -> Precision:
    """The precision called `name`, on a device that can.

    Raises:
        ModelLoadError: there is none of that name, or `device` lacks what it takes.
    """
    precision = PRECISIONS.get(name)
    if precision is None:
        raise ModelLoadError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    if precision.layers == "fp8" and not _has_fp8(device):
        raise ModelLoadError(
            f"precision fp8 needs a CUDA device of compute capability 8.9 or newer, which {device} "
            "is not; int8 takes as much memory and runs anywhere"
        )
    return precision


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


_LOG = logging.getLogger(__name__)
_NATIVE_DENSE = {torch.bfloat16: "bf16", torch.float32: "fp32"}

KERNELS = ("auto", "native", "torch")


def choose_formats(precision: Precision, device: torch.device, kernels: str = "auto") -> Formats:
    """Choose for `precision` on `device`; `kernels` is one of `KERNELS`.

    Raises:
        ModelLoadError: these kernels do not exist, or not here.
    """
    if kernels not in KERNELS:
        raise ModelLoadError(f"kernels {kernels!r} is not one of {', '.join(KERNELS)}")
    if kernels != "torch":
        library = _native(precision, device)
        if isinstance(library, Library):
            return _native_formats(precision, library)
        if kernels == "native":
            raise ModelLoadError(f"native kernels were asked for: {library.reason}")
        if device.type == "cpu":
            _LOG.warning("no native kernels, torch computes instead: %s", library.reason)
    return Formats(
        layers=_torch_format(precision.layers, precision.compute, device),
        head=_torch_format(precision.head, precision.compute, device),
        kernels="torch",
    )


def _native(precision: Precision, device: torch.device) -> Library | Unavailable:
    """The native kernels, compiled if need be, or why there are none."""
    if device.type != "cpu":
        return Unavailable(f"they are for the CPU, not {device}")
    if precision.compute not in _NATIVE_DENSE or precision.layers not in {"dense", *KINDS}:
        return Unavailable(f"they have no {precision.name}")
    return load_library(torch.get_num_threads())


def _native_formats(precision: Precision, library: Library) -> Formats:
    dense, arena = _NATIVE_DENSE[precision.compute], Arena()
    layers, head = (
        PackedFormat(library, dense if kind == "dense" else kind, arena)
        for kind in (precision.layers, precision.head)
    )
    return Formats(layers, head, "native", library)


def _torch_format(kind: str, compute: torch.dtype, device: torch.device) -> LinearFormat:
    if kind == "dense":
        return DenseFormat(compute, device)
    return QuantisedFormat(kind, compute, device)


GROUP = 32
"""Inputs that share a scale in int4."""

FP8_TILE = 16
"""Inputs and outputs that a product of fp8 takes at once."""

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


dequantise_fp8 = dequantise_int8
"""fp32 [n, in] of what `quantise_fp8` made: the same product."""


def _over(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Quotient, in place; what has no scale is zero, and stays it."""
    return values.div_(scales.masked_fill(scales == 0, 1.0))


def _round(values: torch.Tensor) -> torch.Tensor:
    """Round to even, in place, what is well below 2**22: beyond it fp32 has no fractions.

    `round_` does the same through MKL, whose threads wait for each other ever so long on a
    machine that has other work.
    """
    return values.add_(_NO_FRACTIONS).sub_(_NO_FRACTIONS)


class _StoredLinear:
    """A layer that is its `values`, their `scales` and, or None, a bias in the compute type."""

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._values = values
        self._scales = scales
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Device memory of the weights."""
        stored = (self._values, self._scales, self._bias)
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        raise NotImplementedError

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return residual + self(x)."""
        return residual + self(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised; heads are int8 or fp8."""
        wide = dequantise_int8(self._values[indices], self._scales[indices])
        return wide.to(torch.bfloat16)


class WidenedLinear(_StoredLinear):
    """Int8 or float8 `values` [out, in], widened for a product; `scales` fp32 [out].

    `block` rows are widened at a time, or all of them: where a compiler makes one kernel of it,
    none is ever stored wide.
    """

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        block: int | None = None,
    ) -> None:
        super().__init__(values, scales, bias)
        self._blocks = _blocks(values.shape[0], block or values.shape[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        # Some rows at a time: widened weights stay in the cache, and are never all there.
        # (ATen's _weight_int8pack_mm is no faster for one token, and reads beyond odd shapes.)
        # Narrow numbers are exact in bf16; their scales would not be, so they come after.
        parts = [F.linear(x, self._values[block].to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return _scaled(y, self._scales, self._bias)


class Fp8Linear(WidenedLinear):
    """float8 `values` [out, in]: widened for one row, multiplied as they are for several.

    `scales` are fp32 [out]; activations get a scale per token. The product takes inputs in tiles
    of 16, and outputs, too: rows of zeros fill the last tile up.
    """

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._out_features = values.shape[0]
        if padding := -values.shape[0] % FP8_TILE:
            values = F.pad(values.view(torch.uint8), (0, 0, 0, padding)).view(values.dtype)
            scales = F.pad(scales, (0, padding))
            bias = None if bias is None else F.pad(bias, (0, padding))
        super().__init__(values, scales, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        return self._padded(x).narrow(-1, 0, self._out_features)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        # Uncompiled, widening would write and read five bytes for each that is stored.
        if x.shape[0] == 1 and torch.compiler.is_compiling():
            return super().__call__(x)
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


class Int4Linear(_StoredLinear):
    """`values` uint8 [out, groups * 16], `scales` bf16 [out, groups], dequantised for a product."""

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        block: int,
    ) -> None:
        super().__init__(values, scales, bias)
        self._in_features = in_features
        self._blocks = _blocks(values.shape[0], block)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        parts = [F.linear(x, self._wide(block).to(x.dtype)) for block in self._blocks]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self._bias is None else y.add_(self._bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weights, dequantised."""
        return self._wide(indices).to(torch.bfloat16)

    def _wide(self, which: slice | torch.Tensor) -> torch.Tensor:
        wide = dequantise_int4(self._values[which], self._scales[which])
        return wide[:, : self._in_features]


class AtenInt4Linear(_StoredLinear):
    """Int4 as ATen's kernel for the device packs it; `scales` are its grid, see `scale_grid`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to [tokens, in_features]."""
        aten = torch.ops.aten
        multiply = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu  # noqa: SLF001 - operators' names
        y: torch.Tensor = multiply(x.contiguous(), self._values, GROUP, self._scales)
        return y if self._bias is None else y.add_(self._bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as the others
        """Never asked: heads are not int4."""
        raise AssertionError("an int4 layer was asked for rows")


def _blocks(rows: int, each: int) -> list[slice]:
    return [slice(start, start + each) for start in range(0, rows, each)]


def _scaled(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = y.float().mul_(scales)
    if bias is not None:
        wide.add_(bias)
    return wide.to(y.dtype)


def high_first(packed: torch.Tensor) -> torch.Tensor:
    """Canonical bytes with their halves exchanged: this kernel has the even input in the high."""
    return (packed << 4) | (packed >> 4)


def scale_grid(scales: torch.Tensor) -> torch.Tensor:
    """[groups, out, 2] bf16 of scales [out, groups]: w = (q - 8) * scale + zero, and no zeros."""
    return torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=-1).contiguous()


_INNER_TILES = (8, 4, 2)
"""How many tiles of 16 inputs one thread of the int4 kernel takes; more is faster."""

_INT4_CAPABILITY = (8, 0)
_INT4_OUTPUTS = 8


_PANELS = 16 * 64
"""ATen packs int4 in panels of 64 outputs, so some panels at a time can be packed in place."""

_BLOCK_ELEMENTS = 2**18  # 1 MiB in fp32
_SERIAL_ELEMENTS = 2**15  # up to here torch does an operation on one thread
_BLOCK_ELEMENTS_CUDA = 2**25
_KINDS = {
    "int8": (quantise_int8, torch.int8),
    "int4": (quantise_int4, torch.uint8),
    "fp8": (quantise_fp8, torch.float8_e4m3fn),
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
        width, scales = in_features, torch.empty(out_features, device=self._device)
        if self._kind == "int4":
            groups = num_groups(in_features)
            width = groups * GROUP // 2
            scales = allocate((out_features, groups), torch.bfloat16, self._device)
        values = allocate((out_features, width), _KINDS[self._kind][1], self._device)
        storage = {"values": values, "scales": scales}
        if bias:
            storage["bias"] = torch.empty(out_features, dtype=self._compute, device=self._device)
        return _QuantisedBuilder(self._kind, in_features, storage)


class _QuantisedBuilder:
    def __init__(self, kind: str, in_features: int, storage: dict[str, torch.Tensor]) -> None:
        self._kind = kind
        self._in_features = in_features
        self._quantise = _KINDS[kind][0]
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
        if self._kind == "fp8" and self._in_features % FP8_TILE == 0:
            return Fp8Linear(values, scales, bias)
        elements = _BLOCK_ELEMENTS_CUDA if values.is_cuda else _BLOCK_ELEMENTS
        block = max(1, elements // self._in_features)
        if self._kind != "int4":
            return WidenedLinear(values, scales, bias, block=None if values.is_cuda else block)
        if (packed := _packed_by_aten(values, self._in_features)) is not None:
            return AtenInt4Linear(packed, scale_grid(scales), bias)
        return Int4Linear(values, scales, bias, in_features=self._in_features, block=block)


def _packed_by_aten(canonical: torch.Tensor, in_features: int) -> torch.Tensor | None:
    """Canonical int4 as ATen's kernel wants it; None where it takes no such shape, or device.

    On CUDA a copy; on the CPU rearranged in its own memory, some panels at a time.
    """
    if canonical.is_cuda:
        tiles = next((n for n in _INNER_TILES if in_features % (16 * n) == 0), None)
        capable = torch.cuda.get_device_capability(canonical.device) >= _INT4_CAPABILITY
        if tiles is None or not capable or canonical.shape[0] % _INT4_OUTPUTS:
            return None
        tiled: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(  # noqa: SLF001 - an operator's name
            high_first(canonical), tiles
        )
        return tiled
    if canonical.shape[0] % 16 or in_features % GROUP:
        return None
    for start in range(0, canonical.shape[0], _PANELS):
        panels = canonical[start : start + _PANELS]
        wide = unpack_int4(panels).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1)  # noqa: SLF001 - an operator's name
        panels.view(-1).copy_(packed.view(-1))
    return canonical


_CPU_NBYTES = 256 * 2**20
_CUDA_NBYTES = 2**30
"""Several times the last-level cache; on CUDA long enough to hide a launch (0.2 ms at 5 TB/s)."""

_PASSES = 4
_ROUNDS = 3


@torch.inference_mode()
def read_bandwidth_bytes_per_s(device_name: str) -> float:
    """Read far more than the caches hold, with the threads that decoding has.

    The passes of a round are queued one behind the other, so that the device never waits for
    the host; the fastest round counts. Blocks for a tenth or two of a second.
    """
    device = resolve_device(device_name)
    # Torch's sum over small pages reaches two thirds of what our own kernels then read.
    native = load_library(torch.get_num_threads()) if device.type == "cpu" else None
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    try:
        values = allocate((nbytes // 4,), torch.float32, device).fill_(1.0)
    except (RuntimeError, MemoryError) as error:  # torch's on every device, and the host's
        raise ModelLoadError(f"{device} has no {nbytes} bytes to measure with") from error
    read = partial(_native_round_s, native) if isinstance(native, Library) else _round_s
    fastest_s = min(read(values) for _ in range(_ROUNDS))
    if device.type == "cuda":
        del values
        torch.cuda.empty_cache()
    return nbytes * _PASSES / fastest_s


def _native_round_s(library: Library, values: torch.Tensor) -> float:
    """As long as the fastest pass, times their number: other work on the cores only adds."""
    passes_s = []
    for _ in range(2 * _PASSES):
        began_s = time.perf_counter()
        library.read(values.data_ptr(), values.nbytes)
        passes_s.append(time.perf_counter() - began_s)
    return _PASSES * min(passes_s)


def _round_s(values: torch.Tensor) -> float:
    began_s = time.perf_counter()
    sums = [values.sum() for _ in range(_PASSES)]
    torch.stack(sums).tolist()  # waits for the device
    return time.perf_counter() - began_s
