"""What HTTP costs: streamed tokens per second, and time to first token beyond `AsyncLLM`'s.

    python benchmarks/http_server.py [--frontends 2]

The core is a synthetic one in a process of its own: every STEP_MS it sends one token to each
request, over the real sockets and in the real messages. The load comes from processes of its own,
which read raw sockets and count events, so that it costs little of what it measures.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import msgspec
import uvloop
import zmq

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.protocol import (
    Abort,
    AddRequest,
    CoreStatus,
    Finished,
    FromCore,
    Hello,
    Outputs,
    Started,
    ToCore,
    Welcome,
    WorkerInfo,
)
from nanovllm.sampling_params import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
WORDS = [504, 2365, 6354, 16438, 26919, 690, 260, 23790, 2767, 30]  # ids of SmolLM2's vocabulary
STATUS = CoreStatus("bench", 0, 0.0, 0, 0, 1000, 1000, 1, 0, 0, 0, 0, 0)


# ---- the synthetic core


INFO = WorkerInfo(
    device="none",
    dtype="none",
    attention_backend="none",
    architecture="none",
    num_blocks=1001,
    max_model_len=8192,
    vocab_size=49152,
    eos_token_ids=[2],
)
WELCOME = Welcome(0, "bench", "smollm2", "smollm2", 16, 1024, INFO)


class SyntheticCore:
    """One token for every request per step, until killed."""

    def __init__(self, address: str, step_s: float) -> None:
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.bind(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToCore).decode
        self._step_s = step_s
        self._next_step = 0.0
        self._running: dict[bytes, dict[int, list[int]]] = {}  # number → [done, wanted]

    def run(self) -> None:
        next_status = 0.0
        while True:
            self._receive()
            now = time.monotonic()
            if now >= next_status:
                next_status = now + 1.0
                for client in self._running:
                    self._send(client, STATUS)
            if now >= self._next_step:
                self._next_step = max(self._next_step + self._step_s, now)
                for client, requests in self._running.items():
                    if requests:
                        self._send(client, step(requests))

    def _receive(self) -> None:
        """Until the next step is due."""
        while self._router.poll(self._wait_ms()):
            client, frame = self._router.recv_multipart()
            match self._decode(frame):
                case Hello():
                    self._running[client] = {}
                    self._send(client, WELCOME)
                case AddRequest(number, params=params):
                    self._running[client][number] = [0, params.max_tokens or 128]
                case Abort(numbers):
                    for number in numbers:
                        self._running[client].pop(number, None)

    def _wait_ms(self) -> float:
        if not any(self._running.values()):
            return 500
        return max(0.0, (self._next_step - time.monotonic()) * 1e3)

    def _send(self, client: bytes, message: FromCore) -> None:
        self._router.send_multipart([client, self._encode(message)])


def step(requests: dict[int, list[int]]) -> Outputs:
    """What one step brings one client."""
    outputs = Outputs(numbers=list(requests))
    for number, count in list(requests.items()):
        outputs.token_ids.append(WORDS[count[0] % len(WORDS)])
        if count[0] == 0:
            outputs.started.append(Started(number, 0, 0.1))
        count[0] += 1
        if count[0] == count[1]:
            outputs.finished.append(Finished(number, "length", None, 0))
            del requests[number]
    return outputs


# ---- the load


class Stream(asyncio.Protocol):
    """One connection that asks again and again, and counts events."""

    def __init__(self, request: bytes, num_requests: int) -> None:
        self._request = request
        self._left = num_requests
        self._asked_at = 0.0
        self._tail = b""
        self._waiting_for_first = True
        self.num_events = 0
        self.first_token_s: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by class
        self._ask()

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        self.num_events += data.count(b'"delta":{"content"')
        if self._waiting_for_first and b'"delta":{"content"' in data:
            self._waiting_for_first = False
            self.first_token_s.append(time.perf_counter() - self._asked_at)
        ended = data.endswith(b"\r\n0\r\n\r\n") or data.endswith(b"\n0\r\n\r\n")
        self._tail = b"" if ended else data[-8:] if b"delta" not in data[-24:] else b""
        if ended:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))

    def _ask(self) -> None:
        if self._left == 0:
            self.done.set_result(None)
            self._transport.close()
            return
        self._left -= 1
        self._waiting_for_first = True
        self._asked_at = time.perf_counter()
        self._transport.write(self._request)


async def load(port: int, num_streams: int, num_requests: int, num_tokens: int) -> None:
    """Prints a JSON line: events, seconds of wall and processor time, times to first token."""
    messages = [{"role": "user", "content": PROMPT}]
    body = json.dumps({"messages": messages, "max_tokens": num_tokens, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    request, loop = head.encode() + body, asyncio.get_running_loop()
    started, streams = time.perf_counter(), []
    for _ in range(num_streams):
        _, stream = await loop.create_connection(
            lambda: Stream(request, num_requests), "127.0.0.1", port
        )
        streams.append(stream)
    await asyncio.gather(*[stream.done for stream in streams])
    report = {
        "events": sum(stream.num_events for stream in streams),
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time(),
        "ttft": [one for stream in streams for one in stream.first_token_s],
    }
    print(json.dumps(report))


# ---- measuring


def program(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
    )


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """A process and all it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *[one for child in children for one in descendants(int(child))]]


