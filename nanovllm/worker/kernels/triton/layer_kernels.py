"""The elementwise maths of a decoder as fused Triton kernels (`base.Kernels`), for CUDA.

Layers call one `TritonKernels`, chosen at start. Every kernel computes in fp32 and rounds where
plain torch in the model's dtype would have to store, so both backends mean the same numbers.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from functools import partial
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import QKNorm, Residual, Weighed, add_rows, copied
from nanovllm.worker.kernels.torch.experts import mix_experts
from nanovllm.worker.kernels.triton.e4m3 import narrowed
from nanovllm.worker.kernels.triton.experts import STACKED_KINDS, fused_experts
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.products import form_for, products_of, weight_of
from nanovllm.worker.kernels.triton.rows import act_and_mul, add_normed, rms_norm
from nanovllm.worker.kernels.triton.skinny_linear import can_weigh
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import TensorParallel

ROPE_HEADS = 8  # heads per program
WEIGHED_SUMS = 16  # tokens, whose products take the rest of a norm along; cuBLAS does not


@triton.jit
def normed(first, second, weight, lanes, inside, eps, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm of heads given in halves, [heads, lanes] fp32 each, that are stored as DTYPE."""
    square = tl.sum(first * first + second * second, 1) / (2 * HALF)
    scale = tl.rsqrt(square + eps)[:, None]
    first_weight = tl.load(weight + lanes, inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HALF + lanes, inside, other=0.0).to(tl.float32)
    first, second = first * scale, second * scale
    if weight.dtype.element_ty == DTYPE:  # rounded before the weight, as Llama's norms are
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    first, second = first * first_weight[None, :], second * second_weight[None, :]
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def _normed_by_kind(first, second, is_query, q_weight, k_weight, lanes, inside, eps,
                    NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
                    DTYPE: tl.constexpr):  # fmt: skip
    """Queries, if there are any, by one weight, all other heads by the other."""
    k_first, k_second = normed(first, second, k_weight, lanes, inside, eps, HALF, DTYPE)
    if NUM_HEADS > 0:
        q_first, q_second = normed(first, second, q_weight, lanes, inside, eps, HALF, DTYPE)
        k_first = tl.where(is_query, q_first, k_first)
        k_second = tl.where(is_query, q_second, k_second)
    return k_first, k_second


