"""Whether a request is valid and may queue, and until when its sequences may take.

`EngineCore` asks before it adds, for frontends that did not check, and every turn for what has
expired. A `ValueError` names the field and what it takes. A queue that is full says when to try
again: after as long as it now takes to move one place on.
"""

import heapq
import math

from nanovllm.config import ServiceConfig
from nanovllm.core.sequence import Sequence
from nanovllm.limits import (
    MAX_BAD_WORDS,
    MAX_BAD_WORDS_TOKENS,
    MAX_DEADLINE_MS,
    MAX_REQUEST_TOKENS,
    MAX_SALT_CHARS,
    check_count,
)
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import check_in_vocabulary

MAX_NUMBER = 2**53  # of a sequence; -1 stands for none in answers
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


def check_request(request: AddRequest, info: WorkerInfo) -> None:
    """Everything that does not depend on what else runs."""
    params, num_outputs, most = request.params, len(request.output_token_ids), info.max_model_len
    if params.n > 1:  # one alone holds less than max_model_len
        num_copied = params.n * (len(request.prompt_token_ids) + num_outputs)
        check_count("prompt_token_ids", num_copied, MAX_REQUEST_TOKENS, "tokens times n")
    params.check_prompt(
        request.prompt_token_ids, num_outputs=num_outputs, most=most, vocab_size=info.vocab_size
    )
    check_in_vocabulary("output_token_ids", request.output_token_ids, info.vocab_size)
    if params.max_tokens is not None and num_outputs >= params.max_tokens:
        raise ValueError("output_token_ids: max_tokens were generated already")
    _check_numbers(request)
    if request.bad_words_token_ids:
        _check_bad_words(request.bad_words_token_ids, info.vocab_size)
    if request.cache_salt or request.tenant:
        _check_names(request)


def _check_bad_words(words: list[list[int]], vocab_size: int) -> None:
    for word in words:
        check_in_vocabulary("bad_words_token_ids", word, vocab_size)
    if not all(words):
        raise ValueError("bad_words_token_ids: a word of no tokens")
    check_count("bad_words_token_ids", len(words), 2 * MAX_BAD_WORDS, "words")
    size = len(words) * max(map(len, words))
    check_count("bad_words_token_ids", size, MAX_BAD_WORDS_TOKENS, "words times the longest")


def _check_names(request: AddRequest) -> None:
    for name in ("cache_salt", "tenant"):
        check_count(name, len(getattr(request, name) or ""), MAX_SALT_CHARS, "characters")


def _check_numbers(request: AddRequest) -> None:
    if not 0 <= request.number <= MAX_NUMBER:
        raise ValueError(f"number must be in [0, 2**53], not {request.number}")
    for name in ("deadline_ms", "ttft_deadline_ms"):
        limit_ms = getattr(request, name)
        if limit_ms is not None and not 0 < limit_ms < math.inf:
            raise ValueError(f"{name} must be a number above 0, not {limit_ms}")
