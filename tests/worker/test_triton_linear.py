"""Skinny products against float64."""

import pytest
import torch

from nanovllm.worker.kernels.triton_linear import Tile, skinny_linear
from tests.worker.triton_device import DEVICE

VECTOR_TILES = [Tile(8, 64, 3, warps=4), Tile(16, 256, 1, warps=4)]
MATRIX_TILES = [
    Tile(16, 256, 1, warps=4),
    Tile(16, 64, 1, warps=4),
    Tile(32, 32, 2, warps=4, block_m=16),
]
CASES = [(1, tile) for tile in VECTOR_TILES] + [(m, tile) for m in (2, 17) for tile in MATRIX_TILES]


def rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("extras", [False, True])
def test_linear(num_tokens: int, tile: Tile, extras: bool) -> None:
    x, weight = torch.randn(num_tokens, 160, device=DEVICE), torch.randn(40, 160, device=DEVICE)
    bias = torch.randn(40, device=DEVICE) if extras else None
    residual = torch.randn(num_tokens, 40, device=DEVICE) if extras else None
    out = skinny_linear(x, weight, bias, residual=residual, tile=tile)
    expected = x.double() @ weight.double().T
    if bias is not None and residual is not None:
        expected += bias.double() + residual.double()
    assert (out - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(out, skinny_linear(x, weight, bias, residual=residual, tile=tile))


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
def test_gated(num_tokens: int, tile: Tile) -> None:
    x, weight = torch.randn(num_tokens, 160, device=DEVICE), torch.randn(80, 160, device=DEVICE)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = gate * gate.sigmoid() * up
    out = skinny_linear(x, weight, gated=True, tile=tile)
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("num_tokens", "tile"), [case for case in CASES if case[0] <= 16])
def test_norm_before_few_tokens(num_tokens: int, tile: Tile) -> None:
    x, weight = torch.randn(num_tokens, 160, device=DEVICE), torch.randn(40, 160, device=DEVICE)
    factors = torch.randn(160, device=DEVICE)
    out = skinny_linear(x, weight, norm=(factors, 1e-6), tile=tile)
    expected = rms_normed(x.double(), factors.double(), 1e-6) @ weight.double().T
    assert (out - expected).norm() < 1e-6 * expected.norm()
