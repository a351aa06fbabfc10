"""Does a plain stream notice what others ask? Chats with penalties, forced tool calls and streams
with log-probabilities arrive beside plain ones, over HTTP, by Poisson.

    python benchmarks/mixed.py --model smollm2 [--rate 16 --seconds 5]

A server is started (or `--url` names one). The plain requests run alone, then beside the others,
then beside as many more that are plain as well (the control: what is the load, what the others),
in turn, `--rounds` times; each kind comes from a process of its own, at `--rate` a
second. Printed are the intervals between the tokens of the plain streams; a time is when an event
was read.
"""

import argparse
import asyncio
import gc
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import uvloop
from http_load import percentile

START_TIMEOUT_S, REQUEST_TIMEOUT_S = 240.0, 60.0
QUESTION = "Tell me about the city that you like best, and why you like it."
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 50_000_000},
        "sights": {
            "type": "array",
            "items": {"type": "string", "maxLength": 30},
            "minItems": 1,
            "maxItems": 4,
        },
    },
    "required": ["name", "country", "inhabitants", "sights"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "penalties": {"ignore_eos": True, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "tools": {
        "tools": [{"type": "function", "function": {"name": "visit", "parameters": CITY}}],
        "tool_choice": {"type": "function", "function": {"name": "visit"}},
    },
    "logprobs": {"ignore_eos": True, "logprobs": True, "top_logprobs": 5},
}


class Load(NamedTuple):
    """What one process sends. Times are of the machine's monotonic clock."""

    url: str
    model: str
    kind: str
    rate: float
    seconds: float
    max_tokens: int
    begin: float
    seed: int


class Seen(NamedTuple):
    """What came back: intervals in seconds, requests, and what was wrong with some of them."""

    intervals: list[float]
    num_requests: int
    num_events: int
    errors: list[str]


class Stream(asyncio.Protocol):
    """One request, from its connection to its end. What comes is kept with its time, and looked at
    when nothing is measured any more."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.read: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._content)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        self.read.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def events(self) -> Iterator[tuple[float, Any]]:
        """All but the last, [DONE], with their times. `RuntimeError`: the answer is none."""
        whole = b"".join(data for _, data in self.read)
        if not whole.startswith(b"HTTP/1.1 200") or b"[DONE]" not in whole[-64:]:
            raise RuntimeError(whole[-200:].decode(errors="replace"))
        rest = b""
        for at, data in self.read:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield at, json.loads(line[6:])


def request_of(url: str, **body: Any) -> bytes:
    """A chat, streamed, at the server's address."""
    content = json.dumps({"temperature": 0.8, "stream": True, **body}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
        "content-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def run_streams(url: str, requests: list[tuple[float, bytes]]) -> list[Stream]:
    """Each at its time; all have ended. The collector looks at nothing meanwhile."""
    loop, target, streams = asyncio.get_running_loop(), urlsplit(url), list[Stream]()
    host, port = target.hostname or "", target.port or 80
    gc.freeze()
    gc.disable()
    for at, content in requests:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        make = partial(Stream, content)
        streams.append((await loop.create_connection(make, host, port))[1])
    for stream in streams:
        await stream.done
    gc.enable()
    return streams


async def send_all(load: Load) -> Seen:
    rng, requests, at = random.Random(load.seed), list[tuple[float, bytes]](), load.begin
    while (at := at + rng.expovariate(load.rate)) < load.begin + load.seconds:
        index = len(requests)
        content = request_of(
            load.url,
            model=load.model,
            messages=[{"role": "user", "content": f"{index}: {QUESTION}"}],
            max_tokens=load.max_tokens,
            seed=load.seed * 1000 + index,
            **KINDS[load.kind],
        )
        requests.append((at, content))
    async with asyncio.timeout(load.begin - time.monotonic() + load.seconds + REQUEST_TIMEOUT_S):
        streams = await run_streams(load.url, requests)
    seen = Seen([], len(streams), 0, [])
    for stream in streams:
        try:
            seen = seen._replace(num_events=seen.num_events + look_at(stream, load.kind, seen))
        except (RuntimeError, ValueError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
    return seen


def look_at(stream: Stream, kind: str, seen: Seen) -> int:
    """Its intervals; returns the number of events. `ValueError`: arguments of a call are no JSON
    though they have ended."""
    last, called, count = 0.0, "", 0
    for at, event in stream.events():
        seen.intervals.extend([at - last] * bool(last))
        last, count = at, count + 1
        for choice in event["choices"] if kind == "tools" else ():
            for call in choice["delta"].get("tool_calls") or []:
                called += call["function"].get("arguments") or ""
    if "}" in called:
        json.loads(called)
    return count


def send(load: Load) -> Seen:
    """In a process of its own."""
    return uvloop.run(send_all(load))


def run(pool: ProcessPoolExecutor, arguments: argparse.Namespace, kinds: list[str]) -> list[Seen]:
    """All kinds at once; what each saw."""
    begin = time.monotonic() + 0.3
    model, url = model_of(arguments.url), arguments.url
    loads = [
        Load(url, model, kind, arguments.rate, arguments.seconds, arguments.max_tokens, begin, seed)
        for seed, kind in enumerate(kinds)
    ]
    return list(pool.map(send, loads))


def model_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    """Its URL. `SystemExit` if it is not ready in time."""
    if arguments.url:
        yield arguments.url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nanovllm.cli", "serve", arguments.model, "--port", str(port)]
    process = subprocess.Popen(command + arguments.serve_args.split())
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                break
            except OSError:  # also 503 while it loads
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit("the server did not become ready")
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def report(name: str, seen: list[Seen]) -> float:
    """One line; returns the plain streams' p99 in milliseconds."""
    plain = seen[0]
    p50, p99 = (percentile(plain.intervals, percent) * 1e3 for percent in (50, 99))
    errors = [error for one in seen for error in one.errors]
    print(
        f"{name:7} plain: {plain.num_requests:4d} requests, inter-token p50 {p50:6.2f} "
        f"p99 {p99:6.2f} ms | all: {sum(one.num_requests for one in seen):4d} requests, "
        f"{sum(one.num_events for one in seen):6d} events, {len(errors)} errors "
        f"{errors[0] if errors else ''}",
        flush=True,
    )
    return p99


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--url", help="of a server that runs; default: start one")
    parser.add_argument("--serve-args", default="", help="further flags of nanovllm serve")
    parser.add_argument("--rate", type=float, default=16.0, help="requests a second of each kind")
    parser.add_argument("--seconds", type=float, default=5.0, help="for which they arrive")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    beside_alone: list[float] = []
    beside_plain: list[float] = []
    with server(arguments) as url, ProcessPoolExecutor(len(KINDS)) as pool:
        arguments.url = url
        report("warm", run(pool, arguments, list(KINDS)))
        for _ in range(arguments.rounds):
            alone = report("alone", run(pool, arguments, ["plain"]))
            mixed = report("mixed", run(pool, arguments, list(KINDS)))
            control = report("as many", run(pool, arguments, ["plain"] * len(KINDS)))
            beside_alone.append(mixed / max(alone, 1e-9))
            beside_plain.append(mixed / max(control, 1e-9))
    for name, ratios in (("alone", beside_alone), ("beside as many", beside_plain)):
        told = " / ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        print(f"p99 of the plain streams, mixed / {name}: {told}")


if __name__ == "__main__":
    main()
