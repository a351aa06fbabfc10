"""Many ranks as one executor: plans go to all of them, and the first that samples answers.

`launch` chooses it for several ranks, or ranks of a Ray cluster; the core plans for one device.
Ranks run the same steps in the same order, and meet in their sums: a rank that dies or raises ends
the whole group, within `WATCH_S` of its death wherever this waits. A rank that is stopped is not
dead: it is reported, and waited for.
"""

import logging
import select
import time
from collections.abc import Iterator
from contextlib import suppress
from zlib import crc32

import msgspec
import numpy as np
from msgspec.structs import replace

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import ChannelClosedError
from nanovllm.executor.launcher import StartedRank, make_launcher
from nanovllm.protocol.group import (
    Allocate,
    Allocated,
    Connect,
    Digest,
    FromRank,
    Leave,
    Listening,
    Progress,
    RankFailed,
    Sample,
    Sampled,
    Started,
    Submit,
    ToRank,
    WarmedUp,
    WarmUp,
)
from nanovllm.protocol.plan import (
    DeviceLostError,
    KnownTokens,
    ProgressCallback,
    StepMasks,
    StepPlan,
    StepResult,
    WorkerInfo,
)

WATCH_S = 0.1  # between two looks at whether all ranks live, and how often progress is told
TELL_STOPPED_AFTER_S = 1.0
CONSEQUENCE_S = 0.3  # in which a rank's death is noticed after others have failed of it
LEAVE_S = 5.0
KILLED_S = 1.0
LOG = logging.getLogger(__name__)


