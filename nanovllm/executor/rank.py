"""The program of one rank: does what its group says, in that order, on its own device.

`rank_process` starts it. Whatever it raises is told to the group, and ends it: ranks that have not
run the same steps cannot go on together. It ends when the group's process does, however that dies.
"""

import argparse
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import Protocol, cast

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.executor.base import Executor
from nanovllm.executor.channel import Channel, ChannelClosedError
from nanovllm.executor.group import digest_of
from nanovllm.executor.rank_process import LOCALHOST, Seat
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
from nanovllm.protocol.plan import StepHandle, StepPlan
from nanovllm.worker.warmup import driver

TELL_EVERY_S = 0.1
OWNER_GRACE_S = 1.0  # in which a rank that waits for others ends by itself after its owner
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class RankStep(StepHandle, Protocol):
    """A step of this rank."""

    @property
    def is_over(self) -> bool:
        """Whether `result` would not wait."""


class ComparableExecutor(Protocol):
    """An executor of a rank."""

    def ids_begun(self, plan: StepPlan) -> list[int]:
        """What a step that has just been submitted computes with, as this rank has it."""


class Rank:
    """One rank, from its start to its end."""

    def __init__(self, config: EngineConfig, seat: Seat, channel: Channel) -> None:
        self._config = config
        self._seat = seat
        self._rank = seat.rank
        self._channel = channel
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._poll = select.poll()
        for descriptor in channel.descriptors:
            self._poll.register(descriptor, select.POLLIN)
        self._unsampled: RankStep | None = None
        self._steps: deque[RankStep] = deque()  # under way
        self._begun: deque[int] = deque()  # of each, and of the one before its second half
        self._told = "", 0.0  # the last phase, and when

    def run(self) -> None:
        """Load the model, then serve until told to leave. Raises what goes wrong; the owner's end
        is `ChannelClosedError`."""
        executor = self._make_executor()
        self._tell(Started(executor.start()))
        while True:
            self._answer()
            self._poll.poll(0 if self._steps else None)
            for frame in self._channel.receive():
                message = self._decoder.decode(frame)
                if isinstance(message, Leave):
                    executor.shutdown()
                    return
                self._obey(executor, message)

    def _obey(self, executor: Executor, message: ToRank) -> None:
        match message:
            case Allocate(num_blocks):
                executor.allocate(num_blocks)
                self._tell(Allocated())
            case Submit(plan):
                self._unsampled = cast(RankStep, executor.submit(plan))
                if self._config.parallel.compare_ranks:
                    ids = cast(ComparableExecutor, executor).ids_begun(plan)
                    self._begun.append(digest_of(ids))
            case Sample(step, masks):
                assert self._unsampled is not None
                executor.sample(step, masks)
                self._steps.append(self._unsampled)
                self._unsampled = None
            case WarmUp():
                self._tell(WarmedUp(executor.warm_up()))

    def _answer(self) -> None:
        """Take in the steps that are over. All ranks do: each sees what goes wrong on its device.

        A step that is under way is looked at again and again: sleeping would make all wait.
        """
        parallel = self._config.parallel
        answering = parallel.answering_rank
        while self._steps and self._steps[0].is_over:
            result = self._steps.popleft().result()
            if self._rank == answering:
                self._tell(Sampled(result))
            if parallel.compare_ranks:
                sampled = digest_of(result.token_ids) if self._rank >= answering else None
                self._tell(Digest(result.step, self._begun.popleft(), sampled))
        if self._steps:
            os.sched_yield()

    def _make_executor(self) -> Executor:
        if self._config.model.load_format == "synthetic":
            from nanovllm.executor.synthetic import SyntheticExecutor

            return SyntheticExecutor(self._config, self._on_progress)
        if driver.is_likely(self._config.model.device):
            driver.wake(self._seat.local_rank)
        from nanovllm.worker.rank import RankWorker  # loads torch, which takes seconds

        size = self._config.parallel.num_ranks
        return RankWorker(
            self._config,
            self._on_progress,
            self._rank,
            size,
            meet=self._meet,
            local_rank=self._seat.local_rank,
            local_size=self._seat.local_size,
        )

    def _meet(self, port: int | None) -> tuple[str, int]:
        """Agree on host and port: the first rank brings the port, the others are told."""
        if port is not None:
            self._tell(Listening(port))
            return LOCALHOST, port
        while True:
            self._poll.poll()
            for frame in self._channel.receive():
                message = self._decoder.decode(frame)
                assert isinstance(message, Connect)
                return message.host, message.port

    def _on_progress(self, phase: str, progress: float) -> None:
        last, at = self._told
        now = time.monotonic()
        if phase != last or now - at >= TELL_EVERY_S:
            self._told = phase, now
            self._tell(Progress(phase, progress))

    def _tell(self, message: FromRank) -> None:
        self._channel.send(self._encoder.encode(message))
        while not self._channel.flush():
            room = select.poll()
            room.register(self._channel, select.POLLOUT)
            room.poll()

    def tell_failure(self, error: Exception) -> None:
        """The last word."""
        usage = isinstance(error, ValueError)
        message = str(error) if usage else f"{type(error).__name__}: {error}"
        self._tell(RankFailed(message, traceback.format_exc(), usage))


def watch_owner(owner: int, descriptors: list[int]) -> None:
    """End this process when its owner has gone, even while it waits for other ranks or is stopped.

    The system's signal ends what is stopped, where there is one; the channel's end tells the rest.
    descriptors: of the channel's sockets.
    """
    ended = 0  # a hang-up is told unasked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ended = select.POLLRDHUP  # all that TCP tells of an end that was closed
    if os.getppid() != owner:
        os._exit(1)
    hangup = select.poll()
    for descriptor in descriptors:
        hangup.register(descriptor, ended)

    def watch() -> None:
        hangup.poll()
        time.sleep(OWNER_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def main() -> None:
    """Run a rank until its group ends it."""
    parser = argparse.ArgumentParser(prog="nanovllm.executor.rank")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--local-size", type=int, required=True)
    parser.add_argument("--fds", type=int, nargs="+", required=True)
    parser.add_argument("--owner", type=int, required=True)
    parser.add_argument("--config-json", required=True)
    arguments = parser.parse_args()
    watch_owner(arguments.owner, arguments.fds)
    config = msgspec.json.decode(arguments.config_json, type=EngineConfig)
    logging.basicConfig(
        format=f"%(asctime)s %(levelname)s rank {arguments.rank} %(message)s",
        level=config.log.threshold("warning"),
    )
    seat = Seat(arguments.rank, arguments.local_rank, arguments.local_size)
    rank = Rank(config, seat, Channel(*(socket.socket(fileno=fd) for fd in arguments.fds)))
    code = 0
    try:
        rank.run()
    except ChannelClosedError:
        code = 1
    except Exception as error:
        code = 1
        with suppress(ChannelClosedError):
            rank.tell_failure(error)
    # Without the interpreter's end: a device or a collective that hangs would hold it up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
