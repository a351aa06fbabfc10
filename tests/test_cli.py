"""The commands against a scripted engine: what is asked of it, printed where, and answered how."""

import asyncio
import gc
import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from nanovllm import __version__, cli, launch
from nanovllm.bench.load import ClientsLoad
from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.synthetic import SyntheticExecutor
from nanovllm.frontend.errors import EngineDeadError, RequestFailedError
from nanovllm.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.terminal import _are_one_file
from nanovllm.watch.observer import Observer

WAITS_FOREVER = "wait"  # a prompt whose answer begins and never ends


class ScriptedLLM:
    """Answers every prompt by repeating it word by word; what happened to it is on the class."""

    asked: ClassVar[list[Any]]
    params: ClassVar[list[SamplingParams]]
    settings: ClassVar[dict[str, Any]]
    events: ClassVar[list[str]]
    fails_with: ClassVar[Exception | None] = None
    tokenizer = SimpleNamespace(has_chat_template=True)

    def __init__(self, *, on_progress: Any, **settings: Any) -> None:
        type(self).settings = settings
        self._on_progress = on_progress

    @classmethod
    async def connect(
        cls, address: str, *, on_progress: Any, keys: str | None = None
    ) -> "ScriptedLLM":
        cls.events.append(f"connect {address}")
        return cls(on_progress=on_progress)

    async def start(self) -> None:
        for progress in (0.0, 0.5, 1.0):
            self._on_progress("weights", progress)
        self.events.append("start")

    async def close(self) -> None:
        self.events.append("close")

    def generate(self, prompt: str, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        self.asked.append(prompt)
        self.params.append(params)
        if self.fails_with is not None:
            raise self.fails_with
        return self._stream(prompt)

    def chat(self, messages: list[Any], params: SamplingParams) -> AsyncIterator[RequestOutput]:
        self.generate(messages[-1]["content"], params)
        self.asked[-1] = [(message["role"], message["content"]) for message in messages]
        return self._stream(messages[-1]["content"])

    async def _stream(self, text: str) -> AsyncIterator[RequestOutput]:
        self.events.append(f"begin {text}")
        await asyncio.sleep(0)
        words = [word + " " for word in text.split()]
        for index, word in enumerate(words):
            yield output(word, finished=index == len(words) - 1 and text != WAITS_FOREVER)
        if text == WAITS_FOREVER:
            try:
                os.kill(os.getpid(), signal.SIGINT)  # the user presses Ctrl-C
                await asyncio.sleep(30)
            finally:
                self.events.append("aborted")


def output(text: str, *, finished: bool) -> RequestOutput:
    reason = "stop" if finished else None
    metrics = RequestMetrics(arrival_time=100.0, first_token_time=100.25, num_generation_tokens=11)
    metrics.finished_time = 101.25 if finished else None
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1, 2, 3],
        outputs=[CompletionOutput(0, text, [7], finish_reason=reason)],  # type: ignore[arg-type]
        finished=finished,
        metrics=metrics,
        num_cached_tokens=2,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedLLM]:
    class Fresh(ScriptedLLM):
        asked: ClassVar[list[Any]] = []
        params: ClassVar[list[SamplingParams]] = []
        events: ClassVar[list[str]] = []

    monkeypatch.setattr("nanovllm.frontend.async_llm.AsyncLLM", Fresh)
    return Fresh


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


# ---- generate


