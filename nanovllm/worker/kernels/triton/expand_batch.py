"""Expanding a staged plan's rows to tokens in one Triton kernel, inside a step's CUDA graph.

`model_runner` calls `expand_view` for the views that graphs are captured with; it means what
`forward_batch.expand_view` does in a dozen torch operations, which small steps would feel.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

import triton
import triton.language as tl

from nanovllm.worker.forward_batch import NOT_CACHED, ForwardBatch, StagedPlan, batch_of_view
from nanovllm.worker.request_rows import RequestRows

BLOCK = 128  # tokens of a program, or words of a block table at once


@triton.jit
def _num_ended(tokens, starts, num_rows, halvings):
    """How many entries end at or before each of the tokens."""
    low, high = tokens * 0, tokens * 0 + num_rows
    for _ in range(halvings):
        middle = (low + high) // 2
        after = tl.load(starts + middle + 1, low < high, other=0) <= tokens
        low, high = (
            tl.where(after & (low < high), middle + 1, low),
            tl.where(after, high, middle),
        )
    return low


@triton.jit
def _store_end(which, sampling, rows, num_computed, starts, end_rows, end_positions, end_tokens):
    """Of one entry that is sampled from."""
    entry = tl.load(sampling + which)
    start, end = tl.load(starts + entry), tl.load(starts + entry + 1)
    tl.store(end_rows + which, tl.load(rows + entry))
    tl.store(end_positions + which, tl.load(num_computed + entry) + end - start)
    tl.store(end_tokens + which, (end - 1).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "halvings"])
def _expand_kernel(  # noqa: C901
    rows,  # [num_rows + 1] int32, the last one the padding row's
    num_computed,  # like rows
    starts,  # first token of each, and behind the last; if DECODES that of num_rows
    token_ids,  # [rows of the device, …] int32
    tables,  # of each group of layers likewise: block tables
    stride,  # of all
    input_ids,  # [num_tokens] int64, out, like the next two
    positions,
    slot_mappings,  # of each group
    seq_lens,  # [num_rows] int32, out
    block_tables,  # of each group [num_rows, width] int32, out as far as a row's keys reach
    sampling,  # [num_rows] int32: entries that are sampled from; like the next ones if not DECODES
    end_rows, end_positions, end_tokens,  # [num_rows] int32, int32, int64, out: as `Ends`
    num_rows, num_tokens,
    widths,  # of each group
    halvings,  # that find one of num_rows
    BLOCK_SIZES: tl.constexpr,  # of each group
    DECODES: tl.constexpr, NOWHERE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs take a row each, the others BLOCK tokens each; every group has its own,
    and the first one's write what all groups have in common."""
    program, group = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    if program < num_rows:
        begin = tl.load(rows + program).to(tl.int64) * stride
        num_new = tl.load(starts + program + 1) - tl.load(starts + program)
        seq_len = tl.load(num_computed + program) + num_new
        if group == 0:
            tl.store(seq_lens + program, seq_len)
            if not DECODES:
                _store_end(program, sampling, rows, num_computed, starts, end_rows, end_positions,
                           end_tokens)  # fmt: skip
        for each in tl.static_range(len(BLOCK_SIZES)):
            if group == each:
                table, width = tables[each] + begin, widths[each]
                for first in range(0, tl.cdiv(seq_len, BLOCK_SIZES[each]), BLOCK):
                    places = first + lanes
                    blocks = tl.load(table + places, places < width)
                    tl.store(block_tables[each] + program * width + places, blocks, places < width)
    else:
        tokens = (program - num_rows) * BLOCK + lanes
        inside = tokens < num_tokens
        entries = tl.minimum(tokens, num_rows - 1)
        if not DECODES:
            entries = _num_ended(tokens, starts, num_rows, halvings)
        real = entries < num_rows
        row = tl.load(rows + entries).to(tl.int64)
        offsets = tokens - tl.load(starts + entries) + tl.load(num_computed + entries)
        places = tl.where(real & inside, offsets, 0)
        if group == 0:
            ids = tl.load(token_ids + row * stride + places)
            tl.store(input_ids + tokens, ids.to(tl.int64), inside)
            tl.store(positions + tokens, places.to(tl.int64), inside)
        for each in tl.static_range(len(BLOCK_SIZES)):
            if group == each:
                SIZE: tl.constexpr = BLOCK_SIZES[each]  # noqa: N806
                blocks = tl.load(tables[each] + row * stride + places // SIZE)
                slots = tl.where(real, blocks * SIZE + places % SIZE, NOWHERE)
                tl.store(slot_mappings[each] + tokens, slots.to(tl.int64), inside)


def expand_view(staged: StagedPlan, rows: RequestRows) -> ForwardBatch:
    """`forward_batch.expand_view`, but for words of block tables beyond a row's keys."""
    batch = batch_of_view(staged, rows)
    num_rows, num_tokens = batch.num_rows, batch.num_tokens
    batches, tables = (batch, *batch.others), tuple(rows.block_tables)
    assert all(table.stride() == rows.token_ids.stride() for table in tables)
    _expand_kernel[(num_rows + triton.cdiv(num_tokens, BLOCK), len(batches))](
        staged.rows, staged.num_computed, staged.query_start_loc,
        rows.token_ids, tables, rows.token_ids.stride(0),
        batch.input_ids, batch.positions, tuple(one.slot_mapping for one in batches),
        batch.seq_lens, tuple(one.block_tables for one in batches),
        staged.sampling, *(batch.ends or (None, None, None)),
        num_rows, num_tokens, tuple(one.block_tables.shape[1] for one in batches),
        num_rows.bit_length(),
        BLOCK_SIZES=tuple(rows.block_sizes), DECODES=num_tokens == num_rows, NOWHERE=NOT_CACHED,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return batch
