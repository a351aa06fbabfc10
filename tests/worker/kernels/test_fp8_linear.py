"""Products of tokens that come quantized in groups, against float64, and their machine code."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.triton import fp8_linear as module
from nanovllm.worker.kernels.triton import linear_tuning, products
from nanovllm.worker.kernels.triton.fp8_linear import (
    GROUP,
    can_group,
    group_add,
    group_gated,
    group_linear,
    row_add,
    row_linear,
)
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.linear_tuning import Tile
from nanovllm.worker.kernels.triton.products import form_for
from nanovllm.worker.kernels.triton.rows import quantize, quantize_groups
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.quant.fp8 import E4M3, FP8, QuantizedGroups, quantize_rows
from nanovllm.worker.quant.scaled_rows import QuantizedRows
from tests.worker.kernels.gating import ACTIVATIONS
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.warmup.compiling import run_compiling

KERNELS = TritonKernels()
EPS = 1e-6
# Fast sums of Hopper's tensor cores; else what fp32 rounds.
TOLERANCE = 1e-3 if DEVICE.type == "cuda" else 1e-6
# Of three groups of inputs: all in one program, split unevenly, and a program each.
TILES = [Tile(128, GROUP, num_tiles, warps=4) for num_tiles in (3, 2, 1)]


@pytest.fixture
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are cut like this."""
    monkeypatch.setattr(module, "fp8_group_tile_for", lambda *sizes, gated: request.param)


def fp8_linear(num_outputs: int, num_inputs: int, *, bias: bool = False) -> Linear:
    """Rows of very different sizes."""
    sizes = torch.logspace(-2, 0, num_outputs, device=DEVICE)[:, None] * num_inputs**-0.5
    rows = quantize_rows(torch.randn(num_outputs, num_inputs, device=DEVICE) * sizes)
    biases = torch.randn(num_outputs, device=DEVICE) if bias else None
    return Linear(rows.values, biases, {}, 0, FP8, rows.scale[:, 0])


