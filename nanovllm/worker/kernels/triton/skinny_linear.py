"""Linear layers for a handful of tokens: products bound by how fast weights stream in.

Layers call `skinny_linear` or `skinny_add` where it `beats_cublas`. A program loads its whole first
weight tile before it waits for the kernel before it (see `launch`), so weights stream while
that kernel still runs. Gate, residual and norms ride along (`Weighed`).
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual, Weighed
from nanovllm.worker.kernels.triton.activations import activated
from nanovllm.worker.kernels.triton.e4m3 import quantized
from nanovllm.worker.kernels.triton.launch import MAX_ARRIVALS, arrival_counters, launch_options
from nanovllm.worker.kernels.triton.linear_tuning import (
    MAX_TOKENS,
    Tile,
    fp8_tile_for,
    is_tiny,
    tile_for,
)
from nanovllm.worker.layers.linear import Linear

MAX_WEIGHED_TOKENS = 64  # of which products leave the next norm what it needs


@triton.jit
def finish(acc, up, channel_scale, bias, residual, next_weight, out, weighed, squares,  # noqa: C901
           group_scale, tokens, outputs, num_tokens, num_outputs, GATE: tl.constexpr):  # fmt: skip
    """Scale, bias, gate and residual, then the store; and what the next norm needs, if it is known.

    acc, up: [tokens, outputs]. With `group_scale` what the next product reads (weighed, or out if
    there is none) is e4m3, and these outputs of a token share a scale.
    """
    dtype = out.dtype.element_ty
    inside = (outputs < num_outputs)[None, :]
    real = (tokens < num_tokens)[:, None] & inside
    places = tokens[:, None] * num_outputs + outputs[None, :]
    outputs = outputs[None, :]
    if channel_scale is not None:
        acc *= tl.load(channel_scale + outputs, inside, other=0.0)
        if GATE is not None:
            up *= tl.load(channel_scale + num_outputs + outputs, inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + outputs, inside, other=0.0)
        if GATE is not None:
            up += tl.load(bias + num_outputs + outputs, inside, other=0.0)
    if GATE is not None:
        if group_scale is None:
            acc = activated(acc.to(dtype).to(tl.float32), GATE).to(dtype).to(tl.float32)
            acc *= up.to(dtype)
        else:
            acc = activated(acc, GATE) * up
    if residual is not None:
        acc = acc.to(dtype).to(tl.float32) + tl.load(residual + places, real, other=0.0)
    if GATE is not None and group_scale is not None:
        _store_group(acc, out, group_scale, places, real, tokens, num_tokens)
    else:
        acc = acc.to(dtype)
        tl.store(out + places, acc, real)
    if next_weight is not None:
        wide = acc.to(tl.float32)  # zero where no outputs are
        factors = tl.load(next_weight + outputs, inside, other=0.0).to(tl.float32)
        if group_scale is None:
            tl.store(weighed + places, (wide * factors).to(dtype), real)
        else:
            _store_group(wide * factors, weighed, group_scale, places, real, tokens, num_tokens)
        mine = tokens * tl.num_programs(0) + tl.program_id(0)
        tl.store(squares + mine, tl.sum(wide * wide, 1), tokens < num_tokens)


@triton.jit
def _store_group(wide, out, group_scale, places, real, tokens, num_tokens):
    """A program's outputs in e4m3, and the scale of each token's."""
    values, scale = quantized(wide)
    tl.store(out + places, values, real)
    scales = group_scale + tl.program_id(0) * num_tokens + tokens[:, None]
    tl.store(scales, scale, (tokens < num_tokens)[:, None])


@triton.jit
def load_squares(squares, tokens, num_tokens, PARTS: tl.constexpr):
    """The parts that tokens' sums of squares come in, [tokens, parts]."""
    parts = tl.arange(0, triton.next_power_of_2(PARTS))[None, :]
    real = (tokens < num_tokens)[:, None] & (parts < PARTS)
    return tl.load(squares + tokens[:, None] * PARTS + parts, real, other=0.0)


@triton.jit
def scaled_by_norm(acc, up, squares, K: tl.constexpr, eps):
    """Products times the scale that the norm gives each token."""
    scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    return acc * scale, up * scale