def test_generate_streams_text_to_stdout_and_the_rest_to_stderr(
    engine: type[ScriptedLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "tell me", "--max-model-len", "512", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "tell me \n"
    assert "weights …" in err and "ready after" in err
    assert "[3 prompt tokens, 2 cached | 11 tokens, stop | first token 250 ms | 10.0 tok" in err
    assert engine.asked == [[("user", "tell me")]]
    assert engine.settings == {"max_model_len": 512}
    (params,) = engine.params
    assert (params.temperature, params.output_kind, params.max_tokens) == (0.0, "delta", 256)
    assert engine.events == ["start", "begin tell me", "close"]


def test_what_a_core_is_warned_of_is_no_part_of_an_answer(
    engine: type[ScriptedLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has a line of its own, where both go to one place; else it is on stderr alone."""
    stream = engine._stream

    async def disturbed(self: ScriptedLLM, prompt: str) -> AsyncIterator[RequestOutput]:
        async for output in stream(self, prompt):
            yield output
            logging.getLogger("nanovllm.frontend.core_life").warning("the core %s", "goes on")

    monkeypatch.setattr(engine, "_stream", disturbed)
    assert cli.main(["generate", "a b"]) == 0
    out, err = capsys.readouterr()
    assert out == "a b \n" and err.count("[the core goes on]\n") == err.count("goes on") == 2
    monkeypatch.setattr("nanovllm.terminal._are_one_file", lambda *descriptors: True)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert cli.main(["generate", "a b"]) == 0
    told = capsys.readouterr().out
    assert "\na \n[the core goes on]\nb \n[the core goes on]\n[3 prompt tokens" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], ["a warning"]),
        (["--log-level", "error"], []),
        (["--log-level", "info"], ["some news", "a warning"]),
    ],
)
def test_what_is_logged_can_be_chosen(
    flags: list[str],
    told: list[str],
    engine: type[ScriptedLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = engine._stream

    async def disturbed(self: ScriptedLLM, prompt: str) -> AsyncIterator[RequestOutput]:
        logging.getLogger("nanovllm.frontend").info("some news")
        logging.getLogger("nanovllm.frontend").warning("a warning")
        async for output in stream(self, prompt):
            yield output

    monkeypatch.setattr(engine, "_stream", disturbed)
    before = logging.getLogger("nanovllm").level
    assert cli.main(["generate", "a", *flags]) == 0
    notes = re.findall(r"^\[([a-z ]+)\]$", capsys.readouterr().err, re.M)
    assert notes == told and logging.getLogger("nanovllm").level == before
    assert cli.main(["generate", "a", "--address", "ipc://x", *flags]) == 0, "it is its own affair"


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["--address", "udp://x"], "INFO"),
        (["--address", "udp://x", "--log-level", "debug"], "DEBUG"),
        (["--address", "udp://x", "--owner-fd", "0"], "WARNING"),
    ],
)
def test_a_core_logs_what_was_asked_for_or_what_its_reader_needs(
    words: list[str], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(logging, "basicConfig", lambda *, level, format: levels.append(level))
    assert launch.core_main(words) == 2, "at that address nothing can be bound"
    assert levels == [level]


def test_the_collector_leaves_alone_what_a_core_has_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would stop the loop for a tenth of a second."""
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    config = EngineConfig()
    executor = SyntheticExecutor(config, lambda phase, progress: None)
    core = EngineCore(config, executor, executor.start())
    assert isinstance(launch.make_viewer(core), Observer) and frozen == [True]


def test_only_what_goes_to_one_place_is_one(tmp_path: Path) -> None:
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a") as same, open(os.devnull) as other:
        assert _are_one_file(one.fileno(), same.fileno())
        assert not _are_one_file(one.fileno(), other.fileno())


def test_prompts_run_together_and_are_shown_in_order(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "from stdin")
    assert cli.main(["generate", "--no-chat", "one", "-", "--seed", "5"]) == 0
    assert capsys.readouterr().out == ">>> one\none \n>>> from stdin\n\nfrom stdin \n"
    assert engine.asked == ["one", "from stdin\n"]
    assert [params.seed for params in engine.params] == [5, 5]
    assert engine.events == ["start", "begin one", "begin from stdin\n", "close"]


@pytest.mark.parametrize(("has_template", "asked"), [(True, [("user", "hi")]), (False, "hi")])
def test_the_chat_template_is_used_if_there_is_one(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, has_template: bool, asked: Any
) -> None:
    monkeypatch.setattr(engine, "tokenizer", SimpleNamespace(has_chat_template=has_template))
    assert cli.main(["generate", "hi"]) == 0
    assert engine.asked == [asked]


def test_an_address_attaches_and_refuses_settings(
    engine: type[ScriptedLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "hi", "--address", "ipc://x", "--seed", "1"]) == 0
    assert engine.events == ["connect ipc://x", "begin hi", "close"]
    flags = ["--address", "ipc://x", "--block-size", "8", "--model", "m"]
    assert cli.main(["generate", "hi", *flags]) == cli.USAGE_ERROR
    assert "--block-size, --model: the core at --address has settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("temperature: no"), 2),
        (RequestFailedError("lost"), 1),
        (EngineDeadError("core died of hunger"), 1),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    engine: type[ScriptedLLM],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    engine.fails_with = error
    assert cli.main(["generate", "hi"]) == code
    assert capsys.readouterr().err.endswith(f"nanovllm: {error}\n")
    assert engine.events == ["start", "close"]


def test_bad_sampling_flags_cost_no_start(
    engine: type[ScriptedLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "hi", "--top-p", "2"]) == cli.USAGE_ERROR
    assert "top_p must be in (0, 1], not 2.0" in capsys.readouterr().err
    assert engine.events == []


def test_settings_come_from_flags_then_a_file_then_the_environment(
    engine: type[ScriptedLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    lines = ("max-model-len: 512", "block_size: 8", "temperature: 0", "enforce-eager: true")
    file.write_text("\n".join((*lines, "kv-cache-memory-bytes: 1.5G", "served-model-name: [a, b]")))
    monkeypatch.setenv("NANOVLLM_BLOCK_SIZE", "32")
    monkeypatch.setenv("NANOVLLM_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("NANOVLLM_ENABLE_PREFIX_CACHING", "false")
    words = ["generate", "hi", "--config", str(file), "--max-model-len", "1024"]
    assert cli.main(words) == 0
    assert engine.settings == {
        "max_model_len": 1024,
        "block_size": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 3 * 2**29,
        "served_model_name": ["a", "b"],
        "max_num_seqs": 7,
        "enable_prefix_caching": False,
    }
    assert engine.params[0].temperature == 0
    assert engine.asked == [[("user", "hi")]]


def test_help_is_short_unless_all_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for flag in ("--help", "--help=all"):
        with pytest.raises(SystemExit):
            cli.main(["generate", flag])
        shown.append(capsys.readouterr().out)
    short, whole = shown
    assert "--max-model-len" in short and "--block-size" not in short
    assert "more flags: nanovllm generate --help=all" in short
    assert "--max-model-len" in whole and "--block-size" in whole
    assert len(short.splitlines()) <= 60 < len(whole.splitlines())


@pytest.mark.parametrize("command", [["-m", "nanovllm", "--version"]])
def test_the_package_is_a_program(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert done.stdout == f"nanovllm {__version__}\n"


# ---- chat


def test_chat_remembers_until_reset(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "one", "", "two", "/reset", "three", "/help", "/nonsense", "/exit", "four")
    assert cli.main(["chat", "--system", "be kind"]) == 0
    system = ("system", "be kind")
    first = [system, ("user", "one")]
    assert engine.asked == [
        first,
        [*first, ("assistant", "one "), ("user", "two")],
        [system, ("user", "three")],
    ]
    out, err = capsys.readouterr()
    assert out == "one \ntwo \nthree \n"
    assert "unknown command /nonsense" in err and err.count("/save FILE") == 1
    assert engine.events[-1] == "close"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, WAITS_FOREVER, "again")
    assert cli.main(["chat"]) == 0  # the end of the input ends it, as Ctrl-D does
    assert engine.events == ["start", "begin wait", "aborted", "begin again", "close"]
    heard = [("user", "wait"), ("assistant", "wait "), ("user", "again")]
    assert engine.asked[1] == heard
    assert "(stopped)" in capsys.readouterr().err


def test_what_cannot_be_asked_is_forgotten(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.fails_with = ValueError("prompt is longer than max_model_len")
    type_in(monkeypatch, "long", "longer")
    assert cli.main(["chat"]) == 0
    assert engine.asked == ["long", "longer"]
    assert "longer than max_model_len. /reset starts afresh." in capsys.readouterr().err


def test_chat_needs_a_template(
    engine: type[ScriptedLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "tokenizer", SimpleNamespace(has_chat_template=False))
    assert cli.main(["chat"]) == cli.USAGE_ERROR
    assert "no chat template" in capsys.readouterr().err


# ---- the rest


def test_fetch_prints_the_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(alias: str, *, on_progress: Any) -> Path:
        on_progress("download", 0.5)
        return Path("/cache") / alias

    monkeypatch.setattr(cli, "fetch", fetch)
    assert cli.main(["fetch", "smollm2"]) == 0
    out, err = capsys.readouterr()
    assert out == "/cache/smollm2\n" and "download …" in err


@pytest.mark.parametrize("what", ["throughput", "latency"])
def test_bench_passes_lengths_and_settings_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    def run(arguments: Any, settings: dict[str, Any]) -> str:
        settings.pop("on_progress")
        return f"{what} {arguments.input_len} {arguments.output_len} {settings}"

    monkeypatch.setattr(f"nanovllm.bench.offline.{what}", run)
    assert cli.main(["bench", what, "--input-len", "9", "--block-size", "32"]) == 0
    assert capsys.readouterr().out == f"{what} 9 64 {{'block_size': 32}}\n"


def test_route_serves_cores_that_run_already(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    async def run(arguments: Any, engine_fields: dict[str, Any]) -> int:
        given.extend([arguments.connect, arguments.port, engine_fields])
        return 0

    monkeypatch.setattr("nanovllm.frontend.server.command.run", run)
    words = ["route", "tcp://a:1", "ipc://b", "--port", "80", "--max-core-restarts", "2"]
    assert cli.main(words) == 0
    assert given == ["tcp://a:1,ipc://b", 80, {"max_core_restarts": 2}]


def test_bench_clients_takes_its_load_from_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(load: ClientsLoad, settings: dict[str, Any]) -> str:
        settings.pop("on_progress")
        return f"{load.clients} {load.rate} {load.trace} {settings}"

    monkeypatch.setattr("nanovllm.bench.clients.clients", run)
    command = ["bench", "clients", "--clients", "9", "--rate", "2.5", "--step-ms", "3"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "9 2.5 None {'step_ms': 3.0}\n"
    assert cli.main(["bench", "clients", "--rate", "0"]) == cli.USAGE_ERROR
    assert "rate: Expected `float` > 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["generate", "chat", "bench throughput", "bench clients", "fetch"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: nanovllm {command}" in capsys.readouterr().out


def test_help_is_in_colours_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if sys.version_info < (3, 14):
        pytest.importorskip("rich_argparse", reason="pip install 'nanovllm[shell]'")
    for variable in ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    shown = []
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        with pytest.raises(SystemExit):
            cli.main(["serve", "--help"])
        shown.append(capsys.readouterr().out)
    plain, coloured = shown
    assert "\x1b[" not in plain and "\x1b[36m--port" in coloured
    without = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert re.findall("--[a-z-]+", without) == re.findall("--[a-z-]+", plain)
    assert "nanovllm serve [FLAG ...] [MODEL]" in without and "more flags" in without


def test_a_shell_completes_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="pip install 'nanovllm[shell]'")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash to complete in")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, expected in (
        (["gen"], "generate"),
        (["serve", "--max-mod"], "--max-model-len"),
        (["serve", "--dtype", "bf"], "bfloat16"),
        (["bench", "thr"], "throughput"),
    ):
        asked = f"COMP_WORDS=(nanovllm {shlex.join(words)}); COMP_CWORD={len(words)}; "
        asked += 'function=$(complete -p nanovllm | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        asked += f'$function nanovllm {words[-1]} {words[-2:][0]}; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run([bash, "-c", script + asked], capture_output=True, text=True)
        assert expected in done.stdout.split(), (words, done)


def test_without_its_package_completion_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'nanovllm[shell]'" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from nanovllm.cli import make_parser; make_parser().format_help(); "
        "print({'numpy', 'zmq', 'rich', 'uvloop', 'tokenizers', 'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with cli.Progress() as progress:
        progress("download", 0.25)
        progress("weights", 0.5)
        progress("weights", 0.75)
        assert [task.description for task in progress._bar.tasks] == ["weights"]
        assert progress._bar.tasks[0].completed == 0.75
    assert "ready after" in sys.stderr.getvalue()
