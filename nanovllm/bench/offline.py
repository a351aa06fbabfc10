"""`nanovllm bench throughput` and `latency`: many requests at once, or a few over and over.

Random token ids in, EOS ignored, so that every run does the same work; a warm-up comes first.
"""

import argparse
import random
import statistics
import time
from typing import Any

from nanovllm.frontend.llm import LLM
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

FIRST_ID = 3  # leaves out the ids that are special in most vocabularies


def throughput(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Requests and tokens per second, all requests given at once."""
    with LLM(**settings) as llm:
        _run(llm, arguments, 1, seed=0)
        settings["on_progress"]("measuring", 0.0)
        started = time.perf_counter()
        outputs = _run(llm, arguments, arguments.num_prompts, seed=1)
        seconds = time.perf_counter() - started
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(output.metrics.num_generation_tokens for output in outputs)
    return (
        f"{len(outputs)} requests of {arguments.input_len} tokens in, {arguments.output_len} out: "
        f"{seconds:.2f} s\n"
        f"{len(outputs) / seconds:.2f} requests/s, {num_out / seconds:.1f} output tokens/s, "
        f"{(num_in + num_out) / seconds:.1f} tokens/s in all\n" + _latencies(outputs)
    )


def latency(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Seconds per round of `batch_size` requests, over `num_iters` rounds."""
    seconds = []
    outputs: list[RequestOutput] = []
    with LLM(**settings) as llm:
        _run(llm, arguments, arguments.batch_size, seed=0)
        for iteration in range(arguments.num_iters):
            settings["on_progress"]("measuring", iteration / arguments.num_iters)
            started = time.perf_counter()
            outputs += _run(llm, arguments, arguments.batch_size, seed=1 + iteration)
            seconds.append(time.perf_counter() - started)
    return (
        f"{arguments.batch_size} at once, {arguments.input_len} tokens in, "
        f"{arguments.output_len} out, {arguments.num_iters} rounds\n"
        f"round: {_spread(seconds)}\n" + _latencies(outputs)
    )


def _run(
    llm: LLM, arguments: argparse.Namespace, num_prompts: int, *, seed: int
) -> list[RequestOutput]:
    rng = random.Random(seed)
    vocab_size = llm.info.worker.vocab_size
    prompts = [
        [rng.randrange(FIRST_ID, vocab_size) for _ in range(arguments.input_len)]
        for _ in range(num_prompts)
    ]
    params = SamplingParams(
        temperature=0, max_tokens=arguments.output_len, ignore_eos=True, detokenize=False
    )
    return llm.generate(prompts, params, use_tqdm=False)


def _latencies(outputs: list[RequestOutput]) -> str:
    first, between = [], []
    for metrics in (output.metrics for output in outputs):
        assert metrics.first_token_time is not None and metrics.finished_time is not None
        first.append(metrics.first_token_time - metrics.arrival_time)
        if metrics.num_generation_tokens > 1:
            decoding = metrics.finished_time - metrics.first_token_time
            between.append(decoding / (metrics.num_generation_tokens - 1))
    lines = [f"time to first token: {_spread(first)}"]
    if between:
        lines.append(f"time per later token: {_spread(between)}")
    return "\n".join(lines)


def _spread(seconds: list[float]) -> str:
    """Mean and percentiles, in milliseconds."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99))
    return (
        f"mean {statistics.fmean(seconds) * 1e3:.1f} ms, p50 {p50 * 1e3:.1f} ms, "
        f"p99 {p99 * 1e3:.1f} ms"
    )
