"""`nanovllm serve` without its engine: what each flag comes to, and who runs with which of them."""

import argparse
import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.config import EngineConfig, LogConfig
from nanovllm.frontend.server import command, run
from nanovllm.frontend.server.run import FrontendSetup, bind
from nanovllm.frontend.server.settings import ServerSettings
from tests.frontend.fake_core import FakeCore, echo
from tests.frontend.vocabulary import save
from tests.waiting import WAIT_S

SYNTHETIC = {"model": "synthetic", "load_format": "synthetic"}


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a process would set up for itself; it sees no GPU, and no key of whoever tests."""
    done: list[str] = []
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(command, "GPU_FILES", ())
    for module in (command, run):
        monkeypatch.setattr(
            module, "log_to_stderr", lambda config: done.append(f"logs {config.log_level}")
        )
        monkeypatch.setattr(module, "freeze", lambda: done.append("freezes"))
    return done


def settings_of(**given: Any) -> ServerSettings:
    return command._settings(argparse.Namespace(command="serve", **given))


# ---- settings


def test_flags_become_settings_and_what_was_not_given_is_left() -> None:
    assert settings_of(port=9, model="m") == ServerSettings(port=9)
    with pytest.raises(ValueError, match=r"^--max-body-bytes: Expected `int` >= 1024$"):
        settings_of(max_body_bytes=1)


def test_a_key_of_the_environment_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no process started from here has it; a flag counts more."""
    monkeypatch.setenv(command.KEY_VARIABLE, "secret")
    assert settings_of().api_key == ["secret"] and command.KEY_VARIABLE not in os.environ
    assert settings_of().api_key == []
    monkeypatch.setenv(command.KEY_VARIABLE, "secret")
    assert settings_of(api_key=["a", "b"]).api_key == ["a", "b"]
    assert command.KEY_VARIABLE not in os.environ
    with pytest.raises(ValueError, match="--api-key: an empty key would let everybody in"):
        settings_of(api_key=["a", ""])


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"page": "all"}, False),
        ({"page": "all", "host": "0.0.0.0"}, True),
        ({"page": "all", "api_key": ["k"]}, True),
        ({"engine_view": "full", "api_key": ["k"]}, True),
        ({"engine_view": "full"}, False),
        ({"page": "counts", "host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0"}, False),
    ],
)
def test_others_words_are_not_shown_on_the_page(given: dict[str, Any], refused: bool) -> None:
    if refused:
        with pytest.raises(ValueError, match="--page: all would show everybody's prompts"):
            settings_of(**given)
    else:
        settings_of(**given)


def test_a_file_of_keys_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "keys").touch(0o600)
    with pytest.raises(ValueError, match="holds no key"):
        settings_of(api_key_file=str(tmp_path / "keys"))


@pytest.mark.parametrize(
    ("has_gpu", "device", "platform", "num_cpus", "expected"),
    [
        (False, None, "linux", 64, 1),
        (True, "cpu", "linux", 64, 1),
        (True, None, "linux", 3, 1),
        (True, None, "linux", 8, 2),
        (True, "cuda", "linux", 12, 3),
        (True, None, "linux", 64, 4),
        (True, None, "darwin", 8, 2),
        (True, None, "darwin", None, 1),
    ],
)
def test_frontends_by_processors(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_gpu: bool,
    device: str | None,
    platform: str,
    num_cpus: int | None,
    expected: int,
) -> None:
    """Those this process may use, where that is known."""
    files = (tmp_path / "none", tmp_path) if has_gpu else (tmp_path / "none",)
    monkeypatch.setattr(command, "GPU_FILES", files)
    on_linux = platform == "linux"
    monkeypatch.setattr(
        command,
        "os",
        SimpleNamespace(
            sched_getaffinity=lambda process: range(num_cpus or 0) if process == 0 else (),
            cpu_count=lambda: 99 if on_linux else num_cpus,
        ),
    )
    monkeypatch.setattr(command, "sys", SimpleNamespace(platform=platform))
    fields = {} if device is None else {"device": device}
    assert command.default_frontends(fields) == expected


def test_settings_of_a_core_that_runs_already_are_its_own() -> None:
    connected = ServerSettings(connect="ipc:///x", preset="classroom")
    with pytest.raises(ValueError, match=r"^--preset, --seed: the core at --connect has settings"):
        command.with_preset(connected, {"seed": 1, "tokenizer": "t"})
    connected = ServerSettings(connect="ipc:///x")
    with pytest.raises(ValueError, match=r"^--block-size, --seed: the core"):
        command.with_preset(connected, {"seed": 1, "block_size": 16})
    own = {"tokenizer": "t", "skip_tokenizer_init": True, "max_core_restarts": 3}
    assert command.with_preset(connected, own) == own


