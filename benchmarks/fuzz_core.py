"""Malformed frames of all kinds against a real core process, while a well-behaved client streams.

    python benchmarks/fuzz_core.py --frames 100000

After each thousand frames the core must answer a clean request, and the streaming client must have
got tokens; at the end the core's memory must be what it was after the first tenth. Seeded.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq

from nanovllm.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Call,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Outputs,
    ResetPrefixCache,
    ToCore,
    Welcome,
)
from nanovllm.sampling_params import SamplingParams

TIMEOUT_MS = 60_000
FRAMES_PER_SOCKET = 250
MAX_GROWTH_BYTES = 16 * 2**20


def valid_messages(rng: random.Random) -> list[ToCore]:
    """Messages worth mutating; also sent as they are."""
    params = SamplingParams(max_tokens=rng.choice([1, 5, None]), n=rng.choice([1, 2]), seed=1)
    prompt = [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 20))]
    number = rng.choice([0, 1, 5, 2**31, 2**53, -1, rng.randrange(100)])
    return [
        Hello(rng.choice([PROTOCOL_VERSION, PROTOCOL_VERSION, 0, 1, -1, 2**40])),
        AddRequest(number, prompt, params, priority=rng.choice([0, -(2**63), 2**63 - 1])),
        AddRequest(number, prompt, params, deadline_ms=rng.choice([-1.0, 1e-9, 1e300, 5.0])),
        AddRequest(number, [2**62], SamplingParams(min_tokens=2**31 - 1, max_tokens=None)),
        Abort([number] * rng.choice([0, 1, 1000])),
        Call(rng.choice([0, 2**63]), ResetPrefixCache()),
        Heartbeat(),
        Goodbye(),
    ]


def random_value(rng: random.Random, depth: int = 0) -> object:
    """Valid MessagePack of no particular shape."""
    leaves: list[Callable[[], object]] = [
        lambda: rng.choice([None, True, -1, 2**64 - 1, -(2**63), 1.5, float("nan")]),
        lambda: "é" * rng.randrange(50),
        lambda: rng.randbytes(rng.randrange(200)),
    ]
    if depth > 4 or rng.random() < 0.4:
        return rng.choice(leaves)()
    if rng.random() < 0.5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    names = ["type", "number", "params", "prompt_token_ids", "numbers", "x"]
    return {rng.choice(names): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


def mutated(rng: random.Random, frame: bytes) -> bytes:
    """Flip, cut, double, insert or splice."""
    data = bytearray(frame)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data += data[:at]
            case _:
                del data[at : at + rng.randrange(1, 5)]
    return bytes(data)


def fuzz_frames(rng: random.Random) -> list[bytes]:
    """The frames of one message."""
    pick = rng.random()
    encode = msgspec.msgpack.encode
    if pick < 0.45:
        return [mutated(rng, encode(rng.choice(valid_messages(rng))))]
    if pick < 0.60:
        return [encode(rng.choice(valid_messages(rng)))]
    if pick < 0.75:
        return [rng.randbytes(rng.choice([0, 1, 10, 1000]))]
    if pick < 0.88:
        return [encode(random_value(rng))]
    if pick < 0.92:  # claims to hold four thousand million items
        head = b"\x82\xa4type\xaaAddRequest\xb0prompt_token_ids"
        return [head + rng.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb"]) + b"\xff\xff\xff\xff"]
    if pick < 0.96:  # too deep
        head = rng.choice([b"", b"\x82\xa4type\xa5Hello\xa1x"])
        return [head + rng.choice([b"\x91", b"\x81\xa1x"]) * rng.choice([100, 5000, 50_000])]
    return [rng.randbytes(rng.randrange(20)) for _ in range(rng.choice([0, 2, 3, 50]))]


def fuzz(address: str, *, num_frames: int, seed: int) -> Iterator[int]:
    """Send that many from sockets that come and go; yields how many, now and then."""
    rng = random.Random(seed)
    socket = _dealer(address)
    for count in range(1, num_frames + 1):
        frames = fuzz_frames(rng) or [b""]
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            socket.poll(10, zmq.POLLOUT)
        if rng.random() < 0.3:
            while socket.poll(0):
                socket.recv_multipart()
        if count % FRAMES_PER_SOCKET == 0:
            socket.close(100)
            socket = _dealer(address)
            if rng.random() < 0.7:
                socket.send(msgspec.msgpack.encode(Hello()))
            yield count
    socket.close(0)


class CleanClient:
    """Attaches, and has requests answered."""

    def __init__(self, address: str) -> None:
        self._socket = _dealer(address)
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._number = 0
        self._send(Hello())
        while not isinstance(self._receive(), Welcome):
            pass

    def request(self, *, max_tokens: int) -> list[int]:
        """The tokens of one request, which must end well."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
        number = self.begin(params)
        tokens: list[int] = []
        while True:
            message = self._receive()
            if isinstance(message, Outputs):
                pairs = zip(message.numbers, message.token_ids, strict=True)
                tokens += [token for one, token in pairs if one == number]
                ends = [end for end in message.finished if end.number == number]
                if ends:
                    assert ends[0].reason == "length", ends
                    assert len(tokens) == max_tokens
                    return tokens

    def begin(self, params: SamplingParams) -> int:
        self._number += 1
        self._send(AddRequest(self._number, [5, 6, 7], params))
        return self._number

    def close(self) -> None:
        self._socket.close(0)

    def _send(self, message: ToCore) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def _receive(self) -> FromCore:
        assert self._socket.poll(TIMEOUT_MS), "the core does not answer"
        return self._decoder.decode(self._socket.recv())


