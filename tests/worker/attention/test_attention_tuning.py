"""How attention's kernels are cut, which needs no kernel to be known."""

from dataclasses import replace

from nanovllm.worker.attention.triton.attention_tuning import Fitting, Tiling

TILING = Tiling(keys=32, stages=2, warps=2, tma=False)


def test_few_rows_are_cut_to_fill_the_device() -> None:
    """Of 132 multiprocessors, by four programs each, or by as many as six where four are out of
    reach: 24 rows in 2 pieces each would make 48."""
    fitting = Fitting(TILING, programs_per_sm=6, cut_per_sm=4)
    cuts = {rows: fitting.most_splits(rows, 132 / 8) for rows in (1, 8, 16, 24, 32, 40, 64, 80)}
    assert cuts == {1: 66, 8: 66, 16: 66, 24: 99, 32: 66, 40: 99, 64: 66, 80: 99}


def test_rows_fit_as_far_as_programs_and_their_limit_go() -> None:
    fitting = Fitting(TILING, programs_per_sm=2)
    assert [fitting.fits(rows, 132 / 8) for rows in (1, 33, 34)] == [True, True, False]
    fitting = replace(fitting, max_rows=4)
    assert [fitting.fits(rows, 132 / 8) for rows in (1, 4, 5)] == [True, True, False]
    assert [fitting.fits(rows, 1.5) for rows in (3, 4)] == [True, False]


def test_rows_are_never_fewer_than_their_pieces() -> None:
    fitting = Fitting(TILING, programs_per_sm=2, cut_per_sm=2)
    assert [fitting.most_splits(rows, 2.5) for rows in (1, 5, 9)] == [5, 5, 9]
