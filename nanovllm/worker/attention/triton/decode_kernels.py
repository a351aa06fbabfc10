"""Triton kernel of a few rows with one query token: split-KV ("Flash-Decoding", Dao et al. 2023).

`backend` launches `decode_kernel` after `plan_kernel` has cut rows up, if all splits fit
on the device at once. Latency is all there, so it also does what lies before and behind: it rotates
queries, writes the new keys and values, and the last split of a row to end joins them all, in their
order. `stream_k_kernels` serve more rows.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton.decode_plan import RECORD
from nanovllm.worker.attention.triton.prefill_kernels import (
    FLOOR,
    absorb,
    blocks_of,
    capped,
    key_and_value,
    products,
    vectors_in,
    with_sinks,
)
from nanovllm.worker.kernels.triton.e4m3 import multiplied_as, narrowed


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    qkv,  # [num_tokens, (KV_HEADS * GROUP + 2 * KV_HEADS) * HEAD_DIM], not rotated
    qkv_stride,
    keys,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], as values.
    values,  # If TMA: descriptors, both [num_slots, KV_HEADS * HEAD_DIM], boxes [BLOCK_N, HEAD_DIM]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial_out,  # [num_rows, num_heads, SLOTS, BLOCK_D] fp32
    partial_max,  # [num_rows, num_heads, SLOTS] fp32, in units of log2
    partial_sum,  # like partial_max
    arrivals,  # [num_rows, KV_HEADS] int32, zero before and after
    work, num_work, block_tables, table_stride,
    scale,  # softmax scale * log2(e)
    cache, value_offset: tl.int64,  # keys, and how far behind them values lie, to be written
    cos_sin,  # [max_positions, HEAD_DIM] fp32
    q_weight, k_weight, eps,
    sinks,  # [num_heads] fp32, if SINKS
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr, MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: one split of one row, all heads of one KV head at once."""
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(0)
    record = work + item // KV_HEADS * RECORD
    row, split, num_splits = tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2)
    begin, end = tl.load(record + 3), tl.load(record + 4)
    token, position = tl.load(record + 5).to(tl.int64), tl.load(record + 6)
    if item < tl.load(num_work) * KV_HEADS:
        kv_head = item % KV_HEADS
        acc, peak, total = _attend(
            qkv + token * qkv_stride, keys, values, block_tables + row * table_stride, kv_head,
            begin, end, position, scale, cache, value_offset, cos_sin, q_weight, k_weight, eps,
            KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_G, BLOCK_N, TMA,
            NORM, PDL,
        )  # fmt: skip
        _finish(
            acc, peak, total, out + token * (KV_HEADS * GROUP * HEAD_DIM), partial_out,
            partial_max, partial_sum, arrivals, kv_head, row, split, num_splits, sinks, KV_HEADS,
            GROUP, HEAD_DIM, BLOCK_D, BLOCK_G, MAX_SPLITS, SLOTS, SINKS,
        )  # fmt: skip
    elif PDL:
        gdc_wait()