@triton.jit
def _vector_kernel(
    x,  # [K]
    weight,  # [num_outputs, K]; if GATE [2 * num_outputs, K], gates first
    channel_scale,  # fp32, of each row of weight; like all that follow up to `out` perhaps None
    bias,  # [num_outputs], twice as many if GATE
    residual,  # [num_outputs]
    squares,  # [PARTS] fp32: of the residual, whose product with a norm's weight x is
    next_weight,  # [num_outputs], of the norm that comes next
    out,  # [num_outputs]
    weighed,  # [num_outputs]: out * next_weight
    next_squares,  # [programs] fp32
    num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: products and sums in fp32, without tensor cores."""
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    real = (outputs < num_outputs)[:, None]
    rows = weight + outputs.to(tl.int64)[:, None] * K
    up_offset = num_outputs.to(tl.int64) * K
    w = tl.load(rows + columns, real & (columns < K), other=0.0)
    if GATE is not None:
        up_w = tl.load(rows + up_offset + columns, real & (columns < K), other=0.0)
    if PDL:
        gdc_wait()
    tokens = tl.arange(0, 1)
    if squares is not None:
        parts = load_squares(squares, tokens, 1, PARTS)
    inputs = tl.load(x + columns, columns < K, other=0.0).to(tl.float32)[None, :]
    acc = w.to(tl.float32) * inputs
    up = acc
    if GATE is not None:
        up = up_w.to(tl.float32) * inputs
    for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        ks = start + columns
        inputs = tl.load(x + ks, ks < K, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(rows + ks, real & (ks < K), other=0.0).to(tl.float32) * inputs
        if GATE is not None:
            up_w = tl.load(rows + up_offset + ks, real & (ks < K), other=0.0)
            up += up_w.to(tl.float32) * inputs
    acc, up = tl.sum(acc, 1)[None, :], tl.sum(up, 1)[None, :]
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish(acc, up, channel_scale, bias, residual, next_weight, out, weighed, next_squares, None,
            tokens, outputs, 1, num_outputs, GATE)  # fmt: skip


@triton.jit
def _matrix_kernel(
    x_desc,  # [num_tokens, K], boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # as in _vector_kernel, like the rest; boxes [BLOCK_N, BLOCK_K]
    channel_scale,
    bias,
    residual,  # [num_tokens, num_outputs]
    squares,  # [num_tokens, PARTS]
    next_weight,  # [num_outputs]
    out,  # [num_tokens, num_outputs]
    weighed,  # [num_tokens, num_outputs]
    next_squares,  # [num_tokens, programs along the outputs]
    partial,  # [tiles, 2 if GATE, splits, BLOCK_M * BLOCK_N] fp32
    arrivals,  # [tiles] int32, zero before and after
    num_tokens, num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, NUM_TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens a program; programs of one output tile share out K, the last one adds up."""
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc, up = _products(
        x_desc, weight_desc, squares, tokens, num_tokens, num_outputs, eps, K, PARTS, NUM_TILES,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GATE, PDL,
    )  # fmt: skip
    finish_split(acc, up, channel_scale, bias, residual, next_weight, out, weighed, next_squares,
                 None, partial, arrivals, tokens, outputs, num_tokens, num_outputs, SPLITS, BLOCK_M,
                 BLOCK_N, GATE)  # fmt: skip


@triton.jit
def finish_split(acc, up, channel_scale, bias, residual, next_weight, out, weighed, next_squares,
                 group_scale, partial, arrivals, tokens, outputs, num_tokens, num_outputs,
                 SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 GATE: tl.constexpr):  # fmt: skip
    """`finish` of what all programs of an output tile have, by the last of them to arrive."""
    if SPLITS == 1:
        finish(acc, up, channel_scale, bias, residual, next_weight, out, weighed, next_squares,
                group_scale, tokens, outputs, num_tokens, num_outputs, GATE)  # fmt: skip
    else:
        PART: tl.constexpr = BLOCK_M * BLOCK_N  # noqa: N806
        lanes = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        present = (tokens < num_tokens)[:, None]
        tile_id = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        parts = partial + tile_id * (SPLITS * PART * (1 if GATE is None else 2))
        mine = parts + tl.program_id(1) * PART
        tl.store(mine + lanes, acc, present)
        if GATE is not None:
            tl.store(mine + SPLITS * PART + lanes, up, present)
        tl.debug_barrier()  # all threads' parts are written before one thread says so
        arrival = arrivals + tile_id
        if tl.atomic_add(arrival, 1, sem="acq_rel") == SPLITS - 1:
            acc = sum_parts(parts, lanes, present, SPLITS, PART)
            up = acc
            if GATE is not None:
                up = sum_parts(parts + SPLITS * PART, lanes, present, SPLITS, PART)
            finish(acc, up, channel_scale, bias, residual, next_weight, out, weighed,
                    next_squares, group_scale, tokens, outputs, num_tokens, num_outputs,
                    GATE)  # fmt: skip
            tl.store(arrival, 0)


@triton.jit
def _products(
    x_desc, weight_desc, squares, tokens, num_tokens, num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """This program's tile of outputs over its share of the inputs, and of their ups if GATE."""
    if PDL:
        gdc_launch_dependents()
    output, token = tl.program_id(0) * BLOCK_N, tl.program_id(2) * BLOCK_M
    first = tl.program_id(1) * (NUM_TILES * BLOCK_K)
    w = weight_desc.load([output, first])
    if GATE is not None:
        up_w = weight_desc.load([num_outputs + output, first])
    if PDL:
        gdc_wait()
    if squares is not None:  # on their way while the products are made
        parts = load_squares(squares, tokens, num_tokens, PARTS)
    x, scale = _multiplicand(x_desc.load([token, first]), w.dtype)
    acc = _add_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x, scale, w)
    up = acc
    if GATE is not None:
        up = _add_product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x, scale, up_w)
    for tile in tl.range(1, NUM_TILES, num_stages=STAGES):
        k = first + tile * BLOCK_K
        x, scale = _multiplicand(x_desc.load([token, k]), w.dtype)
        acc = _add_product(acc, x, scale, weight_desc.load([output, k]))
        if GATE is not None:
            up = _add_product(up, x, scale, weight_desc.load([num_outputs + output, k]))
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    return acc, up


