"""The core process: one ROUTER socket, its clients, and the busy loop around `EngineCore`.

`launch` calls `CoreServer` in a process of its own. Idle, it blocks in poll; busy, it polls with 0
between steps. A bad frame or request costs its sender a typed error and nobody else anything.
"""

import os
import secrets
import signal
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import MakeCompiler
from nanovllm.core.scheduler import StepOutputs
from nanovllm.core.sequence import Sequence
from nanovllm.executor.base import Executor
from nanovllm.protocol import (
    PROTOCOL_VERSION,
    STATUS_INTERVAL_S,
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    Finished,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Loading,
    Outputs,
    PromptLogprobs,
    RequestFailed,
    Started,
    ToCore,
    Welcome,
    WorkerInfo,
)

HIGH_WATER_MARK = 1000  # messages per client in each direction, before merging starts
LINGER_MS = 1000  # how long the last words to clients may take to leave
LOADING_INTERVAL_S = 0.1
OWNER_GRACE_S = 5.0  # what a core may take to end by itself after its owner has gone


class Client:
    """A connected frontend and what waits to be sent to it."""

    __slots__ = ("client_id", "identity", "outputs")

    def __init__(self, client_id: int, identity: bytes) -> None:
        self.client_id = client_id
        self.identity = identity
        self.outputs = Outputs()


