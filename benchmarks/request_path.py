"""How much code one request passes: the files and the lines of the functions that run for it.

    python benchmarks/request_path.py [--model smollm2] [--functions]

Counted are one greedy `AsyncLLM.generate` of 4 tokens, and one chat stream over HTTP, on a CPU:
frontend, core and worker together, each as it is when it has run the same request before, up to
where the core waits for the next one. Lines are those of whole functions, comments and docstrings
included, each once. Clocks stand still meanwhile, so that heartbeats and what else runs now and
then on its own is left out.
"""

import argparse
import ast
import asyncio
import functools
import json
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx

import nanovllm
from nanovllm import AsyncLLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.core import server as core_server
from nanovllm.core.server import CoreServer
from nanovllm.frontend import core_life
from nanovllm.frontend.server import serving
from nanovllm.frontend.server.run import bind
from nanovllm.frontend.server.run import serve as run_server
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.launch import make_executor

PACKAGE = Path(nanovllm.__file__).parent
NUM_TOKENS = 4
NEVER_S = 3600.0
NUM_REQUESTS = 5  # what runs for each of them is counted
SETTLE_S = 0.05  # after a request, until everything waits for the next one
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ONE_PROMPT = "The capital of France is"

Function = tuple[str, int]  # file, relative to the package, and first line
Request = Callable[[int], Awaitable[None]]


class Tracer:
    """Notes the functions of this package that are called, in every thread begun after it."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._codes.add(frame.f_code)

    async def trace(self, request: Request) -> set[Function]:
        """What ran for each of several requests, the first ones not counted."""
        found: list[set[Function]] = []
        for number in range(2 + NUM_REQUESTS):
            self._codes = set()
            await request(number)
            await asyncio.sleep(SETTLE_S)
            found.append({one for code in self._codes.copy() if (one := function_of(code))})
        return set.intersection(*found[2:])


def function_of(code: CodeType) -> Function | None:
    """None for what is not of this package, and for what runs at import."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(PACKAGE):
        return None
    return str(path.relative_to(PACKAGE)), code.co_firstlineno


@functools.cache
def extents(file: str) -> dict[int, range]:
    """First line of each function of a file, as its code has it → its lines."""
    found: dict[int, range] = {}
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            assert node.end_lineno is not None
            found[first] = range(first, node.end_lineno + 1)
    return found


def lines_of(functions: set[Function]) -> dict[str, set[int]]:
    """File → its lines that belong to these functions; what stands inside of another function, a
    comprehension say, belongs to that."""
    lines: dict[str, set[int]] = defaultdict(set)
    for file, first in functions:
        lines[file].update(extents(file).get(first, ()))
    return {file: some for file, some in lines.items() if some}


def room_of(file: str) -> str:
    """The folder of the design that a file is in."""
    parts = Path(file).parts
    inner = parts[:2] in (("frontend", "server"), ("worker", "kernels"))
    return ".".join(parts[:2] if inner else parts[:1]).removesuffix(".py")


@contextmanager
def clocks_standing_still() -> Iterator[None]:
    clocks = (
        (core_life, "WATCH_INTERVAL_S"),
        (core_server, "PULSE_INTERVAL_S"),
        (serving, "WATCH_INTERVAL_S"),
    )
    before = [getattr(module, name) for module, name in clocks]
    for module, name in clocks:
        setattr(module, name, NEVER_S)
    try:
        yield
    finally:
        for (module, name), interval_s in zip(clocks, before, strict=True):
            setattr(module, name, interval_s)


@asynccontextmanager
async def core(address: str, **settings: Any) -> AsyncIterator[None]:
    """A core in a thread of this process, where the tracer sees it."""
    config = EngineConfig.from_kwargs(device="cpu", client_lease_s=NEVER_S, **settings)
    server = CoreServer(config, address)
    make = functools.partial(make_executor, config, server.on_progress)
    running = asyncio.create_task(asyncio.to_thread(server.run, make))
    try:
        yield
    finally:
        server.stop()
        await running


async def generate(llm: AsyncLLM, number: int) -> None:
    async for output in llm.generate(f"{ONE_PROMPT} {number}", PARAMS):
        last = output
    assert len(last.outputs[0].token_ids) == NUM_TOKENS


async def chat(http: httpx.AsyncClient, number: int) -> None:
    body = {
        "messages": [{"role": "user", "content": f"{ONE_PROMPT} {number}"}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines()]
    assert response.status_code == 200 and lines[-2] == "data: [DONE]", lines


async def both(
    model: str, tokenizer: str | Tokenizer | None = None, **settings: Any
) -> tuple[set[Function], set[Function]]:
    """The functions of a `generate`, and those of a chat stream."""
    tracer = Tracer()
    with clocks_standing_still(), tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        async with core(address, model=model, **settings):
            async with await AsyncLLM.connect(address, tokenizer=tokenizer) as llm:
                generated = await tracer.trace(functools.partial(generate, llm))
            chatted = await _trace_http(tracer, address, tokenizer)
    sys.setprofile(None)
    threading.setprofile(None)
    return generated, chatted


async def _trace_http(
    tracer: Tracer, address: str, tokenizer: str | Tokenizer | None
) -> set[Function]:
    server_settings, stop = ServerSettings(port=0), asyncio.Event()
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    listener = bind(server_settings, shared=False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    opener = functools.partial(_attach, address, tokenizer)
    server = asyncio.create_task(
        run_server(server_settings, opener, listener, ready.set_result, lifeline=stop)
    )
    try:
        await asyncio.wait([ready, server], return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            await server  # it could not start, and raises why
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
            return await tracer.trace(functools.partial(chat, http))
    finally:
        stop.set()
        await server


async def _attach(address: str, tokenizer: str | Tokenizer | None, _: object) -> AsyncLLM:
    return await AsyncLLM.connect(address, tokenizer=tokenizer)


def report(name: str, functions: set[Function], *, show_functions: bool) -> None:
    """Totals, then files and lines by room, then each file."""
    lines = lines_of(functions)
    print(f"{name}: {len(lines)} files, {sum(map(len, lines.values()))} lines")
    rooms = Counter({room: 0 for room in map(room_of, lines)})
    files = Counter(map(room_of, lines))
    for file, some in lines.items():
        rooms[room_of(file)] += len(some)
    for room, count in rooms.most_common():
        print(f"  {room:18} {files[room]:3} files {count:5} lines")
    for file, some in sorted(lines.items(), key=lambda item: -len(item[1])):
        print(f"    {file:45} {len(some):4}")
        for first, extent in sorted(extents(file).items()) if show_functions else ():
            if (file, first) in functions:
                source = (PACKAGE / file).read_text().splitlines()[extent.start - 1]
                print(f"        {len(extent):4} {source.strip()[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the engine, as JSON")
    parser.add_argument("--functions", action="store_true", help="list each with its lines")
    arguments = parser.parse_args()
    generated, chatted = asyncio.run(both(arguments.model, **arguments.settings))
    report("generate", generated, show_functions=arguments.functions)
    report("chat stream", chatted, show_functions=arguments.functions)


if __name__ == "__main__":
    main()
