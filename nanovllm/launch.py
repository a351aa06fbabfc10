"""The composition root of a core process: configuration → executor → core → listeners → server.

The program `nanovllm-core`. A frontend starts one of its own (`frontend/core_process.py`), or an
operator runs one that many clients share. Only this module knows every room of a core.
"""

import argparse
import gc
import logging
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.lifetime import ExitCode, stop_on_signals, watch_owner
from nanovllm.core.server import CoreServer, MakeListener
from nanovllm.executor.base import Executor
from nanovllm.flags import Parser, add_config_flags, add_model_argument, config_values
from nanovllm.keys import CoreKeys
from nanovllm.places import state_directory
from nanovllm.protocol.plan import ProgressCallback
from nanovllm.replay.recorder import Recorder
from nanovllm.watch.observer import Observer

EXECUTORS = {
    "group": "nanovllm.executor.group:GroupExecutor",
    "inline": "nanovllm.executor.inline:inline_executor",
    "synthetic": "nanovllm.executor.synthetic:SyntheticExecutor",
}


def make_executor(config: EngineConfig, on_progress: ProgressCallback) -> Executor:
    """The executor this configuration asks for."""
    kind = "synthetic" if config.model.load_format == "synthetic" else "inline"
    parallel = config.parallel
    if parallel.num_ranks > 1 or parallel.launcher == "ray":
        kind = "group"
    module, _, name = EXECUTORS[kind].partition(":")
    executor: Executor = getattr(import_module(module), name)(config, on_progress)
    return executor


def load_tokenizer_json(config: EngineConfig) -> str:
    """The model's tokenizer, for the grammars of structured outputs. `ValueError`: it has none."""
    from nanovllm.frontend.tokenizer import Tokenizer  # with the first such request

    return Tokenizer.load(config.model.tokenizer_source).to_json()


def life_file(address: str) -> Path:
    """Of the cores at that address: beside a socket, else in the user's state directory."""
    transport, _, place = address.partition("://")
    if transport == "ipc":
        return Path(place + ".life")
    return state_directory() / f"{quote(place, safe='')}.life"


def make_viewer(core: EngineCore) -> Observer:
    """When the core has loaded. What is there by then stays, libraries most of all: to look at it
    again would take Python's collector a tenth of a second, in which no step begins."""
    gc.freeze()
    return Observer(core)


def core_main(argv: list[str] | None = None) -> int:
    """Run a core in this process until it is told to stop. Returns the exit code (`ExitCode`)."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.config_json is not None:
            config = msgspec.json.decode(arguments.config_json, type=EngineConfig)
        else:
            config = EngineConfig.from_kwargs(
                **{"grammar_preload": True, **config_values(arguments)}  # as `nanovllm serve`
            )
        # An owner shows its user what matters; whoever runs a core alone reads its log.
        level = config.log.threshold("info" if arguments.owner_fd is None else "warning")
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
        keys = None if arguments.keys is None else CoreKeys(arguments.keys)
        listeners: list[MakeListener] = []
        if arguments.record is not None:
            listeners.append(partial(Recorder, config=config, path=arguments.record))
        server = CoreServer(
            config,
            arguments.address,
            keys=keys,
            make_viewer=make_viewer,
            listeners=listeners,
            # An owner's stderr may be a terminal on which somebody reads answers.
            stall_log=None if arguments.owner_fd is None else state_directory() / "stalls.log",
            life_file=life_file(arguments.address),
        )
        stop_on_signals(server.drain, server.stop)
        if arguments.owner_fd is not None:
            watch_owner(arguments.owner_fd, server.stop)
        with GrammarSandbox(timeout_s=config.grammar.grammar_timeout_s) as sandbox:
            make_compiler = partial(
                GrammarCompiler,
                partial(load_tokenizer_json, config),
                sandbox=sandbox,
                max_num_seqs=config.scheduler.max_num_seqs,
            )
            return server.run(
                partial(make_executor, config, server.on_progress),
                None if config.model.skip_tokenizer_init else make_compiler,
            )
    except ValueError as error:
        if arguments.owner_fd is None:  # an owner has been told, and tells its user
            print(f"nanovllm-core: {error}", file=sys.stderr)
        return ExitCode.USAGE


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nanovllm-core",
        description="Run an engine core alone; clients attach to its address. SIGTERM lets what "
        "runs finish first, a second one does not. Exit codes: 0 done, 1 crashed, 2 wrong usage, "
        "3 owner gone, 4 drain timeout, 5 cut short.",
    )
    add_model_argument(parser)
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
