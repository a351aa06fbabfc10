"""Prefill over long contexts on Hopper: FlashAttention-3 (Shah et al. 2024) over pages, in Gluon.

`backend` launches `long_kernel` for large steps. Two warpgroups attend for half of a tile's queries
each: the products of the next keys run beside the softmax of these. A warp beside them has the copy
engine (TMA) fetch keys and values, page by page from the cache, and the step's own from where the
product left them. Triton's `prefill_kernel` means the same, anywhere.
"""
# ruff: noqa: N803, N806, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LINES = gl.constexpr(64)  # queries times heads of a warpgroup; a tile has twice as many
HEAD_DIM = gl.constexpr(128)
HALF = gl.constexpr(64)
TILE_LINES = 128
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # halves of heads lie one by one
LOG2E = gl.constexpr(1.4426950408889634)
LINE_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of halves of heads
OUT_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
RESULT_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
WEIGHT_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, RESULT_LAYOUT, 2))


@gluon.jit
def _wait_for_predecessor():
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _let_successor_start():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _rotated_queries(
    qkv, query_stride, cos_sin, q_weight, eps, first_token, num_queries, context, first_query,
    kv_head, half, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, NORM: gl.constexpr,
    STORE: gl.constexpr,
):  # fmt: skip
    """Both halves of the heads of a warpgroup's lines, [LINES, HALF] each: normed if asked for and
    rotated, as `Kernels.rope_and_cache` would. STORE: back to where they lie."""
    TOKENS: gl.constexpr = 2 * LINES // GROUP
    members = half * LINES + gl.arange(0, LINES, gl.SliceLayout(1, LINE_LAYOUT))
    lanes = gl.arange(0, HALF, gl.SliceLayout(0, LINE_LAYOUT))[None, :]
    local = first_query + members // GROUP
    real = ((local < num_queries) & (members < TOKENS * GROUP))[:, None]
    dtype: gl.constexpr = qkv.dtype.element_ty
    heads = kv_head * GROUP + members % GROUP
    sources = qkv + ((first_token + local).to(gl.int64) * query_stride + heads * HEAD_DIM)[:, None]
    sources += lanes
    first = gl.load(sources, real, other=0.0).to(gl.float32)
    second = gl.load(sources + HALF, real, other=0.0).to(gl.float32)
    if NORM:
        square = (gl.sum(first * first, 1) + gl.sum(second * second, 1)) / HEAD_DIM
        norm = gl.rsqrt(square + eps)[:, None]
        first, second = first * norm, second * norm
        if q_weight.dtype.element_ty == dtype:  # rounded before the weight, as Llama's norms are
            first, second = first.to(dtype).to(gl.float32), second.to(dtype).to(gl.float32)
        first = (first * gl.load(q_weight + lanes).to(gl.float32)).to(dtype).to(gl.float32)
        second = (second * gl.load(q_weight + HALF + lanes).to(gl.float32)).to(dtype)
        second = second.to(gl.float32)
    angles = cos_sin + ((context + local) * HEAD_DIM)[:, None] + lanes
    cos, sin = gl.load(angles, real, other=0.0), gl.load(angles + HALF, real, other=0.0)
    turned = (first * cos - second * sin).to(dtype)
    second = (second * cos + first * sin).to(dtype)
    if STORE:
        gl.store(sources, turned, real)
        gl.store(sources + HALF, second, real)
    return turned, second


@gluon.jit
def _place_of(index, num_masked_own, first_own, tail, BLOCK_N: gl.constexpr):
    """Of the index-th tile of keys: the first one, and whether it is among the row's own of this
    step. Those in which not all queries see all keys come first."""
    is_masked = index < num_masked_own
    is_tail = (index == num_masked_own) & (tail >= 0)
    rest = index - num_masked_own - (tail >= 0).to(gl.int32)
    is_own = is_masked | ((~is_tail) & (rest < first_own))
    tile = gl.where(
        is_masked, first_own + index, gl.where(rest < first_own, rest, rest - first_own)
    )
    tile = gl.where(is_tail, tail, tile)
    return tile * BLOCK_N, is_own


