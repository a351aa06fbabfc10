"""`nanovllm bench clients`: many client processes on one core, and what each of them gets.

Open loop by default: requests come when they are due, however slow the answers. Everything a
client measures it measures itself; this process only starts them together and adds them up.
"""

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from nanovllm.bench.client import ClientReport
from nanovllm.bench.load import ClientsLoad, ClientTask, plan
from nanovllm.bench.report import CoreFigures, Report, describe, draw, need_matplotlib, summarize
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.protocol.messages import CoreStatus

START_S = 60.0  # for a client process to start and connect
DRAIN_S = 120.0  # for what runs to end, once no more requests come
LEAD_S = 0.2  # from telling the clients when to start until then
STREAM_LIMIT = 1 << 28  # bytes of one client's report
MIB = 1 << 20


def clients(load: ClientsLoad, settings: dict[str, Any]) -> str:
    """Run the load on a core of our own (of these `settings`) or the one at `load.connect`."""
    if load.plot is not None:
        need_matplotlib()
    report, reports = uvloop.run(measure(load, settings))
    if load.output is not None:
        Path(load.output).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if load.plot is not None:
        draw(report, reports, load.plot)
    return describe(report)


async def measure(load: ClientsLoad, settings: dict[str, Any]) -> tuple[Report, list[ClientReport]]:
    """Start the core, unless there is one, and the clients; let them run; sum up."""
    shares = plan(load)
    if load.connect is None:
        llm = AsyncLLM(**settings)
        await llm.start()
    else:
        on_progress = settings.pop("on_progress", None)
        if settings:
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(settings))
            raise ValueError(f"{flags}: the core at {load.connect} has its own settings: omit it")
        llm = await AsyncLLM.connect(
            load.connect, skip_tokenizer_init=True, on_progress=on_progress
        )
    try:
        tasks = [
            ClientTask(llm.address, client, arrivals, load)
            for client, arrivals in enumerate(shares)
        ]
        watch = CoreWatch(llm)
        reports, seconds = await run_clients(tasks, watch)
        core = await watch.figures(seconds)
    finally:
        await llm.close()
    return summarize(load, reports, seconds, core), reports


async def run_clients(
    tasks: list[ClientTask], watch: "CoreWatch"
) -> tuple[list[ClientReport], float]:
    """Their reports, and the seconds from the start to the last token."""
    command = [sys.executable, "-m", "nanovllm.bench.client"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=STREAM_LIMIT,
            env=environment,
        )
        for _ in tasks
    ]
    try:
        async with asyncio.timeout(START_S):
            await asyncio.gather(
                *(
                    _exchange(process, msgspec.json.encode(task))
                    for process, task in zip(processes, tasks, strict=True)
                )
            )
        await watch.start()
        start_at = time.monotonic() + LEAD_S
        lines = await _gather_reports(processes, start_at, seconds=_longest(tasks) + DRAIN_S)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in processes))
    reports = [msgspec.json.decode(line, type=ClientReport) for line in lines]
    ends = [one.at + (one.e2e_s or 0.0) for report in reports for one in report.requests]
    return reports, max(ends, default=0.0) or tasks[0].load.duration


async def _gather_reports(
    processes: list[asyncio.subprocess.Process], start_at: float, *, seconds: float
) -> list[bytes]:
    """Let the clients begin, and read what each says at its end."""
    begin = str(start_at).encode()
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.gather(*(_exchange(process, begin) for process in processes))
    except TimeoutError:
        raise ValueError(
            f"rate: the core was not done {DRAIN_S:g} s after the last request: ask for less"
        ) from None


def _longest(tasks: list[ClientTask]) -> float:
    ats = [arrival.at for task in tasks for arrival in task.arrivals]
    return max(ats, default=0.0) + tasks[0].load.duration


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """Write one line, read one. `RuntimeError` if the process has ended instead."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + b"\n")
    await process.stdin.drain()
    answer = await process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a client process ended with code {await process.wait()}")
    return answer


class CoreWatch:
    """What the core and its process do from `start` on."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._pid = listening_pid(llm.address)
        self._before: CoreStatus | None = None
        self._started = self._cpu_s = 0.0
        self._memory_mib = 0.0

    async def start(self) -> None:
        self._before = await self._llm.stats()
        self._started = time.monotonic()
        if self._pid is not None:
            self._cpu_s = cpu_seconds(self._pid)
            self._memory_mib = memory_mib(self._pid, "VmRSS")

    async def figures(self, seconds: float) -> CoreFigures:
        """seconds: how long there was work. Waits until the core has told of the last step."""
        await asyncio.sleep(1.2)
        assert self._before is not None
        before, after = self._before, await self._llm.stats()
        queries = after.prefix_cache_queries - before.prefix_cache_queries
        found = CoreFigures(
            num_steps=after.step - before.step,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            prefix_hit_share=(after.prefix_cache_hits - before.prefix_cache_hits) / max(1, queries),
            loop_share=(after.loop_cpu_s - before.loop_cpu_s) / seconds,
            messaging_share=(after.messaging_cpu_s - before.messaging_cpu_s) / seconds,
        )
        if self._pid is not None and Path(f"/proc/{self._pid}").exists():
            found.cpu_share = (cpu_seconds(self._pid) - self._cpu_s) / seconds
            found.peak_memory_mib = memory_mib(self._pid, "VmHWM")
            found.memory_growth_mib = memory_mib(self._pid, "VmRSS") - self._memory_mib
        return found


def listening_pid(address: str) -> int | None:
    """The process that has bound an ipc:// address; None for tcp://, which does not tell."""
    if not address.startswith("ipc://") or not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(address.removeprefix("ipc://"))
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, name: str) -> float:
    """VmRSS (now) or VmHWM (the most it ever was)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024 / MIB
    raise ValueError(f"/proc/{pid}/status has no {name}")
