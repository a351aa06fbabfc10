"""What clients cost each other: one that floods, and one that stops reading.

    python benchmarks/isolation.py --seconds 30

Both against a real core process with steps of a fixed time (5 ms) and tokens that tell their
position. First the time to first token of a light tenant beside a flood, by scheduling policy; then
the inter-token time of a client, and the core's memory, while another does not read for a while.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from churn import BriefClient, PositionExecutor, PositionHandle, footprint

from nanovllm.config import EngineConfig
from nanovllm.core.lifetime import stop_on_signals
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import AddRequest, CoreStatus, Goodbye, Heartbeat, Outputs
from nanovllm.protocol.plan import StepPlan, WorkerInfo
from nanovllm.sampling_params import SamplingParams

STEP_S = 0.005


class PacedExecutor(PositionExecutor):
    """A step takes `STEP_S` of somebody else's time."""

    def start(self) -> WorkerInfo:
        info = super().start()
        return WorkerInfo(
            device="none",
            dtype="none",
            attention_backend="none",
            architecture="none",
            num_blocks=20_000,
            max_model_len=9000,
            vocab_size=info.vocab_size,
            eos_token_ids=[0],
        )

    def submit(self, plan: StepPlan) -> PositionHandle:
        handle = super().submit(plan)
        return PacedHandle(handle.value, time.monotonic() + STEP_S)


@dataclass
class PacedHandle(PositionHandle):
    due: float

    def result(self):  # type: ignore[no-untyped-def]
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.value


@contextmanager
def core_process(policy: str, num_seats: int) -> Iterator[tuple[str, int]]:
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/core.sock"
        command = [sys.executable, __file__, "--serve", address]
        core = subprocess.Popen([*command, "--policy", policy, "--seats", str(num_seats)])
        try:
            yield address, core.pid
        finally:
            core.terminate()
            core.terminate()
            core.wait(60)


def serve(address: str, policy: str, num_seats: int) -> None:
    config = EngineConfig.from_kwargs(
        max_num_seqs=num_seats, scheduling_policy=policy, client_lease_s=60.0, drain_timeout=0.0
    )
    server = CoreServer(config, address)
    stop_on_signals(server.drain, server.stop)
    server.run(PacedExecutor)


def request(number: int, num_outputs: int, *, num_prompt: int = 16) -> AddRequest:
    params = SamplingParams(max_tokens=num_outputs, ignore_eos=True)
    return AddRequest(number, [1] * num_prompt, params)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def light_beside_flood(
    policy: str, *, num_flood: int = 2000, num_light: int = 40, interval_s: float = 0.2
) -> list[float]:
    """Seconds to first token of a light tenant's requests, which come when they are due."""
    with core_process(policy, 16) as (address, _):
        heavy, light = (BriefClient(address, random.Random(seed)) for seed in (1, 2))
        for number in range(num_flood):
            heavy.send(request(number, 32))
        start = time.monotonic() + 0.3
        due = [start + number * interval_s for number in range(num_light)]
        first: dict[int, float] = {}
        num_sent = 0
        while len(first) < num_light:
            now = time.monotonic()
            while num_sent < num_light and due[num_sent] <= now:
                light.send(request(num_sent, 8))
                num_sent += 1
            wait_s = due[num_sent] - now if num_sent < num_light else 1.0
            while heavy._socket.poll(0):
                heavy._socket.recv()
            if light._socket.poll(min(50, int(wait_s * 1e3) + 1)):
                message = light._decoder.decode(light._socket.recv())
                now = time.monotonic()
                for number in message.numbers if isinstance(message, Outputs) else ():
                    first.setdefault(number, now - due[number])
        heavy.close()
        light.close()
        return list(first.values())


def inter_token_times(client: BriefClient, number: int, seconds: float) -> list[float]:
    """Between the tokens of one stream, for so long."""
    client.send(request(number, int(seconds / STEP_S)))
    gaps, last = [], 0.0
    while True:
        outputs = client.receive(Outputs)
        assert isinstance(outputs, Outputs)
        now = time.monotonic()
        if outputs.numbers:
            if last:
                gaps.append(now - last)
            last = now
        if outputs.finished:
            return gaps


