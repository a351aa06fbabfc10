"""Finds, on the host, decoding rows that begin with the same blocks: attention reads those once.

`ModelRunner` asks for every plan. Rows share blocks because the prefix cache or a sibling gave them
the same ones, so equal block ids are all there is to compare, and only when the rows change.
"""

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
        if len(plan.rows) < MIN_ROWS:
            return None
        num_blocks = np.array(plan.num_computed, np.int32) // self._block_size
        probe = -(-MIN_KEYS // self._block_size) - 1  # equal here, equal before
        members = (num_blocks > probe) & (np.array(plan.num_scheduled) == 1)
        if members.sum() < MIN_ROWS:
            return None
        rows = np.array(plan.rows)
        probed = self._block_tables[rows, probe]
        block_ids, counts = np.unique(probed[members], return_counts=True)
        members &= probed == block_ids[counts.argmax()]
        if members.sum() < MIN_ROWS:
            return None
        tables = self._block_tables[rows[members], : num_blocks[members].min()]
        differs = (tables != tables[0]).any(0)
        num_equal = int(differs.argmax()) if differs.any() else len(differs)
        num_keys = num_equal * self._block_size // WHOLE_TILES * WHOLE_TILES
        if (int(members.sum()) - 1) * num_keys < MIN_KEYS_SAVED:
            return None
        return SharingRows(num_keys, int(members.argmax()), members)
