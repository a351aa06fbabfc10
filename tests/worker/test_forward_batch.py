"""From a plan's integers to flat tokens."""

import random

import numpy as np
import pytest
import torch

from nanovllm.protocol.plan import StepPlan
from nanovllm.worker.attention.shared_prefix import SharingRows
from nanovllm.worker.forward_batch import ROOMS, ForwardBatch, PlanStaging, build_batch
from nanovllm.worker.request_rows import RequestRows
from tests.worker.planning import BLOCK_SIZE, blocks_of, make_plan, make_rows, new_row


def make_staging(rows: RequestRows) -> PlanStaging:
    return PlanStaging(max_num_rows=rows.num_rows, num_buffers=2, device=torch.device("cpu"))


def run(rows: RequestRows, staging: PlanStaging, plan: StepPlan) -> ForwardBatch:
    staged = staging.stage(plan, rows.record(plan))
    rows.write(staged.writes)
    return build_batch(staged, rows)


def slots_of(row: int, positions: range) -> list[int]:
    return [blocks_of(row)[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


def test_mixed_step() -> None:
    rows = make_rows()
    staging = make_staging(rows)
    first, second = list(range(10, 21)), list(range(30, 33))
    run(rows, staging, make_plan(0, [(6, 0, 4)], new_rows=[new_row(6, first)], sampling=[]))
    batch = run(rows, staging, make_plan(1, [(6, 4, 7), (1, 0, 3)], new_rows=[new_row(1, second)]))
    assert batch.input_ids.tolist() == first[4:] + second
    assert batch.positions.tolist() == [*range(4, 11), *range(3)]
    assert batch.slot_mapping.tolist() == slots_of(6, range(4, 11)) + slots_of(1, range(3))
    assert batch.query_start_loc.tolist() == [0, 7, 10]
    assert batch.seq_lens.tolist() == [11, 3]
    assert batch.block_tables.shape == (2, 3)
    assert batch.block_tables[0].tolist() == blocks_of(6)[:3]
    assert (batch.num_tokens, batch.num_rows) == (10, 2)
    assert (batch.max_query_len, batch.max_seq_len) == (7, 11)
    assert batch.input_ids.dtype == batch.positions.dtype == batch.slot_mapping.dtype == torch.int64
    assert batch.query_start_loc.dtype == batch.seq_lens.dtype == torch.int32


def test_decode_step_reads_tokens_from_the_device() -> None:
    rows = make_rows()
    staging = make_staging(rows)
    new_rows = [new_row(2, [3, 4, 5, 6]), new_row(0, [7])]
    run(rows, staging, make_plan(0, [(2, 0, 4), (0, 0, 1)], new_rows=new_rows))
    rows.token_ids[2, 4], rows.token_ids[0, 1] = 50, 51  # as the sampler would
    batch = run(rows, staging, make_plan(1, [(2, 4, 1), (0, 1, 1)]))
    assert batch.max_query_len == 1
    assert batch.input_ids.tolist() == [50, 51]
    assert batch.slot_mapping.tolist() == slots_of(2, range(4, 5)) + slots_of(0, range(1, 2))
    assert batch.seq_lens.tolist() == [5, 2]


def test_padding_entries_point_at_block_zero() -> None:
    rows = make_rows()
    plan = StepPlan(
        0, [], [], rows=[rows.num_rows], num_computed=[0], num_scheduled=[1], sampling=[]
    )
    batch = run(rows, make_staging(rows), plan)
    assert batch.input_ids.tolist() == [0] and batch.slot_mapping.tolist() == [0]
    assert batch.seq_lens.tolist() == [1] and batch.block_tables.tolist() == [[0]]


def test_nothing_is_left_of_a_larger_step_behind_the_entries_of_a_smaller_one() -> None:
    rows = make_rows()
    staging = PlanStaging(max_num_rows=rows.num_rows, num_buffers=1, device=torch.device("cpu"))
    empty = np.empty((2, 0), np.int32)
    every = SharingRows(num_keys=8, leader=0, members=np.ones(6, np.bool_))
    many = make_plan(0, [(row, 5 + row, 1 + row) for row in range(6)])
    staging.stage(many, empty, sharing=every)
    some = SharingRows(num_keys=8, leader=1, members=np.array([False, True]))
    staging.stage(make_plan(1, [(6, 9, 3), (7, 2, 1)], sampling=[1]), empty, sharing=some)
    view = staging.view(8, 5, max_seq_len=16, shares_prefix=True)
    assert view.rows.tolist() == [6, 7] + [rows.num_rows] * 4
    assert view.num_computed.tolist() == [9, 2, 0, 0, 0, 0]
    assert view.query_start_loc.tolist() == [0, 3, 4, 4, 4, 4, 4]
    assert view.sampling.tolist() == [1, 2, 2, 2, 2], "2 is the first entry of padding"
    assert view.prefix is not None
    assert view.prefix.num_keys.tolist() == [0, 8, 0, 0, 0], "one shares, the rest do not"
    assert view.prefix.leader.tolist() == [1]


@pytest.mark.parametrize("most", [ROOMS[-1] + 1, *ROOMS, ROOMS[1] + 1, 1])
def test_writes_come_in_few_sizes_and_what_is_too_much_apart(most: int) -> None:
    staging = make_staging(make_rows())
    writes = np.stack((np.arange(most) + 1, np.arange(most) + 100)).astype(np.int32)
    staging.stage(make_plan(0, [(0, 0, 1)]), np.full((2, ROOMS[-1]), 9, np.int32))  # left behind
    staging.stage(make_plan(1, [(0, 0, 1)]), np.full((2, ROOMS[-1]), 9, np.int32))
    found = staging.stage(make_plan(2, [(0, 0, 1)]), writes).writes
    assert np.array_equal(found.numpy(), writes)
    if 0 < most <= ROOMS[-1]:
        room = next(room for room in ROOMS if room >= most)
        words = staging._words[staging._turn][staging._num_head :][: 2 * room].reshape(2, room)
        assert np.array_equal(words[:, :most], writes), "as a GPU is sent them"
        assert (words[:, most:] == writes[:, :1]).all(), "the first one again changes nothing"


def test_a_plan_is_staged_alike_whatever_was_staged_before_it() -> None:
    """Sections are made from those of the plan before."""
    rows = make_rows()
    empty, rng = np.empty((2, 0), np.int32), random.Random(0)
    staging = make_staging(rows)
    share = [SharingRows(8, 0, np.ones(3, np.bool_)), SharingRows(16, 2, np.array([0, 1, 1]) > 0)]
    plans = [
        make_plan(0, [(0, 5, 1), (1, 6, 1), (2, 7, 1)]),
        make_plan(0, [(0, 6, 1), (1, 7, 1), (2, 8, 1)]),
        make_plan(0, [(0, 6, 1), (1, 7, 1), (2, 8, 1)], sampling=[0, 2]),
        make_plan(0, [(0, 6, 2), (1, 7, 1), (2, 8, 1)]),
        make_plan(0, [(2, 6, 1), (1, 7, 1), (0, 8, 1)]),
        make_plan(0, [(4, 9, 3)]),
        make_plan(0, [(row, row, 1) for row in range(rows.num_rows)]),
    ]
    for _ in range(200):
        plan = rng.choice(plans)
        sharing = rng.choice([None, *share]) if len(plan.rows) == 3 else None
        staged = staging.stage(plan, empty, sharing=sharing)
        alone = make_staging(rows).stage(plan, empty, sharing=sharing)
        assert torch.equal(staged.sections[:4], alone.sections[:4])
        assert np.array_equal(staged.host_seq_lens, alone.host_seq_lens)
        assert np.array_equal(staged.sampled_positions, alone.sampled_positions)
        assert staged.entries.sampled_rows.tolist() == [plan.rows[i] for i in plan.sampling]
        if sharing is not None:
            assert torch.equal(staged.sections[4], alone.sections[4])


def test_host_arrays_survive_later_plans() -> None:
    rows = make_rows()
    staging = make_staging(rows)
    empty = np.empty((2, 0), np.int32)
    staged = staging.stage(make_plan(0, [(4, 2, 3), (5, 0, 1)], sampling=[1]), empty)
    for step in range(1, 4):
        staging.stage(make_plan(step, [(0, 0, 1)]), empty)
    assert staged.entries.rows.tolist() == [4, 5] and staged.entries.counts.tolist() == [3, 1]
    assert staged.host_seq_lens.tolist() == [5, 1]
    assert staged.entries.query_start_loc.tolist() == [0, 3, 4]
    assert staged.entries.sampling.tolist() == [1]
    assert staged.entries.sampled_rows.tolist() == [5]
    assert staged.sampled_positions.tolist() == [1]
