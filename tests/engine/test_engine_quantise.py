"""Quantised weights: what the numbers are, and how far they are from what they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from engine_driver import logits
from tiny_models import CONFIGS, Checkpoint, prompt_of
from transformers import PreTrainedModel

from sage_fed.engine import EngineOptions, load_engine
from sage_fed.engine import precision as numbers
from sage_fed.engine.linear import DenseFormat, LinearFormat
from sage_fed.engine.precision import AtenInt4Linear, Int4Linear, QuantisedFormat
from sage_fed.errors import ModelLoadError

CPU = torch.device("cpu")
SIZES = [(5, 7), (16, 32), (64, 96), (48, 80), (130, 64), (1, 33)]


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_within_half_a_step(size: tuple[int, int]) -> None:
    """Every weight comes back within half of its row's scale, and the largest exactly."""
    w = weights(*size)
    values, scales = numbers.quantise_int8(w)
    error = (numbers.dequantise_int8(values, scales) - w).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    torch.testing.assert_close(scales * 127, w.abs().amax(-1))
    assert 127 == values.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_int4_is_within_a_step_where_it_is_cut_and_half_elsewhere(size: tuple[int, int]) -> None:
    """A group's extreme lands on -8; only values that its other side has no number for are cut."""
    w = weights(*size)
    packed, scales = numbers.quantise_int4(w)
    groups = numbers.num_groups(size[1])
    assert (size[0], groups * 16) == packed.shape
    assert (size[0], groups) == scales.shape
    back = numbers.dequantise_int4(packed, scales)
    assert not back[:, size[1] :].any()
    step = scales.float().abs().repeat_interleave(32, dim=1)[:, : size[1]]
    error = (back[:, : size[1]] - w).abs()
    cut = w / scales.float().repeat_interleave(32, dim=1)[:, : size[1]] > 7.5
    assert (error[~cut] <= 0.54 * step[~cut]).all()
    assert (error <= 1.04 * step).all()


def test_zeros_stay_zero() -> None:
    """Rows and groups without any weight have no scale, and no NaN."""
    w = torch.zeros(3, 64)
    w[1, 40] = 0.5
    for scheme in ("int8", "fp8", "int4"):
        make = getattr(numbers, f"quantise_{scheme}")
        back = getattr(numbers, f"dequantise_{scheme}")(*make(w))
        assert torch.equal(w, back), scheme


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """So a layer may be quantised in any pieces."""
    w = weights(40, 96)
    for make in (numbers.quantise_int8, numbers.quantise_int4):
        whole = make(w)
        for part in (slice(0, 1), slice(7, 30)):
            pieces = make(w[part])
            assert all(torch.equal(a[part], b) for a, b in zip(whole, pieces, strict=True))


def test_quantising_leaves_its_source_alone() -> None:
    """The rows belong to whoever reads them."""
    w = weights(8, 64)
    before = w.clone()
    for make in (numbers.quantise_int8, numbers.quantise_int4, numbers.quantise_fp8):
        make(w)
        assert torch.equal(before, w)


def test_four_bits_pack_and_unpack() -> None:
    """The even input is in the low half of a byte."""
    values = torch.arange(16, dtype=torch.uint8).view(1, 16)
    packed = numbers.pack_int4(values)
    assert 0x10 == packed[0, 0]
    assert torch.equal(values, numbers.unpack_int4(packed))


