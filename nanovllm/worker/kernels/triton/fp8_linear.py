"""Products of e4m3 weights with tokens that are e4m3 already.

`products` calls these for some tokens of large layers (`linear_tuning`). Up to 32 tokens have a
scale for each group of inputs: the product before quantized them, whose programs have a group of
outputs each, or `rows.quantize_groups`. More have one scale each, by `rows.quantize`.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual, Weighed
from nanovllm.worker.kernels.triton.launch import MAX_ARRIVALS, arrival_counters, launch_options
from nanovllm.worker.kernels.triton.linear_tuning import (
    MAX_GROUPED_TOKENS,
    Tile,
    fp8_group_tile_for,
    fp8_row_tile_for,
)
from nanovllm.worker.kernels.triton.skinny_linear import (
    finish_split,
    load_squares,
    scaled_by_norm,
)
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.fp8 import E4M3, QuantizedGroups
from nanovllm.worker.quant.scaled_rows import QuantizedRows

GROUP = 128  # inputs of a token that share a scale; a program's outputs, if they are quantized
BLOCK_M = MAX_GROUPED_TOKENS  # tokens of a program that come in groups: all
AHEAD = 8  # tiles whose weights are asked into the L2 cache while the kernel before still runs


@triton.jit
def _group_kernel(
    x_desc,  # [num_tokens, K] e4m3, boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # [num_outputs, K] e4m3, boxes [BLOCK_N, BLOCK_K]; if GATE twice as many rows
    x_scale,  # [K / BLOCK_K, num_tokens] fp32; unless GROUPED [num_tokens]
    weight,  # what weight_desc describes
    channel_scale,  # fp32, of each row of weight
    bias,  # of each row of weight; like all that follow up to `out` perhaps None
    residual,  # [num_tokens, num_outputs]
    squares,  # [num_tokens, PARTS] fp32: of the residual, whose product with a norm's weight x is
    next_weight,  # [num_outputs], of the norm that comes next
    out,  # [num_tokens, num_outputs]
    weighed,  # [num_tokens, num_outputs]: out * next_weight
    next_squares,  # [num_tokens, programs along the outputs] fp32
    group_scale,  # [programs along the outputs, num_tokens] fp32: of what is left in e4m3
    partial,  # [tiles, 2 if GATE, splits, BLOCK_M * BLOCK_N] fp32
    arrivals,  # [tiles] int32, zero before and after
    num_tokens, num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, NUM_TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `skinny_linear`'s, but for what comes before it waits: only the L2 cache is filled, with
    the first AHEAD tiles of weights, so that all tiles go through one pipeline afterwards."""
    token = tl.program_id(2) * BLOCK_M
    tokens = token + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N
    outputs = output + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * (NUM_TILES * BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        rows = weight + outputs.to(tl.int64) * K + first
        most: tl.constexpr = min(AHEAD, NUM_TILES) * BLOCK_K
        num_bytes = tl.where(outputs < num_outputs, tl.minimum(most, K - first), 0)
        _fetch_ahead(rows, num_bytes)
        if GATE is not None:
            _fetch_ahead(rows + num_outputs.to(tl.int64) * K, num_bytes)
        gdc_wait()
    if squares is not None:  # on their way while the products are made
        parts = load_squares(squares, tokens, num_tokens, PARTS)
    # Weights come first: Hopper's tensor cores take 64 rows, and there are fewer tokens.
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    for tile in tl.range(0, NUM_TILES, num_stages=STAGES):
        k = first + tile * BLOCK_K
        x = tl.trans(x_desc.load([token, k]))
        if GROUPED:
            scales = x_scale + (k // BLOCK_K) * num_tokens + tokens
            scale = tl.load(scales, (tokens < num_tokens) & (k < K), other=0.0)[None, :]
            acc += tl.dot(weight_desc.load([output, k]), x) * scale
            if GATE is not None:
                up += tl.dot(weight_desc.load([num_outputs + output, k]), x) * scale
        else:
            acc = tl.dot(weight_desc.load([output, k]), x, acc)
            if GATE is not None:
                up = tl.dot(weight_desc.load([num_outputs + output, k]), x, up)
    if not GROUPED:
        scale = tl.load(x_scale + tokens, tokens < num_tokens, other=0.0)[None, :]
        acc, up = acc * scale, up * scale
    acc, up = tl.trans(acc), tl.trans(up)
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish_split(acc, up, channel_scale, bias, residual, next_weight, out, weighed, next_squares,
                 group_scale, partial, arrivals, tokens, outputs, num_tokens, num_outputs, SPLITS,
                 BLOCK_M, BLOCK_N, GATE)  # fmt: skip


@triton.jit
def _fetch_ahead(rows, num_bytes):
    """Ask the beginning of each row, of so many bytes, into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
        " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, $2; }",
        "=r,l,r", [rows, num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def can_group(linear: Linear) -> bool:
    """Whether these products have whole groups on either side of the layer."""
    return all(size % GROUP == 0 for size in linear.weight.shape)


def group_linear(
    x: QuantizedGroups,
    linear: Linear,
    dtype: torch.dtype,
    *,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """linear(x) for up to 32 tokens, [num_tokens, num_outputs] in `dtype`.

    norm: squares and eps, if x is the values of a `Weighed` residual.
    """
    out = torch.empty(len(x.values), len(linear.weight), dtype=dtype, device=x.values.device)
    _launch(x, linear, Residual(out), _group_tile(x, len(linear.weight)), norm=norm)
    return out


def group_gated(
    x: QuantizedGroups,
    linear: Linear,
    gate: Activation,
    *,
    norm: tuple[Tensor, float] | None = None,
) -> QuantizedGroups:
    """gate(gates) * ups of the layer's outputs, quantized for the product that comes next."""
    num_tokens, num_outputs = len(x.values), len(linear.weight) // 2
    values = x.values.new_empty(num_tokens, num_outputs)
    out = QuantizedGroups(values, x.scale.new_empty(num_outputs // GROUP, num_tokens))
    tile = _group_tile(x, num_outputs, gated=True)
    _launch(x, linear, out, tile, norm=norm, gate=gate)
    return out


def group_add(
    x: QuantizedGroups,
    linear: Linear,
    residual: Tensor,
    *,
    next_norm: Tensor | None = None,
) -> Residual:
    """residual + linear(x); weighed by the norm that comes next, and quantized then."""
    num_tokens, num_outputs = residual.shape
    out = Residual(torch.empty_like(residual))
    if next_norm is not None:
        squares, scale = x.scale.new_empty(2, num_outputs // GROUP, num_tokens)
        values = x.values.new_empty(num_tokens, num_outputs)
        out = Residual(out.hidden, Weighed(values, squares.view(num_tokens, -1), scale))
    _launch(x, linear, out, _group_tile(x, num_outputs), added=(residual, next_norm))
    return out


def row_linear(
    x: QuantizedRows,
    linear: Linear,
    dtype: torch.dtype,
    *,
    gate: Activation | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """linear(x) in `dtype`; with a gate, gate(gates) * ups of the layer's outputs."""
    gated, (num_tokens, num_inputs) = gate is not None, x.values.shape
    num_outputs = len(linear.weight) // (1 + gated)
    tile = tile or fp8_row_tile_for(num_outputs, num_inputs, gated=gated)
    out = torch.empty(num_tokens, num_outputs, dtype=dtype, device=x.values.device)
    _launch(x, linear, Residual(out), tile, gate=gate)
    return out


def row_add(
    x: QuantizedRows, linear: Linear, residual: Tensor, *, tile: Tile | None = None
) -> Residual:
    """residual + linear(x), in new memory."""
    tile = tile or fp8_row_tile_for(*linear.weight.shape, gated=False)
    out = Residual(torch.empty_like(residual))
    _launch(x, linear, out, tile, added=(residual, None))
    return out


def _group_tile(x: QuantizedGroups, num_outputs: int, *, gated: bool = False) -> Tile:
    num_tokens, num_inputs = x.values.shape
    tile = fp8_group_tile_for(num_outputs, num_inputs, gated=gated)
    assert num_tokens <= BLOCK_M and num_inputs == len(x.scale) * tile.block_k
    return tile


def _launch(
    x: QuantizedGroups | QuantizedRows,
    linear: Linear,
    out: Residual | QuantizedGroups,
    tile: Tile,
    *,
    added: tuple[Tensor | None, Tensor | None] = (None, None),
    norm: tuple[Tensor, float] | None = None,
    gate: Activation | None = None,
) -> None:
    """Any of them, into `out`. added: the residual, and the weight of the norm that comes next."""
    gated = gate is not None
    if isinstance(out, QuantizedGroups):
        left = (out.values, None, None, out.scale)
    else:
        left = (out.hidden, *(out.weighed or (None, None, None)))
    group_scale = left[-1]
    weight, (num_tokens, num_inputs) = linear.weight, x.values.shape
    num_outputs = len(weight) // (1 + gated)
    grouped, block_m = isinstance(x, QuantizedGroups), tile.block_m or BLOCK_M
    assert group_scale is None or num_outputs == len(group_scale) * tile.block_n
    assert x.values.is_contiguous() and x.scale.is_contiguous()
    assert weight.is_contiguous() and weight.dtype == E4M3
    squares, eps = norm or (None, 0.0)
    num_n, num_m = triton.cdiv(num_outputs, tile.block_n), triton.cdiv(num_tokens, block_m)
    residual, next_norm = added
    splits = triton.cdiv(num_inputs, tile.block_k * tile.num_tiles)
    assert num_n * num_m <= MAX_ARRIVALS
    size = num_n * num_m * splits * (1 + gated) * tile.block_n * block_m if splits > 1 else 0
    _group_kernel[(num_n, splits, num_m)](
        TensorDescriptor.from_tensor(x.values, [block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        x.scale, weight, linear.scale, linear.bias, residual, squares, next_norm, *left,
        x.scale.new_empty(size), arrival_counters(weight.device), num_tokens, num_outputs, eps,
        K=num_inputs, PARTS=0 if squares is None else squares.shape[1],
        NUM_TILES=tile.num_tiles, SPLITS=splits, BLOCK_M=block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, STAGES=tile.stages, AHEAD=AHEAD, GROUPED=grouped, GATE=gate,
        num_warps=tile.warps, **launch_options(weight.device),
    )  # fmt: skip
