"""Several ranks, and several replicas, behind one engine: who dies costs a pause and no token."""

import asyncio
import os
import signal
from typing import Any

import pytest

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.protocol.messages import CoreStatus
from tests.e2e.processes import alive, core_children, rank_children, wait_until
from tests.waiting import WAIT_S

SYNTHETIC: dict[str, Any] = {
    "model": "synthetic",
    "load_format": "synthetic",
    "step_ms": 5.0,
    "num_gpu_blocks_override": 4000,
    "skip_tokenizer_init": True,
}
NUM_STREAMS, NUM_TOKENS = 12, 600


def engine(**settings: Any) -> AsyncLLM:
    return AsyncLLM(**{**SYNTHETIC, **settings})


async def ids_of(llm: AsyncLLM, prompt: list[int], seed: int, num_tokens: int) -> list[int]:
    params = SamplingParams(seed=seed, max_tokens=num_tokens, ignore_eos=True)
    ids: list[int] = []
    async for output in llm.generate(prompt, params):
        ids = output.outputs[0].token_ids
    return ids


async def all_told(llm: AsyncLLM, num_tokens: int) -> list[CoreStatus]:
    """The replicas' statuses, once they tell of so many tokens: they come once a second."""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = [status for status in llm.replica_stats if status is not None]
            if sum(status.num_generation_tokens for status in found) >= num_tokens:
                return found
            await asyncio.sleep(0.02)


async def all_ids(llm: AsyncLLM) -> list[list[int]]:
    prompts = [[7 * index + 1] * 40 for index in range(NUM_STREAMS)]
    streams = [ids_of(llm, prompt, seed, NUM_TOKENS) for seed, prompt in enumerate(prompts)]
    return await asyncio.gather(*streams)


async def undisturbed_ids() -> list[list[int]]:
    """Of steps that take hardly any time: what is sampled does not depend on it."""
    async with engine(step_ms=0.1) as llm:
        return await all_ids(llm)


async def all_running(llm: AsyncLLM) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await llm.stats()).num_running < NUM_STREAMS:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("victim", "shared"), [(0, "tensor_parallel_size"), (1, "pipeline_parallel_size")]
)
async def test_a_rank_dies_amid_streams_which_resume(victim: int, shared: str) -> None:
    expected = await undisturbed_ids()
    async with engine(**{shared: 2}) as llm:
        (core,) = core_children(os.getpid())
        ranks = rank_children(core)
        assert len(ranks) == 2
        streams = asyncio.create_task(all_ids(llm))
        await all_running(llm)
        os.kill(ranks[victim], signal.SIGKILL)
        assert await streams == expected
        (core,) = core_children(os.getpid())
        again = rank_children(core)
        assert len(again) == 2 and not set(ranks) & set(again)
        os.kill(again[victim], signal.SIGKILL)
        ranks += again

        def others() -> set[int]:
            found = [rank for core in core_children(os.getpid()) for rank in rank_children(core)]
            return set(found) - set(ranks)

        # Nobody asks for anything now, and nobody has to.
        async with asyncio.timeout(WAIT_S):
            while len(others()) < 2:
                await asyncio.sleep(0.02)
        ranks += others()
    wait_until(lambda: not any(map(alive, ranks)), timeout_s=WAIT_S, what="ranks end")


async def test_a_replica_dies_and_its_streams_go_on_at_the_other() -> None:
    expected = await undisturbed_ids()
    async with engine(data_parallel_size=2) as llm:
        assert len(core_children(os.getpid())) == 2
        streams = asyncio.create_task(all_ids(llm))
        await all_running(llm)
        os.kill(core_children(os.getpid())[0], signal.SIGKILL)
        assert await streams == expected
        assert await all_ids(llm) == expected


async def test_replicas_share_requests_and_keep_what_begins_alike_together() -> None:
    async with engine(data_parallel_size=3, max_num_seqs=64) as llm:
        groups = [[100 + group] * 256 for group in range(6)]
        for group in groups:
            await ids_of(llm, [*group, 1], 0, 2)
        streams = [ids_of(llm, [*group, index], index, 4) for index in range(8) for group in groups]
        await asyncio.gather(*streams)
        statuses = await all_told(llm, 6 * 2 + 48 * 4)
        assert len(statuses) == 3
        total = await llm.stats()
        assert total.num_generation_tokens == sum(one.num_generation_tokens for one in statuses)
        assert total.num_generation_tokens == 6 * 2 + 48 * 4
        shares = [one.num_generation_tokens / total.num_generation_tokens for one in statuses]
        assert max(shares) < 0.45, shares
        # All but the first of each group have found its beginning.
        assert total.prefix_cache_hits >= 0.95 * 48 * 256
        assert await llm.reset_prefix_cache()


async def test_unprefixed_requests_are_shared_evenly_and_many_frontends_may_attach() -> None:
    async with engine(data_parallel_size=2) as owner:
        async with await AsyncLLM.connect(owner.address, skip_tokenizer_init=True) as llm:
            prompts = [[index + 1] * 70 for index in range(40)]
            ids = await asyncio.gather(*(ids_of(llm, prompt, 3, 20) for prompt in prompts))
            assert ids == await asyncio.gather(*(ids_of(owner, one, 3, 20) for one in prompts))
        tokens = [one.num_generation_tokens for one in await all_told(owner, 2 * 40 * 20)]
        assert sum(tokens) == 2 * 40 * 20
        assert max(tokens) <= 1.1 * sum(tokens) / 2
