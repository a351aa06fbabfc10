"""The kernel that expands rows to tokens, against the torch operations that say what it means."""

import pytest
import torch

from nanovllm.protocol.plan import StepPlan
from nanovllm.worker import forward_batch
from nanovllm.worker.forward_batch import ForwardBatch, PlanStaging, StagedPlan
from nanovllm.worker.kernels.triton import expand_batch
from nanovllm.worker.request_rows import RequestRows
from tests.worker.kernels.triton_device import DEVICE
from tests.worker.planning import BLOCK_SIZE, make_plan, make_rows, new_row

TENSORS = ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens")


def staging_of(rows: RequestRows, *plans: StepPlan) -> PlanStaging:
    staging = PlanStaging(max_num_rows=rows.num_rows, num_buffers=2, device=DEVICE)
    for plan in plans:
        rows.write(staging.stage(plan, rows.record(plan)).writes)
    return staging


def both(staged: StagedPlan, rows: RequestRows) -> tuple[ForwardBatch, ForwardBatch]:
    return (
        expand_batch.expand_view(staged, rows),
        forward_batch.expand_view(staged, rows),
    )


def check(got: ForwardBatch, expected: ForwardBatch) -> None:
    for name in TENSORS:
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(got, name).dtype == getattr(expected, name).dtype
    for row, seq_len in enumerate(expected.seq_lens.tolist()):
        reached = -(-seq_len // BLOCK_SIZE)
        assert torch.equal(got.block_tables[row, :reached], expected.block_tables[row, :reached])
    assert got.max_query_len == expected.max_query_len
    assert (got.ends is None) == (expected.ends is None)
    for mine, meant in zip(got.ends or (), expected.ends or (), strict=True):
        assert mine.tolist() == meant.tolist()
        assert mine.dtype == meant.dtype


@pytest.mark.parametrize("num_rows", [2, 3, 8])
def test_decode_step(num_rows: int) -> None:
    rows = make_rows(device=str(DEVICE))
    new_rows = [new_row(6, list(range(10, 21))), new_row(1, [7, 8, 9])]
    staging = staging_of(
        rows,
        make_plan(0, [(6, 0, 11), (1, 0, 3)], new_rows=new_rows),
        make_plan(1, [(6, 11, 1), (1, 3, 1)]),
    )
    rows.token_ids[6, 11], rows.token_ids[1, 3] = 50, 51  # as the sampler would
    view = staging.view(num_rows, num_rows, max_seq_len=24, shares_prefix=False)
    check(*both(view, rows))


def test_groups_of_layers_have_tables_of_their_own() -> None:
    rows = make_rows(device=str(DEVICE), blocks=(1, 1))
    new_rows = [new_row(6, [3] * 11, block_ids=[9, 4, 8, 0, 7, 5]), new_row(1, [7], block_ids=[2])]
    staging = staging_of(rows, make_plan(0, [(6, 3, 8), (1, 0, 1)], new_rows=new_rows))
    got, expected = both(staging.view(16, 3, max_seq_len=24, shares_prefix=False), rows)
    assert got.of_group(0) is got and got.of_group(1).group == 1
    for group in range(2):
        check(got.of_group(group), expected.of_group(group))
    assert expected.of_group(1).slot_mapping[:6].tolist() == [19, 0, 1, 2, 3, 20]


@pytest.mark.parametrize("num_tokens", [4, 7])
def test_groups_may_have_blocks_of_several_sizes(num_tokens: int) -> None:
    """Each looks up its own table, of its own width, in one launch; padding behind a step."""
    rows = make_rows(device=str(DEVICE), blocks=(1, 2, 1))
    block_ids = [9, 4, 8, 7, 5, 3, 1, 2, 6, 10, 11, 12]
    new_rows = [new_row(6, [3] * 11, block_ids=block_ids), new_row(1, [7], block_ids=[13] * 4)]
    staging = staging_of(rows, make_plan(0, [(6, 10, 1), (1, 0, 1)], new_rows=new_rows))
    got, expected = both(staging.view(num_tokens, 4, max_seq_len=24, shares_prefix=False), rows)
    assert len(got.others) == 2
    for group, size in enumerate(rows.block_sizes):
        mine, meant = got.of_group(group), expected.of_group(group)
        for name in TENSORS:
            assert getattr(mine, name).tolist() == getattr(meant, name).tolist(), name
        assert mine.block_tables.shape == meant.block_tables.shape
        for row, seq_len in enumerate(meant.seq_lens.tolist()):
            reached = -(-seq_len // size)
            assert torch.equal(mine.block_tables[row, :reached], meant.block_tables[row, :reached])


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(14, 3), (16, 4), (300, 8), (18, 3)])
def test_step_with_prompts(num_tokens: int, num_rows: int) -> None:
    rows = make_rows(device=str(DEVICE))
    prompts = {6: list(range(10, 21)), 1: [7, 8, 9], 3: list(range(30, 41))}
    new_rows = [new_row(row, prompt) for row, prompt in prompts.items()]
    staging = staging_of(
        rows,
        make_plan(0, [(6, 0, 4)], new_rows=new_rows),
        make_plan(1, [(6, 4, 7), (1, 0, 3), (3, 0, 4)], sampling=[1, 2]),
    )
    view = staging.view(num_tokens, num_rows, max_seq_len=24, shares_prefix=False)
    got, expected = both(view, rows)
    check(got, expected)
    # Rows 1 and 3 are sampled from; behind them comes padding.
    assert expected.ends is not None
    assert expected.ends.rows.tolist() == [1, 3] + [rows.num_rows] * (num_rows - 2)
    assert expected.ends.positions[:2].tolist() == [3, 4]
    assert expected.ends.tokens[:2].tolist() == [9, 13]
