"""Requests that wait for their grammar: compiled in threads, with limits, remembered for the next.

`EngineCore` owns one, begins here what is constrained, and collects it between steps. A thread that
compiles cannot be stopped, only left alone: `GrammarCompiler`'s limits end it, and its request is
answered in time without it.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

from nanovllm.core.failures import GrammarRefusedError
from nanovllm.core.grammar import (
    Grammar,
    GrammarCompiler,
    MasksUnderWay,
    Matcher,
    cache_key,
    lexers_for,
)
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import StructuredOutputsParams

MAX_REMEMBERED = 32  # grammars, or the reasons why they are none
MAX_THREADS = 4  # that compile within their time …
MAX_LATE = 12  # … and those, besides, that nobody waits for any more
PATIENCE_S = 10.0  # beyond it requests wait, on a machine that is busy: with others' grammars, too
LINGER_S = 10.0  # of a thread with nothing to do: one that has just begun compiles half as fast
MAX_EXTRA_S = 0.05  # that outputs wait for lexers which they will share
STACK_BYTES = 16 << 20  # of such a thread: far more than the sandbox grants the same grammar

Outcome = Grammar | ValueError


@dataclass(slots=True)
class Waiting:
    """The sequences of one request, and how to queue them."""

    sequences: list[Sequence]
    priority: int
    tenant: str


class Stage(Enum):
    """Where a job is. LATE: in a thread still, but nobody waits for it any more."""

    QUEUED = 0
    RUNNING = 1
    LATE = 2
    ENDED = 3


@dataclass(slots=True, eq=False)
class Job:
    """One grammar, and the requests that wait for it. Its stage changes under the lock."""

    key: bytes
    wanted: StructuredOutputsParams
    since: float
    spent: Grammar | None  # what it compiled to before
    waiting: list[Waiting]
    stage: Stage = Stage.QUEUED


class Grammars(Protocol):
    """What `EngineCore` asks of whoever has the grammars: `Compilations`, or a recording."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def waiting(self) -> list[Waiting]: ...

    @property
    def next_deadline(self) -> float: ...

    @property
    def has_news(self) -> bool: ...

    def begin(self, wanted: StructuredOutputsParams, request: Waiting) -> Outcome | None: ...

    def withdraw(self, sequence: Sequence) -> None: ...

    def collect(self) -> list[tuple[Waiting, Outcome]]: ...

    def constrain(self, sequences: list[Sequence], outcome: Outcome) -> None: ...

    def begin_masks(self, matchers: list[Matcher]) -> MasksUnderWay: ...


