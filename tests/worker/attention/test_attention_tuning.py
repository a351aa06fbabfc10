"""How attention's kernels are cut, which needs no kernel to be known."""

from dataclasses import replace

import pytest
import torch

from nanovllm.worker.attention.base import AttentionSpec
from nanovllm.worker.attention.triton.attention_tuning import Fitting, Tiling, tuning_for
from tests.worker.kernels.triton_device import DEVICE

TILING = Tiling(keys=32, stages=2, warps=2, tma=False)
SPEC = AttentionSpec(
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    scale=0.1,
    block_size=16,
    sliding_window=None,
    dtype=torch.bfloat16,
    device=DEVICE,
)


def test_few_rows_are_cut_to_fill_the_device() -> None:
    """Of 132 multiprocessors, by four programs each, or by as many as six where four are out of
    reach: 24 rows in 2 pieces each would make 48."""
    fitting = Fitting(TILING, programs_per_sm=6, cut_per_sm=4)
    cuts = {rows: fitting.most_splits(rows, 132 / 8) for rows in (1, 8, 16, 24, 32, 40, 64, 80)}
    assert cuts == {1: 66, 8: 66, 16: 66, 24: 99, 32: 66, 40: 99, 64: 66, 80: 99}


def test_rows_fit_as_far_as_programs_and_their_limit_go() -> None:
    fitting = Fitting(TILING, programs_per_sm=2)
    assert fitting.most_rows(132 / 8) == 33
    fitting = replace(fitting, max_rows=4)
    assert fitting.most_rows(132 / 8) == 4
    assert fitting.most_rows(1.5) == 3


@pytest.mark.parametrize(("num_heads", "cut"), [(16, 6), (32, 5), (64, 4)])
def test_several_rows_are_cut_into_as_many_as_registers_leave_room_for(
    num_heads: int, cut: int
) -> None:
    """64 rows of unequal lengths, too, where four programs of 132 multiprocessors would make 66."""
    few = tuning_for(replace(SPEC, num_heads=num_heads)).few
    chosen = {
        rows: next(some for some in few if rows <= some.most_rows(132 / 8))
        for rows in (1, 4, 5, 64)
    }
    assert {rows: some.cut_per_sm for rows, some in chosen.items()} == {1: 4, 4: 4, 5: cut, 64: cut}
    assert chosen[64].most_splits(64, 132 / 8) == int(cut * 132 / 8)


def test_rows_are_never_fewer_than_their_pieces() -> None:
    fitting = Fitting(TILING, programs_per_sm=2, cut_per_sm=2)
    assert [fitting.most_splits(rows, 2.5) for rows in (1, 5, 9)] == [5, 5, 9]
