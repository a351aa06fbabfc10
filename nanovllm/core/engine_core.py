"""One turn of the engine: requests in, a step through the executor, outputs out.

Owns the sequences by (client, number) and the steps in flight; `server.CoreServer` calls it from
its busy loop. Synchronous and overlapped execution differ in one integer, `max_inflight_steps`.
Whatever goes wrong fails the sequences it went wrong for; only `DeviceLostError` gets out.
"""

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable

from nanovllm.config import EngineConfig
from nanovllm.core.admission import Admission, Deadlines, check_request
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.compilations import Compilations, Grammars, Outcome, Waiting
from nanovllm.core.events import (
    Constrained,
    CoreListener,
    GrammarBegun,
    GrammarEvent,
    GrammarsCollected,
    MasksFilled,
    TokensForced,
)
from nanovllm.core.failures import Failure
from nanovllm.core.grammar import GrammarCompiler, MasksUnderWay, Matcher
from nanovllm.core.kept_masks import SentMasks
from nanovllm.core.pace import Pace
from nanovllm.core.patience import Patience
from nanovllm.core.scheduler import Scheduler
from nanovllm.core.sequence import (
    ScheduledStep,
    SchedulingFailedError,
    Sequence,
    Status,
    StepOutputs,
)
from nanovllm.executor.base import Executor
from nanovllm.protocol.messages import AddRequest, CoreStatus, FinishReason
from nanovllm.protocol.plan import DeviceLostError, StepHandle, StepMasks, WorkerInfo
from nanovllm.sampling_params import StructuredOutputsParams

Key = tuple[int, int]
LOG = logging.getLogger(__name__)