@triton.jit
def _attend(
    qkv, keys, values, block_table, kv_head, begin, end, position, scale,
    cache, value_offset, cos_sin, q_weight, k_weight, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """To keys begin … end: a result that is not divided yet [BLOCK_G, BLOCK_D], its peak and total
    [BLOCK_G]. Lines of queries beyond the group repeat it. qkv: of this token.
    """
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
    lanes, members = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, MEMBERS)[:, None]
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak, total = tl.full([BLOCK_G], FLOOR, tl.float32), tl.zeros([BLOCK_G], tl.float32)
    first = tl.maximum(position + 1 - WINDOW, 0)
    DTYPE: tl.constexpr = multiplied_as(qkv.dtype.element_ty, cache.dtype.element_ty)  # noqa: N806
    # The row's last key is that of this token: not in the cache yet.
    cached_end = tl.minimum(end, position)
    # What lies in the cache is from earlier steps: neither the first tile nor tables need wait.
    k, v = key_and_value(keys, values, block_table, begin, tl.maximum(cached_end, begin + 1),
                         kv_head, DTYPE, KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D,
                         BLOCK_N, TMA)  # fmt: skip
    blocks = blocks_of(block_table, tl.minimum(begin + BLOCK_N, end - 1), end, BLOCK_SIZE, BLOCK_N,
                       TMA)  # fmt: skip
    cos, sin = _angles(cos_sin, position, lanes, HEAD_DIM)
    q_factors, k_factors = _factors(q_weight, k_weight, lanes, HEAD_DIM, NORM)
    block = tl.load(block_table + position // BLOCK_SIZE).to(tl.int64)
    if PDL:
        gdc_wait()
    query, key, new_v = _load_row(qkv, kv_head, end > position, members, lanes, KV_HEADS, GROUP,
                                  HEAD_DIM)  # fmt: skip
    q = _rotated(query, cos, sin, q_weight, q_factors, eps, HEAD_DIM, NORM)
    q = tl.broadcast_to(q[None, :, :], [BLOCK_G // MEMBERS, MEMBERS, BLOCK_D])
    q = tl.reshape(q, [BLOCK_G, BLOCK_D]).to(DTYPE)
    if end > position:
        new_k = _rotated(key, cos, sin, k_weight, k_factors, eps, HEAD_DIM, NORM)
        # As the cache will have them, since later steps read from there.
        new_k = narrowed(new_k, cache.dtype.element_ty).to(qkv.dtype.element_ty)
        new_v = narrowed(new_v, cache.dtype.element_ty).to(qkv.dtype.element_ty)
        slot = (block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + kv_head
        _keep(cache + slot * HEAD_DIM + lanes, value_offset, new_k, new_v, lanes < HEAD_DIM)
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1)
        peak = capped(score, scale, SOFTCAP) * scale
        total = tl.full([BLOCK_G], 1.0, tl.float32)
        acc += new_v.to(tl.float32)
    acc, peak, total = absorb_tile(q, k, v, begin, cached_end, first, scale, acc, peak, total,
                                   BLOCK_N, WINDOW, SOFTCAP)  # fmt: skip
    for start in tl.range(begin + BLOCK_N, cached_end, BLOCK_N):
        k, v = vectors_in(blocks, keys, values, start, end, kv_head, DTYPE, KV_HEADS * HEAD_DIM,
                          BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
        # Where the next tile lies is known a tile ahead.
        blocks = blocks_of(block_table, tl.minimum(start + BLOCK_N, end - 1), end, BLOCK_SIZE,
                           BLOCK_N, TMA)  # fmt: skip
        acc, peak, total = absorb_tile(q, k, v, start, cached_end, first, scale, acc, peak, total,
                                       BLOCK_N, WINDOW, SOFTCAP)  # fmt: skip
    return acc, peak, total


@triton.jit
def _finish(
    acc, peak, total, out_row, partial_out, partial_max, partial_sum, arrivals,
    kv_head, row, split, num_splits, sinks, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Into `out_row` if the split is all there is; else the last one to arrive joins all parts."""
    heads, lanes = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    if num_splits == 0:
        real = (heads < GROUP)[:, None] & (lanes < HEAD_DIM)[None, :]
        places = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + lanes[None, :]
        total = with_sinks(total, peak, sinks, kv_head * GROUP + heads, heads < GROUP, SINKS)
        tl.store(out_row + places, (acc / total[:, None]).to(out_row.dtype.element_ty), real)
    else:
        row_head = row * KV_HEADS + kv_head
        leave_part(acc, peak, total, partial_out, partial_max, partial_sum, row_head, split,
                   GROUP, BLOCK_D, BLOCK_G, SLOTS)  # fmt: skip
        tl.debug_barrier()  # all threads' parts are written before one thread says so
        if tl.atomic_add(arrivals + row_head, 1, sem="acq_rel") == num_splits - 1:
            MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
            # What registers hold; 16 of each head are as many as there mostly are.
            AT_ONCE: tl.constexpr = min(64, 8192 // BLOCK_D, 16 * MEMBERS)  # noqa: N806
            join(out_row, kv_head, partial_out, partial_max, partial_sum, row_head, num_splits, 0,
                 sinks, GROUP, HEAD_DIM, BLOCK_D, MAX_SPLITS, SLOTS, False, SINKS,
                 AT_ONCE)  # fmt: skip
            tl.store(arrivals + row_head, 0)


@triton.jit
def _keep(places, value_offset, key, value, real):
    """Cache a key, and its value `value_offset` elements behind."""
    dtype = places.dtype.element_ty
    tl.store(places, narrowed(key, dtype), real)
    tl.store(places + value_offset, narrowed(value, dtype), real)


@triton.jit
def leave_part(acc, peak, total, partial_out, partial_max, partial_sum, row_head, split,
               GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
               SLOTS: tl.constexpr):  # fmt: skip
    """Store what one split of a row makes of the heads of one KV head, for `join`."""
    heads = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_D)
    parts = (row_head * GROUP + heads) * SLOTS + split
    part_lanes = parts[:, None] * BLOCK_D + lanes[None, :]
    tl.store(partial_out + part_lanes, acc, (heads < GROUP)[:, None])
    tl.store(partial_max + parts, peak, heads < GROUP)
    tl.store(partial_sum + parts, total, heads < GROUP)


@triton.jit
def absorb_tile(q, k, v, start, end, first, scale, acc, peak, total, BLOCK_N: tl.constexpr,
                WINDOW: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """Attend to keys start … start + BLOCK_N, of which those in first … end are visible."""
    places = start + tl.arange(0, BLOCK_N)
    visible = places < end
    if WINDOW > 0:
        visible &= places >= first
    scores = products(q, k, scale, SOFTCAP)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    return absorb(scores, scale, v, acc, peak, total)


@triton.jit
def _angles(cos_sin, position, lanes, HEAD_DIM: tl.constexpr):
    """Cosines and signed sines for a head that lies at a position, in the shape of `lanes`."""
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    places = (
        cos_sin + position.to(tl.int64) * HEAD_DIM + tl.where(lanes < HALF, lanes, lanes - HALF)
    )
    cos = tl.load(places, lanes < HEAD_DIM, other=0.0)
    sin = tl.load(places + HALF, lanes < HEAD_DIM, other=0.0)
    return cos, tl.where(lanes < HALF, -sin, sin)


@triton.jit
def _others(lanes, HEAD_DIM: tl.constexpr):
    """The lane that each is rotated with (neox halves)."""
    return tl.where(lanes < HEAD_DIM // 2, lanes + HEAD_DIM // 2, lanes - HEAD_DIM // 2)


@triton.jit
def _factors(q_weight, k_weight, lanes, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Of the norms of queries and keys: the weights of lanes and of those they are rotated with."""
    q_factors, k_factors = (lanes, lanes), (lanes, lanes)
    if NORM:
        inside, others = lanes < HEAD_DIM, _others(lanes, HEAD_DIM)
        q_factors = (tl.load(q_weight + lanes, inside, other=0.0),
                     tl.load(q_weight + others, inside, other=0.0))  # fmt: skip
        k_factors = (tl.load(k_weight + lanes, inside, other=0.0),
                     tl.load(k_weight + others, inside, other=0.0))  # fmt: skip
    return q_factors, k_factors


@triton.jit
def _load_row(qkv, kv_head, has_new, members, lanes, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
              HEAD_DIM: tl.constexpr):  # fmt: skip
    """Queries of the group, the key and the value; of queries and key also the lanes that theirs
    are rotated with. All are asked for before any is looked at, since each takes as long to come
    as all. Key and value only if this split `has_new` ones.

    members: [MEMBERS, 1]; lanes: [1, BLOCK_D].
    """
    one = tl.arange(0, 1)[:, None]
    inside, others = lanes < HEAD_DIM, _others(lanes, HEAD_DIM)
    queries = qkv + (kv_head * GROUP + members) * HEAD_DIM
    real = (members < GROUP) & inside
    key = qkv + (KV_HEADS * GROUP + kv_head + one) * HEAD_DIM
    inside &= one < has_new.to(tl.int32)
    query = tl.load(queries + lanes, real, other=0.0), tl.load(queries + others, real, other=0.0)
    new_k = tl.load(key + lanes, inside, other=0.0), tl.load(key + others, inside, other=0.0)
    new_v = tl.load(key + KV_HEADS * HEAD_DIM + lanes, inside, other=0.0)
    return query, new_k, new_v


@triton.jit
def _rotated(head, cos, sin, weight, factors, eps, HEAD_DIM: tl.constexpr,
             NORM: tl.constexpr):  # fmt: skip
    """Heads [n, BLOCK_D], normed if asked for and rotated. Rounds where `Kernels.rope_and_cache`
    does. head, factors: of lanes, and of those they are rotated with."""
    dtype = head[0].dtype
    x, other = head[0].to(tl.float32), head[1].to(tl.float32)
    if NORM:
        norm = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / HEAD_DIM + eps)
        x, other = x * norm, other * norm
        if weight.dtype.element_ty == dtype:  # rounded before the weight, as Llama's norms are
            x, other = x.to(dtype).to(tl.float32), other.to(dtype).to(tl.float32)
        x = (x * factors[0].to(tl.float32)).to(dtype).to(tl.float32)
        other = (other * factors[1].to(tl.float32)).to(dtype).to(tl.float32)
    return (x * cos + other * sin).to(dtype)


@triton.jit
def join(
    out_row, kv_head, partial_out, partial_max, partial_sum, row_head, num_splits, num_prefix,
    sinks, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, SINKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Parts of the heads of one KV head, into `out_row`: own splits, then those of a shared prefix.

    AT_ONCE: parts, of all heads together, that are loaded at once.
    """
    MEMBERS: tl.constexpr = triton.next_power_of_2(GROUP)  # noqa: N806
    JOINED: tl.constexpr = AT_ONCE // MEMBERS if MEMBERS < AT_ONCE else 1  # noqa: N806
    first_part = row_head * GROUP * SLOTS
    parts, peaks, sums = (
        partial_out + first_part * BLOCK_D, partial_max + first_part, partial_sum + first_part
    )  # fmt: skip
    acc = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
    peak = tl.full([MEMBERS], FLOOR, tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc, peak, total = _join_some(
        parts, peaks, sums, 0, num_splits, acc, peak, total,
        GROUP, MEMBERS, BLOCK_D, SLOTS, JOINED,
    )  # fmt: skip
    if SHARED:
        acc, peak, total = _join_some(
            parts, peaks, sums, MAX_SPLITS, MAX_SPLITS + num_prefix, acc, peak, total,
            GROUP, MEMBERS, BLOCK_D, SLOTS, JOINED,
        )  # fmt: skip
    members = tl.arange(0, MEMBERS)
    total = with_sinks(total, peak, sinks, kv_head * GROUP + members, members < GROUP, SINKS)
    members = members[:, None]
    lanes = tl.arange(0, BLOCK_D)[None, :]
    targets = out_row + (kv_head * GROUP + members) * HEAD_DIM + lanes
    inside = (members < GROUP) & (lanes < HEAD_DIM)
    total = tl.maximum(total, 1e-30)[:, None]  # of members beyond the group, nothing
    tl.store(targets, (acc / total).to(out_row.dtype.element_ty), inside)


@triton.jit
def _join_some(parts, peaks, sums, begin, end, acc, peak, total, GROUP: tl.constexpr,
               MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
               JOINED: tl.constexpr):  # fmt: skip
    """Joins the parts in slots begin … end, written by other programs: past the L1 cache."""
    members = tl.arange(0, MEMBERS)[:, None]
    lanes = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, JOINED):
        slots = start + tl.arange(0, JOINED)[None, :]
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
