"""The elementwise maths of a decoder as fused Triton kernels (`base.Kernels`), for CUDA.

Layers call one `TritonKernels`, chosen at start. Every kernel computes in fp32 and rounds where
plain torch in the model's dtype would have to store, so both backends mean the same numbers.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.base import QKNorm
from nanovllm.worker.kernels.triton_launch import launch_options
from nanovllm.worker.kernels.triton_linear import beats_cublas, can_norm, skinny_linear
from nanovllm.worker.layers.linear import UNQUANTIZED, Linear

ROPE_HEADS = 8  # heads per program
SILU_BLOCK = 1024


@triton.jit
def _rms_norm_kernel(
    hidden,  # [num_tokens, size]
    weight,  # [size]
    out,  # like hidden
    eps,
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    places = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(hidden + places, inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    # Rounded before the weight, as Hugging Face's norms are.
    x = x.to(hidden.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + places, x.to(out.dtype.element_ty), inside)


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [num_tokens, 2 * size]
    out,  # [num_tokens, size]
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * size + columns, inside, other=0.0)
    gate = (gate / (1 + tl.exp(-gate))).to(up.dtype)  # rounded, as silu alone would be
    tl.store(out + token * size + columns, gate * up, inside)


@triton.jit
def _normed(first, second, weight, lanes, inside, eps, HALF: tl.constexpr):
    """RMS norm of heads given in halves, [heads, lanes] fp32 each."""
    square = tl.sum(first * first + second * second, 1) / (2 * HALF)
    scale = tl.rsqrt(square + eps)[:, None]
    dtype = weight.dtype.element_ty
    first_weight = tl.load(weight + lanes, inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HALF + lanes, inside, other=0.0).to(tl.float32)
    first = (first * scale).to(dtype).to(tl.float32) * first_weight[None, :]
    second = (second * scale).to(dtype).to(tl.float32) * second_weight[None, :]
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _rope_and_cache_kernel(
    qkv,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]; queries rotate in place
    cos_sin,  # [max_positions, 2 * HALF] fp32
    positions,  # [num_tokens] int64
    slot_mapping,  # [num_tokens] int64
    cache,  # keys [num_slots, NUM_KV_HEADS, 2 * HALF]; values lie value_offset elements behind
    value_offset: tl.int64,
    q_weight,
    k_weight,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes HEADS heads of one token: queries, then keys, then values, as qkv has them.

    Values pass through the arithmetic, unchanged, so that no program needs to know what it holds.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    is_query = (heads < NUM_HEADS)[:, None]
    rotates = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    real = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside[None, :]
    source = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF)
    source += heads[:, None] * (2 * HALF) + lanes[None, :]
    raw_first = tl.load(source, real, other=0.0)
    raw_second = tl.load(source + HALF, real, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        q_first, q_second = _normed(first, second, q_weight, lanes, inside, eps, HALF)
        k_first, k_second = _normed(first, second, k_weight, lanes, inside, eps, HALF)
        first = tl.where(is_query, q_first, k_first)
        second = tl.where(is_query, q_second, k_second)
    angles = cos_sin + tl.load(positions + token) * (2 * HALF) + lanes
    cos = tl.load(angles, inside, other=0.0)[None, :]
    sin = tl.load(angles + HALF, inside, other=0.0)[None, :]
    dtype = qkv.dtype.element_ty
    new_first = tl.where(rotates, (first * cos - second * sin).to(dtype), raw_first)
    new_second = tl.where(rotates, (second * cos + first * sin).to(dtype), raw_second)
    tl.store(source, new_first, real & is_query)
    tl.store(source + HALF, new_second, real & is_query)
    kv_heads = heads[:, None] - tl.where(rotates, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
    slot = tl.load(slot_mapping + token)  # negative: not to be cached
    kept = real & ~is_query & (slot >= 0)
    target = cache + slot * (NUM_KV_HEADS * 2 * HALF) + kv_heads * (2 * HALF) + lanes[None, :]
    target += tl.where(rotates, 0, value_offset)
    tl.store(target, new_first.to(cache.dtype.element_ty), kept)
    tl.store(target + HALF, new_second.to(cache.dtype.element_ty), kept)


def _is_skinny(x: Tensor, linear: Linear, *, gated: bool = False) -> bool:
    """Whether our own product can take this one over, and is faster."""
    ours = linear.method is UNQUANTIZED and x.dtype == linear.weight.dtype
    return ours and beats_cublas(len(x), linear.weight, gated=gated)


class TritonKernels:
    """Implements `Kernels`; stateless. Tensors' last dimensions must be contiguous.

    A few tokens go through our own products, which take norm, gate and residual along; more go
    through cuBLAS, which takes the residual along. Quantized layers multiply their own way.
    """

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Returns new memory."""
        num_tokens, size = hidden.shape
        assert hidden.is_contiguous()
        out = torch.empty_like(hidden)
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(num_tokens,)](
            hidden,
            weight,
            out,
            eps,
            size,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),  # 8 elements (16 bytes) a thread and load
            **launch_options(hidden.device),
        )
        return out

    def norm_linear(self, stream: Tensor, weight: Tensor, eps: float, linear: Linear) -> Tensor:
        if can_norm(len(stream), linear.weight) and _is_skinny(stream, linear):
            return skinny_linear(stream, linear.weight, linear.bias, norm=(weight, eps))
        normed = self.rms_norm(stream, weight, eps)
        if _is_skinny(normed, linear):
            return skinny_linear(normed, linear.weight, linear.bias)
        return linear(normed)

    def norm_gate_up(self, stream: Tensor, weight: Tensor, eps: float, linear: Linear) -> Tensor:
        if can_norm(len(stream), linear.weight) and _is_skinny(stream, linear, gated=True):
            return skinny_linear(stream, linear.weight, linear.bias, norm=(weight, eps), gated=True)
        normed = self.rms_norm(stream, weight, eps)
        if _is_skinny(normed, linear, gated=True):
            return skinny_linear(normed, linear.weight, linear.bias, gated=True)
        return self.silu_and_mul(linear(normed))

    def linear_add(self, hidden: Tensor, linear: Linear, stream: Tensor) -> Tensor:
        if _is_skinny(hidden, linear):
            return skinny_linear(hidden, linear.weight, linear.bias, residual=stream)
        if linear.method is UNQUANTIZED and linear.bias is None:
            return stream.addmm_(hidden, linear.weight.t())
        return stream.add_(linear(hidden))

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Returns new memory."""
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.is_contiguous()
        out = gate_up.new_empty(num_tokens, size)
        grid = (num_tokens, triton.cdiv(size, SILU_BLOCK))
        _silu_and_mul_kernel[grid](
            gate_up, out, size, BLOCK=SILU_BLOCK, num_warps=4, **launch_options(gate_up.device)
        )
        return out

    def rope_and_cache(
        self,
        qkv: Tensor,
        *,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        layer_cache: Tensor,
        qk_norm: QKNorm | None,
    ) -> Tensor:
        """Rotates the queries where they lie: what returns is a view of `qkv`."""
        num_kv_heads, head_dim = layer_cache.shape[-2:]
        num_tokens, num_all = qkv.shape[0], qkv.shape[1] // head_dim
        num_heads = num_all - 2 * num_kv_heads
        assert qkv.is_contiguous() and layer_cache[0].is_contiguous() and cos_sin.is_contiguous()
        heads = min(ROPE_HEADS, triton.next_power_of_2(num_all))
        _rope_and_cache_kernel[(num_tokens, triton.cdiv(num_all, heads))](
            qkv,
            cos_sin,
            positions,
            slot_mapping,
            layer_cache,
            layer_cache.stride(0),
            qkv if qk_norm is None else qk_norm.q_weight,
            qkv if qk_norm is None else qk_norm.k_weight,
            0.0 if qk_norm is None else qk_norm.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            HEADS=heads,
            NORM=qk_norm is not None,
            num_warps=2,
            **launch_options(qkv.device),
        )
        return qkv.view(num_tokens, num_all, head_dim)[:, :num_heads]
