"""What took how long: what `Finished` and `Started` tell of a sequence, and the loop's CPU time.

`CoreServer` and its clients call it; it reads what `Scheduler` has written down.
"""

import time

from nanovllm.core.sequence import Sequence
from nanovllm.protocol.messages import Finished, Started, Why


class CpuClock:
    """Adds up the CPU time of this thread between `resume` and `pause`; waiting costs none."""

    __slots__ = ("_since", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def resume(self) -> None:
        self._since = time.thread_time()

    def pause(self) -> None:
        self.seconds += time.thread_time() - self._since


def started_message(sequence: Sequence) -> Started:
    """A sequence has run for the first time."""
    queued_ms = (sequence.started_at - sequence.queued_at) * 1e3
    return Started(sequence.number, sequence.num_cached_tokens, queued_ms)


def finished_message(sequence: Sequence) -> Finished:
    """A sequence has just ended, and not by failing."""
    assert sequence.finish_reason is not None
    return Finished(
        sequence.number,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.num_preemptions,
        sequence.last_is_text,
        why_of(sequence, time.monotonic()),
    )


def why_of(sequence: Sequence, now: float) -> Why:
    """Of a sequence that ends. `now` stands for the time of the last token."""
    first_at = sequence.first_token_at
    num_later = len(sequence.token_ids) - sequence.num_first_known - 1
    seats, budget, kv = sequence.waited_s
    return Why(
        queued_ms=((sequence.started_at or now) - sequence.queued_at) * 1e3,
        seats_ms=seats * 1e3,
        budget_ms=budget * 1e3,
        kv_ms=kv * 1e3,
        num_cached_tokens=sequence.num_cached_tokens,
        num_preemptions=sequence.num_preemptions,
        num_recomputed_tokens=sequence.num_recomputed_tokens,
        ttft_ms=(first_at - sequence.queued_at) * 1e3 if first_at else None,
        inter_token_ms=(now - first_at) * 1e3 / num_later if first_at and num_later else None,
        num_forced_tokens=sequence.num_forced_tokens,
    )
