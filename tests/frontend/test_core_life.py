"""The line to the core: greeting, calls, and that nothing waits for ever when the core dies."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.frontend import core_life
from nanovllm.frontend.core_life import CoreLife, Silence
from nanovllm.frontend.errors import EngineDeadError
from nanovllm.protocol.messages import (
    PULSE_INTERVAL_S,
    Call,
    CallResult,
    CoreFailed,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Outputs,
    Pulse,
    RequestFailed,
    ResetPrefixCache,
    ToCore,
    TrialOffered,
)
from tests.frontend.fake_core import STATUS, WELCOME, FakeCore
from tests.waiting import WAIT_S


class Recorder:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.heard: list[Outputs | RequestFailed | TrialOffered | EngineDeadError] = []
        self.dead = asyncio.Event()

    def on_outputs(self, outputs: Outputs) -> None:
        self.heard.append(outputs)

    def on_request_failed(self, failure: RequestFailed) -> None:
        self.heard.append(failure)

    def on_trial_offered(self, number: int) -> None:
        self.heard.append(TrialOffered(number))

    def on_core_dead(self, error: EngineDeadError) -> None:
        self.heard.append(error)
        self.dead.set()


def life_of(address: str, recorder: Recorder | None = None, **options: Any) -> CoreLife:
    recorder = recorder or Recorder()
    return CoreLife(address, recorder, recorder.on_core_dead, **options)


async def connected(address: str) -> tuple[CoreLife, Recorder]:
    recorder = Recorder()
    client = life_of(address, recorder)
    await client.connect()
    return client, recorder


async def failure_of(awaitable: "asyncio.Future[object]") -> EngineDeadError:
    with pytest.raises(EngineDeadError) as caught:
        async with asyncio.timeout(WAIT_S):
            await awaitable
    return caught.value


# ---- greeting


async def test_progress_while_loading_then_the_facts(address: str) -> None:
    def load(message: ToCore) -> Iterable[FromCore]:
        assert isinstance(message, Hello | Goodbye)
        if isinstance(message, Hello):
            yield from (Loading("weights", 0.25), Loading("weights", 1.0), WELCOME)

    seen: list[tuple[str, float]] = []
    with FakeCore(address, load) as core:
        client = life_of(address, on_progress=lambda phase, done: seen.append((phase, done)))
        assert not client.is_alive
        assert await client.connect() == WELCOME
        assert client.is_alive
        await client.close()
        assert not client.is_alive
        await asyncio.to_thread(core.wait_for, Goodbye)
    assert seen == [("weights", 0.25), ("weights", 1.0)]


@pytest.mark.parametrize(("usage", "kind"), [(True, ValueError), (False, EngineDeadError)])
async def test_a_failed_start_brings_the_root_cause(
    address: str, usage: bool, kind: type[Exception]
) -> None:
    def fail(message: ToCore) -> Iterable[FromCore]:
        yield CoreFailed("max_model_len is too large", "Traceback …", usage)

    with FakeCore(address, fail):
        client = life_of(address)
        with pytest.raises(kind, match="max_model_len is too large") as caught:
            await client.connect()
        await client.close()
    if isinstance(caught.value, EngineDeadError):
        assert caught.value.details == "Traceback …"


async def test_nobody_at_the_address(address: str) -> None:
    client = life_of(address)
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match=address):
        await client.connect(timeout_s=0.3)
    assert time.monotonic() - started < WAIT_S
    await client.close()


async def test_a_core_that_binds_late_is_found(address: str) -> None:
    client = life_of(address)
    connecting = asyncio.create_task(client.connect(timeout_s=WAIT_S))
    await asyncio.sleep(0.3)
    with FakeCore(address):
        assert await connecting == WELCOME
        await client.close()


async def test_somebody_else_at_the_address(tmp_path: Path) -> None:
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        client = life_of(f"ipc://{path}")
        with pytest.raises(EngineDeadError, match=r"other\.sock"):
            await client.connect(timeout_s=0.3)
        await client.close()


@pytest.mark.parametrize(
    "address", ["core.sock", "smoke://x", "tcp://nowhere", "ipc://" + "x" * 200]
)
async def test_impossible_addresses(address: str) -> None:
    client = life_of(address)
    with pytest.raises(ValueError, match="address"):
        await client.connect()
    await client.close()


async def test_silence_while_loading_has_a_bound(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_life, "SILENCE_S", 0.3)
    with FakeCore(address, lambda message: []):
        client = life_of(address)
        with pytest.raises(EngineDeadError, match="silent"):
            await client.connect()
        await client.close()


# ---- calls and messages


async def test_calls_are_matched_with_their_results(address: str) -> None:
    def answer(message: ToCore) -> Iterable[FromCore]:
        match message:
            case Hello():
                yield WELCOME
            case Call(0):
                pass
            case Call(1):
                yield CallResult(1, result=True)
                yield CallResult(0, result=False)
            case Call(call_id):
                yield CallResult(call_id, error="not now")

    with FakeCore(address, answer):
        client, _ = await connected(address)
        calls = [client.call(ResetPrefixCache()), client.call(ResetPrefixCache())]
        assert await asyncio.gather(*calls) == [False, True]
        with pytest.raises(RuntimeError, match="not now"):
            await client.call(ResetPrefixCache())
        await client.close()


async def test_an_unanswered_call_times_out(address: str) -> None:
    with FakeCore(address) as core:
        client, _ = await connected(address)
        with pytest.raises(TimeoutError, match=r"ResetPrefixCache within 0\.1 s"):
            await client.call(ResetPrefixCache(), timeout_s=0.1)
        core.push(CallResult(0, result=True), STATUS)  # late, and for nobody
        assert await client.status() == STATUS
        await client.close()


async def test_status_is_the_latest(address: str) -> None:
    with FakeCore(address) as core:
        client, _ = await connected(address)
        with pytest.raises(TimeoutError, match="status"):
            await client.status(timeout_s=0.05)
        waiting = asyncio.create_task(client.status())
        core.push(STATUS)
        assert await waiting == STATUS == await client.status()
        await client.close()


async def test_outputs_and_failures_reach_the_listener_in_order(address: str) -> None:
    with FakeCore(address) as core:
        client, recorder = await connected(address)
        sent = [Outputs([1], [2]), RequestFailed(3, "no"), Outputs([1], [3])]
        core.push(*sent, STATUS)
        await client.status()
        assert recorder.heard == sent
        await client.close()


async def test_the_lease_is_renewed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_life, "HEARTBEAT_INTERVAL_S", 0.2)
    with FakeCore(address) as core:
        client, _ = await connected(address)
        await asyncio.to_thread(core.wait_for, Heartbeat, 2)
        await client.close()
    monkeypatch.setattr(core_life, "HEARTBEAT_INTERVAL_S", 30.0)
    with FakeCore(address) as core:
        client, _ = await connected(address)
        await asyncio.sleep(0.5)
        assert not core.all_of(Heartbeat), "no more often than is needed"
        await client.close()


async def test_silence_is_a_stall_until_something_is_heard(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core_life, "STALL_S", 0.4)
    with FakeCore(address) as core:
        client, recorder = await connected(address)
        async with asyncio.timeout(WAIT_S):
            while not client.is_stalled:
                await asyncio.sleep(0.02)
        assert "has been silent" in caplog.text and client.is_alive and recorder.heard == []
        async with asyncio.timeout(WAIT_S):
            while client.is_stalled:
                core.push(STATUS)  # one alone may be long ago when the client looks
                await asyncio.sleep(0.02)
        assert "goes on" in caplog.text
        await client.close()


def test_what_passes_while_the_client_stands_still_is_no_silence_of_the_core() -> None:
    """Which may have stood still with it, and may need a while to speak again."""
    silence = core_life.Silence(100.0)
    assert [silence.at(now, last_heard=99.9) for now in (100.1, 100.2)] == pytest.approx([0.1, 0.2])
    assert silence.at(130.0, last_heard=99.9) < 1.0
    assert silence.at(130.1, last_heard=130.05) == pytest.approx(0.05)
    for now in range(131, 137):  # each look is late
        seconds = silence.at(now, last_heard=130.05)
    assert core_life.STALL_S < seconds < 2 * core_life.STALL_S, "it does count for ever"


async def test_a_pulse_is_a_sign_of_life(address: str) -> None:
    with FakeCore(address) as core:
        client, recorder = await connected(address)
        for _ in range(3):
            heard_at = client.link.last_heard
            core.push(Pulse())
            async with asyncio.timeout(WAIT_S):
                while client.link.last_heard == heard_at:
                    await asyncio.sleep(0.01)
        assert recorder.heard == []
        await client.close()


async def test_a_core_that_says_it_gets_nowhere_is_stalled_however_often_it_speaks(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core_life, "STALL_S", WAIT_S)  # its word alone counts here
    with FakeCore(address) as core:
        client, _ = await connected(address)
        for seconds, stalled in [(0.0, False), (1.0, True), (0.1, False)]:
            core.push(msgspec.structs.replace(STATUS, stalled_s=seconds))
            async with asyncio.timeout(WAIT_S):
                while client.is_stalled is not stalled:
                    core.push(Pulse())
                    await asyncio.sleep(0.02)
        assert "finishes no step" in caplog.text and "goes on" in caplog.text
        await client.close()


async def test_a_slow_core_that_asks_for_patience_is_not_stalled(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by silence nor by its word that no step has finished, until its time is up."""
    monkeypatch.setattr(core_life, "STALL_S", 0.05)
    slow = msgspec.structs.replace(STATUS, stalled_s=10.0, patience_s=3600.0)
    with FakeCore(address) as core:
        client, _ = await connected(address)
        core.push(Pulse(3600.0))
        async with asyncio.timeout(WAIT_S):  # it may be stalled before this has come
            while client.is_stalled or not client._patience_s:
                await asyncio.sleep(0.02)
        caplog.clear()
        for message in (Pulse(3600.0), slow):
            core.push(message)
            await asyncio.sleep(5 * core_life.WATCH_INTERVAL_S)  # many times STALL_S
            assert not client.is_stalled and not caplog.text
        core.push(Pulse())
        async with asyncio.timeout(WAIT_S):
            while not client.is_stalled:
                await asyncio.sleep(0.02)
        await client.close()


