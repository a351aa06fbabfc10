"""Kernels that read keys shared by all decoding rows once, for all rows together.

`triton_attention` launches them: the first finds, on the device, how many leading blocks the rows'
tables have in common; the second attends to those like a prefill, rows and grouped heads in one
tile (cascade inference: Juravsky et al., "Hydragen", 2024), and leaves its parts beside those of
the rows' own keys for `combine_kernel`.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton_attention_kernels import (
    FLOOR,
    absorb,
    key_and_value,
    shared_split,
)

COMPARED = tl.constexpr(16)  # table columns compared at once


@triton.jit
def find_shared_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    block_tables,
    table_stride,
    shared,  # [2] int32, out: number of shared keys, a multiple of 64, and a row that has them
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    MIN_SHARED: tl.constexpr,
    MIN_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Rows of up to MIN_SHARED keys (padding, too) neither share nor keep others from it."""
    rows = tl.arange(0, BLOCK_ROWS)
    present = rows < num_rows
    num_keys = tl.load(seq_lens + rows, present, other=0)
    num_queries = tl.load(query_start_loc + rows + 1, present, other=0)
    num_queries -= tl.load(query_start_loc + rows, present, other=0)
    shares = (num_queries == 1) & (num_keys > MIN_SHARED)
    model = tl.min(tl.where(shares, rows, BLOCK_ROWS), 0)
    # A row's last key is its own: every row must have keys left for its own splits.
    most = tl.min(tl.where(shares, (num_keys - 1) // BLOCK_SIZE, 2**30), 0)
    going = tl.sum(shares.to(tl.int32), 0) >= MIN_ROWS
    num_blocks = 0
    while going:
        columns = num_blocks + tl.arange(0, COMPARED)
        inside = columns < most
        own = tl.load(block_tables + model.to(tl.int64) * table_stride + columns, inside, other=0)
        tables = block_tables + rows.to(tl.int64)[:, None] * table_stride + columns[None, :]
        others = tl.load(tables, shares[:, None] & inside[None, :], other=0)
        differs = (others != own[None, :]) & shares[:, None]
        equal = (tl.max(differs.to(tl.int32), 0) == 0) & inside
        num_equal = tl.min(tl.where(equal, COMPARED, tl.arange(0, COMPARED)), 0)
        num_blocks += num_equal
        going = num_equal == COMPARED
    num_shared = num_blocks * BLOCK_SIZE // 64 * 64
    tl.store(shared, tl.where(num_shared >= MIN_SHARED, num_shared, 0))
    tl.store(shared + 1, model)


@triton.jit
def shared_prefix_kernel(
    query, query_stride, keys, values, partial_out, partial_max, partial_sum,  # as decode_kernel's
    shared,
    seq_lens,
    query_start_loc,
    num_rows,
    block_tables,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M // GROUP rows, the heads of one KV head, one split of the shared keys."""
    if PDL:
        gdc_launch_dependents()
    kv_head, split = tl.program_id(0), tl.program_id(1)
    num_shared = tl.load(shared)
    begin = split * shared_split(num_shared, SLOTS - MAX_SPLITS)
    end = tl.minimum(begin + shared_split(num_shared, SLOTS - MAX_SPLITS), num_shared)
    if PDL:
        gdc_wait()
    if begin < end:
        members = tl.arange(0, BLOCK_M)
        lanes = tl.arange(0, BLOCK_D)
        rows = tl.program_id(2) * (BLOCK_M // GROUP) + members // GROUP
        present = (rows < num_rows) & (members < BLOCK_M // GROUP * GROUP)
        tokens = tl.load(query_start_loc + rows, present, other=0)
        decodes = tl.load(query_start_loc + rows + 1, present, other=0) == tokens + 1
        present &= decodes & (tl.load(seq_lens + rows, present, other=0) > num_shared)
        heads = kv_head * GROUP + members % GROUP
        places = (tokens.to(tl.int64) * query_stride + heads * HEAD_DIM)[:, None] + lanes[None, :]
        q = tl.load(query + places, present[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)
        table = block_tables + tl.load(shared + 1).to(tl.int64) * table_stride
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(begin, end, BLOCK_N):
            k, v = key_and_value(keys, values, table, start, end, kv_head, q.dtype,
                                 KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
                                 TMA)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            acc, peak, total = absorb(scores, scale, v, acc, peak, total)
        parts = (rows.to(tl.int64) * (KV_HEADS * GROUP) + heads) * SLOTS + MAX_SPLITS + split
        tl.store(partial_out + parts[:, None] * BLOCK_D + lanes[None, :], acc, present[:, None])
        tl.store(partial_max + parts, peak, present)
        tl.store(partial_sum + parts, total, present)
