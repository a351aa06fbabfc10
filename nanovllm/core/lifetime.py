"""When and how a core process ends: signals, its owner's death, and a watch for stalls.

`launch.core_main` and `CoreServer` call these. They only ever ask the loop to end, except for one
that cannot stop although its owner is gone; a stall alone kills nothing.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TextIO

OWNER_GRACE_S = 5.0  # what a core may take to end by itself after its owner has gone
LOG = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """How a core process ended. (1, Python's own, is a crash: clients were told why.)"""

    DONE = 0  # told to stop: nothing was running, or its owner wanted it at once, or all finished
    USAGE = 2  # the configuration cannot work
    OWNER_GONE = 3  # its owner died and the loop was too stuck to end
    DRAIN_TIMEOUT = 4  # SIGTERM; some requests took longer than the drain timeout and were aborted
    CUT_SHORT = 5  # a second signal while draining; requests were aborted


def stop_on_signals(drain: Callable[[], None], stop: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT drains, the next one stops at once."""
    actions = [stop, drain]

    def act(*_: object) -> None:
        (actions.pop() if len(actions) > 1 else stop)()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, act)


def watch_owner(owner_fd: int, stop: Callable[[], None]) -> None:
    """End this process when its owner ends, however that dies.

    The owner holds the other end of the pipe `owner_fd`; a changed parent id covers the case of
    another process having inherited that end. A loop too stuck to stop is ended the hard way.
    """
    owner = os.getppid()

    def watch() -> None:
        with socket.socket(fileno=owner_fd) as pipe:
            pipe.settimeout(1.0)
            while os.getppid() == owner:
                try:
                    if not pipe.recv(1):
                        break
                except TimeoutError:
                    continue
        stop()
        time.sleep(OWNER_GRACE_S)
        os._exit(ExitCode.OWNER_GONE)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


class LifeFile:
    """A file that outlives a core and tells the next one at its address how it ended.

    While a core lives the file holds its epoch. What makes it fail by itself adds to that: a fault
    (SIGSEGV, SIGABRT …) the stacks of all threads, an exception its traceback. An orderly end
    removes the file, and a kill from outside leaves it as it is.
    """

    def __init__(self, path: Path | None, epoch: str) -> None:
        """path: None for no such file."""
        self.after_crash_of = ""  # the epoch of the life before, if that failed by itself
        self._path = path
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            before = path.read_text("utf-8", "replace") if path.exists() else ""
            self._file = open(path, "w", opener=_private)  # noqa: SIM115
        except OSError as error:
            LOG.warning("%s: %s; clients will not know how this core ended", path, error.strerror)
            return
        last, _, stacks = before.partition("\n")
        if stacks:
            self.after_crash_of = last
            LOG.info("the core before this one crashed:\n%s", stacks)
        print(epoch, file=self._file, flush=True)
        faulthandler.enable(self._file)

    def note_failure(self, traceback: str) -> None:
        """This core is about to end by an exception."""
        if self._file is not None:
            print(traceback, file=self._file, flush=True)
            self._path = None  # it stays

    def close(self) -> None:
        """The end. May be called twice."""
        if self._file is not None:
            faulthandler.disable()
            self._file.close()
            self._file = None
            if self._path is not None:
                self._path.unlink(missing_ok=True)


@contextmanager
def watching_for_stalls(
    stalled_s: Callable[[], float], timeout_s: Callable[[], float], *, log: Path | None = None
) -> Iterator[None]:
    """While inside, write every thread's stack to the log when `stalled_s` passes `timeout_s`.

    log: the file to write to; by default the log of this process and its stderr.
    Clients need no word from here: a loop that is stuck sends no `Pulse`, which they miss within
    two seconds, and one that is not tells them of the stall in its `CoreStatus`.
    """
    ended = threading.Event()

    def watch() -> None:
        reported = False
        while not ended.wait(min(timeout_s() / 2, 1.0)):
            seconds = stalled_s()
            if seconds < timeout_s():
                if reported:
                    _report("the core goes on", log)
                reported = False
            elif not reported:
                reported = True
                what = f"no step has finished for {seconds:.1f} s; what all threads do:"
                _report(what, log, with_stacks=True)

    thread = threading.Thread(target=watch, name="stall-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _report(what: str, log: Path | None, *, with_stacks: bool = False) -> None:
    if log is None:
        LOG.log(logging.ERROR if with_stacks else logging.WARNING, what)
        if with_stacks:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        return
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(log, "a", opener=_private) as file:
            print(f"{time.strftime('%F %T')} core {os.getpid()}: {what}", file=file, flush=True)
            if with_stacks:
                faulthandler.dump_traceback(file)
    except OSError as error:
        LOG.warning("%s; %s cannot be written: %s", what, log, error.strerror)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
