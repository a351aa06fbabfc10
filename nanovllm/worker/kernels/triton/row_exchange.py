"""Sums over GPUs of one host, of many tokens: each rank adds up the rows of its share of them.

Of very many tokens, products write a peer's rows straight into its memory; of fewer, the peer reads
them. It adds them to its rows of the residual, which no other rank has, and writes what the next
norm makes of them into the memory of all. So norms and residual are shared out, too.
All ranks launch the same kernels in the same order.
"""
# ruff: noqa: N803, PLR0913
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.worker.kernels.triton.launch import launch_options
from nanovllm.worker.kernels.triton.rows import normed_row, num_warps_for
from nanovllm.worker.layers.norm import RMSNorm

MAX_PROGRAMS = 512
MOST_TOKENS = 16384  # of a step, for which there is memory: two rows each
SPLIT_FROM = 1024  # tokens of a rank whose products are worth launches of their own


@triton.jit
def numbers_at(address, DTYPE: tl.constexpr):
    """A pointer to numbers, which lie so that 16 bytes can be moved at once."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def raise_flags(memories, program, value, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Tells all peers of a program that it has come so far, behind all that its threads have read
    and written: a memory begins with flags, [programs, SIZE] int32, by who raised them."""
    tl.debug_barrier()  # one thread raises them
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = tl.load(memories + peer) + (program * SIZE + RANK) * 4
            tl.atomic_xchg(flag.to(tl.pointer_type(tl.int32)), value, sem="release", scope="sys")


@triton.jit
def await_flag(own, program, peer, value, SIZE: tl.constexpr):
    """Returns when that peer has come so far. own: this rank's memory."""
    flag = (own + (program * SIZE + peer) * 4).to(tl.pointer_type(tl.int32))
    # A difference, since values run over.
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - value < 0:
        pass


