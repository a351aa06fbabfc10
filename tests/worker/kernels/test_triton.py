"""The fused elementwise kernels against their definitions in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Kernels, Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.rows import act_and_mul, act_and_mul_fp8, quantize
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import TensorParallel
from nanovllm.worker.quant.fp8 import E4M3, FP8, quantize_rows
from nanovllm.worker.quant.scaled_rows import QuantizedRows
from tests.worker.kernels.gating import ACTIVATIONS
from tests.worker.kernels.triton_device import DEVICE

KERNELS = TritonKernels()
EPS = 1e-5


@dataclass(frozen=True)
class Norms:
    q_weight: Tensor
    k_weight: Tensor
    eps: float


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x: [num_tokens, num_heads, head_dim]; cos_sin: [num_tokens, head_dim]."""
    cos, sin = (half[:, None].double() for half in cos_sin.chunk(2, dim=-1))
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def close(out: Tensor, expected: Tensor) -> None:
    assert (out.double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("size", [64, 576])
def test_rms_norm(size: int) -> None:
    hidden, weight = torch.randn(3, size, device=DEVICE), torch.randn(size, device=DEVICE)
    close(KERNELS.rms_norm(hidden, RMSNorm(weight, EPS)), normed(hidden, weight, EPS))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_products_with_what_surrounds_them(num_tokens: int, bias: bool) -> None:
    residual, weight = torch.randn(num_tokens, 64, device=DEVICE), torch.randn(64, device=DEVICE)
    norm = RMSNorm(weight, EPS)
    linear = Linear.empty(
        64, {"o": 64}, bias=bias, shard_axis=0, dtype=residual.dtype, device=residual.device
    )
    linear.weight.normal_()
    if linear.bias is not None:
        linear.bias.normal_()

    def exact(x: Tensor) -> Tensor:
        wide = x.double() @ linear.weight.double().T
        return wide if linear.bias is None else wide + linear.bias.double()

    product = exact(normed(residual, weight, EPS))
    gate, up = product.chunk(2, dim=-1)
    down = Linear.empty(
        32, {"down": 64}, bias=False, shard_axis=1, dtype=residual.dtype, device=residual.device
    )
    down.weight.normal_()
    close(KERNELS.norm_linear(Residual(residual), norm, linear), product)
    inner = gate * gate.sigmoid() * up
    total = residual.double() + inner @ down.weight.double().T
    found = KERNELS.mlp(Residual(residual.clone()), norm, linear, down, next_norm=norm)
    close(found.hidden, total)
    close(KERNELS.norm_linear(found, norm, linear), exact(normed(total, weight, EPS)))
    total = residual.double() + exact(residual)
    found = KERNELS.linear_add(residual.clone(), linear, residual, next_norm=norm)
    close(found.hidden, total)
    close(KERNELS.norm_linear(found, norm, linear), exact(normed(total, weight, EPS)))


@dataclass(frozen=True)
class Twins(TensorParallel):
    """Two ranks that compute the same."""

    def reduce(self, partial: Tensor) -> Tensor:
        return partial * 2


@pytest.mark.parametrize("kernels", [KERNELS, TorchKernels()], ids=["triton", "torch"])
@pytest.mark.parametrize("behind", [False, True], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_comes_between_a_product_and_the_residual(
    kernels: Kernels, behind: bool, num_ranks: int, activation: Activation
) -> None:
    """The sum over ranks first, then a norm; with several tokens and with one."""
    for num_tokens in (1, 3):
        residual, factors = (
            torch.randn(num_tokens, 64, device=DEVICE),
            torch.randn(64, device=DEVICE),
        )
        norm = RMSNorm(factors, EPS)
        gate_up, down = (
            Linear(torch.randn(n, k, device=DEVICE) * k**-0.5, None, {}, axis)  # type: ignore[arg-type]
            for n, k, axis in ((96, 64, 0), (64, 48, 1))
        )
        down.parallel = Twins(0, num_ranks)
        gate, up = (residual.double() @ gate_up.weight.double().T).chunk(2, dim=-1)
        inner = ACTIVATIONS[activation](gate) * up
        product = inner @ down.weight.double().T * num_ranks
        added = normed(product, factors, EPS) if behind else product
        post_norm = norm if behind else None
        found = kernels.mlp(
            Residual(residual.clone()),
            None,
            gate_up,
            down,
            activation=activation,
            post_norm=post_norm,
            next_norm=norm,
        )
        total = residual.double() + added
        after = normed(total, factors, EPS) @ gate_up.weight.double().T
        close(found.hidden, total)
        close(kernels.norm_linear(found, norm, gate_up), after)
        found = kernels.linear_add(
            inner.float(), down, residual.clone(), post_norm=post_norm, next_norm=norm
        )
        close(found.hidden, total)
        close(kernels.norm_linear(found, norm, gate_up), after)
        assert found.weighed is None or (num_ranks == 1 and not behind)
        assert (found.normed is not None) == (behind and kernels is KERNELS)


@pytest.mark.parametrize("size", [64, 600])
@pytest.mark.parametrize("centers", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("rounds_last", [False, True])
@pytest.mark.parametrize("has_next", [False, True])
def test_norms_between_a_product_and_the_next(
    size: int, centers: bool, rounds_last: bool, has_next: bool
) -> None:
    """In half precision, rounded where plain torch rounds."""
    product, residual = torch.randn(2, 3, size, device=DEVICE).half()
    weights = torch.rand(2, size, device=DEVICE) + 0.5
    weights = weights if rounds_last else weights.half()
    post, after = (RMSNorm(weight, EPS, centers) for weight in weights)
    exact = TorchKernels()
    expected = exact.add(product.clone(), residual.clone(), post_norm=post).hidden
    found = KERNELS.add(product, residual, post_norm=post, next_norm=after if has_next else None)
    assert found.hidden is residual
    assert (found.hidden != expected).double().mean() < 0.01  # on the border between two
    torch.testing.assert_close(found.hidden, expected, rtol=2e-3, atol=2e-3)
    if has_next:
        assert found.normed is not None
        expected = exact.rms_norm(found.hidden, after)
        assert (found.normed != expected).double().mean() < 0.01
        torch.testing.assert_close(found.normed, expected, rtol=2e-3, atol=2e-3)
    else:
        assert found.normed is None


@pytest.mark.parametrize("kernels", [KERNELS, TorchKernels()], ids=["triton", "torch"])
def test_a_weight_in_fp32_is_multiplied_before_rounding(kernels: Kernels) -> None:
    hidden = torch.randn(3, 64, device=DEVICE).half()
    weight = 1 + torch.randn(64, device=DEVICE) * 0.01
    expected = normed(hidden, weight, EPS).half()
    found = kernels.rms_norm(hidden, RMSNorm(weight, EPS))
    assert (found != expected).double().mean() < 0.01  # on the border between two
    rounded = kernels.rms_norm(hidden, RMSNorm(weight.half(), EPS))
    assert (rounded != expected).double().mean() > 0.1


@pytest.mark.parametrize("size", [96, 1536])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_mul(size: int, activation: Activation) -> None:
    """Of large gates, too."""
    gate_up = torch.randn(3, 2 * size, device=DEVICE)
    gate_up[0, :size] *= 20
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(act_and_mul(gate_up, activation), ACTIVATIONS[activation](gate) * up)


def assert_same_rows(rows: QuantizedRows, expected: QuantizedRows) -> None:
    """But for a few numbers on the border between two."""
    assert rows.values.dtype == E4M3
    torch.testing.assert_close(rows.scale, expected.scale, rtol=1e-5, atol=0)
    found, wanted = (part.values.double() * part.scale.double() for part in (rows, expected))
    differs = (found - wanted).abs() > 1e-5 * wanted.abs()
    assert differs.double().mean() < 2e-3
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize("size", [64, 1536])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantized_rows(size: int, activation: Activation) -> None:
    hidden, weight = torch.randn(3, size, device=DEVICE), torch.randn(size, device=DEVICE)
    hidden[1] *= 1000
    hidden[2] = 0
    assert_same_rows(quantize(hidden), quantize_rows(hidden))
    expected = quantize_rows(normed(hidden, weight, EPS).float())
    assert_same_rows(quantize(hidden, RMSNorm(weight, EPS)), expected)
    gate_up = torch.randn(3, 2 * size, device=DEVICE)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = quantize_rows(ACTIVATIONS[activation](gate) * up)
    assert_same_rows(act_and_mul_fp8(gate_up, activation), expected)


def fp8_linear(num_outputs: int, num_inputs: int) -> Linear:
    rows = quantize_rows(torch.randn(num_outputs, num_inputs, device=DEVICE))
    bias = torch.randn(num_outputs, device=DEVICE)
    return Linear(rows.values, bias, {}, 0, FP8, rows.scale[:, 0])


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_fp8_products_with_what_surrounds_them(num_tokens: int) -> None:
    """A single token is not quantized."""
    residual, weight = torch.randn(num_tokens, 64, device=DEVICE), torch.randn(64, device=DEVICE)
    norm = RMSNorm(weight, EPS)
    gate_up, down = fp8_linear(96, 64), fp8_linear(64, 48)

    def product(x: Tensor, linear: Linear) -> Tensor:
        assert linear.scale is not None and linear.bias is not None
        if num_tokens > 1:
            rows = quantize_rows(x.float())
            x = rows.values.double() * rows.scale.double()
        wide = linear.weight.double() * linear.scale.double()[:, None]
        return x.double() @ wide.T + linear.bias.double()

    def near(out: Tensor, expected: Tensor) -> None:
        tolerance = 1e-6 if num_tokens == 1 else 5e-3
        assert (out.double() - expected).norm() <= tolerance * expected.norm()

    wide = product(normed(residual, weight, EPS), gate_up)
    near(KERNELS.norm_linear(Residual(residual), norm, gate_up), wide)
    hidden = residual[:, :48].contiguous()
    near(KERNELS.linear_add(hidden, down, residual.clone(), next_norm=norm).hidden,
         residual.double() + product(hidden, down))  # fmt: skip
    gate, up = wide.chunk(2, dim=-1)
    total = residual.double() + product(gate * gate.sigmoid() * up, down)
    found = KERNELS.mlp(Residual(residual.clone()), norm, gate_up, down, next_norm=norm)
    near(found.hidden, total)
    near(KERNELS.norm_linear(found, norm, gate_up),
         product(normed(found.hidden, weight, EPS), gate_up))  # fmt: skip


def test_keys_and_values_of_an_fp8_cache_stay_in_its_range() -> None:
    num_heads, num_kv_heads, head_dim, slots = 2, 1, 64, torch.tensor([3, 0], device=DEVICE)
    qkv = torch.randn(2, (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE) * 300
    values = qkv[:, -head_dim:].clone()
    assert values.abs().max() > 448
    cache = torch.zeros(2, 2, 4, num_kv_heads, head_dim, device=DEVICE).to(E4M3)
    cos_sin = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), 1).to(DEVICE)
    keys = qkv.view(2, 4, head_dim)[:, num_heads].clone()
    queries = KERNELS.rope_and_cache(
        qkv.clone(),
        cos_sin=cos_sin,
        positions=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        slot_mapping=slots,
        layer_cache=cache,
        qk_norm=None,
    )
    close(queries.flatten(1), qkv[:, : num_heads * head_dim].double())
    for half, expected in zip(cache, (keys, values), strict=True):
        stored = half.float().flatten(0, 1)[slots, 0]
        clamped = expected.clamp(-448, 448)
        assert torch.equal(stored, clamped.to(E4M3).float())
    assert cache.float().count_nonzero() <= 4 * head_dim


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("with_queries", [True, False])
def test_rope_and_cache(head_dim: int, norm: bool, with_queries: bool) -> None:
    num_tokens, num_heads, num_kv_heads, block_size = 3, 6, 3, 4
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    qkv = torch.randn(num_tokens, sum(sizes), device=DEVICE)
    q, k, v = (t.unflatten(1, (-1, head_dim)).double() for t in qkv.split(sizes, dim=1))
    norms = Norms(*torch.randn(2, head_dim, device=DEVICE), EPS) if norm else None
    if norms is not None:
        q, k = normed(q, norms.q_weight, EPS), normed(k, norms.k_weight, EPS)
    angles = torch.randn(20, head_dim // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions, slots = torch.tensor([[17, 0, 5], [23, 4, 9]], device=DEVICE)
    cache = torch.full((2, 2, 6, block_size, num_kv_heads, head_dim), torch.nan, device=DEVICE)
    layer_cache = cache[:, 1]
    before = qkv.clone()
    queries = KERNELS.rope_and_cache(
        qkv if with_queries else qkv[:, sizes[0] :],
        cos_sin=cos_sin,
        positions=positions,
        slot_mapping=slots,
        layer_cache=layer_cache,
        qk_norm=norms,
    )
    if with_queries:
        close(queries, rotated(q, cos_sin[positions]))
    else:
        assert queries.numel() == 0
        assert torch.equal(qkv[:, : sizes[0]], before[:, : sizes[0]])
    close(layer_cache[0].flatten(0, 1)[slots], rotated(k, cos_sin[positions]))
    assert torch.equal(layer_cache[1].flatten(0, 1)[slots].double(), v)
    assert cache.isfinite().sum() == 2 * v.numel()  # nothing else was written
