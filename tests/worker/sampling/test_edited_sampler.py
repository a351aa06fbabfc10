"""Entries that ask something of their logits: what kernels are handed, step by step, by stand-ins
for them that choose the likeliest of what is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def test_each_entry_gets_the_likeliest_that_its_mask_allows() -> None:
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
        lines = rng.choice(len(rows.masks.words), num_masked, replace=False)
        entries[4, masked] = lines
        allowed = rng.random((num_masked, 32 * NUM_WORDS)) < 0.3
        packed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        rows.masks.words[lines] = torch.from_numpy(packed)
        token_ids = torch.full((10,), UNTOUCHED)
        sampler.sample(logits, token_ids, entries, tables=None, counts=None)
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
    sampler.sample(logits, token_ids, entries, tables=tables, counts=counts)
    assert token_ids.tolist() == [3] * num_entries
    assert plain.memory == (tables, counts)
    assert (sampler._logits is None) == (num_entries > MAX_CAPTURED), "which would take much memory"


class StandInGraph:
    """In place of a CUDA graph: does again what was asked of a sampler while it was captured."""

    captured: "list[StandInGraph]" = []  # noqa: RUF012  of one test
    capturing: "StandInGraph | None" = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for choose, *arguments in self.calls:
            choose(*arguments)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """Those that samplers capture from now on, in order."""
    choose = EditedSampler._choose

    @contextmanager
    def capture(graph: StandInGraph, **_: Any) -> Iterator[None]:
        StandInGraph.capturing = graph
        yield
        StandInGraph.capturing = None
        StandInGraph.captured.append(graph)

    def choose_or_capture(*arguments: Any) -> None:
        if StandInGraph.capturing is None:
            choose(*arguments)
        else:
            StandInGraph.capturing.calls.append((choose, *arguments))

    monkeypatch.setattr(StandInGraph, "captured", [])
    monkeypatch.setattr(EditedSampler, "_choose", choose_or_capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    return StandInGraph.captured


def test_a_kind_is_captured_when_it_comes_again_and_when_tables_move(
    graphs: list[StandInGraph],
) -> None:
    rows, plain = make_rows(), Plain()
    sampler = sampler_of(rows, plain)
    sampler._captures = True  # as on a GPU
    counts, old, new = (torch.zeros(1) for _ in range(3))

    def step(num_entries: int, tables: Tensor | None, counts: Tensor | None) -> None:
        best = len(graphs) + num_entries  # another one than in the step before
        logits = torch.zeros(9, VOCAB_SIZE)
        logits[:, best] = 1.0
        entries = np.zeros((5, num_entries), np.int32)
        entries[0], entries[4] = np.arange(num_entries), NO_MASK
        token_ids = torch.full((9,), UNTOUCHED)
        sampler.sample(logits, token_ids, entries, tables=tables, counts=counts)
        assert token_ids.tolist() == [best] * num_entries + [UNTOUCHED] * (9 - num_entries)
        memory = plain.memory
        assert memory[0] is tables and memory[1] is counts

    # Entries, tables, counts, and how many graphs there are then, and replays.
    for case in [
        (1, None, counts, 0, 0),  # which compiles
        (3, None, counts, 1, 1),  # of the same size, padding included
        (4, None, counts, 1, 2),
        (4, None, None, 1, 2),
        (5, None, counts, 1, 2),
        (8, None, counts, 2, 3),
        (2, old, counts, 2, 3),
        (2, old, counts, 3, 4),
        (2, new, counts, 4, 5),
        (2, new, counts, 4, 6),
        (1, None, counts, 4, 7),
    ]:
        step(*case[:3])
        assert (len(graphs), sum(graph.num_replays for graph in graphs)) == case[3:]


def test_without_memory_for_graphs_kernels_are_launched(
    graphs: list[StandInGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = sampler_of(make_rows(), Plain())
    sampler._captures = True

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "graph", fail)
    logits, token_ids = torch.zeros(2, VOCAB_SIZE), torch.zeros(2, dtype=torch.int64)
    logits[:, 7] = 1.0
    entries = np.array([[0], [1], [2], [NO_EDITS], [NO_MASK]], np.int32)
    for _ in range(3):
        token_ids[:] = UNTOUCHED
        sampler.sample(logits, token_ids, entries, tables=None, counts=None)
        assert token_ids.tolist() == [7, UNTOUCHED]
    assert not graphs and caplog.text.count("no memory for graphs") == 1
