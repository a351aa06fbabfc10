"""Runs the scheduler alone, on a recording, and compares its plans with those made then.

`nanovllm replay FILE` calls it. Nothing is sampled, and no grammar is looked at: results, and what
grammars decided, come from the file. To step through a bug, iterate over `Replay` in a debugger.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from nanovllm.core.admission import OverloadedError
from nanovllm.core.compilations import Outcome, Waiting
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import Grammar, Masks, MasksUnderWay, Matcher
from nanovllm.core.kept_masks import Vocabulary
from nanovllm.core.sequence import Sequence
from nanovllm.protocol.plan import DeviceLostError, StepMasks, StepPlan, StepResult, WorkerInfo
from nanovllm.replay.recorder import (
    LENGTH_BYTES,
    Added,
    Begun,
    CacheReset,
    Collected,
    Constrained,
    Ended,
    Event,
    Forced,
    Header,
    Key,
    Masked,
    Paused,
    Resumed,
    Returned,
    Stepped,
    SubmitFailed,
    Submitted,
    digest_of,
    keys_of,
)
from nanovllm.replay.snapshot import restore
from nanovllm.sampling_params import StructuredOutputsParams

E = TypeVar("E", bound=Event)
NO_VOCABULARY = Vocabulary([], np.zeros(1, np.int32))


class DivergedError(DeviceLostError):
    """The scheduler did something else than it did then. No failure of one step, so it leaves the
    core as a lost device does."""


class EndOfRecordingError(DeviceLostError):
    """The core was ended, or the file cut, in the middle of a step."""


class Tape:
    """Events in order; `next` is None at the end."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self.next = next(events, None)
        # By their grammars, with the tokens taken in last: how many each took before, and why.
        self.ended: dict[Key, tuple[int, str | None]] = {}

    def take(self) -> Event:
        """The next one. Raises `EndOfRecordingError`."""
        event = self.next
        if event is None:
            raise EndOfRecordingError
        self.next = next(self._events, None)
        return event

    def expect(self, kind: type[E]) -> E:
        """The next one, which is of this kind unless the core has done something else."""
        event = self.take()
        if not isinstance(event, kind):
            raise DivergedError(f"{kind.__name__} differs from the recording, which has {event}")
        return event


