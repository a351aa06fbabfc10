"""Triton kernels of paged causal attention with grouped queries; `triton_attention` launches them.

Rows with one query token go through split-KV decoding (Dao et al., "Flash-Decoding", 2023), all
others through FlashAttention-2 over pages (Dao 2023). How a row is cut up and in which order its
parts are summed follows from its own length alone: its bits do not depend on its neighbours.
Where a block holds whole tiles of keys, the copy engine (TMA) fetches them.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOOR = tl.constexpr(-1.0e30)  # finite: a tile without a visible key gives no NaN
# Words of the work list per split: row, split, whether it is all there is, first key, end, token of
# the query, first visible key; one unused.
RECORD = tl.constexpr(8)
PLANNED_ROWS = tl.constexpr(32)  # per program of plan_kernel


@triton.jit
def _first_visible(last_position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key a query may see, rounded down to a tile. WINDOW 0: no window."""
    if WINDOW > 0:
        first = tl.maximum(last_position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    else:
        first = last_position * 0
    return first


@triton.jit
def splits_of(num_keys, num_shared, WINDOW: tl.constexpr, MIN_SPLIT: tl.constexpr,
              MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """First key, keys per split (whole tiles) and number of splits of decoding rows.

    num_shared: leading keys that rows longer than that share, and shared_prefix_kernel attends to.
    """
    own = tl.where(num_keys > num_shared, num_shared, 0)
    first = tl.maximum(_first_visible(num_keys - 1, WINDOW, BLOCK_N), own)
    per_split = tl.cdiv(tl.cdiv(num_keys - first, MAX_SPLITS), BLOCK_N) * BLOCK_N
    # Short rows mostly come in small batches, which leave most of the device idle.
    least = tl.where(num_keys - first <= 2 * MIN_SPLIT, MIN_SPLIT // 2, MIN_SPLIT)
    per_split = tl.maximum(per_split, least)
    return first, per_split, tl.cdiv(num_keys - first, per_split)


@triton.jit
def plan_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    shared,  # [2] int32: number of shared keys
    work,  # [num_rows * MAX_SPLITS, RECORD] int32, out
    num_work,  # [1] int32, out
    num_rows,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Lists the splits of all rows that decode, PLANNED_ROWS rows a program."""
    rows = tl.arange(0, BLOCK_ROWS)
    present = rows < num_rows
    num_keys = tl.load(seq_lens + rows, present, other=0)
    token = tl.load(query_start_loc + rows, present, other=0)
    end_token = tl.load(query_start_loc + rows + 1, present, other=0)
    num_shared = tl.load(shared)
    _, _, num_splits = splits_of(num_keys, num_shared, WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    num_splits = tl.where(end_token - token == 1, num_splits, 0)
    tl.store(num_work, tl.sum(num_splits))
    mine = tl.program_id(0) * PLANNED_ROWS
    before = tl.sum(tl.where(rows < mine, num_splits, 0))
    rows = mine + tl.arange(0, PLANNED_ROWS)
    present = rows < num_rows
    num_keys = tl.load(seq_lens + rows, present, other=0)[:, None]
    token = tl.load(query_start_loc + rows, present, other=0)[:, None]
    end_token = tl.load(query_start_loc + rows + 1, present, other=0)[:, None]
    first, per_split, num_splits = splits_of(
        num_keys, num_shared, WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_N
    )
    num_splits = tl.where(end_token - token == 1, num_splits, 0)
    splits = tl.arange(0, MAX_SPLITS)[None, :]
    record = work + (before + tl.cumsum(num_splits, 0) - num_splits + splits) * RECORD
    real = splits < num_splits
    begin = first + splits * per_split
    tl.store(record, rows[:, None] + splits * 0, real)
    tl.store(record + 1, splits + num_splits * 0, real)
    alone = (num_splits == 1) & ((num_shared == 0) | (num_keys <= num_shared))
    tl.store(record + 2, alone.to(tl.int32) + splits * 0, real)
    tl.store(record + 3, begin, real)
    tl.store(record + 4, tl.minimum(begin + per_split, num_keys), real)
    tl.store(record + 5, token + splits * 0, real)
    tl.store(record + 6, tl.maximum(num_keys - WINDOW, 0) + splits * 0, real)


@triton.jit
def key_and_value(
    keys, values, block_table, start, end, kv_head, DTYPE: tl.constexpr,
    SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Cached vectors of one head from place `start` on, [BLOCK_N, BLOCK_D] each, as DTYPE.

    Places from `end` on hold any finite numbers: masked scores cancel them.
    """
    if TMA:
        slot = tl.load(block_table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
        k = keys.load([slot, kv_head * HEAD_DIM])
        v = values.load([slot, kv_head * HEAD_DIM])
    else:
        places = tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
        slots = tl.load(block_table + places // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE
        slots += places % BLOCK_SIZE
        lanes = tl.arange(0, BLOCK_D)
        pointers = keys + (slots * SLOT + kv_head * HEAD_DIM)[:, None] + lanes[None, :]
        if HEAD_DIM == BLOCK_D:
            k = tl.load(pointers)
            v = tl.load(pointers + values)
        else:
            k = tl.load(pointers, (lanes < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(pointers + values, (lanes < HEAD_DIM)[None, :], other=0.0)
    return k.to(DTYPE), v.to(DTYPE)


@triton.jit
def absorb(scores, scale, value, acc, peak, total):
    """One step of online softmax (Milakov & Gimelshein 2018): scores [M, N], unscaled."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def decode_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM], token stride query_stride
    query_stride,
    keys,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]; values lie `values` elements behind.
    values,  # If TMA: descriptors, both [num_slots, KV_HEADS * HEAD_DIM], boxes [BLOCK_N, HEAD_DIM]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    partial_out,  # [num_rows, num_heads, SLOTS, BLOCK_D] fp32
    partial_max,  # [num_rows, num_heads, SLOTS] fp32, in units of log2
    partial_sum,  # like partial_max
    work, num_work, block_tables, table_stride,
    scale,  # softmax scale * log2(e)
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_G: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs share out the work list: (split, KV head) each, all heads of the group at once."""
    if PDL:
        gdc_launch_dependents()
    item, stride = tl.program_id(0), tl.num_programs(0)
    num_items = tl.load(num_work) * KV_HEADS
    row, split, alone, begin, end, token, first = _record(work + item // KV_HEADS * RECORD)
    if PDL:
        gdc_wait()
    if item < num_items:
        _decode_item(
            query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
            block_tables + row * table_stride, item % KV_HEADS,
            row, split, alone, begin, end, token, first, scale, KV_HEADS, GROUP, HEAD_DIM,
            BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_G, SLOTS, BLOCK_N, TMA,
        )  # fmt: skip
    # The other records are not read ahead: Triton 3.6 takes a bound that a loop carries for the
    # first one's (its pass that removes layout conversions).
    for later in tl.range(item + stride, num_items, stride):
        row, split, alone, begin, end, token, first = _record(work + later // KV_HEADS * RECORD)
        _decode_item(
            query, query_stride, keys, values, out, partial_out, partial_max, partial_sum,
            block_tables + row * table_stride, later % KV_HEADS,
            row, split, alone, begin, end, token, first, scale, KV_HEADS, GROUP, HEAD_DIM,
            BLOCK_D, BLOCK_SIZE, WINDOW, BLOCK_G, SLOTS, BLOCK_N, TMA,
        )  # fmt: skip


@triton.jit
def _record(record):
    """A row of the work list; see RECORD."""
    row, split, alone = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    begin, end, token = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    first = tl.load(record + 6)
    return row.to(tl.int64), split, alone, begin, end, token.to(tl.int64), first


@triton.jit
def _decode_item(
    query, query_stride, keys, values, out, partial_out, partial_max, partial_sum, block_table,
    kv_head, row, split, alone, begin, end, token, first, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_G: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One split of one row, for the heads of one KV head: into `out` if it is all there is."""
    heads = tl.arange(0, BLOCK_G)
    lanes = tl.arange(0, BLOCK_D)
    real = (heads < GROUP)[:, None] & (lanes < HEAD_DIM)[None, :]
    places = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + lanes[None, :]
    q = tl.load(query + token * query_stride + places, real, other=0.0)
    acc, peak, total = _attend_keys(
        q, keys, values, block_table, begin, end, first, kv_head, scale,
        KV_HEADS, BLOCK_SIZE, HEAD_DIM, BLOCK_D, WINDOW, BLOCK_G, BLOCK_N, TMA,
    )  # fmt: skip
    if alone != 0:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + token * (KV_HEADS * GROUP * HEAD_DIM) + places, result, real)
    else:
        parts = ((row * KV_HEADS + kv_head) * GROUP + heads) * SLOTS + split
        part_lanes = parts[:, None] * BLOCK_D + lanes[None, :]
        tl.store(partial_out + part_lanes, acc, (heads < GROUP)[:, None])
        tl.store(partial_max + parts, peak, heads < GROUP)
        tl.store(partial_sum + parts, total, heads < GROUP)


@triton.jit
def _attend_keys(
    q, keys, values, block_table, begin, end, first, kv_head, scale,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One token's heads [BLOCK_G, BLOCK_D] over keys begin … end, those before `first` hidden."""
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_G], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        k, v = key_and_value(
            keys, values, block_table, start, end, kv_head, q.dtype,
            KV_HEADS * HEAD_DIM, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA,
        )  # fmt: skip
        places = start + tl.arange(0, BLOCK_N)
        visible = places < end
        if WINDOW > 0:
            visible &= places >= first
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(visible[None, :], scores, float("-inf"))
        acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    return acc, peak, total


@triton.jit
def combine_kernel(
    out, partial_out, partial_max, partial_sum, seq_lens, query_start_loc, shared,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program joins the parts of one head of one row, if that row decodes in several.

    Slots from MAX_SPLITS on are those of the shared prefix.
    """
    if PDL:
        gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    num_keys, num_shared = tl.load(seq_lens + row), tl.load(shared)
    token = tl.load(query_start_loc + row).to(tl.int64)
    decodes = tl.load(query_start_loc + row + 1) == token + 1
    _, _, num_splits = splits_of(num_keys, num_shared, WINDOW, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    num_prefix = 0
    if BLOCK_SLOTS > MAX_SPLITS:
        size = shared_split(num_shared, SLOTS - MAX_SPLITS)
        num_prefix = tl.where(num_keys > num_shared, tl.cdiv(num_shared, size), 0)
    if PDL:
        gdc_wait()
    if decodes & (num_splits + num_prefix > 1):
        slots = tl.arange(0, BLOCK_SLOTS)
        lanes = tl.arange(0, BLOCK_D)
        present = (slots < num_splits) | ((slots >= MAX_SPLITS) & (slots - MAX_SPLITS < num_prefix))
        parts = (row.to(tl.int64) * HEADS + head) * SLOTS + slots
        peaks = tl.load(partial_max + parts, present, other=FLOOR)
        totals = tl.load(partial_sum + parts, present, other=0.0)
        part_lanes = parts[:, None] * BLOCK_D + lanes[None, :]
        outs = tl.load(partial_out + part_lanes, present[:, None], other=0.0)
        weights = tl.exp2(peaks - tl.max(peaks, 0))
        result = tl.sum(outs * weights[:, None], 0) / tl.sum(totals * weights, 0)
        place = (token * HEADS + head) * HEAD_DIM + lanes
        tl.store(out + place, result.to(out.dtype.element_ty), lanes < HEAD_DIM)


@triton.jit
def shared_split(num_shared, MAX_SPLITS: tl.constexpr):
    """Keys per split of the shared prefix: whole tiles of 64, at most MAX_SPLITS splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_shared, MAX_SPLITS), 64) * 64, 256)


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
    query, query_stride, keys, values, out, block_tables, table_stride,  # as in decode_kernel
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    tile_rows,  # [number of tiles] int32
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program attends for BLOCK_M // GROUP tokens of one row and all heads of one KV head."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # noqa: N806
    SLOT: tl.constexpr = KV_HEADS * HEAD_DIM  # noqa: N806
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = _first_visible(context + first_query, WINDOW, BLOCK_N)
    end = tl.minimum(context + first_query + TOKENS, context + num_queries)
    end = tl.where(num_queries == 0, 0, end)
    if WINDOW == 0:  # all these tokens see all these keys
        begin = tl.where(num_queries == 0, 0, (context + first_query + 1) // BLOCK_N * BLOCK_N)
        for start in tl.range(0, begin, BLOCK_N):
            k, v = key_and_value(keys, values, table, start, begin, kv_head, q.dtype, SLOT,
                                  BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    for start in tl.range(begin, end, BLOCK_N):
        k, v = key_and_value(keys, values, table, start, end, kv_head, q.dtype, SLOT,
                              BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
        ahead = context + local[:, None] - (start + tl.arange(0, BLOCK_N))[None, :]
        visible = (ahead >= 0) & ((ahead < WINDOW) | (WINDOW == 0))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        acc, peak, total = absorb(
            tl.where(visible, scores, float("-inf")), scale, v, acc, peak, total
        )
    result = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
    places = (tokens * (SLOT * GROUP) + heads * HEAD_DIM)[:, None] + lanes
    tl.store(out + places, result, real)