def random_groups(num_tokens: int, size: int) -> QuantizedGroups:
    """Of very different sizes within a token, one of zeros."""
    x = torch.randn(num_tokens, size // GROUP, GROUP, device=DEVICE)
    x *= torch.logspace(-3, 2, size // GROUP, device=DEVICE)[:, None]
    x[-1, 0] = 0
    return quantize_groups(x.flatten(1), GROUP)


def meant(x: QuantizedGroups) -> Tensor:
    groups = x.values.double().unflatten(1, (len(x.scale), -1))
    return (groups * x.scale.double().T[:, :, None]).flatten(1)


def widened(linear: Linear) -> Tensor:
    assert linear.scale is not None
    return linear.weight.double() * linear.scale.double()[:, None]


def product(x: Tensor, linear: Linear) -> Tensor:
    wide = x.double() @ widened(linear).T
    return wide if linear.bias is None else wide + linear.bias.double()


def gated(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    x = x.double()
    return x * (x.square().mean(1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def near(out: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def as_exact(groups: QuantizedGroups, expected: Tensor) -> None:
    """They mean what the expected numbers are quantized to, but for a few on the border between
    two; more of them where sums have the 14 bits that Hopper's tensor cores keep of FP8's."""
    assert groups.values.dtype == E4M3
    wanted = quantize_groups(expected.float(), GROUP)
    torch.testing.assert_close(groups.scale, wanted.scale, rtol=1e-2, atol=1e-12)
    near(meant(groups), meant(wanted), 1e-2 if DEVICE.type == "cuda" else 5e-3)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [256, 384])
def test_each_group_has_the_scale_that_a_row_of_it_would_have(size: int, norm: bool) -> None:
    x = torch.randn(5, size, device=DEVICE)
    x[1] *= 1000
    x[2] = 0
    weights = RMSNorm(torch.rand(size, device=DEVICE) + 0.5, EPS) if norm else None
    groups = quantize_groups(x, GROUP, weights)
    wide = x if weights is None else normed(x, weights).float()
    rows = quantize_rows(wide.unflatten(1, (-1, GROUP)))
    torch.testing.assert_close(groups.scale, rows.scale[:, :, 0].T, rtol=1e-5, atol=0)
    near(meant(groups), (rows.values.double() * rows.scale.double()).flatten(1), 2e-3)


@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("num_tokens", [17, 32])
def test_linear(num_tokens: int) -> None:
    """Outputs that no tile divides; and, once more, the very same numbers."""
    linear, x = fp8_linear(200, 384, bias=True), random_groups(num_tokens, 384)
    out = group_linear(x, linear, torch.float32)
    near(out, product(meant(x), linear))
    assert torch.equal(out, group_linear(x, linear, torch.float32))


@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: Activation) -> None:
    linear, x = fp8_linear(512, 384, bias=True), random_groups(20, 384)
    found = group_gated(x, linear, activation)
    as_exact(found, gated(product(meant(x), linear), activation))


@pytest.mark.parametrize("tile", TILES, indirect=True)
@pytest.mark.usefixtures("tile")
def test_what_is_added_is_weighed_and_quantized_for_the_next() -> None:
    linear, x = fp8_linear(256, 384), random_groups(20, 384)
    residual, factors = torch.randn(20, 256, device=DEVICE), torch.randn(256, device=DEVICE)
    found = group_add(x, linear, residual, next_norm=factors)
    near(found.hidden, residual.double() + product(meant(x), linear))
    assert found.weighed is not None and found.weighed.scale is not None
    values, squares, scale = found.weighed
    torch.testing.assert_close(squares.sum(1), found.hidden.square().sum(1))
    as_exact(QuantizedGroups(values, scale), found.hidden * factors)
    after = fp8_linear(128, 256)
    out = group_linear(
        QuantizedGroups(values, scale), after, torch.float32, norm=(squares, EPS)
    )  # fmt: skip
    root = (found.hidden.double().square().mean(1, keepdim=True) + EPS).rsqrt()
    near(out, product(meant(QuantizedGroups(values, scale)), after) * root)
    assert group_add(x, linear, residual).weighed is None


class Layer(NamedTuple):
    """What products through the seam make of a layer, and what they should."""

    norm: RMSNorm
    gate_up: Linear
    added: Residual
    after: Residual
    expected: Tensor  # of its norm and gate_up, [num_tokens, 768]


def run_layer(num_tokens: int) -> Layer:
    """With the same tokens as plain numbers it is as exact as e4m3 is."""
    norm = RMSNorm(torch.rand(256, device=DEVICE) + 0.5, EPS)
    residual, heads = torch.randn(2, num_tokens, 256, device=DEVICE)
    o, gate_up, down = fp8_linear(256, 256), fp8_linear(768, 256), fp8_linear(256, 384)
    total = residual.double() + product(heads, o)
    added = KERNELS.linear_add(heads, o, residual, next_norm=norm)
    near(added.hidden, total, 3e-2)
    expected = product(normed(total, norm), gate_up)
    near(KERNELS.norm_linear(added, norm, gate_up), expected, 5e-2)
    after = KERNELS.mlp(added, norm, gate_up, down, next_norm=None)
    near(after.hidden, total + product(gated(expected), down), 3e-2)
    return Layer(norm, gate_up, added, after, expected)


@pytest.mark.parametrize("num_tokens", [17, 32])
def test_a_layer_of_grouped_products(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(products, "are_grouped", lambda num_tokens, weight: True)
    norm, gate_up, found, after, expected = run_layer(num_tokens)
    assert found.weighed is not None and found.weighed.scale is not None
    near(KERNELS.norm_linear(Residual(found.hidden), norm, gate_up), expected, 5e-2)
    assert after.weighed is None
    # What is weighed and quantized is of no use to products of another form.
    plain = Linear(torch.randn(40, 256, device=DEVICE) / 16, None, {}, 0)
    near(KERNELS.norm_linear(found, norm, plain),
         normed(found.hidden, norm) @ plain.weight.double().T, 1e-5)  # fmt: skip


def meant_by(x: QuantizedRows) -> Tensor:
    return x.values.double() * x.scale.double()


@pytest.mark.parametrize(
    "tile",
    [
        Tile(128, 128, num_tiles=3, warps=4, block_m=64),
        Tile(64, 128, num_tiles=2, warps=4, block_m=32),  # split unevenly, two programs of tokens
        Tile(64, 256, num_tiles=1, warps=4, block_m=64),
    ],
)
def test_products_of_tokens_with_a_scale_each(tile: Tile) -> None:
    """Outputs and inputs that no tile divides; and, once more, the very same numbers."""
    x = quantize(
        torch.randn(50, 400, device=DEVICE) * torch.logspace(-3, 2, 50, device=DEVICE)[:, None]
    )
    linear = fp8_linear(200, 400, bias=True)
    out = row_linear(x, linear, torch.float32, tile=tile)
    expected = product(meant_by(x), linear)
    near(out, expected)
    assert torch.equal(out, row_linear(x, linear, torch.float32, tile=tile))
    residual = torch.randn(50, 200, device=DEVICE)
    near(row_add(x, linear, residual, tile=tile).hidden, residual.double() + expected)
    for activation in ("silu", "gelu_tanh"):
        found = row_linear(x, linear, torch.float32, gate=activation, tile=tile)
        near(found, gated(expected, activation))


@pytest.mark.parametrize("num_tokens", [33, 64])
def test_a_layer_of_tokens_with_a_scale_each(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    monkeypatch.setattr(products, "are_rows", lambda num_tokens, weight: True)
    run_layer(num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_weights", "expected"),
    [(16, 2**23, False), (17, 2**23, True), (32, 2**26, True), (33, 2**26, False),
     (32, 2**23 - 128, False)],
)  # fmt: skip
def test_which_products_are_grouped(num_tokens: int, num_weights: int, expected: bool) -> None:
    """As measured: more than what products quantize themselves, few enough to beat cuBLAS."""
    weight = torch.empty(num_weights // 128, 128, dtype=E4M3, device=DEVICE)
    assert linear_tuning.are_grouped(num_tokens, weight) is expected
    is_row = num_tokens > linear_tuning.MAX_GROUPED_TOKENS and num_weights >= 2**23
    assert linear_tuning.are_rows(num_tokens, weight) is is_row


def test_layers_without_whole_groups_go_another_way() -> None:
    assert can_group(fp8_linear(256, 128))
    assert not can_group(fp8_linear(200, 128)) and not can_group(fp8_linear(128, 96))


def test_few_tokens_take_the_unquantized_copy() -> None:
    """That of each layer for itself, with norm, gate and residual."""
    norm = RMSNorm(torch.rand(64, device=DEVICE) + 0.5, EPS)
    gate_up, down = fp8_linear(96, 64), fp8_linear(64, 48)
    for linear in (gate_up, down):
        weight = widened(linear).float()
        linear.copy = replace(linear, weight=weight, scale=None, method=UNQUANTIZED)
    for num_tokens in (2, 5, 128):
        residual, hidden = torch.randn(2, num_tokens, 64, device=DEVICE)
        wide = product(normed(residual, norm), gate_up)
        near(KERNELS.norm_linear(Residual(residual), norm, gate_up), wide, 1e-6)
        hidden = hidden[:, :48].contiguous()
        near(KERNELS.linear_add(hidden, down, residual.clone()).hidden,
             residual.double() + product(hidden, down), 1e-6)  # fmt: skip
        total = residual.double() + product(gated(wide), down)
        near(KERNELS.mlp(Residual(residual.clone()), norm, gate_up, down).hidden, total, 1e-6)
    assert form_for(2, down) is form_for(128, down) is down.copy
    assert form_for(1, down) is form_for(129, down) is down


def test_its_tiles_fit_a_multiprocessor_and_spill_nothing() -> None:
    for usage in run_compiling("compile_for_gpu.py", "grouped").values():
        assert usage["spilled"] == usage["serialized"] == 0
        assert usage["shared"] <= 227 * 1024
