"""Every failure in OpenAI's form, with the right status and the field to mend."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.errors import (
    EngineDeadError,
    NotAllowedError,
    OverloadedError,
    QuarantinedError,
    RequestFailedError,
)
from nanovllm.frontend.server.api_errors import ApiError, from_engine, from_finish
from nanovllm.frontend.server.app import create_app
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.protocol.messages import AddRequest, Outputs, RequestFailed, ToCore
from tests.frontend.attached import says, settled
from tests.frontend.fake_core import begin, silent
from tests.frontend.server.served import error_of, message_of, served
from tests.waiting import WAIT_S


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"stream_options": {"bar": True}, "stream": True}, "stream_options.bar"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 10**30}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"seed": 10**30}, "seed"),
        ({"priority": 10**30}, "priority"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"best_of": 2}, "best_of"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
async def test_the_field_to_mend_is_named(address: str, body: dict[str, Any], param: str) -> None:
    async with served(address) as server:
        response = await server.chat(**body)
        assert not server.core.all_of(AddRequest)
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param, error


async def test_neutral_values_of_fields_without_an_effect_are_taken(address: str) -> None:
    neutral: dict[str, Any] = {
        "service_tier": "auto",
        "store": False,
        "metadata": {},
        "modalities": ["text"],
        "use_beam_search": False,
        "response_format": {"type": "text"},
        "user": "me",
        "temperature": None,
        "stop": None,
    }
    async with served(address) as server:
        response = await server.chat(**neutral)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'{"messages": 1}', "array"),
        (b"\xff\xfe", "JSON"),
        (b'{"messages":' + b"[" * 100_000, "Expected"),
        (b'{"messages":[{"role":"user","content":"\xff"}]}', "JSON"),
    ],
)
async def test_bodies_that_cannot_be_read(address: str, content: bytes, words: str) -> None:
    async with served(address) as server:
        response = await server.client.post("/v1/chat/completions", content=content)
    assert response.status_code == 400 and words.lower() in response.text.lower()
    error_of(response)


async def test_deeply_nested_values(address: str) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    messages = '"messages":[{"role":"user","content":"x"}]'
    body = "{" + messages + ',"chat_template_kwargs":{"a":' + deep + "}}"
    async with served(address) as server:
        response = await server.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400


async def test_unknown_models_paths_and_methods(address: str) -> None:
    async with served(address) as server:
        wrong = await server.chat(model="gpt-5")
        assert wrong.status_code == 404 and error_of(wrong)["code"] == "model_not_found"
        assert (await server.client.get("/v1/models/a/b")).status_code == 404
        nowhere = await server.client.get("/v1/nowhere")
        assert nowhere.status_code == 404 and error_of(nowhere)
        method = await server.client.get("/v1/completions")
        assert method.status_code == 405 and method.headers["allow"] == "POST"
        assert error_of(method)


async def test_keys(address: str) -> None:
    async with served(address, api_key=["secret", "other"]) as server:
        client = server.client
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        for key in ("secret", "other"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            assert (await client.get("/version", headers=headers)).status_code == 200


async def test_bodies_have_a_limit(address: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b" " * 1000

    async with served(address, max_body_bytes=2000) as server:
        for content in (b" " * 4000, chunks()):
            response = await server.client.post("/v1/completions", content=content)
            assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
        assert (await server.complete()).status_code == 200


async def test_too_many_requests_are_told_to_come_back(address: str) -> None:
    async with served(address, begin, max_requests=1) as server:
        first = asyncio.create_task(server.complete())
        await message_of(server.core, AddRequest)
        for stream in (False, True):
            response = await server.complete(stream=stream)
            assert response.status_code == 429 and error_of(response)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert server.serving.num_requests == 0


async def test_while_loading_and_when_loading_fails(address: str) -> None:
    fail = asyncio.Event()

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        on_progress("weights", 0.5)
        await fail.wait()
        raise ValueError("dtype: this device knows no such thing")

    app = create_app(ServerSettings(), open_llm)
    serving = app.state.serving
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=WAIT_S
        ) as client,
    ):
        await asyncio.sleep(0)
        response = await client.post("/v1/completions", json={"prompt": "x"})
        assert response.status_code == 503 and error_of(response)["code"] == "loading"
        assert "weights, 50%" in response.text and "retry-after" in response.headers
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["phase"] == "weights"
        assert (await client.get("/metrics")).status_code == 200
        fail.set()
        await asyncio.wait_for(serving.ended.wait(), WAIT_S)
        response = await client.get("/v1/models")
        assert response.status_code == 503 and "no such thing" in response.text
        assert (await client.get("/health")).json()["status"] == "dead"
    assert isinstance(serving.failure, ValueError)


async def test_a_dead_core(address: str) -> None:
    async with served(address, begin) as server:
        running = asyncio.create_task(server.complete(stream=True))
        await message_of(server.core, AddRequest)
        await settled(server.serving.llm, server.core)  # its stream has begun
        server.core.die()
        response = await asyncio.wait_for(running, WAIT_S)  # its stream ends with an error event
        last = [line for line in response.text.split("\n\n") if line][-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        await asyncio.wait_for(server.serving.ended.wait(), WAIT_S)
        assert isinstance(server.serving.failure, EngineDeadError)
        response = await server.complete()
        assert response.status_code == 503 and error_of(response)["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_fails_at_once_has_a_status(address: str, stream: bool) -> None:
    def fails(message: ToCore) -> Any:
        if isinstance(message, AddRequest):
            return [RequestFailed(message.number, "out of luck")]
        return silent(message)

    async with served(address, fails) as server:
        response = await server.chat(stream=stream)
    assert response.status_code == 500 and "out of luck" in error_of(response)["message"]


async def test_a_request_that_fails_later_ends_its_stream_with_the_error(address: str) -> None:
    async with served(address, begin) as server:
        running = asyncio.create_task(server.chat(stream=True))
        number = (await message_of(server.core, AddRequest)).number
        await settled(server.serving.llm, server.core)  # its stream has begun
        server.core.push(Outputs([number], [66]), RequestFailed(number, "out of luck"))
        lines = (await asyncio.wait_for(running, WAIT_S)).text.split("\n\n")
    assert "out of luck" in lines[-3] and lines[-2] == "data: [DONE]"


async def test_ends_that_nobody_asked_for_are_errors(address: str) -> None:
    async with served(address, says("a", end="abort")) as server:
        response = await server.chat()
    assert response.status_code == 503 and error_of(response)["code"] == "aborted"


async def test_a_request_id_in_use(address: str) -> None:
    async with served(address, begin) as server:
        first = asyncio.create_task(server.chat(request_id="mine"))
        await message_of(server.core, AddRequest)
        response = await server.chat(request_id="mine")
        assert response.status_code == 400 and error_of(response)["param"] == "request_id"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_web_pages_may_call_only_if_allowed(address: str) -> None:
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    async with served(address) as server:
        response = await server.client.options("/v1/completions", headers=preflight)
        assert "access-control-allow-origin" not in response.headers
    async with served(address + "2", allowed_origins=["http://page"], api_key=["k"]) as server:
        response = await server.client.options("/v1/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == "http://page"


@pytest.mark.parametrize(
    ("error", "status", "code", "kind", "retry_after"),
    [
        (ApiError(404, "x", code="mine"), 404, "mine", "not_found_error", None),
        (EngineDeadError("x"), 503, "engine_dead", "service_unavailable_error", "1"),
        (OverloadedError(2.1), 429, "overloaded", "rate_limit_error", "3"),
        (OverloadedError(7.0, draining=True), 503, "draining", "service_unavailable_error", "7"),
        (QuarantinedError("x"), 422, "request_quarantined", "invalid_request_error", None),
        (NotAllowedError("x"), 403, "not_allowed", "permission_error", None),
        (RequestFailedError("x", "request"), 400, "invalid_request", "invalid_request_error", None),
        (RequestFailedError("x", "grammar"), 400, "invalid_request", "invalid_request_error", None),
        (RequestFailedError("x"), 500, "request_failed", "server_error", None),
        (TimeoutError(), 504, None, "timeout_error", None),
        (KeyError("secret"), 500, None, "server_error", None),
        (from_finish("timeout"), 504, "deadline_exceeded", "timeout_error", None),
        (from_finish("abort"), 503, "aborted", "service_unavailable_error", "1"),
        (from_finish("error"), 500, "request_failed", "server_error", None),
    ],
)
def test_each_failure_has_a_status_and_says_when_to_come_back(
    error: Exception, status: int, code: str | None, kind: str, retry_after: str | None
) -> None:
    found = from_engine(error)
    assert (found.status, found.details.code, found.details.type) == (status, code, kind)
    assert found.headers.get("retry-after") == retry_after
    assert found.details.message and "secret" not in found.details.message
