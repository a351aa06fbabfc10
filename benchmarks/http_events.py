"""What an event costs a server's process, by kind, and how long plain streams wait for the others.

    python benchmarks/http_events.py [--beside DIR] [--rounds 3]

Before a server is a core that computes nothing (this file, as a program): each step it sends every
request its next token, the same in all rounds, and remembers when. *Cost*: processor time of the
server's process, by the difference of streams of few tokens and of many, so requests are told from
events. *Wait*: from the core's sending to the client's reading, of plain streams alone, beside
others, and beside as many plain ones, which arrive by Poisson. --beside: another checkout's
server takes turns with this one's.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvloop
import zmq
from http_load import percentile
from mixed import KINDS, QUESTION, request_of, run_streams

from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import (
    PULSE_INTERVAL_S,
    Abort,
    AddRequest,
    Finished,
    Hello,
    Outputs,
    Pulse,
    Started,
    ToCore,
    Welcome,
)
from nanovllm.protocol.plan import TokenLogprobs, WorkerInfo

TEXT = "The city that I like best lies by the sea, and its streets are narrow and full of people. "
CALL = '{"name": "Lisbon", "country": "Portugal", "inhabitants": 545796, "sights": ["%s"]}'
FEW, MANY = 8, 136
UNMERGED_MS = 4.0  # between steps, in which a server gets on with the streams of `costs`
NUM_TOP = 5
TIMEOUT_S, START_S = 120.0, 1.0
Read = dict[str, list[tuple[float, int]]]  # by request: (time, characters so far)


# ---- the core, as a program: its address on the command line, "end" on standard input ends it


class Row:
    """A request under way. tenant: as its client calls it."""

    def __init__(self, request: AddRequest, token_ids: list[int]) -> None:
        self.number = request.number
        self.tenant = request.tenant or ""
        self.token_ids = token_ids
        self.most = request.params.max_tokens or len(token_ids)
        self.has_logprobs = request.params.logprobs is not None
        self.sent_at: list[float] = []


class ScriptedCore:
    """Answers at most one client process after the other: a server's frontends."""

    def __init__(self, address: str, step_s: float, tokenizer_name: str) -> None:
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.set(zmq.SNDHWM, 0)
        self._router.bind(address)
        self._step_s = step_s
        tokenizer = Tokenizer.load(tokenizer_name)
        self._plain = tokenizer.encode(TEXT * 40, add_special_tokens=False)
        self._call = tokenizer.encode(CALL % (TEXT * 40), add_special_tokens=False)
        self._welcome = Welcome(
            client_id=0,
            epoch="scripted",
            model=tokenizer_name,
            served_model_name="smollm2",
            block_size=16,
            max_num_seqs=1024,
            worker=WorkerInfo(
                device="none",
                dtype="none",
                attention_backend="none",
                architecture="none",
                num_blocks=1000,
                max_model_len=8192,
                vocab_size=49_152,
                eos_token_ids=[0],
            ),
        )
        rng = random.Random(0)
        self._logprobs = [
            [rng.randrange(300, 40_000) for _ in range(NUM_TOP - 1)] for _ in range(997)
        ]
        self._rows: dict[bytes, dict[int, Row]] = {}
        self.sent_at: dict[str, list[float]] = {}
        self.ends = list(accumulate(len(tokenizer.token_text(one)) for one in self._plain))

    def run(self) -> None:
        decode = msgspec.msgpack.Decoder(ToCore).decode
        encode = msgspec.msgpack.Encoder().encode
        poller, step, due = zmq.Poller(), 0, time.monotonic()
        pulse_at = 0.0
        poller.register(self._router, zmq.POLLIN)
        poller.register(0, zmq.POLLIN)
        while True:
            if not any(self._rows.values()):
                due = max(due, time.monotonic() + 0.01)
            wait_ms = max(0.0, due - time.monotonic()) * 1e3
            for source, _ in poller.poll(int(wait_ms)):
                if source == 0:
                    return
            while self._router.get(zmq.EVENTS) & zmq.POLLIN:
                identity, frame = self._router.recv_multipart()
                self._take(identity, decode(frame), encode)
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._step_s, time.monotonic())
            step += 1
            if time.monotonic() > pulse_at:
                pulse_at = time.monotonic() + PULSE_INTERVAL_S
                for identity in self._rows:
                    self._router.send_multipart([identity, encode(Pulse())])
            for identity, rows in self._rows.items():
                if rows:
                    self._router.send_multipart([identity, encode(self._outputs(rows, step))])

    def _take(self, identity: bytes, message: ToCore, encode: Any) -> None:
        rows = self._rows.setdefault(identity, {})
        match message:
            case Hello():
                self._router.send_multipart([identity, encode(self._welcome)])
            case AddRequest():
                is_call = message.params.structured_outputs is not None
                row = Row(message, self._call if is_call else self._plain)
                rows[message.number] = row
                self.sent_at[row.tenant] = row.sent_at
            case Abort(numbers):
                for number in numbers:
                    rows.pop(number, None)
            case _:
                pass

    def _outputs(self, rows: dict[int, Row], step: int) -> Outputs:
        outputs, now = Outputs(), time.monotonic()
        for row in list(rows.values()):
            place = len(row.sent_at)
            if place == 0:
                outputs.started.append(Started(row.number, 0, 0.1))
            token_id = row.token_ids[place]
            if row.has_logprobs:
                others = self._logprobs[(step + row.number) % len(self._logprobs)]
                first = -0.1 - 0.001 * (step % 100)
                outputs.logprobs[len(outputs.numbers)] = TokenLogprobs(
                    token_id,
                    first,
                    1,
                    [token_id, *others],
                    [first - 0.731 * i for i in range(NUM_TOP)],
                )
            outputs.numbers.append(row.number)
            outputs.token_ids.append(token_id)
            row.sent_at.append(now)
            if len(row.sent_at) == row.most:
                outputs.finished.append(Finished(row.number, "length", None, 0))
                del rows[row.number]
        return outputs