class Replay:
    """Iterate for the plans, each equal to the one recorded; `core` is there to be looked at.

    Raises `ValueError` if `path` is no recording, `DivergedError` where plans part ways.
    """

    def __init__(self, path: Path) -> None:
        self._tape = Tape(_events(path))
        header = self._tape.next
        if not isinstance(header, Header):
            raise ValueError(f"{path} is no recording of nanovllm-core --record")
        self._tape.take()
        self._plans: list[StepPlan] = []
        self._info = header.info
        self.core = EngineCore(header.config, self, header.info)
        grammars = self.core.grammars = ReplayedGrammars(self._tape)
        if header.snapshot is not None:
            steps = restore(
                self.core,
                header.snapshot,
                make_matcher=lambda sequence: ReplayedMatcher(sequence, self._tape),
                wait=grammars.waiting.append,
            )
            for step in steps:
                self.core.inflight.append((step, self))
            if header.snapshot.is_unsampled:
                self.core.unsampled = steps[-1]

    def __iter__(self) -> Iterator[StepPlan]:
        while self._tape.next is not None:
            self._apply(self._tape.take())
            yield from self._plans
            self._plans.clear()

    def _apply(self, event: Event) -> None:
        core = self.core
        match event:
            case Added(client_id, request):
                # It was refused then, too, or never entered in whole.
                with suppress(ValueError, OverloadedError, EndOfRecordingError):
                    core.add(client_id, request)
            case Ended(keys, reason):
                core.end([core.sequences[client_id, number] for client_id, number in keys], reason)
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

    def allocate(self, num_blocks: int) -> None:
        """No KV is kept."""

    def submit(self, plan: StepPlan) -> "Replay":
        then = self._tape.take()
        if not isinstance(then, Submitted) or then.digest != digest_of(plan):
            raise DivergedError(f"step {plan.step} differs from the recording: {plan}")
        self._plans.append(plan)
        self._fail_if_it_did()
        return self

    def sample(self, step: int, masks: StepMasks | None) -> None:
        self._fail_if_it_did()

    def _fail_if_it_did(self) -> None:
        if isinstance(self._tape.next, SubmitFailed):
            raise RuntimeError(self._tape.expect(SubmitFailed).error)

    def warm_up(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def result(self) -> StepResult:
        then = self._tape.expect(Returned)
        self._tape.ended = {key: (0, error) for key, error in then.ended}
        if then.result is None:
            raise RuntimeError(then.error)
        return then.result

    def shutdown(self) -> None:
        pass


class ReplayedGrammars:
    """Nothing is compiled: what was compiled then is there when it was there then."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.waiting: list[Waiting] = []
        self.next_deadline = math.inf

    @property
    def num_waiting(self) -> int:
        return sum(len(group.sequences) for group in self.waiting)

    @property
    def has_news(self) -> bool:
        return isinstance(self._tape.next, Collected)

    def begin(self, wanted: StructuredOutputsParams, request: Waiting) -> Outcome | None:
        begun = self._tape.expect(Begun)
        if begun.error:
            raise ValueError(begun.error)
        if begun.is_known:
            return ReplayedGrammar()
        self.waiting.append(request)
        return None

    def collect(self) -> list[tuple[Waiting, Outcome]]:
        over: list[tuple[Waiting, Outcome]] = []
        for keys in self._tape.expect(Collected).requests:
            (group,) = (one for one in self.waiting if keys_of(one.sequences) == keys)
            self.waiting.remove(group)
            over.append((group, ReplayedGrammar()))
        return over

    def withdraw(self, sequence: Sequence) -> None:
        for group in self.waiting:
            if sequence in group.sequences:
                group.sequences.remove(sequence)

    def begin_masks(self, matchers: list[Matcher]) -> MasksUnderWay:
        return ReplayedMasks(self._tape, matchers)

    def constrain(self, sequences: list[Sequence], outcome: Outcome) -> None:
        if error := self._tape.expect(Constrained).error:
            raise ValueError(error)
        for sequence in sequences:
            sequence.matcher = ReplayedMatcher(sequence, self._tape)


class ReplayedMasks:
    """They are there, or failed, as they were then, when it is asked."""

    def __init__(self, tape: Tape, matchers: list[Matcher]) -> None:
        self._tape = tape
        self._keys = [one.key for one in matchers if isinstance(one, ReplayedMatcher)]

    def done(self) -> bool:
        return isinstance(self._tape.next, Masked)

    def exception(self) -> None:
        return None

    def result(self) -> Masks:
        if error := self._tape.expect(Masked).error:
            raise RuntimeError(error)
        forced = dict[int, list[int]]()
        if isinstance(self._tape.next, Forced):
            event = self._tape.expect(Forced)
            self._tape.ended = {key: (num_before, error) for key, num_before, error in event.ended}
            forced = {self._keys.index(key): token_ids for key, token_ids in event.runs}
        return Masks([], forced, NO_VOCABULARY)


class ReplayedGrammar(Grammar):
    """Makes no matchers: those of sequences are the tape's."""

    def __init__(self) -> None:
        pass


class ReplayedMatcher(Matcher):
    """Ends where the recorded one did."""

    __slots__ = ("_tape", "key")

    def __init__(self, sequence: Sequence, tape: Tape) -> None:
        self.key = sequence.client_id, sequence.number
        self._tape = tape
        self.error = None

    @property
    def has_failed(self) -> bool:
        num_left, error = self._tape.ended.get(self.key, (0, None))
        return error is not None and not num_left

    def follow(self, token_id: int) -> bool:
        return False

    def accept(self, token_id: int) -> bool:
        ending = self._tape.ended.get(self.key)
        if ending is None:
            return True
        num_left, error = ending
        if num_left:
            self._tape.ended[self.key] = num_left - 1, error
            return True
        self.error = error
        return False


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
