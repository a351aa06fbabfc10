"""Triton kernels of rows with one query token: split-KV ("Flash-Decoding", Dao et al. 2023).

`triton_attention` launches them, after `triton_decode_plan` has cut rows up. In every layer
`decode_kernel` attends and `combine_kernel` joins the splits of a row, in their order. For a few
rows, where latency is all, one kernel (FUSED) also does what lies before and behind: it rotates
queries, writes the new keys and values, and the last split of a row to end joins them all.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton_attention_kernels import FLOOR, absorb, key_and_value
from nanovllm.worker.attention.triton_decode_plan import (
    RECORD,
    least_split,
    prefix_splits,
    row_facts,
    splits_of,
)
from nanovllm.worker.kernels.triton_kernels import narrowed


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM], token stride query_stride; if FUSED all of qkv
    query_stride,
    keys,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], as values.
    values,  # If TMA: descriptors, both [num_slots, KV_HEADS * HEAD_DIM], boxes [BLOCK_N, HEAD_DIM]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial_out,  # [num_rows, num_heads, SLOTS, BLOCK_D] fp32
    partial_max,  # [num_rows, num_heads, SLOTS] fp32, in units of log2
    partial_sum,  # like partial_max
    arrivals,  # [num_rows, KV_HEADS] int32, zero before and after
    work, num_work, block_tables, table_stride,
    scale,  # softmax scale * log2(e)
    cache, value_offset: tl.int64,  # keys, and how far behind them values lie, for FUSED to write
    cos_sin,  # [max_positions, HEAD_DIM] fp32
    q_weight, k_weight, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_G: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    FUSED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs share out the work list: (split, KV head) each, all heads of the group at once."""
    if PDL:
        gdc_launch_dependents()
    item, stride = tl.program_id(0), tl.num_programs(0)
    num_items = tl.load(num_work) * KV_HEADS
    row, split, num_splits, begin, end, token, position = _record(work, item // KV_HEADS)
    if PDL and not FUSED:
        gdc_wait()
    if item < num_items:
        _decode_item(
            query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
            arrivals, block_tables + row * table_stride, item % KV_HEADS,
            row, split, num_splits, begin, end, token, position, scale, cache, value_offset,
            cos_sin, q_weight, k_weight, eps, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_SIZE,
            WINDOW, BLOCK_G, MAX_SPLITS, SLOTS, BLOCK_N, TMA, FUSED, NORM, PDL,
        )  # fmt: skip
    elif PDL and FUSED:
        gdc_wait()
    # The other records are not read ahead: Triton 3.6 takes a bound that a loop carries for the
    # first one's (its pass that removes layout conversions).
    for later in tl.range(item + stride, num_items, stride):
        row, split, num_splits, begin, end, token, position = _record(work, later // KV_HEADS)
        _decode_item(
            query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
            arrivals, block_tables + row * table_stride, later % KV_HEADS,
            row, split, num_splits, begin, end, token, position, scale, cache, value_offset,
            cos_sin, q_weight, k_weight, eps, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_SIZE,
            WINDOW, BLOCK_G, MAX_SPLITS, SLOTS, BLOCK_N, TMA, FUSED, NORM, PDL,
        )  # fmt: skip


@triton.jit
def _record(work, index):
    """A line of the work list; see RECORD."""
    record = work + index * RECORD
    row, split, num_splits = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    begin, end, token = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    position = tl.load(record + 6)
    return row.to(tl.int64), split, num_splits, begin, end, token.to(tl.int64), position


@triton.jit
def _decode_item(
    query, query_stride, keys, values, out, partial_out, partial_max, partial_sum, arrivals,
    block_table, kv_head, row, split, num_splits, begin, end, token, position, scale,
    cache, value_offset, cos_sin, q_weight, k_weight, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_G: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    FUSED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one row, for the heads of one KV head: into `out` if it is all there is."""
    heads = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_D)
    real = (heads < GROUP)[:, None] & (lanes < HEAD_DIM)[None, :]
    places = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + lanes[None, :]
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak, total = tl.full([BLOCK_G], FLOOR, tl.float32), tl.zeros([BLOCK_G], tl.float32)
    first = tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else 0
    if FUSED:
        # The row's last key is that of this token: not in the cache yet.
        is_last = end > position
        cached_end = tl.minimum(end, position)
        # What lies in the cache is from earlier steps, so the first tile need not wait.
        k, v = key_and_value(keys, values, block_table, begin, tl.maximum(cached_end, begin + 1),
                             kv_head, query.dtype.element_ty, KV_HEADS * HEAD_DIM, BLOCK_SIZE,
                             HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
        if PDL:
            gdc_wait()
        q, new_k, new_v = _rotate_row(
            query + token * query_stride, kv_head, position, cos_sin, q_weight, k_weight, eps,
            KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_G, NORM, cache.dtype.element_ty,
        )  # fmt: skip
        if is_last:
            slot = tl.load(block_table + position // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE
            slot = (slot + position % BLOCK_SIZE) * KV_HEADS + kv_head
            _keep(cache + slot * HEAD_DIM, value_offset, new_k, new_v, HEAD_DIM, BLOCK_D)
            peak = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
            total = tl.full([BLOCK_G], 1.0, tl.float32)
            acc += new_v.to(tl.float32)[None, :]
        acc, peak, total = _absorb_tile(q, k, v, begin, cached_end, first, scale, acc, peak, total,
                                        BLOCK_N, WINDOW)  # fmt: skip
        begin += BLOCK_N
    else:
        cached_end = end
        q = tl.load(query + token * query_stride + places, real, other=0.0)
    for start in tl.range(begin, cached_end, BLOCK_N):
        k, v = key_and_value(
            keys, values, block_table, start, cached_end, kv_head, query.dtype.element_ty,
            KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA,
        )  # fmt: skip
        acc, peak, total = _absorb_tile(q, k, v, start, cached_end, first, scale, acc, peak, total,
                                        BLOCK_N, WINDOW)  # fmt: skip
    out_row = out + token * (KV_HEADS * GROUP * HEAD_DIM)
    if num_splits == 0:
        tl.store(out_row + places, (acc / total[:, None]).to(out.dtype.element_ty), real)
    else:
        _leave_part(
            acc, peak, total, out_row, partial_out, partial_max, partial_sum, arrivals,
            row * KV_HEADS + kv_head, kv_head, split, num_splits,
            GROUP, HEAD_DIM, BLOCK_D, BLOCK_G, MAX_SPLITS, SLOTS, FUSED,
        )  # fmt: skip


@triton.jit
def _keep(place, value_offset, key, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cache a key, and its value `value_offset` elements behind."""
    lanes = tl.arange(0, BLOCK_D)
    dtype = place.dtype.element_ty
    tl.store(place + lanes, narrowed(key, dtype), lanes < HEAD_DIM)
    tl.store(place + value_offset + lanes, narrowed(value, dtype), lanes < HEAD_DIM)


@triton.jit
def _leave_part(
    acc, peak, total, out_row, partial_out, partial_max, partial_sum, arrivals,
    row_head, kv_head, split, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Store one split's part; if FUSED, the last one to arrive joins them all into `out_row`."""
    heads = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_D)
    parts = (row_head * GROUP + heads) * SLOTS + split
    part_lanes = parts[:, None] * BLOCK_D + lanes[None, :]
    tl.store(partial_out + part_lanes, acc, (heads < GROUP)[:, None])
    tl.store(partial_max + parts, peak, heads < GROUP)
    tl.store(partial_sum + parts, total, heads < GROUP)
    if FUSED:
        tl.debug_barrier()  # all threads' parts are written before one thread says so
        if tl.atomic_add(arrivals + row_head, 1, sem="acq_rel") == num_splits - 1:
            first_part = row_head * GROUP * SLOTS
            joined = _join(
                partial_out + first_part * BLOCK_D, partial_max + first_part,
                partial_sum + first_part, num_splits, 0,
                GROUP, BLOCK_D, MAX_SPLITS, SLOTS, 64,
            )  # fmt: skip
            members = tl.arange(0, triton.next_power_of_2(GROUP))[:, None]
            targets = out_row + (kv_head * GROUP + members) * HEAD_DIM + lanes[None, :]
            inside = (members < GROUP) & (lanes < HEAD_DIM)[None, :]
            tl.store(targets, joined.to(out_row.dtype.element_ty), inside)
            tl.store(arrivals + row_head, 0)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    out, partial_out, partial_max, partial_sum, seq_lens, query_start_loc, num_rows,
    shared_keys,  # [num_rows] int32, if SHARED
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SHARED: tl.constexpr,
    WINDOW: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program joins the parts of one head of one row, if that row decodes in several.

    For rows that are cut by their own length (MOST is 0 in plan_kernel).
    """
    if PDL:
        gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    num_keys, token, num_shared = row_facts(
        row, num_rows, seq_lens, query_start_loc, shared_keys, SHARED
    )
    least = least_split(num_keys, num_shared, MIN_SPLIT)
    _, _, num_splits = splits_of(num_keys, num_shared, least, WINDOW, MAX_SPLITS, BLOCK_N)
    num_prefix = prefix_splits(num_shared, SLOTS - MAX_SPLITS)
    if PDL:
        gdc_wait()
    if (num_splits > 0) & (num_splits + num_prefix > 1):
        first_part = (row.to(tl.int64) * HEADS + head) * SLOTS
        joined = _join(
            partial_out + first_part * BLOCK_D, partial_max + first_part, partial_sum + first_part,
            num_splits, num_prefix, 1, BLOCK_D, MAX_SPLITS, SLOTS, 16,
        )  # fmt: skip
        lanes = tl.arange(0, BLOCK_D)[None, :]
        places = (token.to(tl.int64) * HEADS + head) * HEAD_DIM + lanes
        tl.store(out + places, joined.to(out.dtype.element_ty), lanes < HEAD_DIM)


@triton.jit
def _absorb_tile(q, k, v, start, end, first, scale, acc, peak, total, BLOCK_N: tl.constexpr,
                 WINDOW: tl.constexpr):  # fmt: skip
    """Attend to keys start … start + BLOCK_N, of which those in first … end are visible."""
    places = start + tl.arange(0, BLOCK_N)
    visible = places < end
    if WINDOW > 0:
        visible &= places >= first
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(visible[None, :], scores, float("-inf"))
    return absorb(scores, scale, v, acc, peak, total)


@triton.jit
def _rotate_row(
    qkv, kv_head, position, cos_sin, q_weight, k_weight, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, NORM: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Queries of the group [BLOCK_G, BLOCK_D], rotated, and the new key and value [BLOCK_D].

    Rounds where `Kernels.rope_and_cache` does, and as the cache (of type KEPT) will, as later steps
    read from there. Lines of queries beyond the group repeat it.
    """
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
    lanes = tl.arange(0, BLOCK_D)
    members = tl.arange(0, MEMBERS)
    angles = (
        cos_sin + position.to(tl.int64) * HEAD_DIM + tl.where(lanes < HALF, lanes, lanes - HALF)
    )
    cos = tl.load(angles, lanes < HEAD_DIM, other=0.0)[None, :]
    sin = tl.load(angles + HALF, lanes < HEAD_DIM, other=0.0)[None, :]
    sin = tl.where((lanes < HALF)[None, :], -sin, sin)
    sources = qkv + (kv_head * GROUP + members)[:, None] * HEAD_DIM
    q = _rotate(sources, (members < GROUP)[:, None], cos, sin, q_weight, eps, HEAD_DIM, BLOCK_D,
                NORM)  # fmt: skip
    q = tl.broadcast_to(q[None, :, :], [BLOCK_G // MEMBERS, MEMBERS, BLOCK_D])
    key = qkv + (KV_HEADS * GROUP + kv_head + tl.arange(0, 1))[:, None] * HEAD_DIM
    new_k = _rotate(key, tl.full([1, 1], 1, tl.int1), cos, sin, k_weight, eps, HEAD_DIM, BLOCK_D,
                    NORM)  # fmt: skip
    value = qkv + (KV_HEADS * (GROUP + 1) + kv_head) * HEAD_DIM + lanes
    new_v = tl.load(value, lanes < HEAD_DIM, other=0.0)
    new_k = narrowed(tl.reshape(new_k, [BLOCK_D]), KEPT).to(q.dtype)
    return tl.reshape(q, [BLOCK_G, BLOCK_D]), new_k, narrowed(new_v, KEPT).to(q.dtype)


@triton.jit
def _rotate(sources, real, cos, sin, weight, eps, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    """Heads that start at `sources` [n, 1]: normed if asked for, and rotated (neox halves)."""
    dtype = sources.dtype.element_ty
    lanes = tl.arange(0, BLOCK_D)
    others = tl.where(lanes < HEAD_DIM // 2, lanes + HEAD_DIM // 2, lanes - HEAD_DIM // 2)
    inside = lanes < HEAD_DIM
    real = real & inside[None, :]
    x = tl.load(sources + lanes[None, :], real, other=0.0).to(tl.float32)
    other = tl.load(sources + others[None, :], real, other=0.0).to(tl.float32)
    if NORM:
        norm = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        factors = tl.load(weight + lanes, inside, other=0.0).to(tl.float32)[None, :]
        other_factors = tl.load(weight + others, inside, other=0.0).to(tl.float32)[None, :]
        x = ((x * norm).to(dtype).to(tl.float32) * factors).to(dtype).to(tl.float32)
        other = ((other * norm).to(dtype).to(tl.float32) * other_factors).to(dtype).to(tl.float32)
    return (x * cos + other * sin).to(dtype)


@triton.jit
def _join(parts, peaks, sums, num_splits, num_prefix, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
          MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Parts of GROUP heads, [heads, BLOCK_D]: own splits, then those of a shared prefix.

    AT_ONCE: parts, of all heads together, that are loaded at once.
    """
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
    acc = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
    peak = tl.full([MEMBERS], FLOOR, tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc, peak, total = _join_some(
        parts, peaks, sums, 0, num_splits, acc, peak, total,
        GROUP, MEMBERS, BLOCK_D, SLOTS, AT_ONCE,
    )  # fmt: skip
    if SLOTS > MAX_SPLITS:
        acc, peak, total = _join_some(
            parts, peaks, sums, MAX_SPLITS, MAX_SPLITS + num_prefix, acc, peak, total,
            GROUP, MEMBERS, BLOCK_D, SLOTS, AT_ONCE,
        )  # fmt: skip
    return acc / total[:, None]


@triton.jit
def _join_some(parts, peaks, sums, begin, end, acc, peak, total, GROUP: tl.constexpr,
               MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
               AT_ONCE: tl.constexpr):  # fmt: skip
    """Joins the parts in slots begin … end, written by other programs: past the L1 cache."""
    members = tl.arange(0, MEMBERS)[:, None]
    lanes = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, AT_ONCE // MEMBERS):
        slots = start + tl.arange(0, AT_ONCE // MEMBERS)[None, :]
        present = (slots < end) & (members < GROUP)
        places = members * SLOTS + slots  # [MEMBERS, JOINED]
        some_peaks = tl.load(peaks + places, present, other=FLOOR, cache_modifier=".cg")
        some_sums = tl.load(sums + places, present, other=0.0, cache_modifier=".cg")
        some = tl.load(parts + places[:, :, None] * BLOCK_D + lanes[None, None, :],
                       present[:, :, None], other=0.0, cache_modifier=".cg")  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(some_peaks, 1))
        weights = tl.where(present, tl.exp2(some_peaks - new_peak[:, None]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        acc = acc * shrink[:, None] + tl.sum(some * weights[:, :, None], 1)
        total = total * shrink + tl.sum(some_sums * weights, 1)
        peak = new_peak
    return acc, peak, total
