"""Sums over GPUs of one host in one kernel: every rank writes its share into the others' memory.

`worker.rank` opens one where it measures better than NCCL. A program sends a piece of a row, waits
for its peers', and adds up in the order of ranks, so that all get the same bits. Behind a message a
flag is raised; small ones are sent in words that hold the launch's number, as by NCCL's LL
protocol. All ranks launch the same kernels in the same order.
"""
# ruff: noqa: C901, N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.row_exchange import (
    MOST_TOKENS,
    RowExchange,
    await_flag,
    numbers_at,
    open_memory,
    raise_flags,
)
from nanovllm.worker.kernels.triton.rows import normed_row, num_warps_for
from nanovllm.worker.layers.norm import RMSNorm

# All programs of a launch wait for those of other ranks, and so must run at once on any GPU.
MAX_PROGRAMS = 64
SLOT_BYTES = 16384  # what a program sends at most
WORDED_BYTES = 2**16  # of the largest message that is sent in words
MIN_BLOCK = 256  # a warp: nothing is waited for within a program
ROWS_FROM_BYTES = 2**19  # the least sum that may go by rows


@triton.jit
def _words(numbers, epoch):
    """Each number with the launch's own, which come together or not at all: [n] int64."""
    if numbers.dtype.primitive_bitwidth == 16:
        bits = numbers.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    else:
        bits = numbers.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return bits | (epoch.to(tl.int64) << 32)


