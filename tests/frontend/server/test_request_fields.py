"""What the fields of a body come to, each by itself: prompts, sampling parameters, constraints."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from nanovllm.frontend.encoding_process import LongTexts
from nanovllm.frontend.inputs import Prompt
from nanovllm.frontend.outputs import RequestMetrics, RequestOutput
from nanovllm.frontend.server import prompts
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import ChatBody, CompletionBody
from nanovllm.frontend.server.endpoint import options_of, usage_of
from nanovllm.frontend.server.prompts import LONG_TEXT, MARK, MAX_AT_ONCE
from nanovllm.frontend.server.sampling import (
    called_tools,
    chat_params,
    completion_params,
    constraint_of,
)
from nanovllm.limits import MAX_OUTPUTS
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.frontend.server.served import tokenizer_with
from tests.frontend.vocabulary import byte_tokenizer

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatBody:
    return msgspec.convert({"messages": [USER], **fields}, ChatBody)


def completion(**fields: Any) -> CompletionBody:
    return msgspec.convert({"prompt": "hi", **fields}, CompletionBody)


def refusal_of(make: Callable[[], Any]) -> tuple[str | None, str]:
    with pytest.raises(ApiError) as refusal:
        make()
    assert refusal.value.status == 400
    return refusal.value.details.param, refusal.value.details.message


# ---- sampling parameters


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": None}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}),
        ({"logprobs": True}, {"max_tokens": None, "logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 2}, {"max_tokens": None, "logprobs": 2}),
        ({"logprobs": False, "top_logprobs": 0}, {"max_tokens": None}),
        ({"stream": True}, {"max_tokens": None, "output_kind": "delta"}),
        (
            {"stream": True, "stream_options": {}},
            {"max_tokens": None, "output_kind": "delta"},
        ),
        ({"prompt_logprobs": 1}, {"max_tokens": None, "prompt_logprobs": 1}),
        ({"top_k": 3, "seed": None}, {"max_tokens": None, "top_k": 3}),
        ({"functions": [], "best_of": 1, "modalities": ["text"]}, {"max_tokens": None}),
    ],
)
def test_parameters_of_a_chat(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    wanted = SamplingParams(**{"output_kind": "final_only", **expected})
    assert chat_params(chat(**fields), None, {}) == wanted


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"audio": {}}, "audio"),
        ({"functions": [1]}, "functions"),
    ],
)
def test_fields_of_a_chat_that_cannot_be_honoured(fields: dict[str, Any], field: str) -> None:
    param, message = refusal_of(lambda: chat_params(chat(**fields), None, {}))
    assert param == field and message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"max_tokens": 2}, {"max_tokens": 2}),
        ({"max_tokens": 0, "echo": True}, {"max_tokens": 1}),
        ({"best_of": 1}, {}),
        ({"best_of": 3, "n": 3}, {"n": 3}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": 2, "echo": True}, {"logprobs": 2, "prompt_logprobs": 2}),
        (
            {"logprobs": 2, "echo": True, "prompt_logprobs": 2},
            {"logprobs": 2, "prompt_logprobs": 2},
        ),
        ({"logprobs": 2, "prompt_logprobs": 1}, {"logprobs": 2, "prompt_logprobs": 1}),
        ({"echo": True, "prompt_logprobs": 1}, {"prompt_logprobs": 1}),
    ],
)
def test_parameters_of_a_completion(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    defaults = {"temperature": 0.5, "max_tokens": 9}
    wanted = SamplingParams(**{"output_kind": "final_only", **defaults, **expected})
    assert completion_params(completion(**fields), None, defaults) == wanted


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logprobs": 2, "echo": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_fields_of_a_completion_that_cannot_be_honoured(fields: dict[str, Any], field: str) -> None:
    assert refusal_of(lambda: completion_params(completion(**fields), None, {}))[0] == field


# ---- what the output must be

TOOLS = [
    {"type": "function", "function": {"name": "none"}},
    {"type": "function", "function": {"name": "some", "parameters": {"properties": {"a": {}}}}},
    {"type": "function", "function": {"name": "ref", "parameters": {"$ref": "#/$defs/x"}}},
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "field", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "null"}},
                }
            },
            "response_format.json_schema.schema",
            {"json": {"type": "null"}},
        ),
        (
            {"structured_outputs": {"regex": "a", "json_object": False}},
            "structured_outputs.regex",
            {"regex": "a"},
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "text"}},
            "structured_outputs.choice",
            {"choice": ["a"]},
        ),
        (
            {"tools": TOOLS, "tool_choice": named("none")},
            "tools[0].function.parameters",
            {"choice": ["{}"]},
        ),
        (
            {"tools": TOOLS, "tool_choice": named("some")},
            "tools[1].function.parameters",
            {"json": {"type": "object", "properties": {"a": {}}}},
        ),
        (
            {"tools": TOOLS, "tool_choice": named("ref")},
            "tools[2].function.parameters",
            {"json": {"$ref": "#/$defs/x"}},
        ),
    ],
)
def test_what_the_output_must_be(fields: dict[str, Any], field: str, wanted: Any) -> None:
    for after in (None, "</think>"):
        found = constraint_of(chat(**fields), after=after)
        assert found == (field, StructuredOutputsParams(**wanted, after=after))


@pytest.mark.parametrize("parallel", [None, True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_forced_calls_are_an_array(parallel: bool | None, count: int) -> None:
    """Of at most one where only one is wanted; with one tool its schema is what may be wrong."""
    body = chat(tools=TOOLS[:count], tool_choice="required", parallel_tool_calls=parallel)
    found = constraint_of(body)
    assert found is not None
    assert found.field == ("tools" if count > 1 else "tools[0].function.parameters")
    assert isinstance(found.params.json, str)
    schema = json.loads(found.params.json)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    assert schema.get("maxItems") == (1 if parallel is False else None)
    calls = schema["items"]["anyOf"]
    assert [one["properties"]["name"] for one in calls] == [
        {"const": tool["function"]["name"]} for tool in TOOLS[:count]
    ]
    assert [one["required"] for one in calls] == [["name"], ["name", "parameters"]][:count]
    assert all(one["type"] == "object" and not one["additionalProperties"] for one in calls)
    if count > 1:
        assert calls[1]["properties"]["parameters"] == {"$ref": "#/$defs/1"}
        assert schema["$defs"] == {"1": {"type": "object", "properties": {"a": {}}}}


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "none"}, {"tool_choice": "auto"}])
def test_what_is_not_forced_is_free(fields: dict[str, Any]) -> None:
    body = chat(tools=TOOLS, response_format={"type": "text"}, **fields)
    assert constraint_of(body) is None and called_tools(body) is None


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": named("x"), "tools": TOOLS}, "tool_choice", "names 'x'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
            "response_format",
            "an object",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
            "cannot be combined with structured_outputs",
        ),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
                "tools": TOOLS,
                "tool_choice": "required",
            },
            "response_format",
            "cannot be combined with structured_outputs",
        ),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "regex"),
    ],
)
def test_what_the_output_cannot_be(fields: dict[str, Any], field: str, words: str) -> None:
    param, message = refusal_of(lambda: constraint_of(chat(**fields)))
    assert param == field and words in message


# ---- prompts


def test_all_texts_of_a_batch_together_have_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_CHARS", 5)
    assert prompts.batch_of(completion(prompt=["abc", [1, 2, 3], "de"])) == (
        ["abc", [1, 2, 3], "de"],
        5,
    )
    with pytest.raises(ValueError, match="prompt holds 6 characters: at most 5"):
        prompts.batch_of(completion(prompt=["abc", "def"]))


@pytest.mark.parametrize("n", [None, 1, 2])
def test_a_batch_has_a_number_of_outputs(n: int | None) -> None:
    most = MAX_OUTPUTS // (n or 1)
    assert len(prompts.batch_of(completion(prompt=["a"] * most, n=n))[0]) == most
    with pytest.raises(ValueError, match="prompts times n"):
        prompts.batch_of(completion(prompt=["a"] * (most + 1), n=n))


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [
        ("ab", ["ab"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        ([], "is empty"),
        ([1, "a"], "mixes token ids"),
        ([1, [2]], "mixes token ids"),
    ],
)
def test_a_prompt_is_one_or_several(prompt: Any, batch: Any) -> None:
    if isinstance(batch, list):
        assert prompts.batch_of(completion(prompt=prompt))[0] == batch
    else:
        param, message = refusal_of(lambda: prompts.batch_of(completion(prompt=prompt)))
        assert param == "prompt" and batch in message


@pytest.mark.parametrize(
    ("num_chars", "most_chars", "most_tokens", "least"),
    [
        (90, 9, 10, None),
        (91, 9, 10, 11),
        (89, 9, 9, 10),
        (10**6, None, 10, None),
        (10**6, 9, None, None),
    ],
)
def test_a_text_has_as_many_tokens_as_its_longest_ones_make(
    num_chars: int, most_chars: int | None, most_tokens: int | None, least: int | None
) -> None:
    found = prompts.refusal_of_length("a" * num_chars, most_chars, most_tokens)
    assert (found is None) == (least is None)
    if found is not None:
        assert (found.details.param, found.details.code) == ("prompt", "context_length_exceeded")
        assert f"at least {least} tokens, but max_model_len is {most_tokens}" in str(found)


async def test_where_texts_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones here, longer ones in a thread, whatever takes long in a process."""
    where: list[str] = []
    tokenizer = byte_tokenizer()

    async def to_thread(make: Callable[[], Any]) -> Any:
        where.append("thread")
        return make()

    async def in_process(self: LongTexts, text: str, *, add_special_tokens: bool) -> list[int]:
        where.append("process")
        return [int(add_special_tokens)]

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    monkeypatch.setattr(LongTexts, "encode", in_process)
    for size, expected in (
        (LONG_TEXT - 1, []),
        (LONG_TEXT, ["thread"]),
        (MAX_AT_ONCE, ["thread"]),
        (MAX_AT_ONCE + 1, ["process"]),
    ):
        where.clear()
        found = await prompts.encoded(tokenizer, "a" * size, add_special_tokens=True)
        assert where == expected and found == ([1] if size > MAX_AT_ONCE else [97] * size)
        (made,) = await prompts.text_prompts(tokenizer, completion(prompt="a" * size))
        assert where == 2 * expected and isinstance(made, Prompt)
    where.clear()
    half = "a" * (LONG_TEXT // 2)
    await prompts.text_prompts(tokenizer, completion(prompt=[half, half]))
    assert where == ["thread"] * 2, "many short ones would hold others up as one long one does"
    where.clear()
    await prompts.text_prompts(tokenizer, completion(prompt=[half[1:], half]))
    assert where == []
    where.clear()
    long = completion(prompt="a" * (MAX_AT_ONCE + 1), add_special_tokens=False)
    assert await prompts.text_prompts(tokenizer, long) == [(long.prompt, [0])]


async def test_texts_need_a_tokenizer_and_ids_need_none() -> None:
    found = await prompts.text_prompts(None, completion(prompt=["a", [1]]))
    assert isinstance(found[0], ApiError) and "needs a tokenizer" in str(found[0])
    assert found[1] == (None, [1])
    (empty,) = await prompts.text_prompts(byte_tokenizer(), completion(prompt=[""]))
    assert isinstance(empty, ApiError) and empty.details.param == "prompt"


@pytest.mark.parametrize(
    ("source", "fields", "found"),
    [
        ("reasoning_effort", {"reasoning_effort": "none"}, {"reasoning_effort": "none"}),
        ("enable_thinking </think>", {"reasoning_effort": "none"}, {"enable_thinking": False}),
        ("", {"reasoning_effort": "none"}, {}),
        ("reasoning_effort", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ("documents", {"documents": [{"a": 1}]}, {"documents": [{"a": 1}]}),
        ("", {"documents": []}, {}),
        ("</think>", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("", {"documents": [{"a": 1}]}, "documents"),
        ("reasoning_effort", {"reasoning_effort": "low", "documents": [{}]}, "documents"),
        ("", {"chat_template_kwargs": {"x": 1}}, {"x": 1}),
        ("", {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ("", {"continue_final_message": True}, {"add_generation_prompt": False}),
        (
            "",
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ("", {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ("tools", {"tools": TOOLS[:1]}, {"tools": TOOLS[:1]}),
        ("tools", {"tools": TOOLS[:1], "tool_choice": "none"}, {}),
        ("tools", {"tools": TOOLS[:1], "tool_choice": "auto"}, {"tools": TOOLS[:1]}),
        ("tools", {"tools": []}, {}),
    ],
)
def test_what_a_template_is_given(source: str, fields: dict[str, Any], found: Any) -> None:
    def given() -> Any:
        return prompts.template_input(tokenizer_with(source), chat(**fields))

    if isinstance(found, str):
        assert refusal_of(given)[0] == found
    else:
        assert given() == ([USER], {"add_generation_prompt": True, **found})


@pytest.mark.parametrize(
    ("arguments", "object"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("null", {}),
        ("[1]", [1]),
        ("no JSON", "no JSON"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_of_earlier_calls_are_objects(arguments: Any, object: Any) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    (_, made), _ = prompts.template_input(tokenizer_with("tools"), chat(messages=messages))
    assert made["content"] is None
    assert made["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": object}}
    ]


@pytest.mark.parametrize(
    ("message", "made"),
    [
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "refusal": "no"}, {"role": "assistant", "content": "no"}),
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "c"},
            {"role": "assistant", "content": "a", "reasoning_content": "c"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": {"x": 1}},
            {"role": "assistant", "content": "a"},
        ),
        (
            {"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"},
            {"role": "tool", "content": "a", "tool_call_id": "1", "name": "f"},
        ),
        (
            {"role": "user", "content": ["a", {"type": "refusal", "refusal": "b"}]},
            {"role": "user", "content": "a\nb"},
        ),
    ],
)
def test_messages_as_templates_take_them(message: dict[str, Any], made: dict[str, Any]) -> None:
    tokenizer = tokenizer_with("tools")
    assert prompts.template_input(tokenizer, chat(messages=[message]))[0] == [made]
    knows = tokenizer_with("tools developer")
    (kept,), _ = prompts.template_input(knows, chat(messages=[message]))
    assert kept == {**made, "role": message["role"]}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content of a user message is missing"),
        ({"role": "user", "content": [{"type": "text"}]}, "type 'text': this model reads text"),
        ({"role": "user", "content": [{"type": "refusal", "text": "a"}]}, "type 'refusal'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "this model reads text only"),
        ({"role": "assistant", "content": "a", "prefix": True}, "continue_final_message"),
    ],
)
def test_messages_that_no_template_takes(message: dict[str, Any], words: str) -> None:
    body = chat(messages=[message])
    assert words in refusal_of(lambda: prompts.template_input(tokenizer_with(""), body))[1]


@pytest.mark.parametrize(
    ("template", "words", "kept"),
    [
        ("<{}>", "a b ", "<a b "),
        ("<{}> ", "a <", "<a <"),
        ("{} CONTINUE_FINAL_MESSAGE_TAG", "a", None),
    ],
)
def test_a_final_message_is_left_open_where_its_words_end(
    template: str, words: str, kept: str | None
) -> None:
    text = template.replace("{}", words + MARK)
    message = {"role": "assistant", "content": words}
    if kept is not None:
        assert prompts._open_ended(text, message) == kept
    stripped = template.replace("{}", (words + MARK).strip())
    if kept is not None:
        assert prompts._open_ended(stripped, message) == kept.rstrip()
    for lost in (template.replace("{}", words).replace(MARK.strip(), ""), template + MARK):
        param, _ = refusal_of(lambda lost=lost: prompts._open_ended(lost, message))
        assert param == "continue_final_message"


# ---- what goes with a request, and what it has taken


def test_options_of_a_request() -> None:
    body = completion(
        request_id="mine",
        user="u",
        cache_salt="s",
        deadline_ms=5.0,
        ttft_deadline_ms=2.0,
        priority=3,
    )
    constraint = constraint_of(completion(structured_outputs={"regex": "a"}))
    found = options_of(body, "cmpl", {"a": "b"}, constraint)
    assert found == (
        "cmpl-mine",
        {
            "priority": 3,
            "cache_salt": "s",
            "tenant": "u",
            "deadline_ms": 5.0,
            "ttft_deadline_ms": 2.0,
        },
        {"a": "b"},
        "structured_outputs.regex",
    )
    plain = [options_of(completion(), "cmpl", {}, None) for _ in range(2)]
    assert plain[0].how["priority"] == 0 and plain[0].constrained_by is None
    names = {one.request_id for one in plain}
    assert len(names) == 2 and all(re.fullmatch("cmpl-[0-9a-f]{32}", name) for name in names)


def test_usage_is_of_all_prompts() -> None:
    def output(num_prompt: int, num_generated: int, num_cached: int | None) -> RequestOutput:
        times = RequestMetrics(arrival_time=1.0, num_generation_tokens=num_generated)
        ids = [1] * num_prompt
        return RequestOutput("id", None, ids, [], True, times, num_cached_tokens=num_cached)

    usage = usage_of([output(3, 5, 2), None, output(4, 1, None)])
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 6, 13)
    assert usage.prompt_tokens_details.cached_tokens == 2
