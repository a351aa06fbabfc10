"""How rows' keys are shared out over programs: lists, made on the device once a step.

`backend` launches one of the three: `plan_kernel` cuts a few rows up for `decode_kernel`,
`small_plan_kernel` tiles of queries, prompts' among them, for `small_step_kernel`;
`stream_plan_kernel` lays all tiles of many rows in one line, for `stream_kernel` to cut into equal
ranges.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl

from nanovllm.worker.attention.triton.prefill_kernels import first_visible

# Words per split: row, split, number of the row's splits (0: it is all there is), first key, end,
# token of the query, its position; one unused.
RECORD = tl.constexpr(8)
# Words per row that decodes: row, token, first key, end, number of ranges it lies in; three unused.
LINE = tl.constexpr(8)
# As RECORD, of a tile of queries; token and position are its first query's. Then number of queries,
# and how many keys the row has from earlier steps.
TILE_RECORD = tl.constexpr(9)
# Words per range: line of its first row, how many ranges before this one have tiles of that row,
# first key; one unused.
RANGE = tl.constexpr(4)
PLANNED_ROWS = tl.constexpr(32)  # per program of any of them; of `small_plan_kernel`: tiles


@triton.jit
def _splits_of(num_keys, position, least, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """First key, keys per split (whole tiles, `least` or more) and number of splits of rows whose
    first query lies at `position`."""
    first = first_visible(position, WINDOW, BLOCK_N)
    per_split = tl.cdiv(tl.cdiv(num_keys - first, MAX_SPLITS), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, least)
    return first, per_split, tl.cdiv(num_keys - first, per_split)


@triton.jit
def _balanced_split(num_keys, most, BLOCK_N: tl.constexpr):
    """The fewest keys per split, in whole tiles, that cut all rows into at most `most` splits."""
    low = 1
    high = tl.cdiv(tl.max(num_keys, 0), BLOCK_N)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(num_keys, middle * BLOCK_N), 0) <= most
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return low * BLOCK_N


@triton.jit(do_not_specialize=["num_rows", "most"])
def plan_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    work,  # [num_rows * MAX_SPLITS, RECORD] int32, out
    num_work,  # [1] int32, out
    num_rows,
    most,  # how many splits, at most, all rows have together
    WINDOW: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Lists the splits of all rows that decode, PLANNED_ROWS rows a program."""
    rows = tl.arange(0, BLOCK_ROWS)
    num_keys, _ = _row_facts(rows, num_rows, seq_lens, query_start_loc)
    least = _balanced_split(num_keys, most, BLOCK_N)
    _, _, num_splits = _splits_of(num_keys, num_keys - 1, least, WINDOW, MAX_SPLITS, BLOCK_N)
    tl.store(num_work, tl.sum(num_splits))
    mine = tl.program_id(0) * PLANNED_ROWS
    before = tl.sum(tl.where(rows < mine, num_splits, 0))
    rows = mine + tl.arange(0, PLANNED_ROWS)[:, None]
    num_keys, token = _row_facts(rows, num_rows, seq_lens, query_start_loc)
    first, per_split, num_splits = _splits_of(
        num_keys, num_keys - 1, least, WINDOW, MAX_SPLITS, BLOCK_N
    )
    splits = tl.arange(0, MAX_SPLITS)[None, :]
    record = work + (before + tl.cumsum(num_splits, 0) - num_splits + splits) * RECORD
    real = splits < num_splits
    begin = first + splits * per_split
    to_join = tl.where(num_splits > 1, num_splits, 0)
    tl.store(record, rows + splits * 0, real)
    tl.store(record + 1, splits + num_splits * 0, real)
    tl.store(record + 2, to_join + splits * 0, real)
    tl.store(record + 3, begin, real)
    tl.store(record + 4, tl.minimum(begin + per_split, num_keys), real)
    tl.store(record + 5, token + splits * 0, real)
    tl.store(record + 6, num_keys - 1 + splits * 0, real)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "halvings", "most"])
