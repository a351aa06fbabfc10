"""Where a GPU step's time goes: kernels by total time, and how long the GPU waits between them.

    python benchmarks/profile_steps.py --model benchmarks/models/qwen3-0.6b \
        --decode 1,64,256 --context 1000 --beside 45 --prefill 8192

Random weights. Runs the real core and worker in one process under torch.profiler, for each decode
batch size some steps by CUDA graph, and some in each of which a prompt of --beside tokens comes and
goes, then prompts of 4096 tokens in steps of --prefill tokens. With
--workload (a name of `workloads.py`) it runs that, too, and tells by kind of step how many there
were, how long they took, the least time this GPU's memory allows (measured: weights and KV of
decoding rows once), how long the host waited for the device, and the gaps of a profiled stretch.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, longest

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.inline import inline_executor
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import StepHandle, StepMasks, StepPlan, StepResult
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.worker import Worker

NUM_STEPS = 20
MAX_MODEL_LEN = 4096
ROW_BUCKETS = (1, 8, 32, 64, 96, 128, 160, 192, 224, 256, 512, 1024)


class TimedHandle:
    """A step under way that notes when its result was asked for and when it came."""

    def __init__(self, plan: StepPlan, handle: StepHandle) -> None:
        self.plan = plan
        self.asked = self.came = 0.0
        self._handle = handle

    def result(self) -> StepResult:
        self.asked = time.perf_counter()
        result = self._handle.result()
        self.came = time.perf_counter()
        return result


class TimingExecutor:
    """Passes on to an executor and keeps every step's times."""

    def __init__(self, inner: Worker) -> None:
        self._inner = inner
        self.steps: list[TimedHandle] = []

    def submit(self, plan: StepPlan) -> TimedHandle:
        self.steps.append(TimedHandle(plan, self._inner.submit(plan)))
        return self.steps[-1]

    def sample(self, step: int, masks: StepMasks | None) -> None:
        self._inner.sample(step, masks)

    def shutdown(self) -> None:
        self._inner.shutdown()


def make_core(
    model: str, prefill: int, max_model_len: int, settings: dict[str, Any]
) -> tuple[EngineCore, TimingExecutor]:
    config = EngineConfig.from_kwargs(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=max_model_len,
        max_num_batched_tokens=prefill or 8192,
        **settings,
    )
    executor = inline_executor(config, lambda phase, progress: None)
    info = executor.start()
    executor.allocate(info.num_blocks)
    print({name: round(seconds, 2) for name, seconds in info.phase_seconds.items()}, info.notes)
    timed = TimingExecutor(executor)
    return EngineCore(config, timed, info), timed


def fill(core: EngineCore, executor: TimingExecutor, batch_size: int, context: int) -> None:
    """Start `batch_size` sequences of `context` tokens, and run until all decode, by graph."""
    params = SamplingParams(temperature=0.6, max_tokens=MAX_MODEL_LEN - context, ignore_eos=True)
    for number in range(batch_size):
        prompt = [(number * 7919 + i * 31) % 10_000 for i in range(context)]
        core.add(0, AddRequest(number, prompt, params))
    num_decoded = 0
    while num_decoded < NUM_STEPS:
        core.step()
        num_decoded += sum(executor.steps[-1].plan.num_scheduled) == batch_size


def empty(core: EngineCore) -> None:
    core.abort_client(0)
    while core.busy:
        core.step()
    torch.cuda.synchronize()
    core.reset_prefix_cache()


def report(title: str, seconds: float, num_steps: int, trace: profile) -> None:
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = spans[-1][1] - spans[0][0]
    print(
        f"\n== {title}: {seconds / num_steps * 1e3:.3f} ms a step unprofiled; "
        f"GPU idle {100 * (1 - busy / whole):.1f} % of the profiled time"
    )
    # A kernel may start while the one before it still runs, and wait: what it adds is the time from
    # that one's end to its own, any gap between them included.
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * 3)
    reached = spans[0][0]
    for event in sorted(events, key=lambda e: e.time_range.end):
        entry = totals[event.name[:70]]
        entry[0] += event.time_range.end - reached
        entry[1] += max(0.0, event.time_range.start - reached)
        entry[2] += 1
        reached = max(reached, event.time_range.end)
    print("  added µs  of it idle    times  kernel (each a step)")
    for name, figures in sorted(totals.items(), key=lambda item: -item[1][0])[:16]:
        added, idle, count = (figure / num_steps for figure in figures)
        print(f"{added:10.1f} {idle:11.1f} {count:8.1f}  {name}")


