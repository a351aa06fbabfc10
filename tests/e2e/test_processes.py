"""Real processes: cores die with their owners, clients hear of a core's death, many share one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.frontend.errors import EngineDeadError
from tests.e2e.processes import alive, core_children, wait_until
from tests.waiting import WAIT_S

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, output_kind="delta")
LONGEST = SamplingParams(max_tokens=8000, seed=1, ignore_eos=True, output_kind="delta")
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}
# 160 s for the longest request: it ends of what the test does.
ENDLESS: dict[str, Any] = {
    "load_format": "synthetic",
    "step_ms": 20.0,
    "skip_tokenizer_init": True,
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama"))


def make_llm(model: str) -> LLM:
    return LLM(model, skip_tokenizer_init=True, dtype="float32", device="cpu", max_model_len=256)


def run_script(path: Path, source: str) -> "subprocess.Popen[str]":
    """Run `source` as a user's script: no package on its path but the installed one's. Where it
    asks for input, it waits to be looked at."""
    path.write_text(source)
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )


SCRIPT = """
from nanovllm import LLM, SamplingParams
llm = LLM({model!r}, skip_tokenizer_init=True, dtype="float32", device="cpu", max_model_len=256)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
print(llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], params)[0].outputs[0].token_ids, flush=True)
"""


def test_a_script_needs_no_main_guard_and_leaves_no_process(model: str, tmp_path: Path) -> None:
    script = run_script(tmp_path / "script.py", SCRIPT.format(model=model) + "\ninput()\n")
    wait_until(lambda: core_children(script.pid), timeout_s=WAIT_S, what="core started")
    (core,) = core_children(script.pid)
    out, err = script.communicate("go on\n", timeout=WAIT_S)
    assert script.returncode == 0, err
    assert out.count(",") == 7
    wait_until(lambda: not alive(core), timeout_s=WAIT_S, what="core ended")


def test_a_core_dies_with_its_owner_even_when_that_is_killed(model: str, tmp_path: Path) -> None:
    source = SCRIPT.format(model=model) + "\ninput()\n"
    script = run_script(tmp_path / "script.py", source)
    assert script.stdout is not None
    assert script.stdout.readline().startswith("[")
    (core,) = core_children(script.pid)
    script.kill()
    script.communicate()
    wait_until(lambda: not alive(core), timeout_s=WAIT_S, what="orphan core ended")


def test_a_core_dies_with_an_owner_killed_while_loading(model: str, tmp_path: Path) -> None:
    script = run_script(tmp_path / "script.py", SCRIPT.format(model=model) + "\ninput()\n")
    wait_until(lambda: core_children(script.pid), timeout_s=WAIT_S, what="core started")
    (core,) = core_children(script.pid)
    script.kill()
    script.communicate()
    wait_until(lambda: not alive(core), timeout_s=WAIT_S, what="orphan core ended")


async def test_a_killed_core_fails_every_pending_call() -> None:
    async with AsyncLLM("synthetic", on_core_death="fail", **ENDLESS) as llm:
        (core,) = core_children(os.getpid())
        streams = [llm.generate(PROMPT, LONGEST) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        os.kill(core, signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(EngineDeadError, match=r"signal 9|SIGKILL"):
                async for _ in stream:
                    pass
        assert time.monotonic() - killed < WAIT_S
        with pytest.raises(EngineDeadError):
            await llm.reset_prefix_cache()
        with pytest.raises(EngineDeadError):
            await anext(llm.generate(PROMPT, SHORT))


def test_the_root_cause_of_a_failed_start_reaches_the_user(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        LLM(model, skip_tokenizer_init=True, device="cpu", max_model_len=10**9)
    with pytest.raises(ValueError, match=r"no-such-model|no such"):
        LLM(str(tmp_path / "no-such-model"), skip_tokenizer_init=True)
    assert core_children(os.getpid()) == []


@pytest.fixture
def standalone(model: str, tmp_path: Path) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    address = f"ipc://{tmp_path}/core.sock"
    core = start_standalone(model, address)
    yield core, address
    core.kill()
    core.communicate()


def start_standalone(model: str, address: str, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "nanovllm.launch", "--address", address, "--model", model]
    command += ["--skip-tokenizer-init"]
    command += flags or ["--dtype", "float32", "--device", "cpu", "--max-model-len", "256"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def connect(address: str, **settings: Any) -> AsyncLLM:
    """To a core that may only just have been started."""
    return await AsyncLLM.connect(address, connect_timeout_s=WAIT_S, **settings)


async def collect(llm: AsyncLLM) -> list[int]:
    return [i async for out in llm.generate(PROMPT, LONG) for i in out.outputs[0].token_ids]


async def test_many_clients_share_a_standalone_core(
    standalone: "tuple[subprocess.Popen[str], str]", model: str
) -> None:
    core, address = standalone
    clients = await asyncio.gather(*(connect(address) for _ in range(3)))
    outputs = await asyncio.gather(*(collect(llm) for llm in clients))
    assert len(outputs[0]) == 200 and outputs[0] == outputs[1] == outputs[2]
    leaving = clients.pop()
    await leaving.close()
    late = await connect(address)
    assert await collect(late) == outputs[0]
    for llm in (*clients, late):
        await llm.close()
    core.terminate()
    assert core.wait(WAIT_S) == 0


async def test_clients_of_a_standalone_core_hear_of_its_death(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core.sock"
    flags = ["--load-format", "synthetic", "--step-ms", "20"]
    core = start_standalone("synthetic", address, *flags)
    llm = await connect(address, on_core_death="fail", skip_tokenizer_init=True)
    stream = llm.generate(PROMPT, LONGEST)
    await anext(stream)
    core.kill()
    core.communicate()
    killed = time.monotonic()
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass
    assert time.monotonic() - killed < WAIT_S
    await llm.close()


async def test_an_address_in_use_is_refused_and_its_holder_lives(
    standalone: "tuple[subprocess.Popen[str], str]", model: str
) -> None:
    _, address = standalone
    llm = await connect(address)
    second = start_standalone(model, address)
    _, err = second.communicate(timeout=WAIT_S)
    assert second.returncode == 2 and "in use" in err
    assert len(await collect(llm)) == 200
    await llm.close()


async def test_connecting_to_nobody_fails_in_bounded_time(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises((EngineDeadError, ValueError), match=r"nobody\.sock"):
        await AsyncLLM.connect(f"ipc://{tmp_path}/nobody.sock", connect_timeout_s=1.0)
    assert time.monotonic() - started < WAIT_S


def test_an_llm_serves_again_after_a_bad_request(model: str) -> None:
    with make_llm(model) as llm:
        for bad, field in (
            ({"prompt_token_ids": []}, "prompt"),
            ({"prompt_token_ids": [10**6]}, "vocab"),
            ({"prompt_token_ids": [5] * 300}, "max_model_len"),
            ("text", "tokenizer"),
        ):
            with pytest.raises(ValueError, match=field):
                llm.generate([bad], SHORT, use_tqdm=False)
        outputs = llm.generate([PROMPT] * 3, SHORT, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8, 8]
