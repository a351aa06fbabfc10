"""What rows ask of their logits before a token is chosen, and the choice: a few launches.

`sampling.device_sampler` calls it for the entries of a step that ask for something, in the order of
`sampling.sampler`: allowed ids, bad words, min_tokens, logit_bias; a grammar's mask; penalties.
Logits are read as the model left them, where the step's words say that they lie, and edited in a
float32 copy of those entries alone. Where there is no entry, programs end at once.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from nanovllm.worker.kernels.triton.fused_sampler import choose_tokens, store_segments
from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.staged_words import (
    COUNTED,
    LINE,
    LOGITS,
    MASK,
    MASKS,
    POSITION,
    ROW,
    TABLE,
    TABLES,
    TYPES,
    address,
    field,
)
from nanovllm.worker.parallel import SEGMENT
from nanovllm.worker.sampling.columns import PENALTIES
from nanovllm.worker.sampling.wishes import Wishes

BLOCK = tl.constexpr(4096)  # tokens of a program
SEGMENTS = 16  # of a program, where they are measured
SPARSE_BLOCK = tl.constexpr(256)  # ids or words looked at at once
COUNT_BLOCK = tl.constexpr(1024)
IN_PROMPT = tl.constexpr(1 << 30)  # added to the count of a token that the prompt has


@triton.jit
def _allow_kernel(
    words,  # int32: see `wishes`
    size,
    edited,  # [k, vocab_size] fp32, out
    stride, vocab_size,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Copies the logits of entries that have edits, but for ids that are not allowed."""
    entry = tl.program_id(0)
    table = field(words, TABLE, entry, size)
    if table >= 0:
        tables = address(words, TABLES, tl.int32)
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        own = address(words, LOGITS, TYPE) + field(words, LINE, entry, size) * stride
        x = tl.load(own + tokens, inside).to(tl.float32)
        if tl.load(tables + table) > 0:
            allowed = tl.load(tables + table + 8 + tokens // 32, inside, other=0)
            x = tl.where(((allowed >> (tokens % 32)) & 1) != 0, x, float("-inf"))
        tl.store(edited + entry.to(tl.int64) * vocab_size + tokens, x, inside)


@triton.jit
def _single_ids_kernel(
    words, size,
    num_prompt_tokens,  # [num_rows] int32, stride column_stride
    column_stride,
    known,  # [num_rows, …] int32, stride known_stride: the rows' tokens
    known_stride,
    edited,  # [k, vocab_size] fp32, changed
    left,  # [k] int32, out: zeros
    vocab_size,
):  # fmt: skip
    """Bad words, ids that come too early, biases: one program per entry, in this order."""
    entry = tl.program_id(0)
    tl.store(left + entry, 0)
    table = field(words, TABLE, entry, size)
    if table >= 0:
        row, end = field(words, ROW, entry, size), field(words, POSITION, entry, size)
        tables = address(words, TABLES, tl.int32)
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
    words, size,
    edited,  # [k, vocab_size] fp32
    mask_stride,
    left,  # [k] int32, zeros at first: becomes 1 where a mask and edits leave something
    vocab_size,
):  # fmt: skip
    """A grammar wins over edits that would leave it nothing: finds out where they do."""
    entry = tl.program_id(0)
    mask = field(words, MASK, entry, size)
    if (mask >= 0) & (field(words, TABLE, entry, size) >= 0):
        tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        x = tl.load(edited + entry.to(tl.int64) * vocab_size + tokens, inside, other=float("-inf"))
        masks = address(words, MASKS, tl.int32)
        allowed = _is_allowed(masks, mask, mask_stride, tokens, inside)
        if tl.max((allowed & (x > float("-inf"))).to(tl.int32), 0) > 0:
            tl.store(left + entry, 1)


@triton.jit
def _count(words, size, entry, num_prompt, known, counts, tokens, inside, first, count):
    """Counts of an entry's tokens among `count` ids from `first` on, [num, SEGMENT] as `tokens`:
    brought up to date with what the row has got since it was last here. counts: the row's."""
    before, end = field(words, COUNTED, entry, size), field(words, POSITION, entry, size)
    if before == 0:  # it has been admitted since
        tl.store(counts + tokens, tl.zeros_like(tokens), inside)
        tl.debug_barrier()
    for start in range(before.to(tl.int32), end.to(tl.int32), COUNT_BLOCK):
        places = start + tl.arange(0, COUNT_BLOCK)
        got = tl.load(known + places, places < end, other=-1)
        mine = (got >= first) & (got < first + count)
        tl.atomic_or(counts + got, IN_PROMPT, mine & (places < num_prompt))
        tl.atomic_add(counts + got, 1, mine & (places >= num_prompt))
    tl.debug_barrier()
    # Not by way of the first cache, where a neighbour may have read some of it before.
    return tl.load(counts + tokens, inside, other=0, cache_modifier=".cg")