@triton.jit
def rotated(first, second, cos, sin):
    """Heads given in halves, [heads, lanes] fp32 each, turned by the angles of their tokens."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_and_cache_kernel(
    qkv,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF]; rotated in place
    token_stride,
    cos_sin,  # [max_positions, 2 * HALF] fp32
    positions,  # [num_tokens] int64
    slot_mapping,  # [num_tokens] int64
    cache,  # keys [num_slots, NUM_KV_HEADS, 2 * HALF]; values lie value_offset elements behind
    value_offset: tl.int64,
    q_weight, k_weight, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token: queries, then keys, then values, as qkv has them.

    Values pass through the arithmetic, unchanged, so that no program needs to know what it holds.
    Keys and values are left in qkv as a reader of the cache would find them; of tokens that are not
    cached as zeros, as tiles of a row's keys reach beyond its end, and 0 * NaN is NaN.
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
    kv_heads = heads[:, None] - tl.where(rotates, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
    real = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside[None, :]
    source = qkv + token * token_stride + heads[:, None] * (2 * HALF) + lanes[None, :]
    raw_first = tl.load(source, real, other=0.0)
    raw_second = tl.load(source + HALF, real, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        first, second = _normed_by_kind(first, second, is_query, q_weight, k_weight, lanes, inside,
                                        eps, NUM_HEADS, HALF, qkv.dtype.element_ty)  # fmt: skip
    dtype = qkv.dtype.element_ty
    angles = cos_sin + tl.load(positions + token) * (2 * HALF) + lanes
    cos = tl.load(angles, inside, other=0.0)[None, :]
    sin = tl.load(angles + HALF, inside, other=0.0)[None, :]
    first, second = rotated(first, second, cos, sin)
    new_first = tl.where(rotates, first.to(dtype), raw_first)
    new_second = tl.where(rotates, second.to(dtype), raw_second)
    cached = cache.dtype.element_ty
    if cached != dtype:  # values change, too
        rotates = heads[:, None] >= 0
        new_first = tl.where(is_query, new_first, narrowed(new_first, cached).to(dtype))
        new_second = tl.where(is_query, new_second, narrowed(new_second, cached).to(dtype))
    slot = tl.load(slot_mapping + token)  # negative: not to be cached
    lost = ~is_query & (slot < 0)
    tl.store(source, tl.where(lost, 0.0, new_first).to(dtype), real & (rotates | lost))
    tl.store(source + HALF, tl.where(lost, 0.0, new_second).to(dtype), real & (rotates | lost))
    kept = real & ~is_query & ~lost
    target = cache + (slot * NUM_KV_HEADS + kv_heads) * (2 * HALF) + lanes[None, :]
    target += tl.where(heads[:, None] < NUM_HEADS + NUM_KV_HEADS, 0, value_offset)
    # Narrowed once more: of e4m3 numbers that are stored and widened as well, ptxas 12.8 widens
    # every second pair from a register that holds something else.
    tl.store(target, narrowed(new_first, cached), kept)
    tl.store(target + HALF, narrowed(new_second, cached), kept)


class TritonKernels:
    """Implements `Kernels`; stateless. Tensors' last dimensions must be contiguous.

    Who multiplies depends on the form of a layer's weights (`products`). What is fused with a
    product is so where nothing has to come between: a sum over ranks, or a norm.
    """

    stacked_kinds: ClassVar[frozenset[str]] = STACKED_KINDS

    def rms_norm(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        return rms_norm(hidden, norm)

    def lookup(self, places: Tensor, table: Linear) -> Tensor:
        return products_of(table).lookup(places, table)

    def norm_linear(self, residual: Residual, norm: RMSNorm | None, linear: Linear) -> Tensor:
        residual, norm = _left_to_norm(residual, norm)
        linear = form_for(len(residual.hidden), linear)
        return products_of(linear).norm_linear(residual, norm, linear)

    def linear_add(
        self,
        hidden: Tensor,
        linear: Linear,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        linear = form_for(len(hidden), linear)
        products = products_of(linear)
        norms = {"post_norm": post_norm, "next_norm": next_norm}
        if len(residual) < len(hidden):
            write = partial(products.multiply_into, linear)
            return add_rows(hidden, write, residual, linear.parallel, next_norm)
        if linear.is_partial:
            product = products.multiply(hidden, linear)
            return self.reduce_add(product, residual, linear.parallel, **norms)
        if post_norm is not None:
            return self.add(products.multiply(hidden, linear), residual, **norms)
        return products.linear_add(hidden, linear, residual, next_norm)

    def mlp(
        self,
        residual: Residual,
        norm: RMSNorm | None,
        gate_up: Linear,
        down: Linear,
        *,
        activation: Activation = "silu",
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        hidden = residual.hidden
        residual, norm = _left_to_norm(residual, norm)
        num_tokens = len(residual.hidden)
        gate_up, down = form_for(num_tokens, gate_up), form_for(num_tokens, down)
        products = products_of(gate_up)
        is_plain = not down.is_partial and post_norm is None
        if is_plain and (
            whole := products.mlp(residual, norm, gate_up, activation, down, hidden, next_norm)
        ):
            return whole
        inner = products.gated(residual, norm, gate_up, activation)
        if inner is None:
            product = products.norm_linear(residual, norm, gate_up)
            if is_plain:
                return products_of(down).gated_linear_add(
                    product, activation, down, hidden, next_norm
                )
            inner = self.activate(product, activation)
        return self.linear_add(inner, down, hidden, post_norm=post_norm, next_norm=next_norm)

    def activate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        return act_and_mul(gate_up, activation)

    def add(
        self,
        product: Tensor,
        residual: Tensor,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        if post_norm is None:
            return Residual(residual.add_(product))
        return Residual(residual, normed=add_normed(product, residual, post_norm, next_norm))

    def reduce_add(
        self,
        partial: Tensor,
        residual: Tensor,
        parallel: TensorParallel,
        *,
        post_norm: RMSNorm | None = None,
        next_norm: RMSNorm | None = None,
    ) -> Residual:
        if len(residual) < len(partial):
            return add_rows(partial, copied, residual, parallel, next_norm)
        if post_norm is None and parallel.exchange is not None:
            if next_norm is not None and len(partial) > WEIGHED_SUMS:
                normed = parallel.exchange.reduce_normed(partial, residual, next_norm)
                if normed is not None:
                    return Residual(residual, normed=normed)
            weight = weight_of(next_norm) if can_weigh(partial) else None
            found = parallel.exchange.reduce_add(partial, residual, weight)
            if found is not None:
                hidden, weighed = found
                return Residual(hidden, None if weighed is None else Weighed(*weighed))
        product = parallel.reduce(partial)
        return self.add(product, residual, post_norm=post_norm, next_norm=next_norm)

    def experts(
        self, hidden: Tensor, logits: Tensor, experts: Experts, *, residual: Tensor | None = None
    ) -> Tensor:
        if experts.stacked is not None:
            return fused_experts(hidden, logits, experts, residual=residual)
        mixed = mix_experts(self, hidden, logits, experts)
        return mixed if residual is None else mixed.add_(residual)

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
        """Rotates where they lie: what returns is a view of `qkv`."""
        num_kv_heads, head_dim = layer_cache.shape[-2:]
        num_tokens, num_all = qkv.shape[0], qkv.shape[1] // head_dim
        num_heads = num_all - 2 * num_kv_heads
        assert qkv.stride(1) == 1 and layer_cache[0].is_contiguous() and cos_sin.is_contiguous()
        heads = min(ROPE_HEADS, triton.next_power_of_2(num_all))
        _rope_and_cache_kernel[(num_tokens, triton.cdiv(num_all, heads))](
            qkv,
            qkv.stride(0),
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


def _left_to_norm(residual: Residual, norm: RMSNorm | None) -> tuple[Residual, RMSNorm | None]:
    """What a product takes, and the norm of it that nobody has seen to yet."""
    return (residual, norm) if residual.normed is None else (Residual(residual.normed), None)
