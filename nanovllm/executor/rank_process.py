"""One rank of a group, as the core sees it: a process of this host, and the channel to it.

`group` starts as many as there are ranks. What runs there is `executor.rank`.
"""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.executor.channel import Channel

PROGRAM = ("-m", "nanovllm.executor.rank")
LAST_WORDS_S = 1.0  # between the end of a channel and that of its process
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# What ranks of one host need to find each other. Multicast over NVLink hangs on some hosts.
DEFAULT_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A rank that has been started."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel

    @classmethod
    def spawn(cls, config: EngineConfig, rank: int) -> "RankProcess":
        """Start it and return at once. It ends when this process does."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, *PROGRAM, "--rank", str(rank), "--fd", str(theirs.fileno())]
        command += ["--owner", str(os.getpid())]
        command += ["--config-json", msgspec.json.encode(config).decode()]
        environment = {**DEFAULT_ENVIRONMENT, **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        # A session of its own: Ctrl-C at a terminal is the core's affair, which lets steps finish.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        return cls(rank, process, Channel(ours))

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, as far as the system tells."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def cause_of_death(self) -> str:
        """In words; its channel has been closed."""
        try:
            code = self.process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return f"{self} does not answer any more"
        if code < 0:
            return f"{self} was killed by {signal.Signals(-code).name}"
        return f"{self} ended with exit code {code}"

    def end(self, timeout_s: float = 0.0) -> None:
        """Kill it, unless it ends by itself in that time; it is gone then. Safe to call twice."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"
