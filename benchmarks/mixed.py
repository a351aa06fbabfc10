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
from typing import Any, NamedTuple
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


def body_of(load: Load, index: int) -> bytes:
    content = {
        "model": load.model,
        "messages": [{"role": "user", "content": f"{index}: {QUESTION}"}],
        "max_tokens": load.max_tokens,
        "temperature": 0.8,
        "seed": load.seed * 1000 + index,
        "stream": True,
        **KINDS[load.kind],
    }
    return json.dumps(content).encode()


async def ask(load: Load, index: int, seen: Seen) -> None:
    """One stream, from its connection to its end."""
    target = urlsplit(load.url)
    body = body_of(load, index)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {target.netloc}\r\n"
        "content-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    try:
        writer.write(head.encode() + body)
        last, status, called = 0.0, await reader.readline(), ""
        if b" 200 " not in status:
            seen.errors.append((await reader.read(2000)).decode(errors="replace")[-200:])
            return
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            now = time.monotonic()
            if last:
                seen.intervals.append(now - last)
            last = now
            if load.kind == "tools":
                for choice in json.loads(line[6:])["choices"]:
                    for call in choice["delta"].get("tool_calls") or []:
                        called += call["function"].get("arguments") or ""
        if load.kind == "tools" and "}" in called:
            json.loads(called)
    finally:
        writer.close()


async def send_all(load: Load) -> Seen:
    rng, seen, tasks = random.Random(load.seed), Seen([], 0, 0, []), list[asyncio.Task[None]]()
    at = load.begin
    async with asyncio.timeout(load.seconds + REQUEST_TIMEOUT_S):
        while (at := at + rng.expovariate(load.rate)) < load.begin + load.seconds:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.append(asyncio.create_task(ask(load, len(tasks), seen)))
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                seen.errors.append(f"{type(result).__name__}: {result}")
    return seen._replace(num_requests=len(tasks), num_events=len(seen.intervals) + len(tasks))


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
