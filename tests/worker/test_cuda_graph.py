"""Which shapes steps are padded to."""

from itertools import pairwise

import pytest
import torch

from nanovllm.worker.cuda_graph import (
    StepGraphs,
    StepOutput,
    StepShape,
    Variant,
    token_buckets,
)


@pytest.fixture
def graphs() -> StepGraphs:
    nothing = StepOutput(torch.empty(0), torch.empty(0), None)
    return StepGraphs(lambda *_: nothing, max_num_rows=100, max_num_tokens=3000)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_a_graph_leaves_stays_until_the_next_one_runs() -> None:
    """Logits and hidden states are in no tensor's memory, yet nobody else's."""
    source = torch.arange(8, dtype=torch.float32, device="cuda")

    def step(shape: StepShape, variant: Variant) -> StepOutput:
        values = source[: shape.num_rows, None] * torch.ones(1, 1000, device="cuda")
        return StepOutput(values.argmax(1), values.bfloat16(), values * 2)

    graphs = StepGraphs(step, max_num_rows=8, max_num_tokens=64)
    shape, variant = StepShape(8, 8), Variant(shares_prefix=False, keeps_hidden=True)
    for turn in range(4):  # eagerly, captured, and twice more
        source.fill_(turn + 1)
        output = graphs.run(shape, variant)
        noise = [torch.full((8, 1000), -1.0, device="cuda") for _ in range(50)]
        assert output.hidden is not None and output.logits.dtype == torch.bfloat16
        assert (output.logits == turn + 1).all() and (output.hidden == 2 * (turn + 1)).all()
        del noise