@asynccontextmanager
async def server(address: str, frontends: int) -> AsyncIterator[tuple[int, int]]:
    """(port, pid) of `nanovllm serve` in front of the core."""
    command = [sys.executable, "-m", "nanovllm.cli", "serve", "--port", "0"]
    command += ["--connect", address, "--frontends", str(frontends)]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        while b"ready after" not in (line := await process.stderr.readline()):
            assert line, "the server ended"
        yield int(line.split(b":")[-1].split(b"/")[0]), process.pid
    finally:
        process.terminate()
        await process.wait()


def run_load(
    port: int, processes: int, streams: int, requests: int, tokens: int
) -> dict[str, float]:
    share = str(streams // processes)
    programs = [
        program("load", str(port), share, str(requests), str(tokens)) for _ in range(processes)
    ]
    reports = [json.loads(one.communicate()[0]) for one in programs]
    ttft = sorted(value for report in reports for value in report["ttft"])
    events = sum(report["events"] for report in reports)
    return {
        "tokens/s": events / max(report["seconds"] for report in reports),
        "events": events,
        "load cpu s": sum(report["cpu"] for report in reports),
        "ttft p50 ms": statistics.median(ttft) * 1e3,
        "ttft p99 ms": ttft[int(len(ttft) * 0.99)] * 1e3,
    }


async def direct_ttft(address: str, num_requests: int) -> list[float]:
    """Of `AsyncLLM` in this process, one request at a time."""
    llm = await AsyncLLM.connect(address)
    params = SamplingParams(max_tokens=4, output_kind="delta")
    times = []
    for _ in range(num_requests):
        started = time.perf_counter()
        first = True
        async for _output in llm.chat([{"role": "user", "content": PROMPT}], params):
            if first:
                times.append(time.perf_counter() - started)
                first = False
    await llm.close()
    return times


async def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        core = program("core", address, str(arguments.step_ms / 1e3))
        try:
            async with server(address, arguments.frontends) as (port, pid):
                direct = statistics.median((await direct_ttft(address, 200))[50:]) * 1e3
                await asyncio.to_thread(run_load, port, 1, 1, 50, 4)  # warm up
                idle = await asyncio.to_thread(run_load, port, 1, 1, 200, 4)
                print(
                    f"TTFT, idle, p50: AsyncLLM {direct:.2f} ms, HTTP {idle['ttft p50 ms']:.2f} ms"
                )
                before = sum(map(cpu_seconds, descendants(pid)))
                report = await asyncio.to_thread(
                    run_load, port, arguments.load_processes, arguments.streams,
                    arguments.requests, arguments.tokens,
                )  # fmt: skip
                used = sum(map(cpu_seconds, descendants(pid))) - before
                num_tokens = arguments.streams * arguments.requests * arguments.tokens
                print(
                    f"{arguments.streams} streams, {arguments.frontends} frontends: "
                    f"{num_tokens / report['events'] * report['tokens/s']:,.0f} tokens/s in "
                    f"{report['events']:,.0f} events of {num_tokens:,} tokens; "
                    f"TTFT p50 {report['ttft p50 ms']:.1f} ms, p99 {report['ttft p99 ms']:.1f} ms"
                )
                print(
                    f"processor time per token: frontends {used / num_tokens * 1e6:.1f} µs, "
                    f"load {report['load cpu s'] / num_tokens * 1e6:.1f} µs, "
                    f"core {cpu_seconds(core.pid) / num_tokens * 1e6:.1f} µs"
                )
        finally:
            core.kill()
            core.wait()


def main() -> None:
    if sys.argv[1:2] == ["core"]:
        SyntheticCore(sys.argv[2], float(sys.argv[3])).run()
    elif sys.argv[1:2] == ["load"]:
        uvloop.run(load(*map(int, sys.argv[2:6])))
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("--frontends", type=int, default=1)
        parser.add_argument("--streams", type=int, default=64)
        parser.add_argument("--requests", type=int, default=8, help="per stream")
        parser.add_argument("--tokens", type=int, default=256, help="per request")
        parser.add_argument("--step-ms", type=float, default=1.0)
        parser.add_argument("--load-processes", type=int, default=1)
        uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    main()
