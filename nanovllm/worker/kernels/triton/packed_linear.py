"""Products with packed weights of 4 and 8 bits (`quant.packed`), which are unpacked in registers.

`products` calls `packed_linear` and `packed_add`, and of very many tokens multiplies by what
`unpacked` writes. As in `skinny_linear`, gate, residual and norms ride along, and weights are on
their way before the kernel before has ended.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.checkpoint.quantization import SUPER_GROUP as _SUPER_GROUP
from nanovllm.worker.kernels.base import Stream
from nanovllm.worker.kernels.triton.e4m3 import widened
from nanovllm.worker.kernels.triton.launch import (
    MAX_ARRIVALS,
    arrival_counters,
    converts_fp8,
    launch_options,
    num_multiprocessors,
)
from nanovllm.worker.kernels.triton.skinny_linear import (
    MAX_WEIGHED_TOKENS,
    empty_stream,
    finish,
    finish_split,
    load_squares,
    scaled_by_norm,
)
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.packed import HALF, MIDDLE, UNIT, Packed, PackedWeight

MIN_GROUP = {4: UNIT, 8: HALF}  # of 4 bits the halves of a unit share scales
SUPER_GROUP = tl.constexpr(_SUPER_GROUP)


@dataclass(frozen=True, slots=True)
class PackedTile:
    """What a program computes: block_n outputs over block_k inputs at a time, of block_m tokens.

    splits: programs that share out the inputs of one output; more than one only of several tokens.
    """

    block_n: int
    block_k: int
    warps: int
    splits: int = 1
    stages: int = 3
    block_m: int = 1


@triton.jit
def _load_tile(weight, outputs, k, num_rows, K: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Codes [outputs, bytes], and scale, zero and shift of their groups, [outputs, groups].

    weight: the tensors of a `PackedWeight`; after the first two perhaps None.
    """
    codes, scale, zero, shift, super_scale, super_shift = weight
    PER_BYTE: tl.constexpr = 8 // BITS  # noqa: N806
    WIDTH: tl.constexpr = tl.cdiv(K, 32) * 16 if BITS == 4 else K  # noqa: N806  # bytes of a row
    GROUPS: tl.constexpr = tl.cdiv(K, GROUP)  # noqa: N806
    real = (outputs < num_rows)[:, None]
    rows = outputs.to(tl.int64)[:, None]
    columns = (k // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE))[None, :]
    loaded = tl.load(codes + rows * WIDTH + columns, real & (columns < WIDTH), other=0.0)
    groups = (k // GROUP + tl.arange(0, max(1, BLOCK_K // GROUP)))[None, :]
    places, inside = rows * GROUPS + groups, real & (groups < GROUPS)
    scales = tl.load(scale + places, inside, other=0.0).to(tl.float32)
    if super_scale is not None:
        SUPERS: tl.constexpr = tl.cdiv(K, SUPER_GROUP)  # noqa: N806
        wholes = rows * SUPERS + groups // (SUPER_GROUP // GROUP)
        scales *= tl.load(super_scale + wholes, inside, other=0.0).to(tl.float32)
    zeros = scales
    if zero is not None:
        zeros = tl.load(zero + places, inside, other=0).to(tl.float32)
    shifts = scales
    if shift is not None:
        shifts = tl.load(shift + places, inside, other=0.0).to(tl.float32)
        if super_shift is not None:
            shifts *= tl.load(super_shift + wholes, inside, other=0.0).to(tl.float32)
    return loaded, scales, zeros, shifts


@triton.jit
def _less_zero(numbers, zeros, HAS_ZERO: tl.constexpr, MIDDLE: tl.constexpr):
    """numbers: codes [outputs, groups, codes of a group] in fp32."""
    if HAS_ZERO:
        numbers = numbers - zeros[:, :, None]
    elif MIDDLE > 0:
        numbers = numbers - MIDDLE
    return numbers


@triton.jit
def _unpack(codes, scales, zeros, shifts, HAS_ZERO: tl.constexpr, HAS_SHIFT: tl.constexpr,
            MIDDLE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Codes [outputs, width], or one of their halves, as weights of that type."""
    N: tl.constexpr = codes.shape[0]  # noqa: N806
    WIDTH: tl.constexpr = codes.shape[1]  # noqa: N806
    GROUPS: tl.constexpr = scales.shape[1]  # noqa: N806
    numbers = tl.reshape(widened(codes, tl.float32), [N, GROUPS, WIDTH // GROUPS])
    numbers = _less_zero(numbers, zeros, HAS_ZERO, MIDDLE) * scales[:, :, None]
    if HAS_SHIFT:
        numbers = numbers + shifts[:, :, None]
    return tl.reshape(numbers, [N, WIDTH]).to(DTYPE)


@triton.jit
def _columns(k, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inputs that codes meet: of 4 bits those of the lower halves; the upper ones' follow 16
    behind."""
    if BITS == 4:
        lanes = tl.arange(0, BLOCK_K // 2)
        found = k + lanes // 16 * 32 + lanes % 16
    else:
        found = k + tl.arange(0, BLOCK_K)
    return found


@triton.jit
def _sum_in_groups(products, GROUPS: tl.constexpr):
    """[outputs, width] → [outputs, groups]."""
    WIDTH: tl.constexpr = products.shape[1]  # noqa: N806
    parts = tl.reshape(products, [products.shape[0], GROUPS, WIDTH // GROUPS])
    return tl.sum(parts, 2)


@triton.jit
def _dot_one(tile, x, columns, K: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
             HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr):  # fmt: skip
    """Products of a tile with one token, summed in groups: [outputs, groups] fp32."""
    codes, scales, zeros, shifts = tile
    GROUPS: tl.constexpr = scales.shape[1]  # noqa: N806
    inputs = tl.load(x + columns, columns < K, other=0.0).to(tl.float32)[None, :]
    if BITS == 4:
        others = tl.load(x + columns + 16, columns + 16 < K, other=0.0).to(tl.float32)[None, :]
        products = (codes & 15).to(tl.float32) * inputs + (codes >> 4).to(tl.float32) * others
        inputs = inputs + others
    else:
        products = widened(codes, tl.float32) * inputs
    sums = _sum_in_groups(products, GROUPS)
    if HAS_ZERO:
        sums = sums - zeros * _sum_in_groups(inputs, GROUPS)
    elif MIDDLE > 0:
        sums = sums - MIDDLE * _sum_in_groups(inputs, GROUPS)
    sums = sums * scales
    if HAS_SHIFT:
        sums = sums + shifts * _sum_in_groups(inputs, GROUPS)
    return sums


@triton.jit
def _packed_vector_kernel(
    x,  # [K]
    codes,  # [rows, bytes]: num_outputs rows; if GATED gates, then as many ups
    scale,  # [rows, groups]
    zero,  # like scale, or None
    shift,  # like scale, or None
    super_scale, super_shift,  # [rows, super groups], or None
    bias, residual, squares, next_weight, out, weighed, next_squares,  # as in `skinny_linear`
    num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: products and sums in fp32, without tensor cores."""
    if PDL:
        gdc_launch_dependents()
    weight = (codes, scale, zero, shift, super_scale, super_shift)
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    HAS_SHIFT: tl.constexpr = shift is not None  # noqa: N806
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the gates are ups, and past those nothing is stored.
    tile = _load_tile(weight, outputs, 0, num_outputs, K, BITS, GROUP, BLOCK_K)
    if GATED:
        ups = outputs + num_outputs
        up_tile = _load_tile(weight, ups, 0, 2 * num_outputs, K, BITS, GROUP, BLOCK_K)
    if PDL:
        gdc_wait()
    tokens = tl.arange(0, 1)
    if squares is not None:
        parts = load_squares(squares, tokens, 1, PARTS)
    columns = _columns(0, BITS, BLOCK_K)
    acc = _dot_one(tile, x, columns, K, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
    up = acc
    if GATED:
        up = _dot_one(up_tile, x, columns, K, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
    for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        columns = _columns(k, BITS, BLOCK_K)
        tile = _load_tile(weight, outputs, k, num_outputs, K, BITS, GROUP, BLOCK_K)
        acc += _dot_one(tile, x, columns, K, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
        if GATED:
            tile = _load_tile(weight, ups, k, 2 * num_outputs, K, BITS, GROUP, BLOCK_K)
            up += _dot_one(tile, x, columns, K, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
    acc, up = tl.sum(acc, 1)[None, :], tl.sum(up, 1)[None, :]
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish(acc, up, None, bias, residual, next_weight, out, weighed, next_squares,
           tokens, outputs, 1, num_outputs, GATED)  # fmt: skip


@triton.jit
def _add_dot(acc, tile, low_x, high_x, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
             HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr):  # fmt: skip
    """acc + w · xᵀ, [outputs, tokens]: weights come from registers, tokens from shared memory."""
    codes, scales, zeros, shifts = tile
    if BITS == 4:
        low = _unpack(codes & 15, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, low_x.dtype)
        acc = tl.dot(low, tl.trans(low_x), acc, input_precision="ieee")
        high = _unpack(codes >> 4, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, low_x.dtype)
        acc = tl.dot(high, tl.trans(high_x), acc, input_precision="ieee")
    else:
        low = _unpack(codes, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, low_x.dtype)
        acc = tl.dot(low, tl.trans(low_x), acc, input_precision="ieee")
    return acc


@triton.jit
def _load_tokens(x, tokens, columns, num_tokens, K: tl.constexpr):
    """[tokens, columns], zero where there is none."""
    real = (tokens < num_tokens)[:, None] & (columns < K)[None, :]
    return tl.load(x + tokens.to(tl.int64)[:, None] * K + columns[None, :], real, other=0.0)


@triton.jit
def _packed_matrix_kernel(
    x,  # [num_tokens, K]
    codes, scale, zero, shift, super_scale, super_shift,  # as in _packed_vector_kernel
    bias, residual, squares, next_weight, out, weighed, next_squares,  # as in `skinny_linear`
    partial, arrivals,
    num_tokens, num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    MIDDLE: tl.constexpr, NUM_TILES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens a program; programs of one output tile share out K, the last one adds up."""
    if PDL:
        gdc_launch_dependents()
    weight = (codes, scale, zero, shift, super_scale, super_shift)
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    HAS_SHIFT: tl.constexpr = shift is not None  # noqa: N806
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (NUM_TILES * BLOCK_K)
    ups = outputs + num_outputs
    if PDL:
        gdc_wait()
    if squares is not None:  # on their way while the products are made
        parts = load_squares(squares, tokens, num_tokens, PARTS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = acc
    for step in tl.range(0, NUM_TILES, num_stages=STAGES):
        k = first + step * BLOCK_K
        columns = _columns(k, BITS, BLOCK_K)
        low_x = _load_tokens(x, tokens, columns, num_tokens, K)
        high_x = low_x
        if BITS == 4:
            high_x = _load_tokens(x, tokens, columns + 16, num_tokens, K)
        tile = _load_tile(weight, outputs, k, num_outputs, K, BITS, GROUP, BLOCK_K)
        acc = _add_dot(acc, tile, low_x, high_x, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
        if GATED:
            tile = _load_tile(weight, ups, k, 2 * num_outputs, K, BITS, GROUP, BLOCK_K)
            up = _add_dot(up, tile, low_x, high_x, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
    acc = tl.trans(acc)
    up = tl.trans(up) if GATED else acc
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish_split(acc, up, None, bias, residual, next_weight, out, weighed, next_squares,
                 partial, arrivals, tokens, outputs, num_tokens, num_outputs, SPLITS, BLOCK_M,
                 BLOCK_N, GATED)  # fmt: skip


@triton.jit
def _unpack_kernel(
    codes, scale, zero, shift, super_scale, super_shift,  # as in _packed_vector_kernel
    out,  # [num_outputs, K]
    num_outputs,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program writes a tile of the weight as it is multiplied."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # what reads `out` may still run
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    HAS_SHIFT: tl.constexpr = shift is not None  # noqa: N806
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    weight = (codes, scale, zero, shift, super_scale, super_shift)
    dtype = out.dtype.element_ty
    loaded, scales, zeros, shifts = _load_tile(
        weight, outputs, k, num_outputs, K, BITS, GROUP, BLOCK_K
    )
    columns = _columns(k, BITS, BLOCK_K)[None, :]
    places = out + outputs.to(tl.int64)[:, None] * K + columns
    real = (outputs < num_outputs)[:, None]
    if BITS == 4:
        low = _unpack(loaded & 15, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(places, low, real & (columns < K))
        high = _unpack(loaded >> 4, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(places + 16, high, real & (columns + 16 < K))
    else:
        low = _unpack(loaded, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(places, low, real & (columns < K))


def can_multiply(weight: PackedWeight) -> bool:
    """Whether these kernels read such groups, on the device of the weight."""
    if weight.codes.dtype == torch.float8_e4m3fn and not converts_fp8(weight.codes.device):
        return False
    return weight.scale.shape[1] == 1 or (
        weight.group >= MIN_GROUP[weight.bits]
        and weight.group == triton.next_power_of_2(weight.group)
    )


def tile_for(num_tokens: int, num_outputs: int, weight: PackedWeight, *, gated: bool) -> PackedTile:
    """Cut so that a program has some KiB of weights on the way, and all programs fill a GPU."""
    inputs, bits = weight.inputs, weight.bits
    if num_tokens == 1:
        block_k = min(max(32, triton.next_power_of_2(inputs)), 8192 // bits * 2)
        block_n = max(1, 65536 // bits // block_k) // (2 if gated else 1)
        return PackedTile(max(1, block_n), block_k, warps=4)
    block_k = 128 if inputs > 64 else 64
    block_m = min(max(16, triton.next_power_of_2(num_tokens)), 128)
    is_wide = block_m > 64 and not gated
    block_n = 128 if is_wide and num_outputs * triton.cdiv(num_tokens, block_m) >= 2**14 else 64
    warps = 8 if is_wide else 4
    num_programs = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_tokens, block_m)
    at_once = num_multiprocessors(weight.codes.device) * (1 if is_wide else 2)
    room = at_once // max(1, num_programs)
    splits = max(1, min(room, triton.cdiv(inputs, 4 * block_k), 8))
    return PackedTile(block_n, block_k, warps, splits, 3, block_m)


def packed_linear(
    x: Tensor,
    linear: Linear,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    tile: PackedTile | None = None,
) -> Tensor:
    """As `skinny_linear`, for any number of tokens. x: inputs as columns of the weight lie."""
    return _launch(x, linear, None, norm=norm, next_norm=None, gated=gated, tile=tile).hidden


def packed_add(
    x: Tensor,
    linear: Linear,
    stream: Tensor,
    *,
    next_norm: Tensor | None = None,
    tile: PackedTile | None = None,
) -> Stream:
    """As `skinny_add`, for any number of tokens."""
    if len(x) > MAX_WEIGHED_TOKENS or x.dtype == torch.float16:
        next_norm = None
    return _launch(x, linear, stream, norm=None, next_norm=next_norm, gated=False, tile=tile)


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix in new memory, [outputs, inputs]."""
    outputs, inputs = len(weight.codes), weight.inputs
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.codes.device)
    block_n, block_k = 16, 256
    _unpack_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(inputs, block_k))](
        *_pointers(weight), out, outputs,
        K=inputs, BLOCK_N=block_n, BLOCK_K=block_k, **_format(weight),
        num_warps=4, **launch_options(out.device),
    )  # fmt: skip
    return out


def _pointers(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    nested = weight.super_scale, weight.super_shift
    return weight.codes, weight.scale, weight.zero, weight.shift, *nested


def _format(weight: PackedWeight) -> dict[str, Any]:
    """What kernels are compiled by."""
    plain = weight.bits == 4 and weight.zero is None and weight.shift is None
    is_single = weight.scale.shape[1] == 1  # a group of any size, made one that tiles divide
    group = max(8192, triton.next_power_of_2(weight.inputs)) if is_single else weight.group
    return {"BITS": weight.bits, "GROUP": group, "MIDDLE": MIDDLE if plain else 0}


def _launch(
    x: Tensor,
    linear: Linear,
    residual: Tensor | None,
    *,
    norm: tuple[Tensor, float] | None,
    next_norm: Tensor | None,
    gated: bool,
    tile: PackedTile | None,
) -> Stream:
    """Either product, in new memory."""
    weight = cast(Packed, linear.method).weight
    num_tokens, num_inputs = x.shape
    num_outputs = len(weight.codes) // 2 if gated else len(weight.codes)
    assert x.is_contiguous() and weight.codes.is_contiguous() and weight.scale.is_contiguous()
    assert residual is None or residual.is_contiguous()
    tile = tile or tile_for(num_tokens, num_outputs, weight, gated=gated)
    num_n = triton.cdiv(num_outputs, tile.block_n)
    squares, eps = norm or (None, 0.0)
    stream = empty_stream(x, num_outputs, num_parts=None if next_norm is None else num_n)
    left = stream.weighed or (None, None)
    tensors = (*_pointers(weight), linear.bias, residual, squares, next_norm, stream.hidden, *left)
    options = {
        "K": num_inputs, "PARTS": 0 if squares is None else squares.shape[1], "GATED": gated,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "num_warps": tile.warps, **_format(weight), **launch_options(x.device),
    }  # fmt: skip
    if num_tokens == 1:
        _packed_vector_kernel[(num_n,)](x, *tensors, num_outputs, eps, **options)
        return stream
    num_tiles = triton.cdiv(triton.cdiv(num_inputs, tile.block_k), tile.splits)
    splits = triton.cdiv(num_inputs, tile.block_k * num_tiles)
    num_m = triton.cdiv(num_tokens, tile.block_m)
    assert splits == 1 or num_n * num_m <= MAX_ARRIVALS
    size = num_n * num_m * splits * (1 + gated) * tile.block_n * tile.block_m if splits > 1 else 0
    _packed_matrix_kernel[(num_n, splits, num_m)](
        x, *tensors, x.new_empty(size, dtype=torch.float32), arrival_counters(x.device),
        num_tokens, num_outputs, eps,
        NUM_TILES=num_tiles, SPLITS=splits, BLOCK_M=tile.block_m, **options,
    )  # fmt: skip
    return stream
