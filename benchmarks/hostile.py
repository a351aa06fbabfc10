"""What 16 streams notice of hostile bodies and of 2,000 slow connections.

    python -m benchmarks.hostile [--connections 2000] [--step-ms 20] [--rounds 8] [--phase-s 5]
                                 [--connection-rounds 3]

A server of its own (`nanovllm serve`, a synthetic core) answers 16 streams and a probe of
`/health`, which another process reads and times as long as the program runs. In rounds, in turns,
they are alone; the bodies of `tests/frontend/server/hostile_bodies.py` are sent, one after the
other, to their server; and they are sent "elsewhere", to a second server that has no streams: the
same work of the same processors, which holds up nobody's loop. Then likewise with so many
connections that send nothing, or a part of something, until the server has closed them all; the
time in which most of them open is shown apart. Memory and descriptors are the first server's.
"""

import argparse
import asyncio
import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.frontend.server.hostile_bodies import Hostile, bodies
from tests.frontend.vocabulary import save

NUM_STREAMS = 16
PHASES = ("alone", "here", "elsewhere")
CLOSED_WITHIN_S = 60.0
OPENING_S = 2.0
ALONE_S = 10.0  # about as long as connections are held
SETTLE_S = 1.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
# Nothing at all, part of a header, part of a body, and a header that drips.
KINDS = (b"", b"GET / HT", HEAD + b"content-length: 900\r\n\r\n{", b"G")


# ---- who looks on


