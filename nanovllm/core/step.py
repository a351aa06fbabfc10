"""One step as the core sees it: what was planned for whom, and what came of it.

Made by `Scheduler`, passed on by `EngineCore`, sorted to clients by `CoreServer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.core.sequence import Sequence, Status
from nanovllm.protocol.plan import NewRow, StepPlan, TokenLogprobs


@dataclass(slots=True)
class ScheduledStep:
    """A plan and the sequences behind its integers."""

    plan: StepPlan
    sequences: list[Sequence]  # one per entry of the plan
    sampled: list[Sequence]  # those it samples for, in the order of plan.sampling
    constrained: list[int]  # indices into `sampled` of those whose masks its second half waits for
    forced: set[int] = field(default_factory=set)  # likewise, of those whose next tokens were
    # known before it sampled: what it samples for them is dropped
    budget: int = 0  # of tokens
    submitted_at: float = 0.0  # written down only while somebody watches

    @property
    def awaits_ids(self) -> bool:
        """Whether a mask of it depends on an id that a step before is to sample."""
        sampled = (self.sampled[index] for index in self.constrained)
        return any(one.num_pending > 1 and one.status is not Status.FINISHED for one in sampled)

    def admitted_on_a_prefix(self) -> list[Sequence]:
        """Those that took a row in this step and run on KV which others have computed."""
        new = {row.row for row in self.plan.new_rows}
        entries = zip(self.sequences, self.plan.rows, self.plan.num_computed, strict=True)
        return [sequence for sequence, row, start in entries if row in new and start > 0]


@dataclass(slots=True)
class StepOutputs:
    """What a step's result changed. `logprobs` are keyed by index into `token_ids`."""

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Sequence, list[TokenLogprobs]]] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    ended_by_grammar: list[Sequence] = field(default_factory=list)  # they finished, or failed

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
