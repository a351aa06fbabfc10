"""What looking at a core costs it, as a share of its time.

    python benchmarks/observing.py

As in `core.py` a fake executor answers at once. Two costs are timed, by the clock and in place:
what `StepLog` does within a step, and what a look takes, encoding included, with as many steps
between two looks as there are in reality. A look is asked for as often as the core allows, on which
all depends: the interval follows the cost. The share is of both together. The best quarter counts,
since other programs on the machine only add time. Target: below 1 %.
"""

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from core import InstantExecutor

from nanovllm.config import EngineConfig
from nanovllm.core.clients import Client
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.operations import Operations, answer_call
from nanovllm.core.sequence import ScheduledStep, StepOutputs
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import AddRequest, Call
from nanovllm.protocol.plan import StepResult
from nanovllm.protocol.watch import Observation, Observe
from nanovllm.sampling_params import SamplingParams
from nanovllm.watch import observer
from nanovllm.watch.step_log import StepLog

VIEWER = 1_000_000  # some other client's id
NUM_LOOKS = 40


@dataclass(frozen=True)
class Load:
    """output_len: at most, and at least a twentieth of it; then another request comes instead."""

    name: str
    step_ms: float
    num_running: int
    num_blocks: int = 70_000
    prompt_len: int = 100
    output_len: int = 4_000


LOADS = (
    Load("8 running", 1.0, 8),
    Load("64 running", 2.0, 64),
    Load("256 running", 5.0, 256),
    Load("256, of prompts of 8,000 tokens", 5.0, 256, num_blocks=300_000, prompt_len=8_000),
    Load("256, of 20 to 400 tokens each", 5.0, 256, output_len=400),
)


class TimedLog(StepLog):
    """Adds up what it costs."""

    seconds = 0.0

    def on_submit(self, step: ScheduledStep) -> None:
        started = time.perf_counter()
        super().on_submit(step)
        TimedLog.seconds += time.perf_counter() - started

    def on_result(
        self, step: ScheduledStep, result: StepResult, outputs: StepOutputs, now: float
    ) -> None:
        started = time.perf_counter()
        super().on_result(step, result, outputs, now)
        TimedLog.seconds += time.perf_counter() - started


class Costs(NamedTuple):
    """log_s: what a step pays."""

    look_s: float
    interval_s: float
    log_s: float


class Engine:
    """A core with a load that does not end, and somebody who may look at it."""

    def __init__(self, load: Load) -> None:
        config = EngineConfig.from_kwargs(
            max_num_seqs=load.num_running, max_inflight_steps=2, max_num_batched_tokens=8192
        )
        executor = InstantExecutor(num_blocks=load.num_blocks, max_model_len=1_000_000)
        self.load = load
        self.core = EngineCore(config, executor, executor.start())
        self.operations = Operations(self.core, observer.Observer(self.core))
        self._server = CoreServer(config, f"ipc://{tempfile.mkdtemp()}/core.sock")
        self._client: Client = self._server._clients.attach(b"client", time.monotonic())
        self._encoder = msgspec.msgpack.Encoder()
        self._random = random.Random(0)
        self._number = 0
        for _ in range(load.num_running):
            self._add()
        while self.core.status(epoch="", num_clients=1).num_running < load.num_running:
            self.step()

    def _add(self) -> None:
        most = self.load.output_len
        num_tokens = self._random.randint(most // 20, most)
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)
        prompt = [self._random.randrange(1, 1000) for _ in range(self.load.prompt_len)]
        self.core.add(self._client.client_id, AddRequest(self._number, prompt, params))
        self._number += 1

    def step(self) -> None:
        outputs = self.core.step()
        if outputs is not None:
            self._server._clients.collect(outputs)
            self._encoder.encode(self._client.outputs)
            self._client.take_outputs()
            for _ in outputs.finished:
                self._add()

    def look(self, *, fresh: bool) -> Observation:
        answer = answer_call(self.operations, VIEWER, Call(0, Observe(fresh)), is_operator=True)
        self._encoder.encode(answer)
        assert isinstance(answer.result, Observation)
        return answer.result

    def look_s(self, step_ms: float) -> Costs:
        """Of looks, and of the steps between them."""
        found = []
        interval_s = self.look(fresh=True).interval_s
        for _ in range(NUM_LOOKS):
            TimedLog.seconds, num_steps = 0.0, int(interval_s * 1e3 / step_ms)
            for _ in range(num_steps):
                self.step()
            started = time.perf_counter()
            interval_s = self.look(fresh=False).interval_s
            look_s = time.perf_counter() - started
            found.append(Costs(look_s, interval_s, TimedLog.seconds / num_steps))
        quarter = sorted(found)[: NUM_LOOKS // 4]
        return Costs(*(statistics.median(values) for values in zip(*quarter, strict=True)))


def measure(load: Load) -> str:
    costs = Engine(load).look_s(load.step_ms)
    share = costs.log_s / (load.step_ms / 1e3) + costs.look_s / costs.interval_s
    look = f"a look {costs.look_s * 1e6:5.0f} µs every {costs.interval_s * 1e3:4.0f} ms"
    log = f"{costs.log_s * 1e6:.1f} µs a step"
    return f"{load.name:32} {log}, {look}: {share:.2%} of steps of {load.step_ms:g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.parse_args()
    core = Engine(LOADS[0]).core
    count = 1_000_000
    started = time.perf_counter()
    for _ in range(count):
        for _listener in core._listeners:
            raise AssertionError
    nothing = (time.perf_counter() - started) / count
    print(f"unwatched, a step looks three times for listeners: {3e9 * nothing:.0f} ns")
    observer.StepLog = TimedLog  # type: ignore[misc]
    for load in LOADS:
        print(measure(load), flush=True)


if __name__ == "__main__":
    main()
