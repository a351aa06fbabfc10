"""Processes that die or stand still: all others go on, and no token is lost or repeated."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import (
    STALLED,
    Load,
    Run,
    core_pid,
    kill_clients,
    kill_core,
    line_of,
    owner,
    run,
    same_ids,
    stream,
)
from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.frontend.errors import EngineDeadError
from tests.e2e.processes import core_children
from tests.waiting import WAIT_S

SMALL = Load(num_clients=2, num_streams=8, num_tokens=400)  # 4 s, of which faults need the first
LONG = SamplingParams(max_tokens=150, seed=3, ignore_eos=True, output_kind="delta")
SYNTHETIC: dict[str, Any] = {"load_format": "synthetic", "step_ms": 5.0}


async def undisturbed_run(load: Load) -> Run:
    """Of a core whose steps take hardly any time: what is sampled does not depend on it."""
    fast = dataclasses.replace(load, step_ms=0.1)
    async with owner(fast) as llm:
        return await run(llm, fast)


async def test_streams_of_several_clients_survive_killed_cores_clients_and_a_stopped_core() -> None:
    undisturbed = await undisturbed_run(SMALL)
    async with owner(SMALL) as llm:
        twice = await run(llm, SMALL, kill_core(2))
        assert same_ids(undisturbed, twice) == 8
        assert twice.longest_pause_s > 0.1
        assert twice.num_free_blocks_missing == 0
        lonely = await run(llm, SMALL, kill_clients(1))
        assert same_ids(undisturbed, lonely) == 4
        assert lonely.num_free_blocks_missing == 0, "those of the dead are free"


async def stop_until_reported(llm: AsyncLLM, clients: list[asyncio.subprocess.Process]) -> None:
    """Stop the core amid the streams of its one client, until that says so."""
    while (await llm.stats()).num_running < 4:
        await asyncio.sleep(0.02)
    pid = core_pid(llm)
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(WAIT_S):
            assert await line_of(clients[0]) == f"{STALLED}\n".encode()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_stopped_core_is_reported_and_loses_nothing() -> None:
    load = Load(num_clients=1, num_streams=4, num_tokens=400)
    undisturbed = await undisturbed_run(load)
    async with owner(load) as llm:
        stopped = await run(llm, load, stop_until_reported)
        assert same_ids(undisturbed, stopped) == 4
        assert stopped.longest_pause_s > 1.0
        async with asyncio.timeout(WAIT_S):
            while llm.is_stalled:
                await asyncio.sleep(0.02)


async def test_a_loop_stuck_in_a_step_is_reported_and_loses_nothing() -> None:
    load = Load(num_clients=1, num_streams=4, num_tokens=2, step_ms=4000.0)
    async with owner(load) as llm:
        stuck = await run(llm, load)
    (client,) = stuck.clients
    assert client is not None and client["stalled_at"] - client["started_at"] > 1.0
    assert [len(ids) for stream in client["ids"] for ids in stream] == [2] * 5


def ids_of(done: list[tuple[list[list[int]], int, float]]) -> list[list[list[int]]]:
    return [ids for ids, _, _ in done]


async def kill_midway(llm: AsyncLLM, streams: list[Any], *, after_s: float) -> list[Any]:
    """Gather the streams, whose core is killed meanwhile."""
    gathering = asyncio.gather(*streams)
    await asyncio.sleep(after_s)
    os.kill(core_pid(llm), signal.SIGKILL)
    return await gathering


@pytest.mark.model
async def test_a_real_model_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # many threads on a busy machine wait for each other
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, output_kind="delta", **common),
        SamplingParams(seed=5, output_kind="delta", **common),  # from the whole vocabulary
        SamplingParams(seed=6, top_p=0.9, repetition_penalty=1.2, **common),
        SamplingParams(seed=7, top_k=50, temperature=1.5, n=2, **common),
    ]
    prompts = ["The capital of France is", "Once upon a time", "def f(x):", "In 1969,"]

    async with AsyncLLM("smollm2", dtype="float32", max_model_len=256) as llm:

        async def texts(prompt: str, one: SamplingParams) -> tuple[str, list[list[int]]]:
            text, ids = "", []
            async for output in llm.generate(prompt, one):
                delta = one.output_kind == "delta"
                text = text + output.outputs[0].text if delta else output.outputs[0].text
                new = [completion.token_ids for completion in output.outputs]
                ids = [a + b for a, b in zip(ids, new, strict=True)] if ids and delta else new
            assert output.metrics.num_generation_tokens == 24 * one.n
            return text, ids

        def all_streams() -> list[Any]:
            return [texts(prompt, one) for prompt, one in zip(prompts, params, strict=True)]

        expected = await asyncio.gather(*all_streams())
        assert await kill_midway(llm, all_streams(), after_s=0.3) == expected


def test_the_synchronous_engine_resumes_too() -> None:
    longer = SamplingParams(max_tokens=800, seed=3, ignore_eos=True, output_kind="delta")
    with LLM("synthetic", load_format="synthetic", step_ms=0.1) as llm:
        expected = llm.generate([[5, 6], [7]], longer, use_tqdm=False)
    with LLM("synthetic", **SYNTHETIC) as llm:
        (core,) = core_children(os.getpid())
        asyncio.run_coroutine_threadsafe(kill_running(llm._llm, core, 2), llm._loop)
        outputs = llm.generate([[5, 6], [7]], longer, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [
            o.outputs[0].token_ids for o in expected
        ]
        assert [o.metrics.num_resumes for o in outputs] == [1, 1]
        assert [o.metrics.num_generation_tokens for o in outputs] == [800, 800]


async def kill_running(llm: AsyncLLM, core: int, num_running: int) -> None:
    """Kill the core once it runs so many requests."""
    while (await llm.stats()).num_running < num_running:
        await asyncio.sleep(0)
    os.kill(core, signal.SIGKILL)


# ---- a core that somebody else starts


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


def start_standalone(address: str, **settings: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "nanovllm.launch", "--address", address]
    for name, value in {"model": "synthetic", **SYNTHETIC, **settings}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return subprocess.Popen(command)


@pytest.fixture
def standalone(address: str) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes that were at the address; the last one is there now."""
    lives = [start_standalone(address)]
    yield lives
    for core in lives:
        core.kill()
        core.wait()


