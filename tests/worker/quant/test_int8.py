"""INT8 weights and tokens: compressed-tensors' W8A8, with scales of tokens found or brought."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.int8 import Int8, quantize_rows
from tests.worker.quant.layouts import compressed, integers, write
from tests.worker.quant.test_layouts import load
from tests.worker.test_weights import wider

TOKENS = integers(8, "token", symmetric=True) | {"dynamic": True}
STATIC = integers(8, "tensor", symmetric=True)


@pytest.mark.parametrize("tokens", [TOKENS, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_stored(strategy: str, tokens: dict[str, Any], tmp_path: Path) -> None:
    """The weights are compressed-tensors' own bit for bit, and so are products of their codes."""
    (source := tmp_path / "plain").mkdir()
    weights = integers(8, strategy, symmetric=True)
    expected = write(
        wider("llama", source), tmp_path, *compressed("int-quantized", weights, tokens)
    )
    model = load(tmp_path).model
    for index, layer in enumerate(model.layers):
        for linear in layer.linears():
            assert isinstance(linear.method, Int8) and linear.scale is not None
            for part, _, rows in linear.rows():
                name = f"{model.spec.names.safetensors[part].format(index)}.weight"
                values = linear.weight[rows].float() * linear.scale[rows, None]
                assert torch.equal(values.bfloat16(), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_product(dtype: torch.dtype, bias: bool) -> None:
    codes, scale = quantize_rows(torch.randn(33, 75) * torch.logspace(-4, 1, 33)[:, None])
    biases = torch.randn(33, dtype=dtype) if bias else None
    method = Int8()
    linear = Linear(codes, biases, {}, 0, method, scale[:, 0])
    x = (torch.randn(5, 75) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    tokens, token_scale = quantize_rows(x)
    assert ((tokens * token_scale - x).abs() <= 0.5001 * token_scale).all()
    expected = (tokens.double() * token_scale) @ (codes.double() * scale).T
    if biases is not None:
        expected += biases.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    out = linear(x)
    assert out.dtype == dtype
    assert (out - expected).norm() <= tolerance * expected.norm()


def test_rows_of_zeros() -> None:
    codes, scale = quantize_rows(torch.zeros(2, 8))
    assert (codes == 0).all() and (scale > 0).all()
