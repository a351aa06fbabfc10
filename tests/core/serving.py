"""A core server in a thread, and the smallest possible client of it."""

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import zmq

from nanovllm.config import EngineConfig
from nanovllm.core.grammar import MakeCompiler
from nanovllm.core.server import CoreServer, MakeListener
from nanovllm.executor.base import Executor
from nanovllm.keys import CoreKeys
from nanovllm.protocol.messages import (
    AddRequest,
    CoreStatus,
    Finished,
    FromCore,
    Heartbeat,
    Hello,
    Outputs,
    Pulse,
    ToCore,
    Welcome,
)
from nanovllm.protocol.plan import StepPlan
from nanovllm.sampling_params import SamplingParams
from nanovllm.watch.observer import Observer
from tests.core.fake_executor import FakeExecutor, FakeHandle
from tests.waiting import WAIT_S

M = TypeVar("M", bound=msgspec.Struct)
N = TypeVar("N", bound=msgspec.Struct)
TIMEOUT_S = WAIT_S
# What a slow machine does costs nobody his place, or his grammar.
PATIENT = {"client_lease_s": 10 * WAIT_S, "grammar_timeout_s": WAIT_S}
PROMPT = [5, 6, 7]


class PacedExecutor(FakeExecutor):
    """Takes a moment per step, so that what a test does comes amid a request, until the test sets
    `step_s` to 0: then the rest of the request takes none of its time."""

    def __init__(self, config: EngineConfig, *, step_s: float) -> None:
        super().__init__(config, num_blocks=200, max_model_len=512)
        self.step_s = step_s

    def submit(self, plan: StepPlan) -> FakeHandle:
        time.sleep(self.step_s)
        return super().submit(plan)


class RawClient:
    """Sends frames, and reads until a message of the type asked for comes."""

    def __init__(self, address: str, *, receive_high_water_mark: int = 1000) -> None:
        """address: "" connects nowhere yet."""
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.set(zmq.RCVHWM, receive_high_water_mark)
        if address:
            self.socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(FromCore)

    def send(self, message: ToCore) -> None:
        self.send_frames(msgspec.msgpack.encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> M:
        deadline = time.monotonic() + timeout_s
        while self.socket.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            message = self._decoder.decode(self.socket.recv())
            if isinstance(message, kind):
                return message
        raise TimeoutError(f"no {kind.__name__} within {timeout_s} s")

    def receive_any(self, kind: type[M], other: type[N]) -> M | N:
        """The next message of one of two kinds."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.socket.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            message = self._decoder.decode(self.socket.recv())
            if isinstance(message, kind | other):
                return message
        raise TimeoutError(f"no {kind.__name__} or {other.__name__} within {TIMEOUT_S} s")

    def greet(self) -> Welcome:
        self.send(Hello())
        return self.receive(Welcome)

    def close(self) -> None:
        self.socket.close(0)


@contextmanager
def serving(
    address: str,
    executor: Executor | None = None,
    *,
    make_compiler: MakeCompiler | None = None,
    keys: CoreKeys | None = None,
    listeners: Collection[MakeListener] = (),
    **settings: Any,
) -> Iterator[CoreServer]:
    """A server on a fake executor; stopped, and joined, at the end."""
    config = EngineConfig.from_kwargs(**{**PATIENT, **settings})
    server = CoreServer(config, address, keys=keys, make_viewer=Observer, listeners=listeners)
    chosen = executor or FakeExecutor(config, num_blocks=200, max_model_len=512)
    thread = threading.Thread(target=server.run, args=(lambda: chosen, make_compiler))
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server did not stop"


def add(number: int = 0, **params: object) -> AddRequest:
    settings = {"max_tokens": 4, "seed": 1, "ignore_eos": True, **params}
    return AddRequest(number, PROMPT, SamplingParams(**settings))  # type: ignore[arg-type]


def collect(client: RawClient, *numbers: int) -> tuple[dict[int, list[int]], dict[int, Finished]]:
    """Read until all `numbers` have ended; others are passed over."""
    token_ids: dict[int, list[int]] = {number: [] for number in numbers}
    finished: dict[int, Finished] = {}
    while finished.keys() != token_ids.keys():
        outputs = client.receive(Outputs)
        for number, token_id in zip(outputs.numbers, outputs.token_ids, strict=True):
            if number in token_ids:
                token_ids[number].append(token_id)
        finished.update((end.number, end) for end in outputs.finished if end.number in token_ids)
    return token_ids, finished


def status_where(client: RawClient, **expected: int) -> CoreStatus:
    """The first status that says so; they come once a second. Its lease is renewed meanwhile."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        client.send(Heartbeat())
        status = client.receive_any(CoreStatus, Pulse)
        if isinstance(status, CoreStatus) and all(
            getattr(status, name) == value for name, value in expected.items()
        ):
            return status
        assert time.monotonic() < deadline, f"never {expected}: {status}"