@triton.jit
def _numbers(words, DTYPE: tl.constexpr):
    """Those in words, fp32."""
    bits = words.to(tl.int16) if DTYPE.primitive_bitwidth == 16 else words.to(tl.int32)
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _reduce_kernel(
    partial,  # [num_rows, num_columns]
    residual,  # the same, or None: nothing is added
    next_weight,  # [num_columns], of the norm that comes next, or None
    out,  # like partial
    weighed,  # like partial: out times next_weight, or normed
    squares,  # [num_rows, programs per row] fp32; None: a program has all of a row, and norms it
    addresses,  # [SIZE] int64: where each rank's memory lies, as this rank sees it
    epochs,  # [MAX_PROGRAMS] int32: how often each program has been launched, in words or not
    eps, num_columns,
    RANK: tl.constexpr, SIZE: tl.constexpr, NUM_SLOTS: tl.constexpr, SLOT: tl.constexpr,
    BLOCK: tl.constexpr, WORDED: tl.constexpr, CENTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK columns of a row.

    A rank's memory: flags, [NUM_SLOTS, SIZE] int32, by who sent; then [2, SIZE, NUM_SLOTS] slots,
    and as many again for what is sent in words.
    A program uses the two halves in turns. A peer may be a launch ahead, and then writes into the
    other half; two it cannot be, as it waits for what this program's next launch sends.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype = partial.dtype.element_ty
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + lanes
    inside = columns < num_columns
    places = tl.program_id(0) * num_columns + columns
    mine = tl.load(partial + places, inside, other=0.0)
    epoch = tl.load(epochs + program) + 1
    half = NUM_SLOTS * SIZE * 4 + ((epoch & 1) + 2 * WORDED).to(tl.int64) * SIZE * NUM_SLOTS * SLOT
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            slot = tl.load(addresses + peer) + half + (RANK * NUM_SLOTS + program) * SLOT
            if WORDED:
                tl.store(numbers_at(slot, tl.int64) + lanes, _words(mine, epoch), inside)
            else:
                tl.store(numbers_at(slot, dtype) + lanes, mine, inside)
    if not WORDED:
        raise_flags(addresses, program, epoch, RANK, SIZE)
    own = tl.load(addresses + RANK)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        slot = own + half + (peer * NUM_SLOTS + program) * SLOT
        if peer == RANK:
            total += mine.to(tl.float32)
        elif WORDED:
            words = tl.load(numbers_at(slot, tl.int64) + lanes, inside, other=0, volatile=True)
            while tl.max((inside & ((words >> 32).to(tl.int32) != epoch)).to(tl.int32), 0) > 0:
                words = tl.load(numbers_at(slot, tl.int64) + lanes, inside, other=0, volatile=True)
            total += _numbers(words, dtype)
        else:
            await_flag(own, program, peer, epoch, SIZE)
            tl.debug_barrier()
            theirs = tl.load(numbers_at(slot, dtype) + lanes, inside, other=0.0, volatile=True)
            total += theirs.to(tl.float32)
    tl.store(epochs + program, epoch)
    total = total.to(dtype)
    if residual is not None:
        base = tl.load(residual + places, inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + base).to(dtype)
    tl.store(out + places, total, inside)
    if next_weight is not None:
        factors = tl.load(next_weight + columns, inside, other=0.0).to(tl.float32)
        if squares is None:
            total = normed_row(total, next_weight, factors, inside, eps, num_columns, CENTERS)
            tl.store(weighed + places, total, inside)
        else:
            wide = total.to(tl.float32)  # zero where there are no columns
            tl.store(weighed + places, (wide * factors).to(dtype), inside)
            tl.store(squares + program, tl.sum(wide * wide, 0))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A `worker.parallel.Exchange` between GPUs.

    memory: whatever keeps the ranks' memory mapped. most_bytes: of a message that may go this way.
    """

    rank: int
    addresses: Tensor  # [size] int64
    epochs: Tensor  # [2, MAX_PROGRAMS] int32, on the device: of what is sent with flags, in words
    memory: Any
    most_bytes: int = MAX_PROGRAMS * SLOT_BYTES

    @classmethod
    def open(cls, rank: int, size: int, device: torch.device) -> Self:
        """Of the default group, all of whose ranks call it. Raises `RuntimeError` where GPUs cannot
        reach each other's memory."""
        memory, mapped = open_memory(num_bytes(size), device)
        addresses = torch.tensor(mapped.buffer_ptrs, dtype=torch.int64, device=device)
        epochs = torch.zeros(2, MAX_PROGRAMS, dtype=torch.int32, device=device)
        return cls(rank, addresses, epochs, (memory, mapped))

    def reduce(self, partial: Tensor) -> Tensor | None:
        """The sum of what all ranks hold, in new memory; None: it is too large for this way."""
        block = self._block_of(partial, 1, partial.numel())
        return None if block is None else self._launch(partial.view(1, -1), block).view_as(partial)

    def reduce_add(
        self, partial: Tensor, residual: Tensor, next_weight: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
        """residual + the sum, written over residual; weighed by next_weight, if there is one, and
        the sums of squares by parts of a row (as `kernels.base.Weighed`).

        partial, residual: [num_tokens, hidden_size]. None: too large for this way.
        """
        block = self._block_of(partial, *partial.shape)
        if block is None:
            return None
        if next_weight is None:
            return self._launch(partial, block, residual), None
        num_parts = triton.cdiv(partial.shape[1], block)
        squares = partial.new_empty(len(partial), num_parts, dtype=torch.float32)
        weighed = torch.empty_like(partial)
        self._launch(partial, block, residual, next_weight, weighed, squares)
        return residual, (weighed, squares)

    def reduce_normed(self, partial: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor | None:
        """The same, and what the norm makes of it: [num_tokens, hidden_size]."""
        block = triton.next_power_of_2(partial.shape[1])
        fits = len(partial) <= MAX_PROGRAMS and block * partial.itemsize <= SLOT_BYTES
        if not fits or self._block_of(partial, *partial.shape) is None:
            return None
        normed = torch.empty_like(partial)
        self._launch(partial, block, residual, norm.weight, normed, norm=norm)
        return normed

    def for_rows(self, like: Tensor, max_tokens: int) -> RowExchange | None:
        """Where rows can be moved by 16 bytes, and smaller sums are not slower than NCCL's."""
        if self.most_bytes < ROWS_FROM_BYTES or like.nbytes % 16:
            return None
        return RowExchange.open(
            self.rank,
            len(self.addresses),
            like,
            max_tokens=min(max_tokens, MOST_TOKENS),
            fewest=self.most_bytes // like.nbytes + 1,
        )

    def _block_of(self, partial: Tensor, num_rows: int, num_columns: int) -> int | None:
        """As few columns a program as leave no more programs than may wait together."""
        if partial.nbytes > self.most_bytes or not partial.is_contiguous() or not num_rows:
            return None
        block, most = MIN_BLOCK, SLOT_BYTES // partial.itemsize
        while block < most and num_rows * triton.cdiv(num_columns, block) > MAX_PROGRAMS:
            block *= 2
        return block if num_rows * triton.cdiv(num_columns, block) <= MAX_PROGRAMS else None

    def _launch(
        self,
        partial: Tensor,
        block: int,
        residual: Tensor | None = None,
        next_weight: Tensor | None = None,
        weighed: Tensor | None = None,
        squares: Tensor | None = None,
        *,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        num_rows, num_columns = partial.shape
        assert residual is None or residual.is_contiguous()
        out = torch.empty_like(partial) if residual is None else residual
        is_worded = partial.nbytes <= WORDED_BYTES and 8 * block <= SLOT_BYTES
        _reduce_kernel[(num_rows, triton.cdiv(num_columns, block))](
            partial, residual, next_weight, out, weighed, squares, self.addresses,
            self.epochs[int(is_worded)], 0.0 if norm is None else norm.eps, num_columns,
            RANK=self.rank, SIZE=len(self.addresses), NUM_SLOTS=MAX_PROGRAMS, SLOT=SLOT_BYTES,
            BLOCK=block, WORDED=is_worded, CENTERS=norm is not None and norm.centers,
            num_warps=num_warps_for(block), **launch_options(partial.device),
        )  # fmt: skip
        return out


def num_bytes(size: int) -> int:
    """Of each rank's memory: its flags, and slots for what all send, twice, in words or not."""
    return MAX_PROGRAMS * size * 4 + 4 * size * MAX_PROGRAMS * SLOT_BYTES
