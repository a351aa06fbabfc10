"""The HTTP processes of `--frontends N`, as their parent sees them.

Each gets its setup on standard input and says one line when it is ready. One that dies is replaced;
when the core dies, or they keep dying, all end.
"""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from nanovllm.frontend.server.run import READY_LINE, FrontendSetup

MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0
KILL_AFTER_S = 10.0  # beyond the drain
PROGRAM = (sys.executable, "-m", "nanovllm.frontend.server.run")


class Frontends:
    """Runs `setup.settings.frontends` processes. core: its process, if the parent owns it."""

    def __init__(
        self,
        setup: FrontendSetup,
        environment: dict[str, str],
        *,
        core: "subprocess.Popen[bytes] | None",
    ) -> None:
        self._setup = setup
        self._environment = environment
        self._core = core
        self._stopping = asyncio.Event()
        self._processes: set[asyncio.subprocess.Process] = set()
        assert setup.settings.frontends is not None
        self._num_frontends = self._num_unready = setup.settings.frontends
        self._restarts: list[float] = []

    async def run(self, on_ready: Callable[[], None]) -> int:
        """Until a signal or a death that cannot be mended. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        keepers = [
            asyncio.create_task(self._keep_one(on_ready)) for _ in range(self._num_frontends)
        ]
        codes = await asyncio.gather(*keepers)
        return max(codes)

    def _on_signal(self) -> None:
        if self._stopping.is_set():  # a second one makes them hurry
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
        self._stopping.set()

    async def _keep_one(self, on_ready: Callable[[], None]) -> int:
        """One frontend, again and again. Returns the last exit code."""
        while True:
            code = await self._run_one(on_ready)
            if self._stopping.is_set():
                return 0 if code <= 0 else code
            core_is_dead = self._core is not None and self._core.poll() is not None
            if code > 0 or core_is_dead or not self._may_restart():
                print(f"nanovllm: a frontend ended with code {code}", file=sys.stderr)
                self._stopping.set()
                return max(code, 1)
            print(f"nanovllm: a frontend was ended by signal {-code}: again", file=sys.stderr)

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTART_WINDOW_S] + [now]
        return len(self._restarts) <= MAX_RESTARTS

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
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(self._setup.settings.shutdown_timeout + KILL_AFTER_S)
        process.kill()
