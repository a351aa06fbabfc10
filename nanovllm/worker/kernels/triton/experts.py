"""Mixtures of experts in Triton: both products of all experts that are hit, and what lies between.

`TritonKernels.experts` calls `fused_experts` for weights in `STACKED_KINDS`. One token reads the
rows of its experts as vectors; more are sorted by expert (`expert_routing`) and multiplied block by
block. No host waits, so CUDA graphs capture it. `torch.experts` is the oracle.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.activations import activated
from nanovllm.worker.kernels.triton.e4m3 import widened
from nanovllm.worker.kernels.triton.expert_routing import Routed, Sorted, route, sort_by_expert
from nanovllm.worker.kernels.triton.expert_tuning import ExpertTile, tiles_for
from nanovllm.worker.kernels.triton.launch import INTERPRETED as _INTERPRETED
from nanovllm.worker.kernels.triton.launch import has_tensor_memory_accelerator, launch_options
from nanovllm.worker.kernels.triton.packed_linear import halves_joined
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.moe import Experts

STACKED_KINDS = frozenset({"plain", "fp8", "mxfp4"})
COMBINE_BLOCK = 1024
VECTOR_VALUES = 16384  # weights that a program of one token reads at a time
INTERPRETED = tl.constexpr(_INTERPRETED)
# MXFP4's numbers that become floats by their bits are too small by 2 ** 126. Scales make up for all
# of it but 2 ** DOWN, so that those far above 1 do not overflow; UP is for sums.
DOWN = tl.constexpr(32)
UP = tl.constexpr(2.0**32)


class _Gating(NamedTuple):
    """Of the first product, as kernels take it."""

    activation: str
    turns: bool  # gates and ups take turns in the rows of a weight, else all gates come first
    alpha: float = 0.0
    limit: float = 0.0


@triton.jit
def _activated(gate, up, dtype, GATING: tl.constexpr):
    """What gates and ups become, fp32, rounded as the two halves alone would be."""
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    if GATING.activation == "clamped":
        gate = tl.minimum(gate, GATING.limit)
        gate = gate / (1 + tl.exp(-GATING.alpha * gate))
        up = tl.minimum(tl.maximum(up, -GATING.limit), GATING.limit) + 1
    else:
        ACTIVATION: tl.constexpr = GATING.activation  # noqa: N806
        gate = activated(gate, ACTIVATION)
    return gate.to(dtype).to(tl.float32) * up


@triton.jit
def _e2m1(codes):
    """The numbers that 4 bits stand for, times 2 ** -14, in float16: there e2m1's exponent and
    mantissa stand as they are, subnormal numbers included."""
    codes = codes.to(tl.int16)
    return (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def _e8m0(exponents, SHIFT: tl.constexpr):
    """The powers of two that bytes stand for, times 2 ** SHIFT, fp32; below 2 ** 128."""
    return (tl.minimum(exponents.to(tl.int32) + SHIFT, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _wide_e2m1(packed, FAST: tl.constexpr):
    """The numbers in the lower and in the upper halves of bytes, fp32: times 2 ** -126 if FAST,
    where exponent and mantissa stand in those of fp32 as they are, else times 2 ** -14."""
    if FAST:
        low, high = tl.inline_asm_elementwise(
            "shl.b32 $0, $8, 28; shl.b32 $1, $8, 20; shl.b32 $2, $8, 12; shl.b32 $3, $8, 4; "
            "shl.b32 $4, $8, 24; shl.b32 $5, $8, 16; shl.b32 $6, $8, 8; "
            "shr.s32 $0, $0, 6; shr.s32 $1, $1, 6; shr.s32 $2, $2, 6; shr.s32 $3, $3, 6; "
            "shr.s32 $4, $4, 6; shr.s32 $5, $5, 6; shr.s32 $6, $6, 6; shr.s32 $7, $8, 6; "
            "and.b32 $0, $0, 0x81c00000; and.b32 $1, $1, 0x81c00000; "
            "and.b32 $2, $2, 0x81c00000; and.b32 $3, $3, 0x81c00000; "
            "and.b32 $4, $4, 0x81c00000; and.b32 $5, $5, 0x81c00000; "
            "and.b32 $6, $6, 0x81c00000; and.b32 $7, $7, 0x81c00000;",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = _e2m1(packed & 15).to(tl.float32), _e2m1(packed >> 4).to(tl.float32)
    return low, high


@triton.jit
def _scaled_e2m1(packed, scales, PACK: tl.constexpr):
    """The numbers in the lower and in the upper halves of bytes, times 2 ** -126 and scales: all
    bfloat16, in whose exponent and mantissa those of e2m1 stand as they are.

    PACK: neighbours that are in one register, 2 or 4, for Hopper's products or for older ones.
    """
    if PACK == 4:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, e, f, g; "
            "prmt.b32 a, $4, 0, 0x1404; prmt.b32 b, $4, 0, 0x3424; "
            "shl.b32 c, a, 4; shl.b32 d, b, 4; "
            "shr.b32 e, a, 6; and.b32 e, e, 0x01c001c0; lop3.b32 a, a, 0x80008000, e, 0xEA; "
            "shr.b32 f, b, 6; and.b32 f, f, 0x01c001c0; lop3.b32 b, b, 0x80008000, f, 0xEA; "
            "shr.b32 e, c, 6; and.b32 e, e, 0x01c001c0; lop3.b32 c, c, 0x80008000, e, 0xEA; "
            "shr.b32 f, d, 6; and.b32 f, f, 0x01c001c0; lop3.b32 d, d, 0x80008000, f, 0xEA; "
            "mov.b32 g, 0x80008000; "
            "fma.rn.bf16x2 $0, c, $5, g; fma.rn.bf16x2 $1, d, $6, g; "
            "fma.rn.bf16x2 $2, a, $5, g; fma.rn.bf16x2 $3, b, $6, g; }",
            "=&r,=&r,=&r,=&r,r,r,r", [packed, scales],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c; "
            "prmt.b32 a, $2, 0, 0x1404; shl.b32 b, a, 4; "  # into the upper bytes of 16 bits each
            "shr.b32 c, b, 6; and.b32 c, c, 0x01c001c0; lop3.b32 b, b, 0x80008000, c, 0xEA; "
            "shr.b32 c, a, 6; and.b32 c, c, 0x01c001c0; lop3.b32 a, a, 0x80008000, c, 0xEA; "
            "mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, b, $3, c; fma.rn.bf16x2 $1, a, $3, c; }",
            "=&r,=&r,r,r", [packed, scales],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    return low, high


@triton.jit
def _halves_of_weights(packed, exponents, DTYPE: tl.constexpr, FAST: tl.constexpr,
                       PACK: tl.constexpr):  # fmt: skip
    """Weights in the lower and in the upper halves of bytes [rows, half of the inputs], as DTYPE;
    times 2 ** -DOWN if FAST. exponents: of their groups, [rows, groups] bytes."""
    N: tl.constexpr = packed.shape[0]  # noqa: N806
    WIDTH: tl.constexpr = packed.shape[1]  # noqa: N806
    grouped = tl.reshape(packed, [N, WIDTH // 16, 16])
    if FAST:
        # At most 2 ** 33, far above what weights have; so none overflows, and small ones stay.
        bits = (tl.minimum(exponents.to(tl.int32), 160) + (126 - DOWN)) << 7
        scales = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        scales = tl.broadcast_to(scales[:, :, None], grouped.shape)
        low, high = _scaled_e2m1(grouped, scales, PACK)
    else:
        low, high = _wide_e2m1(grouped, False)
        scales = _e8m0(exponents, 14)[:, :, None]
        low, high = (low * scales).to(DTYPE), (high * scales).to(DTYPE)
    return tl.reshape(low, [N, WIDTH]), tl.reshape(high, [N, WIDTH])


@triton.jit
def _rows_times_token(weight, scale, bias, rows, real, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a weight times one token, plus their biases, [rows] fp32. x: where its [K] numbers
    lie."""
    if weight.dtype.element_ty == tl.uint8:
        product = _packed_rows_times_token(weight, scale, rows, real, x, K, BLOCK_K)
    else:
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
    if bias is not None:
        product += tl.load(bias + rows, real, other=0.0).to(tl.float32)
    return product