async def watch(port: int) -> None:
    """Until standard input ends; prints [time, seconds] of each interval and of each probe."""
    intervals: list[tuple[float, float]] = []
    probes: list[tuple[float, float]] = []

    async def stream() -> None:
        body = {"prompt": [1, 2, 3], "max_tokens": 3000, "ignore_eos": True, "stream": True}
        content = json.dumps(body).encode()
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"content-length: %d\r\n\r\n%b" % (len(content), content))
            last = 0.0
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    break
                if line.startswith(b"data: "):
                    now = time.monotonic()
                    if last:
                        intervals.append((now, now - last))
                    last = now
            writer.close()

    async def probe() -> None:
        while True:
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n")
            assert b" 200 " in await reader.read()
            probes.append((began, time.monotonic() - began))
            writer.close()
            await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(stream()) for _ in range(NUM_STREAMS)]
    tasks.append(asyncio.create_task(probe()))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    failed = [task for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    print(json.dumps([intervals, probes, len(failed)]))


# ---- what is done to the server


async def send_bodies(port: int, made: list[Hostile]) -> list[tuple[str, float]]:
    """Each body's time to its answer."""
    times = []
    for one in made:
        head = f"POST {one.path} HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(one.content) + one.content)
        answer = await reader.read()
        times.append((one.name, time.monotonic() - began))
        assert int(answer.split()[1]) in one.statuses, (one.name, answer[:200])
        writer.close()
    return times


async def hold_connections(port: int, count: int) -> float:
    """Open as many, and wait until the server has closed all. Returns how long that took."""
    began = time.monotonic()

    async def hold(kind: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(kind)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(CLOSED_WITHIN_S):
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(2.0):
                            if not await reader.read(1 << 16):
                                break
                    if kind == b"G":
                        writer.write(b"x")
        writer.close()

    await asyncio.gather(*(hold(KINDS[number % len(KINDS)]) for number in range(count)))
    return time.monotonic() - began


@contextlib.contextmanager
def server(step_ms: float, directory: str) -> Iterator[tuple[int, psutil.Process]]:
    save(Path(directory))
    command = [sys.executable, "-m", "nanovllm.cli", "serve", "x", "--port", "0"]
    command += ["--load-format", "synthetic", "--step-ms", str(step_ms), "--vocab-size", "250"]
    command += ["--tokenizer", directory, "--max-model-len", "8192"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while (found := re.search(r"ready after .*:(\d+)/v1", process.stderr.readline())) is None:
            assert process.poll() is None
        yield int(found[1]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3


class Seen(NamedTuple):
    """Seconds of a phase: between events, and of probes."""

    intervals: list[float]
    probes: list[float]

    def __str__(self) -> str:
        return (
            f"between events p50 {statistics.median(self.intervals) * 1e3:.1f}, p99 "
            f"{percentile(self.intervals, 0.99):.1f} ms; /health p50 "
            f"{statistics.median(self.probes) * 1e3:.1f}, p99 {percentile(self.probes, 0.99):.1f} "
            f"ms ({len(self.intervals)} events, {len(self.probes)} probes)"
        )


Marks = list[dict[str, tuple[float, float]]]  # when each phase of each round began and ended


def report_rounds(what: str, rounds: list[dict[str, Seen]]) -> None:
    for phase in PHASES:
        parts = [seen[phase] for seen in rounds]
        intervals, probes = (list(chain(*each)) for each in zip(*parts, strict=True))
        print(f"{what}, {phase}: {Seen(intervals, probes)}")
    p99s = [
        {name: percentile(one.intervals, 0.99) for name, one in seen.items()} for seen in rounds
    ]
    for phase, base in (("here", "alone"), ("elsewhere", "alone"), ("here", "elsewhere")):
        ratios = sorted(one[phase] / one[base] for one in p99s)
        print(
            f"{what}: p99 {phase} by {base}, round by round: median "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


async def in_turns(
    num_rounds: int, alone_s: float, attack: Callable[[str], Awaitable[None]]
) -> Marks:
    """attack: "here", or "elsewhere"."""
    marks: Marks = []
    for number in range(num_rounds):
        marks.append({})
        for phase in PHASES[number % 3 :] + PHASES[: number % 3]:
            began = time.monotonic()
            await (asyncio.sleep(alone_s) if phase == "alone" else attack(phase))
            marks[-1][phase] = began, time.monotonic()
    return marks


async def run(arguments: argparse.Namespace) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with (
        tempfile.TemporaryDirectory() as directory,
        server(arguments.step_ms, directory) as (port, process),
        server(arguments.step_ms, directory) as (other_port, _),
    ):
        watcher = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.hostile", "--watch", str(port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 30,
        )
        assert watcher.stdout is not None
        await watcher.stdout.readline()
        made = bodies()  # before anything is timed: it takes a while, on a core that streams need
        ports = {"here": port, "elsewhere": other_port}
        memory, descriptors = [process.memory_info().rss], [process.num_fds()]
        times: list[tuple[str, float]] = []
        closed_s: list[float] = []

        async def attack_by_bodies(where: str) -> None:
            until = time.monotonic() + arguments.phase_s
            while time.monotonic() < until:
                sent = await send_bodies(ports[where], made)
                times.extend(sent if where == "here" else [])
            memory.append(process.memory_info().rss)

        async def attack_by_connections(where: str) -> None:
            took_s = await hold_connections(ports[where], arguments.connections)
            if where == "here":
                closed_s.append(took_s)
                await asyncio.sleep(SETTLE_S)
                descriptors.append(process.num_fds())

        await asyncio.sleep(3.0)
        by_bodies = await in_turns(arguments.rounds, arguments.phase_s, attack_by_bodies)
        print("opening connections", file=sys.stderr)
        by_connections = await in_turns(arguments.connection_rounds, ALONE_S, attack_by_connections)
        print("reading what was seen", file=sys.stderr)
        output, _ = await watcher.communicate(b"")  # the end of its input
    intervals, probes, num_failed = json.loads(output)

    def within(start: float, end: float) -> Seen:
        parts = ([s for at, s in all_of if start <= at < end] for all_of in (intervals, probes))
        return Seen(*parts)

    def seen(marks: Marks, most_s: float = float("inf")) -> list[dict[str, Seen]]:
        """most_s: of each phase, only so much."""
        return [
            {name: within(start, min(end, start + most_s)) for name, (start, end) in one.items()}
            for one in marks
        ]

    if by_bodies:
        report_rounds("bodies", seen(by_bodies))
        slowest = sorted(times, key=lambda one: -one[1])[:3]
        print(f"{len(times)} bodies; the slowest: ", end="")
        print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest))
        print("memory before, and after each attack (MB): ", end="")
        print(", ".join(f"{one / 1e6:.0f}" for one in memory))
    if by_connections:
        report_rounds("connections", seen(by_connections))
        report_rounds("connections, as they open", seen(by_connections, OPENING_S))
        print(f"{arguments.connections} of them: all closed after ", end="")
        print(", ".join(f"{one:.1f}" for one in closed_s), end=" s; descriptors ")
        print(f"{descriptors[0]} before, {descriptors[1:]} after")
    print(f"{num_failed} streams failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--phase-s", type=float, default=5.0)
    parser.add_argument("--connection-rounds", type=int, default=3)
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(run(arguments) if arguments.watch is None else watch(arguments.watch))


if __name__ == "__main__":
    main()
