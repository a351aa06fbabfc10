"""Whether a request may queue, and until when its sequences may take.

`EngineCore` asks before it adds, and every turn for what has expired. A refusal says when to try
again: after as long as the queue now takes to move one place on.
"""

import heapq

from nanovllm.config import ServiceConfig
from nanovllm.core.sequence import Sequence
from nanovllm.limits import MAX_DEADLINE_MS
from nanovllm.protocol.messages import AddRequest

MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
MAX_DEAD = 64  # deadlines of ended sequences, besides as many as there are live ones
SMOOTHING = 0.2  # weight of the newest start in the mean time between starts


class OverloadedError(Exception):
    """The queue is full. Not the request's fault, so no `ValueError`."""

    def __init__(self, retry_after_s: float, *, draining: bool = False) -> None:
        super().__init__(f"try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s
        self.draining = draining


class Admission:
    """Caps on what waits to start; None is no cap."""

    def __init__(self, config: ServiceConfig) -> None:
        self._max_requests = config.max_queued_requests
        self._max_tokens = config.max_queued_tokens
        self._mean_gap_s = 1.0  # between two sequences that start
        self._last_start = 0.0
        self.num_overloaded = 0

    def check(self, request: AddRequest, *, num_queued: int, num_queued_tokens: int) -> None:
        """Raises `OverloadedError`. What was under way before may always go on, and an empty queue
        takes whatever is valid."""
        if not num_queued or request.output_token_ids:
            return
        num_new = request.params.n
        num_tokens = num_queued_tokens + num_new * len(request.prompt_token_ids)
        too_many = self._max_requests is not None and num_queued + num_new > self._max_requests
        too_long = self._max_tokens is not None and num_tokens > self._max_tokens
        if too_many or too_long:
            self.num_overloaded += 1
            raise OverloadedError(min(max(self._mean_gap_s * num_new, MIN_RETRY_S), MAX_RETRY_S))

    def note_starts(self, num_started: int, now: float) -> None:
        """So many sequences have just left the queue for the first time."""
        if self._last_start:
            gap = (now - self._last_start) / num_started
            self._mean_gap_s += SMOOTHING * (gap - self._mean_gap_s)
        self._last_start = now


class Deadlines:
    """Sequences that must have their first token, or their last, by some moment.

    The heap holds numbers; what they stand for is dropped when a sequence ends, so a deadline far
    away keeps nothing of a sequence that has long ended.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._watched: dict[int, tuple[Sequence, bool]] = {}  # whether for its first token alone
        self._numbers: dict[Sequence, list[int]] = {}
        self._num_added = 0

    def add(self, sequence: Sequence, request: AddRequest) -> None:
        """Watch a sequence that has just been queued, if its request has deadlines."""
        for limit_ms, first_only in (
            (request.deadline_ms, False),
            (request.ttft_deadline_ms, True),
        ):
            if limit_ms is not None:
                due = sequence.queued_at + min(limit_ms, MAX_DEADLINE_MS) / 1e3
                heapq.heappush(self._heap, (due, self._num_added))
                self._watched[self._num_added] = sequence, first_only
                self._numbers.setdefault(sequence, []).append(self._num_added)
                self._num_added += 1

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or never had a deadline."""
        for number in self._numbers.pop(sequence, ()):
            self._watched.pop(number, None)
        if len(self._heap) > 2 * len(self._watched) + MAX_DEAD:
            self._heap = [entry for entry in self._heap if entry[1] in self._watched]
            heapq.heapify(self._heap)

    @property
    def next_due(self) -> float | None:
        """On `time.monotonic`'s clock; None if nothing has a deadline."""
        while self._heap and self._heap[0][1] not in self._watched:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_expired(self, now: float) -> list[Sequence]:
        """Those that have run out of time; each at most once, none that has ended."""
        expired: dict[Sequence, None] = {}
        while self._heap and self._heap[0][0] <= now:
            _, number = heapq.heappop(self._heap)
            sequence, first_only = self._watched.pop(number, (None, False))
            if sequence is not None and not (first_only and sequence.first_token_at):
                expired[sequence] = None
        return list(expired)
