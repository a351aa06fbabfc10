"""Rows: what a plan writes is where the device reads it, and nowhere else."""

import numpy as np
import pytest
import torch

from nanovllm.protocol.plan import BlockAppend, KnownTokens
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import COLUMNS, NO_LOGPROBS
from tests.worker.planning import BLOCK_SIZE, GREEDY, make_plan, make_rows, new_row

EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=11,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.3,
    presence_penalty=0.25,
    frequency_penalty=-0.5,
    logprobs=2,
    prompt_logprobs=-1,
)


def test_admission_writes_tokens_blocks_and_columns() -> None:
    rows = make_rows()
    seed = 2**62 + 12345
    new_rows = [
        new_row(3, [5, 6, 7, 8, 9], EVERYTHING, num_prompt_tokens=4, block_ids=[9, 4], seed=seed),
        new_row(0, [1], block_ids=[2]),
    ]
    rows.write(torch.from_numpy(rows.record(make_plan(0, [], new_rows=new_rows))))
    assert rows.token_ids[3, :6].tolist() == [5, 6, 7, 8, 9, 0]
    assert rows.block_tables[0][3, :3].tolist() == [9, 4, 0]
    assert rows.token_ids[0, :2].tolist() == [1, 0] and rows.block_tables[0][0, 0] == 2
    assert rows.seeds[3] == seed
    assert rows.columns["num_prompt_tokens"][[3, 0]].tolist() == [4, 1]
    for column in COLUMNS:
        value = getattr(EVERYTHING, column.name)
        assert rows.columns[column.name][3].item() == pytest.approx(value), column.name
        assert rows.columns[column.name][0].item() == column.neutral, column.name
        assert rows.host[column.name][3] == pytest.approx(value), column.name
    untouched = [row for row in range(rows.num_rows + 1) if row not in (0, 3)]
    assert not rows.token_ids[untouched].any() and not rows.block_tables[0][untouched].any()


def test_groups_of_layers_have_tables_of_their_own() -> None:
    rows = make_rows(blocks=(1, 1, 1))
    plan = make_plan(0, [], new_rows=[new_row(2, [5] * 7, block_ids=[9, 4, 6, 8, 0, 7])])
    plan.block_appends.extend([BlockAppend(2, 4, 11), BlockAppend(2, 8, 12)])
    rows.write(torch.from_numpy(rows.record(plan)))
    tables = [table[2, :3].tolist() for table in rows.block_tables]
    assert tables == [[9, 8, 0], [4, 11, 0], [6, 7, 12]]
    assert rows.host_block_tables[2].reshape(3, -1)[:, :3].tolist() == tables
    assert rows.token_ids[2, :8].tolist() == [5] * 7 + [0]


@pytest.mark.parametrize("max_model_len", [63, 64])
def test_seeds_are_whole_whatever_the_width_of_a_row(max_model_len: int) -> None:
    rows = RequestRows(
        num_rows=4,
        max_model_len=max_model_len,
        block_size=8,
        vocab_size=50,
        eos_token_ids=[0],
        device=torch.device("cpu"),
    )
    seeds = [2**62 + 1, 3, 2**63 - 1, 2**32]
    last = [[7] * (max_model_len - 1) + [row] for row in range(4)]
    new_rows = [new_row(row, last[row], block_ids=[1], seed=seeds[row]) for row in range(4)]
    rows.write(torch.from_numpy(rows.record(make_plan(0, [], new_rows=new_rows))))
    assert rows.seeds.tolist() == [*seeds, 0]
    assert rows.token_ids[:4].tolist() == last


def test_groups_with_larger_keys_have_more_blocks_of_the_same_tokens() -> None:
    rows = make_rows(blocks=(1, 2))
    plan = make_plan(0, [], new_rows=[new_row(2, [5] * 7, block_ids=[9, 4, 6, 8, 0, 7])])
    plan.block_appends.append(BlockAppend(2, 7, 11))
    rows.write(torch.from_numpy(rows.record(plan)))
    tables = [table[2, :5].tolist() for table in rows.block_tables]
    assert tables == [[9, 8, 0, 0, 0], [4, 6, 0, 7, 11]]
    assert rows.block_sizes == [BLOCK_SIZE, BLOCK_SIZE // 2]


def test_known_tokens_are_written_where_they_belong() -> None:
    rows = make_rows()
    rows.write(torch.from_numpy(rows.record(make_plan(0, [], new_rows=[new_row(2, [5, 6, 7])]))))
    plan = make_plan(1, [])
    plan.known_tokens.extend((KnownTokens(2, 3, [8, 9]), KnownTokens(0, 0, [4])))
    rows.write(torch.from_numpy(rows.record(plan)))
    assert rows.token_ids[2, :6].tolist() == [5, 6, 7, 8, 9, 0]
    assert rows.token_ids[0, :2].tolist() == [4, 0] and not rows.token_ids[[1, 3]].any()


def test_block_appends_and_readmission() -> None:
    rows = make_rows()
    plan = make_plan(0, [], new_rows=[new_row(1, [5] * 9, block_ids=[3, 4, 5])])
    rows.write(torch.from_numpy(rows.record(plan)))
    plan = make_plan(1, [], new_rows=[new_row(1, [6, 7], EVERYTHING, block_ids=[8])])
    plan.block_appends.extend([BlockAppend(1, 1, 12), BlockAppend(2, 0, 13)])
    rows.write(torch.from_numpy(rows.record(plan)))
    assert rows.token_ids[1, :2].tolist() == [6, 7]
    assert rows.block_tables[0][1, :2].tolist() == [8, 12]
    assert rows.block_tables[0][2, 0] == 13
    assert rows.host["top_k"][1] == EVERYTHING.top_k


def test_active_columns_are_those_some_row_of_the_batch_uses() -> None:
    rows = make_rows()
    params = [GREEDY, SamplingParams(temperature=1.0), EVERYTHING, SamplingParams(top_p=0.5)]
    rows.record(make_plan(0, [], new_rows=[new_row(row, [1], p) for row, p in enumerate(params)]))

    def active(*chosen: int) -> set[str]:
        return rows.active_columns(np.array(chosen, np.int32))

    assert active(0) == set()
    assert active(0, 1) == {"temperature"}
    assert active(3, 0) == {"temperature", "top_p"}
    assert active(0, 2) == {column.name for column in COLUMNS}


def test_greedy_rows_hold_what_shapes_a_draw_neutral() -> None:
    rows = make_rows()
    params = SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1, presence_penalty=1.0)
    rows.record(make_plan(0, [], new_rows=[new_row(0, [1], params)]))
    assert rows.active_columns(np.array([0], np.int32)) == {"presence_penalty"}
    assert rows.host["logprobs"][0] == NO_LOGPROBS


def test_too_much_to_remember_is_the_users_to_mend() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        RequestRows(
            num_rows=2**16,
            max_model_len=2**16,
            block_size=16,
            vocab_size=10,
            eos_token_ids=[],
            device=torch.device("meta"),
        )
