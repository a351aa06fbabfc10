"""A kernel that reads leading keys which decoding rows share once, for all those rows together.

`backend` launches it before `stream_kernel`. It attends like a prefill, rows and grouped
heads in one tile (cascade inference: Juravsky et al., "Hydragen", 2024), and leaves its parts in
the slots behind those of the rows' own splits.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton.decode_plan import shared_split
from nanovllm.worker.attention.triton.prefill_kernels import (
    FLOOR,
    absorb,
    key_and_value,
    products,
)


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def shared_prefix_kernel(
    query, query_stride, keys, values, partial_out, partial_max, partial_sum,  # as stream_kernel's
    shared_keys,  # [num_rows] int32: how many, 0 for rows that do not share
    leader,  # [1] int32: a row that does
    query_start_loc,
    num_rows,
    block_tables,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M // GROUP rows, the heads of one KV head, one split of the shared keys."""
    if PDL:
        gdc_launch_dependents()
    kv_head, split = tl.program_id(0), tl.program_id(1)
    model = tl.load(leader)
    num_shared = tl.load(shared_keys + model)
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
        present &= tl.load(shared_keys + rows, present, other=0) > 0
        heads = kv_head * GROUP + members % GROUP
        places = (tokens.to(tl.int64) * query_stride + heads * HEAD_DIM)[:, None] + lanes[None, :]
        q = tl.load(query + places, present[:, None] & (lanes < HEAD_DIM)[None, :], other=0.0)
        table = block_tables + model.to(tl.int64) * table_stride
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(begin, end, BLOCK_N):
            k, v = key_and_value(keys, values, table, start, end, kv_head, q.dtype,
                                 KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
                                 TMA)  # fmt: skip
            scores = products(q, k, scale, SOFTCAP)
            acc, peak, total = absorb(scores, scale, v, acc, peak, total)
        parts = (rows.to(tl.int64) * (KV_HEADS * GROUP) + heads) * SLOTS + MAX_SPLITS + split
        tl.store(partial_out + parts[:, None] * BLOCK_D + lanes[None, :], acc, present[:, None])
        tl.store(partial_max + parts, peak, present)
        tl.store(partial_sum + parts, total, present)
