"""What processes that die or stand still cost the others: nothing but a pause.

    python benchmarks/faults.py

Client processes stream from one synthetic core, owned by this process; each stream's ids are
compared with those of a run in which nothing happened. The core is killed again and again; clients
are killed, until 1,000 requests have lost theirs; the core is stopped (SIGSTOP) for some seconds;
its loop is stuck in a step; and it works on a machine with far too much to do.
Targets: every stream ends with the same ids; the longest pause is at most a core start + 1 s; other
clients' streams do not notice killed ones, and nothing of these is left in the core, nor any memory
or descriptor of theirs; clients report a core that stands still within 2 s, and no other.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.protocol.messages import CoreStatus

ROOT = Path(__file__).resolve().parent.parent
ENOUGH_S = 120.0  # for a client to finish, whatever happens
MAX_GROWTH_BYTES = 4 * 2**20
STALLED = "stalled"  # what a client says that sees a stall


@dataclass
class Load:
    """`num_clients` processes with `num_streams` streams in all; every kind of request in turn."""

    num_clients: int = 8
    num_streams: int = 64
    num_tokens: int = 600
    step_ms: float = 10.0

    def kinds(self) -> list[dict[str, Any]]:
        """Parameters of the streams of one client."""
        some: dict[str, Any] = {"max_tokens": self.num_tokens, "ignore_eos": True}
        kinds = [
            {**some, "temperature": 0.0, "output_kind": "delta"},
            {**some, "seed": 11, "output_kind": "delta"},
            {**some, "seed": 12, "n": 2, "output_kind": "cumulative"},
            {**some, "seed": 13, "logprobs": 1, "output_kind": "final_only"},
        ]
        return [kinds[index % 4] for index in range(self.num_streams // self.num_clients)]


@dataclass
class Run:
    """What the clients said (None: a client that was killed), and what was done to them."""

    clients: list[dict[str, Any] | None] = field(default_factory=list)
    num_free_blocks_missing: int = 0
    seconds: float = 0.0
    status: CoreStatus | None = None

    @property
    def longest_pause_s(self) -> float:
        return max(client["pause_s"] for client in self.clients if client is not None)

    def stalls_s(self, since: float | None = None) -> list[float]:
        """When each client reported a stall, if it did: after `since`, or after its own start."""
        return [
            client["stalled_at"] - (client["started_at"] if since is None else since)
            for client in self.clients
            if client is not None and client["stalled_at"] is not None
        ]


# ---- a client process


async def stream(
    llm: AsyncLLM, prompt: list[int], params: SamplingParams
) -> tuple[list[list[int]], int, float]:
    """All ids by output, the number of log-probabilities, and the longest wait between outputs."""
    ids: list[list[int]] = [[] for _ in range(params.n)]
    num_logprobs, pause_s, last = 0, 0.0, 0.0
    async for output in llm.generate(prompt, params):
        now = time.monotonic()
        if last and params.output_kind != "final_only":
            pause_s = max(pause_s, now - last)
        last = now
        for one in output.outputs:
            if params.output_kind == "delta":
                ids[one.index] += one.token_ids
            else:
                ids[one.index] = one.token_ids
            num_logprobs = len(one.logprobs or ())
    return ids, num_logprobs, pause_s


async def client(address: str, load: Load) -> dict[str, Any]:
    """Stream everything at once when told to, and note whether a stall was reported, and how
    soon; that is also said at once."""
    llm = await AsyncLLM.connect(address, skip_tokenizer_init=True, connect_timeout_s=ENOUGH_S)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    stalled_at: list[float] = []

    async def watch() -> None:
        while not llm.is_stalled:
            await asyncio.sleep(0.05)
        stalled_at.append(time.monotonic())
        print(STALLED, flush=True)

    started_at = time.monotonic()
    watching = asyncio.create_task(watch())
    streams = [
        stream(llm, [1 + index, 5, 6, 7], SamplingParams(**kind))
        for index, kind in enumerate(load.kinds())
    ]
    done = await asyncio.gather(*streams)
    watching.cancel()
    await llm.close()
    return {
        "ids": [ids for ids, _, _ in done],
        "num_logprobs": [num_logprobs for _, num_logprobs, _ in done],
        "pause_s": max(pause_s for _, _, pause_s in done),
        "started_at": started_at,
        "stalled_at": stalled_at[0] if stalled_at else None,
    }


# ---- one run

Fault = Callable[[AsyncLLM, "list[asyncio.subprocess.Process]"], Awaitable[object]]


async def run(llm: AsyncLLM, load: Load, fault: Fault | None = None) -> Run:
    """Start the clients, let `fault` happen while they stream, and gather what they say."""
    command = [sys.executable, __file__, "--client", llm.address]
    command += ["--load", json.dumps(vars(load))]
    clients = [
        await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=1 << 26,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(load.num_clients)
    ]
    started = time.monotonic()
    try:
        async with asyncio.timeout(ENOUGH_S):
            await asyncio.gather(*(line_of(one) for one in clients))
            for one in clients:  # together, however long each took to start
                assert one.stdin is not None
                one.stdin.write(b"\n")
                one.stdin.close()
            if fault is not None:
                await fault(llm, clients)
            lines = await asyncio.gather(*(report_of(one) for one in clients))
    finally:
        for one in clients:
            with suppress(ProcessLookupError):
                one.kill()
        await asyncio.gather(*(one.wait() for one in clients))
    status = await status_at_rest(llm)
    return Run(
        [json.loads(line) if line else None for line in lines],
        status.num_blocks - status.num_free_blocks,
        time.monotonic() - started,
        status,
    )


async def line_of(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


async def report_of(process: asyncio.subprocess.Process) -> bytes:
    """Its last line; nothing if it was killed."""
    while (line := await line_of(process)) == f"{STALLED}\n".encode():
        pass
    return line


async def status_at_rest(llm: AsyncLLM) -> CoreStatus:
    """Once the core has noticed who is gone, or should have: it says so once a second."""
    give_up_at = time.monotonic() + ENOUGH_S / 2
    while True:
        status = await llm.stats()
        is_at_rest = status.num_clients == 1 and status.num_free_blocks == status.num_blocks
        if is_at_rest or time.monotonic() > give_up_at:
            return status
        await asyncio.sleep(0.1)


def core_pid(llm: AsyncLLM) -> int:
    """The owned core of this moment."""
    return llm._handles[0].process.pid


def kill_core(times: int, *, seed: int = 0) -> Fault:
    """SIGKILL at random moments, each some tenths of a second after the core is back."""
    rng = random.Random(seed)

    async def fault(llm: AsyncLLM, clients: list[asyncio.subprocess.Process]) -> None:
        for _ in range(times):
            await asyncio.sleep(rng.uniform(0.2, 0.9))
            pid = core_pid(llm)
            os.kill(pid, signal.SIGKILL)
            while core_pid(llm) == pid or llm.is_stalled:
                await asyncio.sleep(0.02)

    return fault


def kill_clients(count: int) -> Fault:
    async def fault(llm: AsyncLLM, clients: list[asyncio.subprocess.Process]) -> None:
        await asyncio.sleep(0.5)
        for one in clients[:count]:
            one.kill()

    return fault


def stop_core(seconds: float) -> tuple[Fault, list[float]]:
    """Also returns where the moment of stopping is put, on the monotonic clock."""
    stopped_at: list[float] = []

    async def fault(llm: AsyncLLM, clients: list[asyncio.subprocess.Process]) -> None:
        await asyncio.sleep(0.5)
        pid = core_pid(llm)
        stopped_at.append(time.monotonic())
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    return fault, stopped_at


def same_ids(undisturbed: Run, disturbed: Run) -> int:
    """How many streams of surviving clients ended as in the undisturbed run; all others raise."""
    count = 0
    for before, after in zip(undisturbed.clients, disturbed.clients, strict=True):
        assert before is not None
        if after is not None:
            assert after["ids"] == before["ids"], "ids differ"
            assert after["num_logprobs"] == before["num_logprobs"], "log-probabilities differ"
            count += len(after["ids"])
    return count


def owner(load: Load, **settings: Any) -> AsyncLLM:
    """The engine whose core the clients attach to."""
    return AsyncLLM("synthetic", load_format="synthetic", step_ms=load.step_ms, **settings)


@contextmanager
def busy_machine(per_cpu: int = 2) -> Iterator[None]:
    """So many processes beside ours that never rest."""
    num_busy = per_cpu * (os.cpu_count() or 1)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()


def footprint(pid: int) -> tuple[int, int]:
    """Resident bytes and open file descriptors of a process."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024, len(os.listdir(f"/proc/{pid}/fd"))