# ---- who runs


class Serves:
    """In place of `run.serve`: what it was called with; it says that it is ready, and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = ServerSettings()
        self.open_llm: Any = None
        self.port, self.is_shared = 0, False
        monkeypatch.setattr(command, "serve", self._serve)

    async def _serve(
        self, settings: ServerSettings, open_llm: Any, listener: socket.socket, on_open: Any
    ) -> int:
        self.settings, self.open_llm = settings, open_llm
        self.port = listener.getsockname()[1]
        self.is_shared = bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        on_open(SimpleNamespace(model_name="a-model"))
        listener.close()
        return 7


async def serve(fields: dict[str, Any] | None = None, **given: Any) -> int:
    arguments = argparse.Namespace(**{"port": 0, **given})
    return await command.run(arguments, SYNTHETIC if fields is None else fields)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_one_frontend_serves_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own: list[str],
    host: str,
) -> None:
    serves, opened = Serves(monkeypatch), asyncio.Event()
    loop = asyncio.get_running_loop()
    urls: list[str] = []

    def open_page(url: str) -> None:
        urls.append(url)
        loop.call_soon_threadsafe(opened.set)

    monkeypatch.setattr(command, "open_page", open_page)
    assert await serve(host=host, open=True) == 7
    await asyncio.wait_for(opened.wait(), WAIT_S)
    assert serves.settings.frontends == 1 and serves.settings.port == serves.port > 0
    assert not serves.is_shared, "another server on this port would get half of its clients"
    url = f"http://[::1]:{serves.port}" if host == "::1" else f"http://{host}:{serves.port}"
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"listening on {url} (Ctrl-C ends it)"
    took = re.fullmatch(r"a-model is ready after (\d+\.\d) s: (.*)", told[1])
    assert took is not None and float(took[1]) < WAIT_S
    assert took[2] == f"{url}/v1 for clients, {url}/ for people"
    assert urls == [f"{url}/"] and own == ["logs None", "freezes"]


async def test_no_page_is_opened_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    Serves(monkeypatch)
    urls: list[str] = []
    monkeypatch.setattr(command, "open_page", urls.append)
    assert await serve() == 7
    await asyncio.sleep(0.01)
    assert urls == []


async def test_the_engine_is_started_here_or_is_at_an_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    serves = Serves(monkeypatch)
    assert await serve({"tokenizer": str(tmp_path)}, connect=address) == 7
    with FakeCore(address, echo) as core:
        async with await serves.open_llm(lambda phase, progress: None) as llm:
            assert llm.info.served_model_name == "fake" and llm.tokenizer is not None
            assert core.received
    started: list[dict[str, Any]] = []

    class Own:
        def __init__(self, **fields: Any) -> None:
            started.append(fields)

        async def start(self) -> None:
            started.append({})

    monkeypatch.setattr(command, "AsyncLLM", Own)
    assert await serve({**SYNTHETIC, "seed": 5}) == 7

    def on_progress(phase: str, progress: float) -> None:
        raise AssertionError

    assert isinstance(await serves.open_llm(on_progress), Own)
    fields = command.with_preset(ServerSettings(), {**SYNTHETIC, "seed": 5})
    assert started == [{"on_progress": on_progress, **fields}, {}]


async def test_what_is_wrong_is_told_before_a_port_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_port(settings: ServerSettings, *, shared: bool) -> socket.socket:
        raise AssertionError("it has tried to listen")

    def no_tracing() -> None:
        raise ValueError("install opentelemetry")

    monkeypatch.setattr(command, "bind", no_port)
    monkeypatch.setattr(command, "require_tracing", no_tracing)
    with pytest.raises(ValueError, match="seed"):
        await serve({**SYNTHETIC, "seed": "x"})
    with pytest.raises(ValueError, match="install opentelemetry"):
        await serve(otlp_traces_endpoint="http://localhost:4318")
    with pytest.raises(AssertionError, match="tried to listen"):
        await serve(preset="classroom")
    with pytest.raises(AssertionError, match="tried to listen"):
        await serve({}, connect="ipc:///x")


class Many:
    """In place of `Frontends` and the cores' processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.setup: Any = None
        self.core: Any = None
        self.owned: list[EngineConfig] = []
        self.located: list[str] = []
        self.directory = Path()
        monkeypatch.setattr(command, "Frontends", self._frontends)
        monkeypatch.setattr(command, "own_cores", self._own_cores)
        monkeypatch.setattr(command, "locate", self.located.append)

    @asynccontextmanager
    async def _own_cores(self, config: EngineConfig) -> AsyncIterator[Any]:
        self.owned.append(config)
        yield SimpleNamespace(address="ipc:///own")

    def _frontends(self, setup: FrontendSetup, environment: dict[str, str], *, core: Any) -> Any:
        self.setup, self.core = setup, core
        self.directory = Path(environment["PROMETHEUS_MULTIPROC_DIR"])
        assert self.directory.is_dir() and environment["PATH"] == os.environ["PATH"]
        return SimpleNamespace(run=self._run)

    async def _run(self, on_ready: Callable[[], None]) -> int:
        settings: ServerSettings = self.setup.settings
        with bind(settings, shared=True) as one, bind(settings, shared=True) as other:
            one.listen()
            other.listen()
            with pytest.raises(ValueError, match="cannot listen"):  # nobody else may have it
                bind(settings, shared=False)
        on_ready()
        return 5


