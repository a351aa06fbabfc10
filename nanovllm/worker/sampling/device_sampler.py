"""The second half of a step on a GPU: what `sampler` means, by kernels, for the rows that ask.

The forward pass has left logits, and a token for each entry as its temperature and truncation have
it. Entries that ask for edits, penalties or a mask are sampled again, from their edited logits;
log-probabilities are gathered of those that want them. All other entries cost nothing here, and
nothing here waits for the device. `ModelRunner` owns one.
"""

import numpy as np
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks
from nanovllm.worker.forward_batch import SampleStaging
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, NUM_FIELDS, EditTables
from nanovllm.worker.sampling.edited_sampler import EditedSampler
from nanovllm.worker.sampling.logprobs import PackedLogprobs, pack_logprobs
from nanovllm.worker.sampling.sampler import Sampled

NO_ENTRIES = np.empty((NUM_FIELDS, 0), np.int32)


class DeviceSampler:
    """Reads `rows`; keeps on the device what they ask, and what they have seen.

    num_buffers: one more than the steps in flight.
    """

    def __init__(
        self,
        rows: RequestRows,
        fused: FusedStep,
        *,
        num_buffers: int,
        vocabulary: Vocabulary | None = None,
        captures: bool = False,
    ) -> None:
        """vocabulary: this rank's, if others have other ids. captures: run by graphs what few
        entries ask of their logits."""
        self._rows = rows
        self._vocabulary = vocabulary
        self._fused = fused
        self._device = rows.seeds.device
        self._tables = EditTables(rows.edits, self._device, rows.note_failure)
        self._staging = SampleStaging(num_buffers=num_buffers, device=self._device)
        self._edited = EditedSampler(rows, fused, num_buffers=num_buffers, captures=captures)
        self._counts: Tensor | None = None  # [num_rows + 1, vocab_size] int32, once somebody asks

    def sample(
        self,
        logits: Tensor,
        token_ids: Tensor,
        *,
        rows: Int32Array,
        positions: Int32Array,
        masks: StepMasks | None,
    ) -> Sampled:
        """Choose anew where more is asked than `token_ids` ([n] int64, changed) has respected.

        logits: [n, vocab_size, or this rank's ids] of any float type, kept. rows, positions: [n],
        of the new tokens. masks: their indices are lines of logits, and the rows' table has
        theirs.
        """
        penalizes = bool(self._rows.penalizes[rows].any())
        lines = self._rows.wants_logprobs[rows].nonzero()[0].astype(np.int32)
        entries = self._find_entries(rows, positions, masks, penalizes=penalizes)
        if not (entries.size or lines.size):
            return Sampled(token_ids, None, [], [])
        if self._vocabulary is not None and logits.shape[1] < self._rows.vocab_size:
            logits = self._vocabulary.gather(logits)
        if entries.size:
            has_edits = bool((entries[3] != NO_EDITS).any())
            self._edited.sample(
                logits,
                token_ids,
                entries,
                tables=self._tables.words if has_edits else None,
                counts=self._counts_of(logits.shape[1]) if penalizes else None,
            )
        if not lines.size:
            return Sampled(token_ids, None, [], [])
        num_top = self._rows.host["logprobs"][rows[lines]]
        # Nobody but who wants the whole vocabulary needs a sort.
        pack, most = self._fused.pack_logprobs, int(num_top.max())
        if (num_top < 0).any():
            pack, most = pack_logprobs, -1
        words = pack(logits, token_ids, num_top=most, lines=self._staging.send(lines))
        return Sampled(token_ids, PackedLogprobs(words), lines.tolist(), num_top.tolist())

    def _find_entries(
        self,
        rows: Int32Array,
        positions: Int32Array,
        masks: StepMasks | None,
        *,
        penalizes: bool,
    ) -> Int32Array:
        """As `Entries.words`, on the host."""
        edits = self._rows.edits
        if not edits and not penalizes:
            if masks is None:
                return NO_ENTRIES
            lines = np.array(masks.indices, np.int32)
            mask_lines = np.array(masks.lines, np.int32)
        else:
            asks = self._rows.penalizes[rows]
            all_mask_lines = np.full(len(rows), NO_MASK, np.int32)
            if masks is not None:
                all_mask_lines[masks.indices] = masks.lines
                asks |= all_mask_lines != NO_MASK
            if edits:
                asks |= np.fromiter((row in edits for row in rows.tolist()), bool, len(rows))
            lines = np.flatnonzero(asks).astype(np.int32)
            mask_lines = all_mask_lines[lines]
        entries = np.empty((NUM_FIELDS, len(lines)), np.int32)
        entries[0], entries[1], entries[2] = lines, rows[lines], positions[lines]
        entries[3] = self._tables.places_of(entries[1].tolist()) if edits else NO_EDITS
        entries[4] = mask_lines
        return entries

    def _counts_of(self, vocab_size: int) -> Tensor:
        if self._counts is None:
            shape = self._rows.num_rows + 1, vocab_size
            self._counts = torch.empty(shape, dtype=torch.int32, device=self._device)
        return self._counts
