"""A flight recorder: what went into the core, and a digest of each plan that came out.

`nanovllm-core --record FILE` makes a `RecordedCore`. The file begins with a snapshot; when it has
half the size allowed it becomes FILE.old and a new one begins, so there is always enough and never
too much. `replay` reads either.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec
import xxhash

from nanovllm.config import EngineConfig
from nanovllm.core.compilations import Compilations, Outcome, Waiting
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.core.sequence import Sequence
from nanovllm.core.step import ScheduledStep, StepOutputs
from nanovllm.executor.base import Executor, StepHandle
from nanovllm.protocol.messages import AddRequest, FinishReason
from nanovllm.protocol.plan import StepPlan, StepResult, WorkerInfo
from nanovllm.replay.snapshot import Snapshot, take_snapshot
from nanovllm.sampling_params import StructuredOutputsParams

MAX_BYTES = 64 * 2**20
LENGTH_BYTES = 4  # before each event


class Header(msgspec.Struct, tag=True):
    """The first event of a file. No snapshot: the core had just started."""

    config: EngineConfig
    info: WorkerInfo
    snapshot: Snapshot | None


class Added(msgspec.Struct, tag=True):
    client_id: int
    request: AddRequest


class Ended(msgspec.Struct, tag=True):
    """By `abort`, `abort_client`, `fail` or a deadline."""

    keys: list[tuple[int, int]]
    reason: FinishReason


class Paused(msgspec.Struct, tag=True):
    client_id: int


class Resumed(msgspec.Struct, tag=True):
    client_id: int


class CacheReset(msgspec.Struct, tag=True):
    pass


class Begun(msgspec.Struct, tag=True):
    """A grammar was asked for: it was known, or must be waited for, or cannot be had (`error`)."""

    is_known: bool
    error: str = ""


class Collected(msgspec.Struct, tag=True):
    """The sequences of these requests need not wait for their grammar any longer."""

    requests: list[list[tuple[int, int]]]


class Constrained(msgspec.Struct, tag=True):
    """A request got its matchers, or, by `error`, it did not."""

    error: str = ""


class Masked(msgspec.Struct, tag=True):
    """The masks of a step were made, or not."""

    error: str = ""


class GrammarEnded(msgspec.Struct, tag=True):
    """An output is over with the token it has just got: by its grammar, or by `error`."""

    key: tuple[int, int]
    error: str | None


class Stepped(msgspec.Struct, tag=True):
    """`EngineCore.step` was called; what it asked of the executor follows."""


class Submitted(msgspec.Struct, tag=True):
    """`digest` of the plan; `error` if the executor refused it."""

    step: int
    digest: bytes
    error: str = ""


class Returned(msgspec.Struct, tag=True):
    """A result, or the error it was."""

    result: StepResult | None
    error: str = ""


Write = Callable[["Event"], None]
Event = (
    Header
    | Added
    | Ended
    | Paused
    | Resumed
    | CacheReset
    | Begun
    | Collected
    | Constrained
    | Masked
    | GrammarEnded
    | Stepped
    | Submitted
    | Returned
)


def digest_of(plan: StepPlan) -> bytes:
    """Equal exactly for plans that are equal but for what their masks allow, which a grammar says
    and not the scheduler."""
    if plan.masks:
        plan = msgspec.structs.replace(plan, masks=dict.fromkeys(plan.masks, b""))
    return xxhash.xxh3_64_digest(msgspec.msgpack.encode(plan))


class RecordedCore(EngineCore):
    """An `EngineCore` that writes down everything its plans depend on."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        info: WorkerInfo,
        compiler: GrammarCompiler | None = None,
        wake: Callable[[], None] = lambda: None,
        *,
        path: Path,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__(config, RecordedExecutor(executor, self._write), info, compiler, wake)
        self._compilations = RecordedCompilations(
            compiler,
            timeout_s=config.grammar.grammar_timeout_s,
            wake=wake,
            write=self._write,
        )
        self._header = Header(config, info, None)
        self._path = path
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._file = self._begin()

    def add(self, client_id: int, request: AddRequest) -> None:
        self._write(Added(client_id, request))
        super().add(client_id, request)

    def pause(self, client_id: int) -> None:
        if client_id not in self._paused:
            self._write(Paused(client_id))
        super().pause(client_id)

    def resume(self, client_id: int) -> None:
        if client_id in self._paused:
            self._write(Resumed(client_id))
        super().resume(client_id)

    def reset_prefix_cache(self) -> bool:
        self._write(CacheReset())
        return super().reset_prefix_cache()

    def step(self) -> StepOutputs | None:
        if self._num_bytes > self._max_bytes // 2:
            self._turn_over()
        self._write(Stepped())
        try:
            return super().step()
        finally:
            self._file.flush()

    def close(self) -> None:
        """What is written is complete."""
        self._file.close()

    def _end_by_request(self, sequences: list[Sequence], reason: FinishReason) -> list[Sequence]:
        if sequences:
            keys = [(one.client_id, one.number) for one in sequences]
            self._write(Ended(keys, reason))
        return super()._end_by_request(sequences, reason)

    def _mask(self, step: ScheduledStep) -> None:
        masked = Masked()
        try:
            super()._mask(step)
        except Exception as error:
            masked.error = str(error) or type(error).__name__
            raise
        finally:
            self._write(masked)

    def _write(self, event: Event) -> None:
        encoded = self._encoder.encode(event)
        self._file.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
        self._num_bytes += LENGTH_BYTES + len(encoded)

    def _begin(self) -> BinaryIO:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._num_bytes = 0
        self._write(self._header)
        self._num_bytes = 0  # the snapshot's size says nothing of how long the file lasts
        return self._file

    def _turn_over(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".old"))
        self._header.snapshot = take_snapshot(self)
        self._begin()
        self._header.snapshot = None


