"""A core that says what a test tells it to, over a real ROUTER socket in a thread.

As a program (`python -m tests.frontend.fake_core ADDRESS`) it welcomes clients, sends one token per
request and never ends one: something to kill.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
import zmq

from nanovllm.protocol.messages import (
    AddRequest,
    CoreStatus,
    Finished,
    FromCore,
    Hello,
    Outputs,
    Started,
    ToCore,
    Welcome,
)
from nanovllm.protocol.plan import WorkerInfo
from tests.waiting import WAIT_S

M = TypeVar("M", bound=msgspec.Struct)
Script = Callable[[ToCore], Iterable[FromCore]]
TIMEOUT_S = WAIT_S
VOCAB_SIZE, MAX_MODEL_LEN = 300, 64
INFO = WorkerInfo(
    device="none",
    dtype="none",
    attention_backend="none",
    architecture="none",
    num_blocks=10,
    max_model_len=MAX_MODEL_LEN,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=[256],
)
WELCOME = Welcome(
    client_id=0,
    epoch="e",
    model="no-such-model",
    served_model_name="fake",
    block_size=16,
    max_num_seqs=4,
    worker=INFO,
)
STATUS = CoreStatus(
    epoch="e",
    step=1,
    last_step_ms=1.0,
    num_running=0,
    num_waiting=0,
    num_blocks=9,
    num_free_blocks=9,
    num_clients=1,
    num_preemptions=0,
    num_prompt_tokens=0,
    num_generation_tokens=0,
    prefix_cache_queries=0,
    prefix_cache_hits=0,
)


def silent(message: ToCore) -> Iterable[FromCore]:
    """Answers nothing but the greeting."""
    return [WELCOME] if isinstance(message, Hello) else []


def echo(message: ToCore) -> Iterable[FromCore]:
    """Every output of a request is its prompt again, one token per message."""
    if isinstance(message, AddRequest):
        numbers = range(message.number, message.number + message.params.n)
        yield Outputs(started=[Started(number, 2, 1.5) for number in numbers])
        for token_id in message.prompt_token_ids:
            yield Outputs(numbers=list(numbers), token_ids=[token_id] * len(numbers))
        yield Outputs(finished=[Finished(number, "length", None, 0) for number in numbers])
    else:
        yield from silent(message)


class FakeCore:
    """Answers each message with what `script` makes of it; `push` sends to the last client."""

    def __init__(self, address: str, script: Script = silent) -> None:
        self.address = address
        self.received: list[ToCore] = []
        self._script = script
        self._outbox: queue.SimpleQueue[FromCore] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "FakeCore":
        self._thread.start()
        assert self._bound.wait(TIMEOUT_S)
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the socket without a word."""
        self._stopping.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def push(self, *messages: FromCore) -> None:
        for message in messages:
            self._outbox.put(message)

    def all_of(self, kind: type[M]) -> list[M]:
        return [message for message in self.received if isinstance(message, kind)]

    def wait_for(self, kind: type[M], count: int = 1) -> M:
        """The `count`-th message of a kind."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.all_of(kind)) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__} in {self.received}"
            time.sleep(0.005)
        return self.all_of(kind)[count - 1]

    def _serve(self) -> None:
        router = zmq.Context.instance().socket(zmq.ROUTER)
        router.set(zmq.SNDHWM, 0)  # no limit: at one, a ROUTER drops what a slow client has to read
        router.bind(self.address)
        self._bound.set()
        decoder = msgspec.msgpack.Decoder(ToCore)
        client = b""
        while not self._stopping.is_set():
            if router.poll(5):
                client, frame = router.recv_multipart()
                message = decoder.decode(frame)
                self.received.append(message)
                for answer in self._script(message):
                    router.send_multipart([client, msgspec.msgpack.encode(answer)])
            while not self._outbox.empty():
                router.send_multipart([client, msgspec.msgpack.encode(self._outbox.get())])
        router.close(0)


def begin(message: ToCore) -> Iterable[FromCore]:
    """One token per request, and no end."""
    if isinstance(message, AddRequest):
        yield Outputs(numbers=[message.number], token_ids=[65])
    else:
        yield from silent(message)


if __name__ == "__main__":
    with FakeCore(sys.argv[1], begin):
        time.sleep(60)
