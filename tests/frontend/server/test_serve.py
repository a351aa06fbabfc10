"""`nanovllm serve` as a program: its port, its processes, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from nanovllm import cli
from nanovllm.frontend.server.command import default_frontends
from nanovllm.protocol.messages import AddRequest, Finished, Outputs
from tests.e2e.processes import alive, wait_until
from tests.frontend.attached import says
from tests.frontend.fake_core import FakeCore, begin
from tests.frontend.vocabulary import save

TIMEOUT_S = 60.0


class Program:
    """A running `nanovllm serve`, and what it has said."""

    def __init__(self, *flags: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.cli", "serve", *flags, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        self.said = ""

    def hear(self, pattern: str) -> re.Match[str]:
        assert self._process.stderr is not None
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            line = self._process.stderr.readline()
            assert line, f"it ended: {self.said}"
            self.said += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(self.said)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        code = self._process.wait(TIMEOUT_S)
        assert self._process.stderr is not None
        self.said += self._process.stderr.read()
        return code

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def program(*flags: str) -> Iterator[Program]:
    one = Program(*flags)
    try:
        yield one
    finally:
        one.end()


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    save(tmp_path)
    return str(tmp_path)


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_a_running_request_survives_sigterm(address: str, tokenizer: str) -> None:
    with (
        FakeCore(address, begin) as core,
        program("--connect", address, "--tokenizer", tokenizer) as server,
    ):
        url = server.hear(r"ready after .*: (http://127.0.0.1:\d+)/v1")[1]
        body = {"prompt": "x", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as stream:
            server.signal(signal.SIGTERM)
            wait_until(lambda: refuses(url), timeout_s=TIMEOUT_S, what="the port is closed")
            number = core.wait_for(AddRequest).number
            end = Finished(number, "length", None, 0)
            core.push(Outputs([number], [66]), Outputs(finished=[end]))
            assert "[DONE]" in stream.read().decode()
        assert server.wait() == 0


def refuses(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(url + "/health", timeout=TIMEOUT_S)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # the connection was there when the listener was closed
        return False
    return False


def test_several_frontends_on_one_core(address: str, tokenizer: str) -> None:
    flags = ("--connect", address, "--tokenizer", tokenizer, "--frontends", "2")
    with FakeCore(address, says("hello")) as core, program(*flags) as server:
        url = server.hear(r"ready after .*: (http://127.0.0.1:\d+)/v1")[1]
        texts = []
        for _ in range(20):  # a connection each, so that both get some
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=TIMEOUT_S)
            texts.append(answer.json()["choices"][0]["text"])
        assert texts == ["hello"] * 20
        counts = set()
        for _ in range(6):
            text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text
            counts.add(re.search(r"request_success_total\{.*\} (.*)", text)[1])  # type: ignore[index]
        assert counts == {"20.0"}  # whichever is asked
        before = children(server.pid)
        os.kill(min(before), signal.SIGKILL)
        server.hear("ended by signal 9")
        wait_until(
            lambda: len(children(server.pid)) == 2 and children(server.pid) != before,
            timeout_s=TIMEOUT_S,
            what="a new frontend",
        )
        again = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=TIMEOUT_S)
        assert again.status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert len(core.received) > 20


def test_frontends_end_with_their_parent(address: str, tokenizer: str) -> None:
    flags = ("--connect", address, "--tokenizer", tokenizer, "--frontends", "2")
    with FakeCore(address), program(*flags) as server:
        server.hear("ready after")
        found = children(server.pid)
        assert len(found) == 2
        server.signal(signal.SIGKILL)
        wait_until(
            lambda: not any(alive(pid) for pid in found), timeout_s=TIMEOUT_S, what="their end"
        )


OWN_CORE = ("--frontends", "2", "--load-format", "synthetic", "--step-ms", "20")


def core_of(server: Program) -> int:
    """The child that is no frontend."""
    return next(
        pid
        for pid in children(server.pid)
        if b"nanovllm.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_frontends_go_on_when_their_core_has_died(tokenizer: str) -> None:
    with program("x", *OWN_CORE, "--tokenizer", tokenizer, "--vocab-size", "250") as server:
        url = server.hear(r"ready after .*: (http://127.0.0.1:\d+)/v1")[1]
        core = core_of(server)
        body = {"prompt": [1], "max_tokens": 60, "stream": True, "ignore_eos": True, "seed": 1}
        body |= {"return_token_ids": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as stream:
            lines = stream.iter_lines()
            read = [next(lines) for _ in range(9)]
            os.kill(core, signal.SIGKILL)
            read += list(lines)
        chunks = [json.loads(line[6:]) for line in read if line.startswith("data: {")]
        assert sum(len(one["choices"][0]["token_ids"]) for one in chunks) == 60
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        wait_until(lambda: core not in children(server.pid), timeout_s=TIMEOUT_S, what="its end")
        body["stream"] = False
        for _ in range(6):  # a connection each, so that both get some
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
            assert answer.status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("how", [("--max-core-restarts", "0"), ("--on-core-death", "fail")])
def test_frontends_end_when_their_core_is_dead_for_good(tokenizer: str, how: tuple[str]) -> None:
    with program("x", *OWN_CORE, "--tokenizer", tokenizer, *how) as server:
        server.hear("ready after")
        os.kill(core_of(server), signal.SIGKILL)
        assert server.wait() == 1
        assert "signal 9" in server.said


def test_it_ends_with_its_core(address: str, tokenizer: str) -> None:
    with (
        FakeCore(address) as core,
        program(
            "--connect", address, "--tokenizer", tokenizer, "--on-core-death", "fail"
        ) as server,
    ):
        server.hear("ready after")
        core.die()
        assert server.wait() == 1
        assert "closed the connection" in server.said


@pytest.mark.parametrize("frontends", ["1", "2"])
def test_a_port_in_use(frontends: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port, "--frontends", frontends]) == 2
    assert "choose another with --port" in capsys.readouterr().err


class Town(BaseModel):
    """What the model must describe, and nothing else: keys of its own could go on for ever."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=10**8)
    on_the_coast: bool


