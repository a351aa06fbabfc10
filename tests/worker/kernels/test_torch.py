"""The plain torch kernels against the formulas, and against transformers' modules, bit for bit."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from nanovllm.checkpoint.spec import Rope
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels, gated
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.layers.rotary import cos_sin_table

KERNELS = TorchKernels()
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 7, 6, 2, 16
BLOCK_SIZE, NUM_BLOCKS = 4, 9
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@dataclass
class Norms:
    q_weight: Tensor
    k_weight: Tensor
    eps: float


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def reference_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight.data = weight
    result: Tensor = norm(hidden)
    return result.detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    hidden, weight = random(NUM_TOKENS, 48, dtype=dtype) * 5, random(48, dtype=dtype)
    expected = reference_norm(hidden, weight, 1e-5)
    assert torch.equal(KERNELS.rms_norm(hidden.clone(), RMSNorm(weight, 1e-5)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_what_surrounds_them(dtype: torch.dtype) -> None:
    residual, factors = random(NUM_TOKENS, 48, dtype=dtype), random(48, dtype=dtype)
    norm = RMSNorm(factors, 1e-6)
    linear = Linear.empty(
        48, {"gate": 20, "up": 28}, bias=False, shard_axis=0, dtype=dtype, device=CPU
    )
    linear.weight.copy_(random(48, 48, dtype=dtype))
    before, normed = residual.clone(), reference_norm(residual, factors, 1e-6)
    product = normed @ linear.weight.T
    assert torch.equal(KERNELS.norm_linear(Residual(residual), norm, linear), product)
    down = Linear.empty(24, {"down": 48}, bias=False, shard_axis=1, dtype=dtype, device=CPU)
    down.weight.copy_(random(48, 24, dtype=dtype))
    inner = torch.nn.functional.silu(product[:, :24]) * product[:, 24:]
    expected = before + inner @ down.weight.T
    out = KERNELS.mlp(Residual(residual.clone()), norm, linear, down, next_norm=norm)
    assert torch.equal(out.hidden, expected)
    assert torch.equal(residual, before), "the residual goes on"
    out = KERNELS.linear_add(normed, linear, residual, next_norm=norm)
    assert torch.equal(out.hidden, before + product)


def test_an_fp8_cache_takes_what_is_too_large_as_its_largest() -> None:
    qkv = torch.tensor([[1.0, 2.0, 0.3, -1e4, 1e4, -0.3]]).bfloat16()
    cache = torch.zeros(2, 1, 2, 1, 2).to(torch.float8_e4m3fn)
    KERNELS.rope_and_cache(
        qkv,
        cos_sin=torch.tensor([[1.0, 0.0]]),
        positions=torch.tensor([0]),
        slot_mapping=torch.tensor([1]),
        layer_cache=cache,
        qk_norm=None,
    )
    assert cache.float().flatten().tolist() == [0, 0, 0.3125, -448, 0, 0, 448, -0.3125]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = random(NUM_TOKENS, 64, dtype=dtype)
    expected = torch.nn.functional.silu(gate_up[:, :32]) * gate_up[:, 32:]
    assert torch.equal(gated(gate_up.clone(), "silu"), expected)


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_cache(dtype: torch.dtype, with_norm: bool) -> None:
    qkv = random(NUM_TOKENS, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, dtype=dtype)
    positions = torch.tensor([0, 1, 2, 3, 90, 91, 0])
    slots = torch.tensor([8, 9, 10, 11, 30, 31, 0])
    table = cos_sin_table(Rope(10000.0), head_dim=HEAD_DIM, max_positions=100, device=CPU)
    cache = torch.full((2, 3, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), 7.0, dtype=dtype)
    weights = random(HEAD_DIM, dtype=dtype), random(HEAD_DIM, dtype=dtype) + 1
    norms = Norms(*weights, 1e-6) if with_norm else None

    sizes = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    query, key, value = qkv.clone().view(NUM_TOKENS, -1, HEAD_DIM).split(sizes, 1)
    if norms is not None:
        query = reference_norm(query, norms.q_weight, 1e-6)
        key = reference_norm(key, norms.k_weight, 1e-6)
    cos, sin = table[positions].chunk(2, -1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    query, key = apply_rotary_pos_emb(query.float(), key.float(), cos, sin)

    rotated = KERNELS.rope_and_cache(
        qkv.clone(),
        cos_sin=table,
        positions=positions,
        slot_mapping=slots,
        layer_cache=cache[:, 1],
        qk_norm=norms,
    )
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(rotated, query.to(dtype), **tolerance)
    written = cache[:, 1].flatten(1, 2)
    torch.testing.assert_close(written[0, slots], key.to(dtype), **tolerance)
    assert torch.equal(written[1, slots], value)
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[slots] = False
    assert (written[:, untouched] == 7).all() and (cache[:, [0, 2]] == 7).all()