async def test_several_frontends_share_a_port_and_a_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = Many(monkeypatch)
    assert await serve({"model": "m", "seed": 5}, frontends=3) == 5
    assert many.setup.address == "ipc:///own" == many.core.address
    assert many.setup.settings.frontends == 3 and many.setup.settings.port > 0
    fields = command.with_preset(ServerSettings(), {"model": "m", "seed": 5})
    assert many.owned == [EngineConfig.from_kwargs(**fields)] and many.located == ["m"]
    assert not many.directory.exists()
    assert "the engine of 3 frontends is ready after" in capsys.readouterr().err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", many.setup.settings.port), WAIT_S)


async def test_several_frontends_of_a_core_that_runs_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = Many(monkeypatch)
    assert await serve({}, frontends=2, connect="ipc:///x") == 5
    assert many.setup.address == "ipc:///x" and many.core is None and many.owned == []
    for load_format in ("synthetic", "dummy"):
        await serve({**SYNTHETIC, "load_format": load_format}, frontends=2)
    assert many.located == [], "there is no model to look for before cores are started"


# ---- one of several


async def test_a_frontend_ends_with_its_parent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: list[str]
) -> None:
    """That is, with its standard input."""
    ours, parents = socket.socketpair()
    monkeypatch.setattr(run, "sys", SimpleNamespace(stdin=ours))
    setup = FrontendSetup.of(ServerSettings(port=0), "ipc:///x", {})

    async def serve(
        settings: ServerSettings,
        open_llm: Any,
        listener: socket.socket,
        on_ready: Any,
        *,
        lifeline: asyncio.Event,
    ) -> int:
        assert (settings, open_llm) == (setup.settings, setup.open_llm)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        on_ready(SimpleNamespace())
        await asyncio.sleep(0.01)
        assert not lifeline.is_set()
        parents.close()
        await asyncio.wait_for(lifeline.wait(), WAIT_S)
        assert not asyncio.get_running_loop().remove_reader(ours.fileno()), "watched no more"
        listener.close()
        return 6

    monkeypatch.setattr(run, "serve", serve)
    with ours:
        assert await run._run_frontend(setup) == 6
    assert capsys.readouterr().out == f"{run.READY_LINE}\n" and own == ["freezes"]


def test_the_program_of_a_frontend_reads_its_setup(
    monkeypatch: pytest.MonkeyPatch, own: list[str]
) -> None:
    setup = FrontendSetup.of(
        ServerSettings(port=9), "ipc:///x", {"max_core_restarts": 2, "log_level": "debug"}
    )
    lines = iter([msgspec.json.encode(setup) + b"\n"])
    stdin = SimpleNamespace(buffer=SimpleNamespace(readline=lambda: next(lines)))
    told: list[Any] = []

    async def run_frontend(setup: FrontendSetup) -> int:
        told.append(setup)
        return 4

    monkeypatch.setattr(run, "sys", SimpleNamespace(stdin=stdin))
    monkeypatch.setattr(run, "_run_frontend", run_frontend)
    assert run.frontend_main() == 4 and told == [setup]
    assert own == ["logs debug"]


def test_a_server_logs_to_stderr_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what its libraries do."""
    monkeypatch.undo()
    logger = logging.getLogger("nanovllm")
    level = logger.level
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        for config in (LogConfig(), LogConfig(log_level="warning")):
            run.log_to_stderr(config)
            logging.getLogger("nanovllm.x").info("done")
            logging.getLogger("other").info("chatter")
    logger.setLevel(level)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO done\n", capsys.readouterr().err)


def test_what_is_there_at_the_start_is_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    done: list[tuple[object, ...]] = []
    names = "collect", "freeze", "set_threshold"
    calls = {name: lambda *values, name=name: done.append((name, *values)) for name in names}
    monkeypatch.setattr(run, "gc", SimpleNamespace(**calls))
    run.freeze()
    assert done == [("collect",), ("freeze",), ("set_threshold", *run.COLLECTOR)]
