"""One watcher of the core for all viewers of a frontend, and what each of them is sent.

Servers and `nanovllm top` own one. Nothing is asked of the core while there is no viewer; however
many there are, it is asked once per interval, which the core itself decides. A viewer that reads
too slowly misses updates and gets a snapshot instead: nothing queues up.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator

import msgspec

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.protocol.watch import CacheLayout, Counters, EndView, Observation, SequenceView
from nanovllm.watch.events import (
    ChunkEvent,
    Counts,
    EndEvent,
    EngineEvent,
    EngineView,
    Layout,
    PaceEvent,
    Progress,
    SequenceEvent,
    StepEvent,
    Table,
)

MAX_BEHIND = 8  # updates that wait for a viewer
NUM_STEPS_KEPT = 200  # for the snapshots of those who come later
SILENCE_S = 1.0


class Viewer:
    """Updates waiting for one viewer; `is_behind`: some are missing, or none has come yet."""

    def __init__(self) -> None:
        self.waiting: deque[EngineEvent] = deque()
        self.is_behind = True
        self.news = asyncio.Event()


class EngineFeed:
    """`events` for any number of viewers. view: what `Layout` tells them."""

    def __init__(self, llm: AsyncLLM, *, view: EngineView = "full") -> None:
        self._llm = llm
        self._view = view
        self._viewers: set[Viewer] = set()
        self._polling: asyncio.Task[None] | None = None
        self._mirror: Mirror | None = None

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    async def events(self) -> AsyncGenerator[EngineEvent | None, None]:
        """A snapshot, then updates, until the caller leaves; None when there was none for a while.

        Raises what `AsyncLLM.observe` raises.
        """
        viewer = Viewer()
        self._viewers.add(viewer)
        if self._polling is None:
            self._mirror = None
            self._polling = asyncio.create_task(self._poll())
        polling = self._polling
        try:
            while True:
                if not await _within(viewer.news, SILENCE_S):
                    yield None
                    continue
                viewer.news.clear()
                if polling.done():
                    await polling  # raises why
                    return
                if viewer.is_behind and self._mirror is not None:
                    viewer.waiting.clear()
                    viewer.is_behind = False
                    yield self._mirror.snapshot()
                while viewer.waiting:
                    yield viewer.waiting.popleft()
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._polling is polling:
                self._polling = None
                polling.cancel()
                await asyncio.gather(polling, return_exceptions=True)

    async def _poll(self) -> None:
        try:
            while True:
                began = time.monotonic()
                self._take_in(await self._llm.observe(fresh=self._mirror is None))
                assert self._mirror is not None
                wait_s = began + self._mirror.interval_s - time.monotonic()
                await asyncio.sleep(max(wait_s, self._mirror.interval_s / 2))
        finally:
            if self._polling is asyncio.current_task():  # else a viewer has come and begun anew
                self._polling = None
            for viewer in self._viewers:
                viewer.news.set()

    def _take_in(self, seen: Observation) -> None:
        if seen.fresh or self._mirror is None:
            self._mirror = Mirror(self._llm, seen.layout, self._view)
            for viewer in self._viewers:
                viewer.is_behind = True
        update = self._mirror.apply(seen)
        for viewer in self._viewers:
            if len(viewer.waiting) >= MAX_BEHIND:
                viewer.is_behind = True
            if not viewer.is_behind:
                viewer.waiting.append(update)
            viewer.news.set()


class Mirror:
    """The core's state as last seen, in the words of events."""

    def __init__(self, llm: AsyncLLM, layout: CacheLayout, view: EngineView) -> None:
        info = llm.info
        self._llm = llm
        self._layout = Layout(
            model=info.served_model_name,
            device=info.worker.device,
            view=view,
            max_model_len=info.worker.max_model_len,
            **msgspec.structs.asdict(layout),
        )
        self._cells = [0] * layout.num_cells
        self._sequences: dict[int, SequenceEvent] = {}
        self._tables: dict[int, list[int]] = {}
        self._batches: dict[int, list[int]] = {}
        self._steps: deque[StepEvent] = deque(maxlen=NUM_STEPS_KEPT)
        self._last: EngineEvent | None = None
        self.interval_s = 0.0

    def apply(self, seen: Observation) -> EngineEvent:
        """What `seen` changes."""
        self.interval_s = seen.interval_s
        sequences, progress = self._apply_sequences(seen.sequences)
        shown = {view.uid for view in seen.sequences}
        gone = [uid for uid in self._sequences if uid not in shown]
        for uid in gone:
            del self._sequences[uid]
            self._tables.pop(uid, None)
        steps = [
            StepEvent(
                *(step.step, step.started_at, step.ended_at, step.budget, step.num_decodes),
                [ChunkEvent(one.uid, one.start, one.num_tokens) for one in step.chunks],
                *(step.batch, step.preempted),
            )
            for step in seen.steps
        ]
        self._steps += steps
        self._batches |= seen.batches
        oldest = self._steps[0].batch if self._steps else 0
        for batch in [batch for batch in self._batches if batch < oldest]:
            del self._batches[batch]
        self._last = EngineEvent(
            kind="update",
            now=seen.now,
            interval_s=seen.interval_s,
            counters=_counts(seen.counters),
            cells=self._apply_cells(seen),
            sequences=sequences,
            progress=progress,
            tables=self._apply_tables(seen.sequences),
            gone=gone,
            num_hidden=seen.num_hidden,
            steps=steps,
            batches=seen.batches,
            num_lost_steps=seen.num_lost_steps,
            ended=[self._end(end) for end in seen.ended],
            pace=PaceEvent(*msgspec.structs.astuple(seen.pace)),
        )
        return self._last

    def _end(self, end: EndView) -> EndEvent:
        uid, client_id, number, *rest = msgspec.structs.astuple(end)
        return EndEvent(uid, self._llm.request_id_of(client_id, number), *rest)

    def snapshot(self) -> EngineEvent:
        """The whole state."""
        assert self._last is not None
        cells = self._cells
        return msgspec.structs.replace(
            self._last,
            kind="snapshot",
            layout=self._layout,
            cells=[one for cell, state in enumerate(cells) if state for one in (cell, state)],
            sequences=list(self._sequences.values()),
            progress=[],
            tables=[Table(uid, 0, list(ids)) for uid, ids in self._tables.items() if ids],
            gone=[],
            steps=list(self._steps),
            batches=dict(self._batches),
        )

    def _apply_cells(self, seen: Observation) -> list[int]:
        pairs = zip(seen.ref_counts, seen.has_key, strict=True)
        states = [2 * count + has_key for count, has_key in pairs]
        changes: list[int] = []
        if states != self._cells:
            for cell, (old, new) in enumerate(zip(self._cells, states, strict=True)):
                if old != new:
                    changes += (cell, new)
            self._cells = states
        return changes

    def _apply_tables(self, views: list[SequenceView]) -> list[Table]:
        changes: list[Table] = []
        for view in views:
            table = self._tables.setdefault(view.uid, [])
            if view.block_ids or len(table) > view.num_shown:
                table[view.num_shown :] = view.block_ids
                changes.append(Table(view.uid, view.num_shown, view.block_ids))
        return changes

    def _apply_sequences(
        self, views: list[SequenceView]
    ) -> tuple[list[SequenceEvent], list[Progress]]:
        changed: list[SequenceEvent] = []
        progress: list[Progress] = []
        for view in views:
            old = self._sequences.get(view.uid)
            if old is not None and _same_but_for_progress(old, view):
                if (old.num_tokens, old.num_computed) != (view.num_tokens, view.num_computed):
                    old.num_tokens, old.num_computed = view.num_tokens, view.num_computed
                    progress.append(Progress(view.uid, view.num_tokens, view.num_computed))
                continue
            request_id = self._llm.request_id_of(view.client_id, view.number)
            new = SequenceEvent(
                view.uid,
                request_id or (None if old is None else old.request_id),
                view.state,
                view.cause,
                view.queued_at,
                view.started_at,
                view.ttft_s,
                view.num_prompt_tokens,
                view.num_tokens,
                view.num_computed,
                view.num_cached_tokens,
                view.num_preemptions,
            )
            self._sequences[view.uid] = new
            changed.append(msgspec.structs.replace(new))
        return changed, progress


def _same_but_for_progress(old: SequenceEvent, view: SequenceView) -> bool:
    return (
        old.state == view.state
        and old.cause == view.cause
        and old.started_at == view.started_at
        and old.ttft_s == view.ttft_s
        and old.num_preemptions == view.num_preemptions
    )


def _counts(counters: Counters) -> Counts:
    return Counts(*msgspec.structs.astuple(counters))


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was set by then."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
