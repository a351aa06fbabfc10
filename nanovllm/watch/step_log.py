"""The last steps and ends, written down while somebody watches.

`EngineCore` tells it what it does, `observer` reads it. On the path of a step it only keeps
references; what they mean is worked out when it is asked for. All that it holds is bounded.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from nanovllm.core.clients import why_of
from nanovllm.core.events import CoreListener
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import NOBODY, ScheduledStep, Sequence, StepOutputs
from nanovllm.protocol.plan import StepResult
from nanovllm.protocol.watch import Chunk, EndView, StepView

MAX_STEPS = 256
MAX_ENDS = 256
MAX_ENTRIES = 4096  # of batches that differ, in one answer
NUM_LOOKED_AT = 64  # of the latest in the queue, beyond as many as were preempted
T = TypeVar("T")


NOBODY_PREEMPTED: list[int] = []


class Logged(NamedTuple):
    """A finished step. The lists are the plan's own, which nobody changes any more; the rest of
    the plan (tokens, masks) is let go."""

    step: int
    started_at: float
    ended_at: float
    sequences: list[Sequence]
    num_computed: list[int]
    num_scheduled: list[int]
    budget: int
    has_new_rows: bool
    preempted: list[int]


class StepLog(CoreListener):
    """`on_unwatched` is called when a step finds that nobody has asked until `watched_until`."""

    def __init__(self, scheduler: Scheduler, on_unwatched: Callable[[], None]) -> None:
        self.watched_until = 0.0
        self.num_steps = self.num_ends = 0  # ever written down
        self._scheduler = scheduler
        self._on_unwatched = on_unwatched
        self._num_preemptions = scheduler.num_preemptions
        self._preempted: dict[int, list[int]] = {}  # by step in flight
        self._last_result_at = 0.0
        self._raw: deque[Logged] = deque(maxlen=MAX_STEPS)
        self._num_new = 0  # since `steps` was called, also those that `_raw` has dropped
        self._views: deque[tuple[StepView, list[int]]] = deque(maxlen=MAX_STEPS)
        self._ends: deque[EndView] = deque(maxlen=MAX_ENDS)
        self._batch: list[Sequence] = []
        self._batch_uids: list[int] = []
        self._num_batches = 0

    # ---- what `EngineCore` tells

    def on_submit(self, step: ScheduledStep) -> None:
        step.submitted_at = now = time.monotonic()
        if now > self.watched_until:
            self._on_unwatched()
        num_preemptions = self._scheduler.num_preemptions
        if num_preemptions != self._num_preemptions:
            most = num_preemptions - self._num_preemptions
            latest = self._scheduler.waiting.latest(most + NUM_LOOKED_AT)
            uids = [uid_of(one) for one in latest if one.num_preemptions]
            self._preempted[step.plan.step] = uids[:most]
            self._num_preemptions = num_preemptions

    def on_result(
        self, step: ScheduledStep, result: StepResult, outputs: StepOutputs, now: float
    ) -> None:
        self._log(step, now)
        if outputs.finished:
            self.on_end(outputs.finished)

    def on_step_failed(self, step: ScheduledStep, error: Exception, now: float) -> None:
        self._log(step, now)

    def _log(self, step: ScheduledStep, now: float) -> None:
        if step.submitted_at:  # else it was on its way before anybody watched
            plan = step.plan
            started, last = step.submitted_at, self._last_result_at
            preempted = NOBODY_PREEMPTED
            if self._preempted:
                preempted = self._preempted.pop(plan.step, preempted)
            self._raw.append(
                Logged(
                    plan.step,
                    started if started > last else last,
                    now,
                    step.sequences,
                    plan.num_computed,
                    plan.num_scheduled,
                    step.budget,
                    bool(plan.new_rows),
                    preempted,
                )
            )
            self._num_new += 1
        self._last_result_at = now

    def on_end(self, sequences: list[Sequence]) -> None:
        now = time.monotonic()
        for sequence in sequences:
            if sequence.tenant is NOBODY:
                continue  # it never came to the scheduler: it has no uid
            why = why_of(sequence, now)
            end = EndView(
                uid_of(sequence),
                sequence.client_id,
                sequence.number,
                sequence.finish_reason or "",
                sequence.queued_at,
                now,
                sequence.num_prompt_tokens,
                len(sequence.token_ids),
                sequence.num_cached_tokens,
                sequence.num_preemptions,
                why.queued_ms,
                why.seats_ms,
                why.budget_ms,
                why.kv_ms,
                why.ttft_ms,
                why.inter_token_ms,
            )
            self._ends.append(end)
            self.num_ends += 1

    # ---- what `Observer` asks

    def steps(self, since: int) -> list[tuple[StepView, list[int]]]:
        """Steps after the first `since`, as far as they are still there, each with its batch."""
        for logged, is_same in self._affordable():
            self._views.append(self._view(logged, is_same))
        self.num_steps += self._num_new
        self._num_new = 0
        return _last(self._views, self.num_steps - since)

    def ends(self, since: int) -> list[EndView]:
        """Likewise, the sequences that have ended."""
        return _last(self._ends, self.num_ends - since)

    def _affordable(self) -> list[tuple[Logged, bool]]:
        """The latest steps, as many as can be worked out in bounded time; the others are lost.

        With each, whether its batch is that of the step before.
        """
        room, chosen = MAX_ENTRIES, list[tuple[Logged, bool]]()
        while self._raw and room > 0:
            logged = self._raw.pop()
            before = self._raw[-1].sequences if self._raw else self._batch
            is_same = logged.sequences == before
            room -= 1 if is_same else len(logged.sequences)
            chosen.append((logged, is_same))
        if self._raw:  # none of those before may be taken for the neighbours of these
            self._raw.clear()
            self._views.clear()
            chosen[-1] = (chosen[-1][0], False)
        chosen.reverse()
        return chosen

    def _view(self, logged: Logged, is_same: bool) -> tuple[StepView, list[int]]:
        sequences = logged.sequences
        if not is_same:
            self._batch, self._batch_uids = sequences, [one.order[1] for one in sequences]
            self._num_batches += 1
        chunks: list[Chunk] = []
        if logged.has_new_rows or sum(logged.num_scheduled) != len(sequences):
            entries = zip(sequences, logged.num_computed, logged.num_scheduled, strict=True)
            chunks = [
                Chunk(uid_of(one), start, num_tokens)
                for one, start, num_tokens in entries
                if num_tokens > 1 or start < one.num_prompt_tokens
            ]
        view = StepView(
            logged.step,
            logged.started_at,
            logged.ended_at,
            logged.budget,
            len(sequences) - len(chunks),
            chunks,
            self._num_batches,
            logged.preempted,
        )
        return view, self._batch_uids


def uid_of(sequence: Sequence) -> int:
    """Its number of arrival, as `Scheduler.add` gave it out."""
    return sequence.order[1]


def _last(ring: deque[T], count: int) -> list[T]:
    return list(ring)[-count:] if count > 0 else []
