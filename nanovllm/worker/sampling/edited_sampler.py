"""Tokens of entries that ask something of their logits: where few do, by CUDA graphs.

Launched one by one, these kernels take the host as long as a small model's step takes the device;
masks wait for ids of the step before, besides, and the next step for these. `device_sampler` owns
one. A graph's inputs come by one copy and lie in memory of its own; the least power of two of
entries is run, with the padding row in those that nobody fills.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, NUM_FIELDS, Entries

MAX_CAPTURED = 64  # entries of a graph: their logits are kept in memory
LEAST_ENTRIES = 4  # of a graph: arrays of so many words begin where kernels can read them best
NUM_ARRAYS = 1 + NUM_FIELDS

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Which kernels run, for how many entries, padding included."""

    size: int
    has_edits: bool
    has_penalties: bool


class Captured(NamedTuple):
    graph: Any
    tables: Tensor | None  # which it reads


class StagedEntries:
    """Memory of so many entries, on the host and on the device: an array of lines of logits, and
    those of `Entries.words`; and what is chosen for them."""

    def __init__(self, size: int, rows: RequestRows, *, num_buffers: int) -> None:
        device, shape = rows.seeds.device, (NUM_ARRAYS, size)
        is_cuda = device.type == "cuda"
        zeros = torch.zeros(num_buffers, *shape, dtype=torch.int32, pin_memory=is_cuda)
        self._ring = list(zeros)
        self._heads: list[Int32Array] = [buffer.numpy() for buffer in self._ring]
        self._copied = [torch.Event(device) for _ in self._ring] if is_cuda else []
        self._turn = 0
        self._padding = np.zeros(shape, np.int32)
        self._padding[1] = np.arange(size)  # the line of its copied logits, whoever it is
        self._padding[2] = rows.num_rows
        self._padding[4], self._padding[5] = NO_EDITS, NO_MASK
        for head in self._heads:
            head[:] = self._padding
        self._resident = torch.zeros(shape, dtype=torch.int32, device=device)
        self.lines, self.words = self._resident[0], self._resident[1:]
        self.chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self.targets = torch.zeros(size, dtype=torch.int64, device=device)  # lines, once more

    def send(self, entries: Int32Array) -> None:
        """Bring them to the device, in stream order. See `EditedSampler.sample`."""
        self._turn = turn = (self._turn + 1) % len(self._ring)
        if self._copied:
            self._copied[turn].synchronize()
        num_entries, head = entries.shape[1], self._heads[turn]
        head[0, :num_entries] = entries[0]
        head[2:, :num_entries] = entries[1:]
        if num_entries < head.shape[1]:
            head[:, num_entries:] = self._padding[:, num_entries:]
        self._resident.copy_(self._ring[turn], non_blocking=True)
        if self._copied:
            self._copied[turn].record()


class EditedSampler:
    """num_buffers: one more than the steps in flight. captures: on a GPU run by graphs."""

    def __init__(
        self, rows: RequestRows, fused: FusedStep, *, num_buffers: int, captures: bool
    ) -> None:
        self._rows = rows
        self._fused = fused
        self._num_buffers = num_buffers
        self._logits: Tensor | None = None  # [MAX_CAPTURED, vocab_size], once somebody asks
        self._staged: dict[int, StagedEntries] = {}  # by their number, padding included
        self._captures = captures and rows.seeds.device.type == "cuda"
        self._seen: set[Kind] = set()
        self._captured: dict[Kind, Captured] = {}
        self._pool: Any = None

    def sample(
        self,
        logits: Tensor,
        token_ids: Tensor,
        entries: Int32Array,
        *,
        tables: Tensor | None,
        counts: Tensor | None,
    ) -> None:
        """Choose anew for the entries of a step that ask for edits, penalties or a mask.

        logits: [n, vocab_size] of any float type, kept. token_ids: [n] int64, changed. entries:
        [5, k], `Entries.words` on the host. tables, counts: as `EditLogits` takes them; None if no
        entry has edits, or penalties.
        """
        num_entries = entries.shape[1]
        size = max(LEAST_ENTRIES, 1 << (num_entries - 1).bit_length())
        if size not in self._staged:
            self._staged[size] = StagedEntries(size, self._rows, num_buffers=self._num_buffers)
        staged = self._staged[size]
        staged.send(entries)
        copied = self._room_for(size, logits)
        torch.index_select(logits, 0, staged.lines, out=copied)
        kind = Kind(size, tables is not None, counts is not None)
        graph = self._graph_of(kind, copied, tables, counts)
        if graph is None:
            self._choose(staged, copied, tables, counts)
        else:
            graph.replay()
        token_ids.index_copy_(0, staged.targets[:num_entries], staged.chosen[:num_entries])

    def _room_for(self, size: int, logits: Tensor) -> Tensor:
        vocab_size = logits.shape[1]
        if size > MAX_CAPTURED:
            return torch.empty(size, vocab_size, dtype=logits.dtype, device=logits.device)
        if self._logits is None:
            shape = MAX_CAPTURED, vocab_size
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._logits[:size]

    def _graph_of(
        self, kind: Kind, logits: Tensor, tables: Tensor | None, counts: Tensor | None
    ) -> Any:
        """What to replay, if there is anything: a kind that comes for the second time is captured,
        and once more if its tables have moved."""
        if not self._captures or kind.size > MAX_CAPTURED:
            return None
        if kind not in self._seen:  # this time it compiles
            self._seen.add(kind)
            return None
        captured = self._captured.get(kind)
        if captured is None or captured.tables is not tables:
            captured = self._capture(kind, logits, tables, counts)
        return captured.graph

    def _capture(
        self, kind: Kind, logits: Tensor, tables: Tensor | None, counts: Tensor | None
    ) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._choose(self._staged[kind.size], logits, tables, counts)
        except torch.OutOfMemoryError:
            self._captures = False
            logger.warning("no memory for graphs of edited logits: lower gpu_memory_utilization")
            return Captured(None, tables)
        self._captured[kind] = Captured(graph, tables)
        return self._captured[kind]

    def _choose(
        self, staged: StagedEntries, logits: Tensor, tables: Tensor | None, counts: Tensor | None
    ) -> None:
        """From what lies in memory. Capturable. logits: a line for each entry."""
        rows, words = self._rows, staged.words
        entries = Entries(words, words[0], words[1], words[2], tables=tables)
        edited = self._fused.edit_logits(
            logits,
            entries,
            masks=rows.masks.words,
            counts=counts,
            known=rows.token_ids,
            columns=rows.columns,
        )
        self._fused.sample_tokens(
            edited,
            rows=entries.rows,
            positions=entries.positions,
            columns=rows.columns,
            seeds=rows.seeds,
            known=rows.token_ids,
            out=(staged.chosen, entries.lines),
        )
        staged.targets.copy_(staged.lines)
