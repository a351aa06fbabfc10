"""A small model on a CPU beside busy neighbours, and served beside offline.

    python benchmarks/busy.py --rounds 3 [--threads 2] [--model smollm2]

One core runs the model. Asked are one stream and eight, offline (`AsyncLLM` in this process), and
eight chat streams of `nanovllm serve`, with 0, 1 and 2 processes beside them that never rest. All
take turns, round after round; printed are medians, ratios to the quiet figure, and served/offline.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import http_load
from http_server import PROMPT, run_load, server

from nanovllm.config import EngineConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_process import start_core
from nanovllm.sampling_params import SamplingParams

NUM_BUSY = (0, 1, 2)
STREAMS = 8


@contextmanager
def busy(count: int) -> Iterator[None]:
    """With so many processes that never rest."""
    command = [sys.executable, "-c", "while True: pass"]
    # Each as in a terminal of its own, which is how Linux shares out processors.
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def offline(llm: AsyncLLM, streams: int, tokens: int) -> http_load.Timings:
    """The requests of `run_load`, without HTTP."""
    timings = http_load.Timings(time.monotonic(), 0.0)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, output_kind="delta")

    async def one() -> None:
        message = {"role": "user", "content": f"{random.random()} {PROMPT}"}
        last_at = None
        async for output in llm.chat([message], params):
            now = time.monotonic()
            num_new = len(output.outputs[0].token_ids)
            timings.num_tokens += num_new
            if last_at is not None:
                timings.itl_s += [now - last_at, *[0.0] * (num_new - 1)]
            last_at = now

    await asyncio.gather(*[one() for _ in range(streams)])
    timings.ended = time.monotonic()
    return timings


async def measure(arguments: argparse.Namespace) -> None:
    tokens = arguments.tokens
    config = EngineConfig.from_kwargs(
        model=arguments.model, device="cpu", max_model_len=1024, threads=arguments.threads
    )
    handle = start_core(config)
    llm = await AsyncLLM.connect(handle.address)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    try:
        async with server(handle.address, 1) as (port, _):
            cases = {
                "1 stream": lambda: offline(llm, 1, tokens),
                f"{STREAMS} streams": lambda: offline(llm, STREAMS, tokens),
                f"{STREAMS} served": lambda: run_load(
                    port, streams=STREAMS, requests=1, tokens=tokens
                ),
            }
            for run in cases.values():  # once before anything counts
                await run()
            for number in range(arguments.rounds):
                for count in NUM_BUSY[:: 1 if number % 2 else -1]:
                    with busy(count):
                        for name, run in cases.items():
                            figures = (await run()).figures()
                            rate, p99_ms = (figures[key] for key in KEYS)
                            found[name, count].append((rate, p99_ms))
    finally:
        await llm.close()
        await asyncio.to_thread(handle.close)
    report(found, list(cases))


KEYS = ("output_tokens_per_s", "itl_p99_ms")


def report(found: dict[tuple[str, int], list[tuple[float, float]]], cases: list[str]) -> None:
    print(f"{'':12} {'busy':>4} {'tokens/s':>9} {'/ quiet':>8} {'p99 ms':>8}   all rounds")
    medians = {key: statistics.median(rate for rate, _ in runs) for key, runs in found.items()}
    for name in cases:
        for count in NUM_BUSY:
            runs = found[name, count]
            ratio = medians[name, count] / medians[name, 0]
            p99_ms = statistics.median(p99_ms for _, p99_ms in runs)
            rates = " ".join(f"{rate:.0f}" for rate, _ in runs)
            line = f"{name:12} {count:4} {medians[name, count]:9.1f} {ratio:8.2f} {p99_ms:8.1f}"
            print(f"{line}   {rates}")
    _, many, served = cases
    for count in NUM_BUSY:
        ratio = medians[served, count] / medians[many, count]
        print(f"served / offline with {count} busy: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, help="default: as the engine chooses")
    parser.add_argument("--tokens", type=int, default=128, help="per request")
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
