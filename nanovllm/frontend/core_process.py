"""Starts a core as a process of its own, and ends it; what runs there is `nanovllm.launch`.

Frontends that own their core call `start_core`. The core ends when its owner dies.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from nanovllm.config import EngineConfig

PROGRAM = ["-m", "nanovllm.launch"]


@dataclass
class CoreHandle:
    """A core process owned by this one; it ends when `close` is called or this process dies."""

    config: EngineConfig
    address: str
    process: subprocess.Popen[bytes]
    _owner_end: socket.socket
    _directory: Path | None = field(default=None)

    def end(self, timeout_s: float = 10.0) -> int:
        """End the core: politely, then by SIGTERM, then by SIGKILL. Returns its exit code."""
        self._owner_end.close()
        for insist in (self.process.terminate, self.process.kill):
            try:
                self.process.wait(timeout_s / 2)
                break
            except subprocess.TimeoutExpired:
                insist()
        return self.process.wait()

    def restart(self) -> None:
        """Start it again, at the same address, after it has ended."""
        assert self.process.poll() is not None, "end() first"
        self.process, self._owner_end = _spawn(self.config, self.address)

    def close(self) -> int:
        """`end`, for good. Returns the exit code."""
        code = self.end()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        return code


def start_core(config: EngineConfig, *, address: str | None = None) -> CoreHandle:
    """Start a core as a program of its own and return at once; clients see it load.

    address: where it binds; by default a socket in a fresh directory only this user can enter.
    """
    directory = None
    if address is None:
        directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # mode 0700
        address = f"ipc://{directory}/core.sock"
    return CoreHandle(config, address, *_spawn(config, address), directory)


def _spawn(config: EngineConfig, address: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The program, and the end of a socket pair whose closing tells it that its owner has gone."""
    owner_end, core_end = socket.socketpair()
    command = [sys.executable, *PROGRAM, "--address", address]
    command += ["--owner-fd", str(core_end.fileno())]
    command += ["--config-json", msgspec.json.encode(config).decode()]
    # A session of its own, so that Ctrl-C at the owner's terminal is the owner's affair.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=[core_end.fileno()],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    core_end.close()
    return process, owner_end
