"""What rows ask of their logits before a token is chosen: a few launches behind the forward pass.

`sampling.device_sampler` calls it for the entries of a step that ask for something, in the order of
`sampling.sampler`: allowed ids, bad words, min_tokens, logit_bias; a grammar's mask; penalties.
Logits are read as the model left them, and edited in a float32 copy of those entries alone.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.worker.sampling.columns import PENALTIES
from nanovllm.worker.sampling.edit_tables import Entries

BLOCK = tl.constexpr(4096)  # tokens of a program
SPARSE_BLOCK = tl.constexpr(256)  # ids or words looked at at once
COUNT_BLOCK = tl.constexpr(1024)
IN_PROMPT = tl.constexpr(1 << 30)  # added to the count of a token that the prompt has


@triton.jit
def _field(entries, field: tl.constexpr, entry):
    """Of `Entries`: 0 line, 1 row, 2 position, 3 where its edits begin, 4 line of its mask."""
    return tl.load(entries + field * tl.num_programs(0) + entry).to(tl.int64)


@triton.jit
def _allow_kernel(
    logits,  # [n, vocab_size] of any float type
    logits_stride,
    entries,  # [5, k] int32
    tables,  # int32: see `edit_tables`
    edited,  # [k, vocab_size] fp32, out
    vocab_size,
):
    """Copies the logits of entries that have edits, but for ids that are not allowed."""
    entry = tl.program_id(0)
    table = _field(entries, 3, entry)
    if table >= 0:
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        x = tl.load(logits + _field(entries, 0, entry) * logits_stride + tokens, inside)
        x = x.to(tl.float32)
        if tl.load(tables + table) > 0:
            words = tl.load(tables + table + 8 + tokens // 32, inside, other=0)
            x = tl.where(((words >> (tokens % 32)) & 1) != 0, x, float("-inf"))
        tl.store(edited + entry.to(tl.int64) * vocab_size + tokens, x, inside)


@triton.jit
def _single_ids_kernel(
    entries,
    tables,
    num_prompt_tokens,  # [num_rows] int32, stride column_stride
    column_stride,
    known,  # [num_rows, …] int32, stride known_stride: the rows' tokens
    known_stride,
    edited,  # [k, vocab_size] fp32, changed
    vocab_size,
):
    """Bad words, ids that come too early, biases: one program per entry, in this order."""
    entry = tl.program_id(0)
    table = _field(entries, 3, entry)
    if table >= 0:
        row, end = _field(entries, 1, entry), _field(entries, 2, entry)
        num_outputs = end - tl.load(num_prompt_tokens + row * column_stride)
        out = edited + entry.to(tl.int64) * vocab_size
        lanes = tl.arange(0, SPARSE_BLOCK)
        num_allowed, num_words = tl.load(tables + table), tl.load(tables + table + 1)
        num_early, min_tokens = tl.load(tables + table + 2), tl.load(tables + table + 3)
        num_biases, num_word_tokens = tl.load(tables + table + 4), tl.load(tables + table + 5)
        starts = tables + table + 8 + num_allowed
        tokens = starts + num_words + 1
        for first in range(0, num_words, SPARSE_BLOCK):
            word = first + lanes
            begin = tl.load(starts + word, word < num_words, other=0)
            last = tl.load(starts + word + 1, word < num_words, other=1) - 1
            matches = (word < num_words) & (last - begin <= num_outputs)
            for back in range(1, tl.max(last - begin, 0) + 1):
                compared = matches & (last - back >= begin)
                wanted = tl.load(tokens + last - back, compared, other=-1)
                found = tl.load(known + row * known_stride + end - back, back <= end, other=-1)
                matches = tl.where(compared, wanted == found, matches)
            tl.store(out + tl.load(tokens + last, matches, other=0), float("-inf"), matches)
        early = tokens + num_word_tokens
        if num_outputs < min_tokens:
            for first in range(0, num_early, SPARSE_BLOCK):
                inside = first + lanes < num_early
                tl.store(
                    out + tl.load(early + first + lanes, inside, other=0), float("-inf"), inside
                )
        tl.debug_barrier()  # a bias is added to what others have stored
        biased = early + num_early
        for first in range(0, num_biases, SPARSE_BLOCK):
            inside = first + lanes < num_biases
            place = out + tl.load(biased + first + lanes, inside, other=0)
            bias = tl.load(biased + num_biases + first + lanes, inside, other=0)
            x = tl.load(place, inside, other=0.0) + bias.to(tl.float32, bitcast=True)
            tl.store(place, x, inside)


@triton.jit
def _is_allowed(masks, mask, mask_stride, tokens, inside):
    words = tl.load(masks + mask * mask_stride + tokens // 32, inside, other=0)
    return ((words >> (tokens % 32)) & 1) != 0


@triton.jit
def _left_kernel(
    entries,
    edited,  # [k, vocab_size] fp32
    masks,  # [m, …] int32, stride mask_stride: a bit per id
    mask_stride,
    left,  # [k] int32, zeros at first: becomes 1 where a mask and edits leave something
    vocab_size,
):
    """A grammar wins over edits that would leave it nothing: finds out where they do."""
    entry = tl.program_id(0)
    mask = _field(entries, 4, entry)
    if (mask >= 0) & (_field(entries, 3, entry) >= 0):
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        x = tl.load(edited + entry.to(tl.int64) * vocab_size + tokens, inside, other=float("-inf"))
        allowed = _is_allowed(masks, mask, mask_stride, tokens, inside)
        if tl.max((allowed & (x > float("-inf"))).to(tl.int32), 0) > 0:
            tl.store(left + entry, 1)


@triton.jit
def _clear_counts_kernel(
    entries,
    num_counted,  # [num_rows] int32, stride column_stride
    column_stride,
    counts,  # [num_rows, vocab_size] int32, out
    vocab_size,
):
    """The counts of rows that have been admitted since they were last here."""
    row = _field(entries, 1, tl.program_id(0))
    if tl.load(num_counted + row * column_stride) == 0:
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.int32)
        tl.store(counts + row * vocab_size + tokens, zeros, tokens < vocab_size)


@triton.jit
def _count_kernel(
    entries,
    num_prompt_tokens, num_counted, column_stride,
    known, known_stride,
    counts,
    vocab_size,
):  # fmt: skip
    """Counts what each row has got since it was last here: one program per entry."""
    entry = tl.program_id(0)
    row, end = _field(entries, 1, entry), _field(entries, 2, entry).to(tl.int32)
    num_prompt = tl.load(num_prompt_tokens + row * column_stride)
    num_before = tl.load(num_counted + row * column_stride)
    for first in range(num_before, end, COUNT_BLOCK):
        places = first + tl.arange(0, COUNT_BLOCK)
        inside = places < end
        tokens = tl.load(known + row * known_stride + places, inside, other=0)
        place = counts + row * vocab_size + tokens
        tl.atomic_or(place, IN_PROMPT, inside & (places < num_prompt))
        tl.atomic_add(place, 1, inside & (places >= num_prompt))
    tl.debug_barrier()  # all have read where to begin
    tl.store(num_counted + row * column_stride, end)


@triton.jit
def _finish_kernel(
    logits, logits_stride,
    entries,
    edited,  # [k, vocab_size] fp32, changed
    masks,
    mask_stride,
    left,  # None if no entry has edits
    repetition,  # [num_rows] fp32; this and the next two have stride column_stride
    presence, frequency, column_stride,
    counts,  # or None: nobody asks for a penalty
    vocab_size,
    HAS_EDITS: tl.constexpr,
):  # fmt: skip
    """The mask and the penalties of each entry, on its edited logits or on the model's own."""
    entry = tl.program_id(0)
    row = _field(entries, 1, entry)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    out = edited + entry.to(tl.int64) * vocab_size + tokens
    mask = _field(entries, 4, entry)
    is_edited = False
    if HAS_EDITS:
        wins = (mask < 0) | (tl.load(left + entry) != 0)
        is_edited = (_field(entries, 3, entry) >= 0) & wins
    own = tl.load(logits + _field(entries, 0, entry) * logits_stride + tokens,
                  inside & (not is_edited), other=0.0)  # fmt: skip
    x = own.to(tl.float32)
    if HAS_EDITS:
        x = tl.where(is_edited, tl.load(out, inside & is_edited, other=0.0), x)
    if mask >= 0:
        x = tl.where(_is_allowed(masks, mask, mask_stride, tokens, inside), x, float("-inf"))
    if counts is not None:
        rate = tl.load(repetition + row * column_stride)
        once = tl.load(presence + row * column_stride)
        each = tl.load(frequency + row * column_stride)
        if (rate != 1.0) | (once != 0.0) | (each != 0.0):
            count = tl.load(counts + row * vocab_size + tokens, inside, other=0)
            num_outputs = (count & (IN_PROMPT - 1)).to(tl.float32)
            penalized = tl.where(x > 0, tl.div_rn(x, rate), x * rate)
            penalized -= each * num_outputs + tl.where(num_outputs > 0, once, 0.0)
            x = tl.where(count != 0, penalized, x)
    tl.store(out, x, inside)