@triton.jit
def _multiplicand(x, WEIGHT: tl.constexpr):
    """A tile of tokens as weights of a type are multiplied with it, and what scales the product."""
    if tl.float8e4nv == WEIGHT:
        rows, scale = quantized(x)
    else:
        rows, scale = x, tl.full([1, 1], 1.0, tl.float32)
    return rows, scale


@triton.jit
def _add_product(acc, x, scale, w):
    """acc + x · wᵀ, [tokens, outputs]. Of e4m3, Hopper's tensor cores take both operands from
    shared memory as they are if there are 64 outputs, whatever the number of tokens."""
    if w.dtype == tl.float8e4nv:
        acc += tl.trans(tl.dot(w, tl.trans(x))) * scale
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def sum_parts(parts, lanes, present, SPLITS: tl.constexpr, PART: tl.constexpr):
    """In the order of the splits, whichever came last."""
    total = tl.load(parts + lanes, present, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * PART + lanes, present, other=0.0, cache_modifier=".cg")
    return total


def skinny_linear(
    x: Tensor,
    linear: Linear,
    *,
    norm: tuple[Tensor, float] | None = None,
    gate: Activation | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """linear(x) for up to 128 tokens, [num_tokens, num_outputs].

    x: [num_tokens, num_inputs]. Weights may be FP8 with their scales; several tokens are quantized
    then, each with a scale for every tile of inputs.
    norm: squares and eps, if x is the values of a `Weighed` residual: its scale goes to the result.
    gate: the layer's outputs are gates, then ups, and the result is gate(gates) * ups. Sums are
    fp32 in an order fixed by the shapes.
    """
    return _launch(x, linear, None, norm=norm, next_norm=None, gate=gate, tile=tile).hidden


def skinny_add(
    x: Tensor,
    linear: Linear,
    residual: Tensor,
    *,
    next_norm: Tensor | None = None,
    tile: Tile | None = None,
) -> Residual:
    """residual + linear(x), otherwise as `skinny_linear`; weighed by the norm that comes next,
    where it `can_weigh`."""
    if not can_weigh(x, most=MAX_TOKENS if is_tiny(linear.weight) else MAX_WEIGHED_TOKENS):
        next_norm = None
    return _launch(x, linear, residual, norm=None, next_norm=next_norm, gate=None, tile=tile)


def can_weigh(x: Tensor, *, most: int = MAX_WEIGHED_TOKENS) -> bool:
    """Whether what is added to the residual for these tokens leaves the next norm what it needs.

    Not for more than `most` tokens, nor in float16, whose range the residual might leave before it
    is scaled.
    """
    return len(x) <= most and x.dtype != torch.float16


def empty_residual(x: Tensor, num_outputs: int, *, num_parts: int | None) -> Residual:
    """Memory for a product of `x`; weighed in so many parts, if at all."""
    hidden = x.new_empty(len(x), num_outputs)
    if num_parts is None:
        return Residual(hidden)
    squares = x.new_empty(len(x), num_parts, dtype=torch.float32)
    return Residual(hidden, Weighed(torch.empty_like(hidden), squares))


class Operands(NamedTuple):
    """What products by any kind of weights have in common, besides `x`.

    out: new memory; num_n: programs along the outputs; tensors: as kernels take them, from the
    bias on; options: by which they are compiled.
    """

    out: Residual
    num_n: int
    tensors: tuple[Tensor | None, ...]
    eps: float
    options: dict[str, Any]


def operands(
    x: Tensor,
    linear: Linear,
    residual: Tensor | None,
    *,
    num_outputs: int,
    block_n: int,
    norm: tuple[Tensor, float] | None,
    next_norm: Tensor | None,
) -> Operands:
    """Of a product with as many outputs, block_n a program. norm, next_norm: as `skinny_linear`'s
    and `skinny_add`'s."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    num_n = triton.cdiv(num_outputs, block_n)
    squares, eps = norm or (None, 0.0)
    out = empty_residual(x, num_outputs, num_parts=None if next_norm is None else num_n)
    left = (out.weighed or (None, None))[:2]
    tensors = (linear.bias, residual, squares, next_norm, out.hidden, *left)
    parts = 0 if squares is None else squares.shape[1]
    options = {"K": x.shape[1], "PARTS": parts, **launch_options(x.device)}
    return Operands(out, num_n, tensors, eps, options)


def _launch(
    x: Tensor,
    linear: Linear,
    residual: Tensor | None,
    *,
    norm: tuple[Tensor, float] | None,
    next_norm: Tensor | None,
    gate: Activation | None,
    tile: Tile | None,
) -> Residual:
    """Either product, in new memory."""
    weight = linear.weight
    num_tokens, num_inputs = x.shape
    gated = gate is not None
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert num_tokens <= MAX_TOKENS and weight.is_contiguous()
    choose = tile_for if linear.scale is None else fp8_tile_for
    tile = tile or choose(num_tokens, num_outputs, num_inputs, gated=gated)
    out, num_n, tensors, eps, options = operands(
        x, linear, residual, num_outputs=num_outputs, block_n=tile.block_n, norm=norm,
        next_norm=next_norm,
    )  # fmt: skip
    options |= {
        "GATE": gate, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip
    if num_tokens == 1:
        _vector_kernel[(num_n,)](x, weight, linear.scale, *tensors, num_outputs, eps, **options)
        return out
    splits = triton.cdiv(num_inputs, tile.block_k * tile.num_tiles)
    block_m = tile.block_m or min(max(16, triton.next_power_of_2(num_tokens)), 64)
    num_m = triton.cdiv(num_tokens, block_m)
    assert num_n * num_m <= MAX_ARRIVALS
    size = num_n * num_m * splits * (1 + gated) * tile.block_n * block_m if splits > 1 else 0
    _matrix_kernel[(num_n, splits, num_m)](
        TensorDescriptor.from_tensor(x, [block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        linear.scale, *tensors,
        x.new_empty(size, dtype=torch.float32), arrival_counters(x.device),
        num_tokens, num_outputs, eps,
        NUM_TILES=tile.num_tiles, SPLITS=splits, BLOCK_M=block_m, **options,
    )  # fmt: skip
    return out
