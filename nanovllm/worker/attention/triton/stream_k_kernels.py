"""Triton kernels of many rows with one query token: attention that reads memory without pauses.

`backend` launches them, after `stream_plan_kernel` has laid all rows' tiles end to end. In
every layer `stream_kernel` cuts that line into equal ranges ("Stream-K", Osama et al. 2023), and
`combine_kernel` joins what a row has in several of them, in their order. Where the cuts fall, and
so a row's last bits, depends on all rows' lengths.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton.decode_kernels import absorb_tile, join, leave_part
from nanovllm.worker.attention.triton.decode_plan import LINE, RANGE, prefix_splits
from nanovllm.worker.attention.triton.prefill_kernels import (
    FLOOR,
    blocks_of,
    vectors_in,
    with_sinks,
)
from nanovllm.worker.kernels.triton.e4m3 import multiplied_as


@triton.jit(do_not_specialize=["table_stride"])
def stream_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM], rotated; token stride query_stride
    query_stride,
    keys, values, out, partial_out, partial_max, partial_sum,  # as in decode_kernel
    lines, ranges, totals,  # as stream_plan_kernel leaves them
    shared_keys,  # [num_rows] int32, if SHARED
    block_tables,
    table_stride,
    scale,
    sinks,  # [num_heads] fp32, if SINKS
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program attends for the heads of one KV head to the tiles of one range."""
    if PDL:
        gdc_launch_dependents()
    kv_head, which = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    share = tl.load(totals)
    num_tiles = tl.minimum(share, tl.load(totals + 1) - which * share)
    if num_tiles > 0:
        _stream(
            query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
            lines, ranges + which * RANGE, num_tiles, shared_keys, block_tables, table_stride,
            kv_head, scale, sinks, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFTCAP,
            SINKS, BLOCK_G, SLOTS, SHARED, BLOCK_N, TMA, PDL,
        )  # fmt: skip
    elif PDL:
        gdc_wait()


@triton.jit
def _line(lines, index):
    """Row, token, first key and end of a row that decodes; see LINE."""
    line = lines + index * LINE
    return tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)


