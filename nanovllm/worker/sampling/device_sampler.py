"""The second half of a step on a GPU: what `sampler` means, by kernels, for the rows that ask.

The forward pass has left logits, and a token for each entry as its temperature and truncation have
it. Entries that ask for edits, penalties or a mask are sampled again, from their edited logits;
log-probabilities are gathered of those that want them. All other entries cost nothing here, and
nothing here waits for the device. `ModelRunner` owns one.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanovllm.protocol.plan import StepMasks
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.worker.cuda_graph import CallGraphs
from nanovllm.worker.forward_batch import SampleSlot, SampleStaging
from nanovllm.worker.kernels.select import FusedStep
from nanovllm.worker.layers.vocabulary import Vocabulary
from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling import wishes as w
from nanovllm.worker.sampling.columns import EDITED, PENALIZED, TOLD, Int32Array
from nanovllm.worker.sampling.edit_tables import EditTables
from nanovllm.worker.sampling.logprobs import NUM_FIXED, PackedLogprobs, pack_logprobs
from nanovllm.worker.sampling.sampler import OnHost
from nanovllm.worker.sampling.wishes import NOTHING, Wishes, num_words

# Entries of a graph whose edited logits are kept in its memory. Kernels run for as many, and their
# programs end at once where there is no entry: that costs them little, and of graphs of other sizes
# each would have to be captured.
MAX_CAPTURED = 64


class Kind(NamedTuple):
    """Which kernels run, and for how many entries."""

    size: int  # of the lists
    num_edited: int  # entries whose tokens are chosen anew, or more
    num_told: int  # entries that want log-probabilities, or more
    has_edits: bool
    has_penalties: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What the entries of a step ask: the same in all steps while the same rows run.

    words: for the device, but for addresses, masks, and positions. kind: None if no kernel of ours
    runs. edited: lines of entries whose tokens are chosen anew; masked: which of these have a mask.
    told: lines that want log-probabilities; num_top: of each, and most: how many alternatives
    (-1: all there are).
    """

    kind: Kind | None
    words: Int32Array
    edited: Int32Array
    masked: Int32Array
    told: list[int]
    num_top: list[int]
    most: int


NONE: Int32Array = np.empty(0, np.int32)
NOTHING_ASKED = Asked(None, NONE, NONE, NONE, [], [], 0)
NOBODY_TOLD: tuple[list[int], list[int], int] = [], [], 0


def find_edited(
    asks: npt.NDArray[np.uint8], asked: int, masks: StepMasks | None
) -> tuple[Int32Array, Int32Array]:
    """As `Asked` has them. asks: bits of each entry; asked: those of all. Changes asks."""
    indices = NONE if masks is None else np.array(masks.indices, np.int32)
    if not asked & (PENALIZED | EDITED):
        return indices, np.arange(len(indices), dtype=np.int32)
    asks[indices] |= EDITED
    edited = (asks & (PENALIZED | EDITED)).nonzero()[0].astype(np.int32)
    return edited, np.searchsorted(edited, indices).astype(np.int32)


