"""Rows' edits of logits on the device, as words that kernels read: uploaded once per admission.

`device_sampler` owns one. Tables lie one behind the other in one tensor; when it is full, those of
rows that still have theirs are sent again to its beginning, or to a larger one if they are many.
`pack_edits` says what a table looks like.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.logits_processors import RowEdits
from nanovllm.worker.sampling.wishes import NOTHING

LEAST_CAPACITY = 1 << 17


def pack_edits(edits: RowEdits) -> Int32Array:
    """One row's table: 8 words of counts (words of allowed ids, bad words, early ids, min_tokens,
    biases, tokens of bad words), then its parts in this order: allowed ids, a bit each; where each
    bad word's tokens begin, and the end; these tokens, shortest words first; early ids; biased ids;
    biases (float32)."""
    allowed = np.empty(0, np.int32)
    if edits.forbidden is not None:
        bits = np.zeros(-(-len(edits.forbidden) // 32) * 32, bool)
        bits[: len(edits.forbidden)] = ~edits.forbidden
        allowed = np.packbits(bits, bitorder="little").view(np.int32)
    words = sorted(edits.bad_words, key=len)
    starts = np.cumsum([0, *map(len, words)], dtype=np.int32)
    tokens = np.array([token_id for word in words for token_id in word], np.int32)
    early, biased = edits.early_ids.astype(np.int32), edits.biased_ids.astype(np.int32)
    counts = len(allowed), len(words), len(early), edits.min_tokens, len(biased), len(tokens)
    header = np.array([*counts, 0, 0], np.int32)
    biases = edits.biases.astype(np.float32).view(np.int32)
    return np.concatenate((header, allowed, starts, tokens, early, biased, biases))


class EditTables:
    """`words`: [capacity] int32 on the device. live: row → its edits, as they are at each call.
    note_failure: told of a row whose table cannot be made."""

    def __init__(
        self,
        live: Mapping[int, RowEdits],
        device: torch.device,
        note_failure: Callable[[int, Exception], None],
    ) -> None:
        self._note_failure = note_failure
        self.words = torch.zeros(LEAST_CAPACITY, dtype=torch.int32, device=device)
        self._live = live
        self._num_used = 0
        self._held: dict[int, tuple[RowEdits, Int32Array, int]] = {}  # row → table, its place

    def places_of(self, rows: list[int]) -> list[int]:
        """Where the rows' tables begin (`NOTHING`: it has none). What is not there is sent."""
        for row in rows:
            edits = self._live.get(row)
            if edits is not None and (row not in self._held or self._held[row][0] is not edits):
                self._hold(row, edits)
        return [
            self._held[row][2] if row in self._live and row in self._held else NOTHING
            for row in rows
        ]

    def _hold(self, row: int, edits: RowEdits) -> None:
        self._held.pop(row, None)
        try:
            table = pack_edits(edits)
        except Exception as error:
            self._note_failure(row, error)
            return
        if self._num_used + len(table) > len(self.words):
            self._make_room(len(table))
        self._held[row] = edits, table, self._append(table)

    def _append(self, table: Int32Array) -> int:
        sent = torch.from_numpy(table)
        if self.words.device.type == "cuda":
            sent = sent.pin_memory()
        place = self._num_used
        self._num_used += len(table)
        self.words[place : self._num_used].copy_(sent, non_blocking=True)
        return place

    def _make_room(self, num_more: int) -> None:
        """Half of the memory at least is free then. Steps under way read what they have been
        submitted with: all of this happens in stream order."""
        held = [item for item in self._held.items() if self._live.get(item[0]) is item[1][0]]
        needed = num_more + sum(len(table) for _, (_, table, _) in held)
        if 2 * needed > len(self.words):
            self.words = torch.zeros(2 * needed, dtype=torch.int32, device=self.words.device)
        self._num_used = 0
        self._held = {row: (edits, table, self._append(table)) for row, (edits, table, _) in held}