@gluon.jit
def _slots_of(block_table, start, context, BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr,
              BLOCK_N: gl.constexpr):  # fmt: skip
    """Where the pages of a tile lie in the cache. Those from the context's end on are its last."""
    slots = ()
    for page in gl.static_range(BLOCK_N // PAGE):
        place = start + page * PAGE
        block = gl.load(block_table + gl.minimum(place, context - 1) // BLOCK_SIZE)
        slots += (block * BLOCK_SIZE + place % BLOCK_SIZE,)  # type: ignore[assignment]
    return slots


@gluon.jit
def _fetch_pages(source, slots, lane, ready, result, buffer, PAGE: gl.constexpr,
                 BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Have a tile of keys, or of values, brought into a buffer, which holds first halves first."""
    NUM_PAGES: gl.constexpr = BLOCK_N // PAGE
    mbarrier.expect(ready, BLOCK_N * HEAD_DIM * 2)
    parts = result._reinterpret(source.dtype, [STAGES * 2 * NUM_PAGES, PAGE, HALF], source.layout)
    for page in gl.static_range(NUM_PAGES):
        part = buffer * (2 * NUM_PAGES) + page
        tma.async_copy_global_to_shared(source, [slots[page], lane], ready, parts.index(part))
        tma.async_copy_global_to_shared(source, [slots[page], lane + HALF], ready,
                                        parts.index(part + NUM_PAGES))  # fmt: skip


@gluon.jit
def _fetch_own(own, token, lane, ready, result, buffer, BLOCK_N: gl.constexpr):
    """The same of the row's own tokens, from where the product left them."""
    mbarrier.expect(ready, BLOCK_N * HEAD_DIM * 2)
    tma.async_copy_global_to_shared(own, [token, lane], ready, result.index(buffer))


@gluon.jit
def _fetch(
    own, keys, values, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free, first_token, context,
    block_table, kv_head, num_tiles, num_masked_own, first_own, tail,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the warp does beside the warpgroups."""
    key_lane = (KV_HEADS * GROUP + kv_head) * HEAD_DIM
    value_lane = key_lane + KV_HEADS * HEAD_DIM
    page_lane = kv_head * HEAD_DIM
    for index in range(num_tiles):
        buffer, turn = index % STAGES, (index // STAGES) & 1
        start, is_own = _place_of(index, num_masked_own, first_own, tail, BLOCK_N)
        k, v = k_ready.index(buffer), v_ready.index(buffer)
        if is_own:
            mbarrier.wait(k_free.index(buffer), turn ^ 1)
            _fetch_own(own, first_token + start, key_lane, k, k_buffers, buffer, BLOCK_N)
            mbarrier.wait(v_free.index(buffer), turn ^ 1)
            _fetch_own(own, first_token + start, value_lane, v, v_buffers, buffer, BLOCK_N)
        else:
            slots = _slots_of(block_table, start, context, BLOCK_SIZE, PAGE, BLOCK_N)
            mbarrier.wait(k_free.index(buffer), turn ^ 1)
            _fetch_pages(keys, slots, page_lane, k, k_buffers, buffer, PAGE, BLOCK_N, STAGES)
            mbarrier.wait(v_free.index(buffer), turn ^ 1)
            _fetch_pages(values, slots, page_lane, v, v_buffers, buffer, PAGE, BLOCK_N, STAGES)


@gluon.jit
def _visible(scores, limits, start, BLOCK_N: gl.constexpr, SCORE_LAYOUT: gl.constexpr):
    places = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORE_LAYOUT))
    return gl.where(places[None, :] <= limits[:, None], scores, float("-inf"))


@gluon.jit
def _absorb_tiles(
    begin, end, q, p, o, peak, total, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free, local,
    context, scale, num_masked_own, first_own, tail, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCORE_LAYOUT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Products of queries and the keys of tiles begin … end, each beside those of the weights `p`
    of the tile before with its values."""
    zero = gl.zeros([LINES, BLOCK_N], gl.float32, SCORE_LAYOUT)
    for index in range(begin, end):
        buffer, turn = index % STAGES, (index // STAGES) & 1
        before, turn_before = (index - 1) % STAGES, ((index - 1) // STAGES) & 1
        mbarrier.wait(k_ready.index(buffer), turn)
        scores = warpgroup_mma(q, k_buffers.index(buffer).permute((1, 0)), zero, use_acc=False,
                               is_async=True)  # fmt: skip
        mbarrier.wait(v_ready.index(before), turn_before)
        products = warpgroup_mma(p, v_buffers.index(before), o, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(buffer), count=1)
        if MASK:
            start, is_own = _place_of(index, num_masked_own, first_own, tail, BLOCK_N)
            limits = gl.where(is_own, local, context - 1)
            scores = _visible(scores, limits, start, BLOCK_N, SCORE_LAYOUT)
        new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_peak[:, None])
        shrink = gl.exp2(peak - new_peak)
        total = total * shrink + gl.sum(weights, 1)
        o, p = warpgroup_mma_wait(0, deps=[products, p])
        mbarrier.arrive(v_free.index(before), count=1)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, RESULT_LAYOUT))[:, None]
        p = gl.convert_layout(weights.to(q.dtype), WEIGHT_LAYOUT)
        peak = new_peak
    return p, o, peak, total


@gluon.jit
def _attend(
    half, qkv, query_stride, cos_sin, q_weight, eps, sinks, out, q_buffers, k_buffers, v_buffers,
    k_ready, v_ready, k_free, v_free, first_token, num_queries, context, first_query, kv_head,
    num_tiles, num_masked_own, first_own, tail, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NORM: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """What one warpgroup does: for its half of the lines."""
    SCORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    TOKENS: gl.constexpr = 2 * LINES // GROUP
    first, second = _rotated_queries(
        qkv, query_stride, cos_sin, q_weight, eps, first_token, num_queries, context, first_query,
        kv_head, half, KV_HEADS, GROUP, NORM, False,
    )  # fmt: skip
    halves = q_buffers._reinterpret(q_buffers.dtype, [4, LINES, HALF], q_buffers.layout)
    halves.index(half * 2).store(first)
    halves.index(half * 2 + 1).store(second)
    fence_async_shared()
    gl.thread_barrier()
    q = q_buffers.index(half)
    members = half * LINES + gl.arange(0, LINES, gl.SliceLayout(1, SCORE_LAYOUT))
    local = first_query + members // GROUP

    mbarrier.wait(k_ready.index(0), 0)
    zero = gl.zeros([LINES, BLOCK_N], gl.float32, SCORE_LAYOUT)
    scores = warpgroup_mma(q, k_buffers.index(0).permute((1, 0)), zero, use_acc=False,
                           is_async=True)  # fmt: skip
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    scores = _visible(scores, local, first_own * BLOCK_N, BLOCK_N, SCORE_LAYOUT)
    peak = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - peak[:, None])
    total = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(q.dtype), WEIGHT_LAYOUT)
    o = gl.zeros([LINES, HEAD_DIM], gl.float32, RESULT_LAYOUT)
    num_masked = num_masked_own + (tail >= 0).to(gl.int32)
    p, o, peak, total = _absorb_tiles(
        1, num_masked, q, p, o, peak, total, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free,
        local, context, scale, num_masked_own, first_own, tail, BLOCK_N, STAGES,
        SCORE_LAYOUT, True,
    )  # fmt: skip
    p, o, peak, total = _absorb_tiles(
        num_masked, num_tiles, q, p, o, peak, total, k_buffers, v_buffers, k_ready, v_ready, k_free,
        v_free, local, context, scale, num_masked_own, first_own, tail, BLOCK_N, STAGES,
        SCORE_LAYOUT, False,
    )  # fmt: skip
    buffer, turn = (num_tiles - 1) % STAGES, ((num_tiles - 1) // STAGES) & 1
    mbarrier.wait(v_ready.index(buffer), turn)
    o = warpgroup_mma(p, v_buffers.index(buffer), o, is_async=True)
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    if SINKS:
        inside = members < TOKENS * GROUP
        sink = gl.load(sinks + kv_head * GROUP + members % GROUP, inside, other=0.0) * LOG2E
        total += gl.exp2(gl.minimum(sink - peak, 126.0))
    total = gl.convert_layout(total, gl.SliceLayout(1, RESULT_LAYOUT))
    result = gl.convert_layout((o / total[:, None]).to(out.dtype.element_ty), OUT_LAYOUT)
    members = half * LINES + gl.arange(0, LINES, gl.SliceLayout(1, OUT_LAYOUT))
    local = first_query + members // GROUP
    real = (local < num_queries) & (members < TOKENS * GROUP)
    heads = kv_head * GROUP + members % GROUP
    lanes = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT_LAYOUT))[None, :]
    places = ((first_token + local).to(gl.int64) * (KV_HEADS * GROUP) + heads)[:, None] * HEAD_DIM
    gl.store(out + places + lanes, result, real[:, None])


@gluon.jit(do_not_specialize=["table_stride"])
def long_kernel(
    qkv, query_stride, own, keys, values, out, block_tables, table_stride, seq_lens,
    query_start_loc, tile_rows, scale, cos_sin, q_weight, eps, sinks,  # as in prefill_kernel, but:
    # own has boxes [BLOCK_N, HEAD_DIM]; keys and values are descriptors [slots, KV_HEADS *
    # HEAD_DIM], boxes [PAGE, HALF]
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NORM: gl.constexpr, SINKS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """A program: 128 // GROUP queries of one row, all heads of one KV head. Of a row that decodes
    it rotates the queries, and that is all."""
    if PDL:
        _let_successor_start()
        _wait_for_predecessor()
    kv_head, index = gl.program_id(0), gl.program_id(1)
    TOKENS: gl.constexpr = 2 * LINES // GROUP
    row = gl.load(tile_rows + index)
    first_token = gl.load(query_start_loc + row)
    num_queries = gl.load(query_start_loc + row + 1) - first_token
    num_query_tiles = (num_queries + TOKENS - 1) // TOKENS
    query_tile = num_query_tiles - 1 - (index - first_token // TOKENS - row)
    context = gl.load(seq_lens + row) - num_queries
    num_queries = gl.where(query_tile < 0, 0, num_queries)
    first_query = query_tile * TOKENS
    if num_queries == 1:
        _rotated_queries(qkv, query_stride, cos_sin, q_weight, eps, first_token, num_queries,
                         context, first_query, kv_head, 0, KV_HEADS, GROUP, NORM, True)  # fmt: skip
    if num_queries > 1:
        first_own = first_query // BLOCK_N  # tiles before it are seen whole
        num_own = (gl.minimum(first_query + TOKENS, num_queries) + BLOCK_N - 1) // BLOCK_N
        num_masked_own = num_own - first_own
        whole = context // BLOCK_N
        tail = gl.where(whole * BLOCK_N < context, whole, -1)
        num_tiles = num_own + (context + BLOCK_N - 1) // BLOCK_N
        block_table = block_tables + row.to(gl.int64) * table_stride

        dtype: gl.constexpr = qkv.dtype.element_ty
        tiles: gl.constexpr = own.layout
        q_buffers = gl.allocate_shared_memory(dtype, [2, LINES, HEAD_DIM], tiles)
        k_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tiles)
        v_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tiles)
        barrier: gl.constexpr = mbarrier.MBarrierLayout()
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        fence_async_shared()
        gl.warp_specialize(
            [
                (_attend, (0, qkv, query_stride, cos_sin, q_weight, eps, sinks, out, q_buffers,
                           k_buffers, v_buffers, k_ready, v_ready, k_free, v_free, first_token,
                           num_queries, context, first_query, kv_head, num_tiles, num_masked_own,
                           first_own, tail, scale, KV_HEADS, GROUP, BLOCK_N, STAGES, NORM,
                           SINKS)),
                (_attend, (1, qkv, query_stride, cos_sin, q_weight, eps, sinks, out, q_buffers,
                           k_buffers, v_buffers, k_ready, v_ready, k_free, v_free, first_token,
                           num_queries, context, first_query, kv_head, num_tiles, num_masked_own,
                           first_own, tail, scale, KV_HEADS, GROUP, BLOCK_N, STAGES, NORM,
                           SINKS)),
                (_fetch, (own, keys, values, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free,
                          first_token, context, block_table, kv_head, num_tiles, num_masked_own,
                          first_own, tail, KV_HEADS, GROUP, BLOCK_SIZE, PAGE, BLOCK_N,
                          STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
