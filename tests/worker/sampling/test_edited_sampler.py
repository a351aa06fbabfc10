"""Entries that ask something of their logits: what kernels are handed, step by step, by stand-ins
for them that choose the likeliest of what is allowed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm.worker.request_rows import RequestRows
from nanovllm.worker.sampling.columns import Int32Array
from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, Entries
from nanovllm.worker.sampling.edited_sampler import LEAST_ENTRIES, MAX_CAPTURED, EditedSampler
from tests.worker.planning import VOCAB_SIZE, make_rows

NUM_WORDS = -(-VOCAB_SIZE // 32)
UNTOUCHED = -7


class Plain:
    """In place of the kernels."""

    def __init__(self) -> None:
        self.words = torch.empty(0)  # of the entries, as they were last
        self.memory: tuple[Tensor | None, Tensor | None] = None, None  # tables and counts

    def edit_logits(
        self, logits: Tensor, asking: Entries, *, masks: Tensor, counts: Tensor | None, **_: Any
    ) -> Tensor:
        self.words, self.memory = asking.words.clone(), (asking.tables, counts)
        edited = logits.clone()
        for entry, mask in enumerate(asking.words[4].tolist()):
            if mask != NO_MASK:
                words = masks[mask].numpy()
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
                edited[entry, torch.from_numpy(bits) == 0] = -torch.inf
        return edited

    def sample_tokens(
        self, edited: Tensor, *, rows: Tensor, positions: Tensor, known: Tensor, out: Any, **_: Any
    ) -> None:
        chosen, lines = out
        chosen[lines.long()] = edited.argmax(-1)
        known[rows.long(), positions.long()] = edited.argmax(-1).int()


def sampler_of(rows: RequestRows, plain: Plain) -> EditedSampler:
    fused: Any = SimpleNamespace(edit_logits=plain.edit_logits, sample_tokens=plain.sample_tokens)
    return EditedSampler(rows, fused, num_buffers=3, captures=True)


@pytest.mark.parametrize("num_more_words", [0, 3])
def test_each_entry_gets_the_likeliest_that_its_mask_allows(num_more_words: int) -> None:
    """num_more_words: of masks, than ids need."""
    rng, rows, plain = np.random.default_rng(0), make_rows(), Plain()
    sampler = sampler_of(rows, plain)
    for num_entries in (1, 3, 4, 2, 5, 8, 7, 3, 1, 6):
        logits = torch.from_numpy(rng.normal(size=(10, VOCAB_SIZE)).astype(np.float32))
        before = logits.clone()
        entries = np.empty((5, num_entries), np.int32)
        entries[0] = np.sort(rng.choice(10, num_entries, replace=False))
        entries[1] = rng.choice(rows.num_rows, num_entries, replace=False)
        entries[2] = rng.integers(1, 20, num_entries)
        entries[3], entries[4] = NO_EDITS, NO_MASK
        num_masked = int(rng.integers(0, num_entries + 1))
        masked = np.sort(rng.choice(num_entries, num_masked, replace=False))
        entries[4, masked] = np.arange(num_masked)
        allowed = rng.random((num_masked, 32 * (NUM_WORDS + num_more_words))) < 0.3
        packed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        token_ids = torch.full((10,), UNTOUCHED)
        masks = packed if num_masked else None
        sampler.sample(logits, token_ids, entries, masks, tables=None, counts=None)
        assert torch.equal(logits, before), "the model's own are kept"
        best = logits[torch.from_numpy(entries[0]).long()].numpy()
        best[masked] = np.where(allowed[:, :VOCAB_SIZE], best[masked], -np.inf)
        expected = best.argmax(1).tolist()
        assert token_ids[torch.from_numpy(entries[0]).long()].tolist() == expected
        assert (token_ids == UNTOUCHED).sum() == 10 - num_entries
        places = (torch.from_numpy(one).long() for one in entries[1:3])
        assert rows.token_ids[tuple(places)].tolist() == expected, "later steps read them there"
        check_padding(plain.words, entries, rows.num_rows)


def check_padding(words: Tensor, entries: Int32Array, num_rows: int) -> None:
    """Of entries that there are not: nothing is asked, and what is chosen goes where it is lost."""
    size, num_entries = words.shape[1], entries.shape[1]
    assert size == max(LEAST_ENTRIES, 1 << (num_entries - 1).bit_length())
    assert words[0].tolist() == [*range(size)], "whose logits have been copied"
    assert words[1:, :num_entries].tolist() == entries[1:].tolist()
    nothing = [num_rows, 0, NO_EDITS, NO_MASK]
    assert words[1:, num_entries:].T.tolist() == [nothing] * (size - num_entries)


@pytest.mark.parametrize("num_entries", [MAX_CAPTURED, MAX_CAPTURED + 1])
def test_more_entries_than_a_graph_has_are_sampled_all_the_same(num_entries: int) -> None:
    rows, plain = make_rows(), Plain()
    sampler = sampler_of(rows, plain)
    logits = torch.arange(num_entries * VOCAB_SIZE).view(num_entries, -1).float()
    logits[:, 3] = 1e9
    entries = np.zeros((5, num_entries), np.int32)
    entries[0], entries[2] = np.arange(num_entries)[::-1], 1
    entries[4] = NO_MASK
    token_ids = torch.full((num_entries,), UNTOUCHED)
    tables, counts = torch.zeros(1), torch.zeros(2)
    sampler.sample(logits, token_ids, entries, None, tables=tables, counts=counts)
    assert token_ids.tolist() == [3] * num_entries
    assert plain.memory == (tables, counts)
    assert (sampler._logits is None) == (num_entries > MAX_CAPTURED), "which would take much memory"
