"""Composition root: configuration → executor → core process → handle.

`start_core` is what frontends call; `core_main` is the program it starts, and, as the console
script `nanovllm-core`, what an operator runs to have a core that many clients share.
"""

import argparse
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.lifetime import ExitCode, stop_on_signals, watch_owner
from nanovllm.core.server import CoreServer, MakeCore
from nanovllm.executor.base import Executor, ProgressCallback
from nanovllm.flags import add_config_flags, config_values
from nanovllm.keys import CoreKeys
from nanovllm.replay.recorder import RecordedCore

EXECUTORS = {
    "inline": "nanovllm.executor.inline:InlineExecutor",
    "synthetic": "nanovllm.executor.synthetic:SyntheticExecutor",
}
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


def make_executor(config: EngineConfig, on_progress: ProgressCallback) -> Executor:
    """The executor this configuration asks for."""
    kind = "synthetic" if config.model.load_format == "synthetic" else "inline"
    module, _, name = EXECUTORS[kind].partition(":")
    executor: Executor = getattr(import_module(module), name)(config, on_progress)
    return executor


def load_tokenizer_json(config: EngineConfig) -> str:
    """The model's tokenizer, for the grammars of structured outputs. `ValueError`: it has none."""
    from nanovllm.frontend.tokenizer import Tokenizer  # with the first such request

    return Tokenizer.load(config.model.tokenizer or config.model.model).to_json()


def core_main(argv: list[str] | None = None) -> int:
    """Run a core in this process until it is told to stop. Returns the exit code (`ExitCode`)."""
    arguments = make_parser().parse_args(argv)
    # An owner shows its user what matters; whoever runs a core alone reads its log.
    level = logging.INFO if arguments.owner_fd is None else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
    try:
        if arguments.config_json is not None:
            config = msgspec.json.decode(arguments.config_json, type=EngineConfig)
        else:
            config = EngineConfig.from_kwargs(**config_values(arguments))
        keys = None if arguments.keys is None else CoreKeys(arguments.keys)
        make_core: MakeCore = EngineCore
        if arguments.record is not None:
            make_core = partial(RecordedCore, path=arguments.record)
        server = CoreServer(config, arguments.address, keys=keys, make_core=make_core)
        stop_on_signals(server.drain, server.stop)
        if arguments.owner_fd is not None:
            watch_owner(arguments.owner_fd, server.stop)
        make_compiler = partial(GrammarCompiler, partial(load_tokenizer_json, config))
        return server.run(
            partial(make_executor, config, server.on_progress),
            None if config.model.skip_tokenizer_init else make_compiler,
        )
    except ValueError as error:
        if arguments.owner_fd is None:  # an owner has been told, and tells its user
            print(f"nanovllm-core: {error}", file=sys.stderr)
        return ExitCode.USAGE


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanovllm-core",
        description="Run an engine core alone; clients attach to its address. SIGTERM lets what "
        "runs finish first, a second one does not. Exit codes: 0 done, 1 crashed, 2 wrong usage, "
        "3 owner gone, 4 drain timeout, 5 cut short.",
    )
    parser.add_argument("--address", required=True, help="ipc://PATH or tcp://HOST:PORT to bind")
    parser.add_argument(
        "--keys", metavar="DIRECTORY", help="let in clients with a key, from any machine"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="keep the last requests, results and plan digests, for `nanovllm replay FILE`",
    )
    parser.add_argument("--owner-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--config-json", help=argparse.SUPPRESS)
    add_config_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(core_main())
