"""The gated product of many tokens against float64, and its machine code."""

import pytest
import torch

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.gated_linear import GatedTile, can_gate, gated_linear
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.quant.fp8 import E4M3, FP8
from tests.worker.kernels.gating import ACTIVATIONS
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.warmup.compiling import run_compiling

TILES = [
    GatedTile(32, 16, 32, stages=2, warps=4),
    GatedTile(16, 32, 64, stages=3, warps=4, programs_per_sm=None),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("num_tokens", "num_outputs"), [(70, 40), (9, 96), (300, 4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_linear(
    num_tokens: int, num_outputs: int, tile: GatedTile, activation: Activation
) -> None:
    """Tiles that hang over, and more groups of rows than one."""
    x, weight = torch.randn(num_tokens, 84, device=DEVICE), torch.randn(2 * num_outputs, 84)
    linear = Linear(weight.to(DEVICE), None, {}, 0)
    gate, up = (x.double() @ linear.weight.double().T).chunk(2, dim=1)
    expected = ACTIVATIONS[activation](gate) * up
    out = gated_linear(x, linear, activation, tile=tile)
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_of_many_tokens(activation: Activation) -> None:
    """In half precision, rounded where plain torch rounds."""
    residual = torch.randn(1100, 64, device=DEVICE, dtype=torch.float16)
    norm = RMSNorm(torch.rand(64, device=DEVICE, dtype=torch.float16) + 0.5, 1e-6)
    gate_up, down = (
        Linear((torch.randn(n, k, device=DEVICE) * k**-0.5).half(), None, {}, 0)
        for n, k in ((96, 64), (64, 48))
    )
    assert can_gate(residual, gate_up)
    out, expected = (
        kernels.mlp(
            Residual(residual.clone()),
            norm,
            gate_up,
            down,
            activation=activation,
            next_norm=norm,
        ).hidden
        for kernels in (TritonKernels(), TorchKernels())
    )
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=4e-3)


def test_what_it_leaves_to_others() -> None:
    half = {"device": DEVICE, "dtype": torch.bfloat16}
    x, weight = torch.empty(1024, 64, **half), torch.empty(32, 64, **half)
    assert can_gate(x, Linear(weight, None, {}, 0))
    assert not can_gate(x[:1023], Linear(weight, None, {}, 0))
    assert not can_gate(x, Linear(weight, weight[:, 0], {}, 0))
    assert not can_gate(x, Linear(weight.to(E4M3), None, {}, 0, FP8))
    assert not can_gate(x[:, :60], Linear(weight[:, :60], None, {}, 0))
    assert not can_gate(x.float(), Linear(weight.float(), None, {}, 0))


def test_its_tiles_fit_a_multiprocessor_and_its_products_overlap() -> None:
    for usage in run_compiling("compile_for_gpu.py", "gated").values():
        assert usage["spilled"] == usage["serialized"] == 0
        assert usage["shared"] <= 227 * 1024
