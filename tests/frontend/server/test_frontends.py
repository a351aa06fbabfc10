"""The parent of `--frontends N`, whose processes are stand-ins: what it starts again, what ends all
of them, and by which exit code."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.frontend import core_process
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.frontend.server import frontends as module
from nanovllm.frontend.server.frontends import Frontends, own_cores
from nanovllm.frontend.server.run import READY_LINE, Ending, FrontendSetup
from nanovllm.frontend.server.settings import ServerSettings
from tests.waiting import WAIT_S

# Says that it is ready, and then what it does: its first argument. Each leaves a file of its name.
STAND_IN = f"""
import json, os, pathlib, signal, sys, time
setup = json.loads(sys.stdin.readline())
signals = []
ends = sys.argv[1] != "stubborn"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0) if ends else signals.append(1))
(pathlib.Path(os.environ["NAMES"]) / str(os.getpid())).write_text(setup["address"])
if sys.argv[1] == "fails":
    sys.exit(3)
print("{READY_LINE}", flush=True)
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
while len(signals) < 2:
    time.sleep(0.005)
sys.exit(4)
"""

# Leaves a file of its name, and ends when its owner does.
STAND_IN_CORE = """
import os, pathlib, socket, sys
pathlib.Path(os.environ["NAMES"], str(os.getpid())).touch()
with socket.socket(fileno=int(sys.argv[sys.argv.index("--owner-fd") + 1])) as owner:
    owner.recv(1)
"""


class Run:
    """Frontends under way."""

    def __init__(
        self, tmp_path: Path, what: str, patch: pytest.MonkeyPatch, **options: Any
    ) -> None:
        patch.setattr(module, "PROGRAM", (sys.executable, "-c", STAND_IN, what))
        patch.setattr(module, "KILL_AFTER_S", options.pop("kill_after_s", 60.0))
        settings = ServerSettings(frontends=2, shutdown_timeout=0)
        self._names = tmp_path / "names"
        self._names.mkdir()
        self.num_ready = 0
        environment = {**os.environ, "NAMES": str(self._names)}
        core = options.pop("core", None)
        frontends = Frontends(FrontendSetup.of(settings, "ipc://x", {}), environment, core=core)
        self.code = asyncio.ensure_future(frontends.run(self._note_ready))

    def _note_ready(self) -> None:
        self.num_ready += 1

    def processes(self) -> set[int]:
        """That have begun, by their ids."""
        return {int(path.name) for path in self._names.iterdir() if path.read_text() == "ipc://x"}

    async def begun(self, count: int) -> set[int]:
        async with asyncio.timeout(WAIT_S):
            while len(self.processes()) < count or not self.num_ready:
                await asyncio.sleep(0.005)
        return self.processes()

    async def ended(self) -> int:
        return await asyncio.wait_for(self.code, WAIT_S)


async def test_all_are_ready_once_and_one_that_is_killed_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, "serves", monkeypatch)
    first = await run.begun(2)
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    assert len(await run.begun(3) - first) == 1
    assert run.num_ready == 1 and not run.code.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await run.ended() == 0 and len(run.processes()) == 3


async def test_one_that_fails_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, "fails", monkeypatch)
    assert await run.ended() == 3 and run.num_ready == 0


def test_a_signal_that_comes_too_late_leaves_the_exit_code_to_asyncio() -> None:
    ended: Any = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # only looks
    module._send(ended, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(ended.pid, 0)[1]) == 3
    module._send(ended, signal.SIGTERM)  # as when asyncio has not told of it yet
    ended.returncode = 3


async def test_those_that_keep_dying_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, "dies", monkeypatch)
    assert await run.ended() == 1
    told = capsys.readouterr().err
    assert told.count("ended by signal 9: again") == module.MAX_RESTARTS
    assert "ended with code -9" in told


async def test_the_cores_of_all_frontends_end_with_their_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has an address of its own, in a directory that goes with it."""
    monkeypatch.setattr(core_process, "PROGRAM", ["-c", STAND_IN_CORE])
    monkeypatch.setenv("NAMES", str(tmp_path))
    config = EngineConfig.from_kwargs(device="cpu", data_parallel_size=2)
    async with own_cores(config) as line, asyncio.timeout(WAIT_S):
        addresses = line.address.split(",")
        directories = [Path(one.removeprefix("ipc://")).parent for one in addresses]
        assert len(set(directories)) == 2 and all(one.is_dir() for one in directories)
        while len(processes := list(tmp_path.iterdir())) < 2:
            await asyncio.sleep(0.005)
    assert not any(one.exists() for one in directories)
    for path in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


async def test_they_end_with_their_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead: asyncio.Future[EngineDeadError] = asyncio.get_running_loop().create_future()
    run = Run(tmp_path, "serves", monkeypatch, core=SimpleNamespace(until_dead=lambda: dead))
    await run.begun(2)
    assert not run.code.done()
    dead.set_result(EngineDeadError("no more"))
    assert await run.ended() == 1, "though each has ended as it was told"


async def test_a_second_signal_makes_them_hurry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that live: others have died, and come again."""
    run = Run(tmp_path, "stubborn", monkeypatch)
    for victim in await run.begun(2):
        os.kill(victim, signal.SIGKILL)
    await run.begun(4)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)
    assert not run.code.done()
    os.kill(os.getpid(), signal.SIGINT)
    assert await run.ended() == 4, "each has seen two"


async def test_who_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, "stubborn", monkeypatch, kill_after_s=0.05)
    processes = await run.begun(2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await run.ended() == 0
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


async def test_the_first_signal_lets_requests_finish_for_a_while_and_the_second_does_not() -> None:
    told: list[str] = []

    async def abort_all() -> None:
        told.append("abort")

    server: Any = SimpleNamespace(should_exit=False, force_exit=False)
    serving: Any = SimpleNamespace(drain=lambda: told.append("drain"), abort_all=abort_all)
    ending = Ending(server, serving, 0.05)
    ending.on_signal()
    assert (server.should_exit, server.force_exit, told) == (True, False, ["drain"])
    ending.begin()
    assert not server.force_exit, "the core's end is no second signal"
    async with asyncio.timeout(WAIT_S):
        while "abort" not in told:
            await asyncio.sleep(0.01)
    ending.on_signal()
    await asyncio.sleep(0.1)
    assert server.force_exit and told.count("abort") == 1
    soon = Ending(server, serving, 0.05)
    soon.finish()
    soon.begin()
    soon.finish()
    await asyncio.sleep(0.1)
    assert told.count("abort") == 1, "all have ended before"


def test_what_a_frontend_is_told_is_what_it_needs() -> None:
    settings = ServerSettings(frontends=2)
    fields = {"tokenizer": "t", "skip_tokenizer_init": True, "max_core_restarts": 9}
    setup = FrontendSetup.of(settings, "ipc://x", {**fields, "max_num_seqs": 3})
    assert (setup.settings, setup.address) == (settings, "ipc://x")
    assert (setup.tokenizer, setup.skip_tokenizer_init) == ("t", True)
    assert setup.supervision.max_core_restarts == 9
    assert FrontendSetup.of(settings, "ipc://x", {}).tokenizer is None
    assert msgspec.json.decode(msgspec.json.encode(setup), type=FrontendSetup) == setup