class RecordedCompilations(Compilations):
    """Writes down when a grammar is there, and what it ends."""

    def __init__(
        self,
        compiler: GrammarCompiler | None,
        *,
        timeout_s: float,
        wake: Callable[[], None],
        write: Write,
    ) -> None:
        super().__init__(compiler, timeout_s=timeout_s, wake=wake)
        self._write = write

    def begin(self, wanted: StructuredOutputsParams, request: Waiting) -> Outcome | None:
        try:
            outcome = super().begin(wanted, request)
        except ValueError as error:
            self._write(Begun(False, str(error)))
            raise
        self._write(Begun(outcome is not None))
        return outcome

    def collect(self) -> list[tuple[Waiting, Outcome]]:
        over = super().collect()
        keys = [[(one.client_id, one.number) for one in group.sequences] for group, _ in over]
        self._write(Collected(keys))
        return over

    def constrain(self, sequences: list[Sequence], outcome: Outcome) -> None:
        try:
            super().constrain(sequences, outcome)
        except ValueError as error:
            self._write(Constrained(str(error)))
            raise
        self._write(Constrained())
        for sequence in sequences:
            assert sequence.matcher is not None
            key = sequence.client_id, sequence.number
            sequence.matcher = RecordedMatcher(sequence.matcher, key, self._write)


class RecordedMatcher(Matcher):
    """Writes down where the output ends."""

    __slots__ = ("_key", "_write")

    def __init__(self, matcher: Matcher, key: tuple[int, int], write: Write) -> None:
        super().__init__(matcher._matcher, matcher.family)
        self._key = key
        self._write = write

    def accept(self, token_id: int) -> bool:
        goes_on = super().accept(token_id)
        if not goes_on:
            self._write(GrammarEnded(self._key, self.error))
        return goes_on


class RecordedExecutor:
    """Passes everything on, and writes it down."""

    def __init__(self, executor: Executor, write: Write) -> None:
        self._executor = executor
        self._write = write

    def start(self) -> WorkerInfo:
        return self._executor.start()

    def submit(self, plan: StepPlan) -> StepHandle:
        submitted = Submitted(plan.step, digest_of(plan))
        try:
            handle = self._executor.submit(plan)
        except Exception as error:
            submitted.error = str(error) or type(error).__name__
            raise
        finally:
            self._write(submitted)
        return RecordedHandle(handle, self._write)

    def rehearse(self) -> bool:
        return self._executor.rehearse()

    def shutdown(self) -> None:
        self._executor.shutdown()


class RecordedHandle:
    """A step that was submitted."""

    def __init__(self, handle: StepHandle, write: Write) -> None:
        self._handle = handle
        self._write = write

    def result(self) -> StepResult:
        try:
            result = self._handle.result()
        except Exception as error:
            self._write(Returned(None, str(error) or type(error).__name__))
            raise
        # Log-probabilities are no matter of scheduling, and large.
        kept = StepResult(result.step, result.token_ids, failures=result.failures)
        self._write(Returned(kept))
        return result
