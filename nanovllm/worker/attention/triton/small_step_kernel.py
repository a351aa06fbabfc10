"""Triton kernel of a small step with prompts: all rows in one launch, as `decode_kernel` has it.

`backend` launches it after `small_plan_kernel` has cut rows into tiles of queries, and those into
splits. It also rotates, writes new keys and values, and the last split of a tile to end joins them
all, in their order. Keys of a row's other tiles it rotates anew: they may not be cached yet.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.attention.triton.decode_plan import TILE_RECORD
from nanovllm.worker.attention.triton.prefill_kernels import FLOOR, absorb, capped, with_sinks
from nanovllm.worker.kernels.triton.e4m3 import multiplied_as, narrowed, widened
from nanovllm.worker.kernels.triton.layer_kernels import normed, rotated


@triton.jit(do_not_specialize=["table_stride"])
def small_step_kernel(
    qkv,  # [num_tokens, (KV_HEADS * GROUP + 2 * KV_HEADS) * HEAD_DIM], not rotated
    qkv_stride,
    cache,  # keys [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], read and written
    value_offset: tl.int64,  # how far behind them values lie
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial,  # [splits, KV_HEADS, BLOCK_M * (BLOCK_D + 2)] fp32: results, then peaks and totals
    arrivals,  # [splits * KV_HEADS] int32, zero before and after
    work, num_work,  # as `small_plan_kernel` leaves them
    block_tables, table_stride,
    scale,  # softmax scale * log2(e)
    cos_sin,  # [max_positions, HEAD_DIM] fp32
    q_weight, k_weight, eps,
    sinks,  # [num_heads] fp32, if SINKS
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr, AT_ONCE: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: one split of a tile of BLOCK_M // GROUP queries, all heads of one KV head."""
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(0)
    index, kv_head = item // KV_HEADS, item % KV_HEADS
    record = work + index * TILE_RECORD
    row, split, num_splits = tl.load(record).to(tl.int64), tl.load(record + 1), tl.load(record + 2)
    begin, end = tl.load(record + 3), tl.load(record + 4)
    token, position = tl.load(record + 5).to(tl.int64), tl.load(record + 6)
    num_queries, context = tl.load(record + 7), tl.load(record + 8)
    if index < tl.load(num_work):
        lines = tl.arange(0, BLOCK_M)  # token-major: the heads of a token lie together
        local, heads = lines // GROUP, kv_head * GROUP + lines % GROUP
        present = local < num_queries
        acc, peak, total = _attend(
            qkv + token * qkv_stride, qkv_stride, cache, value_offset,
            block_tables + row * table_stride, kv_head, heads, local, present, begin, end, position,
            context, scale, cos_sin, q_weight, k_weight, eps, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D,
            BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, OWN, NORM, PDL,
        )  # fmt: skip
        is_last = num_splits == 0
        if num_splits > 0:
            acc, peak, total, is_last = _join_if_last(
                acc, peak, total, present, partial, arrivals, (index - split) * KV_HEADS + kv_head,
                split, num_splits, KV_HEADS, BLOCK_M, BLOCK_D, AT_ONCE,
            )  # fmt: skip
        if is_last:
            lanes = tl.arange(0, BLOCK_D)
            total = with_sinks(total, peak, sinks, heads, present, SINKS)
            result = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
            places = ((token + local) * (KV_HEADS * GROUP) + heads)[:, None] * HEAD_DIM
            real = present[:, None] & (lanes < HEAD_DIM)[None, :]
            tl.store(out + places + lanes[None, :], result, real)
    elif PDL:
        gdc_wait()


