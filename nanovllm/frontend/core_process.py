"""Starts a core as a process of its own, and ends it; what runs there is `nanovllm.launch`.

Frontends that own their cores call `start_cores`. A core ends when its owner dies.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec.structs import replace

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
    _variables: Mapping[str, str] = field(default_factory=dict)  # beside this process's own

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
        self.process, self._owner_end = _spawn(self.config, self.address, self._variables)

    def close(self) -> int:
        """`end`, for good. Returns the exit code."""
        code = self.end()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        return code


def start_cores(config: EngineConfig) -> list[CoreHandle]:
    """One per replica (data_parallel_size), each with GPUs of its own where there are any.

    Raises `ValueError` if there are too few.
    """
    num_replicas = config.parallel.data_parallel_size
    if config.parallel.launcher == "ray":
        configs, variables = on_ray(config)
        return [start_core(one, variables=variables) for one in configs]
    if num_replicas == 1:
        return [start_core(config)]
    gpus, each = visible_gpus(config), config.parallel.num_ranks
    if gpus and len(gpus) < num_replicas * each:
        raise ValueError(
            f"data_parallel_size: {num_replicas} replicas of {each} ranks need "
            f"{num_replicas * each} GPUs, and {len(gpus)} are visible: use "
            f"{max(1, len(gpus) // each)}, or device 'cpu'"
        )
    shares = [",".join(gpus[first * each :][:each]) for first in range(num_replicas)]
    visible = [{"CUDA_VISIBLE_DEVICES": share} if gpus else {} for share in shares]
    return [start_core(config, variables=variables) for variables in visible]


def on_ray(config: EngineConfig) -> tuple[list[EngineConfig], dict[str, str]]:
    """What each replica is told whose ranks Ray is to place, and what finds it the cluster.

    A program that Ray runs in a placement group shares that group's bundles out to them.
    """
    parallel, variables = config.parallel, {}
    ray = sys.modules.get("ray")  # imported in every program that Ray runs
    if ray is not None and ray.is_initialized():
        variables["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        group = ray.util.get_current_placement_group()
        if parallel.ray_placement_group is None and group is not None:
            parallel = replace(parallel, ray_placement_group=group.id.hex())
    replicas = range(parallel.data_parallel_size)
    shares = [replace(parallel, data_parallel_rank=number) for number in replicas]
    return [replace(config, parallel=share) for share in shares], variables


def visible_gpus(config: EngineConfig) -> list[str]:
    """As CUDA_VISIBLE_DEVICES would name them; none if none will be used."""
    if config.model.device == "cpu" or config.model.load_format == "synthetic":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def start_core(
    config: EngineConfig, *, address: str | None = None, variables: Mapping[str, str] | None = None
) -> CoreHandle:
    """Start a core as a program of its own and return at once; clients see it load.

    address: where it binds; by default a socket in a fresh directory only this user can enter.
    variables: of its environment, beside those of this process.
    """
    directory = None
    if address is None:
        directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # mode 0700
        address = f"ipc://{directory}/core.sock"
    return CoreHandle(
        config, address, *_spawn(config, address, variables or {}), directory, variables or {}
    )


def _spawn(
    config: EngineConfig, address: str, variables: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The program, and the end of a socket pair whose closing tells it that its owner has gone."""
    owner_end, core_end = socket.socketpair()
    command = [sys.executable, *PROGRAM, "--address", address]
    command += ["--owner-fd", str(core_end.fileno())]
    command += ["--config-json", msgspec.json.encode(config).decode()]
    # A session of its own, so that Ctrl-C at the owner's terminal is the owner's affair.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__,  # what libraries print must not mix with the owner's output
        pass_fds=[core_end.fileno()],
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **variables,
        },
    )
    core_end.close()
    return process, owner_end
