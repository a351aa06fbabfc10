"""Linear layers for a handful of tokens: products bound by how fast weights stream in.

Layers call `skinny_linear` where it `beats_cublas`. A program loads its whole
first weight tile before it waits for the kernel before it (see triton_launch), so weights stream
while that kernel still runs; what surrounds the product (norm, gate, residual) rides along.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.worker.kernels.triton_launch import has_tensor_memory_accelerator, launch_options
from nanovllm.worker.layers.linear import Linear

MAX_TOKENS = 128
MAX_FP8_TOKENS = 16  # beyond, tensor cores take FP8 weights and quantized tokens as they are
MAX_TILES = 65536  # output tiles whose splits can be counted
FULL = 128  # programs that run at once on an H100, each with much of its shared memory


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs over num_tiles * block_k inputs.

    Of up to block_m tokens, where there are several.
    """

    block_n: int
    block_k: int
    num_tiles: int  # along the inputs
    warps: int
    stages: int = 3
    block_m: int = 64


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _finish(acc, up, channel_scale, bias, residual, out, places, outputs, real, num_outputs,
            GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
            RESIDUAL: tl.constexpr):  # fmt: skip
    """Scale, bias, gate and residual, then the store. acc, up, places, real: any one shape."""
    dtype = out.dtype.element_ty
    if SCALE:
        acc *= tl.load(channel_scale + outputs, outputs < num_outputs, other=0.0)
        if GATED:
            up *= tl.load(channel_scale + num_outputs + outputs, outputs < num_outputs, other=0.0)
    if BIAS:
        acc += tl.load(bias + outputs, outputs < num_outputs, other=0.0)
    if GATED:
        if BIAS:
            up += tl.load(bias + num_outputs + outputs, outputs < num_outputs, other=0.0)
        acc = _silu(acc.to(dtype).to(tl.float32)).to(dtype).to(tl.float32) * up.to(dtype)
    if RESIDUAL:
        acc = acc.to(dtype).to(tl.float32) + tl.load(residual + places, real, other=0.0)
    tl.store(out + places, acc.to(dtype), real)


