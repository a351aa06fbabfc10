"""The HTTP processes of `--frontends N`, as their parent sees them.

Each gets its setup on standard input and says one line when it is ready. One that dies is replaced.
So is a core of their own, by the parent: they go on with what they have under way. When it is dead
for good, or they keep dying, all end.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.frontend.core_process import start_cores
from nanovllm.frontend.replicas import Lines
from nanovllm.frontend.server.run import READY_LINE, FrontendSetup
from nanovllm.frontend.session import Session
from nanovllm.frontend.supervisor import RestartBudget

MAX_RESTARTS = 5  # of all of them together, within a minute
KILL_AFTER_S = 10.0  # beyond the drain
PROGRAM = (sys.executable, "-m", "nanovllm.frontend.server.run")


@contextlib.asynccontextmanager
async def own_cores(config: EngineConfig) -> AsyncIterator[Lines]:
    """Cores for all frontends, which are started again when they die. This process has no requests
    of its own: the frontends, which wait for a core at its address, send theirs again."""
    handles = start_cores(config)
    lines = [Session(config.supervision, one.address, handle=one).line for one in handles]
    line = Lines(lines)
    greeting = asyncio.create_task(line.connect())
    try:
        yield line
    finally:
        greeting.cancel()
        await asyncio.gather(greeting, return_exceptions=True)  # frontends have told why, if it is
        await line.close()
        await asyncio.gather(*(asyncio.to_thread(handle.close) for handle in handles))


class Frontends:
    """Runs `setup.settings.frontends` processes. core: the line to it, if the parent owns it."""

    def __init__(
        self,
        setup: FrontendSetup,
        environment: dict[str, str],
        *,
        core: Lines | None,
    ) -> None:
        self._setup = setup
        self._environment = environment
        self._core = core
        self._stopping = asyncio.Event()
        self._processes: set[asyncio.subprocess.Process] = set()
        assert setup.settings.frontends is not None
        self._num_frontends = self._num_unready = setup.settings.frontends
        self._budget = RestartBudget(MAX_RESTARTS)
        self._core_is_dead = False

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Until a signal or a death that cannot be mended. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        keepers = [
            asyncio.create_task(self._keep_one(on_ready)) for _ in range(self._num_frontends)
        ]
        watcher = asyncio.create_task(self._end_with_core())
        codes = await asyncio.gather(*keepers)
        watcher.cancel()
        return max(codes)

    async def _end_with_core(self) -> None:
        """Where it is theirs. While it is being started again nothing ends."""
        if self._core is not None:
            error = await self._core.until_dead()
            print(f"nanovllm: {error}", file=sys.stderr)
            self._core_is_dead = True
            self._stopping.set()

    def _on_signal(self) -> None:
        if self._stopping.is_set():  # a second one makes them hurry
            for process in self._processes:
                _send(process, signal.SIGTERM)
        self._stopping.set()

    async def _keep_one(self, on_ready: Callable[[], None]) -> int:
        """One frontend, again and again. Returns the last exit code."""
        while True:
            code = await self._run_one(on_ready)
            if self._stopping.is_set():
                return max(code, int(self._core_is_dead))
            if code > 0 or self._budget.take(time.monotonic()) is None:
                print(f"nanovllm: a frontend ended with code {code}", file=sys.stderr)
                self._stopping.set()
                return max(code, 1)
            print(f"nanovllm: a frontend was ended by signal {-code}: again", file=sys.stderr)

    async def _run_one(self, on_ready: Callable[[], None]) -> int:
        process = await asyncio.create_subprocess_exec(
            *PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is the parent's affair
        )
        assert process.stdin is not None and process.stdout is not None
        self._processes.add(process)
        stopper = asyncio.create_task(self._end_when_told(process))
        try:
            process.stdin.write(msgspec.json.encode(self._setup) + b"\n")
            if (await process.stdout.readline()).strip() == READY_LINE.encode():
                self._num_unready -= 1
                if self._num_unready == 0:
                    on_ready()
            return await process.wait()
        finally:
            stopper.cancel()
            self._processes.discard(process)
            process.stdin.close()

    async def _end_when_told(self, process: asyncio.subprocess.Process) -> None:
        await self._stopping.wait()
        _send(process, signal.SIGTERM)
        await asyncio.sleep(self._setup.settings.shutdown_timeout + KILL_AFTER_S)
        _send(process, signal.SIGKILL)


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Unlike `Process.send_signal` does not look whether it has ended: whoever looks takes the exit
    code, which asyncio would then never learn."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
