"""How a core ends: by draining, by a second signal, at once; and that stalls are seen."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.lifetime import ExitCode, watching_for_stalls
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import CoreStatus, Finished, Outputs, Overloaded
from nanovllm.protocol.plan import StepPlan
from tests.core.fake_executor import FakeExecutor, FakeHandle, reference
from tests.core.serving import PATIENT, PROMPT, RawClient, add, collect, serving
from tests.waiting import WAIT_S

SERVE = """
import signal, sys
from nanovllm.config import EngineConfig
from nanovllm.core.lifetime import stop_on_signals
from nanovllm.core.server import CoreServer
from tests.core.serving import PATIENT, PacedExecutor
config = EngineConfig.from_kwargs(drain_timeout=float(sys.argv[2]), **PATIENT)
server = CoreServer(config, sys.argv[1])
stop_on_signals(server.drain, server.stop)
executor = PacedExecutor(config, step_s=0.1)
signal.signal(signal.SIGUSR1, lambda *_: setattr(executor, "step_s", 0.0))
sys.exit(server.run(lambda: executor))
"""


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


class CoreProgram:
    """A core in a process of its own, with one client. 500 tokens take it 50 s, unless SIGUSR1
    lets it hurry."""

    def __init__(self, address: str, *, drain_timeout: float) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, address, str(drain_timeout)])
        self.client = RawClient(address)
        try:
            self.client.greet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def patient(address: str) -> Iterator[CoreProgram]:
    program = CoreProgram(address, drain_timeout=WAIT_S)
    yield program
    program.close()


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(patient: CoreProgram) -> None:
    client = patient.client
    client.send(add(0, max_tokens=500))
    client.receive(Outputs)
    patient.process.terminate()
    ended: dict[int, Finished] = {}
    for number in count(1):  # it may take some more until the signal has reached it
        client.send(add(number, max_tokens=1))
        answer = client.receive_any(Outputs, Overloaded)
        while isinstance(answer, Outputs):
            ended |= {one.number: one for one in answer.finished}
            if number in ended:
                break
            answer = client.receive_any(Outputs, Overloaded)
        else:
            break
    assert answer.number == number and answer.draining and answer.retry_after_s > 0
    assert 0 not in ended
    patient.process.send_signal(signal.SIGUSR1)
    ended |= collect(client, 0)[1]
    assert ended[0].reason == "length"
    assert patient.process.wait(60) == ExitCode.DONE


def test_an_idle_core_ends_at_once(patient: CoreProgram) -> None:
    patient.process.terminate()
    assert patient.process.wait(60) == ExitCode.DONE


def test_a_second_sigterm_cuts_short(patient: CoreProgram) -> None:
    patient.client.send(add(0, max_tokens=500))
    patient.client.receive(Outputs)
    patient.process.terminate()
    while not patient.client.receive(CoreStatus).draining:
        pass
    patient.process.terminate()
    assert collect(patient.client, 0)[1][0].reason == "abort"
    assert patient.process.wait(60) == ExitCode.CUT_SHORT


def test_the_drain_timeout_aborts_what_is_left(address: str) -> None:
    program = CoreProgram(address, drain_timeout=0.3)
    program.client.send(add(0, max_tokens=500))
    program.client.receive(Outputs)
    program.process.terminate()
    ended: dict[int, Finished] = collect(program.client, 0)[1]
    assert ended[0].reason == "abort"
    assert program.process.wait(60) == ExitCode.DRAIN_TIMEOUT
    program.close()


def test_draining_finishes_every_token(address: str) -> None:
    with serving(address) as server:
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=400))
        client.receive(Outputs)
        server.drain()
        assert collect(client, 0)[1][0].reason == "length"
        client.close()


@pytest.mark.parametrize(
    ("timeout_s", "ends", "exit_code"),
    [
        (WAIT_S, ["stop"], ExitCode.DONE),
        (WAIT_S, ["drain", "stop"], ExitCode.CUT_SHORT),
        (0.0, ["drain"], ExitCode.DRAIN_TIMEOUT),
        (0.0, ["drain", "stop"], ExitCode.DRAIN_TIMEOUT),
    ],
)
def test_the_exit_code_says_whether_a_drain_was_cut_short(
    address: str, timeout_s: float, ends: list[str], exit_code: ExitCode
) -> None:
    """A request runs on and on; told in the middle of a step, all of `ends` come at once."""
    config = EngineConfig.from_kwargs(drain_timeout=timeout_s, **PATIENT)
    server = CoreServer(config, address)

    class Ending(FakeExecutor):
        def submit(self, plan: StepPlan) -> FakeHandle:
            if plan.step == 3:
                for end in ends:
                    getattr(server, end)()
            return super().submit(plan)

    found: list[ExitCode] = []
    executor = Ending(config, num_blocks=200, max_model_len=512)
    thread = threading.Thread(target=lambda: found.append(server.run(lambda: executor)))
    thread.start()
    client = RawClient(address)
    client.greet()
    client.send(add(0, max_tokens=500))
    assert collect(client, 0)[1][0].reason == "abort"
    thread.join(WAIT_S)
    client.close()
    assert found == [exit_code]


class StuckExecutor(FakeExecutor):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, num_blocks=100, max_model_len=256)
        self.is_stuck, self.go_on = threading.Event(), threading.Event()

    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.step == 5:
            self.is_stuck.set()
            assert self.go_on.wait(WAIT_S)
        return super().submit(plan)


def test_a_stuck_loop_is_silent_logged_and_lives(
    address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    executor, said = StuckExecutor(EngineConfig()), ""

    def is_told_where() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "in submit" in said

    with caplog.at_level(logging.WARNING), serving(address, executor, stall_timeout=0.3):
        client = RawClient(address)
        client.greet()
        client.send(add(0, max_tokens=20))
        assert executor.is_stuck.wait(WAIT_S)
        while True:
            try:
                client.receive(CoreStatus, timeout_s=1.5)
            except TimeoutError:
                break  # no status within 1.5 s: that is how a client knows
        eventually(is_told_where)  # a slow machine may have been told of before
        assert "no step has finished" in caplog.text
        executor.go_on.set()
        client.receive(CoreStatus)
        client.send(add(1))
        assert collect(client, 1)[0][1] == reference(PROMPT, 1, 4, frozenset())
        client.close()


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stall_is_reported_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    stalled_s, num_looks = 0.0, 0

    def look() -> float:
        nonlocal num_looks
        num_looks += 1
        return stalled_s

    with caplog.at_level(logging.WARNING), watching_for_stalls(look, lambda: 0.04):
        stalled_s = 1.0
        eventually(lambda: "no step has finished for 1.0 s" in caplog.text)
        seen = num_looks
        eventually(lambda: num_looks > seen + 2)
        stalled_s = 0.0
        eventually(lambda: "goes on" in caplog.text)
    assert caplog.text.count("no step has finished") == 1
    assert caplog.text.count("goes on") == 1


def test_stacks_go_to_the_file_alone_if_there_is_one(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "new" / "stalls.log"
    with watching_for_stalls(lambda: 1.0, lambda: 0.04, log=log):
        eventually(lambda: log.exists() and "most recent call first" in log.read_text())
    told, _, stacks = log.read_text().partition("most recent call first")
    assert f"core {os.getpid()}: no step has finished for 1.0 s" in told, "before the stacks"
    assert "in test_stacks_go_to_the_file_alone" in stacks and not caplog.text
    assert (log.stat().st_mode & 0o777, log.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    (tmp_path / "file").touch()
    with watching_for_stalls(lambda: 1.0, lambda: 0.04, log=tmp_path / "file" / "stalls.log"):
        eventually(lambda: "cannot be written" in caplog.text)
    assert capfd.readouterr().err == ""


def test_a_core_can_be_stopped_while_it_loads(address: str) -> None:
    server = CoreServer(EngineConfig(), address)
    server.drain()
    with pytest.raises(SystemExit):
        server.on_progress("weights", 0.5)
    server.close()


FAULTY = """
import os, signal, sys
from pathlib import Path
from nanovllm.core.lifetime import LifeFile
life = LifeFile(Path(sys.argv[1]), sys.argv[2])
print(life.after_crash_of, flush=True)
if sys.argv[3] == "exception":
    life.note_failure("Traceback: it failed")
elif sys.argv[3] != "end":
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
life.close()
"""


def test_a_core_knows_whether_the_one_before_it_crashed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "core.life"
    told: list[str] = []
    endings = ["SIGSEGV", "SIGKILL", "exception", "SIGTERM", "SIGABRT", "end", "end"]
    for number, ending in enumerate(endings):
        command = [sys.executable, "-c", FAULTY, str(file), f"life {number}", ending]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        told.append(done.stdout.strip())
    assert told == ["", "life 0", "", "life 2", "", "life 4", ""]
    assert not file.exists() and file.parent.stat().st_mode & 0o777 == 0o700
