"""Quantised layers as CUDA runs them: what of them can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_fed.engine import precision as numbers
from sage_fed.engine.cuda_graphs import compiled_by_rows
from sage_fed.engine.linear import Linear
from sage_fed.engine.precision import (
    AtenInt4Linear,
    Fp8Linear,
    QuantisedFormat,
    WidenedLinear,
    high_first,
    scale_grid,
)


def weights(out: int, inputs: int) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(out)) * 0.05


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 5])
def test_widened_products_are_those_of_the_dequantised_weights(scheme: str, rows: int) -> None:
    """Scaling the product is scaling the weights, but for bf16's rounding."""
    w, bias = weights(48, 96), torch.randn(48)
    values, scales = getattr(numbers, f"quantise_{scheme}")(w)
    layer = WidenedLinear(values, scales, bias)
    x = torch.randn(rows, 96).bfloat16()
    wide = getattr(numbers, f"dequantise_{scheme}")(values, scales)
    expected = x.float() @ wide.t() + bias
    torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(
        layer.add_to(x[:, :48], x).float(), expected + x[:, :48].float(), atol=0.04, rtol=0.02
    )
    picked = layer.rows(torch.tensor([3, 40]))
    torch.testing.assert_close(picked.float(), wide[[3, 40]], atol=0, rtol=0.01)
    assert layer.nbytes == values.nbytes + scales.nbytes + bias.nbytes


def test_one_row_of_fp8_is_widened_where_that_is_compiled() -> None:
    """Its activations are not rounded then, and neither is another function traced."""
    w = weights(48, 96)
    values, scales = numbers.quantise_fp8(w)
    layer = Fp8Linear(values, scales, None)

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        assert "scaled_mm" not in module.code
        return module.forward

    x = torch.randn(1, 96).bfloat16()
    found = compiled_by_rows(layer.__call__, backend=backend)(x)
    assert torch.equal(WidenedLinear(values, scales, None)(x), found)


def test_int4_bytes_are_turned_for_the_kernel_that_has_the_even_input_first() -> None:
    """Read high half first, they are the canonical numbers in their order."""
    values = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    turned = high_first(numbers.pack_int4(values))
    read = torch.stack((turned >> 4, turned & 15), dim=-1).view(6, 64)
    assert torch.equal(values, read)


def test_int4_layers_have_the_shapes_that_the_operator_asks_for() -> None:
    """By torch's own check of shapes and types, on a device that is only imagined."""
    with FakeTensorMode():
        packed = torch.empty(64, 128, dtype=torch.uint8, device="cuda")
        tiled = torch.ops.aten._convert_weight_to_int4pack(high_first(packed), 8)
        grid = scale_grid(torch.empty(64, 8, dtype=torch.bfloat16, device="cuda"))
        x = torch.empty(3, 256, dtype=torch.bfloat16, device="cuda")
        bias = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        y = AtenInt4Linear(tiled, grid, bias)(x)
    assert (8, 64, 2) == grid.shape
    assert ((3, 64), torch.bfloat16) == (y.shape, y.dtype)


@pytest.mark.parametrize(("out", "inputs"), [(48, 96), (41, 96), (48, 40), (41, 40)])
def test_fp8_layers_have_the_shapes_that_the_operator_asks_for(out: int, inputs: int) -> None:
    """Whatever the model's own are: a head has as many rows as a tokenizer has ids."""
    bias = torch.linspace(-1, 1, out).bfloat16()
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(3)).bfloat16()

    def layer(device: str) -> Linear:
        builder = QuantisedFormat("fp8", torch.bfloat16, torch.device(device)).builder(
            out, inputs, bias=True
        )
        if device == "cpu":
            builder.place_weight(0, weights(out, inputs))
            builder.place_bias(0, bias)
        return builder.build()

    # What has no values is checked as CUDA's operator checks.
    y = layer("meta")(torch.empty(3, inputs, dtype=torch.bfloat16, device="meta"))
    assert ((3, out), torch.bfloat16) == (y.shape, y.dtype)
    expected = x.float() @ weights(out, inputs).t() + bias.float()
    found = layer("cpu")(x).float()
    assert (found - expected).norm() / expected.norm() < 0.05
