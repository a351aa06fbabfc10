"""A load of streamed completions that costs little of what it measures.

Other programs here call `run`; it starts processes of this file, each of which reads raw sockets,
counts events and takes their times. All of them begin at the same moment.

Times are as `vllm bench serve` takes them: an event's time is when it was read, so of several that
arrive together the later ones have an interval of nothing; output tokens are those of the server's
own `usage`.
"""

import asyncio
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, cast

import msgspec
import uvloop

MARK, NO_CHOICES = b"data: {", b'"choices":[]'
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
END = b"0\r\n\r\n"
TAIL_BYTES = 1024
READY_TIMEOUT_S = 60.0
Body = dict[str, object]


class Share(msgspec.Struct):
    """What one process is to send: each body once, over `connections` at most at a time."""

    host: str
    port: int
    path: str
    bodies: list[Body]
    connections: int
    timeout_s: float


class Timings(msgspec.Struct):
    """What one process, or all of them, saw. Times are of the machine's monotonic clock.

    ttft_s: a request each; itl_s: an interval each; errors: a text each.
    """

    started: float
    ended: float
    num_tokens: int = 0
    num_events: int = 0
    ttft_s: list[float] = []
    itl_s: list[float] = []
    errors: list[str] = []
    cpu_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """In tokens per second and milliseconds."""
        return {
            "output_tokens_per_s": self.num_tokens / max(1e-9, self.ended - self.started),
            "ttft_median_ms": percentile(self.ttft_s, 50) * 1e3,
            "ttft_p99_ms": percentile(self.ttft_s, 99) * 1e3,
            "itl_median_ms": percentile(self.itl_s, 50) * 1e3,
            "itl_p99_ms": percentile(self.itl_s, 99) * 1e3,
            "requests": len(self.ttft_s),
            "output_tokens": self.num_tokens,
            "events": self.num_events,
            "errors": len(self.errors),
            "seconds": self.ended - self.started,
            "load_cpu_us_per_token": self.cpu_s / max(1, self.num_tokens) * 1e6,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, as numpy does; 0 of nothing."""
    if not values:
        return 0.0
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def joined(parts: Sequence[Timings]) -> Timings:
    """From the first request of any process to the last token of any."""
    return Timings(
        started=min(one.started for one in parts),
        ended=max(one.ended for one in parts),
        num_tokens=sum(one.num_tokens for one in parts),
        num_events=sum(one.num_events for one in parts),
        ttft_s=[value for one in parts for value in one.ttft_s],
        itl_s=[value for one in parts for value in one.itl_s],
        errors=[text for one in parts for text in one.errors],
        cpu_s=sum(one.cpu_s for one in parts),
    )


def run(whole: Share, num_processes: int) -> Timings:
    """Have `num_processes` send a share each. `RuntimeError` if one of them fails or hangs."""
    num_processes = min(num_processes, whole.connections)
    programs: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(num_processes):
            first = whole.connections * index // num_processes
            share = msgspec.structs.replace(
                whole,
                bodies=whole.bodies[index::num_processes],
                connections=whole.connections * (index + 1) // num_processes - first,
            )
            programs.append(
                subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            tell(programs[-1], msgspec.json.encode(share))
        for one in programs:
            expect_ready(one)
        for one in programs:
            tell(one, b"go")
        reports = [one.communicate(timeout=whole.timeout_s + 20)[0] for one in programs]
        return joined([msgspec.json.decode(report, type=Timings) for report in reports])
    except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise RuntimeError(f"a process of the load failed: {error!r}") from None
    finally:
        for one in programs:
            if one.poll() is None:
                one.kill()
                one.wait()


def tell(program: "subprocess.Popen[bytes]", line: bytes) -> None:
    assert program.stdin is not None
    program.stdin.write(line + b"\n")
    program.stdin.flush()


def expect_ready(program: "subprocess.Popen[bytes]") -> None:
    """Wait for its line. `RuntimeError` if it ends instead, or takes too long."""
    assert program.stdout is not None
    stdout: IO[bytes] = program.stdout
    found, _, _ = select.select([stdout], [], [], READY_TIMEOUT_S)
    line = stdout.readline().strip() if found else b"nothing"
    if line != b"ready":
        raise RuntimeError(f"a process of the load said {line!r} instead of 'ready'")


# ---- in the processes


class Stream(asyncio.Protocol):
    """One connection that asks for one thing after the other."""

    def __init__(self, requests: Iterator[bytes], timings: Timings) -> None:
        self._requests = requests
        self._timings = timings
        self._asked_at = 0.0
        self._last_at: float | None = None
        self._tail = b""
        self._is_asking = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by class

    def ask(self) -> None:
        """Send the next request, or end."""
        request = next(self._requests, None)
        self._is_asking = request is not None
        if request is None:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._tail, self._last_at = b"", None
        self._asked_at = time.monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data[:1000].decode(errors="replace"))
            return
        seen = self._tail + data
        # The event that holds the usage holds no token.
        num_events = self._num_new(MARK, seen) - self._num_new(NO_CHOICES, seen)
        ended = seen.endswith(END) and b"[DONE]" in seen[-64:]
        if ended:
            usage = USAGE.findall(seen[-TAIL_BYTES:])
            self._timings.num_tokens += int(usage[-1]) if usage else 0
        if num_events > 0:
            self._take_times(now, num_events)
        self._tail = seen[-TAIL_BYTES:]
        if ended:
            self._timings.ended = now
            self.ask()

    def _num_new(self, mark: bytes, seen: bytes) -> int:
        """A mark may be cut in two; what was whole in the tail has been counted."""
        return seen.count(mark, max(0, len(self._tail) - len(mark) + 1))

    def _take_times(self, now: float, num_events: int) -> None:
        timings = self._timings
        timings.num_events += num_events
        if self._last_at is None:
            timings.ttft_s.append(now - self._asked_at)
        else:
            timings.itl_s.append(now - self._last_at)
        timings.itl_s += [0.0] * (num_events - 1)
        self._last_at = now

    def connection_lost(self, error: Exception | None) -> None:
        if self._is_asking:
            self._fail(f"the connection was lost: {error}")
        elif not self.done.done():
            self.done.set_result(None)

    def _fail(self, text: str) -> None:
        """One error ends one connection: the others' figures would be those of a smaller load."""
        self._timings.errors.append(text)
        self._is_asking = False
        self._transport.abort()
        if not self.done.done():
            self.done.set_result(None)


def encoded(share: Share, body: Body) -> bytes:
    content = json.dumps(body).encode()
    return (
        f"POST {share.path} HTTP/1.1\r\nHost: {share.host}:{share.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content


async def send(share: Share) -> Timings:
    loop = asyncio.get_running_loop()
    requests = iter([encoded(share, body) for body in share.bodies])
    timings = Timings(0.0, 0.0)
    streams = []
    for _ in range(share.connections):
        _, stream = await loop.create_connection(
            lambda: Stream(requests, timings), share.host, share.port
        )
        streams.append(stream)
    print("ready", flush=True)
    assert sys.stdin.buffer.readline().strip() == b"go"
    timings.started = time.monotonic()
    for stream in streams:
        stream.ask()
    try:
        async with asyncio.timeout(share.timeout_s):
            await asyncio.gather(*[stream.done for stream in streams])
    except TimeoutError:
        timings.errors.append(f"not done after {share.timeout_s:g} s")
        timings.ended = time.monotonic()
    timings.cpu_s = time.process_time()
    return timings


def main() -> None:
    share = msgspec.json.decode(sys.stdin.buffer.readline(), type=Share)
    timings = uvloop.run(send(share))
    # Not sys.stdout, which may be unbuffered, and then writes what fits into the pipe.
    with open(1, "wb", closefd=False) as stdout:
        stdout.write(msgspec.json.encode(timings))


if __name__ == "__main__":
    main()
