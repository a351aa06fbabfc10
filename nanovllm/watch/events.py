"""What viewers of an engine are sent, as JSON: the event of `GET /v1/engine/events`.

`feed.py` makes them out of `protocol/watch.py`'s messages; the page and `nanovllm top` read
them. Times are seconds on the core's clock, of which `now` is the time of the event.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from nanovllm.protocol.watch import SequenceState, WaitCause

EngineView = Literal["full", "counts"]


class Layout(msgspec.Struct):
    """The KV cache and the limits of a step. Cell i is block i + 1 below `num_dense`, from there on
    every `stride`-th block. `view`: whether the contents of blocks may be asked for ("full")."""

    model: str
    device: str
    view: EngineView
    num_blocks: int
    block_size: int
    num_cells: int
    num_dense: int
    stride: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int


class Counts(msgspec.Struct):
    """Of all clients of the core; from `num_preemptions` on they count since its start."""

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


class SequenceEvent(msgspec.Struct):
    """An unfinished sequence that is new or has changed its state; `request_id` if it came through
    this server. `cause`: what keeps it waiting: seats (`max_num_seqs`), budget
    (`max_num_batched_tokens`), kv (no free blocks), sibling (its prompt is being computed by
    another output of the same request), results (its last tokens are not back), client (which does
    not read), or "" (nothing: the next step takes it)."""

    uid: int
    request_id: str | None
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


class Progress(msgspec.Struct, array_like=True):
    """How far a sequence that runs has come: [uid, num_tokens, num_computed]."""

    uid: int
    num_tokens: int
    num_computed: int


class Table(msgspec.Struct, array_like=True):
    """[uid, index, block_ids]: its block table from `index` on; nothing comes after them."""

    uid: int
    index: int
    block_ids: list[int]


class ChunkEvent(msgspec.Struct, array_like=True):
    """[uid, start, num_tokens] of a prompt, or of what is computed again after a preemption."""

    uid: int
    start: int
    num_tokens: int


class StepEvent(msgspec.Struct):
    """One forward pass. Whoever of `batch` (a key of `batches`, this event's or an earlier one's)
    has no chunk decodes one token. `budget`: how many tokens it might have held: fewer while
    somebody decodes. `preempted` sequences lost their blocks when it was planned."""

    step: int
    started_at: float
    ended_at: float
    budget: int
    num_decodes: int
    chunks: list[ChunkEvent]
    batch: int
    preempted: list[int]


class EndEvent(msgspec.Struct):
    """A sequence has ended: reason, times, and how long each lack held it up."""

    uid: int
    request_id: str | None
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


class PaceEvent(msgspec.Struct, frozen=True):
    """Whether the engine may be held (`POST /v1/engine/pace`), whether it is, and how long a step
    waits after the one before."""

    is_allowed: bool = False
    is_held: bool = False
    interval_ms: float = 0.0


class EngineEvent(msgspec.Struct):
    """`kind` "snapshot" is the whole state, and comes first, after a restart of the core, and to
    viewers that read too slowly; "update" is what has changed since.

    `cells` is flat: cell, state, cell, state, …; a state is twice the number of sequences that
    hold the block, plus 1 if it holds a known prefix. Cells that are not named are as they were,
    or 0 in a snapshot. Sequences are named in `gone` when they are no longer shown. `num_hidden`
    sequences are not shown at all: there are too many. `num_lost_steps` likewise.
    """

    kind: Literal["snapshot", "update"]
    now: float
    interval_s: float
    counters: Counts
    cells: list[int]
    sequences: list[SequenceEvent]
    progress: list[Progress]
    tables: list[Table]
    gone: list[int]
    num_hidden: int
    steps: list[StepEvent]
    batches: dict[int, list[int]]
    num_lost_steps: int
    ended: list[EndEvent]
    pace: PaceEvent = PaceEvent()
    layout: Layout | UnsetType = UNSET


class BlockDetails(msgspec.Struct):
    """A block of KV cache. `key` is the hash of its prefix (hexadecimal), `parent_key` that of the
    block before. `texts[i]` is the text of `token_ids[i]`, if there is a tokenizer."""

    block_id: int
    ref_count: int
    key: str
    parent_key: str
    index: int | None
    holders: list[int]
    token_ids: list[int]
    texts: list[str]
