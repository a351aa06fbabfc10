"""Rows' edits as words for kernels: what a table holds, and where each row's is."""

import numpy as np
import torch

from nanovllm.worker.sampling.edit_tables import LEAST_CAPACITY, EditTables, pack_edits
from nanovllm.worker.sampling.logits_processors import RowEdits
from nanovllm.worker.sampling.wishes import NOTHING

CPU = torch.device("cpu")


def edits(
    *,
    allowed: set[int] | None = None,
    vocab_size: int = 40,
    bad_words: list[list[int]] | None = None,
    early: list[int] | None = None,
    min_tokens: int = 0,
    biases: dict[int, float] | None = None,
) -> RowEdits:
    forbidden = None
    if allowed is not None:
        forbidden = np.array([token_id not in allowed for token_id in range(vocab_size)])
    return RowEdits(
        forbidden=forbidden,
        bad_words=bad_words or [],
        early_ids=np.array(early or [], np.int64),
        min_tokens=min_tokens,
        biased_ids=np.array([*(biases or {})], np.int64),
        biases=np.array([*(biases or {}).values()], np.float32),
    )


def test_a_table_holds_counts_and_then_its_parts() -> None:
    words = pack_edits(
        edits(
            allowed={0, 31, 32, 39},
            bad_words=[[7, 8, 9], [5], [3, 4]],
            early=[2, 6],
            min_tokens=11,
            biases={1: 0.5, 4: -2.0},
        )
    ).tolist()
    assert words[:8] == [2, 3, 2, 11, 2, 6, 0, 0]
    low, high = words[8:10]
    assert low & 0xFFFFFFFF == 1 | 1 << 31 and high == 1 | 1 << 7
    assert words[10:14] == [0, 1, 3, 6], "where each bad word begins, the shortest first"
    assert words[14:20] == [5, 3, 4, 7, 8, 9]
    assert words[20:22] == [2, 6] and words[22:24] == [1, 4]
    assert np.array(words[24:], np.int32).view(np.float32).tolist() == [0.5, -2.0]
    assert pack_edits(edits(allowed=set(), vocab_size=64)).tolist() == [2, *[0] * 10]
    assert pack_edits(edits()).tolist() == [0] * 9


class Tables:
    """`EditTables`, with what it is told of."""

    def __init__(self) -> None:
        self.live: dict[int, RowEdits] = {}
        self.failed: list[tuple[int, str]] = []
        self.tables = EditTables(self.live, CPU, self._note)

    def _note(self, row: int, error: Exception) -> None:
        self.failed.append((row, type(error).__name__))

    def check(self, rows: list[int]) -> list[int]:
        """The places of these, each of which must hold the row's present edits."""
        places = self.tables.places_of(rows)
        for row, place in zip(rows, places, strict=True):
            if place != NOTHING:
                expected = pack_edits(self.live[row])
                assert self.tables.words[place : place + len(expected)].tolist() == [*expected]
        return places


def test_what_is_there_stays_where_it_is_and_what_has_changed_is_sent() -> None:
    tables = Tables()
    first, second = edits(early=[1, 2], min_tokens=3), edits(biases={4: 1.0})
    tables.live |= {0: first, 2: second}
    size = len(pack_edits(first))
    assert tables.check([0, 1, 2]) == [0, NOTHING, size]
    assert tables.check([2, 0]) == [size, 0]
    tables.live[0] = edits(biases={9: 2.0})
    assert tables.check([0, 2]) == [size + len(pack_edits(second)), size]
    del tables.live[2]
    assert tables.check([2]) == [NOTHING]
    tables.live[2] = second
    assert tables.check([2]) == [size], "the same edits again"


def test_a_row_whose_table_cannot_be_made_is_told_and_has_none() -> None:
    tables = Tables()
    tables.live |= {0: edits(biases={1: 1.0}), 1: edits(bad_words=[["x"]])}  # type: ignore[list-item]
    assert tables.check([0, 1]) == [0, NOTHING]
    assert tables.failed == [(1, "ValueError")]
    tables.live[0] = tables.live[1]
    assert tables.tables.places_of([0]) == [NOTHING], "nor has it the one from before"


def test_when_memory_is_full_those_who_have_theirs_still_move_together() -> None:
    tables = Tables()
    wide = edits(early=[*range(LEAST_CAPACITY // 4 - 9)])  # with its head a quarter of it
    quarter = LEAST_CAPACITY // 4
    tables.live |= {row: wide for row in (0, 1, 2)}
    assert tables.check([0, 1, 2]) == [0, quarter, 2 * quarter]
    memory = tables.tables.words
    tables.live[3] = wide
    assert tables.check([0, 3]) == [0, 3 * quarter]
    for row in (0, 1, 3):
        del tables.live[row]
    tables.live[4] = wide
    assert tables.check([2, 4]) == [0, quarter], "half of it is free again"
    assert tables.tables.words is memory, "which graphs read"
    tables.live |= {5: wide, 6: wide, 7: wide}
    tables.check([2, 4, 5, 6, 7])
    assert tables.tables.words is not memory and len(tables.tables.words) == 10 * quarter
    tables.live[8] = edits(early=[*range(3 * LEAST_CAPACITY)])
    tables.check([2, 4, 8])
    assert len(tables.tables.words) >= 2 * 3 * LEAST_CAPACITY
