"""Which shapes steps are padded to."""

from itertools import pairwise

import pytest
import torch

from nanovllm.worker.cuda_graph import StepGraphs, StepShape, token_buckets


@pytest.fixture
def graphs() -> StepGraphs:
    return StepGraphs(lambda *_: torch.empty(0), max_num_rows=100, max_num_tokens=3000)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "shape"),
    [
        (1, 1, (1, 1)),
        (9, 9, (16, 16)),
        (100, 100, (100, 100)),
        (2, 1, (32, 16)),
        (600, 20, (640, 64)),
        (3000, 100, (3000, 100)),
        (101, 100, (128, 100)),
    ],
)
def test_least_shape_that_holds_a_step(
    graphs: StepGraphs, num_tokens: int, num_rows: int, shape: tuple[int, int]
) -> None:
    assert graphs.shape_for(num_tokens, num_rows) == StepShape(*shape)


def test_a_large_step_has_no_shape(graphs: StepGraphs) -> None:
    assert graphs.shape_for(3001, 5) is None


def test_little_is_computed_in_vain() -> None:
    buckets = token_buckets(4096)
    assert buckets[-1] == 4096
    for smaller, larger in pairwise(buckets):
        assert larger - smaller <= max(32, smaller / 4)


def test_every_shape_is_the_least_for_itself(graphs: StepGraphs) -> None:
    assert len(graphs.shapes) == len(set(graphs.shapes))
    for shape in graphs.shapes:
        assert graphs.shape_for(*shape) == shape
