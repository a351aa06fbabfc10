"""One output being generated, as the core sees it, and one step of several of them.

Each field of a `Sequence` has one owner, which alone writes it (the class says who). Invariants:
`num_computed` counts positions whose KV is written or will be by a submitted step; `num_pending`
counts sampled ids not yet back from the device; `len(token_ids) + num_pending` is the length by
count, `len(token_ids)` what is known.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from enum import Enum

import msgspec

from nanovllm.core.failures import Failure
from nanovllm.core.grammar import Matcher
from nanovllm.protocol.messages import FinishReason
from nanovllm.protocol.plan import NewRow, PositionLogprobs, StepPlan, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    """Where a sequence is. FINISHED is final; RUNNING and WAITING alternate by preemption;
    PAUSED holds its row and blocks while its client does not read.
    """

    WAITING = 0
    RUNNING = 1
    FINISHED = 2
    PAUSED = 3


class Tenant:
    """One of those between whom the engine's time is shared fairly. `served` is the weighted number
    of tokens it has had; `num_waiting` counts its sequences in the waiting queue."""

    __slots__ = ("name", "num_waiting", "served", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.served = 0.0
        self.num_waiting = 0
        self.waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap by order


NOBODY = Tenant("")
NOT_QUEUED = -1


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """`number` is the client's own id of this output; `order` ranks it: lower runs first.

    Made of the prompt, as `token_ids`, and of `output_token_ids`, generated in an earlier life.
    """

    # ---- never changed
    client_id: int
    number: int
    token_ids: list[int]  # the scheduler's: what is known
    params: SamplingParams
    _: KW_ONLY
    output_token_ids: InitVar[Iterable[int]] = ()
    seed: int = 0
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    cache_salt: str | None = None
    num_prompt_tokens: int = field(init=False)
    num_first_known: int = field(init=False)  # when it was queued
    queued_at: float = field(init=False)
    # ---- Compilations: where it is in its grammar, after all known tokens
    matcher: Matcher | None = None
    # ---- BlockManager
    block_ids: list[int] = field(default_factory=list)
    capacity: int = 0  # tokens that fit into block_ids
    block_keys: list[bytes] = field(default_factory=list)  # of leading full blocks, as needed
    next_registration: int = sys.maxsize  # tokens that must be computed to register one more
    # ---- WaitingQueue
    waited_s: tuple[float, float, float] = (0.0, 0.0, 0.0)  # per cause of `WaitClock`
    wait_mark: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the clock when its wait began
    # ---- Scheduler: all the rest
    num_computed: int = 0
    num_pending: int = 0
    num_unsent: int = 0  # of the last known tokens, those that its row has not been told of
    max_total: int = sys.maxsize  # length by count at which it ends with reason "length"
    min_total: int = 0  # known length below which no stop counts
    stop_ids: frozenset[int] = frozenset()
    order: tuple[int, int] = (0, NOT_QUEUED)  # (priority, arrival)
    leader: Sequence | None = None  # the sibling whose prompt blocks it may share
    forks: list[Sequence] = field(default_factory=list)  # siblings that wait for this prompt
    row: int = -1
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    last_is_text: bool = False  # it stopped because its grammar was complete
    failure: Failure | None = None  # if finish_reason is "error"
    tenant: Tenant = NOBODY
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_forced_tokens: int = 0  # not sampled: its grammar left no choice
    num_prompt_logprobs: int = 0  # of prompt tokens reported so far
    started_at: float = 0.0
    first_token_at: float = 0.0

    def __post_init__(self, output_token_ids: Iterable[int]) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids = [*self.token_ids, *output_token_ids]
        self.num_first_known = len(self.token_ids)
        self.queued_at = time.monotonic()

    @property
    def has_computed_prompt(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens

    @property
    def is_queued(self) -> bool:
        """Whether the scheduler has ever been told of it."""
        return self.order[1] != NOT_QUEUED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.client_id}:{self.number} {self.status.name} row={self.row} "
            f"known={len(self.token_ids)} pending={self.num_pending} "
            f"computed={self.num_computed} blocks={len(self.block_ids)})"
        )


class ScheduledStep(msgspec.Struct, eq=False):
    """A plan and the sequences behind its integers."""

    plan: StepPlan
    sequences: list[Sequence]  # one per entry of the plan
    sampled: list[Sequence]  # those it samples for, in the order of plan.sampling
    constrained: list[int]  # indices into `sampled` of those whose masks its second half waits for
    # Likewise, of those whose grammar has given them tokens: what is sampled for them is dropped.
    forced: frozenset[int] = frozenset()
    budget: int = 0  # of tokens
    num_tokens: int = 0  # that it runs
    submitted_at: float = 0.0  # only while a listener wants to know

    @property
    def awaits_ids(self) -> bool:
        """Whether a mask of it depends on an id that a step before is to sample."""
        sampled = self.sampled
        for index in self.constrained:  # a generator takes thrice as long, several times a step
            if sampled[index].num_pending > 1 and sampled[index].status is not Status.FINISHED:
                return True
        return False

    def admitted_on_a_prefix(self) -> list[Sequence]:
        """Those that took a row in this step and run on KV which others have computed."""
        new = {row.row for row in self.plan.new_rows}
        entries = zip(self.sequences, self.plan.rows, self.plan.num_computed, strict=True)
        return [sequence for sequence, row, start in entries if row in new and start > 0]


class StepOutputs(msgspec.Struct, eq=False):
    """What a step's result changed. `logprobs` are keyed by index into `token_ids`."""

    sequences: list[Sequence] = []
    token_ids: list[int] = []
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: list[tuple[Sequence, PositionLogprobs]] = []
    started: list[Sequence] = []
    finished: list[Sequence] = []
    failed: list[Sequence] = []
    ended_by_grammar: list[Sequence] = []  # they finished, or failed

    def extend(self, later: StepOutputs) -> None:
        """Take in what came after."""
        shift = len(self.token_ids)
        self.logprobs |= {shift + index: one for index, one in later.logprobs.items()}
        self.sequences += later.sequences
        self.token_ids += later.token_ids
        self.prompt_logprobs += later.prompt_logprobs
        self.started += later.started
        self.finished += later.finished
        self.failed += later.failed
        self.ended_by_grammar += later.ended_by_grammar


class SchedulingFailedError(Exception):
    """Planning went wrong at `sequence`; nothing was planned, and everyone else can go on."""

    def __init__(self, sequence: Sequence, cause: Exception) -> None:
        super().__init__(str(cause))
        self.sequence = sequence
        self.cause = cause


def new_row(sequence: Sequence) -> NewRow:
    """What a worker must know of a sequence that takes a row."""
    return NewRow(
        row=sequence.row,
        token_ids=sequence.token_ids.copy(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        block_ids=sequence.block_ids.copy(),
        params=sequence.params,
        seed=sequence.seed,
        bad_words_token_ids=sequence.bad_words_token_ids,
    )
