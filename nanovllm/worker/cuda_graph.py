"""Forward passes as CUDA graphs: one per bucket of tokens and rows, captured when it comes again.

`ModelRunner` owns one `StepGraphs`. Eager steps, capture and replay read the same persistent
buffers, so a replay computes what the eager step would; smaller steps are padded with tokens of the
padding row. Plain sampling is part of a graph; what rows ask for besides is done behind it, to the
`StepOutput` that it leaves.
"""

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class StepShape(NamedTuple):
    """A step's size, padding included; as many tokens as rows make it a pure decode step."""

    num_tokens: int
    num_rows: int

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == self.num_rows


class Variant(NamedTuple):
    """What besides its shape is part of what is captured."""

    shares_prefix: bool  # attention reads keys that rows share apart
    keeps_hidden: bool = False  # of all tokens, for log-probabilities of prompts
    gathers: bool = False  # logits of all ranks, for rows that truncate


class StepOutput(NamedTuple):
    """What a forward pass leaves behind."""

    logits: Tensor  # [num_rows, vocab_size or this rank's ids], as the model made them
    hidden: Tensor | None  # [num_tokens, hidden_size], if it was to be kept


Step = Callable[[StepShape, Variant], StepOutput]
# Larger steps keep a GPU busy for longer than the host needs to launch them.
MAX_TOKENS = 8192
# How often a larger graph runs in place of one that is not captured yet. By then the padding has
# cost about what an eager step and a capture do, which all rows of that step wait for.
MOST_STAND_INS = 64
# Sizes up to which padding costs a GPU little, since it reads the weights meanwhile.
CHEAP_ROWS, CHEAP_TOKENS = 64, 256


T = TypeVar("T")


class Graph(Protocol):
    """What has been captured."""

    def replay(self) -> None:
        """Queue all of it on the current stream."""


class Graphs(Protocol):
    """What captures: `CudaGraphs`, or where there is no GPU whatever stands in for it."""

    def capture(self, launch: Callable[[], T]) -> tuple[Graph, T]:
        """What `launch` launches, none of which runs, and what it returns.

        Raises `torch.OutOfMemoryError`.
        """


class CudaGraphs:
    """Of one pool of memory: what one of its graphs computes is good until the next one runs."""

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, launch: Callable[[], T]) -> tuple[Graph, T]:
        """See `Graphs`."""
        graph = torch.cuda.CUDAGraph()
        # What threads of a communicator ask of their events meanwhile is no fault of the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = launch()
        return graph, result


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and where it puts what it leaves."""

    graph: Graph
    output: StepOutput


class _Borrowed:
    """Memory of the graphs' pool that no tensor owns (numba's CUDA array interface).

    Held by tensors, logits of every shape would take gigabytes. In the pool they lie where other
    graphs have theirs, and stay as they are until the next graph runs.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
        }


def borrow(tensor: Tensor) -> Tensor:
    """The same memory, which this one does not keep from being used again."""
    if not tensor.numel():  # a stage that samples nothing has no logits
        return tensor
    assert tensor.is_contiguous()
    bytes_ = torch.as_tensor(_Borrowed(tensor), device=tensor.device)
    return bytes_.view(tensor.dtype).view(tensor.shape)


def decode_buckets(most: int) -> list[int]:
    """Batch sizes worth a graph: dense where a step is short, within 7 % of any size later."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32), most]
    return sorted({size for size in sizes if size <= most})


def token_buckets(most: int) -> list[int]:
    """Sizes of steps with prompts: an eighth or a quarter apart, as padding is computed in vain."""
    sizes = [
        *range(16, 64, 16),
        *range(64, 256, 32),
        *range(256, 1024, 64),
        *range(1024, 2048, 128),
        *range(2048, most, 256),
        most,
    ]
    return sorted({size for size in sizes if size <= most})


def row_buckets(most: int) -> list[int]:
    """Rows of steps with prompts: they only cost attention's lists, and rows of logits."""
    sizes = [16, 64, *range(256, most, 256), most]
    return sorted({size for size in sizes if size <= most})


def _may_stand_in(larger: StepShape, shape: StepShape) -> bool:
    """Whether steps of `shape` can run in the other one, and cost little more there."""
    cheap = CHEAP_ROWS if shape.is_decode else CHEAP_TOKENS
    return (
        larger.is_decode == shape.is_decode
        and larger.num_rows >= shape.num_rows
        and shape.num_tokens <= larger.num_tokens <= max(2 * shape.num_tokens, cheap)
    )


