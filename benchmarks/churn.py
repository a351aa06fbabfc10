"""An hour of work in minutes: short requests, random aborts, clients that come, go and vanish.

    python benchmarks/churn.py --requests 20000

The executor samples each token's position, so every stream is checked token by token. At the end
nothing may be left in the core: no request, no block, no client, no file descriptor, no memory.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from nanovllm.config import EngineConfig
from nanovllm.core.lifetime import stop_on_signals
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    CoreStatus,
    FromCore,
    Goodbye,
    Heartbeat,
    Hello,
    Outputs,
    ToCore,
    Welcome,
)
from nanovllm.protocol.plan import StepMasks, StepPlan, StepResult, WorkerInfo
from nanovllm.sampling_params import SamplingParams

TIMEOUT_MS = 60_000
VOCAB_SIZE = 10_000
NUM_BLOCKS = 24  # few, so that sequences are preempted
MAX_GROWTH_BYTES = 16 * 2**20


class PositionExecutor:
    """The token at position p is p."""

    def start(self) -> WorkerInfo:
        return WorkerInfo(
            device="none",
            dtype="none",
            attention_backend="none",
            architecture="none",
            num_blocks=NUM_BLOCKS,
            max_model_len=128,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[0],
        )

    def allocate(self, num_blocks: int) -> None:
        pass

    def warm_up(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> "PositionHandle":
        ends = [plan.num_computed[entry] + plan.num_scheduled[entry] for entry in plan.sampling]
        return PositionHandle(StepResult(plan.step, ends))

    def sample(self, step: int, masks: StepMasks | None) -> None:
        """What is sampled follows from the plan."""

    def shutdown(self) -> None:
        pass


@dataclass
class PositionHandle:
    value: StepResult

    def result(self) -> StepResult:
        return self.value


@dataclass
class Tally:
    """What has become of the requests of one run."""

    num_started: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_abandoned: int = 0
    errors: list[str] = field(default_factory=list)


class BriefClient:
    """One life of a client: attach, a few requests, and an end of some kind."""

    def __init__(self, address: str, rng: random.Random) -> None:
        self._rng = rng
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(address)
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._expected: dict[int, list[int]] = {}
        self._got: dict[int, list[int]] = {}
        self.send(Hello())
        self.receive(Welcome)

    def live(self, num_requests: int, tally: Tally) -> None:
        """Send that many, abort some, leave early or when all have ended."""
        rng = self._rng
        for number in range(num_requests):
            self._begin(number)
        tally.num_started += num_requests
        vanishes = rng.random() < 0.2
        leave_after = rng.randrange(len(self._expected) + 1) if vanishes else -1
        while self._expected:
            if len(self._expected) == leave_after:
                tally.num_abandoned += len(self._expected)
                break
            if rng.random() < 0.1:
                self.send(Abort([rng.choice(list(self._expected))]))
            self._take(self.receive(Outputs), tally)
        if not vanishes or rng.random() < 0.3:
            self.send(Goodbye())
        self._socket.close(200 if not vanishes else 0)

    def _begin(self, number: int) -> None:
        num_prompt, num_outputs = self._rng.randrange(1, 40), self._rng.randrange(1, 60)
        params = SamplingParams(max_tokens=num_outputs, ignore_eos=True)
        self._expected[number] = list(range(num_prompt, num_prompt + num_outputs))
        self._got[number] = []
        self.send(AddRequest(number, [1 + self._rng.randrange(3)] * num_prompt, params))

    def _take(self, outputs: Outputs, tally: Tally) -> None:
        for number, token_id in zip(outputs.numbers, outputs.token_ids, strict=True):
            self._got[number].append(token_id)
        for end in outputs.finished:
            expected, got = self._expected.pop(end.number), self._got[end.number]
            if end.reason == "abort":
                tally.num_aborted += 1
                expected = expected[: len(got)]
            else:
                tally.num_finished += 1
            if got != expected:
                tally.errors.append(f"{end.reason}: got {got}, expected {expected}")

    def send(self, message: ToCore) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self, kind: type) -> "FromCore":
        while self._socket.poll(TIMEOUT_MS):
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, kind):
                return message
        raise TimeoutError(f"no {kind.__name__} within {TIMEOUT_MS} ms")

    def close(self) -> None:
        self._socket.close(0)


def churn(address: str, *, num_requests: int, num_threads: int = 4, seed: int = 0) -> Tally:
    """Lives of clients, `num_threads` at a time, until so many requests have been sent."""
    tally = Tally()

    def lives(rng: random.Random) -> None:
        left = num_requests // num_threads
        try:
            while left > 0:
                count = min(left, rng.randrange(1, 40))
                left -= count
                BriefClient(address, rng).live(count, tally)
        except Exception as error:
            tally.errors.append(repr(error))

    threads = [
        threading.Thread(target=lives, args=(random.Random(seed * 1000 + index),))
        for index in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def resting_status(address: str) -> CoreStatus:
    """Of a core whose last clients have just left, once it has noticed."""
    client = BriefClient(address, random.Random())
    try:
        for _ in range(TIMEOUT_MS // 1000):  # they come once a second
            client.send(Heartbeat())
            status = client.receive(CoreStatus)
            assert isinstance(status, CoreStatus)
            if status.num_clients == 1 and status.num_running + status.num_waiting == 0:
                break
        return status
    finally:
        client.send(Goodbye())
        client._socket.close(200)


def check_at_rest(status: CoreStatus) -> None:
    """Nothing is left of anybody."""
    assert (status.num_running, status.num_waiting, status.num_paused) == (0, 0, 0), status
    assert status.num_free_blocks == status.num_blocks, status
    assert (status.num_queued, status.num_queued_tokens) == (0, 0), status
    assert (status.num_clients, status.num_failed) == (1, 0), status


def serve(address: str) -> None:
    config = EngineConfig.from_kwargs(max_num_seqs=32, block_size=16, client_lease_s=5.0)
    server = CoreServer(config, address)
    stop_on_signals(server.drain, server.stop)
    server.run(PositionExecutor)


def footprint(pid: int) -> tuple[int, int]:
    """Resident bytes and open file descriptors of a process."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        core = subprocess.Popen([sys.executable, __file__, "--serve", address])
        started = time.monotonic()
        try:
            churn(address, num_requests=arguments.requests // 10, seed=1)
            resting_status(address)
            early_bytes, early_fds = footprint(core.pid)
            tally = churn(address, num_requests=arguments.requests * 9 // 10, seed=2)
            status = resting_status(address)
            num_bytes, num_fds = footprint(core.pid)
        finally:
            core.terminate()
            core.wait(20)
    print(f"{tally} in {time.monotonic() - started:.0f} s")
    print(f"{status.num_preemptions} preemptions, {status.num_generation_tokens} tokens")
    print(f"file descriptors {early_fds} → {num_fds}, memory +{num_bytes - early_bytes} bytes")
    assert not tally.errors
    check_at_rest(status)
    assert num_fds <= early_fds + 2 and num_bytes - early_bytes < MAX_GROWTH_BYTES


if __name__ == "__main__":
    main()
