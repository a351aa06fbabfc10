"""The straight line of the engine: requests in, steps through the executor, outputs out.

Owns the sequences by (client, number) and the steps in flight; `process.CoreServer` calls it from
its busy loop. Synchronous and overlapped execution differ in one integer, `max_inflight_steps`.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.compilations import Compilations, Outcome
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.scheduler import ScheduledStep, Scheduler, StepOutputs
from nanovllm.core.sequence import Sequence, Status
from nanovllm.executor.base import Executor, StepHandle
from nanovllm.protocol import AddRequest, CoreStatus, WorkerInfo

Key = tuple[int, int]


class EngineCore:
    """Runs sequences on `executor`, which has been started and reported `info`.

    compiler: for structured outputs, which are refused without one. wake: called from other threads
    when `step` has something to do that it had not before.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        info: WorkerInfo,
        compiler: GrammarCompiler | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        limits = config.scheduler.limits(info.device)
        self._max_inflight = limits.max_inflight_steps
        self._executor = executor
        self._info = info
        self._blocks = BlockManager(
            num_blocks=info.num_blocks,
            block_size=config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        self._scheduler = Scheduler(
            limits,
            self._blocks,
            max_model_len=info.max_model_len,
            eos_token_ids=frozenset(info.eos_token_ids),
        )
        self._compiler = compiler
        self._compilations = Compilations(
            compiler, timeout_s=config.grammar.grammar_timeout_s, wake=wake
        )
        self._failures: list[tuple[Sequence, str]] = []
        self._seeds = random.Random(config.model.seed)
        self._sequences: dict[Key, Sequence] = {}
        self._inflight: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self._num_steps = 0
        self._last_step_s = 0.0
        self._last_result_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do now. A grammar being compiled is nothing yet."""
        return (
            bool(self._inflight)
            or self._compilations.has_news
            or (bool(self._sequences) and len(self._sequences) > self._compilations.num_waiting)
        )

    @property
    def next_deadline(self) -> float:
        """When to call `step` though it was not busy before, in time.monotonic (inf: never)."""
        return self._compilations.next_deadline

    def add(self, client_id: int, request: AddRequest) -> None:
        """Queue all `n` sequences of a request.

        Raises `ValueError` naming the field; nothing is queued then. Frontends check the same
        before they send: this guards the core against those that do not.
        """
        self._check(client_id, request)
        wanted = request.params.structured_outputs
        sequences = self._make_sequences(client_id, request)
        outcome = None
        if wanted is not None:
            outcome = self._compilations.begin(wanted, sequences, request.priority)
            if outcome is not None:
                _constrain(sequences, outcome)
        for sequence in sequences:
            self._sequences[client_id, sequence.number] = sequence
        if wanted is None or outcome is not None:
            self._queue(sequences, request.priority)

    def _make_sequences(self, client_id: int, request: AddRequest) -> list[Sequence]:
        # The grammar is the core's affair: workers see masks.
        params = msgspec.structs.replace(request.params, structured_outputs=None)
        sequences: list[Sequence] = []
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        for index in range(params.n):
            number = request.number + index
            sequence = Sequence(client_id, number, request.prompt_token_ids.copy(), params)
            sequence.token_ids += request.output_token_ids
            sequence.bad_words_token_ids = request.bad_words_token_ids
            sequence.cache_salt = request.cache_salt
            sequence.seed = (seed + index) & (2**63 - 1)
            if index and params.prompt_logprobs is not None:  # the first reports them for all
                sequence.params = msgspec.structs.replace(params, prompt_logprobs=None)
            sequences.append(sequence)
        return sequences

    def _queue(self, sequences: list[Sequence], priority: int) -> None:
        leader, *others = sequences
        for sequence in others:
            sequence.leader = leader
        for sequence in sequences:
            self._scheduler.add(sequence, priority=priority)

    def abort(self, client_id: int, numbers: list[int]) -> list[Sequence]:
        """End those of `numbers` that still run; returns them, finished."""
        aborted = []
        for number in numbers:
            sequence = self._sequences.pop((client_id, number), None)
            if sequence is not None:
                if self._compilations.withdraw(sequence):
                    sequence.status, sequence.finish_reason = Status.FINISHED, "abort"
                else:
                    self._scheduler.finish(sequence, "abort")
                aborted.append(sequence)
        return aborted

    def abort_client(self, client_id: int) -> list[Sequence]:
        """End everything a client still has running; returns it, finished."""
        numbers = [number for client, number in self._sequences if client == client_id]
        return self.abort(client_id, numbers)

    def step(self) -> StepOutputs | None:
        """Submit the next step if there is one; take in the oldest result if it is time to."""
        if self._compilations.has_news:
            self._take_compiled()
        step = self._scheduler.schedule()
        if step is not None:
            if step.constrained:
                self._mask(step)
            self._inflight.append((step, self._executor.submit(step.plan)))
        if not self._inflight or (step is not None and len(self._inflight) < self._max_inflight):
            return None
        step, handle = self._inflight.popleft()
        result = handle.result()
        self._count_step()
        outputs = self._scheduler.update(step, result)
        for sequence in outputs.finished:
            del self._sequences[sequence.client_id, sequence.number]
        for sequence in outputs.failed:
            self._fail(sequence)
        return outputs

    def take_failures(self) -> list[tuple[Sequence, str]]:
        """Sequences that failed since the last call, and why."""
        failures, self._failures = self._failures, []
        return failures

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; True if none was in use."""
        return self._blocks.reset_prefix_cache()

    def status(self, *, epoch: str, num_clients: int) -> CoreStatus:
        """Counts and counters of this moment."""
        scheduler, blocks = self._scheduler, self._blocks
        return CoreStatus(
            epoch=epoch,
            step=self._num_steps,
            last_step_ms=self._last_step_s * 1e3,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._compilations.num_waiting,
            num_blocks=blocks.num_blocks - 1,
            num_free_blocks=blocks.num_free_blocks,
            num_clients=num_clients,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generation_tokens=scheduler.num_generation_tokens,
            prefix_cache_queries=blocks.num_queries,
            prefix_cache_hits=blocks.num_hits,
        )

    # ---- structured outputs

    def _take_compiled(self) -> None:
        """Queue the requests whose grammar is ready, fail those that will have none."""
        for waiting, outcome in self._compilations.collect():
            try:
                _constrain(waiting.sequences, outcome)
            except ValueError as error:
                for sequence in waiting.sequences:
                    sequence.status, sequence.finish_reason = Status.FINISHED, "error"
                    self._fail(sequence, f"{type(error).__name__}: {error}")
            else:
                self._queue(waiting.sequences, waiting.priority)

    def _mask(self, step: ScheduledStep) -> None:
        """Put into the plan which ids its constrained sequences may sample."""
        assert self._compiler is not None
        matchers = [step.sampled[index].matcher for index in step.constrained]
        masks = self._compiler.fill_masks([m for m in matchers if m is not None])
        step.plan.masks.update(zip(step.constrained, masks, strict=True))
        for index in step.constrained:
            sequence = step.sampled[index]
            if sequence.matcher is not None and sequence.matcher.error is not None:
                self._scheduler.finish(sequence, "error")  # `update` will drop its result
                self._fail(sequence)

    def _fail(self, sequence: Sequence, message: str | None = None) -> None:
        """message: by default that of its matcher."""
        del self._sequences[sequence.client_id, sequence.number]
        if message is None:
            assert sequence.matcher is not None
            message = f"structured_outputs: cannot go on: {sequence.matcher.error}"
        self._failures.append((sequence, message))

    def _count_step(self) -> None:
        now = time.monotonic()
        self._last_step_s = now - self._last_result_at
        self._last_result_at = now
        self._num_steps += 1

    def _check(self, client_id: int, request: AddRequest) -> None:
        info, params = self._info, request.params
        num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
        if not request.prompt_token_ids:
            raise ValueError("prompt_token_ids is empty: send at least one token")
        if num_known >= info.max_model_len:
            raise ValueError(
                f"prompt_token_ids holds {num_known} tokens, which leaves no room for output: "
                f"max_model_len is {info.max_model_len}"
            )
        if params.max_tokens is not None and len(request.output_token_ids) >= params.max_tokens:
            raise ValueError("output_token_ids: max_tokens were generated already")
        for index in range(params.n):
            if (client_id, request.number + index) in self._sequences:
                raise ValueError(f"number {request.number + index} is in use: count upwards")
        for name, token_ids in _named_token_ids(request):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < info.vocab_size:
                raise ValueError(f"{name}: token ids must be in [0, {info.vocab_size})")
        if not all(request.bad_words_token_ids):
            raise ValueError("bad_words_token_ids: a word of no tokens")


def _constrain(sequences: list[Sequence], outcome: Outcome) -> None:
    """Give each its own matcher, behind the tokens it has generated before. `ValueError`: none."""
    if isinstance(outcome, ValueError):
        raise ValueError(str(outcome))
    for sequence in sequences:
        matcher = outcome.copy()
        matcher.replay(sequence.token_ids[sequence.num_prompt_tokens :])
        sequence.matcher = matcher


def _named_token_ids(request: AddRequest) -> Iterator[tuple[str, Collection[int]]]:
    """Everything in a request that the worker will use as an index."""
    yield "prompt_token_ids", request.prompt_token_ids
    yield "output_token_ids", request.output_token_ids
    yield "stop_token_ids", request.params.stop_token_ids
    yield "logit_bias", request.params.logit_bias
    yield "allowed_token_ids", request.params.allowed_token_ids or ()
    for word in request.bad_words_token_ids:
        yield "bad_words_token_ids", word
