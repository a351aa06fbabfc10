"""A flight recorder: what went into the core, and a digest of each plan that came out.

`nanovllm-core --record FILE` has the core tell a `Recorder` of its events. The file begins with a
snapshot; when it has half the size allowed it becomes FILE.old and a new one begins, so there is
always enough and never too much. `replay` reads either.
"""

import os
from pathlib import Path
from typing import BinaryIO

import msgspec
import xxhash

from nanovllm.config import EngineConfig
from nanovllm.core import events
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.events import CoreListener, GrammarEvent
from nanovllm.core.sequence import ScheduledStep, Sequence, StepOutputs
from nanovllm.protocol.messages import AddRequest, FinishReason
from nanovllm.protocol.plan import StepPlan, StepResult, WorkerInfo
from nanovllm.replay.snapshot import Snapshot, take_snapshot

Key = tuple[int, int]  # of a sequence: its client and its number
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


class Forced(msgspec.Struct, tag=True):
    """Tokens of sequences that nobody samples. `ended`: as in `Returned`, with how many of these
    tokens went before the one that ended it."""

    runs: list[tuple[Key, list[int]]]
    ended: list[tuple[Key, int, str | None]]


class Stepped(msgspec.Struct, tag=True):
    """`EngineCore.step` was called; what it asked of the executor follows."""


class Submitted(msgspec.Struct, tag=True):
    """A step went to the executor: `digest` of its plan."""

    step: int
    digest: bytes


class SubmitFailed(msgspec.Struct, tag=True):
    """The executor did not take the step submitted last, or its second half."""

    error: str


class Returned(msgspec.Struct, tag=True):
    """A result, or the `error` it was. `ended`: sequences that their grammar ended with it, each
    with the error of its matcher, if there was one."""

    result: StepResult | None
    ended: list[tuple[Key, str | None]] = []
    error: str = ""


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
    | Forced
    | Stepped
    | Submitted
    | SubmitFailed
    | Returned
)


def digest_of(plan: StepPlan) -> bytes:
    """Equal exactly for plans that are equal."""
    return xxhash.xxh3_64_digest(msgspec.msgpack.encode(plan))


class Recorder(CoreListener):
    """Writes down everything that the plans of `core` depend on."""

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        info: WorkerInfo,
        *,
        path: Path,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._core = core
        self._header = Header(config, info, None)
        self._path = path
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._file = self._begin()

    def close(self) -> None:
        """What is written is complete."""
        self._file.close()

    def on_add(self, client_id: int, request: AddRequest) -> None:
        self._write(Added(client_id, request))

    def on_end_asked(self, sequences: list[Sequence], reason: FinishReason) -> None:
        self._write(Ended(keys_of(sequences), reason))

    def on_pause(self, client_id: int) -> None:
        self._write(Paused(client_id))

    def on_resume(self, client_id: int) -> None:
        self._write(Resumed(client_id))

    def on_reset(self) -> None:
        self._write(CacheReset())

    def on_turn(self) -> None:
        if self._num_bytes > self._max_bytes // 2:
            self.begin_anew()
        self._write(Stepped())

    def on_turn_over(self) -> None:
        self._file.flush()

    def on_grammar(self, event: GrammarEvent) -> None:
        match event:
            case events.GrammarBegun(is_known, error):
                self._write(Begun(is_known, error))
            case events.GrammarsCollected(requests):
                self._write(Collected([keys_of(sequences) for sequences in requests]))
            case events.Constrained(error):
                self._write(Constrained(error))
            case events.MasksFilled(error):
                self._write(Masked(error))
            case events.TokensForced(runs, ended):
                keys = [(key_of(one), token_ids) for one, token_ids in runs]
                ends = [(key_of(one), num_before, why) for one, num_before, why in ended]
                self._write(Forced(keys, ends))

    def on_submit(self, step: ScheduledStep) -> None:
        self._write(Submitted(step.plan.step, digest_of(step.plan)))

    def on_submit_failed(self, step: ScheduledStep, error: Exception) -> None:
        self._write(SubmitFailed(_text(error)))

    def on_result(
        self, step: ScheduledStep, result: StepResult, outputs: StepOutputs, now: float
    ) -> None:
        ended = [
            (key_of(one), None if one.matcher is None else one.matcher.error)
            for one in outputs.ended_by_grammar
        ]
        # Log-probabilities are no matter of scheduling, and large.
        kept = StepResult(result.step, result.token_ids, failures=result.failures)
        self._write(Returned(kept, ended))

    def on_step_failed(self, step: ScheduledStep, error: Exception, now: float) -> None:
        self._write(Returned(None, error=_text(error)))

    def begin_anew(self) -> None:
        """Keep what there is as FILE.old, and go on in a new file that begins with a snapshot."""
        self._file.close()
        self._path.replace(self._path.with_name(self._path.name + ".old"))
        self._header.snapshot = take_snapshot(self._core)
        self._begin()
        self._header.snapshot = None

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


def key_of(sequence: Sequence) -> Key:
    return sequence.client_id, sequence.number


def keys_of(sequences: list[Sequence]) -> list[Key]:
    return [key_of(one) for one in sequences]


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