@pytest.fixture
async def attached(address: str, standalone: Any) -> AsyncIterator[AsyncLLM]:
    bounds = {"connect_timeout_s": WAIT_S, "core_return_timeout_s": 2 * WAIT_S}
    llm = await AsyncLLM.connect(address, skip_tokenizer_init=True, **bounds)
    yield llm
    await llm.close()


async def test_a_client_waits_for_a_core_to_come_back_to_its_address(
    attached: AsyncLLM, standalone: Any, address: str
) -> None:
    expected = await stream(attached, [5, 6], LONG)
    streams = [asyncio.create_task(stream(attached, [5, 6], LONG)) for _ in range(2)]
    await asyncio.sleep(0.2)
    standalone[-1].kill()
    epoch = attached.info.epoch
    async with asyncio.timeout(WAIT_S):
        while not attached.is_stalled:
            await asyncio.sleep(0.02)
    assert attached.is_running
    # What is asked for in the meantime is done when there is somebody to do it.
    late = asyncio.create_task(stream(attached, [5, 6], LONG))
    stats = asyncio.create_task(attached.stats())
    await asyncio.sleep(0.1)
    standalone.append(start_standalone(address))
    done = await asyncio.gather(*streams, late)
    assert ids_of(list(done)) == [expected[0]] * 3
    assert (await stats).epoch == attached.info.epoch != epoch
    assert not attached.is_stalled


async def test_another_model_at_the_address_continues_nothing(
    attached: AsyncLLM, standalone: Any, address: str
) -> None:
    endless = SamplingParams(max_tokens=8000, seed=3, ignore_eos=True, output_kind="delta")
    streaming = attached.generate({"prompt_token_ids": [5, 6]}, endless)
    await anext(streaming)
    standalone[-1].kill()
    standalone[-1].wait()
    standalone.append(start_standalone(address, vocab_size=77))
    with pytest.raises(EngineDeadError, match=r"another model.*vocab_size 77.*32000"):
        async for _ in streaming:
            pass
    assert not attached.is_running