def run_steps(core: EngineCore, num_steps: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    while num_steps and core.busy:
        core.step()
        num_steps -= 1
    torch.cuda.synchronize()
    return time.perf_counter() - started


def run_beside(core: EngineCore, num_steps: int, *, length: int, first: int) -> float:
    """Steps with a prompt each, which no step before has seen, and of which one token is asked."""
    params = SamplingParams(temperature=0.6, max_tokens=1, ignore_eos=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(first, first + num_steps):
        prompt = [(number * 7919 + i * 31 + 5) % 10_000 for i in range(length)]
        core.add(0, AddRequest(number, prompt, params))
        core.step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def profiled(
    title: str, core: EngineCore, num_steps: int, run: Callable[..., float] = run_steps
) -> None:
    seconds = run(core, num_steps)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run(core, num_steps)
    report(title, seconds, num_steps, trace)


def profiled_beside(
    core: EngineCore, executor: TimingExecutor, batch_size: int, length: int
) -> None:
    """Decoding sequences are there. The first steps compile and capture."""
    numbers = counting(1_000_000 * (1 + batch_size), NUM_STEPS)

    def run(core: EngineCore, num_steps: int) -> float:
        return run_beside(core, num_steps, length=length, first=next(numbers))

    run(core, NUM_STEPS)
    profiled(f"decode {batch_size} beside a prompt of {length}", core, NUM_STEPS, run)
    plans = [step.plan for step in executor.steps[-NUM_STEPS:]]
    sizes = Counter((len(plan.rows), sum(plan.num_scheduled)) for plan in plans)
    print("  rows and tokens of these steps:", dict(sizes))


def memory_bytes_per_s() -> float:
    """What this GPU reads and writes in a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / best


def kind_of(plan: StepPlan) -> tuple[str, int]:
    """What steps are counted together by: with prompts or not, and about how many rows."""
    mixed = max(plan.num_scheduled) > 1
    size = next(bucket for bucket in ROW_BUCKETS if bucket >= min(len(plan.rows), ROW_BUCKETS[-1]))
    return ("prompts" if mixed else "decode"), size


def report_steps(steps: list[TimedHandle], config: dict[str, Any], seconds: float) -> None:
    """A line per kind of step."""
    hidden, layers, inner = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_token = layers * 2 * kv_heads * config["head_dim"] * 2
    attention = (2 * heads + 2 * kv_heads) * config["head_dim"] * hidden
    weights = 2 * (layers * (attention + 3 * hidden * inner) + config["vocab_size"] * hidden)
    speed = memory_bytes_per_s()
    print(f"\n{len(steps)} steps in {seconds:.3f} s; memory at {speed / 1e12:.2f} TB/s")
    print("kind        rows ≤   steps       s  ms each  least ms  waited %")
    kinds: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * 4)
    for before, step in pairwise(steps):
        plan = step.plan
        entry = kinds[kind_of(plan)]
        decoding = sum(
            start + 1
            for start, count in zip(plan.num_computed, plan.num_scheduled, strict=True)
            if count == 1
        )
        entry[0] += 1
        entry[1] += step.came - before.came
        entry[2] += (weights + decoding * kv_token) / speed
        entry[3] += step.came - step.asked
    for (kind, size), (count, took, least, waited) in sorted(kinds.items()):
        print(
            f"{kind:10s} {size:7d} {count:7.0f} {took:7.3f} {took / count * 1e3:8.3f} "
            f"{least / count * 1e3:9.3f} {100 * waited / took:9.1f}"
        )


def run_workload(core: EngineCore, executor: TimingExecutor, model: str, name: str) -> None:
    """A workload twice: timed step by step, then with a stretch in its middle profiled."""
    prompts, num_out = WORKLOADS[name]()
    config = json.loads((Path(model) / "config.json").read_text())

    def add_all() -> None:
        core.reset_prefix_cache()
        for number, (prompt, count) in enumerate(zip(prompts, num_out, strict=True)):
            params = SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True)
            core.add(0, AddRequest(number, prompt, params))

    for _ in range(2):  # the first compiles and captures
        add_all()
        executor.steps.clear()
        seconds = run_steps(core, sys.maxsize)
    report_steps(executor.steps, config, seconds)
    num_steps = len(executor.steps)
    add_all()
    run_steps(core, num_steps // 3)
    profiled(f"{name}, steps {num_steps // 3} and on", core, 3 * NUM_STEPS)
    empty(core)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--decode", default="1,64,256")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--beside", default="", help="lengths of prompts, comma-separated")
    parser.add_argument("--prefill", type=int, default=8192, help="0: none")
    parser.add_argument("--workload", default="", help="names of workloads, comma-separated")
    parser.add_argument("--config", default="{}", help="further settings, as JSON")
    arguments = parser.parse_args()
    settings = json.loads(arguments.config)
    names = [name for name in arguments.workload.split(",") if name]
    most = max([MAX_MODEL_LEN, *(longest(WORKLOADS[name]()) for name in names)])
    core, executor = make_core(arguments.model, arguments.prefill, most, settings)
    for name in names:
        run_workload(core, executor, arguments.model, name)
    for batch_size in map(int, filter(None, arguments.decode.split(","))):
        fill(core, executor, batch_size, arguments.context)
        profiled(f"decode {batch_size} × {arguments.context}", core, NUM_STEPS)
        for length in map(int, filter(None, arguments.beside.split(","))):
            profiled_beside(core, executor, batch_size, length)
        empty(core)
    if arguments.prefill:
        params = SamplingParams(max_tokens=1)
        for number in range(40):
            prompt = [(number * 7919 + i * 31) % 10_000 for i in range(MAX_MODEL_LEN - 8)]
            core.add(0, AddRequest(number, prompt, params))
        run_steps(core, 5)
        profiled(f"prefill in steps of {arguments.prefill}", core, 4)
    executor.shutdown()


if __name__ == "__main__":
    main()