class StepGraphs:
    """`step(shape, variant)` must be a forward pass on persistent buffers."""

    def __init__(self, step: Step, *, max_num_rows: int, max_num_tokens: int) -> None:
        self._step = step
        self._graphs = CudaGraphs()
        self._decode = decode_buckets(max_num_rows)
        self._rows = row_buckets(max_num_rows)
        self._tokens = token_buckets(min(max_num_tokens, MAX_TOKENS))
        self._seen: set[tuple[StepShape, Variant]] = set()
        self._captured: dict[tuple[StepShape, Variant], CapturedStep] = {}
        self._uncapturable: set[tuple[StepShape, Variant]] = set()
        self._num_stand_ins: Counter[tuple[StepShape, Variant]] = Counter()

    @property
    def shapes(self) -> list[StepShape]:
        """All there are, decode steps first."""
        decode = [StepShape(size, size) for size in self._decode]
        return decode + [
            StepShape(tokens, rows)
            for rows in self._rows
            for tokens in self._tokens
            if tokens > rows
        ]

    def shape_for(self, num_tokens: int, num_rows: int) -> StepShape | None:
        """The least shape that holds so many; None if the step is too large to gain by a graph."""
        if num_tokens == num_rows:
            bucket = self._decode[bisect_left(self._decode, num_rows)]
            return StepShape(bucket, bucket)
        rows = self._rows[bisect_left(self._rows, num_rows)]
        # Never as many as rows, which would be a decode step.
        num_tokens = max(num_tokens, rows + 1)
        if num_tokens > self._tokens[-1]:
            return None
        return StepShape(self._tokens[bisect_left(self._tokens, num_tokens)], rows)

    def captured_shape_for(self, shape: StepShape, variant: Variant) -> StepShape:
        """In which to run a step of `shape` that somebody waits for: another one is captured that
        costs little more, or `shape` itself.

        A shape that keeps coming is captured in the end, also if the core is never idle.
        """
        key = shape, variant
        if key in self._captured or self._num_stand_ins[key] >= MOST_STAND_INS:
            return shape
        larger = [
            one
            for one, of_variant in self._captured
            if of_variant == variant and _may_stand_in(one, shape)
        ]
        if not larger:
            return shape
        if key not in self._uncapturable:
            self._num_stand_ins[key] += 1
        return min(larger)

    def run(self, shape: StepShape, variant: Variant) -> StepOutput:
        """Run the step for the staged plan; what it returns is good until the next call.

        The first time it runs eagerly, which also compiles and warms up, and the next time it is
        captured. If there is no memory for that, the shape goes on eagerly.
        """
        key = shape, variant
        captured = self._captured.get(key)
        if captured is None:
            if key in self._seen and key not in self._uncapturable:
                try:
                    self._captured[key] = captured = self._capture(shape, variant)
                except torch.OutOfMemoryError:
                    self._uncapturable.add(key)
                    text = "no memory for a graph of %s: lower gpu_memory_utilization"
                    logger.warning(text, shape)
            self._seen.add(key)
        if captured is None:
            return self._step(shape, variant)
        captured.graph.replay()
        return captured.output

    def _capture(self, shape: StepShape, variant: Variant) -> CapturedStep:
        graph, output = self._graphs.capture(lambda: self._step(shape, variant))
        hidden = None if output.hidden is None else borrow(output.hidden)
        return CapturedStep(graph, StepOutput(borrow(output.logits), hidden))


class CallGraphs:
    """Graphs of calls that do the same to the same memory, and return nothing, whenever their key
    is the same: launched one by one, a few small operations take the host longer than a graph."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs: Graphs | None = graphs
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, Graph] = {}

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        """The first time it is called, which compiles; the next time it is captured."""
        graph = self._captured.get(key)
        if graph is None and key in self._seen and self._graphs is not None:
            graph = self._capture(key, call, self._graphs)
        if graph is not None:
            graph.replay()
        else:
            call()
            self._seen.add(key)

    def _capture(self, key: Hashable, call: Callable[[], None], graphs: Graphs) -> Graph | None:
        try:
            self._captured[key], _ = graphs.capture(call)
        except torch.OutOfMemoryError:
            self._graphs = None
            logger.warning("no memory for a graph of %s: lower gpu_memory_utilization", key)
        return self._captured.get(key)
