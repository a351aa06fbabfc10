"""One life of a core as its client sees it: greeting, heartbeats, calls, stalls, death.

Made by `Supervisor`, one after the other. Invariant: nothing waits for ever. Every wait has a
bound, or is woken when the core dies, which is noticed by the broken connection however the
process ended. What comes at every step does not pass here, but from `Link` to the requests.
"""

import asyncio
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import zmq

from nanovllm.frontend.errors import DetachedError, EngineDeadError, NotAllowedError
from nanovllm.frontend.link import Link
from nanovllm.keys import ClientKeys
from nanovllm.protocol.messages import (
    HEARTBEAT_INTERVAL_S,
    PULSE_INTERVAL_S,
    STALL_S,
    Answer,
    Call,
    CallResult,
    CoreFailed,
    CoreStatus,
    Detached,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Operation,
    Outputs,
    Overloaded,
    Pulse,
    RequestFailed,
    ToCore,
    TrialOffered,
    Welcome,
)
from nanovllm.protocol.plan import FAULTS

CONNECT_TIMEOUT_S = 10.0  # until a core answers at the address
SILENCE_S = 120.0  # most between two messages of a core that loads
CALL_TIMEOUT_S = 60.0
NO_PROGRESS_S = 0.75  # of a loop that goes round and finishes no step, as `CoreStatus` says
LAST_WORDS_S = 0.1  # for a CoreFailed still in the socket, after the connection has broken
EXIT_S = 1.0  # for an owned process to end, after the connection has broken
WATCH_INTERVAL_S = 0.1

T = TypeVar("T")
logger = logging.getLogger(__name__)
ProgressCallback = Callable[[str, float], None]


class Requests(Protocol):
    """The live requests: told what the core says of them, in order, in the event loop."""

    def on_outputs(self, outputs: Outputs) -> None: ...

    def on_request_failed(self, failure: RequestFailed | Overloaded) -> None: ...

    def on_trial_offered(self, number: int) -> None: ...


class Silence:
    """How long the core has been silent while this process ran: when it stood still itself, the
    core may have as well, or has spoken and nobody was there to hear it."""

    def __init__(self, now: float) -> None:
        self._looked_at, self._seconds = now, 0.0

    def at(self, now: float, *, last_heard: float) -> float:
        """As of `now`; asked once a `WATCH_INTERVAL_S`."""
        self._seconds += min(now - self._looked_at, WATCH_INTERVAL_S + PULSE_INTERVAL_S)
        self._seconds = min(self._seconds, now - last_heard)
        self._looked_at = now
        return self._seconds