def test_a_stall_is_visible_within_two_seconds_by_the_intervals_alone() -> None:
    """And many pulses must be missed before, so that a busy machine does not look like one."""
    latest = core_life.STALL_S + core_life.WATCH_INTERVAL_S
    # A client that was itself late looks once more.
    assert latest + core_life.WATCH_INTERVAL_S + PULSE_INTERVAL_S <= 2.0
    assert core_life.STALL_S >= 5 * PULSE_INTERVAL_S


# ---- death


async def test_a_vanished_core_fails_everything_pending(address: str) -> None:
    core = FakeCore(address).__enter__()
    client, recorder = await connected(address)
    call = asyncio.create_task(client.call(ResetPrefixCache()))
    status = asyncio.create_task(client.status())
    await asyncio.to_thread(core.wait_for, Call)
    core.die()
    error = await failure_of(call)
    assert "closed the connection" in str(error)
    await failure_of(status)
    assert [str(one) for one in recorder.heard] == [str(error)]
    for late in (client.call(ResetPrefixCache()), client.status()):
        await failure_of(asyncio.ensure_future(late))
    with pytest.raises(EngineDeadError):
        client.send(Heartbeat())
    await client.close()


@pytest.mark.parametrize("from_outside", [False, True])
async def test_last_words_are_the_root_cause(address: str, from_outside: bool) -> None:
    core = FakeCore(address).__enter__()
    client, recorder = await connected(address)
    core.push(CoreFailed("CUDA error 700", "where it was", from_outside=from_outside))
    await recorder.dead.wait()
    core.die()
    error = await failure_of(asyncio.ensure_future(client.status()))
    assert (str(error), error.details) == ("CUDA error 700", "where it was")
    assert error.is_crash is not from_outside
    await client.close()
    assert len(recorder.heard) == 1, "said once"


