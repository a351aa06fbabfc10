"""Three engines behind one address beside one that is as large as all three: what is lost?

    python benchmarks/replicas.py

On the synthetic model, whose ids depend on every token before them. `prefixes`: 64 streams ask
request after request, each of which begins as others do and goes on differently; not all that is
asked fits into the cache. How much of the prompts is found there, by the three and by the large
one. `death`: one of the three is killed amid 64 streams. `balance`: prompts that have nothing in
common; how many tokens the busiest replica computes, beside a third of all.
Targets: 0.95 of what the large one finds; no stream is lost, all ids equal; 1.1 of a third.
"""

import argparse
import asyncio
import os
import random
import signal
import time
from typing import Any

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.protocol.messages import CoreStatus

NUM_STREAMS = 64
NUM_REPLICAS = 3
BLOCK_SIZE = 16
PREFIX_LEN = 512
NUM_BLOCKS = 4000  # of the large one: 64,000 tokens


def engine(num_replicas: int, **more: Any) -> AsyncLLM:
    """Of as many rows and blocks in all, however many cores share them."""
    settings: dict[str, Any] = {"load_format": "synthetic", "skip_tokenizer_init": True}
    settings |= {"step_ms": 2.0, "block_size": BLOCK_SIZE, "data_parallel_size": num_replicas}
    settings |= {"max_num_seqs": 96 // num_replicas, "max_model_len": 2048}
    settings |= {"num_gpu_blocks_override": NUM_BLOCKS // num_replicas}
    return AsyncLLM("synthetic", **settings | more)


async def ids_of(
    llm: AsyncLLM, prompt: list[int], params: SamplingParams, begun: set[int] | None = None
) -> list[int]:
    """begun: takes up the seeds of requests that have got a token."""
    ids: list[int] = []
    async for output in llm.generate(prompt, params):
        ids = output.outputs[0].token_ids
        if begun is not None and params.seed is not None:
            begun.add(params.seed)
    return ids


async def statuses(llm: AsyncLLM, num_tokens: int) -> list[CoreStatus]:
    """Of the replicas, once they tell of so many tokens: they come once a second."""
    async with asyncio.timeout(10):
        while True:
            found = [one for one in llm.replica_stats if one is not None]
            if sum(one.num_generation_tokens for one in found) >= num_tokens:
                return found
            await asyncio.sleep(0.05)


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 30_000) for _ in range(count)]


async def hit_rate(num_replicas: int, num_prefixes: int, num_requests: int) -> float:
    """The share of prompt tokens that are found in a cache."""
    rng = random.Random(1)
    prefixes = [random_ids(rng, PREFIX_LEN) for _ in range(num_prefixes)]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)

    async def stream(number: int) -> None:
        own = random.Random(number)
        for _ in range(num_requests):
            prompt = own.choice(prefixes) + random_ids(own, own.randrange(16, 128))
            await ids_of(llm, prompt, params)

    async with engine(num_replicas) as llm:
        await asyncio.gather(*map(stream, range(NUM_STREAMS)))
        found = await statuses(llm, NUM_STREAMS * num_requests * 16)
    return sum(one.prefix_cache_hits for one in found) / sum(
        one.prefix_cache_queries for one in found
    )


async def report_prefixes(num_requests: int) -> None:
    print("| prefixes of 512 tokens | found by one large | by three | ratio |\n|---|---|---|---|")
    for num_prefixes in (24, 60, 120):  # 0.2, 0.5 and 1 of what the large one holds
        large = await hit_rate(1, num_prefixes, num_requests)
        several = await hit_rate(NUM_REPLICAS, num_prefixes, num_requests)
        ratio = several / large
        print(f"| {num_prefixes} | {large:.3f} | {several:.3f} | {ratio:.3f} |", flush=True)


async def report_death(num_tokens: int, times: int) -> None:
    params = [
        SamplingParams(temperature=number % 2, seed=number, max_tokens=num_tokens, ignore_eos=True)
        for number in range(NUM_STREAMS)
    ]
    asked = [random_ids(random.Random(number), 100) for number in range(NUM_STREAMS)]

    async def all_ids(llm: AsyncLLM, begun: set[int]) -> list[list[int]]:
        streams = zip(asked, params, strict=True)
        return await asyncio.gather(*(ids_of(llm, *stream, begun) for stream in streams))

    async with engine(1) as llm:
        expected = await all_ids(llm, set())
    num_equal = 0
    async with engine(NUM_REPLICAS, max_core_restarts=10**6) as llm:
        for number in range(times):
            begun: set[int] = set()
            streams = asyncio.create_task(all_ids(llm, begun))
            while len(begun) < NUM_STREAMS:
                await asyncio.sleep(0.01)
            os.kill(llm._handles[number % NUM_REPLICAS].process.pid, signal.SIGKILL)
            num_equal += sum(a == b for a, b in zip(await streams, expected, strict=True))
            while llm.is_stalled or any(one is None for one in llm.replica_stats):
                await asyncio.sleep(0.05)  # the killed one comes back
    print(f"a replica killed {times} times: {num_equal} of {times * NUM_STREAMS} streams equal")


async def report_balance(num_requests: int) -> None:
    lengths = random.Random(3)

    async def stream(number: int) -> int:
        own, num_tokens = random.Random(1000 + number), 0
        for _ in range(num_requests):
            num_new = lengths.randrange(20, 200)
            params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
            await ids_of(llm, random_ids(own, own.randrange(16, 512)), params)
            num_tokens += num_new
        return num_tokens

    async with engine(NUM_REPLICAS) as llm:
        started = time.monotonic()
        num_tokens = sum(await asyncio.gather(*map(stream, range(NUM_STREAMS))))
        seconds = time.monotonic() - started
        found = await statuses(llm, num_tokens)
    shares = [one.num_generation_tokens / num_tokens * NUM_REPLICAS for one in found]
    prompts = [one.num_prompt_tokens for one in found]
    asked = [count / sum(prompts) * NUM_REPLICAS for count in prompts]
    print(
        f"{NUM_STREAMS * num_requests} requests without common beginnings, {seconds:.1f} s: of a "
        f"third of the new tokens each has {', '.join(f'{one:.3f}' for one in shares)}; of the "
        f"prompts' {', '.join(f'{one:.3f}' for one in asked)}"
    )


async def report(arguments: argparse.Namespace) -> None:
    await report_prefixes(arguments.requests)
    await report_death(arguments.tokens, arguments.times)
    await report_balance(arguments.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=20, help="of each stream")
    parser.add_argument(
        "--tokens", type=int, default=400, help="of each stream amid which one dies"
    )
    parser.add_argument("--times", type=int, default=6, help="that a replica is killed")
    asyncio.run(report(parser.parse_args()))


if __name__ == "__main__":
    main()
