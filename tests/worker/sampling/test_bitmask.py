"""What a grammar allows: bits to logits, and who wins where edits leave nothing."""

import numpy as np
import pytest
import torch

from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.sampling.bitmask import MaskTable, apply_masks
from nanovllm.worker.sampling.sampler import Sampled, Sampler, SamplingTargets
from tests.worker.planning import CUDA, EOS, VOCAB_SIZE, make_masks, make_plan, make_rows, new_row

TOP = VOCAB_SIZE - 1


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(str(request.param))


def sample(allowed: dict[int, list[int]], *params: SamplingParams, device: str = "cpu") -> Sampled:
    """One target per params, whose likeliest tokens are those with the largest ids."""
    rows = make_rows(device=device)
    new_rows = [new_row(row, [1, 2], one) for row, one in enumerate(params)]
    rows.write(torch.from_numpy(rows.record(make_plan(0, [], new_rows=new_rows))).to(device))
    host_rows = np.arange(len(params), dtype=np.int32)
    positions = np.full(len(params), 2, np.int32)
    targets = SamplingTargets.of(host_rows, positions, torch.device(device))
    masks = make_masks(allowed)
    if masks is not None:
        rows.masks.take(masks)
    logits = torch.linspace(-4, 4, VOCAB_SIZE, device=device).repeat(len(params), 1)
    return Sampler(rows).sample(logits, targets, masks)


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=50, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [[0, 1, 2], [1], [0, 2]])
def test_only_masked_rows_change(device: torch.device, targets: list[int]) -> None:
    rng = np.random.default_rng(len(targets))
    allowed = {i: sorted(rng.choice(VOCAB_SIZE, 30, replace=False).tolist()) for i in targets}
    masks = make_masks(allowed, first_line=5)
    assert masks is not None
    table = MaskTable(vocab_size=VOCAB_SIZE, max_num_seqs=8, device=device)
    table.take(masks)
    logits = torch.randn(3, VOCAB_SIZE, device=device)
    before = logits.clone()
    apply_masks(logits, masks, table, {})
    for target in range(3):
        expected = before[target]
        if target in targets:
            expected = torch.full_like(expected, -torch.inf)
            expected[allowed[target]] = before[target][allowed[target]]
        assert torch.equal(logits[target], expected)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_masked_row_beside_free_ones(device: str) -> None:
    sampled = sample({1: [3, 9, 4]}, greedy(), greedy(), greedy(), device=device)
    assert sampled.token_ids.tolist() == [TOP, 9, TOP]


def test_every_draw_is_allowed_whatever_else_shapes_it() -> None:
    shapes = SamplingParams(
        temperature=5.0, top_k=50, top_p=0.99, min_p=0.001, presence_penalty=2.0, logprobs=2
    )
    allowed = {target: [7, 70, 170] for target in range(8)}
    sampled = sample(allowed, *[shapes] * 8)
    assert set(sampled.token_ids.tolist()) <= {7, 70, 170}
    assert sampled.logprobs is not None
    top = sampled.logprobs.unpack(sampled.num_top_logprobs)[0]
    assert top.top_ids == [TOP, TOP - 1], "log-probabilities are the model's own"


def test_edits_choose_among_what_is_allowed() -> None:
    assert sample({0: [5, 9]}, greedy(allowed_token_ids=[5, 8])).token_ids.tolist() == [5]
    assert sample({0: [EOS, 5]}, greedy(min_tokens=4)).token_ids.tolist() == [5]
    assert sample({0: [5, 9]}, greedy(logit_bias={5: 50.0})).token_ids.tolist() == [5]


def test_a_grammar_wins_where_edits_leave_nothing() -> None:
    params = [greedy(allowed_token_ids=[8]), greedy(min_tokens=4), greedy(allowed_token_ids=[8])]
    sampled = sample({0: [5, 9], 1: [EOS]}, *params)
    assert sampled.token_ids.tolist() == [9, EOS, 8]
