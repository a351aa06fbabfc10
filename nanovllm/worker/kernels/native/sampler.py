"""All that a step asks of sampling on a CPU, in one native call: what `sampling.sampler` means.

`select` offers it where the library is built; `Sampler` hands its rows over then.
"""

import ctypes
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import TOLD
from nanovllm.worker.sampling.edit_tables import EditTables
from nanovllm.worker.sampling.logprobs import NUM_FIXED, PackedLogprobs
from nanovllm.worker.sampling.sampler import Sampled, SamplingTargets

NOTHING = -1  # asked for: of a field of a line


class NativeSampler:
    """Implements `sampler.RowSampler`."""

    def __init__(self, rows: RequestRows) -> None:
        self._rows = rows
        self._records = describe_rows(rows.columns, rows.seeds, rows.token_ids)
        self._tables = EditTables(rows.edits, rows.seeds.device, rows.note_failure)

    def sample(
        self, logits: Tensor, targets: SamplingTargets, masks: StepMasks | None = None
    ) -> Sampled:
        """As `Sampler.sample`; logits of rows that ask for something may be overwritten."""
        logits, rows = logits.contiguous(), targets.host_rows
        assert logits.dtype == torch.float32
        wanted = (self._rows.asks[rows] & TOLD).nonzero()[0]
        asks, logprobs, num_top = None, None, []
        if masks is not None or self._rows.edits or wanted.size:
            lines = np.full((len(rows), len(native.LINE_FIELDS)), NOTHING, np.int64)
            asks = native.Asks(lines.ctypes.data)
            if self._rows.edits:
                lines[:, 0] = self._tables.places_of(rows.tolist())
                asks.tables = self._tables.words.data_ptr()
            if masks is not None:
                words = self._rows.masks.words
                lines[masks.indices, 1] = masks.lines
                asks.masks, asks.mask_bytes = words.data_ptr(), 4 * words.stride(0)
            if wanted.size:
                num_top = self._rows.host["logprobs"][rows[wanted]].tolist()
                most = _num_listed(-1 if -1 in num_top else max(num_top), logits.shape[1])
                logprobs = PackedLogprobs(_new_reports(len(wanted), most))
                lines[wanted, 2] = np.arange(len(wanted))
                asks.reports, asks.num_top = logprobs.words.data_ptr(), most
        token_ids = torch.empty(len(rows), dtype=torch.int64)
        native.library().nv_sample(
            logits.data_ptr(),
            len(rows),
            logits.shape[1],
            targets.rows.data_ptr(),
            targets.positions.data_ptr(),
            ctypes.byref(self._records),
            None if asks is None else ctypes.byref(asks),
            token_ids.data_ptr(),
        )
        return Sampled(token_ids, logprobs, wanted.tolist(), num_top)

    def pack_logprobs(self, logits: Tensor, token_ids: Tensor, *, num_top: int) -> Tensor:
        """As `logprobs.pack_logprobs`; of equal logits the first is the likeliest."""
        logits, token_ids = logits.float().contiguous(), token_ids.long().contiguous()
        num_top = _num_listed(num_top, logits.shape[1])
        reports = _new_reports(len(logits), num_top)
        native.library().nv_report(
            logits.data_ptr(),
            *logits.shape,
            token_ids.data_ptr(),
            num_top,
            reports.data_ptr(),
        )
        return reports


def describe_rows(columns: Mapping[str, Tensor], seeds: Tensor, token_ids: Tensor) -> native.Rows:
    """Where rows' records lie: as `RequestRows` has them, whose memory stays where it is.

    columns: [num_rows] each, of one stride; seeds: [num_rows] int64; token_ids: [num_rows, length]
    int32.
    """
    stride = columns[native.ROW_COLUMNS[0]].stride(0)
    assert all(columns[name].stride(0) == stride for name in native.ROW_COLUMNS)
    addresses = (columns[name].data_ptr() for name in native.ROW_COLUMNS)
    strides = stride, seeds.stride(0), token_ids.stride(0)
    return native.Rows(*addresses, seeds.data_ptr(), token_ids.data_ptr(), *strides)


def _num_listed(num_top: int, vocab_size: int) -> int:
    return vocab_size if num_top < 0 else min(num_top, vocab_size)


def _new_reports(count: int, num_top: int) -> Tensor:
    return torch.zeros(count, NUM_FIXED + 2 * num_top, dtype=torch.int32)
