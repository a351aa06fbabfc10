"""Finding and watching real processes, through /proc."""

import os
import time
from collections.abc import Callable
from pathlib import Path

RANK = b"nanovllm.executor.rank"


def core_children(owner: int) -> list[int]:
    """Pids of the core programs that `owner` has started."""
    return _children(owner, b"nanovllm.launch")


def rank_children(owner: int) -> list[int]:
    """Pids of the ranks that `owner`, a core, has started, the first one first."""
    return sorted(_children(owner, RANK))


def ranks_with(variable: str) -> list[int]:
    """Pids of ranks, whoever has started them, that have this process's value of a variable."""
    setting = f"{variable}={os.environ[variable]}".encode()
    return [pid for pid in _pids() if RANK in _command(pid) and setting in _environment(pid)]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return _stat(pid)[:1] not in ([], ["Z"])


def wait_until(condition: Callable[[], object], *, timeout_s: float, what: str) -> float:
    """Seconds until `condition` held; fails the test if that takes longer than `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def _pids() -> list[int]:
    return list(map(int, filter(str.isdigit, os.listdir("/proc"))))


def _children(owner: int, program: bytes) -> list[int]:
    return [pid for pid in _pids() if _parent(pid) == owner and program in _command(pid)]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, …; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _parent(pid: int) -> int:
    return int((_stat(pid) or ["", "-1"])[1])


def _command(pid: int) -> bytes:
    return _read(pid, "cmdline")


def _environment(pid: int) -> list[bytes]:
    return _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