async def test_closing_fails_what_is_pending(address: str) -> None:
    with FakeCore(address) as core:
        client, recorder = await connected(address)
        call = asyncio.create_task(client.call(ResetPrefixCache()))
        await asyncio.to_thread(core.wait_for, Call)
        await client.close()
        await client.close()
        assert "closed" in str(await failure_of(call))
        assert recorder.dead.is_set()


async def test_a_message_nobody_can_read_ends_the_line(address: str) -> None:
    with FakeCore(address) as core:
        client, recorder = await connected(address)
        core.push(Hello())  # type: ignore[arg-type]
        async with asyncio.timeout(WAIT_S):
            await recorder.dead.wait()
        assert "connection to the core failed" in str(recorder.heard[0])
        await client.close()


async def test_a_watch_that_fails_ends_the_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would notice a core's death any more."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("no clock")

    monkeypatch.setattr(core_life, "Silence", broken)
    with FakeCore(address):
        recorder = Recorder()
        client = life_of(address, recorder)
        with contextlib.suppress(EngineDeadError):  # it may have been greeted before
            await client.connect()
        async with asyncio.timeout(WAIT_S):
            await recorder.dead.wait()
        assert "failed: ZeroDivisionError" in str(recorder.heard[0])
        await client.close()


@pytest.fixture
def process(address: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.frontend.fake_core", address]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "signal 9"), (signal.SIGSEGV, "signal 11")]
)
async def test_an_owned_process_that_is_killed(
    address: str,
    process: "subprocess.Popen[bytes]",
    number: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_life, "EXIT_S", WAIT_S)  # its sockets may be closed long before
    client = life_of(address, process=process)
    await client.connect()
    call = asyncio.create_task(client.call(ResetPrefixCache()))
    await asyncio.sleep(0.1)
    process.send_signal(number)
    assert words in str(await failure_of(call))
    await client.close()


