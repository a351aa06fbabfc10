"""Decides which tokens run next. Owns waiting and running order and rows, not the blocks.

There is no prefill and no decode: `num_computed` chases the length under one token budget.
`num_computed` and `num_pending` advance when a step is scheduled, so several may be in flight; a
plan carries ids only for known tokens. Workers run plans in order: stream order is the fence, so
`_let_go` frees blocks and row at once although steps that use them may still be under way.
"""

import heapq
import time
from bisect import insort
from dataclasses import dataclass, field

from nanovllm.config import StepLimits
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.sequence import Sequence, Status
from nanovllm.protocol import (
    BlockAppend,
    FinishReason,
    NewRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


@dataclass(slots=True)
class ScheduledStep:
    """A plan and the sequences behind its integers."""

    plan: StepPlan
    sequences: list[Sequence]  # one per entry of the plan
    sampled: list[Sequence]  # those it samples for, in the order of plan.sampling
    constrained: list[int]  # indices into `sampled` of those whose plan lacks its mask yet


@dataclass(slots=True)
class StepOutputs:
    """What a step's result changed. `logprobs` are keyed by index into `token_ids`."""

    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Sequence, list[TokenLogprobs]]] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)  # their matchers say why


class Scheduler:
    """`limits` bound a step; `eos_token_ids` end every sequence that does not ignore them."""

    def __init__(
        self,
        limits: StepLimits,
        block_manager: BlockManager,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._limits = limits
        self._blocks = block_manager
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._running: list[Sequence] = []  # sorted by order, so the last is preempted first
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap by order
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_arrived = 0
        self._num_steps = 0
        self._started: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # ---- arrivals and departures

    def add(self, sequence: Sequence, *, priority: int = 0) -> None:
        """Queue a sequence, or, if it has a leader, let it wait for the leader's prompt."""
        params = sequence.params
        length_cap = self._max_model_len
        if params.max_tokens is not None:
            length_cap = min(length_cap, sequence.num_prompt_tokens + params.max_tokens)
        assert len(sequence.token_ids) < length_cap, "validated on arrival"
        sequence.max_total = length_cap
        sequence.min_total = sequence.num_prompt_tokens + params.min_tokens
        sequence.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            sequence.stop_ids |= self._eos_token_ids
        by_priority = self._limits.scheduling_policy == "priority"
        sequence.order = (priority if by_priority else 0, self._num_arrived)
        sequence.queued_at = time.monotonic()
        self._num_arrived += 1
        if sequence.leader is not None:
            sequence.leader.forks.append(sequence)
        else:
            self._push_waiting(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is and free what it holds. Its results still in flight are
        dropped by `update`."""
        assert sequence.status is not Status.FINISHED
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._let_go(sequence)
        elif sequence.leader is not None and sequence in sequence.leader.forks:
            sequence.leader.forks.remove(sequence)
        else:
            self._waiting.remove((sequence.order, sequence))
            heapq.heapify(self._waiting)
            self._release_forks(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    # ---- one step

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step, or None if nothing can run before a result comes back."""
        step = ScheduledStep(StepPlan(self._num_steps, [], [], [], [], [], []), [], [], [])
        self._make_room_for_urgent()
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(step, self._limits.max_num_batched_tokens)
        # Whoever was just preempted would only be preempted again.
        if self._waiting and self.num_preemptions == num_preemptions:
            self._admit_waiting(step, budget)
        if not step.sequences:
            return None
        self._num_steps += 1
        return step

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutputs:
        """Take in a step's sampled ids, oldest step first."""
        outputs = StepOutputs(started=self._started)
        self._started = []
        if result.prompt_logprobs:
            self._take_prompt_logprobs(step, result, outputs)
        sequences, token_ids = outputs.sequences, outputs.token_ids
        for index, (sequence, token_id) in enumerate(
            zip(step.sampled, result.token_ids, strict=True)
        ):
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_pending -= 1
            sequence.token_ids.append(token_id)
            if result.logprobs and index in result.logprobs:
                outputs.logprobs[len(token_ids)] = result.logprobs[index]
            sequences.append(sequence)
            token_ids.append(token_id)
            num_known = len(sequence.token_ids)
            if token_id in sequence.stop_ids and num_known >= sequence.min_total:
                if token_id not in self._eos_token_ids or sequence.params.ignore_eos:
                    sequence.stop_reason = token_id
                self.finish(sequence, "stop")
                outputs.finished.append(sequence)
            elif sequence.matcher is not None and not sequence.matcher.accept(token_id):
                self._end_of_grammar(sequence, token_id, outputs)
            elif num_known >= sequence.max_total:
                self.finish(sequence, "length")
                outputs.finished.append(sequence)
            elif num_known >= sequence.next_registration <= sequence.num_computed:
                self._blocks.register(sequence)
        self.num_generation_tokens += len(token_ids)
        return outputs

    def _take_prompt_logprobs(
        self, step: ScheduledStep, result: StepResult, outputs: StepOutputs
    ) -> None:
        for index, logprobs in result.prompt_logprobs.items():
            sequence = step.sequences[index]
            # A preempted sequence runs its prompt again: what was reported is not repeated.
            new = logprobs[max(0, sequence.num_prompt_logprobs - step.plan.num_computed[index]) :]
            if new and sequence.status is not Status.FINISHED:
                sequence.num_prompt_logprobs += len(new)
                outputs.prompt_logprobs.append((sequence, new))

    def _end_of_grammar(self, sequence: Sequence, token_id: int, outputs: StepOutputs) -> None:
        """Its matcher takes no more: the output is complete, or cannot be completed."""
        assert sequence.matcher is not None
        if sequence.matcher.error is None:
            sequence.last_is_text = token_id not in self._eos_token_ids
            self.finish(sequence, "stop")
            outputs.finished.append(sequence)
        else:
            self.finish(sequence, "error")
            outputs.failed.append(sequence)

    # ---- running sequences

    def _schedule_running(self, step: ScheduledStep, budget: int) -> int:
        """Give each running sequence its tokens, oldest first; returns the budget left."""
        running = self._running
        cap = self._limits.long_prefill_token_threshold or budget
        index = 0
        while index < len(running) and budget > 0:
            sequence = running[index]
            index += 1
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            if num_tokens >= sequence.max_total:
                continue  # its last token is sampled or pending; nothing is left to run
            if sequence.matcher is not None and sequence.num_pending:
                continue  # what it may sample next depends on the id that is on its way
            num_new = num_tokens - sequence.num_computed
            if num_new > 1:
                num_new = min(num_new, cap, budget)
            if sequence.num_computed + num_new > sequence.capacity:
                assert sequence.num_computed + num_new == sequence.capacity + 1
                if not self._free_one_block(sequence):
                    break
                block_id = self._blocks.grow(sequence)
                append = BlockAppend(sequence.row, len(sequence.block_ids) - 1, block_id)
                step.plan.block_appends.append(append)
            self._advance(step, sequence, num_new)
            budget -= num_new
        return budget

    def _advance(self, step: ScheduledStep, sequence: Sequence, num_new: int) -> None:
        """Enter `num_new` tokens of `sequence` into the plan and count them as computed."""
        plan = step.plan
        start = sequence.num_computed
        end = start + num_new
        if end == len(sequence.token_ids) + sequence.num_pending:
            plan.sampling.append(len(plan.rows))
            if sequence.matcher is not None:
                step.constrained.append(len(step.sampled))
            step.sampled.append(sequence)
            sequence.num_pending += 1
        plan.rows.append(sequence.row)
        plan.num_computed.append(start)
        plan.num_scheduled.append(num_new)
        step.sequences.append(sequence)
        sequence.num_computed = end
        if len(sequence.token_ids) >= sequence.next_registration <= end:
            self._blocks.register(sequence)
        if sequence.forks and _prompt_computed(sequence):
            self._release_forks(sequence)

    def _free_one_block(self, sequence: Sequence) -> bool:
        """Preempt from the end of the order until a block is free; False if it hit `sequence`."""
        while self._blocks.num_free_blocks == 0:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Recompute later: everything is freed, and admission waits for its pending ids."""
        assert self._running[-1] is sequence
        self._running.pop()
        self._let_go(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._push_waiting(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        # Safe with steps in flight: their writes run before any reuse (stream order).
        self._blocks.release(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        self._release_forks(sequence)

    # ---- waiting sequences

    def _make_room_for_urgent(self) -> None:
        """Let a waiting sequence of higher priority preempt the running ones below it."""
        while self._waiting and self._running:
            urgent = self._waiting[0][1]
            outranks = urgent.order[0] < self._running[-1].order[0]
            if not outranks or urgent.num_pending or self._blocks_to_share(urgent) is not None:
                return
            self._preempt(self._running[-1])

    def _blocks_to_share(self, sequence: Sequence) -> list[int] | None:
        """What `sequence` may reuse if it is admitted now; None if there is no room for it."""
        if not self._free_rows:
            return None
        shared = self._reusable_blocks(sequence)
        # Each running sequence will soon want one block more: leave them that much.
        has_room = self._blocks.can_hold(sequence, shared, reserve=len(self._running))
        return shared if has_room else None

    def _admit_waiting(self, step: ScheduledStep, budget: int) -> None:
        cap = self._limits.long_prefill_token_threshold or budget
        while self._waiting and budget > 0:
            sequence = self._waiting[0][1]
            if sequence.num_pending:
                break  # preempted with steps in flight: its last ids are not known yet
            shared = self._blocks_to_share(sequence)
            if shared is None:
                break
            heapq.heappop(self._waiting)
            self._admit(step, sequence, shared)
            num_new = min(len(sequence.token_ids) - sequence.num_computed, cap, budget)
            self._advance(step, sequence, num_new)
            budget -= num_new

    def _admit(self, step: ScheduledStep, sequence: Sequence, shared: list[int]) -> None:
        self._blocks.hold(sequence, shared)
        sequence.num_computed = len(shared) * self._blocks.block_size
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=_order)
        if not sequence.started_at:
            sequence.started_at = time.monotonic()
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self._blocks.num_queries += sequence.num_prompt_tokens
            self._blocks.num_hits += sequence.num_computed
            self._started.append(sequence)
        step.plan.new_rows.append(
            NewRow(
                row=sequence.row,
                token_ids=sequence.token_ids.copy(),
                num_prompt_tokens=sequence.num_prompt_tokens,
                block_ids=sequence.block_ids.copy(),
                params=sequence.params,
                seed=sequence.seed,
                bad_words_token_ids=sequence.bad_words_token_ids,
            )
        )

    def _reusable_blocks(self, sequence: Sequence) -> list[int]:
        """Leading blocks whose KV is there already: the leader's prompt, or the prefix cache's."""
        leader = sequence.leader
        if leader is not None and leader.row >= 0 and _prompt_computed(leader):
            return leader.block_ids[: (sequence.num_prompt_tokens - 1) // self._blocks.block_size]
        if sequence.params.prompt_logprobs is not None:
            return []  # every prompt position must be run to have its log-probabilities
        return self._blocks.cached_prefix(sequence)

    def _release_forks(self, leader: Sequence) -> None:
        for sequence in leader.forks:
            self._push_waiting(sequence)
        leader.forks = []

    def _push_waiting(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    # ---- for tests

    def check_invariants(self) -> None:
        """Assert that rows, order and blocks are consistent; called between steps."""
        assert self._running == sorted(self._running, key=_order)
        rows = [sequence.row for sequence in self._running]
        assert sorted(rows + self._free_rows) == list(range(self._limits.max_num_seqs))
        assert all(sequence.status is Status.RUNNING for sequence in self._running)
        assert all(s.status is Status.WAITING and s.row == -1 for _, s in self._waiting)
        self._blocks.check_invariants(self._running)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _prompt_computed(sequence: Sequence) -> bool:
    return sequence.num_computed >= sequence.num_prompt_tokens