class Compilations:
    """timeout_s: of processor time, which the sandbox limits; requests are answered within that and
    `PATIENCE_S` by the clock, not counting the tokenizer's loading.
    wake: called from threads when there is something to collect."""

    def __init__(
        self, compiler: GrammarCompiler | None, *, timeout_s: float, wake: Callable[[], None]
    ) -> None:
        self._compiler = compiler
        self._limit_s = timeout_s + PATIENCE_S
        self._wake = wake
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()
        self._jobs: dict[bytes, Job] = {}  # those that somebody waits for
        self._lock = threading.Condition()  # of the next four; notified of new jobs
        self._queue: deque[Job] = deque()
        self._num_threads = self._num_idle = 0
        self._num_late = 0  # of the threads
        self._ended: SimpleQueue[tuple[Job, Outcome]] = SimpleQueue()
        self._loaded_at = math.inf

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return sum(len(group.sequences) for group in self.waiting)

    @property
    def waiting(self) -> list[Waiting]:
        """The requests that wait."""
        return [group for job in self._jobs.values() for group in job.waiting if group.sequences]

    @property
    def next_deadline(self) -> float:
        """When `collect` has to be called even if nothing ends before (time.monotonic)."""
        return min(map(self._deadline, self._jobs.values()), default=math.inf)

    @property
    def has_news(self) -> bool:
        """Whether `collect` would return anything."""
        if not self._jobs and self._ended.empty():
            return False  # nearly always, and asked several times a step
        return not self._ended.empty() or time.monotonic() >= self.next_deadline

    def begin(self, wanted: StructuredOutputsParams, request: Waiting) -> Outcome | None:
        """The outcome, if it is known; else None, and `collect` will return the request.

        Raises `GrammarRefusedError` if there is no compiler.
        """
        if self._compiler is None:
            raise GrammarRefusedError(
                "structured_outputs need a tokenizer in the core, and it was told to load none "
                "(skip_tokenizer_init)"
            )
        key = cache_key(wanted)
        known = self._outcomes.get(key)
        spent = known if isinstance(known, Grammar) and known.is_spent else None
        if known is not None and spent is None:
            self._outcomes.move_to_end(key)
            return known
        job = self._jobs.get(key)
        if job is not None:
            job.waiting.append(request)
            return None
        # Whole before a thread sees it: `_compile` counts the outputs that wait.
        job = self._jobs[key] = Job(key, wanted, time.monotonic(), spent, [request])
        with self._lock:
            self._queue.append(job)
        self._start_threads()
        return None

    def withdraw(self, sequence: Sequence) -> None:
        """Forget a sequence, if it waits here."""
        for group in self.waiting:
            if sequence in group.sequences:
                group.sequences.remove(sequence)

    def collect(self) -> list[tuple[Waiting, Outcome]]:
        """Those whose wait is over, in the order in which it ended."""
        over: list[tuple[Waiting, Outcome]] = []
        while True:
            try:
                job, outcome = self._ended.get_nowait()
            except Empty:
                break
            self._remember(job.key, outcome)
            if self._jobs.get(job.key) is job:
                over += self._end(job, outcome)
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if now >= self._deadline(job)]:
            over += self._give_up(job)
        return over

    def _give_up(self, job: Job) -> list[tuple[Waiting, Outcome]]:
        with self._lock:
            if job.stage is Stage.ENDED:
                return []  # just now: it is collected the next time
            late = ValueError(
                f"structured_outputs: not compiled within {self._limit_s:g} s: simplify it, raise "
                "grammar_timeout_s, or try again when the machine is less busy"
            )
            if job.stage is Stage.QUEUED:
                self._queue.remove(job)
            else:
                job.stage = Stage.LATE
                self._num_late += 1
                self._remember(job.key, late)
        self._start_threads()
        return self._end(job, late)

    def _end(self, job: Job, outcome: Outcome) -> list[tuple[Waiting, Outcome]]:
        del self._jobs[job.key]
        return [(group, outcome) for group in job.waiting if group.sequences]

    def _remember(self, key: bytes, outcome: Outcome) -> None:
        self._outcomes[key] = outcome
        if len(self._outcomes) > MAX_REMEMBERED:
            self._outcomes.popitem(last=False)

    def _deadline(self, job: Job) -> float:
        return max(job.since, self._loaded_at) + self._limit_s

    def constrain(self, sequences: list[Sequence], outcome: Outcome) -> None:
        """Give each its own matcher, behind the tokens it has generated before.
        `GrammarRefusedError`: there is none."""
        if isinstance(outcome, ValueError):
            raise GrammarRefusedError(str(outcome))
        for sequence in sequences:
            matcher = outcome.matcher()
            matcher.replay(sequence.token_ids[sequence.num_prompt_tokens :])
            sequence.matcher = matcher
        if outcome.wants_lexer():
            self._start_thread(partial(_add_lexers, outcome))

    def begin_masks(self, matchers: list[Matcher]) -> MasksUnderWay:
        """Of each, which ids may come next; see `GrammarCompiler.begin_masks`."""
        assert self._compiler is not None
        return self._compiler.begin_masks(matchers)

    # ---- threads

    @property
    def _most_threads(self) -> int:
        return MAX_THREADS + min(self._num_late, MAX_LATE)

    @property
    def _is_crowded(self) -> bool:
        return self._num_threads > self._most_threads

    def _start_threads(self) -> None:
        with self._lock:
            self._lock.notify(len(self._queue))
            num_new = len(self._queue) - self._num_idle
            wanted = min(num_new, self._most_threads - self._num_threads)
            self._num_threads += max(0, wanted)
        for _ in range(wanted):
            self._start_thread(self._run)

    def _start_thread(self, target: Callable[[], None]) -> None:
        before = threading.stack_size(STACK_BYTES)  # of threads started from here on
        # A daemon: the process must be able to end while one compiles.
        threading.Thread(target=target, name="grammar", daemon=True).start()
        threading.stack_size(before)

    def _run(self) -> None:
        """Compile what is queued, without waiting for the loop: a step may take long."""
        while (job := self._take()) is not None:
            outcome = self._compile(job)
            with self._lock:
                if job.stage is Stage.LATE:
                    self._num_late -= 1
                job.stage = Stage.ENDED
            self._ended.put((job, outcome))
            self._wake()

    def _take(self) -> Job | None:
        """The next job; None if there is none for a while or this thread is one too many, which
        ends it."""
        with self._lock:
            self._num_idle += 1
            self._lock.wait_for(lambda: self._queue or self._is_crowded, LINGER_S)
            self._num_idle -= 1
            if not self._queue or self._is_crowded:
                self._num_threads -= 1
                return None
            job = self._queue.popleft()
            job.stage = Stage.RUNNING
            return job

    def _compile(self, job: Job) -> Outcome:
        assert self._compiler is not None
        try:
            self._compiler.load()
            self._loaded_at = min(self._loaded_at, time.monotonic())
            grammar = job.spent.renewed() if job.spent else self._compiler.compile(job.wanted)
            num_outputs = sum(len(group.sequences) for group in list(job.waiting))
            # For all that begin at once; what takes long is added while they run.
            num_lexers = min(lexers_for(num_outputs), 1 + int(MAX_EXTRA_S / grammar.lexer_s))
            while grammar.num_lexers < num_lexers:
                grammar.add_lexer()
            return grammar
        except ValueError as error:
            return error
        except BaseException as error:  # also a panic of Rust code: it must cost this one only
            return ValueError(f"structured_outputs: {type(error).__name__}: {error}")


def _add_lexers(grammar: Grammar) -> None:
    """The one that is wanted, and those that outputs begun meanwhile want."""
    grammar.add_lexer()
    while grammar.wants_lexer():
        grammar.add_lexer()
