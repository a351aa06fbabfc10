"""A thousand HTTP clients that come and vanish at random leave nothing behind.

    python benchmarks/vanishing.py [--clients 1000]

The server runs in this process, on the real core with `load_format="synthetic"`; clients run in
others, and some of those are killed with all their connections. Each client sends a request, or a
part of one, reads for a while, and is then gone: in order, by a reset, or with its process. At the
end the server's tasks and descriptors, and the core's requests, blocks and descriptors, must be as
before, and nothing may have been logged as an error.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time

import uvloop

from nanovllm.config import EngineConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.core_process import start_core
from nanovllm.frontend.server.run import bind, serve
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.server.settings import ServerSettings

SETTLE_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 240.0
CLIENTS_PER_PROCESS = 125
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


# ---- the clients

JSON_HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"


def request_of(rng: random.Random) -> bytes:
    """Any kind that generates: long or short, whole or streamed, one or several."""
    stream = rng.random() < 0.7
    prompt = [rng.randrange(1, 30_000) for _ in range(rng.choice([3, 40, 700]))]
    body: dict[str, object] = {"max_tokens": rng.choice([1, 20, 3000]), "ignore_eos": True}
    body |= {"stream": stream, "n": rng.choice([1, 1, 3])}
    body["prompt"] = prompt if rng.random() < 0.7 else [prompt, prompt[:2]]
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\n{JSON_HEAD}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def visit(rng: random.Random, port: int) -> None:
    """One client's life."""
    await asyncio.sleep(rng.random() * 2.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for _ in range(rng.choice([1, 1, 2])):
            request = request_of(rng)
            is_whole = rng.random() < 0.85
            writer.write(request if is_whole else request[: rng.randrange(len(request))])
            if says_no_more := rng.random() < 0.1:
                writer.write_eof()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() * 1.5):
                    while await reader.read(1 << 16):
                        pass
            if says_no_more:
                break
    if rng.random() < 0.4:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    if rng.random() < 0.8:
        writer.close()
    else:
        STAYING.append(writer)  # until this process ends, or is killed


STAYING: list[asyncio.StreamWriter] = []


async def crowd(seed: int, port: int, count: int) -> None:
    rng = random.Random(seed)
    visits = [visit(random.Random(rng.random()), port) for _ in range(count)]
    results = await asyncio.gather(*visits, return_exceptions=True)
    failures = [one for one in results if isinstance(one, BaseException)]
    print(
        json.dumps({"visits": count, "failures": [repr(one) for one in failures[:3]]}), flush=True
    )
    await asyncio.sleep(60)  # for those that stay: somebody will kill this process


# ---- the server


class Counts(dict[str, int]):
    """What must be as before, by name."""

    @classmethod
    async def of(cls, serving: Serving, llm: AsyncLLM, core_pid: int) -> "Counts":
        status = await llm.stats()
        return cls(
            {
                "requests under way": serving.num_requests,
                "live ids": len(serving._live),
                "asyncio tasks": len(asyncio.all_tasks()),
                "descriptors of the server": num_descriptors(os.getpid()),
                "descriptors of the core": num_descriptors(core_pid),
                "running in the core": status.num_running,
                "waiting in the core": status.num_waiting,
                "blocks in use": status.num_blocks - status.num_free_blocks,
                "clients of the core": status.num_clients,
            }
        )


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def settled(serving: Serving, llm: AsyncLLM, core_pid: int, before: Counts) -> Counts:
    """The counts, once they are as before, or when `SETTLE_TIMEOUT_S` have passed."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        now = await Counts.of(serving, llm, core_pid)
        if now == before or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.2)


async def send_crowds(port: int, num_clients: int, seed: int) -> int:
    """Returns how many visits could not be made at all."""
    programs = []
    for first in range(0, num_clients, CLIENTS_PER_PROCESS):
        count = min(CLIENTS_PER_PROCESS, num_clients - first)
        command = [sys.executable, __file__, "crowd", str(seed + first), str(port), str(count)]
        programs.append(await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE))
    num_failures = 0
    try:
        # Every fourth of them dies in the middle of its visits.
        for program in programs[1::4]:
            await asyncio.sleep(1.0)
            program.send_signal(signal.SIGKILL)
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            for index, program in enumerate(programs):
                assert program.stdout is not None
                line = await program.stdout.readline()
                if index % 4 != 1:
                    report = json.loads(line)
                    num_failures += len(report["failures"])
                    for text in report["failures"]:
                        print(f"a visit failed: {text}")
    finally:
        for program in programs:
            if program.returncode is None:
                program.kill()
            await program.communicate()
    return num_failures


async def run(num_clients: int, seed: int) -> int:
    config = EngineConfig.from_kwargs(
        model="synthetic", load_format="synthetic", step_ms=2.0, max_num_seqs=64
    )
    handle = start_core(config)
    settings = ServerSettings(port=0, max_requests=4 * num_clients)

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        return await AsyncLLM.connect(
            handle.address, skip_tokenizer_init=True, on_progress=on_progress
        )

    listener = bind(settings, shared=False)
    ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    server = asyncio.create_task(
        serve(settings, open_llm, listener, ready.set_result, lifeline=stop)
    )
    try:
        serving = await asyncio.wait_for(ready, SETTLE_TIMEOUT_S)
        port = listener.getsockname()[1]
        await send_crowds(port, 1, seed - 1)  # whatever is made once is there from here on
        await asyncio.sleep(1.5)  # the core's counts are up to a second old
        before = await Counts.of(serving, serving.llm, handle.process.pid)
        assert before["blocks in use"] == before["running in the core"] == 0, before
        started = time.monotonic()
        num_failures = await send_crowds(port, num_clients, seed)
        took_s = time.monotonic() - started
        await asyncio.sleep(1.5)
        after = await settled(serving, serving.llm, handle.process.pid, before)
    finally:
        stop.set()
        await asyncio.wait_for(server, SETTLE_TIMEOUT_S)
        await asyncio.to_thread(handle.close)
    print(f"{num_clients} clients in {took_s:.1f} s, {num_failures} of them failed to come")
    for name, count in after.items():
        print(f"{name:>26}: {before[name]} before, {count} after")
    left_behind = after != before or num_failures > 0
    print("something was left behind" if left_behind else "nothing was left behind")
    return int(left_behind)


def main() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, limit), limit))
    if sys.argv[1:2] == ["crowd"]:
        uvloop.run(crowd(*map(int, sys.argv[2:5])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    return uvloop.run(run(arguments.clients, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