class CoreServer:
    """Serves any number of clients at `address` until `stop` is called."""

    def __init__(self, config: EngineConfig, address: str) -> None:
        """Bind, so that clients can attach while the model loads. `ValueError`: address in use."""
        self._config = config
        self._epoch = secrets.token_hex(8)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._clients: dict[bytes, Client] = {}
        self._clients_by_id: dict[int, Client] = {}
        self._num_clients_ever = 0
        self._core: EngineCore | None = None
        self._info: WorkerInfo | None = None
        self._stopping = False
        self._last_loading = Loading("starting", 0.0)
        self._loading_due = self._status_due = 0.0
        self._socket = _bind(address)
        # A byte on this pair interrupts a blocking poll, from a signal handler or a thread.
        self._wakeup, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeup.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wakeup, zmq.POLLIN)

    def stop(self) -> None:
        """Ask the loop to end; callable from signal handlers and other threads."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # the loop may have closed everything by now, or have bytes enough
            self._waker.send(b"\0")

    def close(self) -> None:
        """Release the address. Nothing can be served afterwards."""
        self._stopping = True
        self._socket.close(LINGER_MS)
        self._wakeup.close()
        self._waker.close()

    def on_progress(self, phase: str, progress: float) -> None:
        """Answer clients while the executor loads; called by the loading code, often."""
        if self._stopping:
            raise SystemExit(0)
        now = time.monotonic()
        new_phase = phase != self._last_loading.phase
        if new_phase or now >= self._loading_due:
            self._loading_due = now + LOADING_INTERVAL_S
            self._last_loading = Loading(phase, progress)
            self._receive_all()
            for client in list(self._clients.values()):
                self._send(client, self._last_loading)

    def run(
        self, make_executor: Callable[[], Executor], make_compiler: MakeCompiler | None = None
    ) -> None:
        """Load, then serve until stopped. Whatever goes wrong is told to every client first.

        make_compiler: for structured outputs, which are refused without.
        """
        executor: Executor | None = None
        try:
            self.on_progress("starting", 0.0)
            executor = make_executor()
            self._info = executor.start()
            compiler = make_compiler(self._info) if make_compiler else None
            self._core = EngineCore(self._config, executor, self._info, compiler, self._wake)
            for client in list(self._clients.values()):
                self._send(client, self._welcome(client))
            while not self._stopping:
                self._turn(self._core)
            for client in list(self._clients_by_id.values()):
                self._forget(client, tell=True)
        except Exception as error:
            self._tell_failure(error)
            raise
        finally:
            if executor is not None:
                executor.shutdown()
            self.close()

    # ---- the busy loop

    def _turn(self, core: EngineCore) -> None:
        now = time.monotonic()
        if now >= self._status_due:
            self._status_due = now + STATUS_INTERVAL_S
            status = core.status(epoch=self._epoch, num_clients=len(self._clients))
            for client in list(self._clients.values()):
                self._send(client, status)
        if not core.busy:
            due = min(self._status_due, core.next_deadline)
            self._poller.poll(int(max(0.0, due - now) * 1e3) + 1)
        self._receive_all()
        if core.busy and not self._stopping:
            outputs = core.step()
            if outputs is not None:
                self._collect(outputs)
                self._flush()
            for sequence, message in core.take_failures():
                if sender := self._clients_by_id.get(sequence.client_id):
                    self._send(sender, RequestFailed(sequence.number, message))

    def _receive_all(self) -> None:
        """Take in every frame that has arrived; never blocks."""
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._receive(identity, frames)
        try:
            while self._wakeup.recv(1024):
                pass
        except BlockingIOError:
            pass

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        client = self._clients.get(identity) or self._attach(identity)
        try:
            (frame,) = frames
            message = self._decoder.decode(frame)
        except (ValueError, msgspec.MsgspecError) as error:
            self._send(client, RequestFailed(-1, f"bad frame: {error}"))
            return
        match message:
            case Hello(protocol_version):
                self._greet(client, protocol_version)
            case AddRequest():
                self._add(client, message)
            case Abort(numbers):
                if self._core is not None:
                    self._finish(client, self._core.abort(client.client_id, numbers))
                    self._flush()
            case Heartbeat():
                pass
            case Goodbye():
                self._forget(client)
            case Call(call_id):
                self._call(client, call_id)

    # ---- what clients ask

    def _attach(self, identity: bytes) -> Client:
        client = Client(self._num_clients_ever, identity)
        self._num_clients_ever += 1
        self._clients[identity] = self._clients_by_id[client.client_id] = client
        return client

    def _greet(self, client: Client, protocol_version: int) -> None:
        if protocol_version != PROTOCOL_VERSION:
            self._send(
                client,
                CoreFailed(
                    f"the core speaks protocol {PROTOCOL_VERSION}, the client {protocol_version}: "
                    "install the same nanovllm on both sides",
                    details="",
                    usage=True,
                ),
            )
        elif self._core is None:
            self._send(client, self._last_loading)
        else:
            self._send(client, self._welcome(client))

    def _welcome(self, client: Client) -> Welcome:
        assert self._info is not None
        model = self._config.model
        return Welcome(
            client_id=client.client_id,
            epoch=self._epoch,
            model=model.tokenizer or model.model,
            served_model_name=model.served_model_name or model.model,
            block_size=self._config.cache.block_size,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            worker=self._info,
        )

    def _add(self, client: Client, request: AddRequest) -> None:
        try:
            if self._core is None:
                raise ValueError("the core is still loading: wait for Welcome")
            self._core.add(client.client_id, request)
        except Exception as error:
            self._send(client, RequestFailed(request.number, f"{type(error).__name__}: {error}"))

    def _call(self, client: Client, call_id: int) -> None:
        if self._core is None:
            self._send(client, CallResult(call_id, error="the core is still loading"))
        else:  # ResetPrefixCache is the only operation so far
            self._send(client, CallResult(call_id, result=self._core.reset_prefix_cache()))

    def _forget(self, client: Client, *, tell: bool = False) -> None:
        """A client has gone (or the core goes, and tells it): end what it has running."""
        if self._core is not None:
            aborted = self._core.abort_client(client.client_id)
            if tell:
                self._finish(client, aborted)
                self._flush()
        if self._clients.pop(client.identity, None) is not None:
            del self._clients_by_id[client.client_id]

    # ---- what clients get

    def _collect(self, outputs: StepOutputs) -> None:
        """Sort a step's outputs into the clients' pending messages."""
        clients = self._clients_by_id
        for sequence in outputs.started:
            queued_ms = (sequence.started_at - sequence.queued_at) * 1e3
            started = Started(sequence.number, sequence.num_cached_tokens, queued_ms)
            clients[sequence.client_id].outputs.started.append(started)
        for sequence, logprobs in outputs.prompt_logprobs:
            pending = clients[sequence.client_id].outputs
            pending.prompt_logprobs.append(PromptLogprobs(sequence.number, logprobs))
        for index, sequence in enumerate(outputs.sequences):
            pending = clients[sequence.client_id].outputs
            if outputs.logprobs and index in outputs.logprobs:
                pending.logprobs[len(pending.numbers)] = outputs.logprobs[index]
            pending.numbers.append(sequence.number)
            pending.token_ids.append(outputs.token_ids[index])
        for sequence in outputs.finished:
            self._finish(clients[sequence.client_id], [sequence])

    def _finish(self, client: Client, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            assert sequence.finish_reason is not None
            finished = Finished(
                sequence.number,
                sequence.finish_reason,
                sequence.stop_reason,
                sequence.num_preemptions,
                sequence.last_is_text,
            )
            client.outputs.finished.append(finished)

    def _flush(self) -> None:
        """Send what is pending; to a client that does not read it goes on merging."""
        for client in list(self._clients.values()):
            pending = client.outputs
            if (pending.numbers or pending.finished or pending.started) and self._send(
                client, pending
            ):
                client.outputs = Outputs()

    def _send(self, client: Client, message: FromCore) -> bool:
        """False if the client's queue is full. A client that is gone is forgotten."""
        try:
            frames = [client.identity, self._encoder.encode(message)]
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(client)
        return True

    def _tell_failure(self, error: Exception) -> None:
        usage = isinstance(error, ValueError) and self._core is None
        failure = CoreFailed(str(error) or type(error).__name__, traceback.format_exc(), usage)
        self._last_loading = Loading("failed", 0.0)
        self._core = None
        self._receive_all()  # whoever has just said Hello is to be told as well
        for client in list(self._clients.values()):
            self._send(client, failure)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """SIGTERM and SIGINT end the loop after the step under way."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def watch_owner(owner_fd: int, stop: Callable[[], None]) -> None:
    """End this process when its owner ends, however that dies.

    The owner holds the other end of the pipe `owner_fd`; a changed parent id covers the case of
    another process having inherited that end. A loop too stuck to stop is ended the hard way.
    """
    owner = os.getppid()

    def watch() -> None:
        with socket.socket(fileno=owner_fd) as pipe:
            pipe.settimeout(1.0)
            while os.getppid() == owner:
                try:
                    if not pipe.recv(1):
                        break
                except TimeoutError:
                    continue
        stop()
        time.sleep(OWNER_GRACE_S)
        os._exit(3)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


def _bind(address: str) -> zmq.Socket[bytes]:
    """A ROUTER bound to `address`, with finite queues and an error for clients that are gone."""
    _check_free(address)
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.set(zmq.SNDHWM, HIGH_WATER_MARK)
    router.set(zmq.RCVHWM, HIGH_WATER_MARK)
    router.set(zmq.ROUTER_MANDATORY, 1)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close(0)
        raise ValueError(f"address {address!r} cannot be bound: {error}") from None
    return router


def _check_free(address: str) -> None:
    """ZeroMQ would take an ipc path over from a living core without a word: look first."""
    parts = urlsplit(address)
    if parts.scheme not in ("ipc", "tcp"):
        raise ValueError(f"address {address!r} must begin with ipc:// or tcp://")
    if parts.scheme == "tcp":
        return
    path = Path(address.removeprefix("ipc://"))
    if not path.parent.is_dir():
        raise ValueError(f"address {address!r}: the directory {path.parent} does not exist")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ValueError(f"address {address!r}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(str(path)) == 0:
            raise ValueError(f"address {address!r} is in use by another process: choose another")
