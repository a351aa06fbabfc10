"""What HTTP costs: streamed tokens per second, and time to first token beyond `AsyncLLM`'s.

    python benchmarks/http_server.py [--frontends 2] [--step-ms 2]

The core is the real one with `load_format="synthetic"`: a fixed time per step and no model, over
the real sockets. The load comes from `http_load.py`. On a small machine the three take turns on the
same processors, so the time per token that each has used is worth more than tokens per second.
"""

import argparse
import asyncio
import contextlib
import random
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import http_load
from serving import cpu_seconds

from nanovllm.config import EngineConfig
from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_process import start_core
from nanovllm.sampling_params import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
CHAT = "/v1/chat/completions"
TIMEOUT_S = 120.0


@asynccontextmanager
async def server(address: str, frontends: int) -> AsyncIterator[tuple[int, int]]:
    """(port, pid) of `nanovllm serve` in front of the core."""
    command = [sys.executable, "-m", "nanovllm.cli", "serve", "--port", "0", "--connect", address]
    command += ["--tokenizer", "smollm2", "--frontends", str(frontends)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        while b"is ready after" not in (line := await process.stderr.readline()):
            assert line, "the server ended"
        yield int(line.split(b":")[-1].split(b"/")[0]), process.pid
    finally:
        process.terminate()
        await process.wait()


async def run_load(
    port: int, *, streams: int, requests: int, tokens: int, processes: int = 1
) -> http_load.Timings:
    """requests: of each stream; no two prompts are equal, but most of them is."""
    bodies: list[http_load.Body] = [
        {
            "messages": [{"role": "user", "content": f"{random.random()} {PROMPT}"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(streams * requests)
    ]
    share = http_load.Share("127.0.0.1", port, CHAT, bodies, streams, TIMEOUT_S)
    timings = await asyncio.to_thread(http_load.run, share, processes)
    assert not timings.errors, timings.errors[0]
    assert timings.num_tokens == streams * requests * tokens
    return timings


async def direct_ttft(llm: AsyncLLM, num_requests: int) -> list[float]:
    """Of `AsyncLLM` in this process, one request at a time, in seconds."""
    params = SamplingParams(max_tokens=4, ignore_eos=True, output_kind="delta")
    times = []
    for _ in range(num_requests):
        message = {"role": "user", "content": f"{random.random()} {PROMPT}"}
        started = time.perf_counter()
        stream = llm.chat([message], params)
        async with contextlib.aclosing(stream):
            await anext(stream)
            times.append(time.perf_counter() - started)
            async for _output in stream:
                pass
    return times


async def measure(arguments: argparse.Namespace) -> None:
    config = EngineConfig.from_kwargs(
        model="synthetic", load_format="synthetic", step_ms=arguments.step_ms, vocab_size=49_000
    )
    handle = start_core(config)
    llm = await AsyncLLM.connect(handle.address, tokenizer="smollm2")
    try:
        async with server(handle.address, arguments.frontends) as (port, pid):
            await measure_idle(llm, port)
            before = cpu_seconds(pid), cpu_seconds(handle.process.pid)
            timings = await run_load(
                port,
                streams=arguments.streams,
                requests=arguments.requests,
                tokens=arguments.tokens,
                processes=arguments.load_processes,
            )
            used = [cpu_seconds(pid) - before[0], cpu_seconds(handle.process.pid) - before[1]]
            frontends, core = (seconds / timings.num_tokens * 1e6 for seconds in used)
            figures = timings.figures()
            print(
                f"{arguments.streams} streams, {arguments.frontends} frontends, steps of "
                f"{arguments.step_ms:g} ms: {figures['output_tokens_per_s']:,.0f} tokens/s in "
                f"{timings.num_events:,} events of {timings.num_tokens:,} tokens; TTFT p50 "
                f"{figures['ttft_median_ms']:.1f} ms, p99 {figures['ttft_p99_ms']:.1f} ms; "
                f"inter-token p50 {figures['itl_median_ms']:.2f} ms, "
                f"p99 {figures['itl_p99_ms']:.2f} ms"
            )
            print(
                f"processor time per token: frontends {frontends:.1f} µs, core {core:.1f} µs, "
                f"load {figures['load_cpu_us_per_token']:.1f} µs"
            )
    finally:
        await llm.close()
        await asyncio.to_thread(handle.close)


async def measure_idle(llm: AsyncLLM, port: int) -> None:
    """One request at a time, with and without HTTP, in turns; the best turn of each counts."""
    direct, http = [], []
    await run_load(port, streams=1, requests=50, tokens=4)  # warm up
    await direct_ttft(llm, 50)
    for _ in range(3):
        direct.append(statistics.median(await direct_ttft(llm, 100)) * 1e3)
        timings = await run_load(port, streams=1, requests=100, tokens=4)
        http.append(statistics.median(timings.ttft_s) * 1e3)
    print(f"TTFT, idle, p50: AsyncLLM {min(direct):.2f} ms, HTTP {min(http):.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="per stream")
    parser.add_argument("--tokens", type=int, default=256, help="per request")
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--load-processes", type=int, default=1)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    main()
