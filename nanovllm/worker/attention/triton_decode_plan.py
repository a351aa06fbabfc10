"""How decoding rows are cut into splits of their keys: a kernel of its own, once a step.

`triton_attention` launches it; `triton_decode_kernels` follow its list, and `combine_kernel` cuts
rows up again by the same functions.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl

from nanovllm.worker.attention.triton_attention_kernels import first_visible

# Words of the work list per split: row, split, number of the row's own splits (0: it is all there
# is), first key, end, token of the query, its position; one unused.
RECORD = tl.constexpr(8)
PLANNED_ROWS = tl.constexpr(32)  # per program of plan_kernel


@triton.jit
def splits_of(num_keys, num_shared, least, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """First key, keys per split (whole tiles) and number of splits of decoding rows.

    num_shared: leading keys that shared_prefix_kernel attends to; least: keys worth a split.
    """
    first = tl.maximum(first_visible(num_keys - 1, WINDOW, BLOCK_N), num_shared)
    per_split = tl.cdiv(tl.cdiv(num_keys - first, MAX_SPLITS), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, least)
    return first, per_split, tl.cdiv(num_keys - first, per_split)


@triton.jit
def least_split(num_keys, num_shared, MIN_SPLIT: tl.constexpr):
    """Of a row, from its own length: short rows mostly come in small batches, which leave most of
    the device idle."""
    return tl.where(num_keys - num_shared <= 2 * MIN_SPLIT, MIN_SPLIT // 2, MIN_SPLIT)


@triton.jit
def _balanced_split(num_keys, MOST: tl.constexpr, BLOCK_N: tl.constexpr):
    """The fewest keys per split, in whole tiles, that cut all rows into at most MOST splits."""
    low = 1
    high = tl.cdiv(tl.max(num_keys, 0), BLOCK_N)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(num_keys, middle * BLOCK_N), 0) <= MOST
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    return low * BLOCK_N


@triton.jit(do_not_specialize=["num_rows"])
def plan_kernel(
    seq_lens,  # [num_rows] int32
    query_start_loc,  # [num_rows + 1] int32
    shared_keys,  # [num_rows] int32, if SHARED
    work,  # [num_rows * MAX_SPLITS, RECORD] int32, out
    num_work,  # [1] int32, out
    num_rows,
    SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Lists the splits of all rows that decode, PLANNED_ROWS rows a program.

    MOST: how many splits, at most, all rows have together; 0 cuts each row by its own length.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    num_keys, _, num_shared = row_facts(
        rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED
    )
    least = least_split(num_keys, num_shared, MIN_SPLIT)
    balanced = 0
    if MOST > 0:
        balanced = _balanced_split(num_keys, MOST, BLOCK_N)
        least = num_keys * 0 + balanced
    _, _, num_splits = splits_of(num_keys, num_shared, least, WINDOW, MAX_SPLITS, BLOCK_N)
    tl.store(num_work, tl.sum(num_splits))
    mine = tl.program_id(0) * PLANNED_ROWS
    before = tl.sum(tl.where(rows < mine, num_splits, 0))
    rows = mine + tl.arange(0, PLANNED_ROWS)[:, None]
    num_keys, token, num_shared = row_facts(
        rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED
    )
    least = least_split(num_keys, num_shared, MIN_SPLIT)
    if MOST > 0:
        least = num_keys * 0 + balanced
    first, per_split, num_splits = splits_of(
        num_keys, num_shared, least, WINDOW, MAX_SPLITS, BLOCK_N
    )
    splits = tl.arange(0, MAX_SPLITS)[None, :]
    record = work + (before + tl.cumsum(num_splits, 0) - num_splits + splits) * RECORD
    real = splits < num_splits
    begin = first + splits * per_split
    to_join = tl.where((num_splits > 1) | (num_shared > 0), num_splits, 0)
    tl.store(record, rows + splits * 0, real)
    tl.store(record + 1, splits + num_splits * 0, real)
    tl.store(record + 2, to_join + splits * 0, real)
    tl.store(record + 3, begin, real)
    tl.store(record + 4, tl.minimum(begin + per_split, num_keys), real)
    tl.store(record + 5, token + splits * 0, real)
    tl.store(record + 6, num_keys - 1 + splits * 0, real)


@triton.jit
def row_facts(rows, num_rows, seq_lens, query_start_loc, shared_keys, SHARED: tl.constexpr):
    """Keys (0 if it does not decode), token and shared keys of each of `rows`."""
    present = rows < num_rows
    token = tl.load(query_start_loc + rows, present, other=0)
    decodes = tl.load(query_start_loc + rows + 1, present, other=0) == token + 1
    num_keys = tl.load(seq_lens + rows, present & decodes, other=0)
    num_shared = num_keys * 0
    if SHARED:
        num_shared = tl.load(shared_keys + rows, present, other=0)
    return num_keys, token, num_shared


@triton.jit
def shared_split(num_shared, MAX_SPLITS: tl.constexpr):
    """Keys per split of the shared prefix: whole tiles of 64, at most MAX_SPLITS splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_shared, MAX_SPLITS), 64) * 64, 256)


@triton.jit
def prefix_splits(num_shared, MAX_SPLITS: tl.constexpr):
    """How many splits the shared prefix has."""
    if MAX_SPLITS > 0:
        num = tl.cdiv(num_shared, shared_split(num_shared, MAX_SPLITS))
    else:
        num = num_shared * 0
    return num
