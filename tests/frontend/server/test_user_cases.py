"""Requests that users' clients have sent and that once went wrong, over HTTP to a core that runs.

Its device is a fake that writes the shortest text which a grammar allows, and never ends an object
as long as the grammar allows another property.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.config import EngineConfig
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.plan import PositionLogprobs, StepPlan, StepResult, TokenLogprobs
from tests.core.fake_executor import FakeExecutor, StepFailedError, allowed_ids
from tests.core.serving import serving as core_serving
from tests.core.vocabulary import EOS, make_compiler, tokenizer_json
from tests.frontend.server.served import TOOL_TEMPLATE, error_of, events, make_app
from tests.waiting import WAIT_S

TOKENIZER = FastTokenizer.from_str(tokenizer_json())
# Ids by how soon they are taken: an end, then what ends a string, an array, a member, an object.
FIRST = {token_id: rank for rank, token_id in enumerate([0, *TOKENIZER.encode('"],}{[:1').ids])}


class Terse(FakeExecutor):
    """Takes the first token of `FIRST` that a mask allows, and tells log-probabilities."""

    def _sample(self, row: int, end: int, mask: bytes | None) -> int:
        sampled = super()._sample(row, end, mask)
        return sampled if mask is None else min(allowed_ids(mask), key=lambda i: FIRST.get(i, 99))

    def _run(self, plan: StepPlan) -> StepResult | StepFailedError:
        result = super()._run(plan)
        assert isinstance(result, StepResult)
        of_prompt: dict[int, PositionLogprobs] = {}
        for entry, row in enumerate(plan.rows):
            new, start = self._rows[row], plan.num_computed[entry]
            if new.params.prompt_logprobs is not None:
                end = min(start + plan.num_scheduled[entry], new.num_prompt_tokens - 1)
                ids = self._tokens[row][start + 1 : end + 1]
                scored = [TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in ids]
                of_prompt[entry] = PositionLogprobs.of(scored)
        sampled = {
            index: TokenLogprobs(result.token_ids[index], -1.0, 1, [], [])
            for index, entry in enumerate(plan.sampling)
            if self._rows[plan.rows[entry]].params.logprobs is not None
        }
        return StepResult(result.step, result.token_ids, sampled, of_prompt)


@asynccontextmanager
async def running(address: str) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer = Tokenizer(TOKENIZER, special_tokens={"eos_token": EOS}, chat_template=TOOL_TEMPLATE)
    executor = Terse(EngineConfig(), num_blocks=400, max_model_len=4096)
    app = make_app(address, ServerSettings(), tokenizer)
    with core_serving(address, executor, make_compiler=lambda info: make_compiler()):
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=WAIT_S
            ) as client,
        ):
            await app.state.serving.opened.wait()
            yield client


USER = {"role": "user", "content": "Count."}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [USER], "max_tokens": 300, **fields}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "Hi", **fields}


def tool(parameters: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    more = {} if parameters is None else {"parameters": parameters}
    return [{"type": "function", "function": {"name": "f", **more}}]


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def prefilled(text: str) -> tuple[str, dict[str, Any]]:
    return chat(
        messages=[USER, {"role": "assistant", "content": text}],
        continue_final_message=True,
        add_generation_prompt=False,
        return_token_ids=True,
        max_tokens=8,
    )


BAD = "invalid_request_error"
SCHEMA = "response_format.json_schema.schema"
NAMED = {"type": "function", "function": {"name": "f"}}
LETTER = {"enum": ["a", "b"]}
PERSON = an_object(name={"type": "string"}, age={"type": "integer"})
DIGIT = an_object(a={"type": "integer", "minimum": 0, "maximum": 9})
REPLAYED = {
    "role": "assistant",
    "content": None,
    **dict.fromkeys(("refusal", "reasoning", "parsed", "audio")),
    "provider_specific_fields": {},
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}},
        }
    ],
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CACHED = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
# What is sent; and what must come: a field of the choice or, for errors, of the error.
CASES: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "a required tool with $defs": (
        chat(
            tool_choice="required",
            tools=tool({"$defs": {"C": LETTER}, **an_object(c={"$ref": "#/$defs/C"})}),
        ),
        {"calls": [("f", {"c": "a"})], "finish_reason": "tool_calls"},
    ),
    "a required tool with definitions": (
        chat(
            tool_choice="required",
            tools=tool({"definitions": {"C": LETTER}, **an_object(c={"$ref": "#/definitions/C"})}),
        ),
        {"calls": [("f", {"c": "a"})], "finish_reason": "tool_calls"},
    ),
    "a required tool with a nested reference": (
        chat(
            tool_choice="required",
            tools=tool(
                {
                    "$defs": {"C": LETTER, "D": an_object(c={"$ref": "#/$defs/C"})},
                    **an_object(d={"$ref": "#/$defs/D"}),
                }
            ),
        ),
        {"calls": [("f", {"d": {"c": "a"}})], "finish_reason": "tool_calls"},
    ),
    "a required tool that refers to itself": (
        chat(
            tool_choice="required",
            tools=tool(an_object(v={"type": "integer"}, n={"anyOf": [LETTER, {"$ref": "#"}]})),
        ),
        {"calls": [("f", {"v": 1, "n": "a"})], "finish_reason": "tool_calls"},
    ),
    "an object that does not say whether it is open": (
        chat(response_format=form(PERSON)),
        {"json": {"name": "", "age": 1}, "finish_reason": "stop"},
    ),
    "an object that says that it is open": (
        chat(response_format=form({**PERSON, "additionalProperties": True})),
        {"finish_reason": "length"},
    ),
    "a forced tool without parameters": (
        chat(tool_choice=NAMED, tools=tool()),
        {"calls": [("f", {})], "finish_reason": "tool_calls"},
    ),
    "negative max_tokens": (
        complete(max_tokens=-1),
        {"type": BAD, "param": "max_tokens", "message": "-1"},
    ),
    "negative max_tokens of a chat": (
        chat(max_tokens=-1),
        {"type": BAD, "param": "max_tokens", "message": "-1"},
    ),
    "a property that is also a pattern's": (
        chat(
            response_format=form(
                {
                    **DIGIT,
                    "patternProperties": {"^a$": {"type": "integer"}},
                    "additionalProperties": False,
                }
            )
        ),
        {"type": BAD, "param": SCHEMA, "message": "cannot go on"},
    ),
    "2,500 choices": (
        chat(structured_outputs={"choice": [f"option {i}" for i in range(2500)]}),
        {"content": "option 1", "finish_reason": "stop"},
    ),
    "a prefilled answer with a blank at its end": (
        prefilled("1, 2, 3, "),
        {"prompt": "user:Count.assistant:1, 2, 3, "},
    ),
    "a prefilled answer that is the template's end": (
        prefilled("|"),
        {"prompt": "user:Count.assistant:|"},
    ),
    "offsets of characters split over tokens": (
        complete(prompt="é😀中 x", echo=True, logprobs=0, max_tokens=1),
        {"offsets": [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4, 5]},
    ),
    "fields that clients send by habit": (
        chat(
            max_tokens=4,
            prompt_cache_key="k",
            safety_identifier="u",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            verbosity="low",
            best_of=1,
            echo=False,
            audio=None,
            documents=None,
        ),
        {"finish_reason": "length"},
    ),
    "history as clients replay it": (
        chat(
            max_tokens=4,
            messages=[
                {"role": "user", "content": [CACHED]},
                REPLAYED,
                {"role": "tool", "tool_call_id": "1", "content": "y"},
            ],
        ),
        {"finish_reason": "length"},
    ),
    "an image": (
        chat(messages=[{"role": "user", "content": [IMAGE]}]),
        {"type": BAD, "param": "messages", "message": "reads text only"},
    ),
    "a schema that is none": (
        chat(response_format=form({"type": "nope"})),
        {"type": BAD, "param": SCHEMA, "message": "nope"},
    ),
    "an unknown format": (
        chat(response_format=form(an_object(p={"type": "string", "format": "password"}))),
        {"json": {"p": ""}, "finish_reason": "stop"},
    ),
}


def gathered(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the one choice says, whole or in the events of a stream."""
    choices = [choice for one in found for choice in one["choices"]]
    parts = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    calls = [call["function"] for part in parts for call in part.get("tool_calls") or ()]
    texts = [part.get("content") or part.get("text") or "" for part in parts]
    prompts = [one["prompt_token_ids"] for one in [*found, *choices] if one.get("prompt_token_ids")]
    scored = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    return {
        "content": "".join(texts),
        "finish_reason": choices[-1]["finish_reason"],
        "calls": [call["name"] for call in calls if call.get("name")],
        "arguments": "".join(call.get("arguments") or "" for call in calls),
        "prompt": TOKENIZER.decode(prompts[0]) if prompts else None,
        "offsets": [offset for one in scored for offset in one.get("text_offset", ())],
    }


def error_in(response: httpx.Response, *, stream: bool) -> dict[str, Any] | None:
    """As a status, or, of what has begun to stream, as an event."""
    if response.status_code != 200:
        assert response.status_code == 400
        return error_of(response)
    told = [event["error"] for event in events(response) if "error" in event] if stream else []
    return told[0] if told else None


def heard(response: httpx.Response, expected: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    """What came, of the fields that are expected. Of an error's message they are some words."""
    found = error_in(response, stream=stream)
    if found is not None:
        is_said = expected.get("message", "") in found["message"]
        found = {**found, "message": expected.get("message")} if is_said else found
    else:
        found = gathered(events(response) if stream else [response.json()])
        if "json" in expected:
            found["json"] = json.loads(found["content"])
        if "calls" in expected:
            found["calls"] = [(name, json.loads(found["arguments"])) for name in found["calls"]]
    return {key: found.get(key) for key in expected}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_once_went_wrong(address: str, stream: bool) -> None:
    found = {}
    async with running(address) as client:
        for name, ((path, body), expected) in CASES.items():
            response = await client.post(path, json={**body, "seed": 1, "stream": stream})
            found[name] = heard(response, expected, stream=stream)
    assert found == {name: expected for name, (_, expected) in CASES.items()}
