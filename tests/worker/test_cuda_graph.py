"""Which shapes steps are padded to, and what is captured when."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NoReturn

import pytest
import torch

from nanovllm.worker.cuda_graph import (
    MOST_STAND_INS,
    CallGraphs,
    CapturedStep,
    CudaGraphs,
    StepGraphs,
    StepOutput,
    StepShape,
    Variant,
    token_buckets,
)


@pytest.fixture
def graphs() -> StepGraphs:
    nothing = StepOutput(torch.empty(0), None)
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


PLAIN = Variant(shares_prefix=False)


class Replays:
    """A graph without a GPU."""

    def replay(self) -> None: ...


class PretendedGraphs(StepGraphs):
    """Captures without a GPU; of shapes of more rows than there is memory for it does not."""

    most_rows = 64

    def _capture(self, shape: StepShape, variant: Variant) -> CapturedStep:
        if shape.num_rows > self.most_rows:
            raise torch.OutOfMemoryError
        return CapturedStep(Replays(), self._step(shape, variant))  # type: ignore[arg-type]

    def capture(self, *shapes: tuple[int, int], variant: Variant = PLAIN) -> None:
        for shape in shapes:
            for _ in range(2):
                self.run(StepShape(*shape), variant)


@pytest.fixture
def pretended() -> PretendedGraphs:
    nothing = StepOutput(torch.empty(0), None)
    return PretendedGraphs(lambda *_: nothing, max_num_rows=256, max_num_tokens=4096)


@pytest.mark.parametrize(
    ("captured", "shape", "expected"),
    [
        pytest.param([], (4, 4), (4, 4), id="none"),
        pytest.param([(4, 4), (8, 8)], (4, 4), (4, 4), id="itself"),
        pytest.param([(16, 16), (8, 8), (2, 2)], (4, 4), (8, 8), id="the least that holds it"),
        pytest.param([(64, 64)], (1, 1), (64, 64), id="few rows are cheap"),
        pytest.param([(2048, 64)], (1024, 16), (2048, 64), id="double"),
        pytest.param([(2304, 64)], (1024, 16), (1024, 16), id="more than double"),
        pytest.param([(2048, 16)], (1024, 64), (1024, 64), id="too few rows"),
        pytest.param([(256, 16)], (32, 16), (256, 16), id="few tokens are cheap"),
        pytest.param([(320, 16)], (32, 16), (32, 16), id="not so many"),
        pytest.param([(256, 64)], (64, 64), (64, 64), id="prompts for decode"),
        pytest.param([(64, 64)], (48, 16), (48, 16), id="decode for prompts"),
    ],
)
def test_a_captured_shape_stands_in_for_one_that_is_not(
    pretended: PretendedGraphs,
    captured: list[tuple[int, int]],
    shape: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    pretended.capture(*captured)
    assert pretended.captured_shape_for(StepShape(*shape), PLAIN) == expected


def test_what_is_captured_of_another_variant_does_not_stand_in(pretended: PretendedGraphs) -> None:
    pretended.capture((8, 8), variant=Variant(shares_prefix=True))
    assert pretended.captured_shape_for(StepShape(4, 4), PLAIN) == (4, 4)


def test_a_shape_that_keeps_coming_is_captured_itself(pretended: PretendedGraphs) -> None:
    pretended.capture((8, 8))
    shape = StepShape(4, 4)
    stand_ins = [pretended.captured_shape_for(shape, PLAIN) for _ in range(MOST_STAND_INS)]
    assert set(stand_ins) == {(8, 8)}
    for _ in range(3):  # eagerly, captured, replayed
        assert pretended.captured_shape_for(shape, PLAIN) == shape
        pretended.run(shape, PLAIN)
    assert pretended.captured_shape_for(StepShape(2, 2), PLAIN) == shape


def test_one_without_memory_for_a_graph_runs_by_another_for_good(
    pretended: PretendedGraphs,
) -> None:
    pretended.most_rows = 4
    pretended.capture((8, 8))
    pretended.most_rows = 16
    pretended.capture((16, 16))
    shapes = {
        pretended.captured_shape_for(StepShape(8, 8), PLAIN) for _ in range(2 * MOST_STAND_INS)
    }
    assert shapes == {(16, 16)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_a_graph_leaves_stays_until_the_next_one_runs() -> None:
    """Logits and hidden states are in no tensor's memory, yet nobody else's."""
    source = torch.arange(8, dtype=torch.float32, device="cuda")

    def step(shape: StepShape, variant: Variant) -> StepOutput:
        values = source[: shape.num_rows, None] * torch.ones(1, 1000, device="cuda")
        return StepOutput(values.bfloat16(), values * 2)

    graphs = StepGraphs(step, max_num_rows=8, max_num_tokens=64)
    shape, variant = StepShape(8, 8), Variant(shares_prefix=False, keeps_hidden=True)
    for turn in range(4):  # eagerly, captured, and twice more
        source.fill_(turn + 1)
        output = graphs.run(shape, variant)
        noise = [torch.full((8, 1000), -1.0, device="cuda") for _ in range(50)]
        assert output.hidden is not None and output.logits.dtype == torch.bfloat16
        assert (output.logits == turn + 1).all() and (output.hidden == 2 * (turn + 1)).all()
        del noise


class RecordingGraph:
    """In place of `torch.cuda.CUDAGraph`: does again what was called while it was captured."""

    captured: list[str]

    def replay(self) -> None:
        done.extend(self.captured)


done: list[str] = []  # by calls, and by graphs that stand for them


@contextmanager
def recording(graph: RecordingGraph, **_: object) -> Iterator[None]:
    before = len(done)
    yield
    graph.captured = done[before:]
    del done[before:]  # a capture does nothing itself


def test_a_call_is_captured_when_it_comes_again_and_done_once_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordingGraph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: 0)
    done.clear()
    graphs, num_calls = CallGraphs(CudaGraphs()), 0

    def call(text: str) -> None:
        nonlocal num_calls
        num_calls += 1
        done.append(text)

    for key in (1, 2, 1, 1, 2, 1, 2):
        graphs.run(key, partial(call, f"{key}"))
    assert done == ["1", "2", "1", "1", "2", "1", "2"]
    assert num_calls == 4, "of each the first time, and to be captured"


def test_without_memory_for_a_graph_a_call_is_made_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_calls = 0

    class Full:
        def capture(self, launch: object) -> NoReturn:
            raise torch.OutOfMemoryError

    def call() -> None:
        nonlocal num_calls
        num_calls += 1

    graphs = CallGraphs(Full())
    for key in (1, 1, 1, 2, 2, 2):
        graphs.run(key, call)
    assert num_calls == 6 and caplog.text.count("no memory for a graph") == 1
