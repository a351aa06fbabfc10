"""Skinny products against float64."""

import pytest
import torch
from torch.nn.functional import silu

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.triton.linear_tuning import (
    Tile,
    beats_cublas,
    fp8_tile_for,
    tile_for,
)
from nanovllm.worker.kernels.triton.skinny_linear import skinny_add, skinny_linear
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.fp8 import FP8, quantize_rows
from tests.worker.kernels.gating import ACTIVATIONS
from tests.worker.kernels.triton_device import DEVICE

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
    residual = torch.randn(num_tokens, 40, device=DEVICE)
    linear = Linear(weight, bias, {}, 0)
    expected = x.double() @ weight.double().T

    def product() -> torch.Tensor:
        if extras:
            return skinny_add(x, linear, residual, tile=tile).hidden
        return skinny_linear(x, linear, tile=tile)

    out = product()
    if bias is not None:
        expected += bias.double() + residual.double()
    assert (out - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(out, product())


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("gate_by", ACTIVATIONS)
def test_gated(num_tokens: int, tile: Tile, gate_by: Activation) -> None:
    x, weight = torch.randn(num_tokens, 160, device=DEVICE), torch.randn(80, 160, device=DEVICE)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    expected = ACTIVATIONS[gate_by](gate) * up
    out = skinny_linear(x, Linear(weight, None, {}, 0), gate=gate_by, tile=tile)
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("gate_by", [None, *ACTIVATIONS])
def test_one_product_weighs_the_stream_for_the_next(
    num_tokens: int, tile: Tile, gate_by: Activation | None
) -> None:
    """Into a residual of a size that no tile divides, and out of it through a norm."""
    x, residual = torch.randn(num_tokens, 200, device=DEVICE).split((160, 40), 1)
    x, residual, factors = x.contiguous(), residual.contiguous(), torch.randn(40, device=DEVICE)
    into, out_of = torch.randn(40, 160, device=DEVICE), torch.randn(80, 40, device=DEVICE)
    added = skinny_add(x, Linear(into, None, {}, 0), residual, next_norm=factors, tile=tile)
    assert added.weighed is not None
    values, squares, _ = added.weighed
    torch.testing.assert_close(values, added.hidden * factors, rtol=0, atol=0)
    torch.testing.assert_close(squares.sum(1), added.hidden.square().sum(1))
    linear = Linear(out_of, None, {}, 0)
    out = skinny_linear(values, linear, norm=(squares, 1e-6), gate=gate_by, tile=tile)
    hidden = residual.double() + x.double() @ into.double().T
    expected = rms_normed(hidden, factors.double(), 1e-6) @ out_of.double().T
    if gate_by is not None:
        gate, up = expected.chunk(2, dim=1)
        expected = ACTIVATIONS[gate_by](gate) * up
    assert (out - expected).norm() < 1e-6 * expected.norm()


def test_float16_is_not_weighed() -> None:
    """The residual times a weight might leave its range."""
    x, weight = torch.randn(1, 160, device=DEVICE).half(), torch.randn(40, 160, device=DEVICE)
    linear, residual = Linear(weight.half(), None, {}, 0), x[:, :40].contiguous()
    assert skinny_add(x, linear, residual, next_norm=torch.ones_like(residual[0])).weighed is None


@pytest.mark.parametrize("num_tokens", [17, 33, 65])
@pytest.mark.parametrize("num_inputs", [576, 1536])
def test_inputs_that_no_tile_divides(num_tokens: int, num_inputs: int) -> None:
    x, residual = torch.randn(num_tokens, num_inputs + 40, device=DEVICE).split((num_inputs, 40), 1)
    x, residual = x.contiguous(), residual.contiguous()
    weight = torch.randn(40, num_inputs, device=DEVICE) * num_inputs**-0.5
    if DEVICE.type == "cuda":  # where tiles are measured, and fit, in halves
        x, residual, weight = x.bfloat16(), residual.bfloat16(), weight.bfloat16()
    tolerance = 1e-6 if x.dtype == torch.float32 else 4e-3
    linear, product = Linear(weight, None, {}, 0), x.double() @ weight.double().T
    expected = product + residual
    out = skinny_add(x, linear, residual).hidden
    assert (out - expected).norm() < tolerance * expected.norm()
    gate, up = product.to(x.dtype).chunk(2, dim=1)  # rounded as models round them
    expected = silu(gate) * up
    out = skinny_linear(x, linear, gate="silu")
    assert (out - expected).norm() < tolerance * expected.norm()


def test_small_layers_are_cut_as_measured() -> None:
    """Qwen3-0.6B's, so that all programs of a product run at once."""
    whole, narrow, halves = (
        Tile(32, 1024, 1, 4, 2),
        Tile(16, 1024, 1, 4, 2),
        Tile(32, 128, 12, 4, 5),
    )
    assert tile_for(8, 4096, 1024, gated=False) == whole
    assert tile_for(32, 4096, 1024, gated=False) == whole
    assert tile_for(64, 4096, 1024, gated=False) == tile_for(64, 1024, 3072, gated=False) == whole
    assert tile_for(64, 1024, 2048, gated=False) == narrow
    assert tile_for(128, 1024, 2048, gated=False) == whole
    assert tile_for(128, 1024, 3072, gated=False) == halves
    assert tile_for(128, 4096, 1024, gated=False) == Tile(64, 128, 8, 4, 4)
    assert tile_for(32, 3072, 1024, gated=True) == Tile(16, 256, 4, 4, 4)
    assert tile_for(64, 3072, 1024, gated=True) == Tile(32, 128, 8, 4, 5)


def test_the_smallest_layers_take_norms_and_gates_along_for_as_many_tokens_as_are_ours() -> None:
    x, residual = torch.randn(100, 160, device=DEVICE), torch.randn(100, 40, device=DEVICE)
    into, out_of = torch.randn(40, 160, device=DEVICE), torch.randn(80, 40, device=DEVICE)
    factors = torch.randn(40, device=DEVICE)
    tolerance = 1e-6
    if DEVICE.type == "cuda":  # where as many tokens are ours in halves alone
        x, residual, into, out_of = (one.bfloat16() for one in (x, residual, into, out_of))
        factors, tolerance = factors.bfloat16(), 1e-2
    added = skinny_add(x, Linear(into, None, {}, 0), residual, next_norm=factors)
    assert added.weighed is not None
    norm = added.weighed.squares, 1e-6
    out = skinny_linear(added.weighed.values, Linear(out_of, None, {}, 0), norm=norm, gate="silu")
    hidden = residual.double() + x.double() @ into.double().T
    gate, up = (rms_normed(hidden, factors.double(), 1e-6) @ out_of.double().T).chunk(2, dim=1)
    expected = silu(gate) * up
    assert (out - expected).norm() < tolerance * expected.norm()
    sizes = (3072, 576), (6144, 1024), (24576, 4096)
    most = [
        max(n for n in (16, 32, 64, 128, 129) if beats_cublas(n, weight, gated=True))
        for weight in (torch.zeros(1, 1, device=DEVICE).half().expand(size) for size in sizes)
    ]
    assert most == [128, 64, 32]


def test_the_smallest_layers_are_cut_by_tokens_too() -> None:
    """SmolLM2-135M's: 16 tokens a program leave as many programs as run at once."""
    of_16 = Tile(32, 1024, 1, 4, 2, block_m=16)
    for num_outputs, gated in ((960, False), (576, False), (1536, True)):
        assert tile_for(32, num_outputs, 576, gated=gated) == of_16
    assert tile_for(64, 576, 576, gated=False) == Tile(64, 1024, 1, 4, 2, block_m=16)
    assert tile_for(64, 576, 1536, gated=False) == Tile(64, 512, 1, 4, 2, block_m=16)


def test_layers_of_2560_inputs_are_cut_as_measured() -> None:
    """Gemma-3-4B's, beside Qwen3's, whose tiles they must not change."""
    assert tile_for(1, 10240, 2560, gated=True) == Tile(16, 512, 5, 8)
    assert tile_for(1, 4096, 2560, gated=False) == Tile(8, 1024, 3, 4)
    assert tile_for(1, 262144, 2560, gated=False) == Tile(4, 2048, 2, 8)
    assert tile_for(1, 2560, 2048, gated=False) == Tile(4, 2048, 1, 8)
    assert tile_for(1, 2560, 10240, gated=False) == Tile(4, 2048, 5, 4)
    assert tile_for(32, 10240, 2560, gated=True) == Tile(64, 64, 40, 4, 4)
    assert tile_for(64, 10240, 2560, gated=True) == Tile(64, 128, 20, 4, 3)
    assert tile_for(1, 3072, 1024, gated=True) == Tile(8, 1024, 1, 8)
    assert tile_for(1, 1024, 3072, gated=False) == Tile(4, 2048, 2, 8)
    assert tile_for(1, 6144, 4096, gated=False) == Tile(4, 2048, 2, 8)
    assert tile_for(32, 12288, 4096, gated=True) == Tile(64, 128, 32, 4, 3)


def test_gates_of_one_token_and_layers_that_two_ranks_share_are_cut_as_measured() -> None:
    """Qwen3-8B's and 32B's."""
    for num_outputs in (12288, 6144):
        assert tile_for(1, num_outputs, 4096, gated=True) == Tile(4, 4096, 1, 8)
    assert tile_for(1, 12800, 5120, gated=True) == Tile(4, 1024, 5, 4)
    assert tile_for(1, 4096, 2048, gated=False) == Tile(4, 1024, 2, 4)
    assert tile_for(8, 6144, 4096, gated=True) == Tile(32, 512, 2, 4, 3)
    assert tile_for(8, 3072, 4096, gated=False) == Tile(64, 512, 1, 4, 2)
    for whole in (6144, 4096):
        assert tile_for(8, whole, 4096, gated=False) == Tile(64, 512, 2, 4, 2)
    assert tile_for(8, 12288, 4096, gated=True) == Tile(32, 512, 8, 4, 2)


def fp8_linear(num_outputs: int, num_inputs: int, *, bias: bool = False) -> Linear:
    """Rows of very different sizes."""
    sizes = torch.logspace(-3, 1, num_outputs, device=DEVICE)[:, None]
    rows = quantize_rows(torch.randn(num_outputs, num_inputs, device=DEVICE) * sizes)
    biases = torch.randn(num_outputs, device=DEVICE) if bias else None
    return Linear(rows.values, biases, {}, 0, FP8, rows.scale[:, 0])


def tolerance_of(num_tokens: int) -> float:
    """Hopper's tensor cores add up products of e4m3 in less than single precision."""
    return 1e-3 if num_tokens > 1 and DEVICE.type == "cuda" else 1e-6


def widened(linear: Linear) -> torch.Tensor:
    assert linear.scale is not None
    return linear.weight.double() * linear.scale.double()[:, None]


def as_multiplied(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Several tokens have a scale for every tile of inputs; one is multiplied as it is."""
    if len(x) == 1:
        return x.double()
    size = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -size % tile.block_k))
    rows = quantize_rows(padded.unflatten(1, (-1, tile.block_k)))
    return (rows.values.double() * rows.scale.double()).flatten(1)[:, :size]


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("num_inputs", [160, 2064])
def test_fp8_weights(num_tokens: int, num_inputs: int) -> None:
    linear = fp8_linear(40, num_inputs, bias=True)
    assert linear.bias is not None
    x, residual = torch.randn(num_tokens, num_inputs + 40, device=DEVICE).split((num_inputs, 40), 1)
    x, residual = x.contiguous(), residual.contiguous()
    tile = fp8_tile_for(num_tokens, 40, num_inputs, gated=False)
    product = as_multiplied(x, tile) @ widened(linear).T
    expected = product + linear.bias.double() + residual.double()
    out = skinny_add(x, linear, residual).hidden
    assert (out - expected).norm() < tolerance_of(num_tokens) * expected.norm()


@pytest.mark.parametrize(("num_tokens", "tile"), CASES)
@pytest.mark.parametrize("gate_by", ACTIVATIONS)
def test_fp8_gated(num_tokens: int, tile: Tile, gate_by: Activation) -> None:
    linear, x = fp8_linear(80, 160, bias=True), torch.randn(num_tokens, 160, device=DEVICE)
    assert linear.bias is not None
    product = as_multiplied(x, tile) @ widened(linear).T + linear.bias.double()
    gate, up = product.chunk(2, dim=1)
    out = skinny_linear(x, linear, gate=gate_by, tile=tile)
    expected = ACTIVATIONS[gate_by](gate) * up
    assert (out - expected).norm() < tolerance_of(num_tokens) * expected.norm()


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_fp8_weights_between_streams(num_tokens: int) -> None:
    """The second product takes the residual as the first has weighed it."""
    into, out_of = fp8_linear(48, 160), fp8_linear(40, 48)
    x, residual = torch.randn(num_tokens, 208, device=DEVICE).split((160, 48), 1)
    x, residual, factors = x.contiguous(), residual.contiguous(), torch.randn(48, device=DEVICE)
    added = skinny_add(x, into, residual, next_norm=factors)
    assert added.weighed is not None
    values, squares, _ = added.weighed
    out = skinny_linear(values, out_of, norm=(squares, 1e-6))
    first, second = (
        fp8_tile_for(num_tokens, *shape, gated=False) for shape in ((48, 160), (40, 48))
    )
    hidden = residual.double() + as_multiplied(x, first) @ widened(into).T
    assert (added.hidden - hidden).norm() < tolerance_of(num_tokens) * hidden.norm()
    scale = (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = as_multiplied(values, second) @ widened(out_of).T * scale
    assert (out - expected).norm() < tolerance_of(num_tokens) * expected.norm()


@pytest.mark.parametrize("num_tokens", [2, 16])
def test_fp8_layers_are_cut_as_measured(num_tokens: int) -> None:
    """Of Qwen3-0.6B and 8B; 64 outputs at the least, as Hopper's tensor cores ask for."""
    small, narrow = Tile(128, 512, 1, 8, 2), Tile(64, 512, 1, 4, 2)
    assert fp8_tile_for(num_tokens, 4096, 1024, gated=False) == small
    assert fp8_tile_for(num_tokens, 3072, 1024, gated=True) == small
    assert fp8_tile_for(num_tokens, 1024, 3072, gated=False) == small
    assert fp8_tile_for(num_tokens, 1024, 2048, gated=False) == narrow
    assert fp8_tile_for(num_tokens, 6144, 4096, gated=False) == Tile(128, 256, 8, 8, 3)
    assert fp8_tile_for(num_tokens, 4096, 4096, gated=False) == Tile(128, 256, 4, 8, 3)
    assert fp8_tile_for(num_tokens, 12288, 4096, gated=True) == Tile(128, 128, 32, 8, 4)
    assert fp8_tile_for(num_tokens, 4096, 12288, gated=False) == Tile(128, 256, 12, 8, 3)
