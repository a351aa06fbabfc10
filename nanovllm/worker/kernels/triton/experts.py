"""Mixtures of experts in Triton: both products of all experts that are hit, and what lies between.

`TritonKernels.experts` calls `fused_experts` for weights in `STACKED_KINDS`. One token reads the
rows of its experts as vectors; more are sorted by expert (`expert_routing`) and multiplied block by
block. No host waits, so CUDA graphs capture it. `torch.experts` is the oracle.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.triton.e4m3 import widened
from nanovllm.worker.kernels.triton.expert_routing import Routed, Sorted, route, sort_by_expert
from nanovllm.worker.kernels.triton.expert_tuning import ExpertTile, tiles_for
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.skinny_linear import silu
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts

STACKED_KINDS = frozenset({"plain", "fp8"})
COMBINE_BLOCK = 1024
VECTOR_VALUES = 16384  # weights that a program of one token reads at a time


@triton.jit
def _activated(gate, up, dtype, ACTIVATION: tl.constexpr):
    """activation(gate) * up, rounded as the two halves alone would be."""
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    if ACTIVATION == "silu":
        gate = silu(gate)
    else:
        cubic = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1 + tl.exp(-2 * cubic))  # 1 + tanh(x) is 2 * sigmoid(2 x)
    return gate.to(dtype).to(tl.float32) * up


@triton.jit
def _rows_times_token(weight, scale, rows, real, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a weight times one token, [rows] fp32. x: where its [K] numbers lie."""
    columns = tl.arange(0, BLOCK_K)
    lines = weight + rows.to(tl.int64)[:, None] * K
    acc = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + columns
        w = tl.load(lines + k[None, :], real[:, None] & (k < K)[None, :], other=0.0)
        inputs = tl.load(x + k, k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * inputs[None, :]
    product = tl.sum(acc, 1)
    if scale is not None:
        product *= tl.load(scale + rows, real, other=0.0)
    return product


@triton.jit
def _vector_gate_up_kernel(
    x,  # [K]
    weight,  # [num_experts * 2 * N, K]: of each expert the gates, then the ups
    scale,  # fp32, of each row of weight, or None
    experts,  # [top_k] int32
    out,  # [top_k, N]
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_N outputs of one of its experts."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(1)
    first = tl.load(experts + place).to(tl.int64) * (2 * N)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = outputs < N
    gate = _rows_times_token(weight, scale, first + outputs, real, x, K, BLOCK_K)
    up = _rows_times_token(weight, scale, first + N + outputs, real, x, K, BLOCK_K)
    inner = _activated(gate, up, out.dtype.element_ty, ACTIVATION)
    tl.store(out + place * N + outputs, inner.to(out.dtype.element_ty), real)


@triton.jit
def _vector_down_kernel(
    inner,  # [TOP_K, K]
    weight,  # [num_experts * N, K]
    scale,  # fp32, of each row of weight, or None
    weights,  # [TOP_K] fp32, of the experts
    experts,  # [TOP_K] int32
    residual,  # [N], or None
    out,  # [N]
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_N outputs of all of its experts, weighed and added up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = outputs < N
    total = tl.zeros([BLOCK_N], tl.float32)
    if residual is not None:
        total += tl.load(residual + outputs, real, other=0.0).to(tl.float32)
    for place in tl.static_range(TOP_K):
        rows = tl.load(experts + place).to(tl.int64) * N + outputs
        product = _rows_times_token(weight, scale, rows, real, inner + place * K, K, BLOCK_K)
        total += tl.load(weights + place) * product
    tl.store(out + outputs, total.to(out.dtype.element_ty), real)


@triton.jit
def _grouped_kernel(
    x,  # [num_pairs / DIVIDES, K]
    weight,  # [num_experts * N, K]; if GATED [num_experts * 2 * N, K]
    scale,  # fp32, of each row of weight, or None
    out,  # [num_pairs, N]
    pairs, block_experts, block_sizes, num_blocks,  # of `Sorted`
    N: tl.constexpr, K: tl.constexpr, DIVIDES: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of pairs of one expert times BLOCK_N of its outputs, each a gate and an up if GATED.

    DIVIDES: a pair's input is row pair // DIVIDES of x. Gates and ups take turns in the
    accumulator, so that both of an output are in the same thread.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block, tile = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    if block < tl.load(num_blocks):
        HALVES: tl.constexpr = 2 if GATED else 1  # noqa: N806
        expert = tl.load(block_experts + block).to(tl.int64)
        lanes = tl.arange(0, BLOCK_M)
        present = lanes < tl.load(block_sizes + block)
        pair = tl.load(pairs + block * BLOCK_M + lanes, present, other=0)
        lines = x + (pair // DIVIDES).to(tl.int64)[:, None] * K
        turns = tl.arange(0, HALVES * BLOCK_N)
        output = tile * BLOCK_N + turns // HALVES
        # Beyond the end any row will do: what becomes of it is not stored.
        row = expert * (HALVES * N) + tl.where(output < N, output + (turns % HALVES) * N, 0)
        rows = weight + row[None, :] * K
        columns = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, HALVES * BLOCK_N], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = start + columns
            if K % BLOCK_K == 0:
                tokens, w = tl.load(lines + k[None, :]), tl.load(rows + k[:, None])
            else:
                tokens = tl.load(lines + k[None, :], (k < K)[None, :], other=0.0)
                w = tl.load(rows + k[:, None], (k < K)[:, None], other=0.0)
            acc = tl.dot(tokens, widened(w, tokens.dtype), acc, input_precision="ieee")
        if scale is not None:
            acc *= tl.load(scale + row)[None, :]
        dtype = out.dtype.element_ty
        outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if GATED:
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
            acc = _activated(gate, up, dtype, ACTIVATION)
        places = pair.to(tl.int64)[:, None] * N + outputs[None, :]
        tl.store(out + places, acc.to(dtype), present[:, None] & (outputs < N)[None, :])


@triton.jit
def _combine_kernel(
    parts,  # [num_tokens, TOP_K, N]
    weights,  # [num_tokens, TOP_K] fp32
    residual,  # [num_tokens, N], or None
    out,  # [num_tokens, N]
    num_blocks,  # of `Sorted`, which nobody reads any more
    N: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What a token's experts made of it, weighed and added up in the order they were chosen in."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < N
    total = tl.zeros([BLOCK], tl.float32)
    if residual is not None:
        total += tl.load(residual + token * N + columns, real, other=0.0).to(tl.float32)
    for place in tl.static_range(TOP_K):
        pair = token * TOP_K + place
        part = tl.load(parts + pair * N + columns, real, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * part
    tl.store(out + token * N + columns, total.to(out.dtype.element_ty), real)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(num_blocks, 0)


def fused_experts(
    hidden: Tensor,
    logits: Tensor,
    experts: Experts,
    *,
    residual: Tensor | None = None,
    tiles: tuple[ExpertTile, ExpertTile] | None = None,
) -> Tensor:
    """As `Kernels.experts`, of stacked weights. Returns new memory, [num_tokens, hidden_size]."""
    assert experts.stacked is not None and hidden.is_contiguous()
    assert residual is None or residual.is_contiguous()
    spec = experts.spec
    gate_up, down = experts.stacked
    routed = route(logits, spec, experts.correction)
    if len(hidden) == 1:
        return _of_one_token(hidden, routed, gate_up, down, spec.activation, residual)
    num_inner = down.weight.shape[1]
    first, second = tiles or tiles_for(routed.experts.numel() / spec.num_experts)
    blocks = sort_by_expert(routed, spec.num_experts, first.block_m)
    inner = hidden.new_empty(routed.experts.numel(), num_inner)
    _multiply(hidden, gate_up, blocks, inner, spec.top_k, first, activation=spec.activation)
    parts = hidden.new_empty(len(inner), hidden.shape[1])
    _multiply(inner, down, blocks, parts, 1, second, activation=None)
    return _combine(parts, routed, blocks, residual)


def _of_one_token(
    hidden: Tensor,
    routed: Routed,
    gate_up: Linear,
    down: Linear,
    activation: Activation,
    residual: Tensor | None,
) -> Tensor:
    top_k, size, num_inner = routed.experts.numel(), hidden.shape[1], down.weight.shape[1]
    options = launch_options(hidden.device)
    inner = hidden.new_empty(top_k, num_inner)
    block_k, block_n = _vector_blocks(size)
    block_n = max(1, block_n // 2)
    _vector_gate_up_kernel[(triton.cdiv(num_inner, block_n), top_k)](
        hidden, gate_up.weight, gate_up.scale, routed.experts, inner,
        N=num_inner, K=size, BLOCK_N=block_n, BLOCK_K=block_k, ACTIVATION=activation,
        num_warps=8, **options,
    )  # fmt: skip
    out = torch.empty_like(hidden)
    block_k, block_n = _vector_blocks(num_inner)
    block_n = max(1, block_n // 4)  # all experts are in one program
    _vector_down_kernel[(triton.cdiv(size, block_n),)](
        inner, down.weight, down.scale, *routed, residual, out,
        N=size, K=num_inner, TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8, **options,
    )  # fmt: skip
    return out


def _vector_blocks(num_inputs: int) -> tuple[int, int]:
    """Inputs and rows that a program of one token takes at a time."""
    block_k = min(2048, triton.next_power_of_2(num_inputs))
    return block_k, min(16, VECTOR_VALUES // block_k)


def _multiply(
    x: Tensor,
    linear: Linear,
    blocks: Sorted,
    out: Tensor,
    divides: int,
    tile: ExpertTile,
    *,
    activation: Activation | None,
) -> None:
    """Every pair's input times the weights of its expert, gated if there is an activation."""
    num_outputs = out.shape[1]
    _grouped_kernel[(blocks.most_blocks * triton.cdiv(num_outputs, tile.block_n),)](
        x, linear.weight, linear.scale, out, *blocks[:4],
        N=num_outputs, K=x.shape[1], DIVIDES=divides,
        GATED=activation is not None, ACTIVATION=activation, BLOCK_M=blocks.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, num_warps=tile.warps,
        **launch_options(x.device),
    )  # fmt: skip


def _combine(parts: Tensor, routed: Routed, blocks: Sorted, residual: Tensor | None) -> Tensor:
    num_tokens, top_k = routed.experts.shape
    size = parts.shape[1]
    out = parts.new_empty(num_tokens, size)
    block = min(COMBINE_BLOCK, triton.next_power_of_2(size))
    _combine_kernel[(num_tokens, triton.cdiv(size, block))](
        parts, routed.weights, residual, out, blocks.num_blocks,
        N=size, TOP_K=top_k, BLOCK=block, num_warps=4, **launch_options(parts.device),
    )  # fmt: skip
    return out