def core_main(address: str, step_ms: float, tokenizer_name: str) -> None:
    core = ScriptedCore(address, step_ms / 1e3, tokenizer_name)
    print("ready", flush=True)
    core.run()
    sys.stdout.buffer.write(msgspec.msgpack.encode((core.sent_at, core.ends)))


# ---- the clients, processes of their own


class Asked(NamedTuple):
    """name: of the request; at: seconds from the beginning."""

    name: str
    kind: str
    at: float
    max_tokens: int


async def send_all(port: int, begin: float, asked: list[Asked]) -> Read:
    """When what of each plain request was read."""
    url = f"http://127.0.0.1:{port}"
    requests = [
        (
            begin + one.at,
            request_of(
                url,
                messages=[{"role": "user", "content": f"{one.name}: {QUESTION}"}],
                max_tokens=one.max_tokens,
                user=one.name,
                **KINDS[one.kind],
            ),
        )
        for one in asked
    ]
    async with asyncio.timeout(TIMEOUT_S):
        streams = await run_streams(url, requests)
    found: Read = {}
    for one, stream in zip(asked, streams, strict=True):
        count, times = 0, []
        for at, event in stream.events():
            added = sum(len(choice["delta"].get("content") or "") for choice in event["choices"])
            count += added
            times += [(at, count)] * bool(added)
        if one.kind == "plain":
            found[one.name] = times
    return found


def send(port: int, begin: float, asked: list[Asked]) -> Read:
    return uvloop.run(send_all(port, begin, asked))


# ---- what measures


class Server(NamedTuple):
    port: int
    pid: int
    core: "subprocess.Popen[bytes]"


@contextmanager
def served(directory: Path, arguments: argparse.Namespace, step_ms: float) -> Iterator[Server]:
    """A server of the package in `directory`, and its core."""
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as place:
        address = f"ipc://{place}/core.sock"
        command = [sys.executable, __file__, "--as-core", address, "--step-ms", str(step_ms)]
        command += ["--tokenizer", arguments.tokenizer]
        core = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert core.stdout is not None and core.stdout.readline() == b"ready\n"
        command = [sys.executable, "-m", "nanovllm.cli", "serve", "--port", "0"]
        command += ["--connect", address, "--frontends", str(arguments.frontends)]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=directory)
        assert server.stderr is not None
        try:
            while b"is ready after" not in (line := server.stderr.readline()):
                assert line, "the server ended"
            yield Server(int(line.split(b":")[-1].split(b"/")[0]), server.pid, core)
        finally:
            server.terminate()
            server.wait(20)
            core.kill()
            core.wait()


def cpu_of(server: int) -> tuple[float, float]:
    """Seconds of the processes that speak HTTP: their loops' threads, and all others."""
    loops = others = 0.0
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    pids = [one for one in children if b"server.run" in Path(f"/proc/{one}/cmdline").read_bytes()]
    for pid in pids or [str(server)]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            loops += seconds * (task.name == pid)
            others += seconds * (task.name != pid)
    return loops, others


