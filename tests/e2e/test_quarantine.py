"""A request that kills its core fails alone: it is found, and everybody else's goes on."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.faults import Load, Run, owner, run, same_ids, stream
from nanovllm import AsyncLLM, QuarantinedError, SamplingParams
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.server.run import bind
from nanovllm.frontend.server.run import serve as run_server
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.server.settings import ServerSettings
from tests.e2e import poisoned_core
from tests.e2e.poisoned_core import POISON, SLOW_LENGTH, SLOW_POISON
from tests.waiting import WAIT_S

PROGRAM = [poisoned_core.__file__]
SYNTHETIC: dict[str, Any] = {"load_format": "synthetic", "step_ms": 2.0}
LONG = SamplingParams(max_tokens=150, seed=3, ignore_eos=True, output_kind="delta")
SHORT = SamplingParams(max_tokens=3, seed=4, ignore_eos=True)
BOUND_S = 120.0


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owned cores are of the kind that dies of `POISON`."""
    monkeypatch.setattr("nanovllm.frontend.core_process.PROGRAM", PROGRAM)


class Deaths:
    """Counts the restarts of an engine's own core."""

    def __init__(self, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        (handle,) = llm._handles
        restart = handle.restart

        def counted() -> None:
            self.count += 1
            restart()

        monkeypatch.setattr(handle, "restart", counted)


async def poisoning(llm: AsyncLLM, *, n: int = 1, prompt: list[int] | None = None) -> str:
    """Why the poison failed, which it must."""
    params = SamplingParams(max_tokens=20, seed=5, n=n, ignore_eos=True)
    with pytest.raises(QuarantinedError) as caught:
        await stream(llm, prompt or [5, POISON], params)
    return str(caught.value)


async def test_a_poison_beside_64_streams_of_8_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(num_clients=8, num_streams=64, num_tokens=200, step_ms=5.0)
    async with owner(load) as llm:
        undisturbed = await run(llm, load)
        deaths = Deaths(llm, monkeypatch)
        causes: list[str] = []

        async def poison(llm: AsyncLLM, clients: object) -> None:
            causes.append(await asyncio.wait_for(poisoning(llm), WAIT_S))

        disturbed: Run = await run(llm, load, poison)
        assert same_ids(undisturbed, disturbed) == 64
        assert "signal 11" in causes[0]
        assert deaths.count <= 2
        assert disturbed.num_free_blocks_missing == 0


async def test_many_suspects_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 requests of one client, submitted in the same moment as a poison of 4 outputs."""
    async with AsyncLLM("synthetic", max_core_restarts=2, **SYNTHETIC) as llm, AsyncTimeout():
        deaths = Deaths(llm, monkeypatch)
        prompts = [[7, index] for index in range(64)]
        expected = await asyncio.gather(*(stream(llm, prompt, SHORT) for prompt in prompts))
        innocent = [stream(llm, prompt, SHORT) for prompt in prompts]
        tasks = [asyncio.create_task(one) for one in innocent[:32]]
        poison = asyncio.create_task(poisoning(llm, n=4))
        tasks += [asyncio.create_task(one) for one in innocent[32:]]
        done = await asyncio.gather(*tasks)
        assert [ids for ids, _, _ in done] == [ids for ids, _, _ in expected]
        cause = await poison
        assert "signal 11" in cause and deaths.count == 2


async def test_no_number_of_poisons_spends_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncLLM("synthetic", max_core_restarts=2, **SYNTHETIC) as llm, AsyncTimeout():
        expected = await stream(llm, [5], LONG)
        deaths = Deaths(llm, monkeypatch)
        healthy = [asyncio.create_task(stream(llm, [5], LONG)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await asyncio.gather(*(poisoning(llm, prompt=[POISON, index]) for index in range(3)))
        for _ in range(2):
            await poisoning(llm)
        for done in await asyncio.gather(*healthy):
            assert done[0] == expected[0]
        assert deaths.count == 4 + 2 * 2, "one for all three together, then one for each"
        assert await stream(llm, [5], LONG) and llm.is_running


async def poisoning_midway(llm: AsyncLLM) -> None:
    """It has brought tokens before its core dies of it, and fails with all that are safe."""
    got: list[int] = []
    with pytest.raises(QuarantinedError, match=r"signal 11|closed the connection"):
        async for output in llm.generate({"prompt_token_ids": [5, SLOW_POISON]}, LONG):
            got += output.outputs[0].token_ids
    assert len(got) < SLOW_LENGTH  # by how many died with the process, before they were sent


async def test_a_poison_that_comes_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncLLM("synthetic", **SYNTHETIC) as llm, AsyncTimeout():
        expected = [await stream(llm, [5, index], LONG) for index in range(8)]
        healthy = [asyncio.create_task(stream(llm, [5, index], LONG)) for index in range(8)]
        deaths = Deaths(llm, monkeypatch)
        await poisoning_midway(llm)
        done = await asyncio.gather(*healthy)
        assert [one[0] for one in done] == [one[0] for one in expected]
        assert deaths.count == 2, "when it came, and when it was alone"


async def test_aborts_and_deadlines_of_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end at once, also while the core is away, or tries others."""
    async with AsyncLLM("synthetic", **SYNTHETIC) as llm, AsyncTimeout():
        poison = asyncio.create_task(poisoning(llm))
        late = SamplingParams(max_tokens=10_000 // 2, seed=3, ignore_eos=True)
        names = ["one", "two"]
        aborted = [asyncio.create_task(last_reason(llm, name, late)) for name in names]
        timed = asyncio.create_task(last_reason(llm, "timed", late, deadline_ms=50.0))
        left = asyncio.create_task(stream(llm, [8], late))
        while not llm.is_stalled:
            await asyncio.sleep(0.005)
        await llm.abort("one")
        left.cancel()
        await poison
        await llm.abort("two")
        assert await asyncio.gather(*aborted, timed) == ["abort", "abort", "timeout"]
        status = await llm.stats()
        while status.num_running or status.num_waiting:
            await asyncio.sleep(0.1)
            status = await llm.stats()


async def last_reason(llm: AsyncLLM, name: str, params: SamplingParams, **options: Any) -> str:
    async for output in llm.generate({"prompt_token_ids": [6]}, params, name, **options):
        reason = output.outputs[0].finish_reason
    assert reason is not None
    return reason


@asynccontextmanager
async def AsyncTimeout() -> AsyncIterator[None]:  # noqa: N802
    async with asyncio.timeout(BOUND_S):
        yield


# ---- a core that somebody else starts again, and two clients of it


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[str]:
    """The address of a core whose keeper starts it again whenever it has died."""
    address = f"ipc://{tmp_path}/core.sock"
    keeper = tmp_path / "keeper.sh"
    flags = "--model synthetic --load-format synthetic --step-ms 2"
    keeper.write_text(
        f"trap 'kill $core; exit' TERM\n"
        f"while true; do {sys.executable} {PROGRAM[0]} --address {address} {flags} & core=$!\n"
        "wait $core; done\n"
    )
    process = subprocess.Popen(["sh", str(keeper)])
    yield address
    process.terminate()
    process.wait()


async def two_clients(address: str) -> list[AsyncLLM]:
    """Of a core that may only just have been started."""
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "connect_timeout_s": WAIT_S}
    return await asyncio.gather(*(AsyncLLM.connect(address, **settings) for _ in range(2)))


async def test_innocents_of_other_clients_survive(kept: str) -> None:
    """Both clients have suspects; the core tries them one at a time whosever they are."""
    first, second = await two_clients(kept)
    try:
        async with asyncio.timeout(BOUND_S):
            prompts = [[9, index] for index in range(16)]
            expected = [(await stream(second, prompt, SHORT))[0] for prompt in prompts]
            for _ in range(4):  # more deaths than a client would bear of a core of its own
                done = await asyncio.gather(
                    poisoning(first),
                    *(stream(second, prompt, SHORT) for prompt in prompts),
                    *(stream(first, prompt, SHORT) for prompt in prompts),
                )
                assert [one[0] for one in done[1:]] == expected * 2
    finally:
        await first.close()
        await second.close()


async def test_a_poison_that_comes_midway_in_a_core_of_others(kept: str) -> None:
    """Nobody here sees how the core ends: the next one tells."""
    first, second = await two_clients(kept)
    try:
        async with asyncio.timeout(BOUND_S):
            expected = [(await stream(second, [5, index], LONG))[0] for index in range(4)]
            epochs = [first.info.epoch]
            back = first._running.on_core_back  # type: ignore[union-attr]

            def note_life() -> None:
                epochs.append(first.info.epoch)
                back()

            first._running.on_core_back = note_life  # type: ignore[union-attr, method-assign]
            healthy = [asyncio.create_task(stream(second, [5, index], LONG)) for index in range(4)]
            await poisoning_midway(first)
            done = await asyncio.gather(*healthy)
            assert [one[0] for one in done] == expected
            assert len(epochs) == len(set(epochs)) == 3, "two deaths"
    finally:
        await first.close()
        await second.close()


# ---- over HTTP


async def test_over_http_its_sender_alone_is_told() -> None:
    settings, stop = ServerSettings(port=0), asyncio.Event()
    ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        llm = AsyncLLM("synthetic", skip_tokenizer_init=True, **SYNTHETIC)
        await llm.start()
        return llm

    listener = bind(settings, shared=False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    server = asyncio.create_task(
        run_server(settings, open_llm, listener, ready.set_result, lifeline=stop)
    )
    try:
        async with asyncio.timeout(BOUND_S), httpx.AsyncClient(timeout=BOUND_S) as http:
            await ready
            body = {"model": "synthetic", "max_tokens": 30, "seed": 3, "ignore_eos": True}
            posts = [http.post(url, json={**body, "prompt": [7, index]}) for index in range(16)]
            *innocent, poison = await asyncio.gather(
                *posts, http.post(url, json={**body, "prompt": [7, POISON]})
            )
            assert [one.status_code for one in innocent] == [200] * 16
            assert [one.json()["usage"]["completion_tokens"] for one in innocent] == [30] * 16
            assert poison.status_code == 422
            error = poison.json()["error"]
            assert error["code"] == "request_quarantined" and "signal 11" in error["message"]
    finally:
        stop.set()
        await asyncio.wait_for(server, BOUND_S)
