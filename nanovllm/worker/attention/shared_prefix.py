"""Finds, on the host, decoding rows that begin with the same blocks: attention reads those once.

`ModelRunner` asks for every plan. Rows share blocks because the prefix cache or a sibling gave them
the same ones, so equal block ids are all there is to compare, and only when the rows change. Also
finds rows that share blocks with those that write them in the same step.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanovllm.protocol.plan import StepPlan

Int32Array = npt.NDArray[np.int32]

MIN_KEYS = 256  # shorter prefixes are not worth a launch per layer
MIN_ROWS = 4
MIN_KEYS_SAVED = 8192  # reads of a key and a value, per layer, that are worth that launch
WHOLE_TILES = 64  # keys the kernel reads at a time


@dataclass(frozen=True, slots=True)
class SharingRows:
    """Entries of a plan whose rows share `num_keys` leading keys."""

    num_keys: int
    leader: int  # one of them
    members: npt.NDArray[np.bool_]  # [entries of the plan]


class PrefixFinder:
    """`block_tables`: the host's copy, [num_rows + 1, max_num_blocks], kept by `RequestRows`."""

    def __init__(self, block_tables: Int32Array, *, block_size: int) -> None:
        self._block_tables = block_tables
        self._block_size = block_size
        self._rows: list[int] = []
        self._num_scheduled: list[int] = []
        self._found: SharingRows | None = None

    def find(self, plan: StepPlan) -> SharingRows | None:
        """The largest such group, if it saves more than it costs. The plan has been recorded."""
        same = plan.rows == self._rows and plan.num_scheduled == self._num_scheduled
        if not same or plan.new_rows:
            self._rows, self._num_scheduled = plan.rows, plan.num_scheduled
            self._found = self._search(plan)
        return self._found

    def _search(self, plan: StepPlan) -> SharingRows | None:
        """In lists for as long as it is likely that too few share: mostly it ends there."""
        probe = -(-MIN_KEYS // self._block_size) - 1  # equal here, equal before
        least = (probe + 1) * self._block_size
        starts, counts = plan.num_computed, plan.num_scheduled
        entries = [
            entry
            for entry, (start, count) in enumerate(zip(starts, counts, strict=True))
            if start >= least and count == 1
        ]
        if len(entries) < MIN_ROWS:
            return None
        probed = self._block_tables[[plan.rows[entry] for entry in entries], probe].tolist()
        block_id, num_members = Counter(probed).most_common(1)[0]
        if num_members < MIN_ROWS:
            return None
        sharing = [one for one, found in zip(entries, probed, strict=True) if found == block_id]
        num_blocks = min(starts[entry] for entry in sharing) // self._block_size
        tables = self._block_tables[[plan.rows[entry] for entry in sharing], :num_blocks]
        differs = (tables != tables[0]).any(0)
        num_equal = int(differs.argmax()) if differs.any() else len(differs)
        num_keys = num_equal * self._block_size // WHOLE_TILES * WHOLE_TILES
        if (num_members - 1) * num_keys < MIN_KEYS_SAVED:
            return None
        members = np.zeros(len(starts), np.bool_)
        members[sharing] = True
        return SharingRows(num_keys, sharing[0], members)


def reads_new_blocks(plan: StepPlan, tables: Iterable[tuple[Int32Array, int]]) -> bool:
    """Whether a row that is new begins with blocks which other rows of the plan write.

    The prefix cache hands out blocks as soon as they are planned. tables: the host's copies,
    [num_rows + 1, blocks], of each group of layers, with the size of its blocks.
    """
    if not plan.new_rows or len(plan.rows) == 1:
        return False
    new = {one.row for one in plan.new_rows}
    spans = list(zip(plan.rows, plan.num_computed, plan.num_scheduled, strict=True))
    begun = [(row, start) for row, start, _ in spans if start and row in new]
    if not begun:
        return False
    for table, size in tables:
        written = [table[row, start // size : -(-(start + n) // size)] for row, start, n in spans]
        read = [table[row, : start // size] for row, start in begun]
        found = np.intersect1d(np.concatenate(written), np.concatenate(read))
        if found.any():  # 0 is no block
            return True
    return False
