"""Sums by rows over ranks that write into each other's memory; in the interpreter, processes share
it."""

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.kernels.triton import products
from nanovllm.worker.kernels.triton.layer_kernels import TritonKernels
from nanovllm.worker.kernels.triton.row_exchange import RowExchange, bytes_of
from nanovllm.worker.layers.linear import Linear
from nanovllm.worker.layers.norm import RMSNorm
from nanovllm.worker.parallel import Cut, TensorParallel
from tests.worker.kernels.rank_processes import found_by_ranks

MAX_TOKENS, SPLIT_FROM, HIDDEN = 20, 4, 24
# Some whose products lie at the rank that made them, and some where they are added up; in turns,
# and so that the last rank has fewer rows than others, or none.
TURNS = (3, 20, 7, 9, 4, 13, 8, 2)
CENTERED = 5  # the turn of a layer norm


def step(turn: int, size: int) -> tuple[Tensor, Tensor, Tensor, RMSNorm]:
    """Inputs of a layer on all ranks, its weight, a residual, and a norm."""
    random = torch.Generator().manual_seed(turn)
    inputs = torch.randn(size, TURNS[turn], 16, generator=random)
    weight = torch.randn(HIDDEN, 16 * size, generator=random)
    residual = torch.randn(TURNS[turn], HIDDEN, generator=random)
    norm = RMSNorm(torch.randn(HIDDEN, generator=random), 1e-5, centers=turn == CENTERED)
    return inputs, weight, residual, norm


def run_rank(rank: int, memories: list[Tensor], epoch: int, answer: Any) -> None:
    """The program of one rank: a layer, then the same as if somebody else had multiplied;
    by our own products, then by torch's."""
    import tests.worker.kernels.triton_device  # noqa: F401  # mends the interpreter

    size = len(memories)
    rows = RowExchange.over(rank, memories, torch.empty(HIDDEN), max_tokens=MAX_TOKENS, fewest=size)
    rows.epochs.fill_(epoch)
    parallel = TensorParallel(rank, size, rows=replace(rows, split_from=SPLIT_FROM))
    kernels, found = TritonKernels(), []
    for turn in range(len(TURNS)):
        inputs, weight, residual, norm = step(turn, size)
        taken = parallel.share(weight.shape[1])
        linear = Linear(
            weight[:, taken.slice].contiguous(), None, {"o": Cut.all_of(HIDDEN)}, 1, taken=taken,
            parallel=parallel,
        )  # fmt: skip
        own = rows.share(rank, TURNS[turn])
        mine = residual[own].clone()
        for is_skinny in (True, False):
            products.beats_cublas = lambda *_, is_skinny=is_skinny, **__: is_skinny
            added = kernels.linear_add(inputs[rank], linear, mine, next_norm=norm)
            assert added.normed is not None and added.hidden is mine
            found += [mine.clone(), added.normed.clone()]
            partial = linear.partial(inputs[rank])
            added = kernels.reduce_add(partial, mine, parallel, next_norm=norm)
            assert added.normed is not None
            found += [mine.clone(), added.normed.clone()]
    answer.send([tensor.numpy() for tensor in found])
    answer.close()


def expected(rank: int, size: int) -> list[Tensor]:
    found = []
    for turn, num_tokens in enumerate(TURNS):
        inputs, weight, residual, norm = step(turn, size)
        each = -(-num_tokens // size)
        total = torch.cat(list(inputs), dim=1) @ weight.T
        for _ in range(4):
            residual = residual + total
            normed = TorchKernels().rms_norm(residual, norm)
            found += [residual[rank * each : (rank + 1) * each], normed]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes share memory by its descriptors")
@pytest.mark.parametrize(("size", "epoch"), [(2, 0), (3, 2**31 - 8)])
def test_ranks_add_up_rows_for_each_other(
    size: int, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs run over, too."""
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    memory = bytes_of(size, torch.empty(HIDDEN), MAX_TOKENS)
    answers = found_by_ranks(run_rank, size, num_bytes=memory, epoch=epoch)
    for number, found in enumerate(answers):
        for mine, first, right in zip(found, answers[0], expected(number, size), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
            if len(mine) == len(first) and len(mine) != len(right):
                assert torch.equal(mine, first)


def test_how_many_tokens_go_this_way() -> None:
    like, memories = torch.empty(HIDDEN), [torch.zeros(8), torch.zeros(8)]
    rows = RowExchange.over(0, memories, like, max_tokens=MAX_TOKENS, fewest=3)
    assert [rows.takes(count) for count in (2, 3, MAX_TOKENS, MAX_TOKENS + 1)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert rows.share(0, 7) == slice(0, 4) and rows.share(1, 7) == slice(4, 7)