class DeviceSampler:
    """Reads `rows`; keeps on the device what they ask, and what they have seen.

    Launched one by one, its kernels would take the host as long as a small model's step takes the
    device: whatever is asked, there is one copy there, one graph, and one copy back.
    """

    def __init__(
        self,
        rows: RequestRows,
        fused: FusedStep,
        *,
        vocabulary: Vocabulary | None = None,
        calls: CallGraphs | None = None,
    ) -> None:
        """vocabulary: this rank's, if others have other ids. calls: by which it runs, if any."""
        self._rows = rows
        self._vocabulary = vocabulary
        self._fused = fused
        self._device = rows.seeds.device
        self._tables = EditTables(rows.edits, self._device, rows.note_failure)
        self._counts: Tensor | None = None  # [num_rows + 1, vocab_size] int32, once somebody asks
        self._num_counted = rows.host["num_counted"]  # of each row's tokens; 0 when it is admitted
        self._most = -(-rows.num_rows // 16) * 16  # entries, as kernels can read lists best
        self._usual = min(MAX_CAPTURED, self._most)
        self.staging = SampleStaging(
            num_words=num_words(self._most),
            num_rows=self._most,
            num_more=self._most * (NUM_FIXED + 2 * MAX_LOGPROBS),
            device=self._device,
        )
        self._asked = NOTHING_ASKED
        self._asked_by: tuple[bytes, int, tuple[int, ...] | None] = b"", 0, None
        self._calls = calls

    def sample(
        self,
        logits: Tensor,
        slot: SampleSlot,
        *,
        rows: Int32Array,
        positions: Int32Array,
        masks: StepMasks | None,
    ) -> OnHost:
        """Choose anew where more is asked than `staging.token_ids` has respected, and bring all
        tokens to the host: what is returned is there when the stream has come so far.

        logits: [n or more, vocab_size, or this rank's ids] of any float type, kept. rows,
        positions: [n], of the new tokens. masks: their indices are lines of logits, and the rows'
        table has theirs.
        """
        masked = None if masks is None else tuple(masks.indices)
        by = rows.tobytes(), self._rows.num_admitted, masked
        if by != self._asked_by:
            self._asked, self._asked_by = self._find_asked(rows, masks), by
        asked, token_ids = self._asked, slot.token_ids[: len(rows)]
        if asked is NOTHING_ASKED:
            slot.fetch()
            return OnHost(token_ids)
        if self._vocabulary is not None and logits.shape[1] < self._rows.vocab_size:
            logits = self._vocabulary.gather(logits)
        if asked.kind is not None:
            self._send(asked.kind, asked, slot, logits, positions, masks)
            self._launch(asked.kind, logits.dtype, logits.stride(0))
        if not asked.told:
            slot.fetch()
            return OnHost(token_ids)
        if asked.most >= 0:
            words = slot.fetch_lines(len(asked.told), NUM_FIXED + 2 * asked.most)
        else:  # the whole vocabulary, sorted, which is rare
            slot.fetch()
            lines = torch.tensor(asked.told, device=self._device)
            words = pack_logprobs(logits[lines], self.staging.token_ids[lines], num_top=-1)
            words = words.to("cpu", non_blocking=True)
        return OnHost(token_ids, PackedLogprobs(words), asked.told, asked.num_top)

    def _find_asked(self, rows: Int32Array, masks: StepMasks | None) -> Asked:
        asks = self._rows.asks[rows]
        asked = int(np.bitwise_or.reduce(asks))
        if not asked and masks is None:
            return NOTHING_ASKED
        edited, masked = find_edited(asks, asked, masks)
        told, num_top, most = self._find_told(asks, rows) if asked & TOLD else NOBODY_TOLD
        num_edited, num_listed = len(edited), len(told) if most >= 0 else 0
        if not (num_edited or num_listed):
            return Asked(None, NONE, edited, masked, told, num_top, most)
        longest = max(num_edited, num_listed)
        size = self._usual if longest <= self._usual else self._most
        words = np.full(num_words(size), NOTHING, np.int32)
        words[w.MOST] = most
        lists = words[w.HEAD :].reshape(w.NUM_FIELDS, size)
        if num_edited:
            of_edited = rows[edited]
            lists[w.LINE, :num_edited], lists[w.ROW, :num_edited] = edited, of_edited
            if asked & EDITED:
                lists[w.TABLE, :num_edited] = self._tables.places_of(of_edited.tolist())
        if num_listed:
            lists[w.TOLD_LINE, :num_listed], lists[w.NUM_TOP, :num_listed] = told, num_top
        kind = Kind(
            size,
            self._num_programs(num_edited),
            self._num_programs(num_listed),
            has_edits=asked & EDITED != 0,
            has_penalties=asked & PENALIZED != 0,
        )
        return Asked(kind, words, edited, masked, told, num_top, most)

    def _find_told(
        self, asks: npt.NDArray[np.uint8], rows: Int32Array
    ) -> tuple[list[int], list[int], int]:
        """As `Asked` has them."""
        told = (asks & TOLD).nonzero()[0]
        num_top = np.minimum(self._rows.host["logprobs"][rows[told]], self._rows.vocab_size)
        most = -1 if num_top.min() < 0 else int(num_top.max())
        return told.tolist(), num_top.tolist(), most

    def _num_programs(self, num_entries: int) -> int:
        """As many, or more: few numbers, each of which has graphs of its own."""
        if not num_entries:
            return 0
        return min(self._most, max(self._usual, 1 << (num_entries - 1).bit_length()))

    def _send(
        self,
        kind: Kind,
        asked: Asked,
        slot: SampleSlot,
        logits: Tensor,
        positions: Int32Array,
        masks: StepMasks | None,
    ) -> None:
        """What is asked, with what differs from step to step."""
        words = slot.words[: len(asked.words)]
        words[:] = asked.words
        lists, count = words[w.HEAD :].reshape(w.NUM_FIELDS, -1), len(asked.edited)
        lists[w.POSITION, :count] = positions = positions[asked.edited]
        if kind.has_penalties:
            rows = lists[w.ROW, :count]
            lists[w.COUNTED, :count] = self._num_counted[rows]
            self._num_counted[rows] = positions
        if masks is not None:
            lists[w.MASK, asked.masked] = masks.lines
            slot.addresses[w.MASKS // 2] = self._rows.masks.words.data_ptr()
        assert logits.stride(1) == 1
        slot.addresses[w.LOGITS // 2] = logits.data_ptr()
        slot.addresses[w.TABLES // 2] = self._tables.words.data_ptr()
        slot.send(len(words))

    def _launch(self, kind: Kind, dtype: torch.dtype, stride: int) -> None:
        key = kind, dtype, stride
        run = partial(self._run, *key)
        if self._calls is None or kind.num_edited > self._usual:
            run()
        else:
            self._calls.run(key, run)

    def _run(self, kind: Kind, dtype: torch.dtype, stride: int) -> None:
        """From what lies in memory. Capturable, if it has run before."""
        rows, staging = self._rows, self.staging
        wishes = Wishes(
            staging.words[: num_words(kind.size)],
            size=kind.size,
            dtype=dtype,
            stride=stride,
            vocab_size=rows.vocab_size,
            has_edits=kind.has_edits,
        )
        if kind.num_edited:
            self._fused.sample_edited(
                wishes,
                kind.num_edited,
                token_ids=staging.token_ids,
                counts=self._counts_of_rows() if kind.has_penalties else None,
                known=rows.token_ids,
                columns=rows.columns,
                seeds=rows.seeds,
            )
        if kind.num_told:
            self._fused.pack_wished(
                wishes,
                kind.num_told,
                token_ids=staging.token_ids,
                num_top=MAX_LOGPROBS,
                packed=staging.more,
            )

    def _counts_of_rows(self) -> Tensor:
        if self._counts is None:
            shape = self._rows.num_rows + 1, self._rows.vocab_size
            self._counts = torch.empty(shape, dtype=torch.int32, device=self._device)
        return self._counts
