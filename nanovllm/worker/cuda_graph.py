"""Whole decode steps as CUDA graphs: one per batch-size bucket, captured when first needed.

`ModelRunner` owns one. Eager steps, capture and replay read the same persistent buffers, so a graph
is only a faster way to say the same; a smaller batch is padded with the padding row. Inputs arrive
by the plan's one copy; what a graph leaves behind is its tensor of sampled ids.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Variant(NamedTuple):
    """What besides the batch size is part of what is captured."""

    truncates: bool  # the sampler looks at top-k, top-p and min-p
    shares_prefix: bool  # attention reads keys that rows share apart


DecodeStep = Callable[[int, Variant], Tensor]


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and where it puts its ids."""

    graph: torch.cuda.CUDAGraph
    token_ids: Tensor  # [bucket] int64


def buckets_up_to(most: int) -> list[int]:
    """Batch sizes worth a graph: dense where a step is short, within 7 % of any size later."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32), most]
    return sorted({size for size in sizes if size <= most})


class DecodeGraphs:
    """`step(bucket, variant)` must be a decode step on persistent buffers; it returns the ids."""

    def __init__(self, step: DecodeStep, *, max_num_rows: int) -> None:
        self._step = step
        self._buckets = buckets_up_to(max_num_rows)
        self._captured: dict[tuple[int, Variant], CapturedStep] = {}
        self._uncapturable: set[tuple[int, Variant]] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def bucket_for(self, num_rows: int) -> int:
        """The least bucket that holds so many rows."""
        return self._buckets[bisect_left(self._buckets, num_rows)]

    def run(self, bucket: int, variant: Variant) -> Tensor:
        """Run the step for the staged plan; returns ids [bucket], good until the next call.

        The first time it runs eagerly, which also compiles and warms up, and is then captured; if
        there is no memory for that, this size goes on eagerly.
        """
        captured = self._captured.get((bucket, variant))
        if captured is not None:
            captured.graph.replay()
            return captured.token_ids
        token_ids = self._step(bucket, variant)
        if (bucket, variant) not in self._uncapturable:
            try:
                self._captured[bucket, variant] = self._capture(bucket, variant)
            except torch.OutOfMemoryError:
                self._uncapturable.add((bucket, variant))
                logger.warning(
                    "no memory for a graph of %d rows: lower gpu_memory_utilization", bucket
                )
        return token_ids

    def _capture(self, bucket: int, variant: Variant) -> CapturedStep:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            token_ids = self._step(bucket, variant)
        return CapturedStep(graph, token_ids)