def filled(form: LinearFormat, w: torch.Tensor, bias: torch.Tensor | None) -> object:
    builder = form.builder(*w.shape, bias=bias is not None)
    for first in range(0, w.shape[0], 7):
        builder.place_weight(first, w[first : first + 7])
    if bias is not None:
        builder.place_bias(0, bias)
    return builder.build()


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_product_is_that_of_the_dequantised_weights(
    kind: str, size: tuple[int, int], biased: bool, tokens: int
) -> None:
    """Whatever kernel serves a shape, only the rounding of bf16 is between it and fp32."""
    w = weights(*size)
    bias = weights(1, size[0])[0].bfloat16() if biased else None
    layer = filled(QuantisedFormat(kind, torch.bfloat16, CPU), w, bias)
    x = torch.randn(tokens, size[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    make, back = getattr(numbers, f"quantise_{kind}"), getattr(numbers, f"dequantise_{kind}")
    expected = x.float() @ back(*make(w))[:, : size[1]].T
    if bias is not None:
        expected += bias
    bound = 0.02 * expected.abs().max() + 1e-3
    assert (layer(x) - expected).abs().max() < bound
    residual = torch.ones(tokens, size[0], dtype=torch.bfloat16)
    assert (layer.add_to(residual, x) - 1 - expected).abs().max() < 2 * bound


def test_shapes_that_atens_kernel_takes_go_there() -> None:
    """The others are dequantised; both hold two weights a byte."""
    for size, kind in (((64, 96), AtenInt4Linear), ((130, 64), Int4Linear)):
        layer = filled(QuantisedFormat("int4", torch.bfloat16, CPU), weights(*size), None)
        assert isinstance(layer, kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_are_the_dequantised_ones(kind: str) -> None:
    """What a tied embedding looks up is what the head multiplies by."""
    w = weights(130, 64)
    layer = filled(QuantisedFormat(kind, torch.bfloat16, CPU), w, None)
    make, back = getattr(numbers, f"quantise_{kind}"), getattr(numbers, f"dequantise_{kind}")
    ids = torch.tensor([3, 129, 3])
    assert torch.equal(back(*make(w))[ids].bfloat16(), layer.rows(ids))


def test_a_layer_restored_from_its_storage_is_the_same() -> None:
    """Storage under one layout is all that a layer is made of."""
    w, bias = weights(64, 96), weights(1, 64)[0].bfloat16()
    x = weights(3, 96).bfloat16()
    for form in (
        DenseFormat(torch.bfloat16, CPU),
        QuantisedFormat("int8", torch.bfloat16, CPU),
        QuantisedFormat("int4", torch.bfloat16, CPU),
    ):
        first, second = (form.builder(64, 96, bias=True) for _ in range(2))
        first.place_weight(0, w)
        first.place_bias(0, bias)
        for name, tensor in first.storage.items():
            second.storage[name].copy_(tensor)
        assert torch.equal(first.build()(x), second.build()(x)), form.layout


def as_stored(source: Checkpoint, precision: str) -> PreTrainedModel:
    """The reference with the numbers that the engine keeps, in fp32."""
    model = copy.deepcopy(source.reference)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scheme = "bf16"
            if parameter is head or (tied and "embed_tokens" in name):
                scheme = "bf16" if precision == "bf16" else "int8"
            elif name.endswith("proj.weight"):
                scheme = precision
            if scheme == "bf16":
                parameter.copy_(parameter.bfloat16())
                continue
            make, back = (getattr(numbers, f"{do}quantise_{scheme}") for do in ("", "de"))
            parameter.copy_(back(*make(parameter))[:, : parameter.shape[1]])
    return model


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to all logits, each row of them less its mean: a common shift says nothing."""
    expected = expected - expected.mean()
    return float((actual - actual.mean() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_every_architecture_loses_no_more_than_transformers_in_bf16(
    checkpoint: Callable[[str], Checkpoint], name: str, precision: str
) -> None:
    """Against `transformers` in fp32 on the very numbers that are stored, quantised or not.

    What is left is the rounding of bf16, for which the yardstick is what `transformers` loses
    in bf16 on the same weights: widely spread random weights multiply each rounding.
    """
    source = checkpoint(name)
    stored = as_stored(source, precision)
    options = EngineOptions(str(source.path), 1 << 22, precision=precision, kernels="torch")
    engine = load_engine(options, lambda _: None)
    ours, theirs = [], []
    for length in (20, 40, 77):
        prompt = prompt_of(length)
        expected = Checkpoint(source.path, stored).logits(prompt)[-1]
        half = copy.deepcopy(stored).bfloat16()
        theirs.append(error_of(Checkpoint(source.path, half).logits(prompt)[-1].float(), expected))
        splits = ((length,), (17, length - 18, 1))
        ours += [error_of(logits(engine, prompt, pieces), expected) for pieces in splits]
    assert fmean(ours) < 1.5 * fmean(theirs) + 0.005
    assert fmean(ours) < 0.15


@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.5), ("int8", 0.27), ("int4", 0.16)])
def test_weights_take_the_memory_that_their_precision_says(
    checkpoint: Callable[[str], Checkpoint], precision: str, share: float
) -> None:
    """Bytes read in a step, against fp32; a tied table is there once."""
    path = str(checkpoint("qwen2-tied").path)
    full, small = (
        load_engine(EngineOptions(path, 1 << 22, precision=p), lambda _: None).info
        for p in ("fp32", precision)
    )
    assert small.step_bytes == small.weight_bytes
    assert small.step_bytes < (share + 0.06) * full.step_bytes
    assert full.kv_token_bytes == 2 * small.kv_token_bytes
    assert (precision, "torch") == (small.precision, small.kernels) or small.kernels == "native"


def test_fp8_needs_a_device_that_has_it(checkpoint: Callable[[str], Checkpoint]) -> None:
    """The refusal says what it takes and what to use instead."""
    options = EngineOptions(str(checkpoint("llama").path), 1 << 22, precision="fp8")
    with pytest.raises(ModelLoadError, match=r"fp8 needs a CUDA device.*int8"):
        load_engine(options, lambda _: None)


def test_kernels_that_do_not_exist_are_refused(checkpoint: Callable[[str], Checkpoint]) -> None:
    """A mistyped choice is named."""
    options = EngineOptions(str(checkpoint("llama").path), 1 << 22, kernels="fast")
    with pytest.raises(ModelLoadError, match="fast"):
        load_engine(options, lambda _: None)
