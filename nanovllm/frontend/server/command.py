"""`nanovllm serve`: one HTTP process with a core of its own, or several on one core.

Called by `cli`. With `--frontends N` this process is the parent: it owns the core and the port,
starts the others, and starts them again should one die.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.checkpoint.locate import locate
from nanovllm.config import EngineConfig, LogConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.replicas import Lines
from nanovllm.frontend.server.frontends import Frontends, own_cores
from nanovllm.frontend.server.run import (
    OWN_FIELDS,
    SUPERVISION_FIELDS,
    FrontendSetup,
    bind,
    freeze,
    log_to_stderr,
    serve,
)
from nanovllm.frontend.server.serving import Serving, require_tracing
from nanovllm.frontend.server.settings import OLDER_NAMES, PRESETS, ServerSettings

# Where the driver shows a GPU: on Linux, and in its guise on Windows. Asking torch takes seconds.
GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
CPUS_PER_FRONTEND, MOST_FRONTENDS = 4, 4
CONNECT_FIELDS = OWN_FIELDS | SUPERVISION_FIELDS
KEY_VARIABLE = "NANOVLLM_API_KEY"


async def run(arguments: argparse.Namespace, engine_fields: dict[str, Any]) -> int:
    """Serve until told to stop. Returns the exit code; `ValueError` for what a user must mend."""
    log_to_stderr(LogConfig(log_level=engine_fields.get("log_level")))
    settings = _settings(arguments)
    engine_fields = with_preset(settings, engine_fields)
    if settings.otlp_traces_endpoint is not None:
        require_tracing()  # before anybody waits for it, and before there are several frontends
    if settings.connect is None:
        EngineConfig.from_kwargs(**engine_fields)  # complains before anybody waits for it
    started = time.monotonic()
    # Bound without sharing first: another server on the same port would silently get half of ours.
    listener = bind(settings, shared=False)
    num_frontends = settings.frontends or default_frontends(engine_fields)
    port = listener.getsockname()[1]
    settings = msgspec.structs.replace(settings, port=port, frontends=num_frontends)
    if num_frontends > 1:
        listener.close()
        listener = bind(settings, shared=True)

    def on_ready(model: str) -> None:
        seconds = time.monotonic() - started
        url = _url(settings)
        print(
            f"{model} is ready after {seconds:.1f} s: {url}/v1 for clients, {url}/ for people",
            file=sys.stderr,
        )
        if settings.open:  # in a thread: a browser of the terminal takes it until it is closed
            threading.Thread(target=open_page, args=(f"{url}/",), daemon=True).start()

    print(f"listening on {_url(settings)} (Ctrl-C ends it)", file=sys.stderr)
    if num_frontends > 1:
        return await _serve_many(settings, engine_fields, listener, on_ready)

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        if settings.connect is not None:
            setup = FrontendSetup.of(settings, settings.connect, engine_fields)
            return await setup.open_llm(on_progress)
        llm = AsyncLLM(on_progress=on_progress, **engine_fields)
        await llm.start()
        return llm

    def on_open(serving: Serving) -> None:
        freeze()
        on_ready(serving.model_name)

    return await serve(settings, open_llm, listener, on_open)


def default_frontends(engine_fields: dict[str, Any]) -> int:
    """As many as a GPU's tokens need. Without one, the model needs the processors itself."""
    has_gpu = any(path.exists() for path in GPU_FILES)
    if not has_gpu or engine_fields.get("device") == "cpu":
        return 1
    num_cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(MOST_FRONTENDS, num_cpus // CPUS_PER_FRONTEND))


async def _serve_many(
    settings: ServerSettings,
    engine_fields: dict[str, Any],
    reservation: socket.socket,
    on_ready: Callable[[str], None],
) -> int:
    """`reservation` keeps the port ours; it never listens."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(reservation)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanovllm-metrics-"))
        async with _core(settings, engine_fields) as (address, core):
            setup = FrontendSetup.of(settings, address, engine_fields)
            environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": directory}
            frontends = Frontends(setup, environment, core=core)
            return await frontends.run(
                lambda: on_ready(f"the engine of {settings.frontends} frontends")
            )


@contextlib.asynccontextmanager
async def _core(
    settings: ServerSettings, engine_fields: dict[str, Any]
) -> AsyncIterator[tuple[str, Lines | None]]:
    """The address of a core, and the line to it if it is ours."""
    if settings.connect is not None:
        yield settings.connect, None
        return
    config = EngineConfig.from_kwargs(**engine_fields)
    if config.model.load_format not in ("dummy", "synthetic"):
        await asyncio.to_thread(locate, config.model.source)
    async with own_cores(config) as line:
        yield line.address, line


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    given = vars(arguments)
    values = {name: given[name] for name in ServerSettings.__struct_fields__ if name in given}
    if KEY_VARIABLE in os.environ:  # taken out, so that no process started from here has it
        values.setdefault("api_key", [os.environ.pop(KEY_VARIABLE)])
    try:
        settings = msgspec.convert(values, ServerSettings)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ValueError(f"--{path.rstrip('`').replace('_', '-')}: {message}") from None
    if "" in settings.api_key:
        raise ValueError("--api-key: an empty key would let everybody in: leave it out")
    settings.keys()  # complains before anybody waits for it
    if "all" in (settings.page, OLDER_NAMES[settings.engine_view]) and not settings.may_show_all:
        raise ValueError(
            "--page: all would show everybody's prompts: it is for a server on a loopback address "
            "without keys; use counts"
        )
    return settings


def with_preset(settings: ServerSettings, engine_fields: dict[str, Any]) -> dict[str, Any]:
    """What was given, and else what the preset says. `ValueError`: what a core at --connect has."""
    if settings.connect is None:
        preset = {} if settings.preset is None else PRESETS[settings.preset]
        # Clients do not know of one another: no stream is to stand still for another's grammar.
        return {"grammar_preload": True, **preset, **engine_fields}
    idle = engine_fields.keys() - CONNECT_FIELDS | ({"preset"} if settings.preset else set())
    if idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(idle))
        raise ValueError(f"{flags}: the core at --connect has settings of its own: omit it")
    return engine_fields


def open_page(url: str) -> None:
    if not webbrowser.open(url):
        print(f"--open: no browser was found: open {url} yourself", file=sys.stderr)


def _url(settings: ServerSettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"