class GroupExecutor:
    """An `executor.base.Executor` over ranks that share a model, wherever they run."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._config = config
        self._on_progress = on_progress
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._launcher = make_launcher(config, on_progress)
        self._ranks: list[StartedRank] = []
        self._poll = select.poll()
        self._results: dict[int, StepResult] = {}
        self._sampled = SampledElsewhere()
        self._digests: dict[int, list[Digest]] = {}  # step → those of the ranks
        self._lost: DeviceLostError | None = None
        self._ask_at = 0.0  # whether all hosts are there
        self._is_running = False  # a failure is a step's, not the configuration's

    def start(self) -> WorkerInfo:
        """Start all ranks, and load the model on each. Blocks are those that fit everywhere."""
        size = self._config.parallel.num_ranks
        for started in self._launcher.start():
            self._ranks.append(started)
            for descriptor in started.channel.descriptors:
                self._poll.register(descriptor, select.POLLIN)
        infos: dict[int, WorkerInfo] = {}
        phase, share = "starting", 0.0
        for received in self._received("the start"):
            for rank, message in received:
                match message:
                    case Listening(port):
                        self._send(Connect(port, self._ranks[0].host), self._ranks[1:])
                    case Progress() if rank.rank == 0:
                        phase, share = message.phase, message.share
                    case Started(info):
                        infos[rank.rank] = info
            self._on_progress(phase, share)
            if len(infos) == size:
                break
        return self._joined([infos[number] for number in range(size)])

    def _joined(self, infos: list[WorkerInfo]) -> WorkerInfo:
        """What the group says of itself: of the first rank, with blocks that all have room for."""
        first, size = infos[0], len(infos)
        num_stages = self._config.parallel.pipeline_parallel_size
        num_blocks = min(info.num_blocks for info in infos)
        note = f"{size} ranks share the model; figures of memory are those of each"
        if num_stages > 1:
            note = (
                f"{size} ranks share the model, in {num_stages} stages; figures of memory are "
                "those of each in the first"
            )
        per_block = first.kv_cache_bytes // max(1, first.num_blocks)
        return replace(
            first,
            num_blocks=num_blocks,
            kv_cache_bytes=per_block * num_blocks,
            notes=[note, *first.notes],
        )

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache on every rank."""
        self._send(Allocate(num_blocks))
        num_done = 0
        for received in self._received("the KV cache"):
            num_done += sum(isinstance(message, Allocated) for _, message in received)
            if num_done == len(self._ranks):
                break
        self._is_running = True

    def submit(self, plan: StepPlan) -> "GroupStep":
        """Send the first half of a step to all ranks."""
        if self._config.parallel.pipeline_parallel_size > 1:
            plan = self._sampled.told_in(plan)
        self._send(Submit(plan))
        return GroupStep(self, plan.step)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """Send the second half; masks are copied into the message."""
        self._send(Sample(step, masks))

    def warm_up(self) -> bool:
        """Have all ranks run a step of a kind that has not occurred yet."""
        self._send(WarmUp())
        answers: list[bool] = []
        for received in self._received("warm-up"):
            answers += [found.has_more for _, found in received if isinstance(found, WarmedUp)]
            if len(answers) == len(self._ranks):
                break
        return any(answers)  # stages may have kinds of their own

    def check(self) -> None:
        """Whether all ranks live, between steps, when none has anything to say."""
        self._hear(0.0)

    def wait_for(self, step: int) -> StepResult:
        """The result of a step whose halves have been sent. Raises `DeviceLostError`."""
        parallel = self._config.parallel
        num_digests = parallel.num_ranks if parallel.compare_ranks else 0
        more = self._received(f"step {step}")
        while step not in self._results or len(self._digests.get(step, ())) < num_digests:
            for _, message in next(more):
                match message:
                    case Sampled(result):
                        self._results[result.step] = result
                    case Digest():
                        self._digests.setdefault(message.step, []).append(message)
        result = self._results.pop(step)
        digests = self._digests.pop(step, [])
        found = {digest.sampled for digest in digests} - {None, digest_of(result.token_ids)}
        if found or len({digest.begun for digest in digests}) > 1:
            raise self._end(f"ranks have different ids in step {step}")
        if parallel.pipeline_parallel_size > 1:
            self._sampled.take(result)
        return result

    def shutdown(self) -> None:
        """End all ranks: politely unless the group is lost. Safe to call twice."""
        if self._lost is None and self._is_running:
            with suppress(DeviceLostError):  # one is dead: the others have been ended
                self._send(Leave())
        until = time.monotonic() + (LEAVE_S if self._is_running and self._lost is None else 0.0)
        for rank in self._ranks:
            rank.end(max(0.0, until - time.monotonic()))
        self._ranks = []
        self._launcher.close()
        self._is_running = False

    # ---- the channels

    def _send(self, message: ToRank, ranks: list[StartedRank] | None = None) -> None:
        """To these ranks (all), encoded once."""
        if self._lost is not None:
            raise self._lost
        frame = self._encoder.encode(message)
        waiting = list(self._ranks if ranks is None else ranks)
        try:
            for rank in waiting:
                rank.channel.send(frame)
            while waiting := [rank for rank in waiting if not rank.channel.flush()]:
                room = select.poll()
                for one in waiting:
                    one.channel.ask()
                    room.register(one.channel, select.POLLOUT)
                room.poll(WATCH_S * 1e3)
        except ChannelClosedError:
            failed: dict[int, RankFailed | None] = {}
            for _ in self._take(rank, failed):  # its last words may still be there
                pass
            raise self._explain(failed or {rank.rank: None}) from None

    def _received(self, what: str) -> Iterator[list[tuple[StartedRank, FromRank]]]:
        """What ranks say, again and again, for as long as the caller waits for more. what: it waits
        for, to be told if a signal has stopped a rank."""
        started, told = time.monotonic(), set[str]()
        while True:
            yield self._receive(WATCH_S)
            if time.monotonic() - started > TELL_STOPPED_AFTER_S:
                self._tell_stopped(what, told)

    def _receive(self, timeout_s: float) -> list[tuple[StartedRank, FromRank]]:
        """`_hear`, by who waits for ranks: their hosts are asked whether they are there."""
        if time.monotonic() > self._ask_at:
            self._ask_at = time.monotonic() + WATCH_S
            for rank in self._ranks:
                rank.channel.ask()
        return self._hear(timeout_s)

    def _hear(self, timeout_s: float) -> list[tuple[StartedRank, FromRank]]:
        """What ranks say, as soon as there is any. Raises if one has failed or is dead."""
        if self._lost is not None:
            raise self._lost
        received: list[tuple[StartedRank, FromRank]] = []
        failed: dict[int, RankFailed | None] = {}
        for rank in self._ready(timeout_s):
            received += self._take(rank, failed)
        if failed:
            raise self._explain(failed)
        return received

    def _ready(self, timeout_s: float) -> Iterator[StartedRank]:
        found = {descriptor for descriptor, _ in self._poll.poll(timeout_s * 1e3)}
        return (rank for rank in self._ranks if not found.isdisjoint(rank.channel.descriptors))

    def _take(
        self, rank: StartedRank, failed: dict[int, RankFailed | None]
    ) -> Iterator[tuple[StartedRank, FromRank]]:
        """failed: takes up what went wrong; None: the rank is dead, without a word."""
        try:
            for frame in rank.channel.receive():
                message = self._decoder.decode(frame)
                if isinstance(message, RankFailed):
                    failed.setdefault(rank.rank, message)
                else:
                    yield rank, message
        except ChannelClosedError:
            for descriptor in rank.channel.descriptors:
                self._poll.unregister(descriptor)
            failed.setdefault(rank.rank, None)

    # ---- what ends a group

    def _explain(self, failed: dict[int, RankFailed | None]) -> Exception:
        """End the group; returns what to raise. A rank that died without a word is the cause, be it
        that others have failed of its death and said so first."""
        until = time.monotonic() + CONSEQUENCE_S
        while None not in failed.values() and (left_s := until - time.monotonic()) > 0:
            for rank in self._ready(left_s):
                for _ in self._take(rank, failed):
                    pass
        dead = [rank for rank, failure in failed.items() if failure is None]
        if dead:
            return self._end(*self._ranks[dead[0]].cause_of_death())
        first, failure = next(iter(failed.items()))
        assert failure is not None
        if failure.usage and not self._is_running:
            self._end(failure.message)
            return ValueError(failure.message)
        LOG.error("%s failed:\n%s", self._ranks[first], failure.details)
        return self._end(f"{self._ranks[first]} failed: {failure.message}")

    def _end(self, cause: str, from_outside: bool = False) -> DeviceLostError:
        told = f"{cause}: the {len(self._ranks)} ranks of its group have been ended"
        self._lost = DeviceLostError(told, from_outside=from_outside)
        for rank in self._ranks:
            rank.kill()
        until = time.monotonic() + KILLED_S
        for rank in self._ranks:  # `shutdown` waits for one that its device holds up
            rank.wait(max(0.0, until - time.monotonic()))
        return self._lost

    def _tell_stopped(self, what: str, told: set[str]) -> None:
        """told: takes up which ranks it has been said of."""
        if stopped := {str(rank) for rank in self._ranks if rank.is_stopped} - told:
            told |= stopped
            LOG.warning("%s waits for %s, stopped by a signal", what, ", ".join(sorted(stopped)))