def small_plan_kernel(
    seq_lens, query_start_loc,  # as of plan_kernel
    work,  # [most or num_tiles, TILE_RECORD] int32, out
    num_work,  # [1] int32, out
    num_rows,
    num_tiles,  # the most there can be: num_tokens // QUERIES + num_rows
    halvings,  # that find one of num_rows
    most,  # how many splits, at most, all tiles have together, unless there are more tiles
    QUERIES: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Lists the splits of all tiles of up to QUERIES queries, PLANNED_ROWS tiles a program. Splits
    have LEAST keys or more."""
    tiles = tl.arange(0, BLOCK_TILES)
    _, num_keys, _, position, _, _ = _tile_facts(
        tiles, num_tiles, num_rows, halvings, seq_lens, query_start_loc, QUERIES
    )
    most = tl.maximum(most, tl.sum((num_keys > 0).to(tl.int32)))
    least = tl.maximum(_balanced_split(num_keys, most, BLOCK_N), LEAST)
    _, _, num_splits = _splits_of(num_keys, position, least, WINDOW, MAX_SPLITS, BLOCK_N)
    tl.store(num_work, tl.sum(num_splits))
    mine = tl.program_id(0) * PLANNED_ROWS
    before = tl.sum(tl.where(tiles < mine, num_splits, 0))
    tiles = mine + tl.arange(0, PLANNED_ROWS)
    row, num_keys, token, position, num_queries, context = _tile_facts(
        tiles, num_tiles, num_rows, halvings, seq_lens, query_start_loc, QUERIES
    )
    first, per_split, num_splits = _splits_of(
        num_keys, position, least, WINDOW, MAX_SPLITS, BLOCK_N
    )
    end_record = before + tl.cumsum(num_splits, 0)
    splits = tl.arange(0, MAX_SPLITS)[None, :]
    record = work + ((end_record - num_splits)[:, None] + splits) * TILE_RECORD
    real = splits < num_splits[:, None]
    begin = first[:, None] + splits * per_split[:, None]
    to_join = tl.where(num_splits > 1, num_splits, 0)
    tl.store(record, row[:, None] + splits * 0, real)
    tl.store(record + 1, splits + num_splits[:, None] * 0, real)
    tl.store(record + 2, to_join[:, None] + splits * 0, real)
    tl.store(record + 3, begin, real)
    tl.store(record + 4, tl.minimum(begin + per_split[:, None], num_keys[:, None]), real)
    tl.store(record + 5, token[:, None] + splits * 0, real)
    tl.store(record + 6, position[:, None] + splits * 0, real)
    tl.store(record + 7, num_queries[:, None] + splits * 0, real)
    tl.store(record + 8, context[:, None] + splits * 0, real)


@triton.jit
def _tile_facts(tiles, num_tiles, num_rows, halvings, seq_lens, query_start_loc,
                QUERIES: tl.constexpr):  # fmt: skip
    """Row, keys (0: there is no such tile), first query's token and position, number of queries and
    keys of earlier steps of each of `tiles`.

    Row i's first tile is number query_start_loc[i] // QUERIES + i, so there may be some between two
    rows that nobody has.
    """
    row, high = tiles * 0, tiles * 0 + num_rows  # the last row that begins at or before a tile
    for _ in range(halvings):
        middle = (row + high) // 2
        begins = tl.load(query_start_loc + middle) // QUERIES + middle <= tiles
        searched = high - row > 1
        row = tl.where(searched & begins, middle, row)
        high = tl.where(searched & ~begins, middle, high)
    start = tl.load(query_start_loc + row)
    queries = tl.load(query_start_loc + row + 1) - start
    first_query = (tiles - start // QUERIES - row) * QUERIES
    real = (tiles < num_tiles) & (first_query < queries)
    context = tl.load(seq_lens + row) - queries
    end = tl.minimum(first_query + QUERIES, queries)
    num_keys = tl.where(real, context + end, 0)
    position = tl.where(real, context + first_query, -1)
    return row, num_keys, start + first_query, position, end - first_query, context


@triton.jit(do_not_specialize=["num_rows", "num_ranges"])
def stream_plan_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    shared_keys,  # [num_rows] int32, if SHARED: leading keys that shared_prefix_kernel attends to
    lines,  # [num_rows, LINE] int32, out: rows that decode
    ranges,  # [num_ranges, RANGE] int32, out: those that have tiles
    totals,  # [3] int32, out: tiles per range, tiles and lines altogether
    num_rows,
    num_ranges,
    SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAST: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Lays the tiles of rows that decode end to end, and says what each range begins with.

    Ranges have equally many tiles, LEAST or more, and no row lies in more than MAX_SPLITS of them.
    PLANNED_ROWS rows a program.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    _, _, _, num_tiles = _tiles_of(
        rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED, WINDOW, BLOCK_N
    )
    all_tiles = tl.sum(num_tiles)
    share = tl.maximum(tl.cdiv(all_tiles, num_ranges), LEAST)
    share = tl.maximum(share, tl.cdiv(tl.max(num_tiles, 0), MAX_SPLITS - 1))
    tl.store(totals, share)
    tl.store(totals + 1, all_tiles)
    tl.store(totals + 2, tl.sum((num_tiles > 0).to(tl.int32)))
    mine = tl.program_id(0) * PLANNED_ROWS
    lines_before = tl.sum(((rows < mine) & (num_tiles > 0)).to(tl.int32))
    tiles_before = tl.sum(tl.where(rows < mine, num_tiles, 0))
    rows = mine + tl.arange(0, PLANNED_ROWS)
    num_keys, token, first, num_tiles = _tiles_of(
        rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED, WINDOW, BLOCK_N
    )
    real = num_tiles > 0
    line = lines_before + tl.cumsum(real.to(tl.int32), 0) - 1
    first_tile = tiles_before + tl.cumsum(num_tiles, 0) - num_tiles
    end_tile = first_tile + num_tiles
    first_range = first_tile // share
    place = lines + line * LINE
    tl.store(place, rows, real)
    tl.store(place + 1, token, real)
    tl.store(place + 2, first, real)
    tl.store(place + 3, num_keys, real)
    tl.store(place + 4, (end_tile - 1) // share - first_range + 1, real)
    # A row says what the ranges begin with that begin in it.
    which = tl.cdiv(first_tile, share)[:, None] + tl.arange(0, MAX_SPLITS)[None, :]
    begins = which * share < end_tile[:, None]
    start = (first - first_tile * BLOCK_N)[:, None] + which * (share * BLOCK_N)
    place = ranges + which * RANGE
    tl.store(place, line[:, None] + which * 0, begins)
    tl.store(place + 1, which - first_range[:, None], begins)
    tl.store(place + 2, start, begins)


@triton.jit
def _tiles_of(rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED: tl.constexpr,
              WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Keys, token, first key to read and number of tiles (0 if it does not decode) of `rows`."""
    num_keys, token = _row_facts(rows, num_rows, seq_lens, query_start_loc)
    first = first_visible(num_keys - 1, WINDOW, BLOCK_N)
    if SHARED:
        first = tl.maximum(first, tl.load(shared_keys + rows, rows < num_rows, other=0))
    return num_keys, token, first, tl.cdiv(num_keys - first, BLOCK_N)


@triton.jit
def _row_facts(rows, num_rows, seq_lens, query_start_loc):
    """Keys (0 if it does not decode) and token of each of `rows`."""
    present = rows < num_rows
    token = tl.load(query_start_loc + rows, present, other=0)
    decodes = tl.load(query_start_loc + rows + 1, present, other=0) == token + 1
    return tl.load(seq_lens + rows, present & decodes, other=0), token


@triton.jit
def shared_split(num_shared, MAX_SPLITS: tl.constexpr):
    """Keys per split of the shared prefix: whole tiles of 64, at most MAX_SPLITS splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_shared, MAX_SPLITS), 64) * 64, 256)


@triton.jit
def prefix_splits(num_shared, MAX_SPLITS: tl.constexpr):
    """How many splits the shared prefix has."""
    return tl.cdiv(num_shared, shared_split(num_shared, MAX_SPLITS))
