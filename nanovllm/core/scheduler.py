"""Decides which tokens run next. Owns waiting and running order and rows, not the blocks.

There is no prefill and no decode: `num_computed` chases the length under one token budget.
`num_computed` and `num_pending` advance when a step is scheduled, so several may be in flight; a
plan carries ids only for known tokens. Workers run plans in order: stream order is the fence, so
`_let_go` frees blocks and row at once although steps that use them may still be under way.
"""

import time
from bisect import insort
from collections.abc import Collection
from operator import attrgetter

from nanovllm.config import StepLimits
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.failures import Failure
from nanovllm.core.sequence import (
    ScheduledStep,
    SchedulingFailedError,
    Sequence,
    Status,
    StepOutputs,
    new_row,
)
from nanovllm.core.waiting import BUDGET, KV, SEATS, WaitingQueue
from nanovllm.protocol.messages import FinishReason
from nanovllm.protocol.plan import BlockAppend, KnownTokens, PositionLogprobs, StepPlan, StepResult
from nanovllm.sampling_params import leaves_nothing

# A chunk makes a step slower than one in which every row runs one token, for all of its rows: by
# about a quarter. What it spares must be worth that.
ROWS_PER_SPARED_STEP = 4
NOTHING_LEFT = Failure(
    "allowed_token_ids: min_tokens and bad_words leave none of them to go on with", "request"
)
BY_ORDER = attrgetter("order")


