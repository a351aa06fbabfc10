"""nanovllm's HTTP server beside vLLM's: 512 random tokens in, 128 out, for several concurrencies.

    python benchmarks/serving.py --engine both --tokenizer /models/smollm2.gguf --output out.json
    python benchmarks/serving.py --url http://127.0.0.1:8000 --tokenizer smollm2   # one that runs

Each server is loaded first by `http_load.py`, whose cost is small, and then by vLLM's own
`bench serve` where that is installed (`vllm_bench_load.py`), by as many processes. Every wait is
bounded; the report is written anew after each figure.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import http_load
from vllm_bench_load import VllmBench

from nanovllm.frontend.tokenizer import Tokenizer

SHAPES = str(Path(__file__).parent / "models" / "qwen3-0.6b")
MODEL_NAME = "served"
PROCESSES = {1: 1, 16: 2, 64: 4, 256: 8}  # of the load, for a concurrency up to this
PROMPTS_PER_STREAM = {1: 16, 16: 8, 64: 8, 256: 5}
STOP_TIMEOUT_S = 20.0
Engine = Literal["nanovllm", "vllm"]
READY_LINE = "is ready after"


class Server(NamedTuple):
    """One that answers at host:port. pid: of the process that was started for it, if one was."""

    host: str
    port: int
    model: str
    pid: int | None
    start_s: float


# ---- the prompts


def tokenizer_directory(source: str, directory: Path) -> Path:
    """What transformers, and so vLLM, can read, of any tokenizer that nanovllm can."""
    if (Path(source) / "tokenizer_config.json").is_file():
        return Path(source)
    tokenizer = Tokenizer.load(source)
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_max_length": 1 << 20, "clean_up_tokenization_spaces": False}
    config |= tokenizer.special_tokens
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def random_prompts(tokenizer: Tokenizer, count: int, length: int, seed: int) -> list[str]:
    """Texts of `length` tokens each, as nearly as a text of random tokens can be had."""
    rng = random.Random(seed)
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    prompts = []
    for _ in range(count):
        text = tokenizer.decode(rng.choices(ids, k=length))
        found = tokenizer.encode(text, add_special_tokens=False)
        prompts.append(tokenizer.decode(found[:length]))
    return prompts


# ---- the servers


def command_of(
    engine: Engine, port: int, tokenizer: Path, arguments: argparse.Namespace
) -> list[str]:
    common = ["--port", str(port), "--tokenizer", str(tokenizer)]
    common += ["--served-model-name", MODEL_NAME]
    if engine == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments.model]
        command += [*common, "--load-format", "dummy", "--disable-uvicorn-access-log"]
        extra = arguments.vllm_args
    else:
        command = [sys.executable, "-m", "nanovllm.cli", "serve", arguments.model]
        command += [*common, "--load-format", arguments.load_format]
        if arguments.frontends is not None:
            command += ["--frontends", str(arguments.frontends)]
        extra = arguments.nanovllm_args
    if arguments.max_model_len:
        command += ["--max-model-len", str(arguments.max_model_len)]
    return command + extra.split()


@contextlib.contextmanager
def started(
    engine: Engine, command: list[str], port: int, timeout_s: float, log: Path
) -> Iterator[Server]:
    """`RuntimeError`, with the end of its log, if it is not ready in time."""
    begun = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not is_ready(engine, port, log):
            if process.poll() is not None or time.monotonic() - begun > timeout_s:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                what = "ended" if process.poll() is not None else "is not ready in time"
                raise RuntimeError(f"the server of {engine} {what}:\n{end}")
            time.sleep(0.1)
        yield Server("127.0.0.1", port, MODEL_NAME, process.pid, time.monotonic() - begun)
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """In order if it can, and then whatever is left of its session."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_ready(engine: Engine, port: int, log: Path) -> bool:
    """All processes of nanovllm's server, not just the one that would answer here."""
    if engine == "nanovllm":
        return READY_LINE in log.read_text(errors="replace")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def running(url: str) -> Server:
    parts = urlsplit(url)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    assert parts.hostname is not None
    return Server(parts.hostname, parts.port or 80, model, None, 0.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- measuring


class Measurement:
    """Loads one server. report: filled as figures come, and saved by `save`."""

    def __init__(
        self,
        server: Server,
        tokenizer: Tokenizer,
        arguments: argparse.Namespace,
        report: dict[str, Any],
        save: Callable[[], None],
    ) -> None:
        self._server = server
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._report = report
        self._save = save
        self._seed = random.SystemRandom().getrandbits(20)  # no prompt is ever sent twice

    def run(self, bench: VllmBench | None) -> None:
        arguments = self._arguments
        for concurrency in arguments.concurrency:  # shapes are compiled and captured when first met
            self._load(concurrency, max(4, concurrency + concurrency // 4), output_len=32)
        for concurrency in arguments.concurrency if arguments.vllm_bench != "only" else ():
            before = cpu_seconds(self._server.pid)
            timings = self._load(concurrency, self._num_prompts(concurrency))
            used = cpu_seconds(self._server.pid) - before
            figures = timings.figures()
            if self._server.pid is not None:
                figures["server_cpu_us_per_token"] = used / max(1, timings.num_tokens) * 1e6
            self._keep("http_load", concurrency, figures, timings.errors)
        for concurrency in arguments.concurrency if bench is not None else ():
            assert bench is not None
            self._seed += 1
            timings = bench.run(
                base_url=f"http://{self._server.host}:{self._server.port}",
                model=self._server.model,
                concurrency=concurrency,
                num_prompts=self._num_prompts(concurrency),
                num_processes=processes_for(concurrency, arguments),
                seed=self._seed * 1000,
            )
            self._keep("vllm bench serve", concurrency, timings.figures(), timings.errors)

    def _num_prompts(self, concurrency: int) -> int:
        per_stream = value_for(PROMPTS_PER_STREAM, concurrency)
        return max(16, round(concurrency * per_stream * self._arguments.scale))

    def _load(
        self, concurrency: int, num_prompts: int, output_len: int | None = None
    ) -> http_load.Timings:
        arguments = self._arguments
        self._seed += 1
        prompts = random_prompts(self._tokenizer, num_prompts, arguments.input_len, self._seed)
        body: http_load.Body = {
            "model": self._server.model,
            "max_tokens": output_len or arguments.output_len,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if arguments.temperature is not None:
            body["temperature"] = arguments.temperature
        share = http_load.Share(
            host=self._server.host,
            port=self._server.port,
            path="/v1/completions",
            bodies=[{**body, "prompt": prompt} for prompt in prompts],
            connections=concurrency,
            timeout_s=arguments.timeout,
        )
        return http_load.run(share, processes_for(concurrency, arguments))

    def _keep(
        self, load: str, concurrency: int, figures: dict[str, float], errors: list[str]
    ) -> None:
        self._report.setdefault(load, {})[str(concurrency)] = figures
        if errors:
            self._report.setdefault("first_errors", []).append(errors[0])
            print(f"{len(errors)} errors, the first: {errors[0]}")
        print(
            f"{load:>16} C={concurrency:<4} {figures['output_tokens_per_s']:>9,.0f} tokens/s   "
            f"TTFT {figures['ttft_median_ms']:7.1f} / {figures['ttft_p99_ms']:7.1f} ms   "
            f"inter-token {figures['itl_median_ms']:6.2f} / {figures['itl_p99_ms']:6.2f} ms",
            flush=True,
        )
        self._save()


def processes_for(concurrency: int, arguments: argparse.Namespace) -> int:
    chosen: int | None = arguments.load_processes
    return value_for(PROCESSES, concurrency) if chosen is None else min(chosen, concurrency)


def value_for(table: dict[int, int], concurrency: int) -> int:
    """Of the first key that is large enough, or the last."""
    return next(
        (value for most, value in table.items() if concurrency <= most), [*table.values()][-1]
    )


def cpu_seconds(pid: int | None) -> float:
    """Of a process and all that it has started and that still run; 0 where there is no /proc."""
    if pid is None or not Path("/proc").is_dir():
        return 0.0
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            parents[int(path.parent.name)] = int(fields[1])
            ticks = int(fields[11]) + int(fields[12])
            times[int(path.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")
    family = {pid}
    while more := {one for one, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(times.get(one, 0.0) for one in family)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("serving.py: ended"))  # and end its servers
    report: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "engines": {},
    }

    def save() -> None:
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        directory = tokenizer_directory(arguments.tokenizer, Path(temporary))
        tokenizer = Tokenizer.load(str(directory))
        bench = None
        if arguments.vllm_bench != "no" and find_spec("vllm") is not None:
            lengths = (arguments.input_len, arguments.output_len)
            bench = stack.enter_context(
                VllmBench(
                    directory,
                    lengths,
                    temperature=arguments.temperature,
                    timeout_s=arguments.timeout,
                    log=arguments.logs / "serving-vllm-bench.log",
                )
            )
        elif arguments.vllm_bench in ("yes", "only"):
            raise SystemExit("serving.py: --vllm-bench: vllm is not installed here")
        if arguments.url is not None:
            figures = report["engines"].setdefault(arguments.url, {})
            Measurement(running(arguments.url), tokenizer, arguments, figures, save).run(bench)
        else:
            failed = [
                engine
                for engine in (
                    ("nanovllm", "vllm") if arguments.engine == "both" else (arguments.engine,)
                )
                if not measure(engine, directory, tokenizer, arguments, report, save, bench)
            ]
            sys.exit(1 if failed else 0)


def measure(
    engine: Engine,
    directory: Path,
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    report: dict[str, Any],
    save: Callable[[], None],
    bench: VllmBench | None,
) -> bool:
    """Start one engine's server and load it. False, and the reason in the report, if it fails."""
    port = free_port()
    command = command_of(engine, port, directory, arguments)
    figures = report["engines"].setdefault(engine, {"command": command})
    log = arguments.logs / f"serving-{engine}.log"
    print(f"{engine}: {' '.join(command)}", flush=True)
    try:
        with started(engine, command, port, arguments.start_timeout, log) as server:
            figures["start_s"] = round(server.start_s, 2)
            print(f"{engine}: ready after {server.start_s:.1f} s", flush=True)
            Measurement(server, tokenizer, arguments, figures, save).run(bench)
    except RuntimeError as error:
        figures["failure"] = str(error)
        print(f"{engine}: {error}", flush=True)
        save()
        return False
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--engine", choices=("nanovllm", "vllm", "both"), default="nanovllm")
    add("--url", help="load the server that runs there instead of starting any")
    add("--model", default=SHAPES, help="what both serve, with made-up weights")
    add("--tokenizer", default="smollm2", help="alias, .gguf file or directory")
    add("--load-format", default="dummy", help="nanovllm's; synthetic: no model, a fixed step time")
    add("--concurrency", type=int, nargs="+", default=[1, 16, 64, 256])
    add("--input-len", type=int, default=512)
    add("--output-len", type=int, default=128)
    add("--temperature", type=float, help="left to the server if not given, as vLLM's client does")
    add("--scale", type=float, default=1.0, help="of the number of prompts")
    add("--load-processes", type=int, help="by default 1, 2, 4 or 8 by concurrency")
    add("--frontends", type=int, help="HTTP processes of nanovllm; by default its own choice")
    add("--max-model-len", type=int, default=4096)
    add("--nanovllm-args", default="", help="further flags for its server, in one string")
    add("--vllm-args", default="", help="further flags for its server, in one string")
    add("--vllm-bench", choices=("auto", "yes", "no", "only"), default="auto")
    add("--timeout", type=float, default=60.0, help="seconds for one figure")
    add("--start-timeout", type=float, default=240.0, help="seconds for a server to be ready")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()), help="where servers' logs go")
    add("--output", type=Path, help="JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
