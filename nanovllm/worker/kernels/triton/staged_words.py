"""How kernels read what `sampling.wishes` lays out."""
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from nanovllm.worker.sampling import wishes

HEAD = tl.constexpr(wishes.HEAD)
LOGITS, TABLES = tl.constexpr(wishes.LOGITS), tl.constexpr(wishes.TABLES)
MASKS, MOST = tl.constexpr(wishes.MASKS), tl.constexpr(wishes.MOST)
LINE, TABLE, MASK = (tl.constexpr(one) for one in (wishes.LINE, wishes.TABLE, wishes.MASK))
ROW, POSITION = tl.constexpr(wishes.ROW), tl.constexpr(wishes.POSITION)
COUNTED = tl.constexpr(wishes.COUNTED)
TOLD_LINE, NUM_TOP = tl.constexpr(wishes.TOLD_LINE), tl.constexpr(wishes.NUM_TOP)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def field(words, number, entry, size):
    """The entry's word in one of the lists, int64."""
    return tl.load(words + HEAD + number * size + entry).to(tl.int64)


@triton.jit
def address(words, at, TYPE: tl.constexpr):
    """A pointer to what the head says lies there, of that type: aligned, as all tensors are."""
    place = (words + at).to(tl.pointer_type(tl.int64))
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(TYPE)), 16)
