"""Triton kernels of paged causal attention with grouped queries; `backend` launches them.

Here: what all share, and rows with several query tokens, by FlashAttention-2 (Dao 2023) over pages
and the step's own keys. Where a block holds whole tiles of keys, the copy engine (TMA) fetches
them. In which order they are summed follows from the row's own length, and in steps of few tokens
from these, as its context is then shared out among programs.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.e4m3 import widened
from nanovllm.worker.kernels.triton.layer_kernels import normed, rotated

FLOOR = tl.constexpr(-1.0e30)  # finite: a tile without a visible key gives no NaN
LOG2E = tl.constexpr(1.4426950408889634)
MOST = tl.constexpr(126.0)  # an exponent whose power of two is finite


@triton.jit
def first_visible(last_position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key a query may see, rounded down to a tile. WINDOW 0: no window."""
    if WINDOW > 0:
        first = tl.maximum(last_position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    else:
        first = last_position * 0
    return first


@triton.jit
def key_and_value(
    keys, values, block_table, start, end, kv_head, DTYPE: tl.constexpr,
    SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Cached vectors of one head from place `start` on, [BLOCK_N, BLOCK_D] each, as DTYPE.

    Places from `end` on hold any finite numbers: masked scores cancel them.
    """
    blocks = blocks_of(block_table, start, end, BLOCK_SIZE, BLOCK_N, TMA)
    return vectors_in(blocks, keys, values, start, end, kv_head, DTYPE, SLOT, BLOCK_SIZE, HEAD_DIM,
                      BLOCK_D, BLOCK_N, TMA)  # fmt: skip


@triton.jit
def blocks_of(block_table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """In which block each of BLOCK_N places from `start` on lies; if TMA, the one of them all."""
    if TMA:
        blocks = tl.load(block_table + start // BLOCK_SIZE)
    else:
        places = tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
        blocks = tl.load(block_table + places // BLOCK_SIZE)
    return blocks


@triton.jit
def vectors_in(
    blocks, keys, values, start, end, kv_head, DTYPE: tl.constexpr,
    SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`key_and_value` where `blocks_of` is known."""
    if TMA:
        slot = blocks * BLOCK_SIZE + start % BLOCK_SIZE
        k = keys.load([slot, kv_head * HEAD_DIM])
        v = values.load([slot, kv_head * HEAD_DIM])
    else:
        places = tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + places % BLOCK_SIZE
        lanes = tl.arange(0, BLOCK_D)
        vectors = (slots * SLOT + kv_head * HEAD_DIM)[:, None] + lanes[None, :]
        if HEAD_DIM == BLOCK_D:
            k = tl.load(keys + vectors)
            v = tl.load(values + vectors)
        else:
            k = tl.load(keys + vectors, (lanes < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values + vectors, (lanes < HEAD_DIM)[None, :], other=0.0)
    return widened(k, DTYPE), widened(v, DTYPE)


@triton.jit
def capped(scores, scale, SOFTCAP: tl.constexpr):
    """Scores, unscaled, that stay within SOFTCAP when they are scaled: by tanh. 0: as they are."""
    if SOFTCAP > 0:
        tanh = 1 - 2 / (tl.exp2(tl.minimum(scores * (scale * (2 / SOFTCAP)), MOST)) + 1)
        scores = tanh * (SOFTCAP * LOG2E / scale)
    return scores


@triton.jit
def products(q, k, scale, SOFTCAP: tl.constexpr):
    """Scores of queries and keys, [M, N], unscaled."""
    return capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)


@triton.jit
def with_sinks(total, peak, sinks, heads, real, SINKS: tl.constexpr):
    """What the weights of a head's keys add up to, its sink among them if there are sinks."""
    if SINKS:
        total += tl.exp2(tl.minimum(tl.load(sinks + heads, real, other=0.0) * LOG2E - peak, MOST))
    return total


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
def _query_tile(tile_rows, query_start_loc, seq_lens, index, TOKENS: tl.constexpr):
    """Which TOKENS queries the index-th tile holds; of one row, the longest tiles first.

    Row i owns tiles query_start_loc[i] // TOKENS + i and on, at least as many as it needs. A tile
    too many has num_queries 0.
    """
    row = tl.load(tile_rows + index)
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    num_tiles = tl.cdiv(num_queries, TOKENS)
    tile = num_tiles - 1 - (index - first_token // TOKENS - row)
    absent = tile < 0
    context = tl.load(seq_lens + row) - num_queries
    first_query = tl.where(absent, 0, tile * TOKENS)
    return row, first_token, tl.where(absent, 0, num_queries), context, first_query


@triton.jit
def _rotate_queries(
    queries, real, positions, cos_sin, q_weight, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads that start at `queries` [n], of tokens at `positions`: normed if asked for, and
    rotated, where they lie and for all threads to see, as `Kernels.rope_and_cache` would."""
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    lanes = tl.arange(0, BLOCK_D // 2)
    inside = lanes < HALF
    real = real[:, None] & inside[None, :]
    places = queries[:, None] + lanes[None, :]
    first = tl.load(places, real, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, real, other=0.0).to(tl.float32)
    if NORM:
        first, second = normed(first, second, q_weight, lanes, inside, eps, HALF,
                               queries.dtype.element_ty)  # fmt: skip
    angles = (cos_sin + positions * HEAD_DIM)[:, None] + lanes[None, :]
    cos, sin = tl.load(angles, real, other=0.0), tl.load(angles + HALF, real, other=0.0)
    first, second = rotated(first, second, cos, sin)
    # A thread stores what it alone has loaded: both halves lie in the same way.
    tl.store(places, first.to(queries.dtype.element_ty), real)
    tl.store(places + HALF, second.to(queries.dtype.element_ty), real)
    tl.debug_barrier()


@triton.jit
def _own_key_and_value(
    qkv, query_stride, own, first_token, start, end, kv_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, OWN_TMA: tl.constexpr,
):  # fmt: skip
    """As `key_and_value`, of a row's tokens in this step, where the product left them."""
    key = (KV_HEADS * GROUP + kv_head) * HEAD_DIM
    value = key + KV_HEADS * HEAD_DIM
    if OWN_TMA:
        k = own.load([first_token + start, key])
        v = own.load([first_token + start, value])
    else:
        tokens = first_token + tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
        lanes = tl.arange(0, BLOCK_D)
        vectors = (tokens.to(tl.int64) * query_stride)[:, None] + lanes[None, :]
        k = tl.load(qkv + key + vectors, (lanes < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(qkv + value + vectors, (lanes < HEAD_DIM)[None, :], other=0.0)
    return k, v


@triton.jit
def _visible_scores(q, k, ahead, scale, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores of keys that queries are `ahead` places of; -inf where that is negative or too far."""
    visible = (ahead >= 0) & ((ahead < WINDOW) | (WINDOW == 0))
    return tl.where(visible, products(q, k, scale, SOFTCAP), float("-inf"))


@triton.jit
def _attend_to_cached(
    q, keys, values, table, context, low, high, first_query, local, kv_head, scale,
    acc, peak, total,
    SLOT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Queries at `local` places past the context attend to its places low … high, as far as their
    window reaches. low: where a tile begins."""
    begin = tl.maximum(low, first_visible(context + first_query, WINDOW, BLOCK_N))
    if WINDOW == 0:  # whole tiles need no mask
        begin = tl.maximum(low, high // BLOCK_N * BLOCK_N)
        for start in tl.range(low, begin, BLOCK_N):
            k, v = key_and_value(keys, values, table, start, context, kv_head, q.dtype, SLOT,
                                 BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
            scores = products(q, k, scale, SOFTCAP)
            acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    for start in tl.range(begin, high, BLOCK_N):
        k, v = key_and_value(keys, values, table, start, context, kv_head, q.dtype, SLOT,
                             BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, TMA)  # fmt: skip
        places = start + tl.arange(0, BLOCK_N)
        ahead = tl.where(places < context, context - places, -(2**30))
        scores = _visible_scores(q, k, local[:, None] + ahead[None, :], scale, WINDOW, SOFTCAP)
        acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    return acc, peak, total


@triton.jit
def _attend_to_own(
    q, qkv, query_stride, own, first_token, end, first_query, local, kv_head, scale,
    acc, peak, total,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, OWN_TMA: tl.constexpr,
):  # fmt: skip
    """The same queries attend to their row's tokens of this step, up to themselves."""
    begin = first_visible(first_query, WINDOW, BLOCK_N)
    if WINDOW == 0:
        begin = (first_query + 1) // BLOCK_N * BLOCK_N
        for start in tl.range(0, begin, BLOCK_N):
            k, v = _own_key_and_value(qkv, query_stride, own, first_token, start, end, kv_head,
                                      KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_N,
                                      OWN_TMA)  # fmt: skip
            scores = products(q, k, scale, SOFTCAP)
            acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    for start in tl.range(begin, end, BLOCK_N):
        k, v = _own_key_and_value(qkv, query_stride, own, first_token, start, end, kv_head,
                                  KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, BLOCK_N,
                                  OWN_TMA)  # fmt: skip
        ahead = local[:, None] - (start + tl.arange(0, BLOCK_N))[None, :]
        scores = _visible_scores(q, k, ahead, scale, WINDOW, SOFTCAP)
        acc, peak, total = absorb(scores, scale, v, acc, peak, total)
    return acc, peak, total


@triton.jit
def _pieces_of(context, num_tokens, room, KV_HEADS: tl.constexpr, TOKENS: tl.constexpr,
               PIECES: tl.constexpr, LEAST: tl.constexpr):  # fmt: skip
    """Into how many pieces a context is cut: as many as find room beside the step's other tiles, if
    all of its tokens are prompts', and of no less than LEAST keys but the last."""
    most = room // (tl.cdiv(num_tokens, TOKENS) * KV_HEADS)
    return tl.maximum(tl.minimum(tl.minimum(tl.cdiv(context, LEAST), most), PIECES), 1)


@triton.jit
def _attend_to_piece(
    q, qkv, query_stride, own, keys, values, table, first_token, num_queries, context, first_query,
    local, piece, num_pieces, kv_head, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TMA: tl.constexpr, OWN_TMA: tl.constexpr,
):  # fmt: skip
    """To a piece of what earlier steps have cached, and with the first also to the row's tokens of
    this step, which lie side by side in qkv. Of both, tiles that all queries see in full need no
    mask."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    size = tl.cdiv(tl.cdiv(context, BLOCK_N), num_pieces) * BLOCK_N
    acc, peak, total = _attend_to_cached(
        q, keys, values, table, context, piece * size, tl.minimum((piece + 1) * size, context),
        first_query, local, kv_head, scale, acc, peak, total,
        KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_N, TMA,
    )  # fmt: skip
    if piece == 0:
        end = tl.minimum(first_query + BLOCK_M // GROUP, num_queries)
        acc, peak, total = _attend_to_own(
            q, qkv, query_stride, own, first_token, end, first_query, local, kv_head, scale,
            acc, peak, total, KV_HEADS, GROUP, HEAD_DIM, BLOCK_D, WINDOW, SOFTCAP, BLOCK_N,
            OWN_TMA,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def _join_if_last(acc, peak, total, partial, arrivals, tile_id, piece, num_pieces,
                  PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Leave a piece of a tile for the program that arrives last. Returns whether that is this one,
    and then all of them joined, in their order. Each is results, then peaks and totals."""
    members, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    PIECE: tl.constexpr = BLOCK_M * (BLOCK_D + 2)  # noqa: N806
    parts, arrival = partial + tile_id.to(tl.int64) * (PIECES * PIECE), arrivals + tile_id
    results = members[:, None] * BLOCK_D + lanes[None, :]
    ends = BLOCK_M * BLOCK_D + members
    mine = parts + piece * PIECE
    tl.store(mine + results, acc)
    tl.store(mine + ends, peak)
    tl.store(mine + ends + BLOCK_M, total)
    tl.debug_barrier()  # all threads' parts are written before one thread says so
    is_last = tl.atomic_add(arrival, 1, sem="acq_rel") == num_pieces - 1
    if is_last:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for other in tl.range(0, num_pieces):
            part = parts + other * PIECE
            other_peak = tl.load(part + ends, cache_modifier=".cg")
            new_peak = tl.maximum(peak, other_peak)
            shrink, weight = tl.exp2(peak - new_peak), tl.exp2(other_peak - new_peak)
            other_acc = tl.load(part + results, cache_modifier=".cg")
            other_total = tl.load(part + ends + BLOCK_M, cache_modifier=".cg")
            acc = acc * shrink[:, None] + other_acc * weight[:, None]
            total = total * shrink + other_total * weight
            peak = new_peak
        tl.store(arrival, 0)
    return acc, peak, total, is_last


# A stride that changes from step to step must not ask for a kernel of its own.
@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    qkv,  # [num_tokens, (KV_HEADS * GROUP + 2 * KV_HEADS) * HEAD_DIM], queries not rotated yet
    query_stride,
    own,  # if OWN_TMA: a descriptor of qkv, boxes [BLOCK_N, HEAD_DIM]
    keys, values, out, block_tables, table_stride,  # as in decode_kernel
    seq_lens, query_start_loc, tile_rows,  # [num_rows], [num_rows + 1], [number of tiles] int32
    scale, cos_sin, q_weight, eps, sinks,  # as in decode_kernel
    partial,  # [tiles, KV_HEADS, PIECES, BLOCK_M * (BLOCK_D + 2)] fp32
    arrivals,  # [tiles * KV_HEADS] int32, zero before and after
    num_rows, room,  # for how many programs
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, OWN_TMA: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr, PIECES: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """A program attends for BLOCK_M // GROUP tokens of one row and all heads of one KV head.

    If PIECES is 1 it rotates their queries first, and that is all it does for a row that decodes,
    whose queries the kernels after it expect so. Else several may share a row's context.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # noqa: N806
    kv_head, index, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_pieces = 1
    row, first_token, num_queries, context, first_query = _query_tile(
        tile_rows, query_start_loc, seq_lens, index, TOKENS
    )
    members, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    local = first_query + members // GROUP  # token-major: the heads of a token lie together
    heads = kv_head * GROUP + members % GROUP
    present = (local < num_queries) & (members < TOKENS * GROUP)
    tokens = (first_token + local).to(tl.int64)
    queries = qkv + tokens * query_stride + heads * HEAD_DIM
    if PIECES == 1:
        _rotate_queries(queries, present, context + local, cos_sin, q_weight, eps,
                        HEAD_DIM, BLOCK_D, NORM)  # fmt: skip
    else:
        num_pieces = _pieces_of(context, tl.load(query_start_loc + num_rows), room, KV_HEADS,
                                TOKENS, PIECES, LEAST)  # fmt: skip
    if (num_queries > 1) & (piece < num_pieces):
        real = present[:, None] & (lanes < HEAD_DIM)
        q = tl.load(queries[:, None] + lanes, real, other=0.0)
        acc, peak, total = _attend_to_piece(
            q, qkv, query_stride, own, keys, values,
            block_tables + row.to(tl.int64) * table_stride, first_token, num_queries, context,
            first_query, local, piece, num_pieces, kv_head, scale, KV_HEADS, GROUP, HEAD_DIM,
            BLOCK_D, BLOCK_SIZE, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, TMA, OWN_TMA,
        )  # fmt: skip
        is_last = num_pieces == 1
        if num_pieces > 1:
            acc, peak, total, is_last = _join_if_last(
                acc, peak, total, partial, arrivals, index * KV_HEADS + kv_head, piece, num_pieces,
                PIECES, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        if is_last:
            total = with_sinks(total, peak, sinks, heads, present, SINKS)
            result = (acc / tl.maximum(total, 1e-30)[:, None]).to(out.dtype.element_ty)
            places = (tokens * (KV_HEADS * GROUP) + heads)[:, None] * HEAD_DIM + lanes
            tl.store(out + places, result, real)