class EngineCore:
    """Runs sequences on `executor`, which has been started and reported `info`.

    compiler: for structured outputs, which are refused without one. wake: called from other threads
    when `step` has something to do that it had not before. on_long_step: called before a step that
    may take longer than those before it, as `patience` then says. `grammars`, `sequences` (all that
    have not ended, by client and number), `inflight`, `unsampled`, `paused_clients` and `seeds` are
    the core's own, and public for who records the core and runs a recording again.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        info: WorkerInfo,
        compiler: GrammarCompiler | None = None,
        wake: Callable[[], None] = lambda: None,
        on_long_step: Callable[[], None] = lambda: None,
    ) -> None:
        limits = config.limits(info.device)
        self._max_inflight = limits.max_inflight_steps
        self.executor = executor  # which others may have warm up, or check, while not `busy`
        self._info = info
        self.blocks = BlockManager(
            num_blocks=info.num_blocks,
            block_size=config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            windows=info.kv_windows,
            step_tokens=limits.max_num_batched_tokens,
            num_first_blocks=info.num_first_blocks,
        )
        self.scheduler = Scheduler(
            limits,
            self.blocks,
            max_model_len=info.max_model_len,
            eos_token_ids=frozenset(info.eos_token_ids),
        )
        self._admission = Admission(config.service)
        self._deadlines = Deadlines()
        self.grammars: Grammars = Compilations(
            compiler, timeout_s=config.grammar.grammar_timeout_s, wake=wake
        )
        self.pace = Pace(is_allowed=config.scheduler.allow_debug)
        self.seeds = random.Random(config.model.seed)
        self.sequences: dict[Key, Sequence] = {}
        self.paused_clients: set[int] = set()
        self.inflight: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self.unsampled: ScheduledStep | None = None  # the last of them, between its halves
        self._masks: MasksUnderWay | None = None  # of that one, as far as they have been begun
        self._masked: list[int] = []  # whose they are: indices into its sampled sequences
        self._sent_masks = SentMasks(vocab_size=info.vocab_size)
        self._listeners: tuple[CoreListener, ...] = ()
        self._num_steps = 0
        self._last_step_s = 0.0
        self.patience = Patience(info, depth=self._max_inflight)
        self._on_long_step = on_long_step
        # Since when there has been work, or the last step has been over: the next one could begin.
        self._started_at = self._ready_at = time.monotonic()
        self._num_failed_steps = self._num_failed = self._num_timeouts = 0

    def listen(self, listener: CoreListener) -> None:
        """Tell it of all that happens from now on."""
        self._listeners = (*self._listeners, listener)

    def forget(self, listener: CoreListener) -> None:
        """Tell it no more."""
        self._listeners = tuple(one for one in self._listeners if one is not listener)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do now. A grammar being compiled is nothing yet."""
        sequences = self.scheduler.running or self.scheduler.waiting
        return bool(self.inflight or sequences or self.grammars.has_news)

    def may_step(self, now: float) -> bool:
        """Whether `step` has anything to do now, and nobody holds it."""
        return self.busy and self.pace.next_step_at <= now

    @property
    def lets_device_wait(self) -> bool:
        """Whether a whole step is queued and none under way: it should go before more comes in."""
        most = self.scheduler.limits.max_num_batched_tokens
        is_due = not self.inflight and self.scheduler.num_queued_tokens >= most
        return is_due and self.may_step(time.monotonic())

    @property
    def num_unfinished(self) -> int:
        return len(self.sequences)

    @property
    def all_have_begun(self) -> bool:
        """Whether every sequence has a token from this core, but for those of paused clients."""
        return all(
            one.first_token_at or one.client_id in self.paused_clients
            for one in self.sequences.values()
        )

    @property
    def next_deadline(self) -> float:
        """When `expire` or `step` will be due, on `time.monotonic`'s clock."""
        return min(self._deadlines.next_due or math.inf, self.grammars.next_deadline)

    def add(self, client_id: int, request: AddRequest) -> None:
        """Queue all `n` sequences of a request.

        Raises `ValueError` naming the field, or `OverloadedError`; nothing is queued then.
        """
        for listener in self._listeners:
            listener.on_add(client_id, request)
        params = request.params
        check_request(request, self._info)
        for index in range(params.n):
            if (client_id, request.number + index) in self.sequences:
                raise ValueError(f"number {request.number + index} is in use: count upwards")
        self._admission.check(
            request,
            num_queued=self.scheduler.num_queued,
            num_queued_tokens=self.scheduler.num_queued_tokens,
        )
        if not self.busy:
            self._ready_at = time.monotonic()
        tenant = f"client {client_id}" if request.tenant is None else f"tenant {request.tenant}"
        made = Waiting(self._make_sequences(client_id, request), request.priority, tenant)
        wanted = params.structured_outputs
        is_ready = wanted is None or self._begin_grammar(wanted, made)
        for sequence in made.sequences:
            self.sequences[client_id, sequence.number] = sequence
            if request.deadline_ms is not None or request.ttft_deadline_ms is not None:
                self._deadlines.add(sequence, request)
        if is_ready:
            self._queue(made)

    def _make_sequences(self, client_id: int, request: AddRequest) -> list[Sequence]:
        params = request.params
        if params.structured_outputs is not None:  # workers get masks instead
            params = params.with_values(structured_outputs=None)
        sequences: list[Sequence] = []
        seed = params.seed if params.seed is not None else self.seeds.getrandbits(63)
        for index in range(params.n):
            if index == 1 and params.prompt_logprobs is not None:  # the first reports them for all
                params = params.with_values(prompt_logprobs=None)
            sequence = Sequence(
                client_id,
                request.number + index,
                request.prompt_token_ids,
                params,
                output_token_ids=request.output_token_ids,
                seed=(seed + index) & (2**63 - 1),
                bad_words_token_ids=request.bad_words_token_ids,
                cache_salt=request.cache_salt,
            )
            sequences.append(sequence)
        return sequences

    def _queue(self, request: Waiting) -> None:
        """request: those of its sequences that have not ended while they waited for a grammar."""
        leader: Sequence | None = None
        for one in request.sequences:
            self.scheduler.add(one, priority=request.priority, tenant=request.tenant, leader=leader)
            leader = leader or one

    def abort(self, client_id: int, numbers: list[int]) -> list[Sequence]:
        """End those of `numbers` that still run; returns them, finished."""
        found = (self.sequences.get((client_id, number)) for number in dict.fromkeys(numbers))
        return self.end([one for one in found if one is not None], "abort")

    def abort_client(self, client_id: int) -> list[Sequence]:
        """End everything a client still has running; returns it, finished."""
        self.resume(client_id)
        mine = [one for one in self.sequences.values() if one.client_id == client_id]
        return self.end(mine, "abort")

    def fail(self, client_id: int, number: int, cause: str) -> list[Sequence]:
        """End a sequence that cannot go on; returns it, unless it has ended before."""
        sequence = self.sequences.get((client_id, number))
        if sequence is None:
            return []
        self._num_failed += 1
        return self.end([sequence], "error", failure=Failure(cause))

    def pause(self, client_id: int) -> None:
        """Run nothing for this client until `resume`: it does not read what it has got."""
        if client_id not in self.paused_clients:
            for listener in self._listeners:
                listener.on_pause(client_id)
            self.paused_clients.add(client_id)
            self.scheduler.pause(client_id)

    def resume(self, client_id: int) -> None:
        """Undo `pause`, if there was one."""
        if client_id in self.paused_clients:
            for listener in self._listeners:
                listener.on_resume(client_id)
            if not self.busy:
                self._ready_at = time.monotonic()
            self.paused_clients.remove(client_id)
            self.scheduler.resume(client_id)

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed; returns them, finished."""
        expired = self.end(self._deadlines.pop_expired(now), "timeout")
        self._num_timeouts += len(expired)
        return expired

    def step(self) -> StepOutputs | None:
        """Submit the next step if there is one; take in the oldest result if it is time to.

        Raises `DeviceLostError`. Any other failure is an output: some sequences have `failed`.
        """
        return self._step_watched() if self._listeners else self._step()

    def _step_watched(self) -> StepOutputs | None:
        for listener in self._listeners:
            listener.on_turn()
        try:
            return self._step()
        finally:
            for listener in self._listeners:
                listener.on_turn_over()

    def _step(self) -> StepOutputs | None:
        if self.grammars.has_news and (refused := self._take_compiled()):
            return StepOutputs(failed=refused)
        early, has_submitted = self._go_on()
        if early is not None and early.failed:
            return early
        may_submit = has_submitted and self.unsampled is None
        if not self.inflight or (may_submit and len(self.inflight) < self._max_inflight):
            return early
        outputs = self._take_result(*self.inflight.popleft())
        if early is not None:
            early.extend(outputs)
            outputs = early
        if self.unsampled is not None and not self.unsampled.awaits_ids:
            return _joined(outputs, self._begin_second_half(self.unsampled))
        return outputs

    def _begin_second_half(self, step: ScheduledStep) -> StepOutputs | None:
        """Begin a step's masks, which may depend on the ids that have just come."""
        # They are computed while the caller delivers outputs and takes in requests …
        self._begin_masks(step)
        is_held = self.pace.next_step_at > self._ready_at
        if self._masks is None or not self._masks.done() or is_held:
            return None
        # … but for few, which are there: the device would wait for the delivery.
        return self._go_on()[0]

    def _go_on(self) -> tuple[StepOutputs | None, bool]:
        """Queue the second half of the step that lacks it, and submit the next one, as far as both
        are possible now. Returns what came of it at once, and whether a step was submitted."""
        early = None
        if self.unsampled is not None and not self.unsampled.awaits_ids:
            early = self._sample_constrained(self.unsampled)
            if early is not None and early.failed:
                return early, False
        if self.unsampled is not None:
            return early, False
        try:
            step = self.scheduler.schedule()
        except SchedulingFailedError as failure:
            failed = self._fail([failure.sequence], Failure.of(failure.cause))
            return _joined(early, StepOutputs(failed=failed)), False
        if step is None:
            return early, False
        lost = self._submit(step)
        return (lost if early is None else _joined(early, lost)), True

    def _take_result(self, step: ScheduledStep, handle: StepHandle) -> StepOutputs:
        """Wait for a step, and take in what came of it."""
        try:
            result = handle.result()
            outputs = self.scheduler.update(step, result)
        except Exception as error:
            return self._give_up(step, error)
        self._count_step(step)
        for listener in self._listeners:
            listener.on_result(step, result, outputs, self._ready_at)
        self._settle(outputs)
        return outputs

    def _settle(self, outputs: StepOutputs) -> None:
        """Count the sequences that have begun with these, and forget those that have ended."""
        if outputs.started:
            self._admission.note_starts(len(outputs.started), time.monotonic())
        for sequence in outputs.finished:
            del self.sequences[sequence.client_id, sequence.number]
            self._deadlines.remove(sequence)
        for sequence in outputs.failed:
            assert sequence.failure is not None
            self._fail([sequence], sequence.failure)

    def _submit(self, step: ScheduledStep) -> StepOutputs | None:
        """Send a step off; returns its failure, if that is what came of it."""
        if self.patience.begin(step.num_tokens):
            self._on_long_step()
        try:
            for listener in self._listeners:
                listener.on_submit(step)
            handle = self.executor.submit(step.plan)
            if not step.constrained:
                self.executor.sample(step.plan.step, None)
        except Exception as error:
            return self._give_up(step, error, was_submitted=False)
        self.inflight.append((step, handle))
        if step.constrained:
            self.unsampled = step
            if not step.awaits_ids:
                self._begin_masks(step)
                return self._sample_constrained(step)
        return None

    def _sample_constrained(self, step: ScheduledStep) -> StepOutputs | None:
        """Send off the second half of the step submitted last, whose masks depend on no id any more
        that is on its way. Returns the sequences that fail with it, and tokens that need no
        sampling."""
        self.unsampled = None
        masks, forced, failed = self._take_masks(step)
        early = StepOutputs(failed=failed) if failed else None
        try:
            self.executor.sample(step.plan.step, masks)
        except Exception as error:
            self.inflight.pop()
            return _joined(early, self._give_up(step, error, was_submitted=False))
        return _joined(self._force_tokens(step, forced), early) if forced else early

    # ---- structured outputs

    def _begin_grammar(self, wanted: StructuredOutputsParams, request: Waiting) -> bool:
        """Whether it has its matchers; else its grammar is compiled first. Raises `ValueError`."""
        try:
            outcome = self.grammars.begin(wanted, request)
        except ValueError as error:
            self._tell(GrammarBegun(False, str(error)))
            raise
        self._tell(GrammarBegun(outcome is not None))
        if outcome is not None:
            self._constrain(request.sequences, outcome)
        return outcome is not None

    def _constrain(self, sequences: list[Sequence], outcome: Outcome) -> None:
        """Give each sequence its matcher. Raises `ValueError` if there is none for them."""
        try:
            self.grammars.constrain(sequences, outcome)
        except ValueError as error:
            self._tell(Constrained(str(error)))
            raise
        self._tell(Constrained())

    def _take_compiled(self) -> list[Sequence]:
        """Queue the requests whose grammar is ready; returns the sequences that have none."""
        refused: list[Sequence] = []
        over = self.grammars.collect()
        self._tell(GrammarsCollected([request.sequences for request, _ in over]))
        for request, outcome in over:
            try:
                self._constrain(request.sequences, outcome)
            except ValueError as error:
                refused += self._fail(request.sequences, Failure.of(error))
            else:
                self._queue(request)
        return refused

    def _begin_masks(self, step: ScheduledStep) -> None:
        """Begin to compute which ids the step's constrained sequences may sample.

        One that has ended meanwhile samples freely: its id will be dropped. One whose matcher fails
        here does as well, and fails when its id comes back.
        """
        sampled, finished, matchers = step.sampled, Status.FINISHED, list[Matcher]()
        self._masked = [i for i in step.constrained if sampled[i].status is not finished]
        for index in self._masked:
            matcher = sampled[index].matcher
            assert matcher is not None, "what makes it constrained"
            matchers.append(matcher)
        self._masks = self.grammars.begin_masks(matchers) if matchers else None

    def _take_masks(
        self, step: ScheduledStep
    ) -> tuple[StepMasks | None, dict[int, list[int]], list[Sequence]]:
        """What `_begin_masks` has begun, which of the step's sampled sequences must go on with
        which tokens, and the sequences that fail of it."""
        if self._masks is None:
            self._begin_masks(step)  # a replay may begin with a step between its halves
        masks, indices, self._masks = self._masks, self._masked, None
        if masks is None:
            return None, {}, []
        if all(step.sampled[index].status is Status.FINISHED for index in indices):
            masks.exception()  # waits until the matchers are free again
            return None, {}, []
        try:
            lines, forced, vocabulary = masks.result()
        except Exception as error:
            failure = Failure.of(error)
            self._tell(MasksFilled(failure.message))
            all_masked = [step.sampled[index] for index in indices]
            live = [one for one in all_masked if one.status is not Status.FINISHED]
            return None, {}, self._fail(live, failure)
        self._tell(MasksFilled())
        by_index = {indices[place]: token_ids for place, token_ids in forced.items()}
        return self._sent_masks.pack(indices, lines, vocabulary), by_index, []

    def _force_tokens(
        self, step: ScheduledStep, forced: dict[int, list[int]]
    ) -> StepOutputs | None:
        """Take in the tokens that grammars leave no choice about, where that spares steps.

        The step has masks that allow the first of them only; what it samples there is dropped. Who
        wants log-probabilities gets them by sampling.
        """
        outputs, runs = StepOutputs(), list[tuple[Sequence, list[int]]]()
        ended: list[tuple[Sequence, int, str | None]] = []
        for index, token_ids in forced.items():
            sequence = step.sampled[index]
            if sequence.status is Status.FINISHED or sequence.params.logprobs is not None:
                continue
            if not self.scheduler.is_worth_forcing(len(token_ids)):
                continue
            num_before, num_ended = len(outputs.token_ids), len(outputs.ended_by_grammar)
            self.scheduler.force(step, index, token_ids, outputs)
            runs.append((sequence, token_ids))
            if len(outputs.ended_by_grammar) > num_ended and sequence.matcher is not None:
                num_taken = len(outputs.token_ids) - num_before
                ended.append((sequence, num_taken - 1, sequence.matcher.error))
        if not runs:
            return None
        outputs.started = self.scheduler.take_started()
        self._tell(TokensForced(runs, ended))
        self._settle(outputs)
        if outputs.finished:
            for listener in self._listeners:
                listener.on_end(outputs.finished)
        return outputs

    def _tell(self, event: GrammarEvent) -> None:
        for listener in self._listeners:
            listener.on_grammar(event)

    # ---- what fails, and what ends

    def _give_up(
        self, step: ScheduledStep, error: Exception, *, was_submitted: bool = True
    ) -> StepOutputs:
        """A step has failed, and with it the sequences in it. Raises `DeviceLostError`, if it is
        one: then nothing can go on.

        So have those admitted in a later step on a prefix that this one may have had to compute.
        The prefix cache is emptied, since it may hold blocks that were never computed.
        """
        if isinstance(error, DeviceLostError):
            raise error
        for listener in self._listeners:
            if was_submitted:
                listener.on_step_failed(step, error, time.monotonic())
            else:
                listener.on_submit_failed(step, error)
        LOG.error("step %d failed", step.plan.step, exc_info=error)
        self._num_failed_steps += 1
        self._sent_masks.forget()
        self._count_step(step)
        lost = dict.fromkeys(step.sequences)
        for later, _ in self.inflight:
            lost |= dict.fromkeys(later.admitted_on_a_prefix())
        self.blocks.reset_prefix_cache()
        return StepOutputs(failed=self._fail(list(lost), Failure.of(error)))

    def _fail(self, sequences: list[Sequence], failure: Failure) -> list[Sequence]:
        # Some may have been marked as finished by the step that failed: they fail all the same.
        known = [one for one in sequences if self.sequences.get((one.client_id, one.number)) is one]
        self._num_failed += len(known)
        return self._end(known, "error", failure)

    def end(
        self, sequences: list[Sequence], reason: FinishReason, *, failure: Failure | None = None
    ) -> list[Sequence]:
        """End these between steps, for a reason that lies outside of them; returns them."""
        if sequences:
            for listener in self._listeners:
                listener.on_end_asked(sequences, reason)
        return self._end(sequences, reason, failure)

    def _end(
        self, sequences: list[Sequence], reason: FinishReason, failure: Failure | None
    ) -> list[Sequence]:
        for sequence in sequences:
            del self.sequences[sequence.client_id, sequence.number]
            self._deadlines.remove(sequence)
            if not sequence.is_queued:  # its grammar is still being compiled, or was refused
                self.grammars.withdraw(sequence)
            self.scheduler.finish(sequence, reason, failure=failure)
        for listener in self._listeners:
            listener.on_end(sequences)
        return sequences

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; True if none was in use."""
        for listener in self._listeners:
            listener.on_reset()
        return self.blocks.reset_prefix_cache()

    @property
    def stalled_s(self) -> float:
        """Seconds for which there has been work and no step has finished."""
        if not self.busy:
            return 0.0
        now = time.monotonic()
        return now - self._could_step_since(now)

    def _could_step_since(self, now: float) -> float:
        """Since when there has been work, no step has finished and nobody has held the next."""
        held_until = self.pace.next_step_at
        return self._ready_at if self._ready_at >= held_until else min(now, held_until)

    def status(self, *, epoch: str, num_clients: int) -> CoreStatus:
        """Counts and counters of this moment."""
        scheduler, blocks = self.scheduler, self.blocks
        return CoreStatus(
            epoch=epoch,
            step=self._num_steps,
            last_step_ms=self._last_step_s * 1e3,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self.grammars.num_waiting,
            num_blocks=blocks.num_blocks - 1,
            num_free_blocks=blocks.num_free_blocks,
            num_clients=num_clients,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generation_tokens=scheduler.num_generation_tokens,
            prefix_cache_queries=blocks.num_queries,
            prefix_cache_hits=blocks.num_hits,
            num_paused=scheduler.num_paused,
            num_queued=scheduler.num_queued,
            num_queued_tokens=scheduler.num_queued_tokens,
            num_recomputed_tokens=scheduler.num_recomputed_tokens,
            num_failed_steps=self._num_failed_steps,
            num_failed=self._num_failed,
            num_timeouts=self._num_timeouts,
            num_overloaded=self._admission.num_overloaded,
            num_forced_tokens=scheduler.num_forced_tokens,
            uptime_s=time.monotonic() - self._started_at,
            stalled_s=self.stalled_s,
            patience_s=self.patience.seconds,
            is_held=self.pace.is_held(time.monotonic()),
        )

    def _count_step(self, step: ScheduledStep) -> None:
        now = time.monotonic()
        self._last_step_s = now - self._could_step_since(now)
        self.patience.note(self._last_step_s, step.num_tokens)
        self._ready_at = now
        self._num_steps += 1
        if now < self.pace.until:
            self.pace.note_step(now)


def _joined(first: StepOutputs | None, second: StepOutputs | None) -> StepOutputs | None:
    if first is None or second is None:
        return first or second
    first.extend(second)
    return first