def check_nothing_left(found: Run) -> None:
    """No request, block or client but the owner, after everybody has gone or was killed."""
    status = found.status
    assert status is not None and status.num_free_blocks == status.num_blocks, status
    left = (status.num_running, status.num_waiting, status.num_paused, status.num_queued)
    assert left == (0, 0, 0, 0) and status.num_clients == 1, status


async def report_leaks(load: Load, *, num_killed_clients: int, num_requests: int) -> None:
    """Kill clients round after round until so many requests have lost theirs."""
    per_round = load.num_streams // load.num_clients * num_killed_clients
    rounds = -(-num_requests // per_round)
    async with owner(load) as llm:
        undisturbed = await run(llm, load)
        pid, num_equal, pauses = core_pid(llm), 0, []
        first = (0, 0)
        for number in range(rounds):
            lonely = await run(llm, load, kill_clients(num_killed_clients))
            assert sum(client is None for client in lonely.clients) == num_killed_clients
            num_equal += same_ids(undisturbed, lonely)
            pauses.append(lonely.longest_pause_s)
            check_nothing_left(lonely)
            first = first if number else footprint(pid)
        last = footprint(pid)
        assert core_pid(llm) == pid
    print(
        f"{rounds} times {num_killed_clients} of {load.num_clients} clients killed, "
        f"{rounds * per_round} requests with them: {num_equal} streams of the others equal, "
        f"longest pause {max(pauses):.2f} s (undisturbed {undisturbed.longest_pause_s:.2f}); "
        f"no request, row, block or client left; descriptors {first[1]} → {last[1]}, memory "
        f"{(last[0] - first[0]) / 2**20:+.1f} MiB since the first time"
    )
    assert last[1] <= first[1] and last[0] - first[0] < MAX_GROWTH_BYTES


async def report_stalls(load: Load, *, stop_s: float) -> None:
    async with owner(load) as llm:
        undisturbed = await run(llm, load)
        fault, stopped_at = stop_core(stop_s)
        stopped = await run(llm, load, fault)
        stalls = stopped.stalls_s(stopped_at[0])
        print(
            f"core stopped for {stop_s:g} s: {same_ids(undisturbed, stopped)} streams equal, stall "
            f"reported by {len(stalls)} of {load.num_clients} clients after {_range(stalls)} s"
        )
        with busy_machine():
            loaded = await run(llm, load)
            num_false = len(loaded.stalls_s())
            fault, stopped_at = stop_core(stop_s)
            stopped = await run(llm, load, fault)
        stalls = stopped.stalls_s(stopped_at[0])
        print(
            f"beside {2 * (os.cpu_count() or 1)} busy processes: {num_false} clients saw a stall "
            f"where there was none; of {stop_s:g} s, {len(stalls)} did, after {_range(stalls)} s"
        )
    async with owner(Load(step_ms=3000.0)) as llm:
        stuck = await run(llm, Load(num_tokens=2, step_ms=3000.0))
        print(f"loop stuck in a step of 3 s: reported after {_range(stuck.stalls_s())} s")


def _range(seconds: list[float]) -> str:
    return f"{min(seconds, default=0):.2f} to {max(seconds, default=0):.2f}"


async def report_kills(load: Load, *, num_kills: int) -> None:
    started = time.monotonic()
    async with owner(load) as llm:
        start_s = time.monotonic() - started
        undisturbed = await run(llm, load)
        print(
            f"undisturbed: {load.num_streams} streams, {load.num_clients} clients, core start "
            f"{start_s:.2f} s, longest pause {undisturbed.longest_pause_s:.2f} s"
        )
        killed = await run(llm, load, kill_core(num_kills))
        print(
            f"core killed {num_kills} times: {same_ids(undisturbed, killed)} streams equal, "
            f"longest pause {killed.longest_pause_s:.2f} s (target {start_s + 1:.2f} s)"
        )
        assert killed.longest_pause_s <= start_s + 1


async def report(load: Load, arguments: argparse.Namespace) -> None:
    await report_kills(load, num_kills=arguments.kills)
    await report_leaks(
        Load(num_streams=42 * load.num_clients, num_tokens=150),
        num_killed_clients=arguments.killed_clients,
        num_requests=arguments.killed_requests,
    )
    await report_stalls(load, stop_s=arguments.stop_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--killed-clients", type=int, default=3)
    parser.add_argument("--killed-requests", type=int, default=1000, help="until so many were lost")
    parser.add_argument("--stop-s", type=float, default=5.0)
    parser.add_argument("--client", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load = Load(**arguments.load)
    if arguments.client:
        print(json.dumps(asyncio.run(client(arguments.client, load))), flush=True)
        return
    asyncio.run(report(load, arguments))


if __name__ == "__main__":
    main()