@triton.jit
def _vector_kernel(
    x,  # [K]
    weight,  # [num_outputs, K]; if GATED [2 * num_outputs, K], gates first
    channel_scale,  # fp32, of each row of weight
    bias,  # [num_outputs], twice as many if GATED
    residual,  # [num_outputs]
    norm_weight,  # [K]
    out,  # [num_outputs]
    num_outputs,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: products and sums in fp32, without tensor cores."""
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    real = (outputs < num_outputs)[:, None]
    rows = weight + outputs.to(tl.int64)[:, None] * K
    up_offset = num_outputs.to(tl.int64) * K
    w = tl.load(rows + columns, real & (columns < K), other=0.0)
    if GATED:
        up_w = tl.load(rows + up_offset + columns, real & (columns < K), other=0.0)
    if PDL:
        gdc_wait()
    scale = 1.0
    if NORM:
        whole = tl.arange(0, NORM_BLOCK)
        all_x = tl.load(x + whole, whole < K, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(all_x * all_x, 0) / K + eps)
    inputs = _input_tile(x, norm_weight, scale, columns, K, NORM)
    acc = w.to(tl.float32) * inputs
    up = acc
    if GATED:
        up = up_w.to(tl.float32) * inputs
    for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        ks = start + columns
        inputs = _input_tile(x, norm_weight, scale, ks, K, NORM)
        acc += tl.load(rows + ks, real & (ks < K), other=0.0).to(tl.float32) * inputs
        if GATED:
            up_w = tl.load(rows + up_offset + ks, real & (ks < K), other=0.0)
            up += up_w.to(tl.float32) * inputs
    acc = tl.sum(acc, 1)
    if GATED:
        up = tl.sum(up, 1)
    _finish(acc, up, channel_scale, bias, residual, out, outputs, outputs, outputs < num_outputs,
            num_outputs, GATED, SCALE, BIAS, RESIDUAL)  # fmt: skip


@triton.jit
def _input_tile(x, norm_weight, scale, ks, K: tl.constexpr, NORM: tl.constexpr):
    """Inputs `ks` of one token, normed if asked for; [1, BLOCK_K] fp32."""
    dtype = x.dtype.element_ty
    inputs = tl.load(x + ks, ks < K, other=0.0).to(tl.float32)
    if NORM:
        factors = tl.load(norm_weight + ks, ks < K, other=0.0).to(tl.float32)
        inputs = ((inputs * scale).to(dtype).to(tl.float32) * factors).to(dtype).to(tl.float32)
    return inputs[None, :]


@triton.jit
def _matrix_kernel(
    x_desc,  # [num_tokens, K], boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # as in _vector_kernel, like the rest; boxes [BLOCK_N, BLOCK_K]
    channel_scale,
    bias,
    residual,  # [num_tokens, num_outputs]
    norm_weight,  # [K]
    out,  # [num_tokens, num_outputs]
    partial,  # [tiles, 2 if GATED, splits, BLOCK_M * BLOCK_N] fp32
    arrivals,  # [tiles] int32, zero before and after
    num_tokens, num_outputs, eps,
    K: tl.constexpr, NUM_TILES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens a program; programs of one output tile share out K, the last one adds up."""
    output = tl.program_id(0) * BLOCK_N
    token = tl.program_id(2) * BLOCK_M
    acc, up, squares = _products(
        x_desc, weight_desc, norm_weight, token, output, tl.program_id(1) * (NUM_TILES * BLOCK_K),
        num_outputs, K, NUM_TILES, BLOCK_M, BLOCK_K, STAGES, NORM, GATED, PDL,
    )  # fmt: skip
    tokens = token + tl.arange(0, BLOCK_M)
    outputs = output + tl.arange(0, BLOCK_N)
    present = (tokens < num_tokens)[:, None]
    real = present & (outputs < num_outputs)[None, :]
    places = tokens[:, None] * num_outputs + outputs[None, :]
    if SPLITS == 1:
        if NORM:
            acc, up = _normed(acc, up, squares, K, eps)
        _finish(acc, up, channel_scale, bias, residual, out, places, outputs[None, :], real,
                num_outputs, GATED, SCALE, BIAS, RESIDUAL)  # fmt: skip
    else:
        PART: tl.constexpr = BLOCK_M * BLOCK_N  # noqa: N806
        lanes = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile_id = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        parts = partial + tile_id * (SPLITS * (PART * (2 if GATED else 1) + BLOCK_M))
        mine = parts + tl.program_id(1) * PART
        tl.store(mine + lanes, acc, present)
        if GATED:
            tl.store(mine + SPLITS * PART + lanes, up, present)
        all_squares = parts + SPLITS * PART * (2 if GATED else 1)
        members = tl.arange(0, BLOCK_M)
        if NORM:
            tl.store(all_squares + tl.program_id(1) * BLOCK_M + members, squares)
        tl.debug_barrier()  # all threads' parts are written before one thread says so
        arrival = arrivals + tile_id
        if tl.atomic_add(arrival, 1, sem="acq_rel") == SPLITS - 1:
            acc = _sum_parts(parts, lanes, present, SPLITS, PART)
            up = acc
            if GATED:
                up = _sum_parts(parts + SPLITS * PART, lanes, present, SPLITS, PART)
            if NORM:
                squares = _sum_parts(all_squares, members, members >= 0, SPLITS, BLOCK_M)
                acc, up = _normed(acc, up, squares, K, eps)
            _finish(acc, up, channel_scale, bias, residual, out, places, outputs[None, :], real,
                    num_outputs, GATED, SCALE, BIAS, RESIDUAL)  # fmt: skip
            tl.store(arrival, 0)


@triton.jit
def _products(
    x_desc, weight_desc, norm_weight, token, output, first, num_outputs,
    K: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs over inputs from `first` on, and of their ups if GATED.

    If NORM, also each token's sum of squares over these inputs: a norm's weight belongs to the
    inputs, but its scale to the token, so that the product need not wait for it. Weights become
    what the inputs are only here, on their way from shared memory to the product.
    """
    if PDL:
        gdc_launch_dependents()
    w = weight_desc.load([output, first])
    if GATED:
        up_w = weight_desc.load([num_outputs + output, first])
    if PDL:
        gdc_wait()
    squares = tl.zeros([BLOCK_M], tl.float32)
    x, squares = _weighed_tile(x_desc, norm_weight, squares, token, first, K, BLOCK_K, NORM)
    acc = tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
    up = acc
    if GATED:
        up = tl.dot(x, tl.trans(up_w.to(x.dtype)), input_precision="ieee")
    for tile in tl.range(1, NUM_TILES, num_stages=STAGES):
        k = first + tile * BLOCK_K
        x, squares = _weighed_tile(x_desc, norm_weight, squares, token, k, K, BLOCK_K, NORM)
        w = weight_desc.load([output, k])
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
        if GATED:
            up_w = weight_desc.load([num_outputs + output, k])
            up = tl.dot(x, tl.trans(up_w.to(x.dtype)), up, input_precision="ieee")
    return acc, up, squares


@triton.jit
def _weighed_tile(x_desc, norm_weight, squares, token, k, K: tl.constexpr, BLOCK_K: tl.constexpr,
                  NORM: tl.constexpr):  # fmt: skip
    """Inputs k … k + BLOCK_K of some tokens; if NORM times its weight, and their squares added."""
    x = x_desc.load([token, k])
    if NORM:
        ks = k + tl.arange(0, BLOCK_K)
        factors = tl.load(norm_weight + ks, ks < K, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        x = (wide * factors[None, :]).to(x.dtype)
    return x, squares


@triton.jit
def _normed(acc, up, squares, K: tl.constexpr, eps):
    """Products times the scale that the norm gives each token."""
    scale = tl.rsqrt(squares / K + eps)[:, None]
    return acc * scale, up * scale


@triton.jit
def _sum_parts(parts, lanes, present, SPLITS: tl.constexpr, PART: tl.constexpr):
    """In the order of the splits, whichever came last."""
    total = tl.load(parts + lanes, present, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * PART + lanes, present, other=0.0, cache_modifier=".cg")
    return total


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that every launch leaves at zero. Launches of one stream may share them."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def beats_cublas(num_tokens: int, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether `skinny_linear` is the faster one, as measured on an H100 and an H200.

    With several tokens it needs the copy engine, and so rows of whole 16 bytes.
    """
    if num_tokens == 1:
        return True
    is_whole = weight.stride(0) * weight.itemsize % 16 == 0
    if num_tokens > MAX_TOKENS or not (is_whole and has_tensor_memory_accelerator(weight.device)):
        return False
    if weight.itemsize == 1:
        is_wide = gated and weight.numel() >= 2**26
        return num_tokens <= MAX_FP8_TOKENS and not is_wide
    if num_tokens <= 16:
        return num_tokens <= 8 or weight.numel() < 2**25
    # More tokens: layers that are read in a few µs, where launches and their gaps weigh most.
    is_small = weight.numel() < 2**23 and weight.itemsize == 2
    return is_small and not (gated and num_tokens > 64)


def can_norm(x: Tensor) -> bool:
    """Whether `skinny_linear` takes a norm along. Weighed before they are scaled, the inputs of
    several tokens might leave the range of float16; of many, a norm of its own is faster."""
    return len(x) == 1 or (len(x) <= 16 and x.dtype != torch.float16)


def tile_for(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Measured on an H200 with the layers of Qwen3-0.6B and 8B (benchmarks/gpu_kernels.py)."""
    if num_tokens == 1:
        block_k = 1024 if num_inputs <= 1024 else 2048
        warps = 8 if num_inputs <= 4096 else 4
        return Tile(8192 // block_k, block_k, -(-num_inputs // block_k), warps)
    size = num_outputs * num_inputs
    if num_tokens <= 16 and size < 2**23:
        # All programs fit on the device at once, so each has its weights on the way at once.
        return Tile(64, 256 if num_inputs <= 1024 else 512, 1, warps=4, stages=2)
    if num_tokens <= 16:
        return Tile(32 if gated else 64, 512, 2, warps=4, stages=3 if gated else 2)
    return _tile_for_many(num_tokens, num_outputs, num_inputs, gated=gated)


def _tile_for_many(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Of 17 to 128 tokens, measured on an H100 as a chain of Qwen3-0.6B's layers."""
    if gated and num_tokens <= 32:
        return Tile(64, 256, 1, warps=4, stages=2)
    if gated:
        return Tile(32, 128, triton.cdiv(num_inputs, 128), warps=4, stages=5)
    if num_tokens <= 32 and num_inputs <= 1024:
        return Tile(32, 256, triton.cdiv(num_inputs, 256), warps=4, stages=3)
    num_m = triton.cdiv(num_tokens, 64)
    if num_m * triton.cdiv(num_outputs, 32) * triton.cdiv(num_inputs, 1024) <= FULL:
        return Tile(32, 1024, 1, warps=4, stages=2)
    block_n, stages = (64, 4) if num_outputs > num_inputs else (32, 5)
    # More splits would spend the time they save on adding up.
    splits = max(1, FULL // (num_m * triton.cdiv(num_outputs, block_n)))
    return Tile(block_n, 128, triton.cdiv(num_inputs, 128 * splits), warps=4, stages=stages)


def fp8_tile_for(num_tokens: int, num_outputs: int, num_inputs: int, *, gated: bool) -> Tile:
    """Measured on an H100 with the same layers."""
    if num_tokens > 1:
        if num_inputs > 8192:
            return Tile(64, 256, 8, warps=4, stages=4)
        return Tile(32, 512, 1, warps=4, stages=2)
    if num_inputs > 4096:
        return Tile(8, 1024, -(-num_inputs // 1024), warps=4)
    block_k = triton.next_power_of_2(num_inputs)
    return Tile(8 if block_k <= 1024 else 4, block_k, 1, warps=8)


def skinny_linear(
    x: Tensor,
    linear: Linear,
    *,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """linear(x) + residual for up to 128 tokens, [num_tokens, num_outputs].

    x: [num_tokens, num_inputs]. Weights may be FP8 with their scales; x is multiplied as it is.
    norm: RMSNorm weight and eps, applied to x first (`can_norm`). gated: the layer's outputs are
    gates, then ups, and the result is silu(gate) * up. Sums are fp32 in an order fixed by the
    shapes.
    """
    weight, bias, scale = linear.weight, linear.bias, linear.scale
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    assert num_tokens <= MAX_TOKENS and x.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    assert norm is None or can_norm(x)
    choose = tile_for if scale is None else fp8_tile_for
    tile = tile or choose(num_tokens, num_outputs, num_inputs, gated=gated)
    out = x.new_empty(num_tokens, num_outputs)
    # `out` stands for tensors a kernel will not touch.
    extras = [out if t is None else t for t in (scale, bias, residual)]
    options = {
        "GATED": gated, "SCALE": scale is not None, "BIAS": bias is not None,
        "RESIDUAL": residual is not None, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "STAGES": tile.stages, "num_warps": tile.warps, **launch_options(x.device),
    }  # fmt: skip
    num_n = triton.cdiv(num_outputs, tile.block_n)
    norm_weight, eps = norm or (out, 0.0)
    options["NORM"] = norm is not None
    if num_tokens == 1:
        _vector_kernel[(num_n,)](
            x, weight, *extras, norm_weight, out, num_outputs, eps,
            K=num_inputs, NORM_BLOCK=triton.next_power_of_2(num_inputs), **options,
        )  # fmt: skip
        return out
    splits = triton.cdiv(num_inputs, tile.block_k * tile.num_tiles)
    block_m = min(max(16, triton.next_power_of_2(num_tokens)), tile.block_m)
    num_m = triton.cdiv(num_tokens, block_m)
    assert num_n * num_m <= MAX_TILES
    parts = num_n * num_m * splits * ((1 + gated) * tile.block_n + 1) * block_m if splits > 1 else 0
    _matrix_kernel[(num_n, splits, num_m)](
        TensorDescriptor.from_tensor(x, [block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        *extras, norm_weight, out,
        torch.empty(parts, dtype=torch.float32, device=x.device), _arrivals(x.device),
        num_tokens, num_outputs, eps,
        K=num_inputs, NUM_TILES=tile.num_tiles, SPLITS=splits, BLOCK_M=block_m, **options,
    )  # fmt: skip
    return out
