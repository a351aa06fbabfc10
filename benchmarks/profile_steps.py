"""Where a GPU step's time goes: kernels by total time, and how long the GPU waits between them.

    python benchmarks/profile_steps.py --model benchmarks/models/qwen3-0.6b \
        --decode 1,64,256 --context 1000 --prefill 8192

Random weights. Runs the real core and worker in one process under torch.profiler, for each decode
batch size some steps by CUDA graph, then prompts of 4096 tokens in steps of --prefill tokens.
"""

import argparse
import json
import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.executor.inline import InlineExecutor
from nanovllm.protocol import AddRequest
from nanovllm.sampling_params import SamplingParams

NUM_STEPS = 20
MAX_MODEL_LEN = 4096


def make_core(model: str, prefill: int, settings: dict[str, Any]) -> tuple[EngineCore, Any]:
    config = EngineConfig.from_kwargs(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=prefill,
        **settings,
    )
    executor = InlineExecutor(config, lambda phase, progress: None)
    info = executor.start()
    print({name: round(seconds, 2) for name, seconds in info.phase_seconds.items()}, info.notes)
    return EngineCore(config, executor, info), executor


def fill(core: EngineCore, batch_size: int, context: int) -> None:
    """Start `batch_size` sequences of `context` tokens, and run until all decode."""
    params = SamplingParams(temperature=0.6, max_tokens=MAX_MODEL_LEN - context, ignore_eos=True)
    for number in range(batch_size):
        prompt = [(number * 7919 + i * 31) % 10_000 for i in range(context)]
        core.add(0, AddRequest(number, prompt, params))
    generated = 0
    while generated < batch_size * 8:
        outputs = core.step()
        generated += len(outputs.token_ids) if outputs else 0


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
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        entry = totals[event.name[:88]]
        entry[0] += event.time_range.end - event.time_range.start
        entry[1] += 1
    for name, (total, count) in sorted(totals.items(), key=lambda item: -item[1][0])[:14]:
        print(f"{total / num_steps:9.1f} µs a step {count / num_steps:7.1f} × {name}")


def run_steps(core: EngineCore, num_steps: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_steps):
        core.step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def profiled(title: str, core: EngineCore, num_steps: int) -> None:
    seconds = run_steps(core, num_steps)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run_steps(core, num_steps)
    report(title, seconds, num_steps, trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--decode", default="1,64,256")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--config", default="{}", help="further settings, as JSON")
    arguments = parser.parse_args()
    settings = json.loads(arguments.config)
    core, executor = make_core(arguments.model, arguments.prefill, settings)
    for batch_size in map(int, filter(None, arguments.decode.split(","))):
        fill(core, batch_size, arguments.context)
        profiled(f"decode {batch_size} × {arguments.context}", core, NUM_STEPS)
        empty(core)
    params = SamplingParams(max_tokens=1)
    for number in range(40):
        prompt = [(number * 7919 + i * 31) % 10_000 for i in range(MAX_MODEL_LEN - 8)]
        core.add(0, AddRequest(number, prompt, params))
    run_steps(core, 3)
    profiled(f"prefill in steps of {arguments.prefill}", core, 4)
    executor.shutdown()


if __name__ == "__main__":
    main()