@triton.jit
def _attend(
    qkv, qkv_stride, cache, value_offset, block_table, kv_head, heads, local, present,
    begin, end, position, context, scale, cos_sin, q_weight, k_weight, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, OWN: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """To places begin … end of a row, of which those from `context` on are this step's tokens: a
    result that is not divided yet [BLOCK_M, BLOCK_D], its peak and total [BLOCK_M].

    qkv: of the tile's first token, which lies at `position`; local, heads, present: of each line.
    """
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    DTYPE: tl.constexpr = multiplied_as(qkv.dtype.element_ty, cache.dtype.element_ty)  # noqa: N806
    lanes = tl.arange(0, triton.next_power_of_2(HALF))
    inside = lanes < HALF
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak, total = tl.full([BLOCK_M], FLOOR, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    # What lies in the cache is from earlier steps: neither the first tile nor tables need wait.
    cached_end = tl.minimum(end, context)
    blocks = _blocks(block_table, begin, cached_end, BLOCK_SIZE, BLOCK_N)
    first, second, v = _cached(blocks, cache, value_offset, begin, cached_end, kv_head, DTYPE,
                               KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N)  # fmt: skip
    blocks = _blocks(block_table, begin + BLOCK_N, cached_end, BLOCK_SIZE, BLOCK_N)
    places = position + local
    cos, sin = _angles(cos_sin, places, present, lanes, HEAD_DIM)
    start = tl.maximum(begin, context)
    own_blocks = _blocks(block_table, start, end, BLOCK_SIZE, OWN)
    own_cos, own_sin = _own_angles(cos_sin, start, end, lanes, HEAD_DIM, OWN)
    if PDL:
        gdc_wait()
    queries = qkv + (local * qkv_stride + heads * HEAD_DIM)[:, None] + lanes[None, :]
    real = present[:, None] & inside[None, :]
    q_first = tl.load(queries, real, other=0.0)
    q_second = tl.load(queries + HALF, real, other=0.0)
    own_first, own_second, own_v = _own(qkv, qkv_stride, start, end, position, kv_head, lanes,
                                        KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, OWN)  # fmt: skip
    q_first, q_second = _turned(q_first, q_second, cos, sin, q_weight, lanes, inside, eps, HALF,
                                NORM)  # fmt: skip
    q_first, q_second = q_first.to(DTYPE), q_second.to(DTYPE)
    # In both loops the next tile is on its way while one is attended to.
    for here in tl.range(start, end, OWN, num_stages=1):
        new_first, new_second, new_v = own_first, own_second, own_v
        new_cos, new_sin, new_blocks = own_cos, own_sin, own_blocks
        own_blocks = _blocks(block_table, here + OWN, end, BLOCK_SIZE, OWN)
        own_cos, own_sin = _own_angles(cos_sin, here + OWN, end, lanes, HEAD_DIM, OWN)
        own_first, own_second, own_v = _own(
            qkv, qkv_stride, here + OWN, end, position, kv_head, lanes, KV_HEADS, GROUP, HEAD_DIM,
            BLOCK_D, OWN,
        )  # fmt: skip
        acc, peak, total = _absorb_own(
            q_first, q_second, new_first, new_second, new_v, new_cos, new_sin, new_blocks, cache,
            value_offset, kv_head, places, here, end, position, scale, k_weight, eps, acc, peak,
            total, lanes, inside, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFTCAP, OWN,
            NORM,
        )  # fmt: skip
    for here in tl.range(begin, cached_end, BLOCK_N, num_stages=1):
        old_first, old_second, old_v = first, second, v
        first, second, v = _cached(blocks, cache, value_offset, here + BLOCK_N, cached_end, kv_head,
                                   DTYPE, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE,
                                   BLOCK_N)  # fmt: skip
        # Where the next tile but one lies is known a tile ahead.
        blocks = _blocks(block_table, here + 2 * BLOCK_N, cached_end, BLOCK_SIZE, BLOCK_N)
        acc, peak, total = _absorb_cached(q_first, q_second, old_first, old_second, old_v, here,
                                          cached_end, places, scale, acc, peak, total, BLOCK_N,
                                          WINDOW, SOFTCAP)  # fmt: skip
    return acc, peak, total


@triton.jit
def _blocks(block_table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """In which block each of BLOCK_N places from `start` on lies; from `end` on, those before."""
    places = tl.minimum(start + tl.arange(0, BLOCK_N), tl.maximum(end - 1, 0))
    return tl.load(block_table + places // BLOCK_SIZE)


@triton.jit
def _cached(
    blocks, cache, value_offset, start, end, kv_head, DTYPE: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys in halves, and values, of BLOCK_N places from `start` on, which lie in `blocks`; of
    those from `end` on any that are finite."""
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    BLOCK_H: tl.constexpr = triton.next_power_of_2(HALF)  # noqa: N806
    places = tl.minimum(start + tl.arange(0, BLOCK_N), tl.maximum(end - 1, 0))
    slots = blocks * BLOCK_SIZE + places % BLOCK_SIZE
    slots = (slots * KV_HEADS + kv_head).to(tl.int64) * HEAD_DIM
    half, lanes = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_D)[None, :]
    keys, values = cache + slots[:, None] + half, cache + value_offset + slots[:, None] + lanes
    if BLOCK_H == HALF:
        first, second = tl.load(keys), tl.load(keys + HALF)
        v = tl.load(values)
    else:
        first = tl.load(keys, half < HALF, other=0.0)
        second = tl.load(keys + HALF, half < HALF, other=0.0)
        v = tl.load(values, lanes < HEAD_DIM, other=0.0)
    return widened(first, DTYPE), widened(second, DTYPE), widened(v, DTYPE)


@triton.jit
def _angles(cos_sin, places, present, lanes, HEAD_DIM: tl.constexpr):
    """Cosines and sines of half a head at each place, [places, lanes]."""
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    angles = cos_sin + (places * HEAD_DIM)[:, None] + lanes[None, :]
    real = present[:, None] & (lanes < HALF)[None, :]
    return tl.load(angles, real, other=0.0), tl.load(angles + HALF, real, other=0.0)


@triton.jit
def _own_angles(cos_sin, start, end, lanes, HEAD_DIM: tl.constexpr, OWN: tl.constexpr):
    """Those of OWN places from `start` on, up to `end`."""
    places = start + tl.arange(0, OWN)
    return _angles(cos_sin, places, places < end, lanes, HEAD_DIM)


@triton.jit
def _own(
    qkv, qkv_stride, start, end, position, kv_head, lanes, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Keys in halves, not rotated, and values of the row's tokens at places `start` on, up to
    `end`; nothing beyond. qkv: of the token at `position`."""
    places = start + tl.arange(0, OWN)
    tokens = qkv + ((places - position) * qkv_stride)[:, None]
    keys = tokens + (KV_HEADS * GROUP + kv_head) * HEAD_DIM + lanes[None, :]
    real = (places < end)[:, None] & (lanes < HEAD_DIM // 2)[None, :]
    first = tl.load(keys, real, other=0.0)
    second = tl.load(keys + HEAD_DIM // 2, real, other=0.0)
    all_lanes = tl.arange(0, BLOCK_D)[None, :]
    values = tokens + (KV_HEADS * (GROUP + 1) + kv_head) * HEAD_DIM + all_lanes
    return first, second, tl.load(values, (places < end)[:, None] & (all_lanes < HEAD_DIM), 0.0)


@triton.jit
def _turned(first, second, cos, sin, weight, lanes, inside, eps, HALF: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    """Heads given in halves, normed if asked for and rotated. Rounds where
    `Kernels.rope_and_cache` does."""
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        first, second = normed(first, second, weight, lanes, inside, eps, HALF, dtype)
    first, second = rotated(first, second, cos, sin)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _absorb_own(
    q_first, q_second, first, second, v, cos, sin, blocks, cache, value_offset, kv_head,
    query_places, start, end, position, scale, k_weight, eps, acc, peak, total, lanes, inside,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OWN: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Rotate keys of this step's tokens, cache those of the tile's own, and attend to all."""
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    first, second = _turned(first, second, cos, sin, k_weight, lanes, inside, eps, HALF, NORM)
    # As the cache will have them, since later steps read from there.
    CACHED: tl.constexpr = cache.dtype.element_ty  # noqa: N806
    first, second, v = narrowed(first, CACHED), narrowed(second, CACHED), narrowed(v, CACHED)
    places, all_lanes = start + tl.arange(0, OWN), tl.arange(0, BLOCK_D)
    mine = (places >= position) & (places < end)
    slots = blocks * BLOCK_SIZE + places % BLOCK_SIZE
    slots = (slots * KV_HEADS + kv_head).to(tl.int64) * HEAD_DIM
    keys = cache + slots[:, None] + lanes[None, :]
    real = mine[:, None] & inside[None, :]
    tl.store(keys, first, real)
    tl.store(keys + HALF, second, real)
    values = cache + value_offset + slots[:, None] + all_lanes[None, :]
    tl.store(values, v, mine[:, None] & (all_lanes < HEAD_DIM)[None, :])
    visible = (places < end)[None, :] & (places[None, :] <= query_places[:, None])
    if WINDOW > 0:
        visible &= query_places[:, None] - places[None, :] < WINDOW
    DTYPE: tl.constexpr = q_first.dtype  # noqa: N806
    scores = _scores(q_first, q_second, widened(first, DTYPE), widened(second, DTYPE), scale,
                     SOFTCAP)  # fmt: skip
    scores = tl.where(visible, scores, float("-inf"))
    return absorb(scores, scale, widened(v, DTYPE), acc, peak, total)


@triton.jit
def _absorb_cached(
    q_first, q_second, first, second, v, start, end, query_places, scale, acc, peak, total,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend to places from `start` on, up to `end`, which lies before all queries."""
    places = start + tl.arange(0, BLOCK_N)
    visible = (places < end)[None, :]
    if WINDOW > 0:
        visible &= query_places[:, None] - places[None, :] < WINDOW
    scores = _scores(q_first, q_second, first, second, scale, SOFTCAP)
    scores = tl.where(visible, scores, float("-inf"))
    return absorb(scores, scale, v, acc, peak, total)


@triton.jit
def _scores(q_first, q_second, first, second, scale, SOFTCAP: tl.constexpr):
    """Of queries and keys in halves, unscaled."""
    scores = tl.dot(q_first, tl.trans(first), input_precision="ieee")
    scores = tl.dot(q_second, tl.trans(second), scores, input_precision="ieee")
    return capped(scores, scale, SOFTCAP)


@triton.jit
def _join_if_last(
    acc, peak, total, present, partial, arrivals, first, split, num_splits,
    KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Leave a split of a tile for the program that arrives last. Returns whether that is this one,
    and then all of them joined, in their order.

    first: which part is the tile's first, KV_HEADS parts before its next. AT_ONCE: 4, 2 or 1 that
    are loaded before any is looked at, since each takes as long to come as all.
    """
    PART: tl.constexpr = BLOCK_M * (BLOCK_D + 2)  # noqa: N806
    STRIDE: tl.constexpr = KV_HEADS * PART  # noqa: N806
    members, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    results = members[:, None] * BLOCK_D + lanes[None, :]
    ends = BLOCK_M * BLOCK_D + members
    parts = partial + first.to(tl.int64) * PART
    mine = parts + split * STRIDE
    tl.store(mine + results, acc, present[:, None])
    tl.store(mine + ends, peak, present)
    tl.store(mine + ends + BLOCK_M, total, present)
    tl.debug_barrier()  # all threads' parts are written before one thread says so
    is_last = tl.atomic_add(arrivals + first, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, num_splits, AT_ONCE, num_stages=1):
            place, left = parts + start * STRIDE, num_splits - start
            acc_0, peak_0, total_0 = _part(place, results, ends, present, BLOCK_M)
            if AT_ONCE > 1:
                there = present & (left > 1)
                acc_1, peak_1, total_1 = _part(place + STRIDE, results, ends, there, BLOCK_M)
            if AT_ONCE > 2:
                there = present & (left > 2)
                acc_2, peak_2, total_2 = _part(place + 2 * STRIDE, results, ends, there, BLOCK_M)
                there = present & (left > 3)
                acc_3, peak_3, total_3 = _part(place + 3 * STRIDE, results, ends, there, BLOCK_M)
            acc, peak, total = _joined(acc, peak, total, acc_0, peak_0, total_0)
            if AT_ONCE > 1:
                acc, peak, total = _joined(acc, peak, total, acc_1, peak_1, total_1)
            if AT_ONCE > 2:
                acc, peak, total = _joined(acc, peak, total, acc_2, peak_2, total_2)
                acc, peak, total = _joined(acc, peak, total, acc_3, peak_3, total_3)
        tl.store(arrivals + first, 0)
    return acc, peak, total, is_last


@triton.jit
def _part(place, results, ends, present, BLOCK_M: tl.constexpr):
    """Written by another program: past the L1 cache. Nothing where it is not present."""
    peak = tl.load(place + ends, present, other=FLOOR, cache_modifier=".cg")
    total = tl.load(place + ends + BLOCK_M, present, other=0.0, cache_modifier=".cg")
    acc = tl.load(place + results, present[:, None], other=0.0, cache_modifier=".cg")
    return acc, peak, total


@triton.jit
def _joined(acc, peak, total, other_acc, other_peak, other_total):
    """Two parts of the same queries, of different keys."""
    new_peak = tl.maximum(peak, other_peak)
    shrink, weight = tl.exp2(peak - new_peak), tl.exp2(other_peak - new_peak)
    acc = acc * shrink[:, None] + other_acc * weight[:, None]
    return acc, new_peak, total * shrink + other_total * weight