@triton.jit
def _finish_kernel(
    words, size, stride,
    edited,  # [k, vocab_size] fp32, changed
    mask_stride,
    left,  # None if no entry has edits
    repetition,  # [num_rows] fp32; this and the next four have stride column_stride
    presence, frequency, temperature,
    num_prompt_tokens,  # [num_rows] int32
    column_stride,
    known,  # [num_rows, …] int32, stride known_stride: the rows' tokens
    known_stride,
    counts,  # [num_rows, vocab_size] int32, or None: nobody asks for a penalty
    maxima, masses,  # [k, num_segments] fp32, out: as `fused_sampler` has them
    vocab_size, num_segments,
    SEGMENT: tl.constexpr, NUM: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mask and the penalties of each entry, on its edited logits or on the model's own; then
    what of NUM segments enters the race."""
    if PDL:
        gdc_launch_dependents()
    entry = tl.program_id(0)
    line = field(words, LINE, entry, size)
    if line >= 0:
        row, mask = field(words, ROW, entry, size), field(words, MASK, entry, size)
        segments = tl.program_id(1) * NUM + tl.arange(0, NUM)
        tokens = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        inside = tokens < vocab_size
        out = edited + entry.to(tl.int64) * vocab_size + tokens
        is_edited = False
        if left is not None:
            wins = (mask < 0) | (tl.load(left + entry) != 0)
            is_edited = (field(words, TABLE, entry, size) >= 0) & wins
        own = tl.load(address(words, LOGITS, TYPE) + line * stride + tokens,
                      inside & (not is_edited), other=float("-inf"))  # fmt: skip
        x = own.to(tl.float32)
        if left is not None:
            x = tl.where(is_edited, tl.load(out, inside & is_edited, other=float("-inf")), x)
        if mask >= 0:
            masks = address(words, MASKS, tl.int32)
            allowed = _is_allowed(masks, mask, mask_stride, tokens, inside)
            x = tl.where(allowed, x, float("-inf"))
        if counts is not None:
            rate = tl.load(repetition + row * column_stride)
            once = tl.load(presence + row * column_stride)
            each = tl.load(frequency + row * column_stride)
            if (rate != 1.0) | (once != 0.0) | (each != 0.0):
                count = _count(
                    words, size, entry, tl.load(num_prompt_tokens + row * column_stride),
                    known + row * known_stride, counts + row * vocab_size, tokens, inside,
                    tl.program_id(1) * NUM * SEGMENT, NUM * SEGMENT,
                )  # fmt: skip
                num_outputs = (count & (IN_PROMPT - 1)).to(tl.float32)
                penalized = tl.where(x > 0, tl.div_rn(x, rate), x * rate)
                penalized -= each * num_outputs + tl.where(num_outputs > 0, once, 0.0)
                x = tl.where(count != 0, penalized, x)
        tl.store(out, x, inside)
        warmth = tl.load(temperature + row * column_stride)
        store_segments(x, warmth, maxima, masses, entry.to(tl.int64), segments, num_segments)


def sample_edited(
    wishes: Wishes,
    num_entries: int,
    *,
    token_ids: Tensor,
    counts: Tensor | None,
    known: Tensor,
    columns: Mapping[str, Tensor],
    seeds: Tensor,
) -> None:
    """Choose anew for entries that ask for edits, penalties or a mask.

    num_entries: as many as there are, or more. token_ids: [n] int64, of the step; those of these
    entries are changed. counts: [num_rows, vocab_size] int32, brought up to date here, or None if
    none of the entries asks for a penalty. known: [num_rows, …] int32, the rows' tokens: the chosen
    ones are written there, too. columns: by row, of one stride: what a draw reads, the penalties,
    and `num_prompt_tokens` (int32). seeds: [num_rows] int64.
    """
    vocab_size, device, words, size = wishes.vocab_size, known.device, wishes.words, wishes.size
    edited = torch.empty(num_entries, vocab_size, device=device)
    num_segments = triton.cdiv(vocab_size, SEGMENT)
    segments = torch.empty(2, num_entries, num_segments, device=device)
    of_rows = [columns[name] for name in (*PENALTIES, "temperature", "num_prompt_tokens")]
    stride = of_rows[0].stride(0)
    assert all(one.stride(0) == stride for one in of_rows)
    left = None
    if wishes.has_edits:
        left = torch.empty(num_entries, dtype=torch.int32, device=device)
        _edit(wishes, edited, left, known, columns["num_prompt_tokens"])
    _finish_kernel[(num_entries, triton.cdiv(num_segments, SEGMENTS))](
        words, size, wishes.stride, edited, wishes.num_mask_words, left, *of_rows, stride, known,
        known.stride(0), counts, *segments, vocab_size, num_segments,
        SEGMENT=SEGMENT, NUM=SEGMENTS, TYPE=TYPES[wishes.dtype],
        PDL=launch_options(device)["PDL"], num_warps=8,
    )  # fmt: skip
    choose_tokens(
        edited,
        segments,
        (wishes.field(ROW.value), wishes.field(POSITION.value)),
        columns=columns,
        seeds=seeds,
        known=known,
        out=(token_ids, wishes.field(LINE.value)),
    )


def _edit(
    wishes: Wishes, edited: Tensor, left: Tensor, known: Tensor, num_prompt_tokens: Tensor
) -> None:
    """Fill in the lines of entries that have edits, and whether these leave masks anything."""
    words, size, (num_entries, vocab_size) = wishes.words, wishes.size, edited.shape
    grid = num_entries, triton.cdiv(vocab_size, BLOCK.value)
    _allow_kernel[grid](
        words, size, edited, wishes.stride, vocab_size, TYPE=TYPES[wishes.dtype], num_warps=8
    )
    _single_ids_kernel[(num_entries,)](
        words, size, num_prompt_tokens, num_prompt_tokens.stride(0), known, known.stride(0),
        edited, left, vocab_size, num_warps=4,
    )  # fmt: skip
    _left_kernel[grid](words, size, edited, wishes.num_mask_words, left, vocab_size, num_warps=8)
