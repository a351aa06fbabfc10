"""Which rows of a step are found to share leading blocks."""

import numpy as np
import pytest

from nanovllm.protocol.plan import NewRow, StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.attention.shared_prefix import (
    MIN_KEYS_SAVED,
    PrefixFinder,
    SharingRows,
    reads_new_blocks,
)

BLOCK_SIZE = 16
NEW = NewRow(0, [1], 1, [1], SamplingParams(), 0, [])


def tables_of(prefixes: list[list[int]], *, width: int = 256) -> np.ndarray:
    """Each row's table: its prefix, then blocks of its own."""
    tables = np.arange(len(prefixes) * width, dtype=np.int32).reshape(-1, width) + 100_000
    for row, prefix in enumerate(prefixes):
        tables[row, : len(prefix)] = prefix
    return tables


def plan_of(lens: list[int], *, scheduled: list[int] | None = None, new: int = 0) -> StepPlan:
    rows = list(range(len(lens)))
    return StepPlan(0, [NEW] * new, [], rows, lens, scheduled or [1] * len(lens), rows)


def find(prefixes: list[list[int]], plan: StepPlan) -> SharingRows | None:
    return PrefixFinder(tables_of(prefixes), block_size=BLOCK_SIZE).find(plan)


SYSTEM_PROMPT = list(range(7, 7 + 128))  # 2048 keys


def test_rows_that_begin_alike_share_what_they_all_have() -> None:
    longer = [*SYSTEM_PROMPT, 5000, 5001]
    found = find([longer, SYSTEM_PROMPT, longer, longer, [9, 9], longer], plan_of([3000] * 6))
    assert found is not None and found.num_keys == 2048
    assert found.members.tolist() == [True, True, True, True, False, True]
    assert found.leader == 0


def test_a_row_never_shares_the_block_it_is_filling() -> None:
    prefixes = [SYSTEM_PROMPT] * 8
    found = find(prefixes, plan_of([2047, *[3000] * 7]))
    assert found is not None and found.num_keys == 2048 - 64  # in whole tiles


def test_the_largest_group_wins() -> None:
    other = [block + 1000 for block in SYSTEM_PROMPT]
    found = find([other] * 4 + [SYSTEM_PROMPT] * 6, plan_of([2100] * 10))
    assert found is not None and found.leader == 4 and found.members.sum() == 6


def test_chunks_and_short_rows_keep_to_themselves() -> None:
    lens = [2100] * 6 + [100, 2100]
    found = find([SYSTEM_PROMPT] * 8, plan_of(lens, scheduled=[1] * 7 + [50]))
    assert found is not None and found.members.tolist() == [True] * 6 + [False] * 2


def test_not_worth_it() -> None:
    assert find([SYSTEM_PROMPT] * 3, plan_of([2100] * 3)) is None
    assert find([SYSTEM_PROMPT[:15]] * 99, plan_of([2100] * 99)) is None
    assert find([[n] for n in range(64)], plan_of([2100] * 64)) is None
    num_blocks = 16
    enough = MIN_KEYS_SAVED // (num_blocks * BLOCK_SIZE) + 1
    for num_rows, pays in ((enough - 1, False), (enough, True)):
        found = find([SYSTEM_PROMPT[:num_blocks]] * num_rows, plan_of([2100] * num_rows))
        assert (found is not None) == pays


def test_searched_again_only_when_rows_change() -> None:
    tables = tables_of([SYSTEM_PROMPT] * 8)
    finder = PrefixFinder(tables, block_size=BLOCK_SIZE)
    first = finder.find(plan_of([2100] * 8))
    assert first is not None and finder.find(plan_of([2101] * 8)) is first
    tables[3] = 0  # row 3 now belongs to another sequence
    found = finder.find(plan_of([2102] * 8, new=1))
    assert found is not None and not found.members[3]
    fewer = finder.find(plan_of([2103] * 7))
    assert fewer is not None and len(fewer.members) == 7


def entries(*spans: tuple[int, int], new: tuple[int, ...]) -> StepPlan:
    """Rows 0 … with so many tokens from a position on, of which some are new."""
    starts, counts = zip(*spans, strict=True)
    rows = list(range(len(spans)))
    new_rows = [NewRow(row, [1], 1, [1], SamplingParams(), 0, []) for row in new]
    return StepPlan(0, new_rows, [], rows, list(starts), list(counts), rows)


@pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE // 2])
@pytest.mark.parametrize(
    ("spans", "new", "shared", "expected"),
    [
        pytest.param([(0, 40), (32, 9)], (0, 1), [7, 8], True, id="both new"),
        pytest.param([(16, 20), (32, 9)], (1,), [7, 8], True, id="a chunk goes on"),
        pytest.param([(15, 1), (16, 1)], (1,), [7], True, id="a token fills a block"),
        pytest.param([(32, 20), (32, 9)], (1,), [7, 8], False, id="written before"),
        pytest.param([(0, 40), (0, 40)], (0, 1), [], False, id="nothing shared"),
        pytest.param([(0, 40), (32, 9)], (0,), [7, 8], False, id="long begun"),
        pytest.param([(32, 9)], (0,), [7, 8], False, id="alone"),
    ],
)
def test_rows_that_read_what_the_step_writes(
    spans: list[tuple[int, int]], new: tuple[int, ...], shared: list[int], expected: bool, size: int
) -> None:
    """Blocks of half the size: twice as many."""
    times = BLOCK_SIZE // size
    prefix = [block * times + part for block in shared for part in range(times)]
    other = np.zeros((len(spans), 4), np.int32)  # of a group that has let go of all
    tables = [(other, BLOCK_SIZE), (tables_of([prefix] * len(spans)), size)]
    assert reads_new_blocks(entries(*spans, new=new), tables) is expected
