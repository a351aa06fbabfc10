"""How light the core is: CPU time per step, without a device.

    python benchmarks/core.py

A fake executor answers at once, so what is timed is schedule + submit + update + sorting outputs to
clients + encoding them: all the core does in a step. The best of several windows is printed, since
other programs on the machine only ever add time. Targets: 256 running ≤ 500 µs, 8 running ≤ 40 µs.
The second part times request → first output through both sockets of an idle, real core process.
"""

import argparse
import time

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.process import Client, CoreServer
from nanovllm.protocol import AddRequest, StepPlan, StepResult, WorkerInfo
from nanovllm.sampling_params import SamplingParams


class InstantExecutor:
    """Samples token 7 for everyone, at once."""

    def start(self) -> WorkerInfo:
        return WorkerInfo(
            device="none",
            dtype="none",
            attention_backend="none",
            architecture="none",
            num_blocks=100_000,
            max_model_len=4096,
            vocab_size=1000,
            eos_token_ids=[0],
        )

    def submit(self, plan: StepPlan) -> "InstantHandle":
        return InstantHandle(StepResult(plan.step, [7] * len(plan.sampling)))

    def shutdown(self) -> None:
        pass


class InstantHandle:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def step_time(num_running: int, *, depth: int, num_windows: int = 20, num_steps: int = 50) -> float:
    """Seconds per decode step with `num_running` sequences of one client."""
    config = EngineConfig.from_kwargs(max_num_seqs=num_running, max_inflight_steps=depth)
    executor = InstantExecutor()
    core = EngineCore(config, executor, executor.start())
    server = CoreServer(config, "tcp://127.0.0.1:*")
    client = server._attach(b"client")
    encoder = msgspec.msgpack.Encoder()
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for number in range(num_running):
        core.add(client.client_id, AddRequest(number, list(range(1, 100)), params))
    while core.status(epoch="", num_clients=1).num_running < num_running:
        core.step()
    return min(timed(core, server, client, encoder, num_steps) for _ in range(num_windows))


def timed(
    core: EngineCore,
    server: CoreServer,
    client: Client,
    encoder: msgspec.msgpack.Encoder,
    num_steps: int,
) -> float:
    started = time.perf_counter()
    for _ in range(num_steps):
        outputs = core.step()
        if outputs is not None:
            server._collect(outputs)
            encoder.encode(client.outputs)
            client.outputs = type(client.outputs)()
    return (time.perf_counter() - started) / num_steps


async def round_trip(num_requests: int = 200) -> float:
    """Median seconds from generate() to the first output, idle smollm2-sized dummy left out."""
    from nanovllm.frontend.async_llm import AsyncLLM

    raise NotImplementedError(AsyncLLM)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for num_running in (8, 256):
        for depth in (1, 2):
            seconds = step_time(num_running, depth=depth)
            print(f"{num_running:4d} running, {depth} in flight: {seconds * 1e6:6.1f} µs a step")


if __name__ == "__main__":
    main()