class CoreLife:
    """The core at `address` until it dies, of which `on_death` is told, once and last.

    process: given if this frontend owns it. on_progress: called while it loads.
    """

    def __init__(
        self,
        address: str,
        requests: Requests,
        on_death: Callable[[EngineDeadError], None],
        *,
        process: "subprocess.Popen[bytes] | None" = None,
        on_progress: ProgressCallback | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self.address = address
        self._requests = requests
        self._on_death = on_death
        self._process = process
        self._on_progress = on_progress
        self.link = Link(address, self, requests.on_outputs, keys=keys)
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: dict[int, asyncio.Future[Answer | None]] = {}
        self._num_calls = 0
        self._failure: CoreFailed | None = None
        self._error: EngineDeadError | None = None
        self._closed = False
        self.is_stalled = False  # it has been silent for too long, or says that no step finishes
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._status: CoreStatus | None = None
        self._patience_s = 0.0  # how long the core may be silent now, as it has said itself
        self._status_or_death = asyncio.Event()

    @property
    def is_alive(self) -> bool:
        """Welcomed, and neither dead nor closed."""
        return self._welcome.done() and self._error is None and not self._closed

    @property
    def latest_status(self) -> CoreStatus | None:
        """What the core has said last; None: nothing yet."""
        return self._status

    @property
    def explained_epochs(self) -> list[str]:
        """Lives before this one that ended by requests which will not be sent again."""
        return [] if self._status is None else self._status.explained_epochs

    async def connect(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Welcome:
        """Greet the core and wait until it is ready, which may take minutes of `Loading`.

        timeout_s: how long to wait for somebody at the address. Raises `ValueError` if the address
        or the core's configuration is wrong, `EngineDeadError` if the core dies or never answers.
        """
        try:
            self.link.connect()
        except zmq.ZMQError as error:
            raise ValueError(
                f"address {self.address!r} cannot be connected to ({error}): "
                "use ipc://PATH or tcp://HOST:PORT"
            ) from None
        self._start(self._watch_clock(timeout_s))
        self.send(Hello())
        return await asyncio.shield(self._welcome)

    def send(self, message: ToCore) -> None:
        """Queue a message; raises `EngineDeadError` if nobody is there to get it."""
        self._check_alive()
        self.link.send(message)

    async def call(
        self, operation: Operation, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Answer | None:
        """Have the core do something. Raises `EngineDeadError`, `TimeoutError`, or
        `RuntimeError` with the core's reason (`NotAllowedError`: the client's key)."""
        call_id = self._num_calls
        self._num_calls += 1
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self.send(Call(call_id, operation))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            name = type(operation).__name__
            raise TimeoutError(f"the core did not answer {name} within {timeout_s:g} s") from None
        finally:
            del self._calls[call_id]

    async def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> CoreStatus:
        """The latest the core has sent, which it does once a second."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._status_or_death.wait()
        except TimeoutError:
            raise TimeoutError(f"the core sent no status within {timeout_s:g} s") from None
        self._check_alive()
        assert self._status is not None
        return self._status

    async def close(self) -> None:
        """Say goodbye and let go of the socket. Whatever is still pending fails."""
        if self._closed:
            return
        if self._error is None:
            self.link.send(Goodbye())
            self._die(EngineDeadError("the engine has been closed"))
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.link.close()

    # ---- what `Link` tells

    def on_message(self, message: FromCore) -> None:
        """`Link`: anything but outputs."""
        match message:
            case Pulse(patience_s):
                self._patience_s = patience_s
            case CoreStatus():
                self._status = message
                self._patience_s = message.patience_s
                self._status_or_death.set()
            case RequestFailed() | Overloaded():
                self._requests.on_request_failed(message)
            case TrialOffered(number):
                self._requests.on_trial_offered(number)
            case CallResult():
                self._finish_call(message)
            case Loading(phase, progress) if self._on_progress is not None:
                self._on_progress(phase, progress)
            case Welcome():
                _resolve(self._welcome, message)
            case Detached(reason):
                self._die(DetachedError(f"the core has let this client go: {reason}"))
            case CoreFailed(text, details):
                self._failure = message
                self._die(EngineDeadError(text, details, is_crash=not message.from_outside))

    def on_disconnected(self) -> None:
        """`Link`: the core is gone."""
        self._start(self._bury(f"the core at {self.address} closed the connection"))

    def on_failure(self, error: Exception) -> None:
        """Whatever fails must not leave others waiting for what it would have brought."""
        self._die(EngineDeadError(f"the connection to the core failed: {error!r}"))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.on_failure(error)

    def _finish_call(self, answer: CallResult) -> None:
        future = self._calls.get(answer.call_id)
        if future is None:
            return  # it has timed out here
        if answer.error is None:
            _resolve(future, answer.result)
        else:
            kind = NotAllowedError if answer.is_refused else RuntimeError
            _reject(future, kind(answer.error))

    async def _watch_clock(self, connect_timeout_s: float) -> None:
        """Notice an owned process that ends, and silence before Welcome; send heartbeats."""
        started = last_beat = now = time.monotonic()
        silence = Silence(now)
        while self._error is None:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = time.monotonic()
            if self._process is not None and self._process.poll() is not None:
                await self._bury("the core ended")
            elif self._welcome.done():
                self._watch_stall(silence.at(now, last_heard=self.link.last_heard))
                if now - last_beat >= HEARTBEAT_INTERVAL_S and self._error is None:
                    last_beat = now
                    self.send(Heartbeat())
            elif now - self.link.last_heard > SILENCE_S:
                self._die(
                    EngineDeadError(f"the core at {self.address} was silent for {SILENCE_S:g} s")
                )
            elif not (self.link.has_met or self._process) and now - started > connect_timeout_s:
                self._die(
                    EngineDeadError(
                        f"no core answers at {self.address} (waited {connect_timeout_s:g} s): "
                        f"start one with nanovllm-core --address {self.address}"
                    )
                )

    def _watch_stall(self, silent_s: float) -> None:
        """Nothing is done about a stall but to tell of it: a core may be stuck, or stopped, or in
        a very long step, and it loses nothing by being waited for. One whose steps have all been
        long of late is slow, and not stalled."""
        stuck_s = 0.0 if self._status is None else self._status.stalled_s
        is_stuck = stuck_s > max(NO_PROGRESS_S, self._patience_s)
        if self.is_stalled != (is_stuck or silent_s > max(STALL_S, self._patience_s)):
            self.is_stalled = not self.is_stalled
            state = "goes on"
            if self.is_stalled:
                state = "finishes no step" if is_stuck else f"has been silent for {silent_s:.1f} s"
            logger.warning("the core at %s %s", self.address, state)

    # ---- death

    async def _bury(self, what: str) -> None:
        """Wait a moment for the root cause, then declare the core dead."""
        deadline = time.monotonic() + (LAST_WORDS_S if self._process is None else EXIT_S)
        while time.monotonic() < deadline and self._error is None:
            await asyncio.sleep(0.02)
            if self._process is not None and self._process.poll() is not None:
                deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
        code = None if self._process is None else self._process.poll()
        if code is None:
            self._die(EngineDeadError(what))
        else:
            self._die(EngineDeadError(_ending(code), is_crash=code == 1 or -code in FAULTS))

    def _die(self, error: EngineDeadError) -> None:
        """Fail everything pending with `error`; the first cause stands."""
        if self._error is not None:
            return
        self._error = error
        usage = self._failure is not None and self._failure.usage
        _reject(self._welcome, ValueError(str(error)) if usage else error.again())
        self._status_or_death.set()
        for future in self._calls.values():
            _reject(future, error.again())
        self._on_death(error)

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error.again()


def _ending(exit_code: int) -> str:
    """How a process ended, in words."""
    if exit_code < 0:
        return f"the core was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"the core exited with code {exit_code}"


def _resolve(future: "asyncio.Future[T]", result: T) -> None:
    """The waiter may have been cancelled, or failed, in the meantime."""
    if not future.done():
        future.set_result(result)


def _reject(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as retrieved: there may be no waiter any more