def load(server: Server, *groups: list[Asked]) -> Read:
    """Each group is asked by a process of its own; all begin together."""
    begin, found = time.monotonic() + START_S, Read()
    with ProcessPoolExecutor(len(groups)) as pool:
        for read in pool.map(partial(send, server.port, begin), groups):
            found |= read
    return found


def costs(server: Server, kind: str, streams: int, round_: int) -> tuple[float, float, float]:
    """Microseconds: the loop's of an event and of a request, and other threads' of a request."""
    used = []
    for count in (FEW, MANY):
        asked = [
            Asked(f"{kind}-{round_}-{count}-{index}", kind, 0.0, count) for index in range(streams)
        ]
        before = cpu_of(server.pid)
        load(server, asked)
        after = cpu_of(server.pid)
        used.append([(b - a) / streams * 1e6 for a, b in zip(before, after, strict=True)])
    event = (used[1][0] - used[0][0]) / (MANY - FEW)
    aside = (used[1][1] - used[0][1]) / (MANY - FEW)
    return event, used[0][0] - FEW * event, used[0][1] - FEW * aside


def arrivals(kinds: list[str], arguments: argparse.Namespace) -> list[list[Asked]]:
    """Of each kind, by Poisson."""
    groups: list[list[Asked]] = []
    for place, kind in enumerate(kinds):
        rng, at, asked = random.Random(place), 0.0, list[Asked]()
        while (at := at + rng.expovariate(arguments.rate)) < arguments.seconds:
            asked.append(Asked(f"{place}-{kind}-{len(asked)}", kind, at, arguments.tokens))
        groups.append(asked)
    return groups


def measure_costs(arguments: argparse.Namespace, directories: list[Path]) -> None:
    for kind in KINDS:
        best: dict[Path, list[tuple[float, float, float]]] = {one: [] for one in directories}
        for _ in range(arguments.rounds):
            for directory in directories:
                with served(directory, arguments, UNMERGED_MS) as server:
                    costs(server, kind, 8, -1)
                    found = [costs(server, kind, arguments.streams, one) for one in range(2)]
                    best[directory] += found
        for directory in directories:
            event, request, aside = (min(one) for one in zip(*best[directory], strict=True))
            print(
                f"{directory.name:8} {kind:10} loop: {event:6.1f} µs an event, {request:7.0f} µs a "
                f"request; other threads {aside:6.0f} µs a request",
                flush=True,
            )


def measure_waits(arguments: argparse.Namespace, directories: list[Path]) -> None:
    mixes = {"alone": ["plain"], "mixed": list(KINDS), "as many": ["plain"] * len(KINDS)}
    for _ in range(arguments.rounds):
        for name, kinds in mixes.items():
            for directory in directories:
                with served(directory, arguments, arguments.step_ms) as server:
                    load(server, [Asked("warm", kind, 0.0, 8) for kind in KINDS])
                    groups = arrivals(kinds, arguments)
                    read = load(server, *groups)
                    sent = server.core.communicate(b"end", timeout=20)[0]
                    sent_at, ends = msgspec.msgpack.decode(
                        sent, type=tuple[dict[str, list[float]], list[int]]
                    )
                late, between = [], []
                for one in groups[0]:
                    last, done = 0.0, 0
                    for at, characters in read[one.name]:
                        count = bisect_right(ends, characters)
                        late += [at - moment for moment in sent_at[one.name][done:count]]
                        between += [at - last] * bool(last)
                        last, done = at, count
                p = [percentile(late, one) * 1e3 for one in (50, 90, 99)]
                b = [percentile(between, one) * 1e3 for one in (50, 99)]
                print(
                    f"{directory.name:8} {name:8} plain: sent → read p50 {p[0]:.2f} p90 {p[1]:.2f} "
                    f"p99 {p[2]:.2f} ms; between p50 {b[0]:.2f} p99 {b[1]:.2f} ms",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--as-core", help=argparse.SUPPRESS)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--what", default="costs,waits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=1.0, help="of the waits")
    parser.add_argument("--tokenizer", default="smollm2", help="a model, or its directory")
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of each kind")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.as_core:
        return core_main(arguments.as_core, arguments.step_ms, arguments.tokenizer)
    directories = [Path(__file__).parents[1]]
    if arguments.beside:
        directories.insert(0, arguments.beside.resolve())
    if "costs" in arguments.what:
        measure_costs(arguments, directories)
    if "waits" in arguments.what:
        measure_waits(arguments, directories)


if __name__ == "__main__":
    main()
