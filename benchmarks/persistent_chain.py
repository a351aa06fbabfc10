"""The four products of all layers in one persistent kernel, beside the engine's kernels (GPU).

    python benchmarks/persistent_chain.py

The chain is that of Qwen3-0.6B in bf16: 28 layers of qkv with its norm, o and residual, gates and
ups with their norm and SiLU, down and residual. In place of attention, the first numbers of qkv's
result go to o as they lie. Every way is first compared with float32 torch and with the engine's
kernels, then timed by replays of a CUDA graph: microseconds a layer. Weights are 880 MB, so
none comes from the L2 cache. Without a GPU, under TRITON_INTERPRET=1, the kernel is launched once
a stage with small shapes, which shows that its arithmetic is right.

The persistent kernel: all programs run at once; each makes the same share of every product's
outputs, and asks for its weights of the next product before it waits for the inputs.
"""
# ruff: noqa: C901, N803, N806, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.worker.kernels.base import Residual, Weighed
from nanovllm.worker.kernels.triton.launch import INTERPRETED, Gpu
from nanovllm.worker.kernels.triton.skinny_linear import skinny_add, skinny_linear
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.warmup.triton_precompile import leave_launches_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
EPS = 1e-6
NUM_COMPILERS, COMPILE_S, MEASURE_S = 12, 45, 75
BANDWIDTH = 4.3e12
MOST_SPINS: tl.constexpr = tl.constexpr(1 << 16)  # of one wait, some 50 ms
STAGE_WORDS: tl.constexpr = tl.constexpr(256)  # counters of a stage
NUM_EVENTS: tl.constexpr = tl.constexpr(5)
EVENTS = ("weights are there", "inputs are there", "sums are there", "told of")
RUNTIME = ("first_layer", "last_layer", "num_layers", "num_rows")
BEGIN, QKV, O_PROJ, GATE_UP, DOWN, END = (tl.constexpr(1 << index) for index in range(6))


# ---------------------------------------------------------------- Gluon, or what it means

if INTERPRETED:
    # Nothing interprets Gluon: its functions by those of Triton that mean the same.
    from tests.worker.kernels import triton_device  # noqa: F401  # mends the interpreter

    jit = triton.jit

    class Meaning:
        constexpr, int16, int32, int64 = tl.constexpr, tl.int16, tl.int32, tl.int64
        bfloat16, float32 = tl.bfloat16, tl.float32
        store, where, program_id = tl.store, tl.where, tl.program_id
        reshape, permute, split, expand_dims = tl.reshape, tl.permute, tl.split, tl.expand_dims
        atomic_add, thread_barrier = tl.atomic_add, tl.debug_barrier
        sum, max, exp, rsqrt = tl.sum, tl.max, tl.exp, tl.rsqrt
        static_range = tl.static_range

        @staticmethod
        def load(*args, **options):
            return tl.load(*args, **options)

        @staticmethod
        def arange(first, end, layout):
            return tl.arange(first, end)

        @staticmethod
        def zeros(shape, dtype, layout):
            return tl.zeros(shape, dtype)

        @staticmethod
        def convert_layout(values, layout):
            return values

        @staticmethod
        def BlockedLayout(*facts):  # noqa: N802
            return None

        NVMMADistributedLayout = DotOperandLayout = SliceLayout = BlockedLayout

    gl: Any = Meaning
    mma_v2: Any = partial(tl.dot, input_precision="ieee")

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language
    from triton.experimental.gluon.language.nvidia import ampere
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit, gl, mma_v2 = gluon.jit, language, ampere.mma_v2


# ---------------------------------------------------------------- waiting


