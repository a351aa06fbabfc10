"""What processes that die or stand still cost the others: nothing but a pause.

    python benchmarks/faults.py
    python benchmarks/faults.py --ranks 1x2 --times 20        # ranks of one core; here two stages
    python benchmarks/faults.py --ranks 2 --times 20 --ray    # on two local nodes of a Ray cluster
    python benchmarks/faults.py --ranks 2 --ray --faults vanish       # as root: one is out of reach

Client processes stream from one synthetic core, owned by this process; each stream's ids are
compared with those of a run in which nothing happened. The core is killed again and again; clients
are killed, until 1,000 requests have lost theirs; the core is stopped (SIGSTOP) for some seconds;
its loop is stuck in a step; and it works on a machine with far too much to do.
Targets: every stream ends with the same ids; the longest pause is at most a core start + 1 s; other
clients' streams do not notice killed ones, and nothing of these is left in the core, nor any memory
or descriptor of theirs; clients report a core that stands still within 2 s, and no other.

With --ranks, a rank of one core is killed, stopped or made to raise instead, at a random moment of
its start, in its warm-up or amid a step, so many times each, while streams run or wait; and killed
while nobody asks for anything. (With --ray its actor and a node are killed as well, or a node, in a
network namespace of its own, does not answer any more.) Targets: the frontend's log names rank and
cause within 2 s; a rank that is stopped is named and waited for, and nothing is killed; all streams
end with the ids of an undisturbed run; no process, directory, socket or shared memory is left.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.protocol.messages import CoreStatus

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # tests import this file as one of a package
from tensor_parallel import DENSE, SMALLER, Arrivals, Ranks, prompts, stream_all  # noqa: E402

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


# ---- ranks of one core

SEAT = "seat"  # a resource of which each node of the Ray cluster has as many as it takes ranks
FAILING_RANK = ROOT / "benchmarks" / "failing_rank"
REPORT_S = 60.0  # for anything that a fault is to bring about
NUM_STREAMS = 6
START_SHARE = 0.5  # of the start of a rank, in which its faults happen: later, it may be over
ENDS = {"kill": "was killed by SIGKILL", "raise": "failed: LookupError: as was asked for"}
ENDS |= {"actor": "has ended with its Ray actor"}
ENDS |= {"node": "(has ended with its Ray actor|does not answer any more)"}
ENDS |= {"vanish": "is out of reach: its host does not answer"}
# One round: faults in turn. A start's follow those that end the group, so that there is a start. A
# warm-up's wait for the streams before to end, and "-" does: no stream is to meet two ranks that
# raise, since it would be taken for their cause.
ROUND = (
    *("step kill", "start raise", "start kill", "warm-up kill", "warm-up raise"),
    *("-", "step raise", "start stop", "step stop", "warm-up stop", "-", "idle kill"),
)
RAY_ROUND = ("step actor", "-", "step node", "-")
VANISHING_ROUND = ("step vanish", "-")


@dataclass
class Seen:
    """What became of one fault, in seconds since it happened. ended_s: when the last rank of the
    group had gone; None where none should."""

    fault: str
    report_s: float
    ended_s: float | None


class Heard:
    """What this process and those that it has started write to stderr, with the time of each line
    on the monotonic clock."""

    def __init__(self) -> None:
        self._own = os.dup(2)
        reads, writes = os.pipe()
        os.dup2(writes, 2)
        os.close(writes)
        self._lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, args=(reads,), daemon=True).start()

    def _listen(self, reads: int) -> None:
        with os.fdopen(reads, errors="replace") as lines:
            for line in lines:
                self._lines.append((time.monotonic(), line))

    async def after(self, since: float, pattern: str) -> float:
        """When the first line since then came that has it. Raises `TimeoutError`."""
        async with asyncio.timeout(REPORT_S):
            while True:
                for at, line in self._lines:
                    if at >= since and re.search(pattern, line):
                        return at
                await asyncio.sleep(0.01)

    def restore(self) -> str:
        """Write to stderr again; returns the last lines heard, but for Ray's."""
        os.dup2(self._own, 2)
        own = [(at, line) for at, line in self._lines if "(raylet)" not in line]
        return "".join(f"{at:.3f} {line}" for at, line in own[-80:])


