"""Sums over ranks that write into each other's memory; in the interpreter, processes share it."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.worker.kernels.base import Residual
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton.exchange import MAX_PROGRAMS, Exchange, num_bytes
from nanovllm.worker.kernels.triton.layer_kernels import WEIGHED_SUMS, TritonKernels
from nanovllm.worker.kernels.triton.row_exchange import MOST_TOKENS, RowExchange
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import TensorParallel
from tests.worker.kernels.rank_processes import found_by_ranks

# In turns, so that programs meet regions that others have written to: rows, columns. All but the
# largest are sent in words.
SHAPES = ((1, 64), (3, 1500), (1, 2100), (5, 4000), (2, 64), (70, 16), (20, 24), (1, 5))
NUM_TURNS = 3 * len(SHAPES)  # each plain, with a residual, and with a norm as well


def shares(turn: int, size: int) -> Tensor:
    """What each rank has, and a residual, [size + 1, rows, columns]."""
    shape = SHAPES[turn % len(SHAPES)]
    return torch.randn(size + 1, *shape, generator=torch.Generator().manual_seed(turn))


def opened(rank: int, memories: list[Tensor], epoch: int = 0) -> Exchange:
    addresses = torch.tensor([memory.data_ptr() for memory in memories])
    epochs = torch.full((2, MAX_PROGRAMS), epoch, dtype=torch.int32)
    return Exchange(rank, addresses, epochs, memories)


def run_rank(rank: int, memories: list[Tensor], epoch: int, answer: Any) -> None:
    """The program of one rank: sums in turns, plain and with a residual and a norm."""
    import tests.worker.kernels.triton_device  # noqa: F401  # mends the interpreter

    size = len(memories)
    parallel = TensorParallel(rank, size, exchange=opened(rank, memories, epoch))
    found: list[Tensor] = []
    for turn in range(NUM_TURNS):
        parts = shares(turn, size)
        if turn % 3 == 0:
            found.append(parallel.reduce(parts[rank].clone()))
            continue
        norm = RMSNorm(parts[size, 0] + 1, 1e-6) if turn % 3 == 1 else None
        residual = TritonKernels().reduce_add(
            parts[rank].clone(), parts[size].clone(), parallel, next_norm=norm
        )
        found += flat(residual)
    answer.send([tensor.numpy() for tensor in found])
    answer.close()


def flat(residual: Residual) -> list[Tensor]:
    if residual.normed is not None:
        return [residual.hidden, residual.normed]
    if residual.weighed is None:
        return [residual.hidden]
    return [residual.hidden, residual.weighed.values, residual.weighed.squares.sum(1)]


def expected(size: int) -> list[Tensor]:
    found = []
    for turn in range(NUM_TURNS):
        parts = shares(turn, size)
        total = parts[0].clone()
        for rank in range(1, size):
            total += parts[rank]
        if turn % 3 == 0:
            found.append(total)
            continue
        total += parts[size]
        found.append(total)
        if turn % 3 == 1 and WEIGHED_SUMS < len(total) <= MAX_PROGRAMS:
            found.append(TorchKernels().rms_norm(total, RMSNorm(parts[size, 0] + 1, 1e-6)))
        elif turn % 3 == 1 and len(total) <= MAX_PROGRAMS:
            found += [total * (parts[size, 0] + 1), total.square().sum(1)]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes share memory by its descriptors")
@pytest.mark.parametrize(("size", "epoch"), [(2, 0), (3, 2**31 - 4)])
def test_ranks_that_write_to_each_other_get_the_same_sums(
    size: int, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs run over, too: flags then stand where the last launch has left them."""
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    answers = found_by_ranks(run_rank, size, num_bytes=num_bytes(size), epoch=epoch)
    wanted = expected(size)
    assert len(answers[0]) == len(wanted)
    for found in answers:
        for mine, first, right in zip(found, answers[0], wanted, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, right)


def refuse_to_launch(*_: object, **__: object) -> Tensor:
    raise AssertionError("this message is too large")


@pytest.mark.parametrize("ask", [Exchange.reduce, lambda *a: Exchange.reduce_add(*a, a[1], None)])
def test_what_is_too_large_goes_another_way(
    ask: Callable[[Exchange, Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exchange, "_launch", refuse_to_launch)
    exchange = opened(0, [torch.zeros(8), torch.zeros(8)])
    assert ask(exchange, torch.zeros(MAX_PROGRAMS + 1, 8192)) is None
    assert ask(replace(exchange, most_bytes=64), torch.zeros(1, 17)) is None


def test_where_larger_sums_go_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind those that go this way; nowhere, if rows cannot be moved by 16 bytes or NCCL's sums
    of half a megabyte are faster."""

    def open_rows(rank: int, size: int, like: Tensor, **limits: int) -> tuple[int, int, int]:
        return (size, *limits.values())

    monkeypatch.setattr(RowExchange, "open", open_rows)
    exchange = replace(opened(1, [torch.zeros(8), torch.zeros(8)]), most_bytes=2**19)
    assert exchange.for_rows(torch.empty(4096, dtype=torch.bfloat16), 8192) == (2, 8192, 65)
    assert exchange.for_rows(torch.empty(4096), 10**6) == (2, MOST_TOKENS, 33)
    assert exchange.for_rows(torch.empty(4095, dtype=torch.bfloat16), 8192) is None
    slower = replace(exchange, most_bytes=2**16)
    assert slower.for_rows(torch.empty(4096, dtype=torch.bfloat16), 8192) is None
