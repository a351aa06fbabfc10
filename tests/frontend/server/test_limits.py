"""Everything a body can hold has a limit, which the answer names; nothing is begun beyond it."""

import json
import time
from typing import Any

import pytest

from nanovllm.protocol.messages import AddRequest
from tests.frontend.fake_core import echo
from tests.frontend.server.served import Served, error_of, roomy, served


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
MANY: list[tuple[str, dict[str, Any], str]] = [
    ("prompt", {"prompt": ["a"] * 2049}, "prompt"),
    ("prompts times n", {"prompt": ["a"] * 100, "n": 100}, "prompt"),
    ("a long prompt", {"prompt": "a" * (1 << 22) + "a"}, "prompt"),
    ("n", {"n": 129}, "n"),
    ("stop", {"stop": ["a"] * 65}, "stop"),
    ("long stops", {"stop": ["a" * 4097]}, "stop"),
    ("stop_token_ids", {"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ("allowed_token_ids", {"allowed_token_ids": [1] * 65_537}, "allowed_token_ids"),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("bad_words", {"bad_words": ["a"] * 1025}, "bad_words"),
    ("a long bad word", {"bad_words": ["a" * 257]}, "bad_words"),
    ("bad words, one long", {"bad_words": ["\n" * 256, *map(str, range(1023))]}, "bad_words"),
    ("request_id", {"request_id": "x" * 129}, "request_id"),
    ("request_id with a newline", {"request_id": "x\n"}, "request_id"),
    ("request_id with controls", {"request_id": "x\x1b[2J"}, "request_id"),
    ("request_id beyond ASCII", {"request_id": "é"}, "request_id"),
    ("cache_salt", {"cache_salt": "x" * 257}, "cache_salt"),
    ("user", {"user": "x" * 257}, "user"),
    ("model", {"model": "x" * 257}, "model"),
    ("service_tier", {"service_tier": "x" * 100_000}, "service_tier"),
    ("suffix", {"suffix": "x" * 100_000}, "suffix"),
    ("an unknown field", {"x" * 100_000: 1}, "x"),
    ("a deep schema", {"structured_outputs": {"json": nested(200)}}, "structured_outputs"),
    ("a long schema", {"structured_outputs": {"json": {"a": "x" * 140_000}}}, "structured_outputs"),
    ("a long regex", {"structured_outputs": {"regex": "x" * 140_000}}, "structured_outputs"),
    ("many choices", {"structured_outputs": {"choice": ["x"] * 100_001}}, "structured_outputs"),
]
CHATS: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": [USER] * 4097}, "messages"),
    ("parts", {"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 1025}]}, "mess"),
    ("a part's type", {"messages": [{**USER, "content": [{"type": "x" * 300}]}]}, "messages"),
    ("long messages", {"messages": [{**USER, "content": "a" * 1_500_000}] * 3}, "messages"),
    ("names", {"messages": [{**USER, "name": "x" * 257}]}, "messages"),
    ("annotations", {"messages": [{**USER, "annotations": [nested(200)]}]}, "messages"),
    ("calls", {"messages": [{"role": "assistant", "tool_calls": [FUNCTION] * 129}]}, "messages"),
    ("tools", {"tools": [FUNCTION] * 129}, "tools"),
    ("a deep tool", {"tools": [{"function": {"name": "f", "parameters": nested(200)}}]}, "tools"),
    ("a tool's name", {"tools": [{"function": {"name": "x" * 257}}]}, "tools"),
    ("metadata", {"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ("modalities", {"modalities": ["x"] * 17}, "modalities"),
    ("reasoning_effort", {"reasoning_effort": "x" * 257}, "reasoning_effort"),
    ("deep variables", {"chat_template_kwargs": nested(200)}, "chat_template_kwargs"),
    ("long variables", {"chat_template_kwargs": {"a": "x" * 140_000}}, "chat_template_kwargs"),
    ("self", {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ("raise_exception", {"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs"),
]


@pytest.fixture
async def small(address: str) -> Any:
    async with served(address, roomy(echo)) as one:
        yield one


@pytest.mark.parametrize(("fields", "param"), [one[1:] for one in MANY], ids=[o[0] for o in MANY])
async def test_a_completion_too_large(small: Served, fields: dict[str, Any], param: str) -> None:
    began = time.monotonic()
    response = await small.post("/v1/completions", **{"prompt": "a", **fields})
    assert time.monotonic() - began < 2.0
    assert response.status_code in (400, 404), response.text
    error = error_of(response)
    assert (error["param"] or "").startswith(param) and len(response.content) < 4096
    assert not small.core.all_of(AddRequest)


@pytest.mark.parametrize(("fields", "param"), [one[1:] for one in CHATS], ids=[o[0] for o in CHATS])
async def test_a_chat_too_large(small: Served, fields: dict[str, Any], param: str) -> None:
    began = time.monotonic()
    response = await small.post("/v1/chat/completions", **{"messages": [USER], **fields})
    assert time.monotonic() - began < 2.0
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"] or "").startswith(param) and len(response.content) < 4096
    assert not small.core.all_of(AddRequest)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": [' + b",".join([b"1"] * 1_100_000) + b"]}",
        b'{"prompt": [' + b",".join([b"[]"] * 140_000) + b"]}",
        b'{"prompt": "a", "logit_bias": ' + b'{"1":' * 140_000 + b"}" * 140_000 + b"}",
    ],
    ids=["values", "lists", "depth"],
)
async def test_what_takes_long_to_decode_is_not_decoded(small: Served, content: bytes) -> None:
    response = await small.client.post("/v1/completions", content=content)
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


@pytest.mark.parametrize("depth", [900, 100_000])
async def test_deep_json_is_a_mistake_of_the_client(small: Served, depth: int) -> None:
    body = {"messages": [USER]}
    text = (
        json.dumps(body)[:-1] + ', "chat_template_kwargs": ' + '{"a":' * depth + "1" + "}" * depth
    )
    response = await small.client.post("/v1/chat/completions", content=text.encode() + b"}")
    assert response.status_code == 400, response.text


async def test_tokenizing_has_limits(small: Served) -> None:
    for path, body, param in (
        ("/tokenize", {"prompt": "a" * ((1 << 22) + 1)}, "prompt"),
        ("/tokenize", {"messages": [USER] * 4097}, "messages"),
        ("/detokenize", {"tokens": [1] * ((1 << 18) + 1)}, "tokens"),
    ):
        response = await small.post(path, **body)
        assert response.status_code == 400 and error_of(response)["param"] == param