@triton.jit
def _meet(memories, program, value, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Tells all peers that this program has come so far; returns when they have."""
    raise_flags(memories, program, value, RANK, SIZE)
    own = tl.load(memories + RANK)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            await_flag(own, program, peer, value, SIZE)
    tl.debug_barrier()


@triton.jit
def _add_rows_kernel(
    memories,  # [SIZE] int64: where each rank's memory lies, as this rank sees it
    products,  # int64: where in this rank's memory its own part of its first row lies
    stride,  # int64: from there to the next rank's part, if those lie in this rank's memory
    outs,  # int64: where in each memory this rank's first row, normed, goes
    epochs,  # [MAX_PROGRAMS] int32: twice how often each program has been launched
    residual,  # [num_rows, num_columns], of this rank's tokens; the sums are written over it
    weight,  # [num_columns], of the norm
    eps, num_rows, num_columns,
    RANK: tl.constexpr, SIZE: tl.constexpr, SENT: tl.constexpr, BLOCK: tl.constexpr,
    CENTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs take rows in turns. SENT: others have written their parts into this rank's memory.

    Flags are [MAX_PROGRAMS, SIZE] int32, by who raised them. A program meets its peers of the same
    number twice: when all products are done, and when all rows are written. Programs start in the
    order of their numbers, so the first ones that have not ended can always go on.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    factors = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype = residual.dtype.element_ty
    program = tl.program_id(0)
    epoch = tl.load(epochs + program)
    _meet(memories, program, epoch + 1, RANK, SIZE)
    for row in tl.range(program, num_rows, tl.num_programs(0)):
        places = row * num_columns.to(tl.int64) + columns
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            if SENT:
                part = tl.load(memories + RANK) + products + rank * stride
            else:
                part = tl.load(memories + rank) + products
            part = tl.load(numbers_at(part, dtype) + places, inside, other=0.0, volatile=True)
            total += part.to(tl.float32)
        before = tl.load(residual + places, inside, other=0.0).to(tl.float32)
        total = (total.to(dtype).to(tl.float32) + before).to(dtype)
        tl.store(residual + places, total, inside)
        total = normed_row(total, weight, factors, inside, eps, num_columns, CENTERS)
        for rank in tl.static_range(SIZE):
            out = numbers_at(tl.load(memories + rank) + outs, dtype)
            tl.store(out + places, total, inside)
    _meet(memories, program, epoch + 2, RANK, SIZE)
    tl.store(epochs + program, epoch + 2)


@dataclass(frozen=True, slots=True)
class RowExchange:
    """A `worker.parallel.RowExchange` between GPUs.

    memories: of each rank, as this one sees it, [num_bytes] uint8: flags, then rows of products,
    then normed rows, `max_tokens` of each. fewest: tokens that go this way. num_programs: of a
    launch, at most. handle: whatever keeps the memory mapped.
    """

    rank: int
    memories: list[Tensor]
    like: Tensor  # [num_columns], in the precision of all rows
    max_tokens: int
    fewest: int
    addresses: Tensor  # [size] int64
    epochs: Tensor  # [MAX_PROGRAMS] int32, on the device
    split_from: int = SPLIT_FROM
    num_programs: int = MAX_PROGRAMS
    handle: Any = None

    @classmethod
    def open(cls, rank: int, size: int, like: Tensor, *, max_tokens: int, fewest: int) -> Self:
        """Of the default group, all of whose ranks call it. Raises `RuntimeError` where GPUs cannot
        reach each other's memory."""
        num_bytes = bytes_of(size, like, max_tokens)
        memory, mapped = open_memory(num_bytes, like.device)
        memories = [mapped.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)]
        found = cls.over(rank, memories, like, max_tokens=max_tokens, fewest=fewest)
        return replace(found, handle=(memory, mapped))

    @classmethod
    def over(
        cls, rank: int, memories: list[Tensor], like: Tensor, *, max_tokens: int, fewest: int
    ) -> Self:
        """Of ranks whose memories are there, and empty."""
        at = [memory.data_ptr() for memory in memories]
        addresses = torch.tensor(at, dtype=torch.int64, device=like.device)
        epochs = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=like.device)
        return cls(rank, memories, like, max_tokens, fewest, addresses, epochs)

    def takes(self, num_tokens: int) -> bool:
        """Whether so many go this way; all ranks decide alike."""
        return self.fewest <= num_tokens <= self.max_tokens

    def share(self, rank: int, num_tokens: int) -> slice:
        """Which of the tokens are that rank's."""
        each = -(-num_tokens // len(self.memories))
        return slice(min(rank * each, num_tokens), min((rank + 1) * each, num_tokens))

    def places(self, num_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens, and where this rank's products of them are to be written, [tokens, columns]."""
        if not self._sends(num_tokens):
            yield slice(0, num_tokens), self._products(self.rank, 0, num_tokens)
            return
        size = len(self.memories)
        for step in range(1, size + 1):  # its own last: others' are on their way meanwhile
            rank = (self.rank + step) % size
            tokens = self.share(rank, num_tokens)
            first = self.rank * self._each
            yield tokens, self._products(rank, first, tokens.stop - tokens.start)

    def add_normed(self, residual: Tensor, norm: RMSNorm, num_tokens: int) -> Tensor:
        """Adds what all ranks have written to its `places` to this rank's rows of the residual, in
        place. Returns what the norm makes of the rows of all, [num_tokens, num_columns], in memory
        that the next call writes to."""
        size, share = len(self.memories), self.share(self.rank, num_tokens)
        assert residual.is_contiguous() and len(residual) == share.stop - share.start
        sent, row_bytes = self._sends(num_tokens), self.like.nbytes
        products = self._flag_bytes + (0 if sent else share.start * row_bytes)
        block = triton.next_power_of_2(len(self.like))
        num_programs = min(-(-num_tokens // size), self.num_programs)
        _add_rows_kernel[(num_programs,)](
            self.addresses, products, self._each * row_bytes,
            self._normed_at + share.start * row_bytes, self.epochs, residual, norm.weight, norm.eps,
            len(residual), len(self.like),
            RANK=self.rank, SIZE=size, SENT=sent, BLOCK=block, CENTERS=norm.centers,
            num_warps=num_warps_for(block), **launch_options(residual.device),
        )  # fmt: skip
        return self._rows(self.rank, self._normed_at, num_tokens)

    @property
    def _each(self) -> int:
        """Rows of products that a rank has room for of each other one."""
        return -(-self.max_tokens // len(self.memories))

    @property
    def _flag_bytes(self) -> int:
        return MAX_PROGRAMS * len(self.memories) * 4

    @property
    def _normed_at(self) -> int:
        return self._flag_bytes + len(self.memories) * self._each * self.like.nbytes

    def _sends(self, num_tokens: int) -> bool:
        """Whether products are written to where their rows are added up."""
        return num_tokens >= self.split_from * len(self.memories)

    def _products(self, rank: int, first: int, num_rows: int) -> Tensor:
        return self._rows(rank, self._flag_bytes + first * self.like.nbytes, num_rows)

    def _rows(self, rank: int, start: int, num_rows: int) -> Tensor:
        """From that byte on of a rank's memory."""
        held = self.memories[rank][start : start + num_rows * self.like.nbytes]
        return held.view(self.like.dtype).view(num_rows, -1)


def open_memory(num_bytes: int, device: torch.device) -> tuple[Tensor, Any]:
    """Zeros, [num_bytes] uint8, of each rank of the default group, all of whose ranks call it, and
    how they lie in each other's sight. Raises `RuntimeError` where GPUs cannot reach each other's
    memory."""
    import torch.distributed._symmetric_memory as symmetric  # reads half of torch

    memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    group = distributed.group.WORLD
    assert group is not None
    mapped = symmetric.rendezvous(memory, group)
    memory.zero_()
    torch.cuda.synchronize(device)
    distributed.barrier()  # nobody writes to others before all is zero
    return memory, mapped


def bytes_of(size: int, like: Tensor, max_tokens: int) -> int:
    """Of each rank's memory."""
    rows = size * -(-max_tokens // size) + max_tokens
    return MAX_PROGRAMS * size * 4 + rows * like.nbytes