@triton.jit
def _packed_rows_times_token(weight, scale, rows, real, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of MXFP4: 16 bytes hold 32 neighbouring inputs, the first ones in lower halves."""
    HALVES: tl.constexpr = K // 2  # noqa: N806
    GROUPS: tl.constexpr = K // 32  # noqa: N806
    NUM: tl.constexpr = BLOCK_K // 32  # noqa: N806
    acc = tl.zeros([rows.shape[0], NUM], tl.float32)
    lines, scales = weight + rows[:, None] * HALVES, scale + rows[:, None] * GROUPS
    lanes = tl.arange(0, BLOCK_K // 2)
    for start in tl.static_range(0, K, BLOCK_K):
        half = start // 2 + lanes
        group = start // 32 + tl.arange(0, NUM)
        inside = half < HALVES
        packed = tl.load(lines + half[None, :], real[:, None] & inside[None, :], other=0)
        scaled = real[:, None] & (group < GROUPS)[None, :]
        exponents = tl.load(scales + group[None, :], scaled, other=0)
        k = start + lanes // 16 * 32 + lanes % 16
        first = tl.load(x + k, inside, other=0.0).to(tl.float32)
        second = tl.load(x + k + 16, inside, other=0.0).to(tl.float32)
        low, high = _wide_e2m1(packed, not INTERPRETED)
        products = low * first[None, :] + high * second[None, :]
        sums = tl.sum(tl.reshape(products, [rows.shape[0], NUM, 16]), 2)
        acc += sums * _e8m0(exponents, 14 if INTERPRETED else 126 - DOWN)
    product = tl.sum(acc, 1)
    if not INTERPRETED:
        product *= UP
    return product


@triton.jit
def _vector_gate_up_kernel(
    x,  # [K]
    weight,  # [num_experts * 2 * N, K]: gates and ups of each expert; of MXFP4 [.., K / 2] bytes
    scale,  # fp32, of each row of weight, or None; of MXFP4 [.., K / 32] bytes
    bias,  # of each row of weight, or None
    experts,  # [top_k] int32
    out,  # [top_k, N]
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_N outputs of one of its experts; zeros, if that is elsewhere."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(1)
    expert = tl.load(experts + place).to(tl.int64)
    first = expert * (2 * N)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = outputs < N
    read = real & (expert >= 0)
    if GATING.turns:
        gate_rows = first + 2 * outputs
        up_rows = gate_rows + 1
    else:
        gate_rows = first + outputs
        up_rows = gate_rows + N
    gate = _rows_times_token(weight, scale, bias, gate_rows, read, x, K, BLOCK_K)
    up = _rows_times_token(weight, scale, bias, up_rows, read, x, K, BLOCK_K)
    inner = _activated(gate, up, out.dtype.element_ty, GATING)
    tl.store(out + place * N + outputs, inner.to(out.dtype.element_ty), real)


@triton.jit
def _vector_down_kernel(
    inner,  # [TOP_K, K]
    weight,  # [num_experts * N, K]; these three as in the kernel before
    scale,
    bias,
    weights,  # [TOP_K] fp32, of the experts
    experts,  # [TOP_K] int32
    residual,  # [N], or None
    out,  # [N]
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_N outputs of all of its experts that are here, weighed and added up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = outputs < N
    total = tl.zeros([BLOCK_N], tl.float32)
    if residual is not None:
        total += tl.load(residual + outputs, real, other=0.0).to(tl.float32)
    for place in tl.static_range(TOP_K):
        expert = tl.load(experts + place).to(tl.int64)
        rows, read = expert * N + outputs, real & (expert >= 0)
        x = inner + place * K
        product = _rows_times_token(weight, scale, bias, rows, read, x, K, BLOCK_K)
        total += tl.load(weights + place) * product
    tl.store(out + outputs, total.to(out.dtype.element_ty), real)


@triton.jit
def _tile_of_weights(weight, rows, start, DTYPE: tl.constexpr, K: tl.constexpr,
                     BLOCK_K: tl.constexpr):  # fmt: skip
    """BLOCK_K inputs from `start` on of some rows, [BLOCK_K, rows], as DTYPE. Scales of whole rows
    are left to others."""
    k = start + tl.arange(0, BLOCK_K)
    lines = weight + rows[None, :] * K + k[:, None]
    if K % BLOCK_K == 0:
        w = widened(tl.load(lines), DTYPE)
    else:
        w = widened(tl.load(lines, (k < K)[:, None], other=0.0), DTYPE)
    return w


@triton.jit
def _load_exponents(scale, rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the groups of BLOCK_K inputs, [rows, groups] bytes."""
    group = start // 32 + tl.arange(0, BLOCK_K // 32)
    return tl.load(scale + rows[:, None] * (K // 32) + group[None, :], (group < K // 32)[None, :],
                   other=0)  # fmt: skip


@triton.jit
def _load_inputs(lines, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inputs k of tokens that begin at lines, [tokens, inputs]."""
    if K % BLOCK_K == 0:
        inputs = tl.load(lines + k[None, :])
    else:
        inputs = tl.load(lines + k[None, :], (k < K)[None, :], other=0.0)
    return inputs


@triton.jit
def _packed_products(lines, weight, scale, rows, DTYPE: tl.constexpr, K: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                     FAST: tl.constexpr):  # fmt: skip
    """Tokens times rows of MXFP4, [tokens, rows] fp32. lines: where tokens begin, [tokens, 1].

    Of few tokens, weights come to tensor cores from registers, where they are unpacked; of many
    from shared memory, and inputs are loaded in long pieces.
    """
    SWAPS: tl.constexpr = BLOCK_M < 16  # noqa: N806
    if SWAPS:
        acc = tl.zeros([rows.shape[0], BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, rows.shape[0]], tl.float32)
    lanes = tl.arange(0, BLOCK_K // 2)
    k_of_low = lanes // 16 * 32 + lanes % 16
    # Loads of a few bytes are not pipelined: the next groups' are on their way a step before.
    exponents = _load_exponents(scale, rows, 0, K, BLOCK_K)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        half = start // 2 + lanes
        bytes_of_rows = weight + rows[:, None] * (K // 2) + half[None, :]
        if K % BLOCK_K == 0:
            packed = tl.load(bytes_of_rows)
        else:
            packed = tl.load(bytes_of_rows, (half < K // 2)[None, :], other=0)
        following = _load_exponents(scale, rows, start + BLOCK_K, K, BLOCK_K)
        low, high = _halves_of_weights(packed, exponents, DTYPE, FAST, 4 if BLOCK_M < 64 else 2)
        exponents = following
        if BLOCK_M < 32:
            first = _load_inputs(lines, start + k_of_low, K, BLOCK_K)
            second = _load_inputs(lines, start + k_of_low + 16, K, BLOCK_K)
            if SWAPS:
                acc = tl.dot(low, tl.trans(first), acc, input_precision="ieee")
                acc = tl.dot(high, tl.trans(second), acc, input_precision="ieee")
            else:
                acc = tl.dot(first, tl.trans(low), acc, input_precision="ieee")
                acc = tl.dot(second, tl.trans(high), acc, input_precision="ieee")
        else:
            tokens = _load_inputs(lines, start + tl.arange(0, BLOCK_K), K, BLOCK_K)
            acc = tl.dot(tokens, tl.trans(halves_joined(low, high)), acc, input_precision="ieee")
    if FAST:
        acc *= UP
    if SWAPS:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _grouped_kernel(
    x,  # [num_pairs / DIVIDES, K]
    weight,  # [num_experts * N, K], twice as many rows if gated; these three as in the vector's
    scale,
    bias,
    out,  # [num_pairs, N]
    pairs, block_experts, block_sizes, num_blocks,  # of `Sorted`
    N: tl.constexpr, K: tl.constexpr, DIVIDES: tl.constexpr, GATING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of pairs of one expert times BLOCK_N of its outputs, each a gate and an up if GATING.

    DIVIDES: a pair's input is row pair // DIVIDES of x. Gates and ups take turns in the
    accumulator, so that both of an output are in the same thread.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block, tile = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    if block < tl.load(num_blocks):
        HALVES: tl.constexpr = 1 if GATING is None else 2  # noqa: N806
        expert = tl.load(block_experts + block).to(tl.int64)
        lanes = tl.arange(0, BLOCK_M)
        present = lanes < tl.load(block_sizes + block)
        pair = tl.load(pairs + block * BLOCK_M + lanes, present, other=0)
        lines = x + (pair // DIVIDES).to(tl.int64)[:, None] * K
        turns = tl.arange(0, HALVES * BLOCK_N)
        output = tile * BLOCK_N + turns // HALVES
        row = output
        if HALVES == 2:
            row = 2 * output + turns % 2 if GATING.turns else output + (turns % 2) * N
        # Beyond the end any row will do: what becomes of it is not stored.
        rows = expert * (HALVES * N) + tl.where(output < N, row, 0)
        columns = tl.arange(0, BLOCK_K)
        if weight.dtype.element_ty == tl.uint8:
            acc = _packed_products(lines, weight, scale, rows, x.dtype.element_ty, K, BLOCK_M,
                                   BLOCK_K, STAGES, FAST)  # fmt: skip
        else:
            acc = tl.zeros([BLOCK_M, HALVES * BLOCK_N], tl.float32)
            for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                k = start + columns
                if K % BLOCK_K == 0:
                    tokens = tl.load(lines + k[None, :])
                else:
                    tokens = tl.load(lines + k[None, :], (k < K)[None, :], other=0.0)
                w = _tile_of_weights(weight, rows, start, tokens.dtype, K, BLOCK_K)
                acc = tl.dot(tokens, w, acc, input_precision="ieee")
            if scale is not None:
                acc *= tl.load(scale + rows)[None, :]
        if bias is not None:
            acc += tl.load(bias + rows).to(tl.float32)[None, :]
        dtype = out.dtype.element_ty
        outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if HALVES == 2:
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
            acc = _activated(gate, up, dtype, GATING)
        places = pair.to(tl.int64)[:, None] * N + outputs[None, :]
        tl.store(out + places, acc.to(dtype), present[:, None] & (outputs < N)[None, :])


@triton.jit
def _combine_kernel(
    parts,  # [num_tokens, TOP_K, N]
    weights,  # [num_tokens, TOP_K] fp32
    experts,  # [num_tokens, TOP_K] int32, or None: all are here
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
        read = real
        if experts is not None:  # nobody has written the others' parts
            read = real & (tl.load(experts + pair) >= 0)
        part = tl.load(parts + pair * N + columns, read, other=0.0).to(tl.float32)
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
    spec, own = experts.spec, experts.own
    gate_up, down = experts.stacked
    gating = _Gating(spec.activation, spec.takes_turns)
    if spec.clamped is not None:
        gating = _Gating("clamped", spec.takes_turns, spec.clamped.alpha, spec.clamped.limit)
    routed = route(logits, spec, experts.correction, experts.factors, own)
    num_inner = len(gate_up.weight) // (2 * own.size)
    if len(hidden) == 1 and tiles is None:
        return _of_one_token(hidden, routed, gate_up, down, num_inner, gating, residual)
    first, second = tiles or tiles_for(
        routed.experts.numel() / spec.num_experts,
        bits=4 if gate_up.weight.dtype == torch.uint8 else 8 * gate_up.weight.itemsize,
        has_room=has_tensor_memory_accelerator(hidden.device),
    )
    blocks = sort_by_expert(routed, own.size, first.block_m)
    inner = hidden.new_empty(routed.experts.numel(), num_inner)
    _multiply(hidden, gate_up, blocks, inner, spec.top_k, first, gating=gating)
    parts = hidden.new_empty(len(inner), hidden.shape[1])
    _multiply(inner, down, blocks, parts, 1, second, gating=None)
    return _combine(parts, routed, blocks, residual, is_whole=own.is_whole)


def _of_one_token(
    hidden: Tensor,
    routed: Routed,
    gate_up: Linear,
    down: Linear,
    num_inner: int,
    gating: _Gating,
    residual: Tensor | None,
) -> Tensor:
    top_k, size = routed.experts.numel(), hidden.shape[1]
    options = launch_options(hidden.device)
    inner = hidden.new_empty(top_k, num_inner)
    block_k, block_n = _vector_blocks(size, gate_up.weight)
    block_n = max(1, block_n // 2)
    _vector_gate_up_kernel[(triton.cdiv(num_inner, block_n), top_k)](
        hidden, gate_up.weight, gate_up.scale, gate_up.bias, routed.experts, inner,
        N=num_inner, K=size, BLOCK_N=block_n, BLOCK_K=block_k, GATING=gating,
        num_warps=8, **options,
    )  # fmt: skip
    out = torch.empty_like(hidden)
    block_k, block_n = _vector_blocks(num_inner, down.weight)
    block_n = max(1, block_n // 4)  # all experts are in one program
    _vector_down_kernel[(triton.cdiv(size, block_n),)](
        inner, down.weight, down.scale, down.bias, *routed, residual, out,
        N=size, K=num_inner, TOP_K=top_k, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8, **options,
    )  # fmt: skip
    return out


def _vector_blocks(num_inputs: int, weight: Tensor) -> tuple[int, int]:
    """Inputs and rows that a program of one token takes at a time; more where they are bytes."""
    shrinks = weight.itemsize == 1
    block_k = min(4096 if shrinks else 2048, max(32, triton.next_power_of_2(num_inputs)))
    return block_k, min(16, VECTOR_VALUES * (1 + shrinks) // block_k)


def _multiply(
    x: Tensor,
    linear: Linear,
    blocks: Sorted,
    out: Tensor,
    divides: int,
    tile: ExpertTile,
    *,
    gating: _Gating | None,
) -> None:
    """Every pair's input times the weights of its expert, gated if asked for."""
    num_outputs = out.shape[1]
    _grouped_kernel[(blocks.most_blocks * triton.cdiv(num_outputs, tile.block_n),)](
        x, linear.weight, linear.scale, linear.bias, out, *blocks[:4],
        N=num_outputs, K=x.shape[1], DIVIDES=divides, GATING=gating, BLOCK_M=blocks.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, num_warps=tile.warps,
        FAST=not _INTERPRETED and x.dtype == torch.bfloat16, **launch_options(x.device),
    )  # fmt: skip


def _combine(
    parts: Tensor, routed: Routed, blocks: Sorted, residual: Tensor | None, *, is_whole: bool
) -> Tensor:
    """is_whole: all experts are here."""
    num_tokens, top_k = routed.experts.shape
    size = parts.shape[1]
    out = parts.new_empty(num_tokens, size)
    block = min(COMBINE_BLOCK, triton.next_power_of_2(size))
    _combine_kernel[(num_tokens, triton.cdiv(size, block))](
        parts, routed.weights, None if is_whole else routed.experts, residual, out,
        blocks.num_blocks,
        N=size, TOP_K=top_k, BLOCK=block, num_warps=4, **launch_options(parts.device),
    )  # fmt: skip
    return out