@jit
def await_counters(counters, target, errors, NUM: tl.constexpr, SPINS: tl.constexpr):
    """Until each of NUM counters has reached the target; the first NUM threads look at one each.

    SPINS: 1; or 0, where what is awaited must be there; or 2, to see what it costs to wait.
    """
    STRIDE: tl.constexpr = 8 if NUM <= 8 else 1
    if SPINS == 1:
        gl.inline_asm_elementwise(
            """{
            .reg .pred over;
            .reg .u32 lane, seen, left;
            .reg .u64 place;
            mov.u32 $0, 0;
            mov.u32 lane, %tid.x;
            setp.ge.u32 over, lane, $3;
            @over bra DONE;
            mad.wide.u32 place, lane, $4, $1;
            mov.u32 left, $5;
            AGAIN:
            ld.acquire.gpu.global.u32 seen, [place];
            sub.u32 seen, seen, $2;
            setp.ge.s32 over, seen, 0;
            @over bra DONE;
            sub.u32 left, left, 1;
            setp.ne.u32 over, left, 0;
            @over bra AGAIN;
            st.global.u32 [$6], 1;
            DONE:
            }""",
            "=r,l,r,r,r,r,l",
            [counters.to(gl.int64), target, gl.to_tensor(NUM), gl.to_tensor(STRIDE * 4),
             gl.to_tensor(MOST_SPINS), errors.to(gl.int64)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gl.thread_barrier()  # what some threads have seen to be there, all may read
    elif SPINS == 0:
        for index in range(NUM):
            if gl.load(counters + index * STRIDE) - target < 0:
                gl.store(errors, 1)


@jit
def arrive(counters, GROUP: tl.constexpr, NUM: tl.constexpr):
    """Count this program, after all that it has stored."""
    STRIDE: tl.constexpr = 8 if NUM <= 8 else 1  # few counters have sectors of their own
    gl.thread_barrier()
    gl.atomic_add(counters + gl.program_id(0) // GROUP * STRIDE, 1, sem="release")


@jit
def tagged(values, tag, WORD: tl.constexpr):
    """Words that hold a value and a tag each, written at once."""
    if gl.int32 == WORD:
        bits = values.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16
    else:
        bits = values.to(gl.float32).to(gl.int32, bitcast=True).to(gl.int64) << 32
    return bits | tag


@jit
def value_of(words):
    """float32 of tagged words."""
    if words.dtype == gl.int32:
        values = (words & -65536).to(gl.float32, bitcast=True)
    else:
        values = (words >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    return values


@jit
def wrong_tags(words, tag):
    """Zero where all words have the tag."""
    wrong = ((words ^ tag) & 65535).to(gl.int32)
    return gl.max(gl.max(gl.max(wrong, 1), 1), 0)


@jit
def publish(buffer, places, values, real, tag, counters, TAGGED: tl.constexpr,
            GROUP: tl.constexpr, NUM: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Store outputs, of the model's precision; with the LAST of them, let others know."""
    if TAGGED:
        gl.store(buffer + places, tagged(values, tag, buffer.dtype.element_ty), real)
    else:
        gl.store(buffer + places, values.to(buffer.dtype.element_ty), real)
        if LAST:
            arrive(counters, GROUP, NUM)


@jit
def load_inputs(buffer, places, real, TAGGED: tl.constexpr):
    """Whatever is there, past the L1 cache."""
    if TAGGED:
        return gl.load(buffer + places, real, other=0, volatile=True)
    else:
        return gl.load(buffer + places, real, other=0.0, cache_modifier=".cg")


@jit
def fetch(buffer, num_inputs, num_rows, tag, target, counters, errors, TILES: tl.constexpr,
          C: tl.constexpr, WARPS: tl.constexpr, NUM: tl.constexpr, TAGGED: tl.constexpr,
          SPINS: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Inputs once they are there: float32, three tiles [WARPS, C / WARPS, 8], the first TILES of
    which differ. Rows lie one after another."""
    SHARE: tl.constexpr = C // WARPS
    slices = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lanes = gl.arange(0, SHARE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    rows = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    places = rows * num_inputs + (slices * SHARE + lanes)
    real = (rows < num_rows) & (slices * SHARE + lanes >= 0)
    if not TAGGED:
        await_counters(counters, target, errors, NUM, SPINS)
    a = load_inputs(buffer, places, real, TAGGED)
    b, c = a, a
    if TILES > 1:
        b = load_inputs(buffer, places + C, real, TAGGED)
    if TILES > 2:
        c = load_inputs(buffer, places + 2 * C, real, TAGGED)
    if TAGGED:
        wanted = gl.where(real, tag, 0)
        wrong = (a ^ wanted) & 65535
        if TILES > 1:
            wrong |= (b ^ wanted) & 65535
        if TILES > 2:
            wrong |= (c ^ wanted) & 65535
        num_wrong = wrong_tags(wrong, 0)
        left = MOST_SPINS.value if SPINS == 1 else 0
        while (num_wrong != 0) & (left > 0):
            a = load_inputs(buffer, places, real, TAGGED)
            wrong = (a ^ wanted) & 65535
            if TILES > 1:
                b = load_inputs(buffer, places + C, real, TAGGED)
                wrong |= (b ^ wanted) & 65535
            if TILES > 2:
                c = load_inputs(buffer, places + 2 * C, real, TAGGED)
                wrong |= (c ^ wanted) & 65535
            num_wrong = wrong_tags(wrong, 0)
            left -= 1
        if (num_wrong != 0) & (SPINS < 2):
            gl.store(errors, 1)
        return value_of(a), value_of(b), value_of(c)
    else:
        return a.to(gl.float32), b.to(gl.float32), c.to(gl.float32)


# ---------------------------------------------------------------- products


@jit
def load_tile(weight, rows, first, num_inputs, real, C: tl.constexpr, WARPS: tl.constexpr,
              LAYOUT: tl.constexpr):  # fmt: skip
    """[WARPS, rows, C / WARPS]: weights of some outputs for C inputs from `first` on. rows: in the
    layout of the tile's."""
    SHARE: tl.constexpr = C // WARPS
    slices = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lanes = gl.arange(0, SHARE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    places = rows[None, :, None] * num_inputs + (first + slices * SHARE + lanes)
    return gl.load(weight + places, (places >= 0) & real, other=0.0)


@jit
def product(w, x, acc, DTYPE: tl.constexpr, X: tl.constexpr):
    """acc + w · x, each warp's share. w: [WARPS, rows, share]; x: [WARPS, share, 8] float32."""
    return mma_v2(w, gl.convert_layout(x.to(DTYPE), X), acc)


@jit
def joined(acc, OUT: tl.constexpr):
    """[rows, 8]: the sum of all warps' shares."""
    return gl.sum(gl.convert_layout(acc, OUT), 0)


@jit
def norm_scale(x, num_inputs, eps, OUT: tl.constexpr):
    """[1, 8]: what the norm multiplies each row by. x: [WARPS, share, 8]"""
    squares = gl.convert_layout(gl.sum(x * x, 1), gl.SliceLayout(1, OUT))
    return gl.rsqrt(gl.sum(gl.expand_dims(squares, 1), 0) / num_inputs + eps)


@jit
def load_norm(norm, C: tl.constexpr, WARPS: tl.constexpr, LAYOUT: tl.constexpr):
    """[WARPS, C / WARPS, 1]"""
    SHARE: tl.constexpr = C // WARPS
    slices = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lanes = gl.arange(0, SHARE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    return gl.load(norm + (slices * SHARE + lanes))


@jit
def weighed(x, norm, DTYPE: tl.constexpr):
    """x times the norm's weight, rounded as the engine's kernels do."""
    return (x * norm.to(gl.float32)).to(DTYPE).to(gl.float32)


@jit
def gated(pairs, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr):
    """silu(gate) * up, [R, 8]. pairs: [2 R, 8], gates and ups in turns."""
    gate, up = gl.split(gl.permute(gl.reshape(pairs, [R, 2, 8]), (0, 2, 1)))
    gate = gate.to(DTYPE).to(gl.float32)
    gate = (gate / (1 + gl.exp(-gate))).to(DTYPE).to(gl.float32)
    return gl.convert_layout((gate * up.to(DTYPE).to(gl.float32)).to(DTYPE), LAYOUT)


@jit(do_not_specialize=RUNTIME)
def persistent_kernel(
    x, out,  # [num_rows, C]
    qkv_weight,  # [layers, 4 C, C]
    o_weight,  # [layers, C, 2 C]
    gate_up_weight,  # [layers, 6 C, C], gates first
    down_weight,  # [layers, C, 3 C]
    norms,  # [layers, 2, C]
    ends, qkvs, mids, acts,  # [num_rows, C, 4 C, C, 3 C]: results of stages, or tagged words
    counters,  # [4, STAGE_WORDS] int32
    epochs,  # [programs] int32: how often each program has been launched
    errors,  # [1] int32
    first_layer, last_layer, num_layers, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, NUM: tl.constexpr,
    TAGGED: tl.constexpr, AHEAD: tl.constexpr, SPINS: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Layers first_layer … last_layer - 1, of each of which the stages in STAGES; up to 8 rows.

    R: a program's share of C outputs. GROUP: programs that share a counter; NUM: counters a stage.
    AHEAD: 1, weights of the next stage are asked for after this one's outputs are told of; 2:
    before its inputs are waited for. Each warp multiplies its share of the inputs, by weights that
    go from memory to the registers where tensor cores take them.
    """
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    W: tl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    X: tl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OUT: tl.constexpr = gl.BlockedLayout([WARPS, 2, 1], [1, 8, 4], [1, 1, WARPS], [1, 2, 0])
    RESULT: tl.constexpr = gl.SliceLayout(0, OUT)
    OF_W: tl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, W))
    dtype: tl.constexpr = out.dtype.element_ty
    program = gl.program_id(0)
    epoch = gl.load(epochs + program)
    rows = gl.arange(0, 8, gl.SliceLayout(0, RESULT))[None, :]
    some = gl.arange(0, R, gl.SliceLayout(1, RESULT))[:, None]
    real = (rows < num_rows) & (some >= 0)
    places = rows * C + program * R + some
    qkv_some = gl.arange(0, 4 * R, gl.SliceLayout(1, RESULT))[:, None]
    qkv_real = (rows < num_rows) & (qkv_some >= 0)
    qkv_places = rows * (4 * C) + program * (4 * R) + qkv_some
    act_places = rows * (3 * C) + program * (3 * R) + some
    mine = program * R + gl.arange(0, R, OF_W)
    qkv_rows = program * (4 * R) + gl.arange(0, 4 * R, OF_W)
    pairs = gl.arange(0, 2 * R, OF_W)  # gates and ups in turns
    gate_rows = program * (3 * R) + pairs // 2 + pairs % 2 * (3 * C)
    end_counters, qkv_counters = counters, counters + STAGE_WORDS
    mid_counters = qkv_counters + STAGE_WORDS
    act_counters = mid_counters + STAGE_WORDS
    if BEGIN & STAGES:
        residual = gl.load(x + places, real, other=0.0).to(gl.float32)
    else:
        residual = gl.load(out + places, real, other=0.0).to(gl.float32)
    start = first_layer.to(gl.int64)
    w_qkv = load_tile(qkv_weight + start * (4 * C * C), qkv_rows, 0, C, True, C, WARPS, W)
    if BEGIN & STAGES:
        tag = (epoch * (num_layers + 1) + 1) & 65535
        publish(ends, places, residual.to(dtype), real, tag, end_counters, TAGGED, GROUP, NUM, True)
    for layer in range(first_layer, last_layer):
        base = (start + (layer - first_layer)) * (C * C)
        turn = epoch * num_layers + layer + 1  # how often each stage has been made then
        tag = (epoch * (num_layers + 1) + layer + 1) & 65535
        next_tag = (tag + 1) & 65535
        norm = load_norm(norms + layer * (2 * C), C, WARPS, X)
        if AHEAD == 2:
            o_a = load_tile(o_weight + base * 2, mine, 0, 2 * C, True, C, WARPS, W)
            o_b = load_tile(o_weight + base * 2, mine, C, 2 * C, True, C, WARPS, W)
        if QKV & STAGES:
            h, _, _ = fetch(ends, C, num_rows, tag, (turn + epoch) * GROUP, end_counters, errors, 1,
                            C, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            acc = gl.zeros([WARPS, 4 * R, 8], gl.float32, MMA)
            acc = product(w_qkv, weighed(h, norm, dtype), acc, dtype, X)
            result = joined(acc, OUT) * norm_scale(h, C, eps, OUT)
            publish(qkvs, qkv_places, result.to(dtype), qkv_real, next_tag, qkv_counters, TAGGED,
                    GROUP, NUM, True)  # fmt: skip
        if AHEAD == 1:
            o_a = load_tile(o_weight + base * 2, mine, 0, 2 * C, True, C, WARPS, W)
            o_b = load_tile(o_weight + base * 2, mine, C, 2 * C, True, C, WARPS, W)
        else:
            g_a = load_tile(gate_up_weight + base * 6, gate_rows, 0, C, True, C, WARPS, W)
            g_b = load_tile(gate_up_weight + base * 6, gate_rows + R, 0, C, True, C, WARPS, W)
            g_c = load_tile(gate_up_weight + base * 6, gate_rows + 2 * R, 0, C, True, C, WARPS, W)
        if O_PROJ & STAGES:
            a, b, _ = fetch(qkvs, 2 * C, num_rows, next_tag, turn * GROUP, qkv_counters, errors, 2,
                            C, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            acc = gl.zeros([WARPS, R, 8], gl.float32, MMA)
            acc = product(o_b, b, product(o_a, a, acc, dtype, X), dtype, X)
            added = joined(acc, OUT).to(dtype).to(gl.float32)
            residual = (residual + added).to(dtype).to(gl.float32)
            publish(mids, places, residual.to(dtype), real, next_tag, mid_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
        norm = load_norm(norms + layer * (2 * C) + C, C, WARPS, X)
        if AHEAD == 1:
            g_a = load_tile(gate_up_weight + base * 6, gate_rows, 0, C, True, C, WARPS, W)
            g_b = load_tile(gate_up_weight + base * 6, gate_rows + R, 0, C, True, C, WARPS, W)
            g_c = load_tile(gate_up_weight + base * 6, gate_rows + 2 * R, 0, C, True, C, WARPS, W)
        else:
            d_a = load_tile(down_weight + base * 3, mine, 0, 3 * C, True, C, WARPS, W)
            d_b = load_tile(down_weight + base * 3, mine, C, 3 * C, True, C, WARPS, W)
            d_c = load_tile(down_weight + base * 3, mine, 2 * C, 3 * C, True, C, WARPS, W)
        if GATE_UP & STAGES:
            h, _, _ = fetch(mids, C, num_rows, next_tag, turn * GROUP, mid_counters, errors, 1,
                            C, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            scale = norm_scale(h, C, eps, OUT)
            h = weighed(h, norm, dtype)
            zero = gl.zeros([WARPS, 2 * R, 8], gl.float32, MMA)
            a = gated(joined(product(g_a, h, zero, dtype, X), OUT) * scale, dtype, RESULT, R)
            b = gated(joined(product(g_b, h, zero, dtype, X), OUT) * scale, dtype, RESULT, R)
            c = gated(joined(product(g_c, h, zero, dtype, X), OUT) * scale, dtype, RESULT, R)
            publish(acts, act_places, a, real, next_tag, act_counters, TAGGED, GROUP, NUM, False)
            publish(
                acts, act_places + R, b, real, next_tag, act_counters, TAGGED, GROUP, NUM, False
            )
            publish(
                acts, act_places + 2 * R, c, real, next_tag, act_counters, TAGGED, GROUP, NUM, True
            )
        if AHEAD == 1:
            d_a = load_tile(down_weight + base * 3, mine, 0, 3 * C, True, C, WARPS, W)
            d_b = load_tile(down_weight + base * 3, mine, C, 3 * C, True, C, WARPS, W)
            d_c = load_tile(down_weight + base * 3, mine, 2 * C, 3 * C, True, C, WARPS, W)
        else:
            w_qkv = load_tile(qkv_weight + (base + C * C) * 4, qkv_rows, 0, C,
                              layer + 1 < last_layer, C, WARPS, W)  # fmt: skip
        if DOWN & STAGES:
            a, b, c = fetch(acts, 3 * C, num_rows, next_tag, turn * GROUP, act_counters, errors, 3,
                            C, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            acc = gl.zeros([WARPS, R, 8], gl.float32, MMA)
            acc = product(d_b, b, product(d_a, a, acc, dtype, X), dtype, X)
            added = joined(product(d_c, c, acc, dtype, X), OUT).to(dtype).to(gl.float32)
            residual = (residual + added).to(dtype).to(gl.float32)
            publish(ends, places, residual.to(dtype), real, next_tag, end_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
        if AHEAD == 1:
            w_qkv = load_tile(qkv_weight + (base + C * C) * 4, qkv_rows, 0, C,
                              layer + 1 < last_layer, C, WARPS, W)  # fmt: skip
    gl.store(out + places, residual.to(dtype), real)
    if END & STAGES:
        gl.store(epochs + program, epoch + 1)


# ---------------------------------------------------------------- weights through a ring


@jit
def stamp(times, turn, event, TRACE: tl.constexpr):
    """Leave the multiprocessor's clock."""
    if TRACE:
        clock = gl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=gl.int64,
                                          is_pure=False, pack=1)  # fmt: skip
        gl.store(times + (turn * NUM_EVENTS + event), clock)


@jit
def place_of(program, layer, t, C: tl.constexpr, KIND: tl.constexpr):
    """Row and first chunk of 64 inputs, in the stacked weights, of the t-th tile of a stage."""
    if QKV.value == KIND:
        row, chunk = layer * (4 * C) + program * 32 + t * 8, t * 0
    elif GATE_UP.value == KIND:  # gates and ups in turns
        row, chunk = layer * (6 * C) + t % 2 * (3 * C) + program * 24 + t // 2 * 8, t * 0
    else:
        row, chunk = layer * C + program * 8, t * (C // 64)
    return row, chunk


@jit
def fill(weight, ring, ready, free, filled, program, layer, C: tl.constexpr, KIND: tl.constexpr,
         COUNT: tl.constexpr, SLOTS: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Have the tiles of a stage brought into the slots that come next."""
    for t in range(COUNT):
        slot, turn = (filled + t) % SLOTS, ((filled + t) // SLOTS) & 1
        row, chunk = place_of(program, layer * APART, t, C, KIND)
        mbarrier.wait(free.index(slot), turn ^ 1)
        mbarrier.expect(ready.index(slot), C * 16)
        tma.async_copy_global_to_shared(weight, [chunk, row, 0], ready.index(slot),
                                        ring.index(slot))  # fmt: skip
    return filled + COUNT


@jit
def fill_all(qkv_weight, o_weight, gate_up_weight, down_weight, ring, ready, free, program,
             first_layer, last_layer, C: tl.constexpr, SLOTS: tl.constexpr,
             APART: tl.constexpr):  # fmt: skip
    """What one warp does beside the others: it is ahead by as much as the ring holds."""
    filled = first_layer * 0
    for layer in range(first_layer, last_layer):
        filled = fill(qkv_weight, ring, ready, free, filled, program, layer, C, QKV.value, 4,
                      SLOTS, APART)  # fmt: skip
        filled = fill(o_weight, ring, ready, free, filled, program, layer, C, O_PROJ.value, 2,
                      SLOTS, APART)  # fmt: skip
        filled = fill(gate_up_weight, ring, ready, free, filled, program, layer, C, GATE_UP.value,
                      6, SLOTS, APART)  # fmt: skip
        filled = fill(down_weight, ring, ready, free, filled, program, layer, C, DOWN.value, 3,
                      SLOTS, APART)  # fmt: skip


@jit
def take(weight, ring, ready, free, taken, program, layer, C: tl.constexpr, WARPS: tl.constexpr,
         KIND: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr,
         W: tl.constexpr):  # fmt: skip
    """A stage's tiles, each in pieces [WARPS, 8, 64], from the ring; without one, from memory."""
    PIECES: tl.constexpr = C // 64 // WARPS
    pieces = ()
    for t in gl.static_range(COUNT):
        if SLOTS > 0:
            slot = (taken + t) % SLOTS
            mbarrier.wait(ready.index(slot), ((taken + t) // SLOTS) & 1)
            for piece in gl.static_range(PIECES):
                part = ring.index(slot).slice(piece * WARPS, WARPS, 0)
                pieces += (part.load(W),)
        else:
            row, chunk = place_of(program, layer, program * 0 + t, C, KIND)
            WIDE: tl.constexpr = C if QKV.value == KIND or GATE_UP.value == KIND else (
                2 * C if O_PROJ.value == KIND else 3 * C
            )  # fmt: skip
            for piece in gl.static_range(PIECES):
                lines = tl.arange(0, 8)[None, :, None] * WIDE
                ks = (tl.arange(0, WARPS)[:, None, None] + piece * WARPS) * 64
                places = lines + ks + tl.arange(0, 64)[None, None, :]
                pieces += (tl.load(weight + row.to(tl.int64) * WIDE + chunk * 64 + places),)
    if SLOTS > 0:
        gl.thread_barrier()  # all warps have what they need of these slots
        for t in gl.static_range(COUNT):
            mbarrier.arrive(free.index((taken + t) % SLOTS), count=1)
    return pieces


@jit
def load_pieces(buffer, places, real, NUM: tl.constexpr, STEP: tl.constexpr,
                TAGGED: tl.constexpr):  # fmt: skip
    pieces = ()
    for piece in gl.static_range(NUM):
        pieces += (load_inputs(buffer, places + piece * STEP, real, TAGGED),)
    return pieces


@jit
def num_wrong_of(pieces, wanted, NUM: tl.constexpr):
    """Zero where all words have the tags that are wanted."""
    wrong = (pieces[0] ^ wanted) & 65535
    for piece in gl.static_range(1, NUM):
        wrong |= (pieces[piece] ^ wanted) & 65535
    return wrong_tags(wrong, 0)


@jit
def fetch_pieces(buffer, num_inputs, num_rows, tag, target, counters, errors, NUM: tl.constexpr,
                 WARPS: tl.constexpr, NUM_COUNTERS: tl.constexpr, TAGGED: tl.constexpr,
                 SPINS: tl.constexpr, X: tl.constexpr):  # fmt: skip
    """Inputs once they are there: float32, NUM pieces [WARPS, 64, 8]."""
    slices = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    lanes = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    rows = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
    places = rows * num_inputs + (slices * 64 + lanes)
    real = (rows < num_rows) & (slices * 64 + lanes >= 0)
    if TAGGED:
        wanted = gl.where(real, tag, 0)
        pieces = load_pieces(buffer, places, real, NUM, WARPS * 64, TAGGED)
        num_wrong = num_wrong_of(pieces, wanted, NUM)
        left = MOST_SPINS if SPINS == 1 else 0
        while (num_wrong != 0) & (left > 0):
            pieces = load_pieces(buffer, places, real, NUM, WARPS * 64, TAGGED)
            num_wrong = num_wrong_of(pieces, wanted, NUM)
            left -= 1
        if (num_wrong != 0) & (SPINS < 2):
            gl.store(errors, 1)
    else:
        await_counters(counters, target, errors, NUM_COUNTERS, SPINS)
        pieces = load_pieces(buffer, places, real, NUM, WARPS * 64, TAGGED)
    values = ()
    for piece in gl.static_range(NUM):
        if TAGGED:
            values += (value_of(pieces[piece]),)
        else:
            values += (pieces[piece].to(gl.float32),)
    return values


@jit
def norm_pieces(norm, C: tl.constexpr, WARPS: tl.constexpr, X: tl.constexpr):
    """[WARPS, 64, 1] each."""
    slices = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
    lanes = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
    pieces = ()
    for piece in gl.static_range(C // 64 // WARPS):
        pieces += (gl.load(norm + (slices * 64 + lanes + piece * WARPS * 64)),)
    return pieces


@jit
def normed_pieces(pieces, norms, sums, DTYPE: tl.constexpr, NUM: tl.constexpr):
    """Pieces times the norm's weight, and the sums of squares of each warp's share, left for
    `scale_of`."""
    squares = gl.sum(pieces[0] * pieces[0], 1)
    out = (weighed(pieces[0], norms[0], DTYPE),)
    for piece in gl.static_range(1, NUM):
        squares += gl.sum(pieces[piece] * pieces[piece], 1)
        out += (weighed(pieces[piece], norms[piece], DTYPE),)
    squares = gl.expand_dims(squares, 1)
    if sums is not None:
        sums.store(squares)
    return out, squares


@jit
def scale_of(squares, sums, num_inputs, eps, OUT: tl.constexpr):
    """[1, 8]: what the norm multiplies each row by."""
    if sums is not None:
        squares = sums.load(OUT)
    return gl.rsqrt(gl.sum(squares, 0) / num_inputs + eps)


@jit
def multiply(weights, inputs, first, DTYPE: tl.constexpr, NUM: tl.constexpr, WARPS: tl.constexpr,
             MMA: tl.constexpr, X: tl.constexpr):  # fmt: skip
    """NUM pieces of weights, from `first` on, times as many of the inputs: [WARPS, 8, 8]."""
    zero = gl.zeros([WARPS, 8, 8], gl.float32, MMA)
    acc = product(weights[first], inputs[0], zero, DTYPE, X)
    for piece in gl.static_range(1, NUM):  # apart, since each step of a sum waits for the last
        acc += product(weights[first + piece], inputs[piece], zero, DTYPE, X)
    return acc


@jit
def leave(acc, parts, t: tl.constexpr):
    """Where all warps' shares of 8 outputs meet."""
    if parts is not None:
        parts.slice(t * 8, 8, 1).store(acc)


@jit
def met(accs, parts, NUM: tl.constexpr, OUT: tl.constexpr):
    """[32, 8], or [8, 8] if NUM is one: the sums of all warps' shares."""
    if parts is not None:
        if NUM == 1:
            return gl.sum(parts.slice(0, 8, 1).load(OUT), 0)
        else:
            return gl.sum(parts.load(OUT), 0)
    else:
        if NUM == 1:
            return gl.sum(accs[0], 0)
        else:  # the interpreter's; of three, the last comes twice
            a, b = gl.sum(accs[0], 0), gl.sum(accs[1], 0)
            c, d = gl.sum(accs[2], 0), gl.sum(accs[NUM - 1], 0)
            pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [8, 8, 2, 2]: a b / c d
            return tl.reshape(tl.permute(pairs, (2, 3, 0, 1)), [32, 8])


@jit
def multiply_all(
    x, out, qkv_weight, o_weight, gate_up_weight, down_weight, norms, ends, qkvs, mids, acts,
    counters, epochs, errors, times, ring, ready, free, parts, ups, sums, program, epoch,
    first_layer, last_layer, num_layers, num_rows, eps,
    C: tl.constexpr, GROUP: tl.constexpr, NUM: tl.constexpr, TAGGED: tl.constexpr,
    SPINS: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    TRACE: tl.constexpr,
):  # fmt: skip
    """What all warps but one do: as `persistent_kernel`."""
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    W: tl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    X: tl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    OUT: tl.constexpr = gl.BlockedLayout(
        [WARPS, 1, 1], [1, 32, 1], [1, WARPS // 8, 8], [1, 2, 0]
    )  # fmt: skip
    RESULT: tl.constexpr = gl.SliceLayout(0, OUT)
    PIECES: tl.constexpr = C // 64 // WARPS
    dtype: tl.constexpr = out.dtype.element_ty
    rows = gl.arange(0, 8, gl.SliceLayout(0, RESULT))[None, :]
    some = gl.arange(0, 8, gl.SliceLayout(1, RESULT))[:, None]
    many = gl.arange(0, 32, gl.SliceLayout(1, RESULT))[:, None]
    real = (rows < num_rows) & (some >= 0)
    places = rows * C + program * 8 + some
    end_counters, qkv_counters = counters, counters + STAGE_WORDS
    mid_counters = qkv_counters + STAGE_WORDS
    act_counters = mid_counters + STAGE_WORDS
    if BEGIN.value & STAGES:
        residual = gl.load(x + places, real, other=0.0).to(gl.float32)
        tag = (epoch * (num_layers + 1) + 1) & 65535
        publish(ends, places, residual.to(dtype), real, tag, end_counters, TAGGED, GROUP, NUM, True)
    else:
        residual = gl.load(out + places, real, other=0.0).to(gl.float32)
    taken = first_layer * 0
    stages = times + program * (num_layers * 4 * NUM_EVENTS)
    for layer in range(first_layer, last_layer):
        turn = epoch * num_layers + layer + 1  # how often each stage has been made then
        tag = (epoch * (num_layers + 1) + layer + 1) & 65535
        next_tag = (tag + 1) & 65535
        if QKV.value & STAGES:
            stamp(stages, layer * 4 + 0, 0, TRACE)
            norm = norm_pieces(norms + layer * (2 * C), C, WARPS, X)
            w = take(qkv_weight, ring, ready, free, taken, program, layer, C, WARPS, QKV.value, 4,
                     SLOTS, W)  # fmt: skip
            stamp(stages, layer * 4 + 0, 1, TRACE)
            h = fetch_pieces(ends, C, num_rows, tag, (turn + epoch) * GROUP, end_counters, errors,
                             PIECES, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            stamp(stages, layer * 4 + 0, 2, TRACE)
            h, squares = normed_pieces(h, norm, sums, dtype, PIECES)
            accs = ()
            for t in gl.static_range(4):
                acc = multiply(w, h, t * PIECES, dtype, PIECES, WARPS, MMA, X)
                leave(acc, parts, t)
                accs += (acc,)
            result = met(accs, parts, 4, OUT) * scale_of(squares, sums, C, eps, OUT)
            stamp(stages, layer * 4 + 0, 3, TRACE)
            publish(qkvs, rows * (4 * C) + program * 32 + many, result.to(dtype),
                    (rows < num_rows) & (many >= 0), next_tag, qkv_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
            stamp(stages, layer * 4 + 0, 4, TRACE)
        if O_PROJ.value & STAGES:
            stamp(stages, layer * 4 + 1, 0, TRACE)
            w = take(o_weight, ring, ready, free, taken + 4, program, layer, C, WARPS,
                     O_PROJ.value, 2, SLOTS, W)  # fmt: skip
            stamp(stages, layer * 4 + 1, 1, TRACE)
            h = fetch_pieces(qkvs, 2 * C, num_rows, next_tag, turn * GROUP, qkv_counters, errors,
                             2 * PIECES, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            stamp(stages, layer * 4 + 1, 2, TRACE)
            acc = multiply(w, h, 0, dtype, 2 * PIECES, WARPS, MMA, X)
            leave(acc, parts, 0)
            added = met((acc,), parts, 1, OUT).to(dtype).to(gl.float32)
            residual = (residual + added).to(dtype).to(gl.float32)
            stamp(stages, layer * 4 + 1, 3, TRACE)
            publish(mids, places, residual.to(dtype), real, next_tag, mid_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
            stamp(stages, layer * 4 + 1, 4, TRACE)
        if GATE_UP.value & STAGES:
            stamp(stages, layer * 4 + 2, 0, TRACE)
            norm = norm_pieces(norms + layer * (2 * C) + C, C, WARPS, X)
            w = take(gate_up_weight, ring, ready, free, taken + 6, program, layer, C, WARPS,
                     GATE_UP.value, 6, SLOTS, W)  # fmt: skip
            stamp(stages, layer * 4 + 2, 1, TRACE)
            h = fetch_pieces(mids, C, num_rows, next_tag, turn * GROUP, mid_counters, errors,
                             PIECES, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            stamp(stages, layer * 4 + 2, 2, TRACE)
            h, squares = normed_pieces(h, norm, sums, dtype, PIECES)
            gate_accs, up_accs = (), ()
            for t in gl.static_range(3):
                acc = multiply(w, h, 2 * t * PIECES, dtype, PIECES, WARPS, MMA, X)
                leave(acc, parts, t)
                gate_accs += (acc,)
                acc = multiply(w, h, (2 * t + 1) * PIECES, dtype, PIECES, WARPS, MMA, X)
                leave(acc, ups, t)
                up_accs += (acc,)
            scale = scale_of(squares, sums, C, eps, OUT)
            gate = (met(gate_accs, parts, 3, OUT) * scale).to(dtype).to(gl.float32)
            up = (met(up_accs, ups, 3, OUT) * scale).to(dtype).to(gl.float32)
            gate = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
            stamp(stages, layer * 4 + 2, 3, TRACE)
            publish(acts, rows * (3 * C) + program * 24 + many, (gate * up).to(dtype),
                    (rows < num_rows) & (many < 24), next_tag, act_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
            stamp(stages, layer * 4 + 2, 4, TRACE)
        if DOWN.value & STAGES:
            stamp(stages, layer * 4 + 3, 0, TRACE)
            w = take(down_weight, ring, ready, free, taken + 12, program, layer, C, WARPS,
                     DOWN.value, 3, SLOTS, W)  # fmt: skip
            stamp(stages, layer * 4 + 3, 1, TRACE)
            h = fetch_pieces(acts, 3 * C, num_rows, next_tag, turn * GROUP, act_counters, errors,
                             3 * PIECES, WARPS, NUM, TAGGED, SPINS, X)  # fmt: skip
            stamp(stages, layer * 4 + 3, 2, TRACE)
            acc = multiply(w, h, 0, dtype, 3 * PIECES, WARPS, MMA, X)
            leave(acc, parts, 0)
            added = met((acc,), parts, 1, OUT).to(dtype).to(gl.float32)
            residual = (residual + added).to(dtype).to(gl.float32)
            stamp(stages, layer * 4 + 3, 3, TRACE)
            publish(ends, places, residual.to(dtype), real, next_tag, end_counters, TAGGED, GROUP,
                    NUM, True)  # fmt: skip
            stamp(stages, layer * 4 + 3, 4, TRACE)
        taken += 15
    gl.store(out + places, residual.to(dtype), real)
    if END.value & STAGES:
        gl.store(epochs + program, epoch + 1)


@jit(do_not_specialize=RUNTIME)
def ring_kernel(
    x, out,  # as in persistent_kernel, but:
    qkv_weight, o_weight, gate_up_weight, down_weight,  # descriptors [inputs / 64, layers *
    # outputs, 64], boxes [C / 64, 8, 64]; without a ring the tensors
    norms, ends, qkvs, mids, acts, counters, epochs, errors,
    times,  # [programs, layers * 4, NUM_EVENTS] int64
    first_layer, last_layer, num_layers, num_rows, eps,
    C: tl.constexpr, GROUP: tl.constexpr, NUM: tl.constexpr, TAGGED: tl.constexpr,
    SPINS: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    APART: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """As `persistent_kernel`, with 8 of C outputs a program. Weights come through a ring of SLOTS
    tiles of 8 outputs and C inputs, which one more warp has filled as far ahead as there is room.
    APART: 1; or 0, to see the time without memory's: all layers have the first one's weights.
    """
    program = gl.program_id(0)
    epoch = gl.load(epochs + program)
    if SLOTS > 0:
        tiles: tl.constexpr = qkv_weight.layout
        plain: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0])
        barrier: tl.constexpr = mbarrier.MBarrierLayout()
        ring = gl.allocate_shared_memory(out.dtype.element_ty, [SLOTS, C // 64, 8, 64], tiles)
        parts = gl.allocate_shared_memory(gl.float32, [WARPS, 32, 8], plain)
        ups = gl.allocate_shared_memory(gl.float32, [WARPS, 32, 8], plain)
        sums = gl.allocate_shared_memory(gl.float32, [WARPS, 1, 8], plain)
        ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
        free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
        for slot in gl.static_range(SLOTS):
            mbarrier.init(ready.index(slot), count=1)
            mbarrier.init(free.index(slot), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (multiply_all, (
                    x, out, qkv_weight, o_weight, gate_up_weight, down_weight, norms, ends, qkvs,
                    mids, acts, counters, epochs, errors, times, ring, ready, free, parts, ups,
                    sums, program, epoch, first_layer, last_layer, num_layers, num_rows, eps,
                    C, GROUP, NUM, TAGGED, SPINS, STAGES, WARPS, SLOTS, TRACE,
                )),
                (fill_all, (
                    qkv_weight, o_weight, gate_up_weight, down_weight, ring, ready, free, program,
                    first_layer, last_layer, C, SLOTS, APART,
                )),
            ],
            [1], [24],
        )  # fmt: skip
    else:
        multiply_all(
            x, out, qkv_weight, o_weight, gate_up_weight, down_weight, norms, ends, qkvs, mids,
            acts, counters, epochs, errors, times, None, None, None, None, None, None, program,
            epoch, first_layer, last_layer, num_layers, num_rows, eps,
            C, GROUP, NUM, TAGGED, SPINS, STAGES, WARPS, SLOTS, TRACE,
        )  # fmt: skip


# ---------------------------------------------------------------- ways to run the chain


@dataclass(frozen=True, slots=True)
class Variant:
    """How the persistent kernel is cut, and how its programs wait.

    sync: "counter", one a stage; "8 counters", each of an eighth of the programs; "flags", one a
    program; "tagged", outputs that say themselves whether they are there.
    """

    sync: str
    programs: int = 128
    warps: int = 8
    ahead: int = 1
    slots: int = 0  # of the ring; 0: weights go to registers
    is_ring: bool = False
    same_layer: bool = False  # all layers' weights are the first one's
    trace: bool = False  # leave times

    @property
    def group(self) -> int:
        """Programs that share a counter."""
        return {"8 counters": self.programs // 8, "flags": 1}.get(self.sync, self.programs)

    @property
    def label(self) -> str:
        shape = f"{self.programs} programs w{self.warps}"
        way = (
            f"ring of {self.slots}{', traced' * self.trace}"
            if self.is_ring
            else f"{self.ahead} ahead"
        )
        return f"{self.sync}, {shape}, {way}{', one layer' * self.same_layer}"


@dataclass(frozen=True, slots=True)
class Weights:
    """Of all layers, stacked."""

    qkv: Tensor  # [layers, 4 C, C]
    o: Tensor  # [layers, C, 2 C]
    gate_up: Tensor  # [layers, 6 C, C]
    down: Tensor  # [layers, C, 3 C]
    norms: Tensor  # [layers, 2, C]

    @classmethod
    def random(cls, num_layers: int, width: int) -> "Weights":
        def some(outputs: int, inputs: int) -> Tensor:
            weight = torch.empty(num_layers, outputs, inputs, device=DEVICE, dtype=DTYPE)
            return weight.normal_().mul_(inputs**-0.5)

        norms = torch.rand(num_layers, 2, width, device=DEVICE).add_(0.5).to(DTYPE)
        return cls(
            some(4 * width, width),
            some(width, 2 * width),
            some(6 * width, width),
            some(width, 3 * width),
            norms,
        )

    @property
    def width(self) -> int:
        return self.norms.shape[2]

    @property
    def bytes_per_layer(self) -> float:
        tensors = (self.qkv, self.o, self.gate_up, self.down)
        return sum(one.nbytes for one in tensors) / len(self.norms)


class Persistent:
    """The kernel, and the memory by which its programs meet."""

    def __init__(self, weights: Weights, variant: Variant, num_rows: int, num_layers: int) -> None:
        self.weights, self.variant = weights, variant
        self.num_rows, self.num_layers = num_rows, num_layers
        width, programs = weights.width, variant.programs
        is_tagged = variant.sync == "tagged"
        word = torch.int32 if torch.bfloat16 == DTYPE else torch.int64
        self.buffers = [
            torch.zeros(num_rows, n * width, device=DEVICE, dtype=word if is_tagged else DTYPE)
            for n in (1, 4, 1, 3)
        ]
        num = programs // variant.group
        self.counters = torch.zeros(4, STAGE_WORDS.value, device=DEVICE, dtype=torch.int32)
        self.epochs = torch.zeros(programs, device=DEVICE, dtype=torch.int32)
        self.errors = torch.zeros(1, device=DEVICE, dtype=torch.int32)
        shape = programs, num_layers * 4, NUM_EVENTS.value
        self.times = torch.zeros(shape, device=DEVICE, dtype=torch.int64)
        self.out = torch.empty(num_rows, width, device=DEVICE, dtype=DTYPE)
        self.options: dict[str, Any] = {
            "C": width,
            "R": width // programs,
            "GROUP": variant.group,
            "NUM": num,
            "TAGGED": is_tagged,
            "AHEAD": variant.ahead,
            "SPINS": 0 if INTERPRETED else 2 if variant.sync == "nobody" else 1,
            "WARPS": variant.warps,
            "num_warps": variant.warps,
        }
        if not variant.is_ring and programs > 132:
            self.options["maxnreg"] = 65536 // (2 * 32 * variant.warps)

    def launch(self, x: Tensor, first: int, last: int, stages: int) -> Any:
        w = self.weights
        if self.variant.is_ring:
            weights = [w.qkv, w.o, w.gate_up, w.down]
            if self.variant.slots:
                weights = [in_tiles(weight, w.width) for weight in weights]
            options = {name: o for name, o in self.options.items() if name not in ("R", "AHEAD")}
            return ring_kernel[(self.variant.programs,)](
                x, self.out, *weights, w.norms, *self.buffers, self.counters, self.epochs,
                self.errors, self.times, first, last, self.num_layers, self.num_rows, EPS,
                STAGES=stages, SLOTS=self.variant.slots, APART=int(not self.variant.same_layer),
                TRACE=self.variant.trace, **options,
            )  # fmt: skip
        return persistent_kernel[(self.variant.programs,)](
            x, self.out, w.qkv, w.o, w.gate_up, w.down, w.norms, *self.buffers, self.counters,
            self.epochs, self.errors, first, last, self.num_layers, self.num_rows, EPS,
            STAGES=stages, **self.options,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """One launch; under the interpreter, where programs run one after another, one a stage."""
        if not INTERPRETED:
            self.launch(x, 0, self.num_layers, 63)
            return self.out
        self.launch(x, 0, 0, BEGIN.value)
        for layer in range(self.num_layers):
            for stage in (QKV, O_PROJ, GATE_UP, DOWN):
                self.launch(x, layer, layer + 1, stage.value)
        self.launch(x, 0, 0, END.value)
        return self.out

    def resources(self) -> str:
        """Of the compiled kernel, not to be launched again by this object. Raises `RuntimeError` if
        its programs cannot run all at once."""
        kernel = self.launch(torch.empty_like(self.out), 0, 0, 63)
        facts = torch.cuda.get_device_properties(DEVICE)
        threads = 32 * (self.variant.warps + 4 * self.variant.is_ring)
        registers = -(-kernel.n_regs // 8) * 8 * threads
        shared = kernel.metadata.shared + 1024
        at_once = facts.multi_processor_count * min(
            65536 // registers, facts.shared_memory_per_multiprocessor // shared, 2048 // threads
        )
        found = f"{kernel.n_regs} registers, {kernel.n_spills} spilled, {shared} B shared"
        if at_once < self.variant.programs:
            raise RuntimeError(f"{found}: only {at_once} of {self.variant.programs} at once")
        return found


def in_tiles(weight: Tensor, width: int) -> Any:
    """For the copy engine: [inputs / 64, layers * outputs, 64], 8 outputs and C inputs a box."""
    num_inputs = weight.shape[2]
    chunks = weight.view(-1, num_inputs // 64, 64).transpose(0, 1)
    return TensorDescriptor.from_tensor(
        chunks, [width // 64, 8, 64], gl.NVMMASharedLayout(128, 16, 3)
    )


def engine_chain(weights: Weights, x: Tensor, num_layers: int) -> Tensor:
    """By the engine's kernels, as its layers call them."""
    hidden = x
    norm = weights.norms[0, 0]
    state = Weighed(x * norm, x.float().square().sum(1, keepdim=True))

    def of(stacked: Tensor, layer: int) -> Linear:
        return Linear(stacked[layer], None, {}, 0)

    for layer in range(num_layers):
        qkv = skinny_linear(state.values, of(weights.qkv, layer), norm=(state.squares, EPS))
        heads = as_heads(qkv, weights.width)
        residual = skinny_add(
            heads, of(weights.o, layer), hidden, next_norm=weights.norms[layer, 1]
        )
        hidden, state = weighed_residual(residual)
        act = skinny_linear(
            state.values, of(weights.gate_up, layer), norm=(state.squares, EPS), gated=True
        )
        next_norm = weights.norms[(layer + 1) % num_layers, 0]
        residual = skinny_add(act, of(weights.down, layer), hidden, next_norm=next_norm)
        hidden, state = weighed_residual(residual)
    return hidden


def weighed_residual(residual: Residual) -> tuple[Tensor, Weighed]:
    assert residual.weighed is not None
    return residual.hidden, residual.weighed


def as_heads(qkv: Tensor, width: int) -> Tensor:
    """What o multiplies: the first numbers of qkv's result as they lie."""
    return qkv.view(-1)[: len(qkv) * 2 * width].view(len(qkv), 2 * width)


def exact_chain(weights: Weights, x: Tensor, num_layers: int) -> Tensor:
    """In float32."""
    hidden, width = x.float(), (weights.width,)
    for layer in range(num_layers):
        norms = weights.norms[layer].float()
        qkv = F.rms_norm(hidden, width, norms[0], EPS) @ weights.qkv[layer].float().T
        hidden = hidden + as_heads(qkv, width[0]) @ weights.o[layer].float().T
        gate_up = F.rms_norm(hidden, width, norms[1], EPS) @ weights.gate_up[layer].float().T
        gate, up = gate_up.chunk(2, dim=1)
        hidden = hidden + (F.silu(gate) * up) @ weights.down[layer].float().T
    return hidden


# ---------------------------------------------------------------- running


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def median_time(run: Any, launches: int = 4) -> float:
    """Seconds of one run, of which a graph holds some: the median of replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    graph.replay()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(33)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return spans[len(spans) // 2] / launches * 1e-3


RINGS = [
    Variant(sync, warps=warps, slots=slots, is_ring=True)
    for warps, slots in ((8, 12), (16, 11))
    for sync in ("counter", "8 counters", "flags", "tagged")
]
REGISTERS = [
    Variant("counter"),
    Variant("counter", ahead=2),
    Variant("counter", warps=16),
    Variant("counter", programs=256, warps=4),
    Variant("flags"),
    Variant("tagged"),
]
# Not right, and so not checked: what it takes to read the weights, and what it takes to wait.
BOUNDS = [
    Variant("nobody", slots=12, is_ring=True),
    Variant("counter", slots=12, is_ring=True, same_layer=True),
    Variant("tagged", slots=12, is_ring=True, same_layer=True),
]
TRACED = [Variant(sync, slots=12, is_ring=True, trace=True) for sync in ("counter", "tagged")]
ALL = RINGS + REGISTERS + BOUNDS + TRACED


class Case:
    """Inputs, and what the chain makes of them."""

    def __init__(self, weights: Weights, num_rows: int, num_layers: int) -> None:
        self.weights, self.num_rows, self.num_layers = weights, num_rows, num_layers
        self.x = torch.randn(num_rows, weights.width, device=DEVICE).to(DTYPE)
        self.expected = exact_chain(weights, self.x, num_layers)
        self.engine_error = self.error_of(engine_chain(weights, self.x, num_layers))

    def error_of(self, out: Tensor) -> float:
        return relative_error(out, self.expected)


def check(case: Case, variant: Variant) -> tuple[Persistent, float]:
    """The way, and its error after some launches. Raises `RuntimeError` if it gave up or is wrong.

    Within what the engine's kernels lose by rounding, and half as much again.
    """
    way = Persistent(case.weights, variant, case.num_rows, case.num_layers)
    worst = 0.0
    for _ in range(3):
        way.out.fill_(math.nan)
        error = case.error_of(way(case.x))
        if way.errors.item():
            raise RuntimeError("a wait has given up")
        if not error <= 1.5 * case.engine_error + 1e-6:
            raise RuntimeError(f"error {error:.1e}, the engine's {case.engine_error:.1e}")
        worst = max(worst, error)
    return way, worst


def where_time_goes(way: Persistent) -> str:
    """Cycles of each part of a stage, the mean over programs and all layers but the first."""
    times = way.times.view(way.variant.programs, way.num_layers, 4, -1)[:, 1:].double()
    parts = times.diff(dim=3).mean(dim=(0, 1)).tolist()
    whole = float((times[:, -1, -1, -1] - times[:, 0, 0, 0]).mean()) / (way.num_layers - 1)
    stages = zip(("qkv", "o", "gate_up", "down"), parts, strict=True)
    told = "; ".join(f"{name} {' '.join(f'{n:.0f}' for n in some)}" for name, some in stages)
    return f"{whole:.0f} cycles a layer, until {', '.join(EVENTS)}: {told}"


def interpret() -> None:
    """Small shapes, a launch a stage."""
    for width, variants in (
        (64, [Variant(sync, programs=8, warps=2, ahead=ahead)
              for sync in ("counter", "8 counters", "flags", "tagged") for ahead in (1, 2)]),
        (128, [Variant(sync, programs=16, warps=1, is_ring=True)
               for sync in ("counter", "8 counters", "flags", "tagged")]),
    ):  # fmt: skip
        weights = Weights.random(2, width)
        for num_rows in (1, 3, 8):
            case = Case(weights, num_rows, 2)
            for variant in variants:
                _, error = check(case, variant)
                print(f"{num_rows} rows {variant.label:50} error {error:.1e}", flush=True)


def measure(weights: Weights, num_layers: int) -> None:
    floor = weights.bytes_per_layer / BANDWIDTH
    lines: list[tuple[int, str, float, float, str]] = []
    failed = set()
    for num_rows in (1, 8):
        cases = [Case(weights, num_rows, some) for some in (1, num_layers)]
        x = cases[1].x
        seconds = median_time(partial(engine_chain, weights, x, num_layers)) / num_layers
        lines.append((num_rows, "the engine's kernels", cases[1].engine_error, seconds, ""))
        print(lines[-1], flush=True)
        for variant in ALL:
            if variant.label in failed:
                continue
            try:
                found, error = "", math.nan
                found = Persistent(weights, variant, num_rows, 1).resources()
                if variant in BOUNDS:
                    way = Persistent(weights, variant, num_rows, num_layers)
                else:
                    check(cases[0], variant)
                    way, error = check(cases[1], variant)
                seconds = median_time(partial(way, x)) / num_layers
                if way.errors.item():
                    raise RuntimeError("a wait has given up")
                if variant.trace:
                    found = where_time_goes(way)
                lines.append((num_rows, variant.label, error, seconds, found))
                print(lines[-1], flush=True)
            except Exception as failure:  # one way must not end the others
                failed.add(variant.label)
                note = f"{type(failure).__name__}: {str(failure)[:150]}"
                lines.append((num_rows, variant.label, math.nan, math.nan, note))
                print(lines[-1], flush=True)
                if "CUDA" in str(failure):  # nothing more runs in this process
                    report(lines, floor)
                    return
    report(lines, floor)


def report(lines: list[tuple[int, str, float, float, str]], floor: float) -> None:
    """floor: seconds that the bytes of a layer take."""
    print(f"\nµs a layer; its bytes at {BANDWIDTH * 1e-12} TB/s take {floor * 1e6:.1f}")
    for num_rows, label, error, seconds, note in lines:
        print(f"{num_rows} rows  {label:52} error {error:.1e} {seconds * 1e6:7.2f} µs "
              f"{floor / seconds:5.2f} of the floor  {note}")  # fmt: skip


def compile_share(share: int) -> None:
    """Into Triton's cache, without a GPU."""
    leave_launches_out(Gpu((9, 0), 132))
    weights = Weights.random(1, 1024)
    jobs: list[Callable[[], object]] = [
        partial(engine_chain, weights, torch.zeros(rows, 1024, dtype=DTYPE), 1) for rows in (1, 8)
    ]
    x = torch.zeros(1, 1024, dtype=DTYPE)
    jobs += [lambda variant=variant: Persistent(weights, variant, 1, 1)(x) for variant in ALL]
    for job in jobs[share::NUM_COMPILERS]:
        job()


def compile_all() -> None:
    command = [sys.executable, __file__, "--compile"]
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen([*command, str(share)], env=blind) for share in range(NUM_COMPILERS)
    ]
    end = time.monotonic() + COMPILE_S
    for process in processes:
        try:
            process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # what it has not compiled is compiled where it is launched


def main() -> None:
    torch.manual_seed(0)
    if "--compile" in sys.argv:
        compile_share(int(sys.argv[2]))
    elif INTERPRETED:
        interpret()
    elif "--measure" in sys.argv:
        measure(Weights.random(28, 1024), 28)
    else:
        began = time.monotonic()
        compile_all()
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        # A process of its own can be ended whatever a kernel waits for.
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, __file__, "--measure"], check=False, timeout=MEASURE_S)
        print(f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