def check_constrained_answers(client: OpenAI) -> None:
    """Structured output parsed into a pydantic model, a forced call, and an impossible schema."""
    messages: Any = [{"role": "user", "content": "Describe a town."}]
    options: dict[str, Any] = {"model": "smollm2", "temperature": 1, "max_tokens": 200, "seed": 3}
    parsed = client.chat.completions.parse(messages=messages, response_format=Town, **options)
    town = parsed.choices[0].message.parsed
    assert town is not None and town.name
    function = {"name": "visit", "parameters": Town.model_json_schema()}
    called = client.chat.completions.create(
        messages=messages,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "visit"}},
        **options,
    )
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "visit" and Town.model_validate_json(call.function.arguments)
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(
            model="smollm2", prompt="x", extra_body={"structured_outputs": {"regex": "(?<=a)b"}}
        )
    assert caught.value.param == "structured_outputs.regex"


@pytest.mark.model
def test_the_real_model_answers_the_official_client(smollm2_path: Path) -> None:
    limits = ("--max-model-len", "1024", "--num-gpu-blocks-override", "256")
    with program(*limits, "--grammar-timeout-s", "60") as server:
        url = server.hear(r"smollm2 is ready after .*: (http://127.0.0.1:\d+/v1)")[1]
        with OpenAI(base_url=url, api_key="none", timeout=TIMEOUT_S) as client:
            # Sure of each token by a nat at the least: none depends on how a CPU rounds.
            asked = [{"role": "user", "content": "What is the capital of Japan?"}]
            options = {"model": "smollm2", "temperature": 0, "max_tokens": 24}
            answer = client.chat.completions.create(messages=asked, **options)  # type: ignore[call-overload]
            text = answer.choices[0].message.content
            assert "Tokyo" in text and answer.choices[0].finish_reason == "stop"
            stream = client.chat.completions.create(  # type: ignore[call-overload]
                messages=asked, stream=True, stream_options={"include_usage": True}, **options
            )
            chunks = list(stream)
            parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            assert "".join(parts) == text
            assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
            scored = client.completions.create(
                model="smollm2", prompt="The capital of France is", echo=True, logprobs=2, n=1,
                max_tokens=2, temperature=0,
            )  # fmt: skip
            logprobs = scored.choices[0].logprobs
            assert logprobs is not None and logprobs.tokens is not None
            assert "".join(logprobs.tokens) == scored.choices[0].text
            check_constrained_answers(client)
            several = client.completions.create(
                model="smollm2", prompt="Once", n=4, seed=7, max_tokens=6, temperature=1
            )
            assert len({choice.text for choice in several.choices}) > 1
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize(
    ("gpu", "cpus", "fields", "number"),
    [
        (False, 16, {}, 1),
        (True, 16, {}, 4),
        (True, 64, {}, 4),
        (True, 8, {}, 2),
        (True, 2, {}, 1),
        (True, 16, {"device": "cpu"}, 1),
    ],
)
def test_frontends_are_chosen_by_processors_where_there_is_a_gpu(
    gpu: bool,
    cpus: int,
    fields: dict[str, Any],
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = (tmp_path if gpu else tmp_path / "none",)
    monkeypatch.setattr("nanovllm.frontend.server.command.GPU_FILES", files)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    assert default_frontends(fields) == number
