"""One HTTP process: a listening socket, uvicorn, and an orderly end.

`command.py` runs it for one frontend; with several, each is this program with its `FrontendSetup`
on standard input, which stays open as long as the parent lives.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import msgspec
import uvicorn
import uvloop

from nanovllm.config import EngineConfig, LogConfig, SupervisionConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.server.app import create_app
from nanovllm.frontend.server.connections import (
    ConnectionLimits,
    HttpProtocol,
    most_connections,
    sweep,
)
from nanovllm.frontend.server.serving import Opener, Serving
from nanovllm.frontend.server.settings import ServerSettings

ABORT_GRACE_S = 5.0  # for clients to be told, after the drain has timed out
CONNECT_TIMEOUT_S = 60.0
BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than common proxies', or they would reuse connections just closed
USAGE_ERROR = 2
READY_LINE = "ready"
# What a frontend without a core of its own reads of an engine's settings.
SUPERVISION_FIELDS = frozenset(SupervisionConfig.__struct_fields__)
# Between collections: objects more than there were, then collections of the younger generation. One
# of the youngest takes 0.2 to 0.5 ms so, in which no stream goes on.
COLLECTOR = 1_000, 100, 100
# What else concerns a frontend, be the core its own or not.
OWN_FIELDS = frozenset({"tokenizer", "tokenizer_revision", "skip_tokenizer_init", "log_level"})


class FrontendSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of `--frontends` is told: where its core is, and how to read text."""

    settings: ServerSettings
    address: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    supervision: SupervisionConfig = SupervisionConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def of(cls, settings: ServerSettings, address: str, fields: dict[str, Any]) -> Self:
        """fields: keywords of `EngineConfig`; those that only the core reads are left to it."""
        supervision = {name: value for name, value in fields.items() if name in SUPERVISION_FIELDS}
        own = {name: value for name, value in fields.items() if name in OWN_FIELDS}
        config = EngineConfig.from_kwargs(**supervision, **own)
        return cls(
            settings=settings,
            address=address,
            tokenizer=None if config.model.tokenizer is None else config.model.tokenizer_source,
            skip_tokenizer_init=config.model.skip_tokenizer_init,
            supervision=config.supervision,
            log=config.log,
        )

    async def open_llm(self, on_progress: ProgressCallback) -> AsyncLLM:
        return await AsyncLLM.connect(
            self.address,
            tokenizer=self.tokenizer,
            skip_tokenizer_init=self.skip_tokenizer_init,
            on_progress=on_progress,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            keys=self.settings.connect_keys,
            **msgspec.structs.asdict(self.supervision),
        )


class HttpServer(uvicorn.Server):
    """Signals are the caller's affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(settings: ServerSettings, *, shared: bool) -> socket.socket:
    """shared: other processes may bind the same port. `ValueError` if it cannot be had."""
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(
            f"port: cannot listen on {host}:{port} ({error.strerror or error}): "
            "choose another with --port and --host"
        ) from None
    return listener


async def serve(
    settings: ServerSettings,
    open_llm: Opener,
    listener: socket.socket,
    on_ready: Callable[[Serving], None],
    *,
    lifeline: asyncio.Event | None = None,
) -> int:
    """Until a signal, the engine's death, or the end of `lifeline`. Returns the exit code."""
    # uvicorn listens after it has begun to open the engine, which may be open before: who is told
    # that it is ready must be able to connect.
    listener.listen(BACKLOG)
    limits = ConnectionLimits(most_connections(settings.max_connections))
    app = create_app(settings, open_llm)
    serving: Serving = app.state.serving
    config = uvicorn.Config(
        app,
        # A protocol that knows its limits: uvicorn calls it as it would call the class.
        http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=int(settings.shutdown_timeout + ABORT_GRACE_S),
    )
    server = HttpServer(config)
    ending = Ending(server, serving, settings.shutdown_timeout)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.on_signal)
    watches = [
        asyncio.create_task(_when(serving.opened, lambda: on_ready(serving))),
        asyncio.create_task(_when(serving.ended, ending.begin)),
        asyncio.create_task(sweep(server.server_state.connections)),
    ]
    if lifeline is not None:
        watches.append(asyncio.create_task(_when(lifeline, ending.begin)))
    try:
        # A task of its own: uvicorn's loop wakes ten times a second, which need not wake this one.
        await asyncio.create_task(server.serve(sockets=[listener]))
    finally:
        ending.finish()
        for watch in watches:
            watch.cancel()
    if serving.failure is None:
        return 0
    print(f"nanovllm: {serving.failure}", file=sys.stderr)
    return USAGE_ERROR if isinstance(serving.failure, ValueError) else 1


class Ending:
    """First signal: no new requests, those under way finish, but not for ever. Second: at once."""

    def __init__(self, server: HttpServer, serving: Serving, shutdown_timeout: float) -> None:
        self._server = server
        self._serving = serving
        self._shutdown_timeout = shutdown_timeout
        self._abort: asyncio.Task[None] | None = None

    def on_signal(self) -> None:
        if self._abort is not None:
            self._server.force_exit = True
        self.begin()

    def begin(self) -> None:
        self._serving.drain()
        self._server.should_exit = True
        if self._abort is None:
            self._abort = asyncio.create_task(self._abort_later())

    def finish(self) -> None:
        if self._abort is not None:
            self._abort.cancel()

    async def _abort_later(self) -> None:
        await asyncio.sleep(self._shutdown_timeout)
        await self._serving.abort_all()


def log_to_stderr(config: LogConfig) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("nanovllm").setLevel(config.threshold("info"))


def frontend_main() -> int:
    """The program of one of several frontends."""
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=FrontendSetup)
    log_to_stderr(setup.log)
    return uvloop.run(_run_frontend(setup))


async def _run_frontend(setup: FrontendSetup) -> int:
    listener = bind(setup.settings, shared=True)
    lifeline = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_input() -> None:  # the parent says nothing more, so this is its end
        loop.remove_reader(sys.stdin.fileno())
        lifeline.set()

    def on_ready(serving: Serving) -> None:
        freeze()
        print(READY_LINE, flush=True)

    loop.add_reader(sys.stdin.fileno(), on_input)
    return await serve(setup.settings, setup.open_llm, listener, on_ready, lifeline=lifeline)


def freeze() -> None:
    """What is there once the engine is open stays: the collector need not look at it again. And at
    what comes later it looks seldom: amid thousands of connections that stops all streams."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR)


async def _when(event: asyncio.Event, run: Callable[[], None]) -> None:
    await event.wait()
    run()


if __name__ == "__main__":
    sys.exit(frontend_main())
