"""What a viewer asks of a core, and what the core shows of itself: messages of `protocol.py`.

`watch/observer.py` answers, `watch/feed.py` asks. Times are seconds on the core's clock. A
*uid* is a sequence's arrival number, unique in one life of the core. A *cell* is a block that is
shown: all of them, or of a large cache the first `num_dense` and then every `stride`-th. (gc=False:
none of them is ever part of a cycle, and a core makes thousands a second.)
"""

from typing import Literal

import msgspec

SequenceState = Literal["running", "waiting", "paused"]
WaitCause = Literal["", "seats", "budget", "kv", "sibling", "results", "client"]


# ---- what is asked


class Observe(msgspec.Struct, frozen=True, tag=True):
    """Show what has happened since this client asked last. Result: `Observation`.

    The first call makes the core write down its steps; `WATCH_LEASE_S` after the last it stops.
    `fresh`: forget what I have been shown, and begin again.
    """

    fresh: bool = False


class ShowBlock(msgspec.Struct, frozen=True, tag=True):
    """Result: `BlockContents`, tokens included. An unknown id is an error."""

    block_id: int


# ---- what is shown


class CacheLayout(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks 1 … num_blocks exist; cell i is block i + 1 below `num_dense`, and from there on every
    `stride`-th."""

    num_blocks: int
    block_size: int
    num_cells: int
    num_dense: int
    stride: int
    max_num_batched_tokens: int
    max_num_seqs: int


class Counters(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of all clients, as in `CoreStatus`; from `num_preemptions` on they count since the start."""

    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_paused: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_recomputed_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_steps: int


class Pace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Whether the core may be held to be looked at, whether it is (no step begins until somebody
    says so), and how long a step waits after the one before."""

    is_allowed: bool
    is_held: bool
    interval_ms: float


class SequenceView(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An unfinished sequence. `num_tokens` are known, `num_computed` have KV (or soon will).

    `cause`: what keeps it waiting. `ttft_s` is 0 before the first token, `started_at` until it ran.
    `block_ids` continue at index `num_shown` of its block table what was shown before; 0: from the
    start, whatever was shown.
    """

    uid: int
    client_id: int
    number: int
    state: SequenceState
    cause: WaitCause
    queued_at: float
    started_at: float
    ttft_s: float
    num_prompt_tokens: int
    num_tokens: int
    num_computed: int
    num_cached_tokens: int
    num_preemptions: int
    num_shown: int
    block_ids: list[int]


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Part of a prompt (or of what is recomputed) that a step runs, from `start` on."""

    uid: int
    start: int
    num_tokens: int


class StepView(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One forward pass. Whoever of `batch` has no chunk runs a single token: it decodes.

    `batch` is a key of `Observation.batches` (or of an earlier one's). `budget`: how many tokens it
    might have held. `preempted`: who was put back to waiting when it was planned.
    """

    step: int
    started_at: float
    ended_at: float
    budget: int
    num_decodes: int
    chunks: list[Chunk]
    batch: int
    preempted: list[int]


class EndView(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A sequence has ended; what it waited for is as in `protocol.Why`."""

    uid: int
    client_id: int
    number: int
    reason: str
    queued_at: float
    ended_at: float
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    queued_ms: float
    seats_ms: float
    budget_ms: float
    kv_ms: float
    ttft_ms: float | None
    inter_token_ms: float | None


class Observation(msgspec.Struct, frozen=True, tag=True):
    """The state now, and the steps and ends since the client asked last.

    `fresh`: nothing that was shown before counts. `interval_s`: how soon to ask again, such that
    looking costs the core little. `ref_counts` and `has_key` have a byte per cell, the first at
    most 255. `num_hidden` sequences are not listed, `num_lost_steps` not shown: too many.
    """

    fresh: bool
    now: float
    interval_s: float
    layout: CacheLayout
    counters: Counters
    ref_counts: bytes
    has_key: bytes
    sequences: list[SequenceView]
    num_hidden: int
    steps: list[StepView]
    batches: dict[int, list[int]]
    num_lost_steps: int
    ended: list[EndView]
    pace: Pace


class BlockContents(msgspec.Struct, frozen=True, tag=True):
    """`key` and `parent_key` are hexadecimal, empty if there is none; `index` is the block's place
    in the tables of its holders, None if nobody holds it; `token_ids` are those known to be in it.
    """

    block_id: int
    ref_count: int
    key: str
    parent_key: str
    index: int | None
    holders: list[int]
    token_ids: list[int]
