"""An engine as its events tell it: what `screen.py` draws."""

from collections import deque

import msgspec

from nanovllm.watch.events import (
    Counts,
    EngineEvent,
    Layout,
    SequenceEvent,
    StepEvent,
)

RATE_S = 1.0  # tokens per second are counted over this
NUM_STEPS = 400
NUM_TIMES = 100


class State:
    """Changes with `apply`; empty before the first event."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.counters: Counts | None = None
        self.cells: list[int] = []
        self.owners: dict[int, int] = {}  # block → the uid of one who holds it
        self.sequences: dict[int, SequenceEvent] = {}
        self.num_hidden = 0
        self.num_lost_steps = 0
        self.steps: deque[StepEvent] = deque(maxlen=NUM_STEPS)
        self.ttfts_ms: deque[float] = deque(maxlen=NUM_TIMES)
        self.between_ms: deque[float] = deque(maxlen=NUM_TIMES)
        self._tables: dict[int, list[int]] = {}
        self._history: deque[tuple[float, Counts]] = deque()

    def apply(self, event: EngineEvent) -> None:
        """Take in one event, a snapshot first."""
        if event.kind == "snapshot":
            assert isinstance(event.layout, Layout)
            lost = self.num_lost_steps
            self.__init__()  # type: ignore[misc]
            self.layout, self.num_lost_steps = event.layout, lost
            self.cells = [0] * event.layout.num_cells
        for cell, state in zip(event.cells[::2], event.cells[1::2], strict=True):
            self.cells[cell] = state
        for one in event.sequences:
            self.sequences[one.uid] = one
        for progress in event.progress:
            self.sequences[progress.uid].num_tokens = progress.num_tokens
            self.sequences[progress.uid].num_computed = progress.num_computed
        for table in event.tables:
            self._tables.setdefault(table.uid, [])[table.index :] = table.block_ids
        for uid in event.gone:
            self.sequences.pop(uid, None)
            self._tables.pop(uid, None)
        if event.tables or event.gone:
            self.owners = {block: uid for uid, ids in self._tables.items() for block in ids}
        self._apply_steps(event.steps)
        self.ttfts_ms += [end.ttft_ms for end in event.ended if end.ttft_ms is not None]
        self.num_hidden = event.num_hidden
        self.num_lost_steps += event.num_lost_steps
        self.counters = event.counters
        self._history.append((event.now, event.counters))
        while len(self._history) > 2 and self._history[1][0] <= event.now - RATE_S:
            self._history.popleft()

    def _apply_steps(self, steps: list[StepEvent]) -> None:
        for step in steps:
            before = self.steps[-1].ended_at if self.steps else 0.0
            self.steps.append(step)
            if step.num_decodes and step.ended_at - before < RATE_S:
                self.between_ms.append((step.ended_at - before) * 1e3)

    @property
    def tokens_per_s(self) -> float:
        """Generated, of all clients, over the last second."""
        if len(self._history) < 2:
            return 0.0
        (then, before), (now, after) = self._history[0], self._history[-1]
        return (after.num_generation_tokens - before.num_generation_tokens) / max(now - then, 1e-3)

    @property
    def hit_rate(self) -> float | None:
        """Of prompt tokens, since the core's start."""
        counters = self.counters
        if counters is None or not counters.prefix_cache_queries:
            return None
        return counters.prefix_cache_hits / counters.prefix_cache_queries

    def block_of(self, cell: int) -> int:
        """The block that a cell stands for."""
        assert self.layout is not None
        dense = self.layout.num_dense
        return cell + 1 if cell < dense else dense + 1 + (cell - dense) * self.layout.stride

    def copy_of_sequences(self) -> list[SequenceEvent]:
        """Those who run first, each in order of arrival."""
        order = {"running": 0, "paused": 1, "waiting": 2}
        found = sorted(self.sequences.values(), key=lambda one: (order[one.state], one.uid))
        return [msgspec.structs.replace(one) for one in found]
