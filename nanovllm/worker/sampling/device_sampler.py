"""The second half of a step on a GPU: what `sampler` means, by kernels, for the rows that ask.

The forward pass has left logits, and a token for each entry as its temperature and truncation have
it. Entries that ask for edits, penalties or a mask are sampled again, from their edited logits;
log-probabilities are gathered of those that want them. All other entries cost nothing here, and
nothing here waits for the device. `ModelRunner` owns one.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks
from nanovllm.worker.forward_batch import SampleStaging
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.bitmask import mask_words
from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, NUM_FIELDS, EditTables, Entries
from nanovllm.worker.sampling.logprobs import PackedLogprobs, pack_logprobs
from nanovllm.worker.sampling.masked_sampler import MAX_ENTRIES, MaskedSampler, sample_edited
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
        """vocabulary: this rank's, if others have other ids. captures: run by graphs, where what
        is asked comes in few forms: masks alone."""
        self._rows = rows
        self._vocabulary = vocabulary
        self._fused = fused
        self._device = rows.seeds.device
        self._tables = EditTables(rows.edits, self._device, rows.note_failure)
        self._staging = SampleStaging(num_buffers=num_buffers, device=self._device)
        self._masked = MaskedSampler(rows, fused, num_buffers=num_buffers, captures=captures)
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
        of the new tokens. masks: their indices are lines of logits.
        """
        penalized = self._rows.penalizes[rows]
        lines = self._rows.wants_logprobs[rows].nonzero()[0].astype(np.int32)
        masked_alone, entries = None, NO_ENTRIES
        if masks is not None and self._are_masked_alone(masks, rows, penalized):
            masked_alone, masks = masks, None
        else:
            entries = self._find_entries(rows, positions, penalized, masks)
        if not (entries.size or lines.size or masked_alone):
            return Sampled(token_ids, None, [], [])
        if self._vocabulary is not None and logits.shape[1] < self._rows.vocab_size:
            logits = self._vocabulary.gather(logits)
        if masked_alone is not None:
            own = np.array(masked_alone.indices, np.int32)
            packed = mask_words(masked_alone)
            self._masked.sample(logits, token_ids, own, rows[own], positions[own], packed)
            if not lines.size:
                return Sampled(token_ids, None, [], [])
        arrays = [entries, *entries[:3], lines]
        if masks is not None:
            arrays.append(mask_words(masks))
        on_device = self._staging.send(arrays)
        if entries.size:
            counted = rows[penalized].tolist()
            has_edits = bool((entries[3] != NO_EDITS).any())
            asking = Entries(
                words=on_device[0],
                lines=on_device[1],
                rows=on_device[2],
                positions=on_device[3],
                tables=self._tables.words if has_edits else None,
            )
            self._sample_again(
                logits, token_ids, asking, counted, None if masks is None else on_device[5]
            )
        if not lines.size:
            return Sampled(token_ids, None, [], [])
        num_top = self._rows.host["logprobs"][rows[lines]]
        # Nobody but who wants the whole vocabulary needs a sort.
        pack, most = self._fused.pack_logprobs, int(num_top.max())
        if (num_top < 0).any():
            pack, most = pack_logprobs, -1
        words = pack(logits, token_ids, num_top=most, lines=on_device[4])
        return Sampled(token_ids, PackedLogprobs(words), lines.tolist(), num_top.tolist())

    def _are_masked_alone(
        self, masks: StepMasks, rows: Int32Array, penalized: npt.NDArray[np.bool_]
    ) -> bool:
        """Whether nobody in the step asks for more of his logits, and few enough for that."""
        if len(masks.indices) > MAX_ENTRIES or penalized.any():
            return False
        edits = self._rows.edits
        return not edits or edits.keys().isdisjoint(rows.tolist())

    def _find_entries(
        self,
        rows: Int32Array,
        positions: Int32Array,
        penalized: npt.NDArray[np.bool_],
        masks: StepMasks | None,
    ) -> Int32Array:
        """As `Entries.words`, on the host."""
        edits = self._rows.edits
        if masks is None and not edits and not penalized.any():
            return NO_ENTRIES
        asks = penalized.copy()
        mask_lines = np.full(len(rows), NO_MASK, np.int32)
        if masks is not None:
            mask_lines[masks.indices] = np.arange(len(masks.indices))
            asks |= mask_lines != NO_MASK
        if edits:
            asks |= np.fromiter((row in edits for row in rows.tolist()), bool, len(rows))
        lines = np.flatnonzero(asks)
        entries = np.empty((NUM_FIELDS, len(lines)), np.int32)
        entries[0], entries[1], entries[2] = lines, rows[lines], positions[lines]
        entries[3] = self._tables.places_of(entries[1].tolist()) if edits else NO_EDITS
        entries[4] = mask_lines[lines]
        return entries

    def _sample_again(
        self,
        logits: Tensor,
        token_ids: Tensor,
        entries: Entries,
        counted: list[int],
        masks: Tensor | None,
    ) -> None:
        """counted: the rows among the entries' that ask for a penalty."""
        rows = self._rows
        if counted and self._counts is None:
            shape = rows.num_rows + 1, logits.shape[1]
            self._counts = torch.empty(shape, dtype=torch.int32, device=self._device)
        sample_edited(
            *(self._fused, rows, logits, entries),
            masks=masks,
            out=token_ids,
            counts=(self._counts if counted else None, rows.begin_counts(counted)),
        )
