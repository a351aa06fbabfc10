"""The second half of a step for entries of which grammars alone ask more, as CUDA graphs.

Each waits for ids of the step before, and the next step waits for it: launched one by one, its
kernels take the host as long as a small model's whole step takes the device. `device_sampler` owns
one. A graph's inputs arrive by one copy and lie, as what it leaves, in memory of its own; the least
power of two of entries is run, with the padding row in those that nobody fills.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, NUM_FIELDS, Entries

MAX_ENTRIES = 64  # of one step: their logits and masks are kept in memory
LEAST_ENTRIES = 4  # of a graph: arrays of so many words begin where kernels can read them best
NUM_ARRAYS = 1 + NUM_FIELDS

logger = logging.getLogger(__name__)


class MaskedEntries:
    """Memory of so many entries, on the host and on the device: an array of lines of logits, those
    of `Entries.words`, and masks, one behind the other; and what is chosen for them."""

    def __init__(
        self, size: int, num_words: int, rows: RequestRows, *, logits: Tensor, num_buffers: int
    ) -> None:
        """num_words: of a mask. logits: [MAX_ENTRIES, vocab_size], where they are copied to."""
        device, cuda = logits.device, logits.device.type == "cuda"
        self._num_head = NUM_ARRAYS * size
        total = self._num_head + size * num_words
        zeros = torch.zeros(num_buffers, total, dtype=torch.int32)
        self._ring = list(zeros.pin_memory() if cuda else zeros)
        self._words: list[Int32Array] = [buffer.numpy() for buffer in self._ring]
        self._heads = [words[: self._num_head].reshape(-1, size) for words in self._words]
        self._copied = [torch.Event(device) for _ in self._ring] if cuda else []
        self._turn = 0
        self._counting = np.arange(size, dtype=np.int32)
        self._padding = np.zeros((NUM_ARRAYS, size), np.int32)
        self._padding[1] = self._counting
        self._padding[2] = rows.num_rows
        self._padding[4], self._padding[5] = NO_EDITS, NO_MASK
        for head in self._heads:
            head[:] = self._padding
        self._resident = torch.zeros(total, dtype=torch.int32, device=device)
        head_words = self._resident[: self._num_head].view(-1, size)
        self.lines, words = head_words[0], head_words[1:]
        self.entries = Entries(words, words[0], words[1], words[2], tables=None)
        self.masks = self._resident[self._num_head :].view(size, num_words)
        self.logits = logits[:size]
        self.chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self.targets = torch.zeros(size, dtype=torch.int64, device=device)  # lines, once more

    def send(
        self, lines: Int32Array, rows: Int32Array, positions: Int32Array, masks: Int32Array
    ) -> None:
        """Bring them to the device, in stream order."""
        self._turn = turn = (self._turn + 1) % len(self._ring)
        if self._copied:
            self._copied[turn].synchronize()
        num_entries, head = len(lines), self._heads[turn]
        head[0, :num_entries] = lines
        head[2, :num_entries] = rows
        head[3, :num_entries] = positions
        head[5, :num_entries] = self._counting[:num_entries]
        if num_entries < head.shape[1]:
            head[:, num_entries:] = self._padding[:, num_entries:]
        end = self._num_head + masks.size
        self._words[turn][self._num_head : end] = masks.reshape(-1)
        self._resident[:end].copy_(self._ring[turn][:end], non_blocking=True)
        if self._copied:
            self._copied[turn].record()


def sample_edited(
    fused: FusedStep,
    rows: RequestRows,
    logits: Tensor,
    entries: Entries,
    *,
    masks: Tensor | None,
    out: Tensor,
    counts: tuple[Tensor | None, bool] = (None, False),
) -> None:
    """Choose tokens of entries by what they ask of their logits.

    logits: [n, vocab_size]; out: [n] int64, where the entries' own lines are written. masks, and
    counts with whether to clear them: as `EditLogits` takes them.
    """
    edited = fused.edit_logits(
        logits,
        entries,
        masks=masks,
        counts=counts[0],
        clears=counts[1],
        known=rows.token_ids,
        columns=rows.columns,
    )
    fused.sample_tokens(
        edited,
        rows=entries.rows,
        positions=entries.positions,
        columns=rows.columns,
        seeds=rows.seeds,
        known=rows.token_ids,
        out=(out, entries.lines),
    )


class MaskedSampler:
    """num_buffers: one more than the steps in flight. captures: on a GPU run by graphs."""

    def __init__(
        self, rows: RequestRows, fused: FusedStep, *, num_buffers: int, captures: bool
    ) -> None:
        self._rows = rows
        self._fused = fused
        self._num_buffers = num_buffers
        self._logits: Tensor | None = None  # [MAX_ENTRIES, vocab_size], once somebody asks
        self._entries: dict[int, MaskedEntries] = {}  # by their number, padding included
        self._captures = captures and rows.seeds.device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def sample(
        self,
        logits: Tensor,
        token_ids: Tensor,
        lines: Int32Array,
        rows: Int32Array,
        positions: Int32Array,
        masks: Int32Array,
    ) -> None:
        """Choose anew where a mask says what is allowed.

        logits: [n, vocab_size] of any float type, kept. token_ids: [n] int64, changed. lines: [k],
        of both; rows, positions: [k], of the new tokens. masks: [k, num_words].
        """
        num_entries = len(lines)
        size = max(LEAST_ENTRIES, 1 << (num_entries - 1).bit_length())
        is_new = size not in self._entries
        if is_new:
            self._entries[size] = self._make_entries(size, masks.shape[1], logits)
        entries = self._entries[size]
        entries.send(lines, rows, positions, masks)
        torch.index_select(logits, 0, entries.lines, out=entries.logits)
        if size not in self._graphs and self._captures and not is_new:  # the first time compiles
            self._capture(size, entries)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._choose(entries)
        token_ids.index_copy_(0, entries.targets[:num_entries], entries.chosen[:num_entries])

    def _make_entries(self, size: int, num_words: int, logits: Tensor) -> MaskedEntries:
        if self._logits is None:
            shape = MAX_ENTRIES, logits.shape[1]
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return MaskedEntries(
            size, num_words, self._rows, logits=self._logits, num_buffers=self._num_buffers
        )

    def _capture(self, size: int, entries: MaskedEntries) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._choose(entries)
        except torch.OutOfMemoryError:
            self._captures = False
            logger.warning("no memory for graphs of masks: lower gpu_memory_utilization")
        else:
            self._graphs[size] = graph

    def _choose(self, entries: MaskedEntries) -> None:
        """From what lies in memory. Capturable."""
        sample_edited(
            *(self._fused, self._rows, entries.logits, entries.entries),
            masks=entries.masks,
            out=entries.chosen,
        )
        entries.targets.copy_(entries.lines)
