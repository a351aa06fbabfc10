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


class MaskedSampler:
    """num_buffers: one more than the steps in flight. captures: on a GPU run by graphs."""

    def __init__(
        self, rows: RequestRows, fused: FusedStep, *, num_buffers: int, captures: bool
    ) -> None:
        self._rows = rows
        self._fused = fused
        self._device = device = rows.seeds.device
        cuda = device.type == "cuda"
        self._num_words = -(-rows.vocab_size // 32)
        num_words = MAX_ENTRIES * (NUM_ARRAYS + self._num_words)
        self._ring = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=cuda) for _ in range(num_buffers)
        ]
        self._copied = [torch.Event(device) for _ in range(num_buffers)] if cuda else []
        self._turn = 0
        self._resident = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._lines = torch.zeros(MAX_ENTRIES, dtype=torch.int64, device=device)
        self._chosen = torch.zeros(MAX_ENTRIES, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None  # [MAX_ENTRIES, vocab_size], once somebody asks
        self._captures = captures and cuda
        self._seen: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def sample(
        self, logits: Tensor, token_ids: Tensor, entries: Int32Array, masks: Int32Array
    ) -> None:
        """Choose anew where a mask says what is allowed.

        logits: [n, vocab_size] of any float type, kept. token_ids: [n] int64, changed. entries:
        [5, k] as `Entries.words`, of no edits and no penalties. masks: [k, num_words].
        """
        num_entries = entries.shape[1]
        size = max(LEAST_ENTRIES, 1 << (num_entries - 1).bit_length())
        self._send(size, entries, masks)
        if self._logits is None:
            shape = MAX_ENTRIES, logits.shape[1]
            self._logits = torch.empty(shape, dtype=logits.dtype, device=self._device)
        torch.index_select(logits, 0, self._resident[:size], out=self._logits[:size])
        self._run(size)
        token_ids.index_copy_(0, self._lines[:num_entries], self._chosen[:num_entries])

    def _send(self, size: int, entries: Int32Array, masks: Int32Array) -> None:
        """One array of lines of logits, five of entries, and the masks, one behind the other."""
        self._turn = (self._turn + 1) % len(self._ring)
        if self._copied:
            self._copied[self._turn].synchronize()
        buffer = self._ring[self._turn]
        words: Int32Array = buffer.numpy()
        num_entries, start = entries.shape[1], NUM_ARRAYS * size
        lines, own_lines, rows, positions, tables, mask_lines = words[:start].reshape(-1, size)
        own_lines[:] = np.arange(size)
        tables[:] = NO_EDITS
        padding = 0, self._rows.num_rows, 0, NO_MASK
        for array, entry, other in zip(
            (lines, rows, positions, mask_lines), entries[[0, 1, 2, 4]], padding, strict=True
        ):
            array[:num_entries], array[num_entries:] = entry, other
        end = start + masks.size
        words[start:end] = masks.reshape(-1)
        self._resident[:end].copy_(buffer[:end], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()

    def _run(self, size: int) -> None:
        """The first time eagerly, which compiles, the next time captured."""
        if self._captures and size in self._seen and size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except torch.OutOfMemoryError:
                self._captures = False
                logger.warning("no memory for graphs of masks: lower gpu_memory_utilization")
        self._seen.add(size)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self._choose(size)

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._choose(size)
        return graph

    def _choose(self, size: int) -> None:
        """From what lies in memory. Capturable."""
        assert self._logits is not None
        rows, start = self._rows, NUM_ARRAYS * size
        words = self._resident[size:start].view(NUM_FIELDS, size)
        entries = Entries(
            words=words, lines=words[0], rows=words[1], positions=words[2], tables=None
        )
        edited = self._fused.edit_logits(
            self._logits[:size],
            entries,
            masks=self._resident[start : start + size * self._num_words].view(size, -1),
            counts=None,
            clears=False,
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
            out=(self._chosen, entries.lines),
        )
        self._lines[:size].copy_(self._resident[:size])