async def test_an_owned_process_that_ends_before_it_binds(address: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        client = life_of(address, process=process)
        with pytest.raises(EngineDeadError, match="exited with code 3"):
            await client.connect()
        await client.close()


@pytest.mark.parametrize(
    ("ending", "is_crash"),
    [
        ("sys.exit(1)", True),  # an exception that nobody caught
        ("sys.exit(0)", False),
        ("sys.exit(5)", False),
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("os.kill(os.getpid(), signal.SIGABRT)", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("os.kill(os.getpid(), signal.SIGTERM)", False),
    ],
)
async def test_whether_a_core_failed_by_itself(address: str, ending: str, is_crash: bool) -> None:
    recorder = Recorder()
    command = [sys.executable, "-c", f"import os, signal, sys; {ending}"]
    with subprocess.Popen(command) as process:
        client = life_of(address, recorder, process=process)
        with pytest.raises(EngineDeadError):
            await client.connect()
        await client.close()
    (error,) = recorder.heard
    assert isinstance(error, EngineDeadError) and error.is_crash is is_crash


# ---- to the second, by a clock of the test's own


def test_silence_counts_while_this_process_runs() -> None:
    """A look that comes late counts as one in its time and a pulse that was missed."""
    silence = Silence(100.0)
    interval = core_life.WATCH_INTERVAL_S
    looked = [silence.at(100.0 + i * interval, last_heard=90.0) for i in (1, 2, 3)]
    assert looked == pytest.approx([interval, 2 * interval, 3 * interval])
    late = silence.at(200.0, last_heard=90.0)
    assert late == pytest.approx(4 * interval + PULSE_INTERVAL_S)
    assert silence.at(200.1, last_heard=200.05) == pytest.approx(0.05)
    assert silence.at(200.2, last_heard=200.2) == 0.0


class Watched:
    """A life whose link is a stand-in, watched by a clock that goes on as its watch sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = self.began = 1000.0
        self.sent: list[tuple[float, ToCore]] = []
        self.recorder = Recorder()
        self.turns = 10**6
        monkeypatch.setattr(core_life, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.life = life_of("ipc:///x", self.recorder, **options)
        self.life.link.close()
        self.link: Any = SimpleNamespace(
            last_heard=self.now, has_met=False, send=lambda one: self.sent.append((self.now, one))
        )
        self.life.link = self.link
        monkeypatch.setattr(core_life.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 6)
        self.turns -= 1
        if self.turns == 0:
            self.life._die(EngineDeadError("the test is over"))

    async def death(self, timeout_s: float) -> tuple[float, str]:
        """After how long, and of what."""
        await self.life._watch_clock(timeout_s)
        (error,) = self.recorder.heard
        return round(self.now - self.began, 6), str(error)


async def test_nobody_is_waited_for_longer_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    after_s, why = await Watched(monkeypatch).death(5.0)
    assert after_s == pytest.approx(5.0 + core_life.WATCH_INTERVAL_S)
    assert why.startswith("no core answers at ipc:///x (waited 5 s): start one")


@pytest.mark.parametrize("met", [True, False])
async def test_whoever_has_been_met_or_is_owned_may_load_but_not_in_silence(
    monkeypatch: pytest.MonkeyPatch, met: bool
) -> None:
    process = None if met else SimpleNamespace(poll=lambda: None)
    one = Watched(monkeypatch, process=process)
    one.link.has_met = met
    after_s, why = await one.death(5.0)
    assert after_s == pytest.approx(core_life.SILENCE_S + core_life.WATCH_INTERVAL_S)
    assert why == "the core at ipc:///x was silent for 120 s"


async def test_heartbeats_come_in_their_time_once_there_is_a_welcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Watched(monkeypatch)
    one.life.on_message(WELCOME)
    interval = core_life.HEARTBEAT_INTERVAL_S
    one.turns = round(2.5 * interval / core_life.WATCH_INTERVAL_S)
    _, why = await one.death(5.0)
    assert why == "the test is over" and one.life.is_stalled, "it is only told of"
    assert [at - one.began for at, _ in one.sent] == pytest.approx([interval, 2 * interval])
    assert {type(message) for _, message in one.sent} == {Heartbeat}


@pytest.mark.parametrize(
    ("silent_s", "stuck_s", "patience_s", "stalled"),
    [
        (core_life.STALL_S, 0.0, 0.0, False),
        (core_life.STALL_S + 0.01, 0.0, 0.0, True),
        (0.0, core_life.NO_PROGRESS_S, 0.0, False),
        (0.0, core_life.NO_PROGRESS_S + 0.01, 0.0, True),
        (9.0, 9.0, 9.0, False),
        (9.1, 0.0, 9.0, True),
        (0.0, 9.1, 9.0, True),
    ],
)
async def test_what_is_a_stall(
    caplog: pytest.LogCaptureFixture,
    silent_s: float,
    stuck_s: float,
    patience_s: float,
    stalled: bool,
) -> None:
    life = life_of("ipc:///x")
    status = msgspec.structs.replace(STATUS, stalled_s=stuck_s, patience_s=patience_s)
    life.on_message(status)
    for _ in range(2):
        life._watch_stall(silent_s)
        assert life.is_stalled is stalled and len(caplog.records) == stalled
    life.on_message(STATUS)
    life._watch_stall(0.0)
    assert not life.is_stalled and len(caplog.records) == 2 * stalled
    await life.close()
