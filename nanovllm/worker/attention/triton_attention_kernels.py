"""Triton kernels of paged causal attention with grouped queries; `triton_attention` launches them.

Rows with one query token go through split-KV decoding (Dao et al., "Flash-Decoding", 2023), all
others through FlashAttention-2 over pages (Dao 2023). How a row is cut up and in which order its
parts are summed follows from its own length alone: its bits do not depend on its neighbours.
Each kernel waits for its predecessor before it touches anything but its arguments.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOOR = tl.constexpr(-1.0e30)  # finite, so that a tile without a visible key gives no NaN


@triton.jit
def _first_visible(last_position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key a query may see, rounded down to a tile. WINDOW 0: no window."""
    if WINDOW > 0:
        return tl.maximum(last_position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    return 0


@triton.jit
def _split_size(num_keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per split of a row with that many visible keys: whole tiles, at most MAX_SPLITS."""
    per_split = tl.cdiv(tl.cdiv(num_keys, MAX_SPLITS), BLOCK_N) * BLOCK_N
    least = tl.where(num_keys <= 2 * MIN_SPLIT, MIN_SPLIT // 2, MIN_SPLIT)
    return tl.maximum(per_split, least)


@triton.jit
def plan_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    work,  # [num_rows * MAX_SPLITS] int32, out: row * MAX_SPLITS + split
    num_work,  # [1] int32, out
    num_rows,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program lists the splits of all rows that decode."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.arange(0, BLOCK_ROWS)
    present = rows < num_rows
    num_keys = tl.load(seq_lens + rows, present, other=0)
    first_token = tl.load(query_start_loc + rows, present, other=0)
    end_token = tl.load(query_start_loc + rows + 1, present, other=0)
    num_keys -= _first_visible(num_keys - 1, WINDOW, BLOCK_N)
    num_splits = tl.cdiv(num_keys, _split_size(num_keys, MIN_SPLIT, MAX_SPLITS, BLOCK_N))
    num_splits = tl.where(end_token - first_token == 1, num_splits, 0)
    ends = tl.cumsum(num_splits, 0)
    tl.store(num_work, tl.sum(num_splits))
    splits = tl.arange(0, MAX_SPLITS)
    places = (ends - num_splits)[:, None] + splits[None, :]
    entries = rows[:, None] * MAX_SPLITS + splits[None, :]
    tl.store(work + places, entries, splits[None, :] < num_splits[:, None])


@triton.jit
def _key_and_value(
    keys, value_offset, block_table, start, end,
    SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cached vectors of one head from place `start` on, [BLOCK_N, BLOCK_D] each.

    Places beyond the end repeat the last one: finite numbers, which masked scores cancel.
    """
    places = tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
    slots = tl.load(block_table + places // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE
    lanes = tl.arange(0, BLOCK_D)
    pointers = keys + ((slots + places % BLOCK_SIZE) * SLOT)[:, None] + lanes[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers), tl.load(pointers + value_offset)
    real = (lanes < HEAD_DIM)[None, :]
    return tl.load(pointers, real, other=0.0), tl.load(pointers + value_offset, real, other=0.0)


@triton.jit
def decode_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM], token stride query_stride
    query_stride,
    cache,  # keys [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]; values lie value_offset behind
    value_offset,
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial_out,  # [num_rows, KV_HEADS, GROUP, MAX_SPLITS, BLOCK_D] fp32
    partial_max,  # [num_rows, KV_HEADS, GROUP, MAX_SPLITS] fp32, in units of log2
    partial_sum,  # like partial_max
    arrivals,  # [num_rows, KV_HEADS] int32, zero before and after
    work,
    num_work,
    block_tables,
    table_stride,
    seq_lens,
    query_start_loc,
    scale,  # softmax scale * log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Programs share out the work list; the last to finish a row's splits combines them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lanes = tl.arange(0, BLOCK_D)
    heads = tl.arange(0, BLOCK_G)
    real = (heads < GROUP)[:, None] & (lanes < HEAD_DIM)[None, :]
    total_work = tl.load(num_work) * KV_HEADS
    for item in tl.range(tl.program_id(0), total_work, tl.num_programs(0)):
        entry = tl.load(work + item // KV_HEADS)
        kv_head = item % KV_HEADS
        row = entry // MAX_SPLITS
        split = entry % MAX_SPLITS
        num_keys = tl.load(seq_lens + row)
        token = tl.load(query_start_loc + row).to(tl.int64)
        begin = _first_visible(num_keys - 1, WINDOW, BLOCK_N)
        size = _split_size(num_keys - begin, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
        num_splits = tl.cdiv(num_keys - begin, size)
        begin += split * size
        end = tl.minimum(begin + size, num_keys)
        places = heads[:, None] * HEAD_DIM + lanes[None, :]
        head0 = kv_head * GROUP * HEAD_DIM
        q = tl.load(query + token * query_stride + head0 + places, real, other=0.0)
        acc, peak, total = _attend_one(
            q, cache + kv_head * HEAD_DIM, value_offset, block_tables + row.to(tl.int64) * table_stride,
            begin, end, num_keys, scale,
            KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_G, WINDOW, BLOCK_N, STAGES, SWAP,
        )  # fmt: skip
        out_row = out + token * (KV_HEADS * GROUP * HEAD_DIM) + head0
        if num_splits == 1:
            result = acc / total[:, None]
            tl.store(out_row + places, result.to(out.dtype.element_ty), real)
        else:
            place = (row.to(tl.int64) * KV_HEADS + kv_head) * GROUP * MAX_SPLITS + split
            parts = place + heads * MAX_SPLITS
            tl.store(
                partial_out + parts[:, None] * BLOCK_D + lanes[None, :],
                acc,
                (heads < GROUP)[:, None],
            )
            tl.store(partial_max + parts, peak, heads < GROUP)
            tl.store(partial_sum + parts, total, heads < GROUP)
            tl.debug_barrier()  # all threads' parts are written before one thread says so
            arrival = arrivals + row * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_splits - 1:
                for head in range(GROUP):
                    place = ((row.to(tl.int64) * KV_HEADS + kv_head) * GROUP + head) * MAX_SPLITS
                    result = _combine(
                        partial_out,
                        partial_max,
                        partial_sum,
                        place,
                        num_splits,
                        MAX_SPLITS,
                        BLOCK_D,
                    )
                    tl.store(
                        out_row + head * HEAD_DIM + lanes,
                        result.to(out.dtype.element_ty),
                        lanes < HEAD_DIM,
                    )
                tl.store(arrival, 0)


@triton.jit
def _attend_one(
    q, keys, value_offset, block_table, begin, end, num_keys, scale,
    SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    peak = tl.full([BLOCK_G], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if SWAP:
        acc = tl.zeros([BLOCK_D, BLOCK_G], tl.float32)
        qt = tl.trans(q)
    else:
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        places = start + tl.arange(0, BLOCK_N)
        k, v = _key_and_value(
            keys,
            value_offset,
            block_table,
            start,
            end,
            SLOT,
            BLOCK_SIZE,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
        )
        visible = places < end
        if WINDOW > 0:
            visible = visible & (places + WINDOW >= num_keys)
        if SWAP:
            scores = tl.dot(k, qt, input_precision="ieee") * scale  # [BLOCK_N, BLOCK_G]
            scores = tl.where(visible[:, None], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 0))
            weights = tl.exp2(scores - new_peak[None, :])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, 0)
            acc = tl.dot(
                tl.trans(v), weights.to(v.dtype), acc * shrink[None, :], input_precision="ieee"
            )
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_G, BLOCK_N]
            scores = tl.where(visible[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    if SWAP:
        acc = tl.trans(acc)
    return acc, peak, total


@triton.jit
def _combine(
    partial_out,
    partial_max,
    partial_sum,
    place,
    num_splits,
    MAX_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    splits = tl.arange(0, MAX_SPLITS)
    present = splits < num_splits
    peaks = tl.load(partial_max + place + splits, present, other=FLOOR, cache_modifier=".cg")
    totals = tl.load(partial_sum + place + splits, present, other=0.0, cache_modifier=".cg")
    parts = (place + splits)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    outs = tl.load(partial_out + parts, present[:, None], other=0.0, cache_modifier=".cg")
    weights = tl.exp2(peaks - tl.max(peaks, 0))
    return tl.sum(outs * weights[:, None], 0) / tl.sum(totals * weights, 0)


@triton.jit
def _absorb(scores, scale, value, acc, peak, total):
    """One step of online softmax (Milakov & Gimelshein 2018): scores [M, N], unscaled."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _query_tile(tile_rows, query_start_loc, seq_lens, index, TOKENS: tl.constexpr):
    """Which TOKENS queries the index-th tile holds; of one row, the longest tiles first.

    Row i owns tiles query_start_loc[i] // TOKENS + i and on, at least as many as it needs. A tile
    too many, or one of a row that decodes, has num_queries 0.
    """
    row = tl.load(tile_rows + index)
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    num_tiles = tl.cdiv(num_queries, TOKENS)
    tile = num_tiles - 1 - (index - first_token // TOKENS - row)
    absent = (tile < 0) | (num_queries == 1)
    context = tl.load(seq_lens + row) - num_queries
    first_query = tl.where(absent, 0, tile * TOKENS)
    return row, first_token, tl.where(absent, 0, num_queries), context, first_query


@triton.jit
def prefill_kernel(
    query,  # as in decode_kernel, like all that follow
    query_stride,
    cache,
    value_offset,
    out,
    block_tables,
    table_stride,
    seq_lens,
    query_start_loc,
    tile_rows,  # [number of tiles] int32
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program attends for BLOCK_M // GROUP tokens of one row and all heads of one KV head."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    SLOT: tl.constexpr = KV_HEADS * HEAD_DIM
    kv_head = tl.program_id(0)
    row, first_token, num_queries, context, first_query = _query_tile(
        tile_rows, query_start_loc, seq_lens, tl.program_id(1), TOKENS
    )
    members = tl.arange(0, BLOCK_M)  # token-major: the heads of a token lie together
    lanes = tl.arange(0, BLOCK_D)
    local = first_query + members // GROUP
    heads = kv_head * GROUP + members % GROUP
    real = ((local < num_queries) & (members < TOKENS * GROUP))[:, None] & (lanes < HEAD_DIM)
    tokens = (first_token + local).to(tl.int64)
    places = (tokens * query_stride + heads * HEAD_DIM)[:, None] + lanes
    q = tl.load(query + places, real, other=0.0)
    table = block_tables + row.to(tl.int64) * table_stride
    keys = cache + kv_head * HEAD_DIM
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(context + first_query + TOKENS, context + num_queries)
    end = tl.where(num_queries == 0, 0, end)
    begin = _first_visible(context + first_query, WINDOW, BLOCK_N)
    if WINDOW == 0:  # all these tokens see all these keys
        begin = tl.where(num_queries == 0, 0, (context + first_query + 1) // BLOCK_N * BLOCK_N)
        for start in tl.range(0, begin, BLOCK_N, num_stages=STAGES):
            k, v = _key_and_value(
                keys,
                value_offset,
                table,
                start,
                begin,
                SLOT,
                BLOCK_SIZE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            acc, peak, total = _absorb(scores, scale, v, acc, peak, total)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES if WINDOW else 1):
        k, v = _key_and_value(
            keys, value_offset, table, start, end, SLOT, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N
        )
        ahead = context + local[:, None] - (start + tl.arange(0, BLOCK_N))[None, :]
        visible = ahead >= 0
        if WINDOW > 0:
            visible &= ahead < WINDOW
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(visible, scores, float("-inf"))
        acc, peak, total = _absorb(scores, scale, v, acc, peak, total)
    total = tl.maximum(total, 1e-30)  # a tile without queries divides by it, too
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    places = (tokens * (SLOT * GROUP) + heads * HEAD_DIM)[:, None] + lanes
    tl.store(out + places, result, real)


@triton.jit
def prefill_pages_kernel(
    query_desc,  # [num_tokens, KV_HEADS * GROUP * HEAD_DIM], boxes [BLOCK_M, HEAD_DIM]
    key_desc,  # [num_slots, KV_HEADS * HEAD_DIM], boxes [BLOCK_N, HEAD_DIM]
    value_desc,
    out,
    block_tables,
    table_stride,
    seq_lens,
    query_start_loc,
    tile_rows,  # [number of tiles] int32
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Like prefill_kernel, where a block holds whole tiles: the copy engine (TMA) fetches them.

    Here a program attends for BLOCK_M tokens of one head. One loop, masked throughout: it is what
    the compiler can give to a producer warp and two groups of consumers.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    column = head // GROUP * HEAD_DIM
    row, first_token, num_queries, context, first_query = _query_tile(
        tile_rows, query_start_loc, seq_lens, tl.program_id(1), BLOCK_M
    )
    q = query_desc.load([first_token + first_query, head * HEAD_DIM])
    table = block_tables + row.to(tl.int64) * table_stride
    local = first_query + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(context + first_query + BLOCK_M, context + num_queries)
    end = tl.where(num_queries == 0, 0, end)
    for start in tl.range(0, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        slot = tl.load(table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
        k = key_desc.load([slot, column])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = tl.arange(0, BLOCK_N)[None, :] <= (context + local - start)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        v = value_desc.load([slot, column])
        acc, peak, total = _absorb(scores, scale, v, acc, peak, total)
    total = tl.maximum(total, 1e-30)  # a tile without queries divides by it, too
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tokens = (first_token + local).to(tl.int64)
    places = (tokens * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(out + places, result, (local < num_queries)[:, None])
