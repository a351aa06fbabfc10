"""Shows a core to viewers, and changes nothing in it: answers `Observe` and `ShowBlock`.

`launch` hands it to the server, whose `Operations` call it. Watched, a step pays for keeping a few
references (`StepLog`); the rest is done per call, bounded, and timed: the answer says how soon to
ask again, so that looking costs the core `COST_SHARE` however large it is. Unwatched for
`WATCH_LEASE_S`, it all stops.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from nanovllm.core.engine_core import EngineCore
from nanovllm.core.sequence import Sequence, Status
from nanovllm.protocol.watch import (
    BlockContents,
    CacheLayout,
    Counters,
    Observation,
    Pace,
    SequenceState,
    SequenceView,
    StepView,
    WaitCause,
)
from nanovllm.watch.step_log import StepLog, uid_of

WATCH_LEASE_S = 15.0  # a step of a long prompt on a CPU takes seconds, and nobody can ask meanwhile
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.125, 2.0
COST_SHARE = 0.006  # of the core's time, for all watchers together
UNSEEN_SHARE = 1.3  # the answer is encoded and sent after it has been timed: what it costs in all
NUM_COSTS = 4
MAX_CELLS = 4096
MAX_RUNNING, MAX_WAITING = 256, 64
MAX_BLOCK_IDS = 4096  # in one answer; what is missing comes with the next
NO_IDS: list[int] = []


@dataclass(slots=True)
class Watcher:
    """What one client has been shown. shown: uid → of sequences listed, what changes when blocks
    shown are no longer theirs, and how many have been shown."""

    seen_at: float
    num_steps: int
    num_ends: int
    last_batch: int = -1
    shown: dict[int, tuple[tuple[int, int], int]] = field(default_factory=dict)


class Observer:
    """Of one `EngineCore`, which a `StepLog` listens to while somebody watches."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.log: StepLog | None = None
        self._watchers: dict[int, Watcher] = {}
        self._costs: deque[float] = deque(maxlen=NUM_COSTS)  # seconds each of the last looks took
        num_blocks = core.blocks.num_blocks - 1
        num_dense, stride, num_cells = num_blocks, 1, num_blocks
        if num_blocks > MAX_CELLS:
            num_dense = MAX_CELLS // 2
            stride = -(-(num_blocks - num_dense) // (MAX_CELLS - num_dense))
            num_cells = num_dense + -(-(num_blocks - num_dense) // stride)
        self._layout = CacheLayout(
            num_blocks,
            core.blocks.block_size,
            num_cells,
            num_dense,
            stride,
            core.scheduler.limits.max_num_batched_tokens,
            core.scheduler.limits.max_num_seqs,
        )

    # ---- Observe

    def observe(self, client_id: int, *, fresh: bool) -> Observation:
        """The state, and what is new to this client."""
        began = time.perf_counter()
        now = time.monotonic()
        log = self._renew(now)
        watcher = None if fresh else self._watchers.get(client_id)
        is_new = watcher is None
        if watcher is None:
            log.steps(0)
            watcher = self._watchers[client_id] = Watcher(now, log.num_steps, log.num_ends)
        watcher.seen_at = now
        sequences, num_hidden = self._sequences(watcher)
        steps, batches, num_lost = _new_steps(log, watcher)
        ended = log.ends(watcher.num_ends)
        watcher.num_ends = log.num_ends
        layout, blocks, pace = self._layout, self._core.blocks, self._core.pace
        ref_counts = blocks.ref_counts(layout.num_dense, layout.stride)
        return Observation(
            fresh=is_new,
            now=now,
            layout=layout,
            counters=self._counters(),
            ref_counts=_as_bytes(ref_counts),
            has_key=blocks.keyed(layout.num_dense, layout.stride),
            sequences=sequences,
            num_hidden=num_hidden,
            steps=steps,
            batches=batches,
            num_lost_steps=num_lost,
            ended=ended,
            pace=Pace(pace.is_allowed, pace.is_held(now), pace.interval_ms(now)),
            interval_s=self._interval(time.perf_counter() - began),
        )

    def _renew(self, now: float) -> StepLog:
        """The log, begun if there is none; it runs for `WATCH_LEASE_S` from now on."""
        expired = [
            client_id
            for client_id, watcher in self._watchers.items()
            if now - watcher.seen_at > WATCH_LEASE_S
        ]
        for client_id in expired:
            del self._watchers[client_id]
        log = self.log
        if log is None:
            self._watchers.clear()
            log = self.log = StepLog(self._core.scheduler, self._stop)
            self._core.listen(log)
        log.watched_until = now + WATCH_LEASE_S
        return log

    def _stop(self) -> None:
        if self.log is not None:
            self._core.forget(self.log)
        self.log = None
        self._watchers.clear()

    def _interval(self, seconds: float) -> float:
        self._costs.append(seconds)
        # The least of the last few: what another program on the machine added is not our cost.
        wanted = min(self._costs) * UNSEEN_SHARE * len(self._watchers) / COST_SHARE
        return min(max(wanted, MIN_INTERVAL_S), MAX_INTERVAL_S)

    def _counters(self) -> Counters:
        status = self._core.status(epoch="", num_clients=0)
        return Counters(
            status.num_free_blocks,
            status.num_running,
            status.num_waiting,
            status.num_paused,
            status.num_preemptions,
            status.num_prompt_tokens,
            status.num_generation_tokens,
            status.num_recomputed_tokens,
            status.prefix_cache_queries,
            status.prefix_cache_hits,
            status.step,
        )

    def _sequences(self, watcher: Watcher) -> tuple[list[SequenceView], int]:
        """Those who run, then those who wait; and how many more there are."""
        scheduler = self._core.scheduler
        running = (scheduler.running + scheduler.paused)[:MAX_RUNNING]
        forks = [fork for one in running if one.forks for fork in one.forks]
        waiting = [*forks, *scheduler.waiting.some(MAX_WAITING)][:MAX_WAITING]
        cause, shown, room = scheduler.waiting.cause, watcher.shown, MAX_BLOCK_IDS
        watcher.shown = {}
        views: list[SequenceView] = []
        for sequence in running:
            uid, table = sequence.order[1], sequence.block_ids
            life = sequence.num_preemptions, 0
            if self._core.blocks.slides:  # some are let go of, and only when others are taken
                table = list(filter(None, table))
                life = sequence.num_preemptions, sequence.capacity
            known_life, num_shown = shown.get(uid, ((0, 0), 0))
            if known_life != life:
                num_shown = 0
            new_ids = NO_IDS
            if len(table) != num_shown:
                new_ids = table[num_shown : num_shown + room]
                room -= len(new_ids)
            watcher.shown[uid] = (life, num_shown + len(new_ids))
            is_paused = sequence.status is Status.PAUSED
            state: SequenceState = "paused" if is_paused else "running"
            views.append(_view(sequence, state, "client" if is_paused else "", num_shown, new_ids))
        views += [_view(one, "waiting", _cause(one, cause), 0, []) for one in waiting]
        parked = scheduler.waiting.some_parked(MAX_WAITING - len(waiting))
        views += [_view(one, "paused", "client", 0, []) for one in parked]
        return views, max(0, self._core.num_unfinished - len(views))

    # ---- ShowBlock

    def show_block(self, block_id: int, *, of_client: int | None = None) -> BlockContents:
        """of_client: only what he knows, since it is of a sequence of his; no hashes.

        Raises `ValueError` if there is no such block.
        """
        blocks, size = self._core.blocks, self._core.blocks.block_size
        if not 1 <= block_id < blocks.num_blocks:
            raise ValueError(f"block_id {block_id} is not in [1, {blocks.num_blocks - 1}]")
        scheduler = self._core.scheduler
        candidates = scheduler.running + scheduler.paused
        holders = [one for one in candidates if block_id in one.block_ids]
        key, parent, token_ids = blocks.prefix_of(block_id) or (b"", b"", list[int]())
        if of_client is not None:
            holders = [one for one in holders if one.client_id == of_client]
            key, parent, token_ids = b"", b"", []
        index = None
        if holders:
            index = holders[0].block_ids.index(block_id) // blocks.num_groups
        if holders and index is not None and not key:
            known = holders[0].token_ids[: holders[0].num_computed]
            token_ids = known[index * size : (index + 1) * size]
        return BlockContents(
            block_id,
            len(holders),
            key.hex(),
            parent.hex(),
            index,
            [uid_of(one) for one in holders],
            token_ids,
        )


def _new_steps(log: StepLog, watcher: Watcher) -> tuple[list[StepView], dict[int, list[int]], int]:
    """Steps that the watcher has not seen, the batches they name, and how many are lost."""
    found = log.steps(watcher.num_steps)
    num_lost = log.num_steps - watcher.num_steps - len(found)
    batches = {view.batch: uids for view, uids in found if view.batch > watcher.last_batch}
    watcher.num_steps = log.num_steps
    if found:
        watcher.last_batch = found[-1][0].batch
    return [view for view, _ in found], batches, num_lost


def _view(
    sequence: Sequence,
    state: SequenceState,
    cause: WaitCause,
    num_shown: int,
    block_ids: list[int],
) -> SequenceView:
    first_at = sequence.first_token_at
    return SequenceView(
        sequence.order[1],
        sequence.client_id,
        sequence.number,
        state,
        cause,
        sequence.queued_at,
        sequence.started_at,
        first_at - sequence.queued_at if first_at else 0.0,
        sequence.num_prompt_tokens,
        len(sequence.token_ids),
        sequence.num_computed,
        sequence.num_cached_tokens,
        sequence.num_preemptions,
        num_shown,
        block_ids,
    )


def _cause(sequence: Sequence, of_queue: WaitCause) -> WaitCause:
    """What a sequence without a row waits for."""
    if sequence.leader is not None and sequence in sequence.leader.forks:
        return "sibling"
    return "results" if sequence.num_pending else of_queue


def _as_bytes(counts: list[int]) -> bytes:
    try:
        return bytes(counts)
    except ValueError:  # more than 255 share a block
        return bytes([min(count, 255) for count in counts])
