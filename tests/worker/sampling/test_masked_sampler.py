"""Entries that only masks ask something of: what kernels are handed, step by step, by stand-ins for
them that choose the likeliest of what is allowed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.worker.sampling.edit_tables import NO_EDITS, NO_MASK, Entries
from nanovllm.worker.sampling.masked_sampler import MAX_ENTRIES, MaskedSampler
from tests.worker.planning import VOCAB_SIZE, make_rows

NUM_WORDS = -(-VOCAB_SIZE // 32)
UNTOUCHED = -7


class Plain:
    """In place of the kernels."""

    def __init__(self) -> None:
        self.words = torch.empty(0)  # of the entries, as they were last

    def edit_logits(self, logits: Tensor, asking: Entries, *, masks: Tensor, **_: Any) -> Tensor:
        self.words = asking.words.clone()
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


def test_each_entry_gets_the_likeliest_that_its_mask_allows() -> None:
    rng, rows, plain = np.random.default_rng(0), make_rows(), Plain()
    fused: Any = SimpleNamespace(edit_logits=plain.edit_logits, sample_tokens=plain.sample_tokens)
    sampler = MaskedSampler(rows, fused, num_buffers=3, captures=True)
    for num_entries in (1, 3, 4, 2, 5, 8, 7, 3, 1, 6):
        logits = torch.from_numpy(rng.normal(size=(10, VOCAB_SIZE)).astype(np.float32))
        before = logits.clone()
        lines = np.sort(rng.choice(10, num_entries, replace=False)).astype(np.int32)
        of_rows = rng.choice(rows.num_rows, num_entries, replace=False).astype(np.int32)
        positions = rng.integers(1, 20, num_entries).astype(np.int32)
        allowed = rng.random((num_entries, 32 * NUM_WORDS)) < 0.3
        packed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        token_ids = torch.full((10,), UNTOUCHED)
        sampler.sample(logits, token_ids, lines, of_rows, positions, packed)
        assert torch.equal(logits, before), "the model's own are kept"
        expected = [
            int(np.where(one[:VOCAB_SIZE], logits[line].numpy(), -np.inf).argmax())
            for line, one in zip(lines, allowed, strict=True)
        ]
        assert token_ids[torch.from_numpy(lines).long()].tolist() == expected
        assert (token_ids == UNTOUCHED).sum() == 10 - num_entries
        found = rows.token_ids[torch.from_numpy(of_rows).long(), torch.from_numpy(positions).long()]
        assert found.tolist() == expected, "later steps read them there"
        check_padding(plain.words, num_entries, rows.num_rows)


def check_padding(words: Tensor, num_entries: int, num_rows: int) -> None:
    """Of entries that there are not: nothing is asked, and what is chosen goes where it is lost."""
    size = words.shape[1]
    assert size == max(4, 1 << (num_entries - 1).bit_length()) <= MAX_ENTRIES
    assert words[0].tolist() == [*range(size)]
    assert words[4, :num_entries].tolist() == [*range(num_entries)]
    nothing = [num_rows, 0, NO_EDITS, NO_MASK]
    assert words[1:, num_entries:].T.tolist() == [nothing] * (size - num_entries)
    assert words[3].unique().tolist() == [NO_EDITS]
