"""What ends a core process, and what one at the same address finds of it."""

import faulthandler
import os
import queue
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm.core import lifetime
from nanovllm.core.lifetime import (
    OWNER_GRACE_S,
    ExitCode,
    LifeFile,
    stop_on_signals,
    watch_owner,
)
from tests.waiting import WAIT_S


def test_the_first_signal_drains_and_all_others_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    acts: dict[int, Callable[[], None]] = {}
    monkeypatch.setattr(signal, "signal", acts.__setitem__)
    asked: list[str] = []
    stop_on_signals(lambda: asked.append("drain"), lambda: asked.append("stop"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        acts[number]()
    assert asked == ["drain", "stop", "stop"]


@pytest.mark.parametrize("what", ["pipe", "parent"])
def test_a_core_whose_owner_is_gone_is_stopped_and_then_ended(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another process may hold the owner's end of the pipe, or have become the parent."""
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    parents = iter([7, 8]) if what == "parent" else None
    system = SimpleNamespace(
        getppid=os.getppid if parents is None else parents.__next__, _exit=done.put
    )
    monkeypatch.setattr(lifetime, "os", system)
    monkeypatch.setattr(lifetime, "time", SimpleNamespace(sleep=done.put))
    owner_end, core_end = socket.socketpair()
    with owner_end:
        if what == "pipe":
            owner_end.close()
        watch_owner(core_end.detach(), lambda: done.put("stopped"))
        seen = [done.get(timeout=WAIT_S) for _ in range(3)]
    assert seen == ["stopped", OWNER_GRACE_S, ExitCode.OWNER_GONE]


@pytest.fixture
def _faults_as_before() -> Iterator[None]:
    """A life takes the process's fault handler, which pytest has set."""
    was_enabled = faulthandler.is_enabled()
    yield
    if was_enabled:
        faulthandler.enable()
    else:
        faulthandler.disable()


@pytest.mark.usefixtures("_faults_as_before")
def test_a_life_leaves_word_of_a_failure_and_of_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "lives" / "core"
    umask = os.umask(0)
    first = LifeFile(path, "first")
    os.umask(umask)
    assert path.parent.stat().st_mode & 0o777 == 0o700, "nobody else's affair"
    assert first.after_crash_of == "" and path.read_text() == "first\n"
    first.close()
    assert not path.exists(), "an orderly end"
    second = LifeFile(path, "second")
    assert second.after_crash_of == "" and path.stat().st_mode & 0o777 == 0o600
    first.close()
    assert path.exists() and faulthandler.is_enabled(), "closed twice, it is not its own any more"
    second.note_failure("Traceback: no such luck\n")
    assert "no such luck" in path.read_text(), "this process may be killed now"
    second.close()
    assert "no such luck" in path.read_text() and not faulthandler.is_enabled()
    third = LifeFile(path, "third")
    fourth = LifeFile(path, "fourth")  # as if the third had been killed from outside
    assert [third.after_crash_of, fourth.after_crash_of] == ["second", ""]
    third.close()
    fourth.close()


class Turns:
    """In place of `threading.Event`: the watch looks so many times, then it has ended."""

    def __init__(self, waits: list[float], num_turns: int) -> None:
        self._waits, self._num_turns = waits, num_turns

    def wait(self, timeout: float) -> bool:
        self._waits.append(timeout)
        return len(self._waits) > self._num_turns

    def set(self) -> None:
        pass


@pytest.mark.parametrize(("timeout_s", "wait_s"), [(1.0, 0.5), (2.0, 1.0), (60.0, 1.0)])
def test_a_stall_is_reported_once_and_its_end_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timeout_s: float, wait_s: float
) -> None:
    """With what all threads do, in a file of this user's alone."""
    times = [0.0, 1.0, 1.0, 2.0, 0.99, 0.0, 1.5]
    waits: list[float] = []
    monkeypatch.setattr(
        lifetime,
        "threading",
        SimpleNamespace(Event=lambda: Turns(waits, len(times)), Thread=lifetime.threading.Thread),
    )
    log, stalled = tmp_path / "logs" / "stalls", iter([one * timeout_s for one in times])
    with lifetime.watching_for_stalls(stalled.__next__, lambda: timeout_s, log=log):
        pass
    assert set(waits) == {wait_s}
    lines = [line for line in log.read_text().splitlines() if f"core {os.getpid()}: " in line]
    told = [line.partition(": ")[2] for line in lines]
    assert told == [
        f"no step has finished for {timeout_s:.1f} s; what all threads do:",
        "the core goes on",
        f"no step has finished for {1.5 * timeout_s:.1f} s; what all threads do:",
    ]
    assert log.read_text().count("most recent call first") >= 2
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o077 == 0
