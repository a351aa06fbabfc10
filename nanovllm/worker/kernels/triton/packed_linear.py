"""Products with packed weights of 4 and 8 bits (`quant.packed`), which are unpacked in registers.

`products` calls `packed_linear` and `packed_add`, and of many tokens multiplies by what
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
from nanovllm.checkpoint.spec import Activation
from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.triton.e4m3 import LEAST_PEAK, widened
from nanovllm.worker.kernels.triton.launch import (
    INTERPRETED,
    MAX_ARRIVALS,
    arrival_counters,
    converts_fp8,
    has_tensor_memory_accelerator,
    launch_options,
    num_multiprocessors,
)
from nanovllm.worker.kernels.triton.skinny_linear import (
    can_weigh,
    finish,
    finish_split,
    load_squares,
    operands,
    scaled_by_norm,
)
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.quant.packed import HALF, MIDDLE, UNIT, Packed, PackedWeight

MIN_GROUP = {4: UNIT, 8: HALF}  # of 4 bits the halves of a unit share scales
MIN_WHOLE_GROUP = 64
MAX_SCALED_SUMS = 32  # tokens; of more, weights get their scales
MIN_HEAD = 2**15  # outputs: of a head, or as many
FEW_OUTPUTS = 4096  # are fewer than programs of a few rows need to fill a GPU
MOST_FIXED = tl.constexpr(32767.0)
MAX_STAGED_BYTES = 96 * 2**10  # of shared memory; an Ada has 99 KiB of it for a program
SUPER_GROUP = tl.constexpr(_SUPER_GROUP)
# By how much codes are too large that are put into the mantissa of a power of two.
_BASES = {
    (torch.uint8, torch.bfloat16): 128,
    (torch.uint8, torch.float16): 1024,
    (torch.int8, torch.float16): 1024 + 128,
}


@dataclass(frozen=True, slots=True)
class PackedTile:
    """What a program computes: block_n outputs over block_k inputs at a time, of block_m tokens.

    splits: programs that share out the inputs of one output; more than one only of several tokens.
    ahead: tiles of one token's product that a program has on the way before it multiplies by any.
    scales_sums: whether sums over a group get its scale where they can, instead of each weight.
    """

    block_n: int
    block_k: int
    warps: int
    splits: int = 1
    stages: int = 3
    block_m: int = 1
    scales_sums: bool = True
    ahead: int = 1


@triton.jit
def _load_scales(weight, rows, real, k, K: tl.constexpr, GROUP: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """Scale, zero and shift of the groups of a tile, [outputs, groups] fp32.

    rows: [outputs, 1], like real. weight: the tensors of a `PackedWeight`; after the first two
    perhaps None.
    """
    scale, zero, shift = weight[1], weight[2], weight[3]
    super_scale, super_shift = weight[4], weight[5]
    GROUPS: tl.constexpr = tl.cdiv(K, GROUP)  # noqa: N806
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
    return scales, zeros, shifts


@triton.jit
def _load_tile(weight, outputs, k, num_rows, K: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Codes [outputs, bytes], and scale, zero and shift of their groups."""
    codes = weight[0]
    PER_BYTE: tl.constexpr = 8 // BITS  # noqa: N806
    WIDTH: tl.constexpr = tl.cdiv(K, 32) * 16 if BITS == 4 else K  # noqa: N806  # bytes of a row
    real = (outputs < num_rows)[:, None]
    rows = outputs.to(tl.int64)[:, None]
    columns = (k // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE))[None, :]
    loaded = tl.load(codes + rows * WIDTH + columns, real & (columns < WIDTH), other=0.0)
    scales, zeros, shifts = _load_scales(weight, rows, real, k, K, GROUP, BLOCK_K)
    return loaded, scales, zeros, shifts


@triton.jit
def _load_row(weight, output, k, num_rows, K: tl.constexpr, BITS: tl.constexpr,
              GROUP: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Codes of one output, [groups, bytes of a group], and scale, zero and shift of each group."""
    codes = weight[0]
    PER_BYTE: tl.constexpr = 8 // BITS  # noqa: N806
    WIDTH: tl.constexpr = tl.cdiv(K, 32) * 16 if BITS == 4 else K  # noqa: N806  # bytes of a row
    LANES: tl.constexpr = min(GROUP, BLOCK_K) // PER_BYTE  # noqa: N806
    row = output.to(tl.int64)
    columns = (
        k // PER_BYTE
        + tl.arange(0, BLOCK_K // PER_BYTE // LANES)[:, None] * LANES
        + tl.arange(0, LANES)[None, :]
    )
    inside = (output < num_rows) & (columns < WIDTH)
    loaded = tl.load(codes + row * WIDTH + columns, inside, other=0.0)
    rows = row + tl.zeros([1, 1], tl.int64)
    scales, zeros, shifts = _load_scales(weight, rows, rows < num_rows, k, K, GROUP, BLOCK_K)
    return loaded, scales, zeros, shifts


@triton.jit
def _load_rows(weight, first, k, num_rows, K: tl.constexpr, BITS: tl.constexpr,
               GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tuple of `_load_row`s, so that each meets the same registers of inputs."""
    rows = ()
    for i in tl.static_range(BLOCK_N):
        rows = rows + (_load_row(weight, first + i, k, num_rows, K, BITS, GROUP, BLOCK_K),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def _load_ahead(weight, first, num_rows, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """`_load_rows` of each of the first tiles, so many as are on the way at once."""
    tiles = ()
    for i in tl.static_range(AHEAD):
        rows = _load_rows(weight, first, i * BLOCK_K, num_rows, K, BITS, GROUP, BLOCK_N, BLOCK_K)
        tiles = tiles + (rows,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


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
def _unpack_pairs(codes, scales, zeros, shifts, HAS_ZERO: tl.constexpr, HAS_SHIFT: tl.constexpr,
                  MIDDLE: tl.constexpr, BASE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The same by arithmetic in DTYPE, a half precision, on two codes at a time, which are exact
    before they get their scales. Of 4 bits codes are bytes, of which both halves return."""
    N: tl.constexpr = codes.shape[0]  # noqa: N806
    WIDTH: tl.constexpr = codes.shape[1]  # noqa: N806
    GROUPS: tl.constexpr = scales.shape[1]  # noqa: N806
    SHAPE: tl.constexpr = (N, GROUPS, WIDTH // GROUPS)  # noqa: N806
    grouped = tl.reshape(codes, SHAPE)
    less = tl.full([N, GROUPS], -(MIDDLE + BASE), tl.float32)
    if HAS_ZERO:
        less = -(zeros + BASE)
    more = tl.full([N, GROUPS], -0.0, tl.float32)
    if HAS_SHIFT:
        more = shifts
    less = tl.broadcast_to(less.to(DTYPE)[:, :, None], SHAPE)
    more = tl.broadcast_to(more.to(DTYPE)[:, :, None], SHAPE)
    scales = tl.broadcast_to(scales.to(DTYPE)[:, :, None], SHAPE)
    low, high = _scaled_pairs(grouped, less, scales, more, DTYPE)
    return tl.reshape(low, [N, WIDTH]), tl.reshape(high, [N, WIDTH])


@triton.jit
def halves_joined(low, high):
    """Of what lower and upper halves of bytes hold, [outputs, width], one after the other."""
    N: tl.constexpr = low.shape[0]  # noqa: N806
    WIDTH: tl.constexpr = low.shape[1]  # noqa: N806
    UNITS: tl.constexpr = (N, WIDTH // 16, 16)  # noqa: N806
    both = tl.join(tl.reshape(low, UNITS), tl.reshape(high, UNITS))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [N, 2 * WIDTH])


@triton.jit
def _scaled_pairs(codes, less, scales, more, DTYPE: tl.constexpr):
    """(number + less) * scales + more, of the numbers that `_numbers` tells of."""
    WIDE: tl.constexpr = tl.bfloat16 == DTYPE  # noqa: N806
    FMA: tl.constexpr = "fma.rn.bf16x2 " if WIDE else "fma.rn.f16x2 "  # noqa: N806
    ONE: tl.constexpr = "0x3f803f80" if WIDE else "0x3c003c00"  # noqa: N806
    if codes.dtype == tl.uint8:
        MAGIC: tl.constexpr = "0x43004300" if WIDE else "0x64006400"  # noqa: N806
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c; prmt.b32 a, $2, 0, 0x4140; shr.b32 b, a, 4; "
            "lop3.b32 a, a, 0x000f000f, " + MAGIC + ", 0xEA; "
            "lop3.b32 b, b, 0x000f000f, " + MAGIC + ", 0xEA; mov.b32 c, " + ONE + "; "
            + FMA + "a, a, c, $3; " + FMA + "b, b, c, $3; "
            + FMA + "$0, a, $4, $5; " + FMA + "$1, b, $4, $5; }",
            "=&r,=&r,r,r,r,r", [codes, less, scales, more],
            dtype=(less.dtype, less.dtype), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        if codes.dtype == tl.float8e4nv:
            codes = codes.to(tl.uint8, bitcast=True)
            SHIFT: tl.constexpr = "4" if WIDE else "1"  # noqa: N806
            MASK: tl.constexpr = "0x07f007f0" if WIDE else "0x3f803f80"  # noqa: N806
            POWER: tl.constexpr = "0x7b807b80" if WIDE else "0x5c005c00"  # noqa: N806
            BODY: tl.constexpr = (  # noqa: N806
                "prmt.b32 a, $1, 0, 0x1404; shr.b32 b, a, " + SHIFT + "; and.b32 b, b, " + MASK
                + "; lop3.b32 a, a, 0x80008000, b, 0xEA; mov.b32 c, " + POWER + "; "
            )  # fmt: skip
        elif WIDE:
            BODY: tl.constexpr = (  # type: ignore[no-redef]  # noqa: N806
                "prmt.b32 a, $1, 0, 0x4140; lop3.b32 b, a, 0x00800080, 0xc300c300, 0xEA; "
                "lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA; mov.b32 c, 0x3f803f80; "
                "fma.rn.bf16x2 a, a, c, b; "
            )  # fmt: skip
        else:
            BODY: tl.constexpr = (  # type: ignore[no-redef]  # noqa: N806
                "prmt.b32 a, $1, 0, 0x4140; lop3.b32 a, a, 0x00800080, 0x64006400, 0xBE; "
                "mov.b32 c, 0x3c003c00; "
            )  # fmt: skip
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c; " + BODY + FMA + "a, a, c, $2; " + FMA + "$0, a, $3, $4; }",
            "=&r,r,r,r,r", [codes, less, scales, more], dtype=less.dtype, is_pure=True,
            pack=2,
        )  # fmt: skip
        high = low
    return low, high


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
def _load_inputs(x, k, K: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr,
                 NUM_GROUPS: tl.constexpr):  # fmt: skip
    """One token's inputs in fp32 as codes lie, [groups, lanes]: of 4 bits those of the lower
    halves, and those of the upper ones, which follow 16 behind; and their sums, [1, groups]."""
    lanes = tl.arange(0, LANES)
    if BITS == 4:
        lanes = lanes // 16 * 32 + lanes % 16
    columns = k + (tl.arange(0, NUM_GROUPS) * (LANES * (8 // BITS)))[:, None] + lanes[None, :]
    inputs = tl.load(x + columns, columns < K, other=0.0).to(tl.float32)
    others, both = inputs, inputs
    if BITS == 4:
        others = tl.load(x + columns + 16, columns + 16 < K, other=0.0).to(tl.float32)
        both = inputs + others
    return inputs, others, tl.sum(both, 1)[None, :]


@triton.jit
def _in_parts(each, PART: tl.constexpr):
    """[groups, lanes] as [groups, parts, PART lanes], which one thread has."""
    GROUPS: tl.constexpr = each.shape[0]  # noqa: N806
    return tl.reshape(each, [GROUPS, each.shape[1] // PART, PART])


@triton.jit
def _fixed(parts, times, SHAPE: tl.constexpr):
    """As 16-bit integers, [groups, lanes]: a number that small is one in the lowest bits, once it
    is added to 1.5 * 2^23."""
    shifted = parts * times + 12582912.0
    return tl.reshape(shifted.to(tl.int32, bitcast=True).to(tl.int16), SHAPE)


@triton.jit
def _fixed_inputs(inputs, BITS: tl.constexpr, PART: tl.constexpr):
    """What `_load_inputs` gives, as integers of 16 bits with a scale for each part of a group; and
    of parts, [groups, parts], the sums of integers, int32, the scale, and the sums of inputs."""
    low, high, _ = inputs
    SHAPE: tl.constexpr = low.shape  # noqa: N806
    low = _in_parts(low, PART)
    peaks, sums = tl.max(tl.abs(low), 2), tl.sum(low, 2)
    if BITS == 4:
        high = _in_parts(high, PART)
        peaks = tl.maximum(peaks, tl.max(tl.abs(high), 2))
        sums += tl.sum(high, 2)
    scales = tl.maximum(peaks, LEAST_PEAK) * (1 / MOST_FIXED)
    times = (1.0 / scales)[:, :, None]
    low = _fixed(low, times, SHAPE)
    wide, high_fixed = low.to(tl.int32), low
    if BITS == 4:
        high_fixed = _fixed(high, times, SHAPE)
        wide += high_fixed.to(tl.int32)
    # What is no number stays so, where a maximum passes over it.
    return low, high_fixed, tl.sum(_in_parts(wide, PART), 2), scales + 0.0 * sums, sums


@triton.jit
def _fixed_products(codes, low, high, BITS: tl.constexpr, FAST: tl.constexpr):
    """Of codes [groups, lanes] and the integers that they meet, int32: right once lanes are added
    up, as those of four lanes are in the first of these."""
    if FAST and BITS == 4:
        products = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; and.b32 a, $4, 0x0f0f0f0f; shr.u32 b, $4, 4; "
            "and.b32 b, b, 0x0f0f0f0f; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            "dp2a.lo.s32.u32 $0, $5, a, $1; dp2a.hi.s32.u32 $0, $6, a, $0; "
            "dp2a.lo.s32.u32 $0, $7, b, $0; dp2a.hi.s32.u32 $0, $8, b, $0; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [codes, low, high],
            dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    elif FAST:
        products = tl.inline_asm_elementwise(
            "mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            "dp2a.lo.s32.s32 $0, $5, $4, $1; dp2a.hi.s32.s32 $0, $6, $4, $0;",
            "=&r,=&r,=&r,=&r,r,r,r", [codes, low], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    elif BITS == 4:
        products = (codes & 15).to(tl.int32) * low + (codes >> 4).to(tl.int32) * high
    else:
        products = codes.to(tl.int32) * low
    return products


@triton.jit
def _dot_fixed_row(tile, inputs, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
                   HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr, FAST: tl.constexpr,
                   PART: tl.constexpr):  # fmt: skip
    """As `_dot_row`, of `_fixed_inputs`, which is exact within a part; parts are yet to be added
    up, [groups, parts]."""
    codes, scales, zeros, shifts = tile
    low, high, fixed_sums, input_scales, input_sums = inputs
    found = tl.sum(_in_parts(_fixed_products(codes, low, high, BITS, FAST), PART), 2)
    GROUPS: tl.constexpr = found.shape[0]  # noqa: N806
    if HAS_ZERO:
        found -= tl.reshape(zeros, [GROUPS, 1]).to(tl.int32) * fixed_sums
    elif MIDDLE > 0:
        found -= MIDDLE * fixed_sums
    sums = found.to(tl.float32) * (tl.reshape(scales, [GROUPS, 1]) * input_scales)
    if HAS_SHIFT:
        sums = sums + tl.reshape(shifts, [GROUPS, 1]) * input_sums
    return sums


@triton.jit
def _side_by_side(rows, NUM: tl.constexpr):
    """A tuple of NUM (1, 2, 4 or 8) tensors [groups, parts] as one, [groups * parts, NUM]."""
    if NUM == 1:
        found = rows[0]
    elif NUM == 2:
        found = tl.join(rows[0], rows[1])
    elif NUM == 4:
        found = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    else:
        first = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        second = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
        found = tl.join(first, second)
    return tl.reshape(found, [rows[0].numel, NUM])


@triton.jit
def _dot_fixed_rows(acc, tiles, inputs, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
                    HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr, FAST: tl.constexpr,
                    PART: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """acc + products of rows with one token, in parts, [groups * parts, outputs]."""
    rows = ()
    for i in tl.static_range(BLOCK_N):
        row = _dot_fixed_row(tiles[i], inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, PART)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return acc + _side_by_side(rows, BLOCK_N)


@triton.jit
def _dot_rows(acc, tiles, inputs, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
              HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr, FAST: tl.constexpr,
              FIXED: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """acc [outputs] + products of rows with one token; if FIXED as `_dot_fixed_rows`."""
    if FIXED:
        acc = _dot_fixed_rows(acc, tiles, inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, PART,
                              BLOCK_N)  # fmt: skip
    else:
        for i in tl.static_range(BLOCK_N):
            row = _dot_row(tiles[i], inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE)
            acc += tl.where(tl.arange(0, BLOCK_N) == i, row, 0.0)
    return acc


@triton.jit
def _dot_row(tile, inputs, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
             HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr):  # fmt: skip
    """The product of a row with one token, summed up in groups first."""
    codes, scales, zeros, shifts = tile
    low_x, high_x, input_sums = inputs
    if BITS == 4:
        products = (codes & 15).to(tl.float32) * low_x + (codes >> 4).to(tl.float32) * high_x
    else:
        products = widened(codes, tl.float32) * low_x
    sums = tl.sum(products, 1)[None, :]
    if HAS_ZERO:
        sums = sums - zeros * input_sums
    elif MIDDLE > 0:
        sums = sums - MIDDLE * input_sums
    sums = sums * scales
    if HAS_SHIFT:
        sums = sums + shifts * input_sums
    return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def _packed_vector_kernel(  # noqa: C901
    x,  # [K]
    codes,  # [rows, bytes]: num_outputs rows; if GATE gates, then as many ups
    scale,  # [rows, groups]
    zero,  # like scale, or None
    shift,  # like scale, or None
    super_scale, super_shift,  # [rows, super groups], or None
    bias, residual, squares, next_weight, out, weighed, next_squares,  # as in `skinny_linear`
    num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    MIDDLE: tl.constexpr, FAST: tl.constexpr, FIXED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token, without tensor cores: by integers, or (unless FIXED) in fp32. Of codes that are
    integers, inputs of half precision become such of 16 bits, which lose less than they had:
    products are then two to an instruction, and codes need not become floats."""
    if PDL:
        gdc_launch_dependents()
    weight = (codes, scale, zero, shift, super_scale, super_shift)
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    HAS_SHIFT: tl.constexpr = shift is not None  # noqa: N806
    LANES: tl.constexpr = min(GROUP, BLOCK_K) * BITS // 8  # noqa: N806
    NUM_GROUPS: tl.constexpr = max(1, BLOCK_K // GROUP)  # noqa: N806
    PART: tl.constexpr = min(16, LANES)  # noqa: N806  # bytes that a thread loads at once
    first = tl.program_id(0) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    # Rows past the gates are ups, and past those nothing is stored.
    tiles = _load_ahead(weight, first, num_outputs, K, BITS, GROUP, BLOCK_N, BLOCK_K, AHEAD)
    if GATE is not None:
        ups = _load_ahead(weight, first + num_outputs, 2 * num_outputs, K, BITS, GROUP, BLOCK_N,
                          BLOCK_K, AHEAD)  # fmt: skip
    if PDL:
        gdc_wait()
    tokens = tl.arange(0, 1)
    if squares is not None:
        parts = load_squares(squares, tokens, 1, PARTS)
    if FIXED:
        acc = tl.zeros([NUM_GROUPS * (LANES // PART), BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N], tl.float32)
    up = acc
    for i in tl.static_range(AHEAD):
        inputs = _load_inputs(x, i * BLOCK_K, K, BITS, LANES, NUM_GROUPS)
        if FIXED:
            inputs = _fixed_inputs(inputs, BITS, PART)
        acc = _dot_rows(acc, tiles[i], inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, FIXED,
                        PART, BLOCK_N)  # fmt: skip
        if GATE is not None:
            up = _dot_rows(up, ups[i], inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, FIXED,
                           PART, BLOCK_N)  # fmt: skip
    for k in tl.range(AHEAD * BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        more = _load_rows(weight, first, k, num_outputs, K, BITS, GROUP, BLOCK_N, BLOCK_K)
        inputs = _load_inputs(x, k, K, BITS, LANES, NUM_GROUPS)
        if FIXED:
            inputs = _fixed_inputs(inputs, BITS, PART)
        acc = _dot_rows(acc, more, inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, FIXED, PART,
                        BLOCK_N)  # fmt: skip
        if GATE is not None:
            more = _load_rows(weight, first + num_outputs, k, 2 * num_outputs, K, BITS, GROUP,
                              BLOCK_N, BLOCK_K)  # fmt: skip
            up = _dot_rows(up, more, inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, FAST, FIXED, PART,
                           BLOCK_N)  # fmt: skip
    if FIXED:
        acc, up = tl.sum(acc, 0), tl.sum(up, 0)
    acc, up = acc[None, :], up[None, :]
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish(acc, up, None, bias, residual, next_weight, out, weighed, next_squares, None,
           tokens, outputs, 1, num_outputs, GATE)  # fmt: skip


@triton.jit
def _add_dot(acc, codes, group, x, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
             HAS_SHIFT: tl.constexpr, MIDDLE: tl.constexpr, BASE: tl.constexpr,
             FAST: tl.constexpr, SWAPS: tl.constexpr):  # fmt: skip
    """acc + x · wᵀ, [tokens, outputs]; if SWAPS acc + w · xᵀ, [outputs, tokens]."""
    scales, zeros, shifts = group
    if FAST:
        low, high = _unpack_pairs(codes, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, BASE,
                                  x.dtype)  # fmt: skip
    elif BITS == 4:
        low = _unpack(codes & 15, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, x.dtype)
        high = _unpack(codes >> 4, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, x.dtype)
    else:
        low = _unpack(codes, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, x.dtype)
    if BITS == 4:
        low = halves_joined(low, high)
    if SWAPS:
        acc = tl.dot(low, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(low), acc, input_precision="ieee")
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
    MIDDLE: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr, SWAPS: tl.constexpr,
    NUM_TILES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
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
    real = outputs < num_outputs
    rows = outputs.to(tl.int64)
    ups = rows + num_outputs
    groups = _load_scales(weight, rows[:, None], real[:, None], first, K, GROUP, BLOCK_K)
    up_groups = groups
    if GATE is not None:
        up_groups = _load_scales(weight, ups[:, None], real[:, None], first, K, GROUP, BLOCK_K)
    if PDL:
        gdc_wait()
    if squares is not None:  # on their way while the products are made
        parts = load_squares(squares, tokens, num_tokens, PARTS)
    if SWAPS:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = acc
    for step in tl.range(0, NUM_TILES, num_stages=STAGES):
        k = first + step * BLOCK_K
        inputs = _load_tokens(x, tokens, k + tl.arange(0, BLOCK_K), num_tokens, K)
        tile = _load_codes(codes, rows, real, k, K, BITS, BLOCK_K)
        # Loads of a few bytes are not pipelined: the next groups are on their way a step before.
        more = _load_scales(weight, rows[:, None], real[:, None], k + BLOCK_K, K, GROUP, BLOCK_K)
        acc = _add_dot(acc, tile, groups, inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, BASE, FAST,
                       SWAPS)  # fmt: skip
        groups = more
        if GATE is not None:
            tile = _load_codes(codes, ups, real, k, K, BITS, BLOCK_K)
            more = _load_scales(weight, ups[:, None], real[:, None], k + BLOCK_K, K, GROUP, BLOCK_K)
            up = _add_dot(up, tile, up_groups, inputs, BITS, HAS_ZERO, HAS_SHIFT, MIDDLE, BASE,
                          FAST, SWAPS)  # fmt: skip
            up_groups = more
    if SWAPS:
        acc, up = tl.trans(acc), tl.trans(up)
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish_split(acc, up, None, bias, residual, next_weight, out, weighed, next_squares,
                 None, partial, arrivals, tokens, outputs, num_tokens, num_outputs, SPLITS, BLOCK_M,
                 BLOCK_N, GATE)  # fmt: skip


@triton.jit
def _two_at_a_time(codes, less, BODY: tl.constexpr):
    """Inline PTX on 4 codes a time: `a` and `b` get two of them each, zero-extended to 16 bits;
    BODY makes $0 of a and $3, and $1 of b and $4. less: added in the end, of the result's type."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b, c, d; prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342; "
        + BODY + " }",
        "=r,=r,r,r,r", [codes, less], dtype=less.dtype, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _numbers(codes, less, HIGH: tl.constexpr, BITS: tl.constexpr):
    """Codes [outputs, width] as numbers of the type of `less` [outputs, 1 or width], plus that.

    Integers become floats by being put into the mantissa of a power of two; `_BASES` says by how
    much they are then too large.
    """
    less = tl.broadcast_to(less, codes.shape)
    WIDE: tl.constexpr = less.dtype == tl.bfloat16  # noqa: N806
    FMA: tl.constexpr = "fma.rn.bf16x2" if WIDE else "fma.rn.f16x2"  # noqa: N806
    if codes.dtype == tl.float8e4nv:
        codes = codes.to(tl.uint8, bitcast=True)
        SHIFT: tl.constexpr = "4" if WIDE else "1"  # noqa: N806
        MASK: tl.constexpr = "0x07f007f0" if WIDE else "0x3f803f80"  # noqa: N806
        POWER: tl.constexpr = "0x7b807b80" if WIDE else "0x5c005c00"  # noqa: N806
        numbers = _two_at_a_time(
            codes, less,
            "shl.b32 a, a, 8; shl.b32 b, b, 8; "
            "shr.b32 c, a, " + SHIFT + "; shr.b32 d, b, " + SHIFT + "; "
            "and.b32 c, c, " + MASK + "; and.b32 d, d, " + MASK + "; "
            "lop3.b32 a, a, 0x80008000, c, 0xEA; lop3.b32 b, b, 0x80008000, d, 0xEA; "
            "mov.b32 c, " + POWER + "; "
            + FMA + " $0, a, c, $3; " + FMA + " $1, b, c, $4;",
        )  # fmt: skip
    elif BITS == 4:
        DOWN: tl.constexpr = "shr.b32 a, a, 4; shr.b32 b, b, 4; " if HIGH else ""  # noqa: N806
        MAGIC: tl.constexpr = "0x43004300" if WIDE else "0x64006400"  # noqa: N806
        ONE: tl.constexpr = "0x3f803f80" if WIDE else "0x3c003c00"  # noqa: N806
        numbers = _two_at_a_time(
            codes, less,
            DOWN + "lop3.b32 a, a, 0x000f000f, " + MAGIC + ", 0xEA; "
            "lop3.b32 b, b, 0x000f000f, " + MAGIC + ", 0xEA; "
            "mov.b32 c, " + ONE + "; "
            + FMA + " $0, a, c, $3; " + FMA + " $1, b, c, $4;",
        )  # fmt: skip
    elif WIDE:
        numbers = _two_at_a_time(
            codes, less,
            "lop3.b32 c, a, 0x00800080, 0xc300c300, 0xEA; "
            "lop3.b32 d, b, 0x00800080, 0xc300c300, 0xEA; "
            "lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA; "
            "lop3.b32 b, b, 0x007f007f, 0x43004300, 0xEA; "
            "{ .reg .b32 e; mov.b32 e, 0x3f803f80; "
            "fma.rn.bf16x2 a, a, e, c; fma.rn.bf16x2 b, b, e, d; "
            "fma.rn.bf16x2 $0, a, e, $3; fma.rn.bf16x2 $1, b, e, $4; }",
        )  # fmt: skip
    else:
        numbers = _two_at_a_time(
            codes, less,
            "lop3.b32 a, a, 0x00800080, 0x64006400, 0xBE; "
            "lop3.b32 b, b, 0x00800080, 0x64006400, 0xBE; "
            "mov.b32 c, 0x3c003c00; "
            "fma.rn.f16x2 $0, a, c, $3; fma.rn.f16x2 $1, b, c, $4;",
        )  # fmt: skip
    return numbers


@triton.jit
def _plain_numbers(codes, less, HIGH: tl.constexpr, BITS: tl.constexpr):
    """As `_numbers`, by what any type and the interpreter can do."""
    if BITS == 4:
        codes = codes >> 4 if HIGH else codes & 15
    return (widened(codes, tl.float32) + less.to(tl.float32)).to(less.dtype)


@triton.jit
def _load_group(scale, zero, rows, real, k, K: tl.constexpr, GROUP: tl.constexpr,
                MIDDLE: tl.constexpr):  # fmt: skip
    """Of the group of input k: scales, and how far zeros are from the middle, [outputs] fp32."""
    GROUPS: tl.constexpr = tl.cdiv(K, GROUP)  # noqa: N806
    places = rows * GROUPS + k // GROUP
    inside = real & (k < K)
    scales = tl.load(scale + places, inside, other=0.0).to(tl.float32)
    zeros = scales
    if zero is not None:
        zeros = tl.load(zero + places, inside, other=0).to(tl.float32) - MIDDLE
    return scales, zeros


@triton.jit
def _add_group(acc, codes, group, sums, low_x, high_x, BITS: tl.constexpr, LESS: tl.constexpr,
               FAST: tl.constexpr, HAS_ZERO: tl.constexpr):  # fmt: skip
    """acc + w · xᵀ, [outputs, tokens], of inputs that share their scales, which sums get."""
    scales, zeros = group
    less = tl.full([1, 1], LESS, tl.float32).to(low_x.dtype)
    if FAST:
        part = tl.dot(_numbers(codes, less, False, BITS), tl.trans(low_x))
        if BITS == 4:
            part = tl.dot(_numbers(codes, less, True, BITS), tl.trans(high_x), part)
    else:
        low = _plain_numbers(codes, less, False, BITS)
        part = tl.dot(low, tl.trans(low_x), input_precision="ieee")
        if BITS == 4:
            high = _plain_numbers(codes, less, True, BITS)
            part = tl.dot(high, tl.trans(high_x), part, input_precision="ieee")
    if HAS_ZERO:
        part -= zeros[:, None] * sums
    return acc + part * scales[:, None]


@triton.jit
def _sums_of(low_x, high_x, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """Of tokens' inputs, the same for each output, [outputs, tokens]: by tensor cores, which have
    them where they are needed."""
    ones = tl.full([BLOCK_N, low_x.shape[1]], 1.0, low_x.dtype)
    sums = tl.dot(ones, tl.trans(low_x), input_precision="ieee")
    if BITS == 4:
        sums = tl.dot(ones, tl.trans(high_x), sums, input_precision="ieee")
    return sums


@triton.jit
def _load_codes(codes, rows, real, k, K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[outputs, bytes of BLOCK_K inputs]."""
    PER_BYTE: tl.constexpr = 8 // BITS  # noqa: N806
    WIDTH: tl.constexpr = tl.cdiv(K, 32) * 16 if BITS == 4 else K  # noqa: N806  # bytes of a row
    columns = (k // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE))[None, :]
    inside = real[:, None] & (columns < WIDTH)
    return tl.load(codes + rows[:, None] * WIDTH + columns, inside, other=0.0)


@triton.jit
def _packed_group_kernel(
    x,  # [num_tokens, K]
    codes, scale, zero, shift, super_scale, super_shift,  # as in _packed_vector_kernel
    bias, residual, squares, next_weight, out, weighed, next_squares,  # as in `skinny_linear`
    partial, arrivals,
    num_tokens, num_outputs, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BASE: tl.constexpr, FAST: tl.constexpr, NUM_TILES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_packed_matrix_kernel`, of tiles that lie within a group, and without shifts."""
    if PDL:
        gdc_launch_dependents()
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (NUM_TILES * BLOCK_K)
    real = outputs < num_outputs
    rows = outputs.to(tl.int64)
    ups = rows + num_outputs
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    MIDDLE: tl.constexpr = 8 if BITS == 4 else 0  # noqa: N806
    LESS: tl.constexpr = -(BASE + MIDDLE)  # noqa: N806
    group = _load_group(scale, zero, rows, real, first, K, GROUP, MIDDLE)
    up_group = group
    if GATE is not None:
        up_group = _load_group(scale, zero, ups, real, first, K, GROUP, MIDDLE)
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
        tile = _load_codes(codes, rows, real, k, K, BITS, BLOCK_K)
        # Loads of a few bytes are not pipelined: the next group is on its way a step before.
        next_group = _load_group(scale, zero, rows, real, k + BLOCK_K, K, GROUP, MIDDLE)
        sums = acc
        if HAS_ZERO:
            sums = _sums_of(low_x, high_x, BLOCK_N, BITS)
        acc = _add_group(acc, tile, group, sums, low_x, high_x, BITS, LESS, FAST, HAS_ZERO)
        group = next_group
        if GATE is not None:
            tile = _load_codes(codes, ups, real, k, K, BITS, BLOCK_K)
            next_group = _load_group(scale, zero, ups, real, k + BLOCK_K, K, GROUP, MIDDLE)
            up = _add_group(up, tile, up_group, sums, low_x, high_x, BITS, LESS, FAST, HAS_ZERO)
            up_group = next_group
    acc = tl.trans(acc)
    up = acc if GATE is None else tl.trans(up)
    if squares is not None:
        acc, up = scaled_by_norm(acc, up, parts, K, eps)
    finish_split(acc, up, None, bias, residual, next_weight, out, weighed, next_squares,
                 None, partial, arrivals, tokens, outputs, num_tokens, num_outputs, SPLITS, BLOCK_M,
                 BLOCK_N, GATE)  # fmt: skip


@triton.jit
def _unpack_kernel(
    codes, scale, zero, shift, super_scale, super_shift,  # as in _packed_vector_kernel
    places,  # [num_rows] int64, which outputs are wanted; None: all
    out,  # [num_rows, K]
    num_outputs, num_rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program writes a tile of the weight as it is multiplied."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # what reads `out` may still run
    HAS_ZERO: tl.constexpr = zero is not None  # noqa: N806
    HAS_SHIFT: tl.constexpr = shift is not None  # noqa: N806
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = rows
    if places is not None:
        outputs = tl.load(places + rows, rows < num_rows, other=0)
    k = tl.program_id(1) * BLOCK_K
    weight = (codes, scale, zero, shift, super_scale, super_shift)
    dtype = out.dtype.element_ty
    loaded, scales, zeros, shifts = _load_tile(
        weight, outputs, k, num_outputs, K, BITS, GROUP, BLOCK_K
    )
    columns = _columns(k, BITS, BLOCK_K)[None, :]
    targets = out + rows.to(tl.int64)[:, None] * K + columns
    real = (rows < num_rows)[:, None]
    if BITS == 4:
        low = _unpack(loaded & 15, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(targets, low, real & (columns < K))
        high = _unpack(loaded >> 4, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(targets + 16, high, real & (columns + 16 < K))
    else:
        low = _unpack(loaded, scales, zeros, shifts, HAS_ZERO, HAS_SHIFT, MIDDLE, dtype)
        tl.store(targets, low, real & (columns < K))


def can_multiply(weight: PackedWeight) -> bool:
    """Whether these kernels read such groups, on the device of the weight."""
    if weight.codes.dtype == torch.float8_e4m3fn and not converts_fp8(weight.codes.device):
        return False
    return weight.scale.shape[1] == 1 or (
        weight.group >= MIN_GROUP[weight.bits]
        and weight.group == triton.next_power_of_2(weight.group)
    )


def tile_for(
    num_tokens: int, num_outputs: int, weight: PackedWeight, *, gated: bool, itemsize: int = 2
) -> PackedTile:
    """Measured on an H200 with the layers of Qwen3-8B and 0.6B (benchmarks/packed_tiles.py).

    itemsize: bytes of a token's input.
    """
    if num_tokens == 1:
        if is_fixed(weight, itemsize):
            return _fixed_vector_tile(num_outputs, weight, gated=gated)
        return _vector_tile(weight, gated=gated)
    if not _has_whole_groups(weight):
        return _tile_of_parts(num_tokens, num_outputs, weight, gated=gated)
    if num_tokens > MAX_SCALED_SUMS and _scales_weights_quickly(weight):
        return _tile_of_many(num_tokens, num_outputs, weight, gated=gated)
    block_k = min(128, _group_of(weight))
    block_m = min(max(8, triton.next_power_of_2(num_tokens)), 64)
    is_wide = block_m == 64 and not gated
    block_n, warps = (128, 8) if is_wide else (64, 4)
    stage_bytes = block_k * (block_n * (1 + gated) * weight.bits // 8 + block_m * itemsize)
    stages = max(2, min(6, MAX_STAGED_BYTES // stage_bytes))
    num_programs = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_tokens, block_m)
    # Many programs hide how each waits for its loads and products.
    room = (2 if is_wide else 4) * num_multiprocessors(weight.codes.device) // num_programs
    splits = min(room, weight.inputs // (4 * block_k), 8)
    return PackedTile(block_n, block_k, warps, _power_of_2_within(splits), stages, block_m)


def is_fixed(weight: PackedWeight, itemsize: int) -> bool:
    """Whether one token's inputs, of so many bytes, may become integers to be multiplied."""
    return weight.codes.dtype != torch.float8_e4m3fn and itemsize == 2


def has_fixed_lanes(tile: PackedTile, bits: int) -> bool:
    """Whether each thread has the four bytes that one instruction of `_fixed_products` takes."""
    return tile.block_k * bits // 8 >= 4 * 32 * tile.warps


def _fixed_vector_tile(num_outputs: int, weight: PackedWeight, *, gated: bool) -> PackedTile:
    """Of one token whose inputs become integers, which is done once for all rows of a tile."""
    inputs, is_int4 = max(32, triton.next_power_of_2(weight.inputs)), weight.bits == 4
    if inputs <= 1024 or (num_outputs >= MIN_HEAD and not is_int4):
        return PackedTile(4 if gated else 8, min(inputs, 1024), warps=2)
    if gated and is_int4 and weight.zero is not None:
        return PackedTile(4, min(inputs, 4096), warps=2)
    if gated:
        return PackedTile(8 if is_int4 else 4, min(inputs, 4096), warps=4)
    if inputs > 4096 and is_int4:
        return PackedTile(8, 4096, warps=8, ahead=4)
    if inputs > 4096:
        return PackedTile(8, 2048, warps=4)
    if num_outputs < FEW_OUTPUTS:
        return PackedTile(4, 1024, warps=2, ahead=4)
    return PackedTile(8, inputs, warps=4)


def _vector_tile(weight: PackedWeight, *, gated: bool) -> PackedTile:
    """Of one token: some KiB of weights are on the way to each program at once."""
    inputs = max(32, triton.next_power_of_2(weight.inputs))
    if gated or inputs <= 1024:
        return PackedTile(2, min(inputs, 16384 // weight.bits), warps=4)
    if weight.bits == 4 and inputs <= 4096:
        return PackedTile(4, inputs, warps=4)
    return PackedTile(8 if weight.bits == 4 else 4, min(inputs, 2048), warps=4)


def _tile_of_many(
    num_tokens: int, num_outputs: int, weight: PackedWeight, *, gated: bool
) -> PackedTile:
    """Of 33 to 128 tokens: weights get their scales, and several programs a multiprocessor."""
    block_m = 64 if num_tokens <= 64 else 128
    block_n, warps = (64, 4) if block_m == 64 else (128, 8)
    block_k = 64 if gated or _group_of(weight) < 128 else 128
    num_programs = triton.cdiv(num_outputs, block_n) * triton.cdiv(num_tokens, block_m)
    room = 3 * num_multiprocessors(weight.codes.device) // num_programs
    if block_m == 128:
        room //= 2
    splits = _power_of_2_within(min(max(2 * gated, room), weight.inputs // (4 * block_k), 4))
    if gated and block_m == 128:
        splits = 1
    return PackedTile(block_n, block_k, warps, splits, 4, block_m, scales_sums=False)


def _tile_of_parts(
    num_tokens: int, num_outputs: int, weight: PackedWeight, *, gated: bool
) -> PackedTile:
    """Of several tokens, where each weight gets its scale before it is multiplied."""
    inputs = weight.inputs
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


def _power_of_2_within(count: int) -> int:
    """The largest power of two of at most count, and 1."""
    return 1 << max(1, count).bit_length() - 1


def packed_linear(
    x: Tensor,
    linear: Linear,
    *,
    norm: tuple[Tensor, float] | None = None,
    gate: Activation | None = None,
    tile: PackedTile | None = None,
) -> Tensor:
    """As `skinny_linear`, for any number of tokens. x: inputs as columns of the weight lie."""
    return _launch(x, linear, None, norm=norm, next_norm=None, gate=gate, tile=tile).hidden


def packed_add(
    x: Tensor,
    linear: Linear,
    residual: Tensor,
    *,
    next_norm: Tensor | None = None,
    tile: PackedTile | None = None,
) -> Residual:
    """As `skinny_add`, for any number of tokens."""
    if not can_weigh(x):
        next_norm = None
    return _launch(x, linear, residual, norm=None, next_norm=next_norm, gate=None, tile=tile)


def fewest_unpacked(weight: PackedWeight) -> int:
    """From how many tokens on cuBLAS is so much faster that writing all weights out pays."""
    return 129 if _has_whole_groups(weight) and _scales_weights_quickly(weight) else 65


def unpacked(weight: PackedWeight, dtype: torch.dtype, *, places: Tensor | None = None) -> Tensor:
    """The matrix in new memory, [outputs, inputs]; of the outputs in `places` [n] alone, if these
    are given, by an ordinary launch."""
    num_rows, inputs = len(weight.codes if places is None else places), weight.inputs
    out = torch.empty(num_rows, inputs, dtype=dtype, device=weight.codes.device)
    block_n, block_k = 16 if places is None else 4, 256
    options = launch_options(out.device) if places is None else {"PDL": False}
    _unpack_kernel[(triton.cdiv(num_rows, block_n), triton.cdiv(inputs, block_k))](
        *_pointers(weight), places, out, len(weight.codes), num_rows,
        K=inputs, BLOCK_N=block_n, BLOCK_K=block_k, **_format(weight), num_warps=4, **options,
    )  # fmt: skip
    return out


def _pointers(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    nested = weight.super_scale, weight.super_shift
    return weight.codes, weight.scale, weight.zero, weight.shift, *nested


def _format(weight: PackedWeight) -> dict[str, Any]:
    """What kernels are compiled by."""
    plain = weight.bits == 4 and weight.zero is None and weight.shift is None
    return {
        "BITS": weight.bits,
        "GROUP": _group_of(weight),
        "MIDDLE": MIDDLE if plain else 0,
    }


def _group_of(weight: PackedWeight) -> int:
    """Inputs that share a scale; a single group of any size becomes one that tiles divide."""
    is_single = weight.scale.shape[1] == 1
    return max(8192, triton.next_power_of_2(weight.inputs)) if is_single else weight.group


def _has_whole_groups(weight: PackedWeight) -> bool:
    """Whether sums of a tile may get the scales of its group, instead of each weight."""
    is_scaled_alone = weight.shift is None and weight.super_scale is None
    return is_scaled_alone and _group_of(weight) >= MIN_WHOLE_GROUP


def _scales_weights_quickly(weight: PackedWeight) -> bool:
    """Whether products in which each weight gets its scale were measured, and found quicker."""
    is_measured = weight.codes.dtype != torch.int8
    return is_measured and has_tensor_memory_accelerator(weight.codes.device)


def _arithmetic(weight: PackedWeight, dtype: torch.dtype) -> dict[str, Any]:
    """How codes become numbers: quickly, if they are multiplied in half precision."""
    fast = not INTERPRETED and dtype in (torch.bfloat16, torch.float16)
    base = _BASES.get((weight.codes.dtype, dtype), 0) if fast else 0
    return {"FAST": fast, "BASE": base}


def _launch(
    x: Tensor,
    linear: Linear,
    residual: Tensor | None,
    *,
    norm: tuple[Tensor, float] | None,
    next_norm: Tensor | None,
    gate: Activation | None,
    tile: PackedTile | None,
) -> Residual:
    """Either product, in new memory."""
    weight = cast(Packed, linear.method).weight
    num_tokens, num_inputs = x.shape
    gated = gate is not None
    num_outputs = len(weight.codes) // 2 if gated else len(weight.codes)
    assert weight.codes.is_contiguous() and weight.scale.is_contiguous()
    tile = tile or tile_for(num_tokens, num_outputs, weight, gated=gated, itemsize=x.itemsize)
    out, num_n, tensors, eps, options = operands(
        x, linear, residual, num_outputs=num_outputs, block_n=tile.block_n, norm=norm,
        next_norm=next_norm,
    )  # fmt: skip
    tensors = (*_pointers(weight), *tensors)
    options |= _format(weight) | {
        "GATE": gate, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip
    if num_tokens == 1 and tile.block_m == 1:
        _packed_vector_kernel[(num_n,)](
            x, *tensors, num_outputs, eps,
            FIXED=is_fixed(weight, x.itemsize) and has_fixed_lanes(tile, weight.bits),
            FAST=not INTERPRETED,
            AHEAD=min(tile.ahead, triton.cdiv(num_inputs, tile.block_k)), **options,
        )  # fmt: skip
        return out
    num_tiles = triton.cdiv(triton.cdiv(num_inputs, tile.block_k), tile.splits)
    splits = triton.cdiv(num_inputs, tile.block_k * num_tiles)
    num_m = triton.cdiv(num_tokens, tile.block_m)
    assert splits == 1 or num_n * num_m <= MAX_ARRIVALS
    size = num_n * num_m * splits * (1 + gated) * tile.block_n * tile.block_m if splits > 1 else 0
    options |= _arithmetic(weight, x.dtype)
    is_whole = _has_whole_groups(weight) and options["GROUP"] % tile.block_k == 0
    if tile.scales_sums and is_whole:
        kernel = _packed_group_kernel
        del options["MIDDLE"]  # it knows
    else:
        kernel = _packed_matrix_kernel
        # Products that are shifted, or scaled twice, would lose too much in half precision.
        is_plain = weight.shift is None and weight.super_scale is None
        options |= {"FAST": options["FAST"] and is_plain}
        options |= {"SWAPS": not is_plain or tile.block_m < 16}
    kernel[(num_n, splits, num_m)](
        x, *tensors, x.new_empty(size, dtype=torch.float32), arrival_counters(x.device),
        num_tokens, num_outputs, eps,
        NUM_TILES=num_tiles, SPLITS=splits, BLOCK_M=tile.block_m, **options,
    )  # fmt: skip
    return out