class Scheduler:
    """`limits` bound a step; `eos_token_ids` end every sequence that does not ignore them.

    What plans depend on is public, for who records a core and runs the recording again.
    """

    def __init__(
        self,
        limits: StepLimits,
        block_manager: BlockManager,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.num_preemptions = self.num_recomputed_tokens = 0
        self.num_queued = 0  # sequences never started, and their tokens
        self.num_queued_tokens = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = self.num_forced_tokens = 0
        self.limits = limits
        self._blocks = block_manager
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._by_priority = limits.scheduling_policy == "priority"
        self.running: list[Sequence] = []  # sorted by order, so the last is preempted first
        self.paused: list[Sequence] = []  # sorted likewise; preempted before those that run
        self.waiting = WaitingQueue(by_tenant=limits.scheduling_policy == "fair")
        self._at: Sequence | None = None  # the one being planned, to which an error is charged
        self._may_have_prompts = True  # whether one that runs may have prompt tokens left to run
        self.free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.num_arrived = 0
        self.num_steps = 0
        self.newly_started: list[Sequence] = []

    @property
    def num_paused(self) -> int:
        return len(self.paused) + self.waiting.num_parked

    # ---- arrivals and departures

    def add(
        self,
        sequence: Sequence,
        *,
        priority: int = 0,
        tenant: str = "",
        leader: Sequence | None = None,
    ) -> None:
        """Queue a sequence, or, if it has a leader, let it wait for the leader's prompt."""
        params = sequence.params
        sequence.max_total = params.length_limit(sequence.num_prompt_tokens, self._max_model_len)
        assert len(sequence.token_ids) < sequence.max_total, "validated on arrival"
        sequence.min_total = sequence.num_prompt_tokens + params.min_tokens
        sequence.stop_ids = params.stop_ids(self._eos_token_ids)
        sequence.order = (priority if self._by_priority else 0, self.num_arrived)
        sequence.tenant = self.waiting.tenant(tenant)
        self.num_arrived += 1
        self.num_queued += 1
        self.num_queued_tokens += len(sequence.token_ids)
        sequence.leader = leader
        if leader is not None:
            leader.forks.append(sequence)
        else:
            self.waiting.push(sequence)

    def finish(
        self, sequence: Sequence, reason: FinishReason, *, failure: Failure | None = None
    ) -> None:
        """End a sequence wherever it is and free what it holds. Its results still in flight are
        dropped by `update`.

        failure: why, if that is the reason. It may come to light for one that has ended just now.
        """
        sequence.failure = failure
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.is_queued:
            self._remove_idle(sequence)
        self._let_go(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def _remove_idle(self, sequence: Sequence) -> None:
        """Take out one that is paused, or waits: for its turn or for its leader's prompt."""
        if sequence.status is Status.PAUSED:
            self.paused.remove(sequence)
        elif sequence.leader is not None and sequence in sequence.leader.forks:
            sequence.leader.forks.remove(sequence)
        else:
            self.waiting.discard(sequence)
        if not sequence.started_at:
            self.num_queued -= 1
            self.num_queued_tokens -= len(sequence.token_ids)

    def pause(self, client_id: int) -> None:
        """Plan nothing for this client until `resume`. What runs keeps its row and blocks, unless
        somebody else needs them."""
        for sequence in [one for one in self.running if one.client_id == client_id]:
            self.running.remove(sequence)
            sequence.status = Status.PAUSED
            insort(self.paused, sequence, key=BY_ORDER)
        self.waiting.park(client_id)

    def resume(self, client_id: int) -> None:
        """Go on with a paused client where it was."""
        for sequence in [one for one in self.paused if one.client_id == client_id]:
            self.paused.remove(sequence)
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=BY_ORDER)
            self._may_have_prompts = True
        self.waiting.unpark(client_id)

    # ---- one step

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step, or None if nothing can run before a result comes back.

        Raises `SchedulingFailedError`; everything is as consistent then as if nobody had asked.
        """
        step = ScheduledStep(StepPlan(self.num_steps, [], [], [], [], [], []), [], [], [])
        self._at = None
        try:
            self._plan(step)
        except Exception as error:
            culprit = self._at
            self._unwind(step)
            if culprit is None:
                raise
            raise SchedulingFailedError(culprit, error) from error
        if not step.sequences:
            return None
        self.num_steps += 1
        return step

    def _plan(self, step: ScheduledStep) -> None:
        if self._by_priority:
            self._make_room_for_urgent()
        num_preemptions = self.num_preemptions
        step.budget = self._budget()
        self._schedule_running(step)
        cause: int | None = None
        if self.waiting:
            # A sequence that this step has preempted would be admitted and preempted again.
            spared = self.num_preemptions != num_preemptions
            cause = KV if spared else self._admit_waiting(step)
        self.waiting.hold_up(cause)

    def _budget(self) -> int:
        """Tokens of the next step."""
        num_prompts = min(len(self.waiting), len(self.free_rows)) if self.free_rows else 0
        if self._may_have_prompts:  # to count them costs a step of 256 sequences 10 µs
            # `has_computed_prompt`, spelled out: as a property it would be 8 µs more.
            have_prompts = [one.num_computed < one.num_prompt_tokens for one in self.running]
            num_prompts += have_prompts.count(True)
            self._may_have_prompts = True in have_prompts
        if not num_prompts:
            return self.limits.max_num_batched_tokens  # the others take what they need
        return token_budget(self.limits, self.running, num_prompts=num_prompts)

    def _unwind(self, step: ScheduledStep) -> None:
        """Undo an unfinished plan: its sequences run again from the start, and the prefixes that it
        was to compute leave the cache."""
        for sequence in step.sampled:
            sequence.num_pending -= 1
        for sequence in step.sequences:
            if sequence.status is Status.RUNNING:
                self._preempt(sequence)
        self._blocks.reset_prefix_cache()

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutputs:
        """Take in a step's sampled ids, oldest step first."""
        outputs = StepOutputs(started=self.take_started())
        for index, logprobs in result.prompt_logprobs.items():
            self._take_prompt_logprobs(outputs, step, index, logprobs)
        sequences, token_ids, forced = outputs.sequences, outputs.token_ids, step.forced
        failures, all_logprobs, finished = result.failures, result.logprobs, Status.FINISHED
        for index, (sequence, token_id) in enumerate(
            zip(step.sampled, result.token_ids, strict=True)
        ):
            if sequence.status is finished or (forced and index in forced):
                continue
            sequence.num_pending -= 1
            if failures or sequence.params.allowed_token_ids is not None:
                failure = self._why_no_token(sequence, failures.get(index))
                if failure is not None:
                    self._fail(sequence, failure, outputs)
                    continue
            known = sequence.token_ids
            known.append(token_id)
            if not sequence.first_token_at:
                sequence.first_token_at = time.monotonic()
            if all_logprobs and index in all_logprobs:
                outputs.logprobs[len(token_ids)] = all_logprobs[index]
            sequences.append(sequence)
            token_ids.append(token_id)
            num_known = len(known)
            # Most tokens end nothing: a call for each of them would take 5 % of the step's time.
            may_end = num_known >= sequence.max_total or token_id in sequence.stop_ids
            matcher = sequence.matcher
            may_end = may_end or (matcher is not None and not matcher.follow(token_id))
            if may_end and self._is_over(sequence, token_id, outputs):
                continue
            if num_known >= sequence.next_registration <= sequence.num_computed:
                self._blocks.register(sequence)
        self.num_generation_tokens += len(token_ids)
        self.waiting.charge_for_outputs(sequences)
        return outputs

    def take_started(self) -> list[Sequence]:
        """Those that have begun since it was last asked."""
        started, self.newly_started = self.newly_started, []
        return started

    def is_worth_forcing(self, num_tokens: int) -> bool:
        """Whether so many tokens of one sequence should be computed at once, without sampling."""
        return ROWS_PER_SPARED_STEP * (num_tokens - 1) >= max(len(self.running), 2)

    def force(
        self, step: ScheduledStep, index: int, token_ids: list[int], outputs: StepOutputs
    ) -> None:
        """Go on with these tokens, in place of what the step, whose second half has been queued,
        samples for `step.sampled[index]`. They are in no plan yet."""
        sequence = step.sampled[index]
        assert sequence.num_pending == 1 and sequence.status is not Status.FINISHED
        step.forced |= {index}
        sequence.num_pending = 0
        if not sequence.first_token_at:
            sequence.first_token_at = time.monotonic()
        taken: list[Sequence] = []
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            sequence.num_unsent += 1
            taken.append(sequence)
            outputs.token_ids.append(token_id)
            if self._is_over(sequence, token_id, outputs):
                break
        outputs.sequences += taken
        sequence.num_forced_tokens += len(taken)
        self.num_generation_tokens += len(taken)
        self.num_forced_tokens += len(taken)
        self.waiting.charge_for_outputs(taken)

    def _why_no_token(self, sequence: Sequence, cause: str | None) -> Failure | None:
        """Why the token that has come for it means nothing, if that is so. cause: the worker's."""
        if cause is not None:
            return Failure(cause)
        is_stuck = sequence.matcher is None and leaves_nothing(
            sequence.params,
            bad_words_token_ids=sequence.bad_words_token_ids,
            eos_token_ids=self._eos_token_ids,
            output_token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
        )
        return NOTHING_LEFT if is_stuck else None

    def _is_over(self, sequence: Sequence, token_id: int, outputs: StepOutputs) -> bool:
        """Finish a sequence if its new token, the last of `token_ids`, ends it."""
        num_known, matcher = len(sequence.token_ids), sequence.matcher
        # Without a mask it was free to sample what ends it: that is no end of a whole output.
        has_failed = matcher is not None and matcher.has_failed
        if token_id in sequence.stop_ids and num_known >= sequence.min_total and not has_failed:
            sequence.stop_reason = sequence.params.stop_reason(token_id, self._eos_token_ids)
            self.finish(sequence, "stop")
        elif matcher is not None and not matcher.accept(token_id):
            outputs.ended_by_grammar.append(sequence)
            if matcher.error is not None:
                cause = f"structured_outputs cannot go on: {matcher.error}"
                self._fail(sequence, Failure(cause, "grammar"), outputs)
                return True
            sequence.last_is_text = token_id not in self._eos_token_ids
            self.finish(sequence, "stop")
        elif num_known >= sequence.max_total:
            self.finish(sequence, "length")
        else:
            return False
        outputs.finished.append(sequence)
        return True

    def _fail(self, sequence: Sequence, failure: Failure, outputs: StepOutputs) -> None:
        self.finish(sequence, "error", failure=failure)
        outputs.failed.append(sequence)

    @staticmethod
    def _take_prompt_logprobs(
        outputs: StepOutputs, step: ScheduledStep, index: int, logprobs: PositionLogprobs
    ) -> None:
        """Those of entry `index` of the plan, but for what was reported before a preemption."""
        sequence = step.sequences[index]
        new = logprobs.after(sequence.num_prompt_logprobs - step.plan.num_computed[index])
        if new and sequence.status is not Status.FINISHED:
            sequence.num_prompt_logprobs += len(new)
            outputs.prompt_logprobs.append((sequence, new))

    # ---- running sequences

    def _schedule_running(self, step: ScheduledStep) -> None:
        """Give each running sequence its tokens, oldest first."""
        budget = step.budget
        cap = self.limits.long_prefill_token_threshold or budget
        awaits_ids = self.limits.awaits_ids
        # Of the sequences that decode, so that every step in flight has some.
        num_left = -(-len(self.running) // self.limits.max_inflight_steps)
        for sequence in self.running:  # from whose end some may be preempted meanwhile
            if budget <= 0:
                break
            self._at = sequence
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            if num_tokens >= sequence.max_total:
                continue  # its last token is sampled or pending; nothing is left to run
            num_new = num_tokens - sequence.num_computed
            if awaits_ids and num_new == 1:
                if sequence.num_pending or not num_left:
                    continue
                num_left -= 1
            if num_new > 1:
                num_new = min(num_new, cap, budget)
            end = sequence.num_computed + num_new
            if end > sequence.capacity and not self._grow(step, sequence, end):
                break
            if sequence.num_unsent:
                self._tell_known(step, sequence)
            self._advance(step, sequence, num_new)
            budget -= num_new
        step.num_tokens = step.budget - budget

    def _advance(self, step: ScheduledStep, sequence: Sequence, num_new: int) -> None:
        """Enter `num_new` tokens of `sequence` into the plan and count them as computed."""
        plan, start, num_known = step.plan, sequence.num_computed, len(sequence.token_ids)
        end = start + num_new
        if end == num_known + sequence.num_pending:
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
        if num_known >= sequence.next_registration <= end:
            self._blocks.register(sequence)
        if sequence.forks and sequence.has_computed_prompt:
            self._release_forks(sequence)

    def _grow(self, step: ScheduledStep, sequence: Sequence, num_tokens: int) -> bool:
        """Give it room for so many tokens in all; False if it was itself preempted for it."""
        blocks = self._blocks
        blocks.slide(sequence)
        lacking = blocks.lacking(sequence, num_tokens)
        if not self._free_blocks(len(lacking), sequence):
            return False
        blocks.grow(sequence, lacking, num_tokens)
        for index in lacking:
            block_id = sequence.block_ids[index]
            step.plan.block_appends.append(BlockAppend(sequence.row, index, block_id))
        return True

    @staticmethod
    def _tell_known(step: ScheduledStep, sequence: Sequence) -> None:
        """Let its row have the tokens that a grammar has forced."""
        position = len(sequence.token_ids) - sequence.num_unsent
        known = KnownTokens(sequence.row, position, sequence.token_ids[position:])
        step.plan.known_tokens.append(known)
        sequence.num_unsent = 0

    def _free_blocks(self, num_blocks: int, sequence: Sequence) -> bool:
        """Preempt the paused, then from the end of the order, until so many blocks are free; False
        if it hit `sequence`."""
        while self._blocks.num_free_blocks < num_blocks:
            victim = self.paused[-1] if self.paused else self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Recompute later: everything is freed, and admission waits for its pending ids."""
        among = self.paused if sequence.status is Status.PAUSED else self.running
        if among[-1] is sequence:
            among.pop()
        else:
            among.remove(sequence)
        self._let_go(sequence)
        sequence.status = Status.WAITING
        self.num_recomputed_tokens += sequence.num_computed
        sequence.num_recomputed_tokens += sequence.num_computed
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        # Safe with steps in flight: their writes run before any reuse (stream order).
        self._blocks.release(sequence)
        if sequence.row >= 0:
            self.free_rows.append(sequence.row)
            sequence.row = -1
        if sequence.forks:
            self._release_forks(sequence)

    # ---- waiting sequences

    def _make_room_for_urgent(self) -> None:
        """Let a waiting sequence of higher priority preempt the running ones below it."""
        while self.waiting and self.running:
            urgent = self._at = self.waiting.head()
            assert urgent is not None
            outranks = urgent.order[0] < self.running[-1].order[0]
            if not outranks or urgent.num_pending or self._blocks_to_share(urgent) is not None:
                return
            self._preempt(self.running[-1])

    def _blocks_to_share(self, sequence: Sequence) -> list[int] | None:
        """What `sequence` may reuse if it is admitted now; None if there is no room for it."""
        if not self.free_rows:
            return None
        shared = self._reusable_blocks(sequence)
        # Each running sequence will soon want one block more: leave them that much.
        has_room = self._blocks.can_hold(sequence, shared, reserve=len(self.running))
        return shared if has_room else None

    def _admit_waiting(self, step: ScheduledStep) -> int | None:
        """Admit while there is room; returns what holds up the rest, if there is one."""
        budget = step.budget - step.num_tokens
        cap = self.limits.long_prefill_token_threshold or budget
        while sequence := self.waiting.head():
            self._at = sequence
            if budget <= 0:
                return BUDGET
            if sequence.num_pending:
                return KV  # preempted with steps in flight: its last ids are not known yet
            shared = self._blocks_to_share(sequence)
            if shared is None:
                if self.paused:
                    self._preempt(self.paused[-1])
                    continue
                return KV if self.free_rows else SEATS
            self.waiting.remove(sequence)
            num_cached = self._blocks.num_tokens_in(shared)
            num_new = min(len(sequence.token_ids) - num_cached, cap, budget)
            self._blocks.hold(sequence, shared, num_tokens=num_cached + num_new)
            self._admit(step, sequence, num_cached)
            self._advance(step, sequence, num_new)
            budget -= num_new
            step.num_tokens += num_new
        return None

    def _admit(self, step: ScheduledStep, sequence: Sequence, num_cached: int) -> None:
        sequence.num_computed = num_cached
        sequence.row = self.free_rows.pop()
        sequence.num_unsent = 0  # a new row is told all
        insort(self.running, sequence, key=BY_ORDER)
        self._may_have_prompts = True
        sequence.status = Status.RUNNING
        if not sequence.started_at:
            sequence.started_at = time.monotonic()
            self.num_queued -= 1
            self.num_queued_tokens -= len(sequence.token_ids)
            self.waiting.charge_for_prompt(sequence)
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self._blocks.num_queries += sequence.num_prompt_tokens
            self._blocks.num_hits += sequence.num_computed
            self.newly_started.append(sequence)
        step.plan.new_rows.append(new_row(sequence))

    def _reusable_blocks(self, sequence: Sequence) -> list[int]:
        """Leading entries of a block table whose KV is there already: those of the leader's
        prompt, or the prefix cache's."""
        leader = sequence.leader
        if leader is not None and leader.row >= 0 and leader.has_computed_prompt:
            shared = self._blocks.prefix_of_leader(leader, sequence.num_prompt_tokens - 1)
            if shared:
                return shared
        if sequence.params.prompt_logprobs is not None:
            return []  # every prompt position must be run to have its log-probabilities
        return self._blocks.cached_prefix(sequence)

    def _release_forks(self, leader: Sequence) -> None:
        for sequence in leader.forks:
            self.waiting.push(sequence)
        leader.forks = []

    # ---- for tests

    def check_invariants(self) -> None:
        """Assert that rows, order and blocks are consistent; called between steps."""
        assert self.running == sorted(self.running, key=BY_ORDER)
        rows = [sequence.row for sequence in self.running + self.paused]
        assert sorted(rows + self.free_rows) == list(range(self.limits.max_num_seqs))
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert all(s.status is Status.WAITING and s.row == -1 for s in self.waiting)
        assert all(s.status is Status.PAUSED for s in self.paused)
        self._blocks.check_invariants(self.running + self.paused)


def token_budget(limits: StepLimits, running: Collection[Sequence], *, num_prompts: int) -> int:
    """Tokens of the next step. num_prompts: sequences with prompt tokens to run, of those that run
    and of those that wait and can be given a row.

    While no sequence decodes, the whole budget is for prompts. A decoding sequence waits for the
    prompts in its step, so the more of them there are for each sequence with a prompt to run, the
    fewer prompt tokens a step takes. The budget is halved, so that steps come in few sizes.
    """
    # Not those whose last token is sampled or on its way. To add truth values takes twice as long.
    num_decoding = [
        one.num_prompt_tokens <= one.num_computed < one.max_total - 1 for one in running
    ].count(True)
    for_prompts = limits.max_num_batched_tokens
    while num_prompts < num_decoding and for_prompts > limits.mixed_prefill_tokens:
        for_prompts = max(for_prompts // 2, limits.mixed_prefill_tokens)
        num_prompts *= 2
    return min(limits.max_num_batched_tokens, num_decoding + for_prompts)