class GroupStep:
    """A step that all ranks have been sent."""

    __slots__ = ("_group", "_step")

    def __init__(self, group: GroupExecutor, step: int) -> None:
        self._group = group
        self._step = step

    def result(self) -> StepResult:
        return self._group.wait_for(self._step)


class SampledElsewhere:
    """The ids that the last stage of a pipeline has sampled, on their way to the others.

    They go with the next plan, as tokens that are known: a row is planned again only once its id is
    back (`StepLimits.awaits_ids`), so that no way from stage to stage would bring it sooner.
    """

    def __init__(self) -> None:
        # Of each step under way: the rows it samples for, and the positions of their new tokens.
        self._awaited: dict[int, list[tuple[int, int]]] = {}
        self._known: dict[int, KnownTokens] = {}  # by row: those that no plan has told of yet

    def take(self, result: StepResult) -> None:
        """The ids of a step that is over."""
        awaited = self._awaited.pop(result.step)
        for (row, position), token_id in zip(awaited, result.token_ids, strict=True):
            if row >= 0:
                self._known[row] = KnownTokens(row, position, [token_id])

    def told_in(self, plan: StepPlan) -> StepPlan:
        """The plan, with what is known by now. What a plan says itself of a row, which is another
        sequence's or goes on with tokens of a grammar's, stands for all that was sampled before."""
        told = {new.row for new in plan.new_rows} | {known.row for known in plan.known_tokens}
        if told:
            for step, awaited in self._awaited.items():
                self._awaited[step] = [(-1 if row in told else row, at) for row, at in awaited]
        known = [one for row, one in self._known.items() if row not in told]
        self._known = {}
        ends = (plan.num_computed[entry] + plan.num_scheduled[entry] for entry in plan.sampling)
        rows = (plan.rows[entry] for entry in plan.sampling)
        self._awaited[plan.step] = list(zip(rows, ends, strict=True))
        if not known:
            return plan
        return replace(plan, known_tokens=[*known, *plan.known_tokens])


def digest_of(ids: list[int]) -> int:
    """To be compared across ranks."""
    return crc32(np.array(ids, np.int64).tobytes())