@triton.jit
def _stream(
    query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
    lines, record, num_tiles, shared_keys, block_tables, table_stride, kv_head, scale,
    sinks, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_G: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One loop over the tiles of all rows: the next row's are on their way while one ends.

    What a tile's loads depend on is loaded a tile ahead, and carried. The queries of the group are
    repeated until they make a tile for the tensor cores: repeated in registers, all but free.
    record: see RANGE.
    """
    index, part, start = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    row, token, _, end = _line(lines, index)
    blocks = blocks_of(block_tables + row.to(tl.int64) * table_stride, start, end, BLOCK_SIZE,
                       BLOCK_N, TMA)  # fmt: skip
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
    REPEATS: tl.constexpr = BLOCK_G // MEMBERS  # noqa: N806
    WIDTH: tl.constexpr = KV_HEADS * GROUP * HEAD_DIM  # noqa: N806
    CACHED: tl.constexpr = keys.dtype if TMA else keys.dtype.element_ty  # noqa: N806
    DTYPE: tl.constexpr = multiplied_as(query.dtype.element_ty, CACHED)  # noqa: N806
    members = tl.arange(0, MEMBERS)
    lanes = tl.arange(0, BLOCK_D)
    real = (members < GROUP)[:, None] & (lanes < HEAD_DIM)[None, :]
    places = (kv_head * GROUP + members)[:, None] * HEAD_DIM + lanes[None, :]
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak, total = tl.full([BLOCK_G], FLOOR, tl.float32), tl.zeros([BLOCK_G], tl.float32)
    for tile in tl.range(0, num_tiles):
        q = tl.load(query + token.to(tl.int64) * query_stride + places, real, other=0.0)
        q = tl.broadcast_to(q[None, :, :], [REPEATS, MEMBERS, BLOCK_D])
        q = tl.reshape(q, [BLOCK_G, BLOCK_D]).to(DTYPE)
        k, v = vectors_in(blocks, keys, values, start, end, kv_head, DTYPE, KV_HEADS * HEAD_DIM,
                          BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
        acc, peak, total = absorb_tile(q, k, v, start, end, tl.maximum(end - WINDOW, 0), scale,
                                       acc, peak, total, BLOCK_N, WINDOW, SOFTCAP)  # fmt: skip
        ends = start + BLOCK_N >= end
        is_last = tile + 1 == num_tiles
        advances = ends & (not is_last)
        index += advances.to(tl.int32)
        next_row, next_token, next_first, next_end = _line(lines, index)
        if ends | is_last:
            is_whole = ends & (part == 0)
            if SHARED:
                is_whole &= tl.load(shared_keys + row) == 0
            _leave(acc, peak, total, is_whole, out + token.to(tl.int64) * WIDTH + places, real,
                   partial_out, partial_max, partial_sum, row.to(tl.int64) * KV_HEADS + kv_head,
                   part, sinks, kv_head, GROUP, BLOCK_D, MEMBERS, REPEATS, SLOTS,
                   SINKS)  # fmt: skip
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            peak = tl.full([BLOCK_G], FLOOR, tl.float32)
            total = tl.zeros([BLOCK_G], tl.float32)
        row, token, end = next_row, next_token, next_end
        part = tl.where(advances, 0, part)
        start = tl.where(advances, next_first, start + BLOCK_N)
        # Behind the range's last tile nothing is attended to, but a block of this row is looked up.
        blocks = blocks_of(block_tables + row.to(tl.int64) * table_stride,
                           tl.minimum(start, end - 1), end, BLOCK_SIZE, BLOCK_N, TMA)  # fmt: skip


@triton.jit
def _leave(
    acc, peak, total, is_whole, targets, real, partial_out, partial_max, partial_sum,
    row_head, part, sinks, kv_head, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    MEMBERS: tl.constexpr, REPEATS: tl.constexpr, SLOTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What a row has in a range: at `targets` if that is all of it, else for `join`.

    The lines of `acc` repeat those of the group, REPEATS times: one of each is stored.
    """
    acc = tl.max(tl.reshape(acc, [REPEATS, MEMBERS, BLOCK_D]), 0)
    peak = tl.max(tl.reshape(peak, [REPEATS, MEMBERS]), 0)
    total = tl.max(tl.reshape(total, [REPEATS, MEMBERS]), 0)
    if is_whole:
        members = tl.arange(0, MEMBERS)
        total = with_sinks(total, peak, sinks, kv_head * GROUP + members, members < GROUP, SINKS)
        tl.store(targets, (acc / total[:, None]).to(targets.dtype.element_ty), real)
    else:
        leave_part(acc, peak, total, partial_out, partial_max, partial_sum, row_head, part,
                   GROUP, BLOCK_D, MEMBERS, SLOTS)  # fmt: skip


@triton.jit
def combine_kernel(
    out, partial_out, partial_max, partial_sum, lines, totals,  # as in stream_kernel
    shared_keys,  # [num_rows] int32, if SHARED
    sinks,  # [num_heads] fp32, if SINKS
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SHARED: tl.constexpr, SINKS: tl.constexpr, MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program joins a row's parts for the heads of one KV head, if there are several."""
    if PDL:
        gdc_launch_dependents()
    line, kv_head = lines + tl.program_id(0) * LINE, tl.program_id(1)
    row, token, num_parts = tl.load(line), tl.load(line + 1), tl.load(line + 4)
    decodes = tl.program_id(0) < tl.load(totals + 2)
    num_prefix = 0
    if SHARED:
        num_shared = tl.load(shared_keys + row, decodes, other=0)
        num_prefix = prefix_splits(num_shared, SLOTS - MAX_SPLITS)
    if PDL:
        gdc_wait()
    if decodes & (num_parts + num_prefix > 1):
        join(
            out + token.to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM), kv_head,
            partial_out, partial_max, partial_sum, row.to(tl.int64) * KV_HEADS + kv_head,
            num_parts, num_prefix, sinks, GROUP, HEAD_DIM, BLOCK_D, MAX_SPLITS, SLOTS, SHARED,
            SINKS, 16,
        )  # fmt: skip
