"""The core process: one ROUTER socket, its clients, and the busy loop around `EngineCore`.

`launch` calls `CoreServer` in a process of its own. Idle, it blocks in poll; busy, it polls with 0
between steps. A bad frame or request costs its sender a typed error and nobody else anything; a
client that does not read, or is gone, costs bounded memory and time.
"""

import logging
import math
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from nanovllm.config import EngineConfig
from nanovllm.core.admission import OverloadedError
from nanovllm.core.clients import Client, ClientTable, Delivery, Intake, finished_message
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.events import CoreListener
from nanovllm.core.failures import Failure
from nanovllm.core.grammar import GrammarCompiler, MakeCompiler
from nanovllm.core.lifetime import ExitCode, LifeFile, watching_for_stalls
from nanovllm.core.operations import MakeViewer, Operations, answer_call
from nanovllm.core.quarantine import Held, Quarantine
from nanovllm.core.sequence import Sequence
from nanovllm.core.socket import Endpoint
from nanovllm.executor.base import Executor
from nanovllm.keys import CoreKeys
from nanovllm.protocol.messages import (
    PROTOCOL_VERSION,
    PULSE_INTERVAL_S,
    STALL_S,
    STATUS_INTERVAL_S,
    Abort,
    AddRequest,
    Call,
    CoreFailed,
    CoreStatus,
    DeathsExplained,
    Detached,
    FinishReason,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Overloaded,
    Pulse,
    RequestFailed,
    ToCore,
    TrialAccepted,
    TrialOffered,
    TrialOver,
    Welcome,
)
from nanovllm.protocol.plan import DeviceLostError, WorkerInfo

LOG = logging.getLogger(__name__)
LOADING_INTERVAL_S = 0.1
GREETING_S = 1.0  # for whoever has started a core that fails at once to say Hello, and be told why
BACKLOG_INTERVAL_S = 0.02  # how soon an idle core tries again to send to a client that did not read
IDLE_BEFORE_WARM_UP_S = 0.25
WARM_UP_S = 60.0  # what warming up one kind of step may take: kernels may have to be compiled
MAX_FRAMES_PER_TURN = 256  # then the next step runs, however many more are waiting
LATE_S = 0.5  # by as much as a turn takes longer than that, leases are extended
NUM_EXPLAINED = 64  # lives of the core that are remembered as explained
SILENT = "the client was silent for its whole lease"
UNKNOWN = "the core does not know this client: say Hello"
MakeListener = Callable[[EngineCore, WorkerInfo], CoreListener]


class CpuClock:
    """Adds up the CPU time of this thread but between `pause` and `resume`; waiting costs 0."""

    __slots__ = ("_seconds", "_since")

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, time.thread_time()

    def resume(self) -> None:
        self._since = time.thread_time()

    def pause(self) -> None:
        self._seconds += time.thread_time() - self._since

    def read(self) -> float:
        """Seconds; while it is not paused."""
        return self._seconds + time.thread_time() - self._since


