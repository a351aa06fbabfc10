"""The launcher `mp`: ranks are processes of this host, each at the other end of a socket pair.

`launcher` makes it. What runs in each process is `executor.rank`, which other launchers start in
the same way (`start_rank`), on whatever host they are.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import Channel
from nanovllm.executor.launcher import Death
from nanovllm.protocol.plan import FAULTS, ProgressCallback

PROGRAM = ("-m", "nanovllm.executor.rank")
LAST_WORDS_S = 1.0  # between the end of a channel and that of its process
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
LOCALHOST = "127.0.0.1"
# What ranks need to find each other on this host. Multicast over NVLink hangs on some hosts.
DEFAULT_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


@dataclass(frozen=True, slots=True)
class Seat:
    """Which rank this is, and which of the `local_size` ranks that its host has of the group."""

    rank: int
    local_rank: int
    local_size: int


class ProcessLauncher:
    """An `executor.launcher.Launcher` of processes."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback) -> None:
        self._config = config

    def start(self) -> "Iterator[RankProcess]":
        """One after the other; none is waited for."""
        for rank in range(self._config.parallel.num_ranks):
            yield RankProcess.spawn(self._config, rank)

    def close(self) -> None:
        """Nothing is left where the processes have ended."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """An `executor.launcher.StartedRank` of this host."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    host: str = LOCALHOST

    @classmethod
    def spawn(cls, config: EngineConfig, rank: int) -> "RankProcess":
        """Start it and return at once. It ends when this process does."""
        ours, theirs = socket.socketpair()
        seat = Seat(rank, rank, config.parallel.num_ranks)
        config_json = msgspec.json.encode(config).decode()
        with theirs:
            environment = {**DEFAULT_ENVIRONMENT, **os.environ}
            process = start_rank(seat, config_json, [theirs.fileno()], environment)
        return cls(rank, process, Channel(ours))

    @property
    def is_stopped(self) -> bool:
        """As far as the system tells."""
        return is_stopped(self.process.pid)

    def cause_of_death(self) -> Death:
        """Its channel has been closed."""
        death = what_became_of(self.process)
        return death._replace(cause=f"{self} {death.cause}")

    def kill(self) -> None:
        """Safe to call twice."""
        self.process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within that time."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, timeout_s: float) -> None:
        """Kill it, unless it ends by itself in that time; it is gone then. Safe to call twice."""
        if not self.wait(timeout_s):
            self.kill()
            self.process.wait()
        self.channel.close()

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"


def start_rank(
    seat: Seat, config_json: str, descriptors: list[int], environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the program of a rank and return at once. It ends when this process does.

    descriptors: of its channel's sockets, which it takes over; the caller closes its own.
    """
    command = [sys.executable, *PROGRAM, "--rank", str(seat.rank)]
    command += ["--local-rank", str(seat.local_rank), "--local-size", str(seat.local_size)]
    command += ["--fds", *map(str, descriptors), "--owner", str(os.getpid())]
    command += ["--config-json", config_json]
    # A session of its own: Ctrl-C at a terminal is the core's affair, which lets steps finish.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        start_new_session=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process of this host, as far as the system tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


def what_became_of(process: "subprocess.Popen[bytes]") -> Death:
    """Of a rank whose channel has closed; its cause is the end of a sentence. Takes `LAST_WORDS_S`
    at most."""
    try:
        code = process.wait(LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        return Death("does not answer any more")
    if code < 0:
        return Death(f"was killed by {signal.Signals(-code).name}", -code not in FAULTS)
    return Death(f"ended with exit code {code}")