@contextmanager
def streaming(address: str) -> Iterator[list[int]]:
    """A clean client, one request after the other all the while; yields how long each took, ms."""
    ended = threading.Event()
    spans: list[int] = []
    failures: list[Exception] = []

    def stream() -> None:
        client = CleanClient(address)
        try:
            while not ended.is_set():
                started = time.monotonic()
                client.request(max_tokens=100)
                spans.append(int((time.monotonic() - started) * 1e3))
        except Exception as error:
            failures.append(error)
        finally:
            client.close()

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield spans
    finally:
        ended.set()
        thread.join()
    assert not failures and spans, failures


def _dealer(address: str) -> "zmq.Socket[bytes]":
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(address)
    return dealer


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        command = [sys.executable, "-m", "nanovllm.launch", "synthetic", "--address", address]
        command += ["--load-format", "synthetic", "--step-ms", "0", "--skip-tokenizer-init"]
        core = subprocess.Popen(command)
        clean = CleanClient(address)
        started, early, slowest = time.monotonic(), 0, 0.0
        try:
            with streaming(address) as spans:
                for count in fuzz(address, num_frames=arguments.frames, seed=arguments.seed):
                    if count % 1000 == 0:
                        asked = time.monotonic()
                        clean.request(max_tokens=100)
                        slowest = max(slowest, time.monotonic() - asked)
                    if count >= arguments.frames // 10 and not early:
                        early = resident_bytes(core.pid)
            assert core.poll() is None, "the core has ended"
            growth = resident_bytes(core.pid) - early
        finally:
            clean.close()
            core.terminate()
            code = core.wait(20)
    seconds = time.monotonic() - started
    print(f"{arguments.frames} frames in {seconds:.1f} s, core alive, exit code {code}")
    print(f"slowest clean request of 100 tokens: {slowest * 1e3:.0f} ms")
    print(f"{len(spans)} streamed requests meanwhile, all whole; the slowest took {max(spans)} ms")
    print(f"memory grew by {growth / 2**20:.1f} MiB from the first tenth to the end")
    assert growth < MAX_GROWTH_BYTES


if __name__ == "__main__":
    main()