class CoreServer:
    """Serves any number of clients at `address` until `stop` or `drain` is called."""

    def __init__(
        self,
        config: EngineConfig,
        address: str,
        *,
        keys: CoreKeys | None = None,
        make_viewer: MakeViewer | None = None,
        listeners: Collection[MakeListener] = (),
        stall_log: Path | None = None,
        life_file: Path | None = None,
    ) -> None:
        """Bind, so that clients can attach while the model loads. `ValueError`: a bad address.

        keys: those of a core that other machines may reach. make_viewer: of who shows the core to
        clients. listeners: of who is told what happens in the core. stall_log: the file that gets
        the stacks of a stall; by default they go to stderr. life_file: where the next core at the
        address will read whether this one crashed.
        """
        service = config.service
        self._config = config
        self._make_viewer = make_viewer
        self._listeners = listeners
        self._stall_log = stall_log
        self._epoch = secrets.token_hex(8)
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._clients = ClientTable(max_clients=service.max_clients, lease_s=service.client_lease_s)
        self._intake = Intake(self._clients)
        self._core: EngineCore | None = None
        self._operations: Operations | None = None
        self._quarantine = Quarantine()
        self._explained: deque[str] = deque(maxlen=NUM_EXPLAINED)
        self._info: WorkerInfo | None = None
        self._stopping = self._draining = self._has_failed = False
        self._exit_code = ExitCode.DONE
        self._drain_until = math.inf
        self._last_loading = Loading("starting", 0.0)
        self._loading_due = self._pulse_due = self._status_due = 0.0
        self._awake_at = time.monotonic()
        self._clock = CpuClock()  # of all that is not a step: receiving, sorting, sending
        self._endpoint = Endpoint(address, max_frame_bytes=service.max_frame_bytes, keys=keys)
        self._delivery = Delivery(self._endpoint)
        self._life = LifeFile(life_file, self._epoch)
        # A byte on this pair interrupts a blocking poll, from a signal handler or a thread.
        self._wakeup, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeup.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._endpoint.socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    def drain(self) -> None:
        """Take no new requests, and end when those there have finished or `drain_timeout` has
        passed; callable from signal handlers and other threads."""
        self._drain_until = time.monotonic() + self._config.service.drain_timeout
        self._draining = True
        self._wake()

    def stop(self) -> None:
        """Ask the loop to end now, aborting what runs; callable like `drain`."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Release the address. Nothing can be served afterwards."""
        self._stopping = True
        self._life.close()
        self._endpoint.close()
        self._wakeup.close()
        self._waker.close()

    def on_progress(self, phase: str, progress: float) -> None:
        """Answer clients while the executor loads; called by the loading code, often."""
        if self._stopping or self._draining:
            raise SystemExit(0)
        now = time.monotonic()
        if phase != self._last_loading.phase or now >= self._loading_due:
            self._loading_due = now + LOADING_INTERVAL_S
            self._last_loading = Loading(phase, progress)
            self._receive_all()
            for client in self._clients:
                self._delivery.post(client.identity, self._last_loading)
            self._flush()

    def run(
        self, make_executor: Callable[[], Executor], make_compiler: MakeCompiler | None = None
    ) -> ExitCode:
        """Load, then serve until stopped. Whatever goes wrong is told to every client first.

        make_compiler: for structured outputs, which are refused without.
        """
        executor: Executor | None = None
        try:
            self.on_progress("starting", 0.0)
            executor = make_executor()
            self._run(self._load(executor, make_compiler))
        except Exception as error:
            self._tell_failure(error)
            raise
        finally:
            if executor is not None:
                executor.shutdown()
            self.close()
        return self._exit_code

    def _load(self, executor: Executor, make_compiler: MakeCompiler | None) -> EngineCore:
        """The core, once its executor can run steps."""
        self._info = executor.start()
        compiler = make_compiler(self._info) if make_compiler else None
        loading: threading.Thread | None = None
        if compiler is not None and self._config.grammar.grammar_preload:
            loading = threading.Thread(target=_preload, args=[compiler], daemon=True)
            loading.start()
        executor.allocate(self._info.num_blocks)
        if loading is not None:
            loading.join()
        core = EngineCore(self._config, executor, self._info, compiler, self._wake, self._forewarn)
        for make_listener in self._listeners:
            core.listen(make_listener(core, self._info))
        return core

    def _run(self, core: EngineCore) -> None:
        """Welcome who has waited, go round until stopped, and end what runs then."""
        viewer = None if self._make_viewer is None else self._make_viewer(core)
        self._core, self._operations = core, Operations(core, viewer)
        self._clients.extend_leases(time.monotonic() - self._awake_at)
        self._awake_at = time.monotonic()
        # When there will have been nothing to do for a while.
        self._warm_up_from = self._awake_at + IDLE_BEFORE_WARM_UP_S
        for client in self._clients:
            self._answer(client, self._welcome(client))
        self._flush()
        with watching_for_stalls(
            lambda: core.stalled_s,
            lambda: max(self._config.service.stall_timeout, core.patience.seconds),
            log=self._stall_log,
        ):
            self._clock.resume()
            while not self._stopping:
                self._turn(core)
        if self._draining and core.num_unfinished and self._exit_code is ExitCode.DONE:
            self._exit_code = ExitCode.CUT_SHORT
        for client in self._clients:
            self._finish(core.abort_client(client.client_id))
        self._flush()

    # ---- the busy loop

    def _turn(self, core: EngineCore) -> None:
        now = time.monotonic()
        late_s = now - self._awake_at
        is_pulse = now >= min(self._pulse_due, self._warm_up_from)
        if is_pulse:
            self._pulse_due = now + PULSE_INTERVAL_S
            if not core.busy:  # else a step tells
                core.executor.check()
            self._send_pulse(core, now)
        if not core.may_step(now) and not self._intake:
            late_s += self._wait(core, now)
        self._awake_at = time.monotonic()
        if late_s > LATE_S:
            self._clients.extend_leases(late_s)
        self._receive_all()
        if is_pulse:  # often enough, and there are many turns in between
            self._forget_silent()
        if core.next_deadline <= self._awake_at:
            self._finish(core.expire(self._awake_at))
        if core.may_step(self._awake_at) and not self._stopping:
            self._step(core)
        if self._quarantine.is_active:
            self._go_on_with_trials(core, self._awake_at)
        self._flush()
        if self._draining:
            core.pace.release(self._awake_at)
            self._end_drain(core)

    def _step(self, core: EngineCore) -> None:
        self._clock.pause()
        outputs = core.step()
        self._clock.resume()
        if self._warm_up_from < math.inf:
            self._warm_up_from = self._awake_at + IDLE_BEFORE_WARM_UP_S
        if outputs is not None:
            self._clients.collect(outputs)
            self._finish(outputs.finished)
            self._finish(outputs.failed)

    def _go_on_with_trials(self, core: EngineCore, now: float) -> None:
        self._end_held(self._quarantine.expire(now), "timeout")
        for held in self._quarantine.take_others(now):
            self._release(held, now)
        if core.all_have_begun and (suspect := self._quarantine.offer(now)) is not None:
            client = self._clients.with_id(suspect.client_id)
            assert client is not None, "withdrawn when its client went"
            self._answer(client, TrialOffered(suspect.request.number))

    def _wait(self, core: EngineCore, now: float) -> float:
        """Until something arrives or is due; if nothing has been wanted for a while, warm up.

        Returns how much longer it took than meant.
        """
        due = min(self._pulse_due, self._drain_until)
        if core.busy:  # it is held, and what else is due can wait for the next pulse
            due = min(due, core.pace.next_step_at)
        else:
            due = min(due, core.next_deadline, max(now, self._warm_up_from))
        if any(client.has_mail for client in self._clients):
            due = min(due, now + BACKLOG_INTERVAL_S)
        timeout_s = max(0.0, due - now)
        may_warm_up = not core.busy and now >= self._warm_up_from
        if not self._poll(int(timeout_s * 1e3) + 1) and may_warm_up:
            self._warm_up(core)
        return time.monotonic() - now - timeout_s

    def _poll(self, timeout_ms: int) -> bool:
        """Wait until something arrives, or somebody calls `_wake`. Returns whether that was so."""
        found = [source for source, _ in self._poller.poll(timeout_ms)]
        if self._wakeup.fileno() in found:
            self._wakeup.recv(1024)
        return bool(found)

    def _warm_up(self, core: EngineCore) -> None:
        self._clock.pause()
        if not core.executor.warm_up():
            self._warm_up_from = math.inf
        self._clock.resume()

    def _send_pulse(self, core: EngineCore, now: float) -> None:
        patience_s = core.patience.seconds
        if now >= self._warm_up_from:
            patience_s = max(patience_s, WARM_UP_S)
        pulse: Pulse | CoreStatus = Pulse(patience_s)
        if now >= self._status_due:
            self._status_due = now + STATUS_INTERVAL_S
            pulse = msgspec.structs.replace(
                core.status(epoch=self._epoch, num_clients=len(self._clients)),
                num_expired_clients=self._clients.num_expired,
                draining=self._draining,
                loop_cpu_s=time.thread_time(),
                messaging_cpu_s=self._clock.read(),
                explained_epochs=list(self._explained),
                patience_s=patience_s,
            )
        for client in self._clients:
            if self._delivery.post(client.identity, pulse) == "gone":
                self._forget(client)

    def _forewarn(self) -> None:
        """A long step begins, during which clients hear nothing."""
        assert self._core is not None
        if (patience_s := self._core.patience.seconds) > STALL_S:
            for client in self._clients:
                self._delivery.post(client.identity, Pulse(patience_s))

    def _end_drain(self, core: EngineCore) -> None:
        is_idle = not core.num_unfinished and not self._quarantine.is_active
        done = is_idle and not any(client.has_mail for client in self._clients)
        if done or time.monotonic() >= self._drain_until:
            self._stopping = True
            self._exit_code = ExitCode.DONE if done else ExitCode.DRAIN_TIMEOUT

    def _wake(self) -> None:
        with suppress(OSError):  # the loop may have seen it and closed everything by now
            self._waker.send(b"\0")

    def _receive_all(self) -> None:
        """Take in what has arrived, up to a limit, requests last; never blocks."""
        for _ in range(MAX_FRAMES_PER_TURN):
            if self._intake.is_full or (received := self._endpoint.receive()) is None:
                break
            self._receive(*received)
        while not (self._core and self._core.lets_device_wait) and (new := self._intake.next()):
            client, request = new
            if request.is_suspect or self._quarantine.is_active:
                self._quarantine.hold(client.client_id, request, self._awake_at)
            else:
                self._add(client, request)

    def _receive(self, identity: bytes, frames: list[bytes], key: str | None) -> None:
        client = self._clients.find(identity)
        if client is not None and client.key != key:
            self._forget(client)  # another connection has taken the identity
            client = None
        if client is not None:
            client.last_heard = self._awake_at
        try:
            (frame,) = frames
            message = self._decoder.decode(frame)
        except Exception as error:  # whatever bytes may do to a decoder: too deep, too large, odd
            return self._refuse_frame(identity, client, error)
        match message:
            case Hello(protocol_version):
                self._greet(identity, key, client, protocol_version)
            case _ if client is None:
                self._delivery.post(identity, Detached(UNKNOWN))
            case _ if self._has_failed:
                pass  # its client asks the next core
            case AddRequest():
                self._intake.add(client, message)
            case _:
                self._serve(client, message)

    def _refuse_frame(self, identity: bytes, client: Client | None, error: Exception) -> None:
        failure = RequestFailed(-1, f"bad frame: {error}")
        if client is None:
            self._delivery.post(identity, failure)
        else:
            self._answer(client, failure)

    def _serve(self, client: Client, message: ToCore) -> None:
        match message:
            case Abort(numbers):
                for request in self._intake.take(client, set(numbers)):
                    self._add(client, request)  # so that the abort below ends and answers it
                self._end_held(self._quarantine.withdraw(client.client_id, set(numbers)), "abort")
                if self._core is not None:
                    self._finish(self._core.abort(client.client_id, numbers))
            case TrialAccepted() | TrialOver() | DeathsExplained():
                self._hear(client, message)
            case Goodbye():
                self._forget(client)
            case Call():
                may = self._endpoint.is_operator(client.key)
                answer = answer_call(self._operations, client.client_id, message, is_operator=may)
                self._answer(client, answer)
            case Heartbeat():
                pass

    def _hear(self, client: Client, message: TrialAccepted | TrialOver | DeathsExplained) -> None:
        """What a client says of requests that may have killed a core."""
        match message:
            case TrialAccepted(number):
                if (suspect := self._quarantine.accept(client.client_id, number)) is not None:
                    self._release(suspect, self._awake_at)
            case TrialOver(number):
                self._quarantine.end_trial(client.client_id, number)
            case DeathsExplained(epochs):
                self._explained.extend(one for one in epochs if one not in self._explained)
                self._status_due = self._pulse_due = 0.0  # so that all clients learn of it now

    # ---- what clients ask

    def _greet(
        self, identity: bytes, key: str | None, client: Client | None, protocol_version: int
    ) -> None:
        if protocol_version != PROTOCOL_VERSION:
            text = f"the core speaks protocol {PROTOCOL_VERSION}, the client {protocol_version}: "
            text += "install the same nanovllm on both sides"
            self._delivery.post(identity, CoreFailed(text, details="", usage=True))
        elif client is None and self._clients.is_full:
            text = f"the core has {len(self._clients)} clients already: raise max_clients"
            self._delivery.post(identity, CoreFailed(text, details=""))
        else:
            client = client or self._clients.attach(identity, self._awake_at, key)
            self._answer(client, self._welcome(client) if self._core else self._last_loading)

    def _welcome(self, client: Client) -> Welcome:
        assert self._info is not None
        config, model = self._config, self._config.model
        return Welcome(
            client_id=client.client_id,
            epoch=self._epoch,
            model=model.tokenizer_source,
            served_model_name=model.served_names[0],
            block_size=config.cache.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            worker=self._info,
            other_served_names=model.served_names[1:],
            after_crash_of=self._life.after_crash_of,
        )

    def _add(self, client: Client, request: AddRequest) -> None:
        try:
            if self._core is None:
                raise ValueError("the core is still loading: wait for Welcome")
            if self._draining:
                raise OverloadedError(self._config.service.drain_timeout, draining=True)
            self._core.add(client.client_id, request)
        except OverloadedError as error:
            self._answer(client, Overloaded(request.number, error.retry_after_s, error.draining))
        except Exception as error:
            self._answer(client, RequestFailed(request.number, *Failure.of_refusal(error)))

    def _release(self, held: Held, now: float) -> None:
        """Begin with a request that was held back."""
        client = self._clients.with_id(held.client_id)
        assert client is not None, "withdrawn when its client went"
        if held.is_late(now):
            self._end_held([held], "timeout")
        else:
            self._add(client, held.request_at(now))

    def _forget(self, client: Client) -> None:
        """A client has gone: end what it has running."""
        self._clients.remove(client)
        self._quarantine.withdraw_client(client.client_id)
        if self._core is not None:
            self._core.pace.forget(client.client_id, self._awake_at)
            self._core.abort_client(client.client_id)

    def _forget_silent(self) -> None:
        for client in self._clients.pop_expired(self._awake_at):
            self._forget(client)
            self._delivery.post(client.identity, Detached(SILENT))

    # ---- what clients get

    def _finish(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            client = self._clients.with_id(sequence.client_id)
            if client is None:
                continue
            if sequence.failure is not None:
                self._answer(client, RequestFailed(sequence.number, *sequence.failure))
            else:
                client.outputs.finished.append(finished_message(sequence))

    def _end_held(self, ended: list[Held], reason: FinishReason) -> None:
        for held in ended:
            client = self._clients.with_id(held.client_id)
            if client is not None:
                client.outputs.finished += held.ends(reason)

    def _answer(self, client: Client, message: FromCore) -> None:
        """Queue a message for the next flush, after the outputs that are there."""
        client.answers.append(message)
        if client.asks_too_much:
            self._forget(client)

    def _flush(self) -> None:
        """Send what waits; a client that has left too much unread is paused until it reads."""
        core = self._core
        for client in self._clients:
            if not client.has_mail:
                continue
            sent = self._delivery.deliver(client)
            if sent == "gone":
                self._forget(client)
            elif core is None:
                continue
            elif sent == "sent":
                core.resume(client.client_id)
            elif client.backlog > self._config.service.client_buffer_tokens:
                core.pause(client.client_id)
        failures, self._delivery.failures = self._delivery.failures, []
        for failure in failures:
            assert core is not None
            core.fail(*failure)

    def _tell_failure(self, error: Exception) -> None:
        usage = isinstance(error, ValueError) and self._core is None
        from_outside = isinstance(error, DeviceLostError) and error.from_outside
        text = str(error) or type(error).__name__
        failure = CoreFailed(text, traceback.format_exc(), usage, from_outside)
        if not from_outside:
            self._life.note_failure(failure.details)
        self._last_loading = Loading("failed", 0.0)
        self._has_failed, self._core, self._operations = True, None, None
        self._intake = Intake(self._clients)  # what waits is sent to the next core
        self._receive_all()  # clients that have just sent Hello are told too
        until = time.monotonic() + GREETING_S
        while not self._clients and (left_s := until - time.monotonic()) > 0:
            self._poll(math.ceil(left_s * 1e3))
            self._receive_all()
        for client in self._clients:
            self._delivery.deliver(client)
            self._delivery.post(client.identity, failure)


def _preload(compiler: GrammarCompiler) -> None:
    try:
        compiler.load()
    except Exception as error:  # whoever asks for structured outputs will be told
        LOG.info("structured outputs will not be possible: %s", error)