def check_streams(client: BriefClient, num_streams: int, num_outputs: int) -> None:
    """Read all that a client has missed; raises unless it is exactly what it asked for."""
    got: dict[int, list[int]] = {number: [] for number in range(num_streams)}
    num_ended = 0
    while num_ended < num_streams:
        outputs = client.receive(Outputs)
        assert isinstance(outputs, Outputs)
        client.send(Heartbeat())
        for number, token_id in zip(outputs.numbers, outputs.token_ids, strict=True):
            got[number].append(token_id)
        num_ended += len(outputs.finished)
    assert all(tokens == list(range(16, 16 + num_outputs)) for tokens in got.values())


def beside_one_that_does_not_read(
    seconds: float, *, deaf_first: bool, num_streams: int = 32
) -> tuple[list[float], list[float], int]:
    """A client's inter-token times beside streams of one that reads and of one that does not, and
    by how many bytes the core grew for the latter. Raises if that misses a token at last."""
    num_outputs = min(8000, int(seconds / STEP_S))
    with core_process("fair", 64) as (address, pid):
        reader, company, deaf = (BriefClient(address, random.Random(seed)) for seed in (1, 2, 3))

        def beside_company() -> list[float]:
            for number in range(num_streams):
                company.send(request(number, num_outputs))
            return _gaps_while_reading(reader, company, seconds, num_streams)

        alone = [] if deaf_first else beside_company()
        memory, _ = footprint(pid)
        for number in range(num_streams):
            deaf.send(request(number, num_outputs))
        beside = inter_token_times(reader, 1, seconds)
        growth = footprint(pid)[0] - memory
        status = reader.receive(CoreStatus)
        assert isinstance(status, CoreStatus) and status.num_paused == num_streams
        check_streams(deaf, num_streams, num_outputs)
        alone = alone or beside_company()
        for client in (reader, deaf, company):
            client.send(Goodbye())
            client.close()
    return alone, beside, growth


def report_reading(seconds: float, rounds: int) -> None:
    """In rounds, in either order: what else a machine does changes p99 by more than this may."""
    pooled: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        alone, beside, growth = beside_one_that_does_not_read(seconds, deaf_first=number % 2 == 1)
        for gaps, all_gaps in zip((alone, beside), pooled, strict=True):
            all_gaps += gaps
        p99s = [f"{percentile(gaps, 0.99) * 1e3:.2f}" for gaps in (alone, beside)]
        print(
            f"one that does not read for {seconds:g} s: others' inter-token p99 {p99s[0]} → "
            f"{p99s[1]} ms, core memory {growth / 2**20:+.1f} MiB, no token lost",
            flush=True,
        )
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        alone_ms, beside_ms = (percentile(gaps, share) * 1e3 for gaps in pooled)
        change = beside_ms / alone_ms - 1
        print(f"all rounds: {name} {alone_ms:.2f} → {beside_ms:.2f} ms ({change:+.0%})")


def _gaps_while_reading(
    reader: BriefClient, company: BriefClient, seconds: float, num_streams: int
) -> list[float]:
    num_outputs = min(8000, int(seconds / STEP_S))
    thread = threading.Thread(target=check_streams, args=(company, num_streams, num_outputs))
    thread.start()
    gaps = inter_token_times(reader, 0, seconds)
    thread.join()
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of not reading")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--policy", default="fair", help=argparse.SUPPRESS)
    parser.add_argument("--seats", type=int, default=16, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.policy, arguments.seats)
        return
    for policy in ("fcfs", "fair"):
        seconds = light_beside_flood(policy)
        print(
            f"{policy}: a light tenant's time to first token beside a flood of 2000 requests: "
            f"p50 {percentile(seconds, 0.5) * 1e3:.0f} ms, "
            f"p99 {percentile(seconds, 0.99) * 1e3:.0f} ms"
        )
    report_reading(arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    main()