class TwoNodes:
    """A Ray cluster of this machine, with room for half of the ranks on each node."""

    def __init__(self, num_ranks: int) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000}
        self._node: dict[str, Any] = {**node, "resources": {SEAT: -(-num_ranks // 2)}}
        self._directory = tempfile.mkdtemp(prefix="nv")  # a short name, as that of a socket is
        os.environ["RAY_TMPDIR"] = self._directory
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._cluster = Cluster(True, head_node_args={**self._node, "include_dashboard": False})
        os.environ["RAY_ADDRESS"] = self._cluster.address
        self._second = self._cluster.add_node(**self._node)

    def kill_second(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def add_second(self) -> None:
        self._second = self._cluster.add_node(**self._node)

    def end(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._directory, ignore_errors=True)


class TwoHosts(TwoNodes):
    """One whose second node has a network of its own, behind a router that can fall silent, so that
    both sides see what they would of a host that vanishes. Needs Linux and root."""

    HERE, THERE = "10.77.1.1", "10.77.2.1"

    def __init__(self, num_ranks: int) -> None:
        self._seats = json.dumps({SEAT: -(-num_ranks // 2)})
        self._router, self._far = f"router{os.getpid()}", f"far{os.getpid()}"
        here, there = f"h{os.getpid()}", f"t{os.getpid()}"
        for command in (
            f"netns add {self._router}",
            f"netns add {self._far}",
            f"link add {here} type veth peer name near netns {self._router}",
            f"-n {self._far} link add {there} type veth peer name far netns {self._router}",
            f"addr add {self.HERE}/24 dev {here}",
            f"link set {here} up",
            "route add 10.77.2.0/24 via 10.77.1.2",
            f"-n {self._router} addr add 10.77.1.2/24 dev near",
            f"-n {self._router} addr add 10.77.2.2/24 dev far",
            f"-n {self._router} link set near up",
            f"-n {self._router} link set far up",
            f"-n {self._far} addr add {self.THERE}/24 dev {there}",
            f"-n {self._far} link set {there} up",
            f"-n {self._far} link set lo up",
            f"-n {self._far} route add default via 10.77.2.2",
        ):
            ip(command)
        self._directory = tempfile.mkdtemp(prefix="nv")
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": self._directory}
        self._start_ray(f"--head --node-ip-address={self.HERE} --port=0 --include-dashboard=false")
        found = Path(self._directory, "ray", "ray_current_cluster").read_text()
        self._address = os.environ["RAY_ADDRESS"] = found.strip()
        self.add_second()

    def _start_ray(self, arguments: str, *before: str) -> None:
        """A node; before: how the command begins."""
        command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1"]
        command += ["--num-gpus=0", "--object-store-memory=80000000", f"--resources={self._seats}"]
        subprocess.run([*command, *arguments.split()], check=True, stdout=subprocess.DEVNULL)

    def kill_second(self) -> None:
        """Nothing gets there, nor from there."""
        self._forward("0")

    def _forward(self, whether: str) -> None:
        ip(f"netns exec {self._router} sysctl -q net.ipv4.ip_forward={whether}")

    def add_second(self) -> None:
        """Another one in its place; whatever ran there has gone with it."""
        self._kill_all_there()
        self._forward("1")
        there = f"--address={self._address} --node-ip-address={self.THERE}"
        self._start_ray(there, "ip", "netns", "exec", self._far)

    def _kill_all_there(self) -> None:
        for pid in map(int, ip(f"netns pids {self._far}").split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self._kill_all_there()
        stop = [sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"]
        subprocess.run(stop, check=False, stdout=subprocess.DEVNULL)
        ip(f"netns del {self._far}")
        ip(f"netns del {self._router}")
        shutil.rmtree(self._directory, ignore_errors=True)


def ip(arguments: str) -> str:
    """What the command of iproute2 prints."""
    return subprocess.run(
        ["ip", *arguments.split()], check=True, capture_output=True, text=True
    ).stdout


class RankFaults:
    """Faults one after the other in the ranks of one engine, and streams beside them."""

    def __init__(self, llm: AsyncLLM, heard: Heard, directory: Path, nodes: TwoNodes | None):
        self._llm = llm
        self._heard = heard
        self._directory = directory
        self._nodes = nodes
        self._num_ranks = llm.config.parallel.num_ranks
        self._rng = random.Random(20)
        self._num_faults = 0
        self._start_s = 0.0  # what the first rank took, when there was no fault
        self._expected: list[list[int]] = []
        self._streams: asyncio.Task[tuple[list[list[int]], float]] | None = None
        self._arrivals = Arrivals(NUM_STREAMS)
        self.seen: list[Seen] = []
        self.num_equal = 0

    async def begin(self) -> None:
        """With a run in which nothing happens."""
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        ticks = _stat(self._ranks()[0])[19]
        self._start_s = up_s - int(ticks) / os.sysconf("SC_CLK_TCK")
        await self._stream()
        self._expected, _ = await self._stream()

    async def round(self, faults: tuple[str, ...]) -> None:
        """Each of them once; the rank is another every time."""
        for fault in faults:
            # So many restarts within a minute are for good, and later ones are delayed: not here.
            self._llm._session.line._budget._taken.clear()
            if fault == "-":
                await self._await_streams()
            elif fault in ("step node", "step vanish"):
                await self._kill_node(fault)
            elif fault == "idle kill":
                await self._kill_idle(fault)
            else:
                self._num_faults += 1
                await self._one(fault, self._num_faults % self._num_ranks)

    async def _one(self, fault: str, rank: int) -> None:
        when, how = fault.split()
        spread_s = {"start": START_SHARE * self._start_s, "step": 0.01, "warm-up": 0.001}[when]
        if fault == "start raise":
            spread_s = 3.0  # all places where it can
        word = self._directory / "word"
        asked = "note" if how == "actor" else how
        word.write_text(f"{asked} {self._rng.uniform(0, spread_s)}")
        word.rename(self._directory / f"{when}.{rank}")
        if when == "warm-up":
            await self._await_streams()
        else:
            self._begin_streams()
        if when == "start" and self._llm._session.line.link is not None:
            os.kill(core_pid(self._llm), signal.SIGKILL)
        happened_at, pid = await self._happened()
        ranks = self._ranks()
        if how == "actor":  # the parent of the rank
            happened_at = time.monotonic()
            os.kill(int(_stat(pid)[1]), signal.SIGKILL)
        self._begin_streams()
        if how != "stop":
            await self._see_end(fault, rf"rank {rank} .*{ENDS[how]}", happened_at, ranks)
            return
        told_at = await self._heard.after(happened_at, f"rank {rank} .*stopped by a signal")
        await asyncio.sleep(0.3)
        assert all(map(_lives, ranks)), "a rank was killed that had only been stopped"
        os.kill(pid, signal.SIGCONT)
        self.seen.append(Seen(fault, told_at - happened_at, None))

    async def _kill_idle(self, fault: str) -> None:
        """A rank, while nobody asks for anything; nobody has to, for the group to come back."""
        await self._await_streams()
        ranks, happened_at = self._ranks(), time.monotonic()
        os.kill(self._rng.choice(ranks), signal.SIGKILL)
        await self._see_end(fault, rf"rank \d+ .*{ENDS['kill']}", happened_at, ranks)
        await self._heard.after(happened_at, "the core is back")

    async def _kill_node(self, fault: str) -> None:
        """The second one, on which the last rank is; it comes back."""
        assert self._nodes is not None
        await self._await_streams()
        self._begin_streams()
        while self._arrivals.num_begun < NUM_STREAMS:
            await asyncio.sleep(0.01)
        ranks, happened_at = self._ranks(), time.monotonic()
        killing = asyncio.create_task(asyncio.to_thread(self._nodes.kill_second))
        await self._see_end(fault, rf"rank \d+ .*{ENDS[fault.split()[1]]}", happened_at, ranks)
        await killing
        self._nodes.add_second()  # which sets signal handlers, so in this thread

    async def _see_end(self, fault: str, cause: str, happened_at: float, ranks: list[int]) -> None:
        """The group's, and the frontend's word of it."""

        async def all_gone() -> float:
            while any(map(_lives, ranks)):
                await asyncio.sleep(0.01)
            return time.monotonic()

        try:
            async with asyncio.timeout(REPORT_S):
                told = self._heard.after(happened_at, f"{cause}.*; starting it again")
                told_at, gone_at = await asyncio.gather(told, all_gone())
        except TimeoutError:
            left = [pid for pid in ranks if _lives(pid)]
            text = f"{fault} at {happened_at:.3f}: no word of {cause!r}, or still there: {left}"
            raise AssertionError(text) from None
        self.seen.append(Seen(fault, told_at - happened_at, gone_at - happened_at))

    async def _happened(self) -> tuple[float, int]:
        """When the fault that was asked for did, and in which process."""
        note = self._directory / "happened"
        async with asyncio.timeout(REPORT_S):
            while not note.exists():
                await asyncio.sleep(0.001)
        at, pid = note.read_text().split()
        note.unlink()
        return float(at), int(pid)

    def _ranks(self) -> list[int]:
        """All that were started by this program or by those that it has started."""
        own = f"NANOVLLM_FAULTS={self._directory}".encode()
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if b"nanovllm.executor.rank" in _read(pid, "cmdline") and own in _read(pid, "environ")
        ]

    def _begin_streams(self) -> None:
        if self._streams is None:
            self._streams = asyncio.create_task(self._stream())

    async def _stream(self) -> tuple[list[list[int]], float]:
        self._arrivals.forget()
        asked = prompts(NUM_STREAMS, 40, turn=3, vocab_size=500)
        return await stream_all(self._llm, asked, 150, self._arrivals)

    async def _await_streams(self) -> None:
        if self._streams is None:
            return
        async with asyncio.timeout(ENOUGH_S):
            ids, _ = await self._streams
        self._streams = None
        assert ids == self._expected, "ids differ"
        self.num_equal += len(ids)


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, parent, …; empty if it is gone."""
    return _read(pid, "stat").decode().rpartition(")")[2].split()


def _lives(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    return _stat(pid)[:1] not in ([], ["Z"])


def things_left() -> set[str]:
    """What may stay behind of processes: shared memory, and directories of sockets."""
    places = [*Path("/dev/shm").iterdir(), *Path(tempfile.gettempdir()).glob("nanovllm-*")]
    return set(map(str, places))


@contextmanager
def failing_ranks() -> Iterator[Path]:
    """A directory for all that is made meanwhile, in which ranks look for faults."""
    environment, path = dict(os.environ), list(sys.path)
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        # What ranks on Ray are started with comes from its nodes, and theirs from here.
        found = [str(FAILING_RANK), str(ROOT), *filter(None, sys.path)]
        sys.path.insert(0, str(FAILING_RANK))
        os.environ |= {"NANOVLLM_FAULTS": place, "PYTHONPATH": os.pathsep.join(found)}
        os.environ["TMPDIR"] = tempfile.tempdir = place
        try:
            yield Path(place)
        finally:
            tempfile.tempdir, sys.path[:] = None, path
            os.environ.clear()
            os.environ |= environment


async def report_ranks(
    size: Ranks, faults_of_a_round: tuple[str, ...], arguments: argparse.Namespace
) -> None:
    """Print a table of what `times` rounds of faults have shown, or as many as begin in time."""
    on_ray = arguments.ray
    until = time.monotonic() + arguments.seconds
    with failing_ranks() as place:
        model = place / "dense"
        model.mkdir()
        config = {**DENSE, **SMALLER, "num_hidden_layers": 2}
        (model / "config.json").write_text(json.dumps(config))
        make_nodes = TwoHosts if "step vanish" in faults_of_a_round else TwoNodes
        nodes = make_nodes(size.each * size.stages) if on_ray else None
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
        settings |= {"tensor_parallel_size": size.each, "pipeline_parallel_size": size.stages}
        settings |= {"load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 8}
        settings |= {"kv_cache_memory_bytes": 2**24, "max_core_restarts": 10**6}
        if arguments.synthetic:
            settings |= {"load_format": "synthetic", "step_ms": 5.0, "compare_ranks": True}
        if on_ray:
            settings |= {"distributed_executor_backend": "ray", "ray_resource": SEAT}
        before, num_rounds, faults = things_left(), 0, None
        heard = Heard()
        try:
            async with AsyncLLM(str(model), **settings) as llm:
                faults = RankFaults(llm, heard, place, nodes)
                await faults.begin()
                num_open = footprint(os.getpid())[1]
                while num_rounds < arguments.times and time.monotonic() < until:
                    await faults.round(faults_of_a_round)
                    num_rounds += 1
                num_more_open = footprint(os.getpid())[1] - num_open
            left = [*faults._ranks(), *(things_left() - before)]
        finally:
            told = heard.restore()
            if faults is not None:
                print_seen(size, faults)
            if sys.exc_info()[0] is not None:
                print(told)
            if nodes is not None:
                nodes.end()
    print(
        f"{num_rounds} rounds; {faults.num_equal} streams equal; processes, shared memory and "
        f"directories left: {left or 'none'}; descriptors of the frontend {num_more_open:+d}"
    )
    worst = max((one.report_s for one in faults.seen), default=0.0)
    assert not left and num_more_open <= 0 and worst <= 2.0, "a target is missed"


def round_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The faults of each round."""
    whole = RAY_ROUND + ROUND if arguments.ray else ROUND
    if arguments.faults is None:
        return whole
    words = set(arguments.faults.split(","))
    return tuple(one for one in VANISHING_ROUND + whole if one == "-" or words & set(one.split()))


def print_seen(size: Ranks, faults: RankFaults) -> None:
    """A line for each kind of fault."""
    print("| ranks | when | how | times | reported, s | worst | group gone, s | worst |")
    print("|---|---|---|---|---|---|---|---|")
    for fault in dict.fromkeys(one.fault for one in faults.seen):
        alike = [one for one in faults.seen if one.fault == fault]
        told = [one.report_s for one in alike]
        gone = [one.ended_s for one in alike if one.ended_s is not None]
        when, how = fault.split()
        figures = [f"{statistics.median(told):.2f}", f"{max(told):.2f}"]
        figures += [f"{statistics.median(gone):.2f}", f"{max(gone):.2f}"] if gone else ["–", "–"]
        print(f"| {size} | {when} | {how} | {len(alike)} | {' | '.join(figures)} |", flush=True)


# ---- all of it


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
    parser.add_argument("--ranks", help="faults of ranks instead: 2, 1x2 or 2x2, with commas")
    parser.add_argument("--times", type=int, default=20, help="of each fault of a rank")
    parser.add_argument("--seconds", type=float, default=1e6, help="when no round begins any more")
    parser.add_argument("--synthetic", action="store_true", help="ranks that compute nothing")
    parser.add_argument("--ray", action="store_true", help="ranks of a cluster of two local nodes")
    parser.add_argument("--faults", help="only those of a round that have one of these words")
    parser.add_argument("--client", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load = Load(**arguments.load)
    if arguments.client:
        print(json.dumps(asyncio.run(client(arguments.client, load))), flush=True)
        return
    if arguments.ranks:
        for size in map(Ranks.of, arguments.ranks.split(",")):
            asyncio.run(report_ranks(size, round_of(arguments), arguments))
        return
    asyncio.run(report(load, arguments))


if __name__ == "__main__":
    main()