def edit_logits(
    logits: Tensor,
    entries: Entries,
    *,
    masks: Tensor,
    counts: Tensor | None,
    known: Tensor,
    columns: Mapping[str, Tensor],
) -> Tensor:
    """What the entries may sample from, [k, vocab_size] fp32 in new memory.

    logits: [n, vocab_size], kept. masks: [m, num_words] int32.
    counts: [num_rows, vocab_size] int32, brought up to date here, or None if none of the entries
    asks for a penalty.
    known: [num_rows, …] int32, the rows' tokens. columns: by row, of one stride: the penalties,
    and `num_prompt_tokens` and `num_counted` (int32; how many tokens `counts` has seen, changed).
    """
    vocab_size, num_entries = logits.shape[1], entries.num_entries
    assert logits.stride(1) == 1
    edited = torch.empty(num_entries, vocab_size, device=logits.device)
    grid = num_entries, triton.cdiv(vocab_size, BLOCK.value)
    rates = [columns[name] for name in PENALTIES]
    num_prompt_tokens, num_counted = columns["num_prompt_tokens"], columns["num_counted"]
    stride = num_counted.stride(0)
    assert all(column.stride(0) == stride for column in (*rates, num_prompt_tokens))
    words = entries.words
    left = None
    if entries.tables is not None:
        _allow_kernel[grid](
            logits, logits.stride(0), words, entries.tables, edited, vocab_size, num_warps=8
        )
        _single_ids_kernel[(num_entries,)](
            words, entries.tables, num_prompt_tokens, stride, known, known.stride(0), edited,
            vocab_size, num_warps=4,
        )  # fmt: skip
        left = torch.zeros(num_entries, dtype=torch.int32, device=logits.device)
        _left_kernel[grid](words, edited, masks, masks.stride(0), left, vocab_size, num_warps=8)
    if counts is not None:
        _clear_counts_kernel[grid](words, num_counted, stride, counts, vocab_size, num_warps=8)
        _count_kernel[(num_entries,)](
            words, num_prompt_tokens, num_counted, stride, known, known.stride(0), counts,
            vocab_size, num_warps=4,
        )  # fmt: skip
    _finish_kernel[grid](
        logits, logits.stride(0), words, edited, masks, masks.stride(0), left, *rates, stride,
        counts, vocab_size, HAS_EDITS=entries.tables is not None, num_warps=8,
    )  # fmt: skip
    return edited
