"""Runs the scheduler alone, on a recording, and compares its plans with those made then.

`nanovllm replay FILE` calls it. Nothing is sampled: results come from the file. To step through a
bug, iterate over `Replay` in a debugger.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from nanovllm.core.admission import OverloadedError
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.recorder import (
    LENGTH_BYTES,
    Added,
    CacheReset,
    Ended,
    Event,
    Header,
    Paused,
    Resumed,
    Returned,
    Stepped,
    Submitted,
    digest_of,
)
from nanovllm.core.snapshot import restore
from nanovllm.executor.base import DeviceLostError
from nanovllm.protocol import StepPlan, StepResult, WorkerInfo


class DivergedError(DeviceLostError):
    """The scheduler planned something else than it did then. No failure of one step, so it leaves
    the core as a lost device does."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__(f"step {plan.step} differs from the recording: {plan}")
        self.plan = plan


class Replay:
    """Iterate for the plans, each equal to the one recorded; `core` is there to be looked at.

    Raises `ValueError` if `path` is no recording, `DivergedError` where plans part ways.
    """

    def __init__(self, path: Path) -> None:
        self._events = _events(path)
        header = next(self._events, None)
        if not isinstance(header, Header):
            raise ValueError(f"{path} is no recording of nanovllm-core --record")
        self._plans: list[StepPlan] = []
        self.core = EngineCore(header.config, self, header.info)
        self._info = header.info
        if header.snapshot is not None:
            for step in restore(self.core, header.snapshot):
                self.core._inflight.append((step, self))

    def __iter__(self) -> Iterator[StepPlan]:
        for event in self._events:
            self._apply(event)
            yield from self._plans
            self._plans.clear()

    def _apply(self, event: Event) -> None:
        core = self.core
        match event:
            case Added(client_id, request):
                with suppress(ValueError, OverloadedError):  # it was refused then, too
                    core.add(client_id, request)
            case Ended(keys, reason):
                sequences = [core._sequences[client_id, number] for client_id, number in keys]
                core._end_by_request(sequences, reason)
            case Paused(client_id):
                core.pause(client_id)
            case Resumed(client_id):
                core.resume(client_id)
            case CacheReset():
                core.reset_prefix_cache()
            case Stepped():
                with suppress(EndOfRecordingError):
                    core.step()

    # ---- the executor of this core: what was answered then

    def start(self) -> WorkerInfo:
        return self._info

    def submit(self, plan: StepPlan) -> "Replay":
        then = next(self._events, None)
        if then is None:
            raise EndOfRecordingError
        if not isinstance(then, Submitted) or then.digest != digest_of(plan):
            raise DivergedError(plan)
        self._plans.append(plan)
        if then.error:
            raise RuntimeError(then.error)
        return self

    def result(self) -> StepResult:
        then = next(self._events, None)
        if not isinstance(then, Returned):
            raise EndOfRecordingError
        if then.result is None:
            raise RuntimeError(then.error)
        return then.result

    def shutdown(self) -> None:
        pass


class EndOfRecordingError(DeviceLostError):
    """The core was ended, or the file cut, in the middle of a step."""


def _events(path: Path) -> Iterator[Event]:
    """Up to the end, or to where an interrupted write has cut it."""
    decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
    try:
        with path.open("rb") as file:
            while len(prefix := file.read(LENGTH_BYTES)) == LENGTH_BYTES:
                encoded = file.read(int.from_bytes(prefix, "little"))
                if len(encoded) < int.from_bytes(prefix, "little"):
                    return
                yield decoder.decode(encoded)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} cannot be replayed: {error}") from None
