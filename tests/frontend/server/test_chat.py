"""Chat completions against a scripted core: shapes, streaming, tools and reasoning."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import AddedToken

from nanovllm.frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.frontend.server.bodies import ChatBody
from nanovllm.frontend.server.chat import ChatAnswer, ChoiceState
from nanovllm.frontend.server.logprobs import TokenNames
from nanovllm.frontend.server.reply_format import ReplyFormat
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.server.tool_prompt import PREAMBLE
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import (
    AddRequest,
    FailureCause,
    Finished,
    Outputs,
    RequestFailed,
    ToCore,
)
from nanovllm.protocol.plan import TokenLogprobs
from tests.frontend.attached import says
from tests.frontend.fake_core import silent
from tests.frontend.server.served import (
    TOOL_TEMPLATE,
    Served,
    error_of,
    events,
    listening,
    message_of,
    roomy,
    served,
    tokenizer_with,
)
from tests.frontend.vocabulary import CHAT_TEMPLATE, EOS, fast_tokenizer
from tests.waiting import WAIT_S

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
REQUIRED = {"tools": [WEATHER], "tool_choice": "required"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def joined(chunks: list[dict[str, Any]], key: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(key) or "" for delta in deltas)


async def test_a_whole_answer(address: str) -> None:
    async with served(address, says("hello")) as server:
        answer = (await server.chat("hi")).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "fake"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"content": "hello", "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == len("user:hi|")
    assert answer["usage"]["completion_tokens"] == 5


async def test_a_stream_has_the_same_text_and_ends_with_the_usage(address: str) -> None:
    async with served(address, says("hel", "lo", [EOS], end="stop")) as server:
        response = await server.chat(stream=True, stream_options={"include_usage": True})
    chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == "hello"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_cached_tokens_are_reported(address: str) -> None:
    async with served(address) as server:  # `echo` says that 2 were cached
        usage = (await server.chat()).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_continuous_usage_counts_up(address: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with served(address, says("a", "b")) as server:
        chunks = events(await server.chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices(address: str, stream: bool) -> None:
    async with served(address) as server:
        response = await server.chat("x", n=3, stream=stream)
    if stream:
        parts = [choice for chunk in events(response) for choice in chunk["choices"]]
        texts = ["", "", ""]
        for part in parts:
            texts[part["index"]] += part["delta"].get("content") or ""
        assert sum(part["finish_reason"] == "length" for part in parts) == 3
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["user:x|"] * 3


async def test_fields_become_sampling_parameters(address: str) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "stop": "END",
        "stop_token_ids": [5],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 1,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "allowed_token_ids": [1, 2],
        "bad_words": ["x"],
    }
    async with served(address) as server:
        options = {"priority": 3, "cache_salt": "me", "logit_bias": {"7": 1}, "user": "u"}
        response = await server.chat(max_completion_tokens=9, **given, **options)
        assert response.status_code == 200, response.text
        sent = server.core.wait_for(AddRequest)
    for name, value in given.items():
        assert getattr(sent.params, name) == (["END"] if name == "stop" else value)
    assert sent.params.max_tokens == 9 and sent.params.logit_bias == {7: 1.0}
    assert (sent.priority, sent.cache_salt) == (3, "me")


async def test_unlimited_unless_told(address: str) -> None:
    async with served(address) as server:
        await server.chat()
        assert server.core.wait_for(AddRequest).params.max_tokens is None


def with_logprobs(message: ToCore) -> Any:
    if not isinstance(message, AddRequest):
        return silent(message)
    first = TokenLogprobs(65, -0.5, 2, [66, 65], [-0.25, -0.5])
    second = TokenLogprobs(0xC3, float("-inf"), 9, [66], [-0.25])
    end = Finished(message.number, "length", None, 0)
    return [Outputs([message.number] * 2, [65, 0xC3], {0: first, 1: second}, finished=[end])]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(address: str, stream: bool) -> None:
    async with served(address, with_logprobs) as server:
        response = await server.chat(logprobs=True, top_logprobs=1, stream=stream)
    if stream:
        found = [c["logprobs"] for chunk in events(response) for c in chunk["choices"]]
        content = [entry for one in found if one for entry in one["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    top = {"token": "B", "logprob": -0.25, "bytes": [66]}
    assert content[0] == {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": [top]}
    assert content[1]["bytes"] == [0xC3] and content[1]["logprob"] == -9999.0


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}], ids=["plain", "parsed"])
async def test_a_token_without_text_is_an_event_where_tokens_are_asked_for(
    address: str, fields: dict[str, Any]
) -> None:
    """Half a character, or what a parser holds back."""
    wanted = {"stream": True, "logprobs": True, "return_token_ids": True, **fields}
    body = {"messages": [{"role": "user", "content": "hi"}], **wanted}
    text, tokenizer = "Aé<tool", tokenizer_with(TOOL_TEMPLATE)
    choices: list[Any] = []
    async with (
        listening(address, roomy(silent), tokenizer=tokenizer) as (url, core, _),
        httpx.AsyncClient(timeout=WAIT_S) as client,
    ):

        async def push() -> None:
            number = (await message_of(core, AddRequest)).number
            for token_id in text.encode():
                count = len(choices)
                scores = {0: TokenLogprobs(token_id, -1.0, 1, [], [])}
                core.push(Outputs([number], [token_id], scores))
                async with asyncio.timeout(WAIT_S):  # or they might come as one
                    while len(choices) == count:
                        await asyncio.sleep(0.002)
            core.push(Outputs(finished=[Finished(number, "length", None, 0)]))

        pushing = asyncio.create_task(push())
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices += json.loads(line[6:])["choices"]
        await pushing
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == text
    ids = [i for choice in choices for i in choice.get("token_ids") or ()]
    scored = [
        one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]
    ]
    assert bytes(ids) == text.encode() and [one["bytes"] for one in scored] == [[i] for i in ids]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_returned_on_request(address: str, stream: bool) -> None:
    async with served(address, says("abc")) as server:
        response = await server.chat(return_token_ids=True, stream=stream)
    if stream:
        chunks = events(response)
        token_ids = [i for c in chunks for one in c["choices"] for i in one.get("token_ids", [])]
        prompt_ids = chunks[0]["prompt_token_ids"]
    else:
        answer = response.json()
        token_ids, prompt_ids = answer["choices"][0]["token_ids"], answer["prompt_token_ids"]
    assert token_ids == list(b"abc") and prompt_ids == list(b"user:hi|")


async def test_a_stop_string_is_named(address: str) -> None:
    async with served(address, says("abcENDdef", end=None)) as server:
        choice = (await server.chat(stop=["END"])).json()["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")


# ---- messages


async def sent_prompt(address: str, template: str, **body: Any) -> str:
    async with served(address, roomy(says("x")), tokenizer=tokenizer_with(template)) as server:
        response = await server.chat(**body)
        assert response.status_code == 200, response.text
        return bytes(server.core.wait_for(AddRequest).prompt_token_ids).decode()


async def test_text_parts_are_joined_and_developers_become_the_system(address: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "me"},
    ]
    prompt = await sent_prompt(address, "{{ messages }}", messages=messages)
    assert "'system'" in prompt and "a\\nb" in prompt and "'me'" in prompt


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "refusal", "refusal": "no"}, "no"),
        ({"type": "text"}, None),
        ({"type": "refusal", "text": "no"}, None),
        ({"type": "other", "text": "no"}, None),
    ],
)
async def test_parts_of_a_message_are_texts_and_refusals(
    address: str, part: dict[str, str], text: str | None
) -> None:
    messages = [{"role": "assistant", "content": [part]}, {"role": "user", "content": "x"}]
    async with served(address, roomy(says("x"))) as server:
        response = await server.chat(messages=messages)
        if text is None:
            assert response.status_code == 400 and error_of(response)["param"] == "messages"
        else:
            sent = server.core.wait_for(AddRequest).prompt_token_ids
            assert response.status_code == 200 and text.encode() in bytes(
                i for i in sent if i < 256
            )


async def test_the_last_message_can_be_continued(address: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer"}]
    prompt = await sent_prompt(
        address,
        CHAT_TEMPLATE.replace("eos_token", "'!'"),
        messages=messages,
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert prompt.endswith("assistant:The answer")


async def test_template_variables(address: str) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}{{ reasoning_effort }}"
    variables = {"enable_thinking": False}
    prompt = await sent_prompt(
        address, template, chat_template_kwargs=variables, reasoning_effort="low"
    )
    assert prompt == "hiFalselow"


async def test_calls_of_earlier_turns_reach_the_template_as_objects(address: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    template = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[1].content }}"
    assert await sent_prompt(address, template + "{# tools #}", messages=messages) == "12"
    plain = await sent_prompt(address + "2", "{% for m in messages %}{{ m }}{% endfor %}",
                              messages=messages)  # fmt: skip
    assert "tool_response" in plain and '"x": 1' in plain and "'tool'" not in plain


async def test_a_template_without_tools_is_told_of_them_in_words(address: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = await sent_prompt(address, template, tools=[WEATHER])
    assert prompt.startswith(PREAMBLE[:20]) and '"name": "weather"' in prompt


# ---- tools and reasoning


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls(address: str, stream: bool) -> None:
    text = f"Let me see. {CALL}\n{CALL}"
    script = roomy(says(*text, [EOS], end="stop"))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        response = await server.chat(tools=[WEATHER], stream=stream)
    if stream:
        chunks = events(response)
        assert joined(chunks) == "Let me see."
        calls: list[dict[str, Any]] = []
        for chunk in chunks:
            for delta in chunk["choices"][0]["delta"].get("tool_calls", []):
                if "id" in delta:
                    calls.append(delta)
                else:
                    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == "Let me see."
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
    assert reason == "tool_calls"
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Ulm"}'}
    ] * 2
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_if_parallel_ones_are_unwanted(address: str, stream: bool) -> None:
    script = roomy(says(CALL + CALL, [EOS], end="stop"))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        body = {"tools": [WEATHER], "parallel_tool_calls": False, "stream": stream}
        text = (await server.chat(**body)).text
    assert text.count('"name":"weather"') == 1


async def test_without_tools_or_with_choice_none_calls_are_text(address: str) -> None:
    script = roomy(says(CALL))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            answer = (await server.chat(**body)).json()
            assert answer["choices"][0]["message"]["content"] == CALL


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "nix"}}])
async def test_forced_calls_need_something_to_call(address: str, choice: Any) -> None:
    async with served(address) as server:
        error = error_of(await server.chat(tool_choice=choice))
        assert error["param"] == "tool_choice" and "tools" in error["message"]
        if choice != "required":
            error = error_of(await server.chat(tool_choice=choice, tools=[WEATHER]))
            assert "nix" in error["message"]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("asked", "field", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            "json",
            SCHEMA,
        ),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", ["yes", "no"]),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
            },
            "json",
            WEATHER["function"]["parameters"],
        ),
    ],
)
async def test_what_the_output_must_be_reaches_the_engine(
    address: str, asked: dict[str, Any], field: str, value: Any
) -> None:
    async with served(address, roomy(says("{}"))) as server:
        await server.chat(**asked)
        request = await message_of(server.core, AddRequest)
    constraint = request.params.structured_outputs
    assert constraint is not None
    found = getattr(constraint, field)
    assert (json.loads(found) if field == "json" else found) == value


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning(address: str, stream: bool) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}"
    script = says("<thi", "nk>\nHm.\n</th", "ink>\n\nYes.")
    async with served(address, script, tokenizer=tokenizer_with(template)) as server:
        response = await server.chat(stream=stream)
        hidden = await server.chat(stream=stream, include_reasoning=False)
    if stream:
        chunks = events(response)
        assert joined(chunks, "reasoning_content") == "Hm." and joined(chunks) == "Yes."
    else:
        message = response.json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    assert "Hm." not in hidden.text and "Yes." in hidden.text


async def test_a_prompt_that_opens_the_thinking_starts_within_it(address: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}"
    async with served(address, says("Hm.</think>Yes."), tokenizer=tokenizer_with(template)) as one:
        message = (await one.chat()).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is false %}<think></think>{% else %}<think>\n{% endif %}"
)
PERSON = {"type": "object", "properties": {"name": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
NAMED = {"type": "function", "function": {"name": "weather"}}


async def said(server: Served, stream: bool, **body: Any) -> tuple[str, str, list[Any], str]:
    """Reasoning, content, (name, arguments) of calls and the finish reason."""
    response = await server.chat(stream=stream, **body)
    if not stream:
        choice = response.json()["choices"][0]
        message = choice["message"]
        calls = [tuple(c["function"].values()) for c in message.get("tool_calls", [])]
        reasoning, content = message.get("reasoning_content", ""), message["content"] or ""
        return reasoning, content, calls, choice["finish_reason"]
    chunks = events(response)
    found: dict[int, list[str]] = {}
    for chunk in chunks:
        for delta in chunk["choices"][0]["delta"].get("tool_calls", []):
            call = found.setdefault(delta["index"], ["", ""])
            call[0] += delta["function"].get("name", "")
            call[1] += delta["function"].get("arguments", "")
    reason = chunks[-1]["choices"][0]["finish_reason"]
    calls = [tuple(call) for call in found.values()]
    return joined(chunks, "reasoning_content"), joined(chunks), calls, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shown", [True, False])
async def test_a_model_that_always_thinks_does_so_before_what_is_constrained(
    address: str, stream: bool, shown: bool
) -> None:
    arguments = '{"city": "Ulm"}'
    array = f'[{{"name": "weather", "parameters": {arguments}}}]'
    tokenizer = tokenizer_with(THINKING + "{# tools #}")
    for index, (asked, text, content, calls) in enumerate(
        [
            ({"response_format": FORMAT}, '{"name": "x"}', '{"name": "x"}', []),
            ({"structured_outputs": {"regex": "a+"}}, "aa", "aa", []),
            ({"tools": [WEATHER], "tool_choice": NAMED}, arguments, "", [("weather", arguments)]),
            ({"tools": [WEATHER], "tool_choice": "required"}, array, "", [("weather", arguments)]),
        ]
    ):
        script = roomy(says(*f"Hm.\n</think>\n\n{text}", [EOS], end="stop"))
        async with served(f"{address}{index}", script, tokenizer=tokenizer) as server:
            found = await said(server, stream, include_reasoning=shown, **asked)
            params = (await message_of(server.core, AddRequest)).params
        assert found[:3] == ("Hm." if shown else "", content, calls)
        assert found[3] == ("tool_calls" if calls else "stop")
        assert params.structured_outputs is not None
        assert params.structured_outputs.after == "</think>"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parser", ["auto", "deepseek_r1"])
async def test_without_thinking_what_is_constrained_begins_at_once(
    address: str, stream: bool, parser: str
) -> None:
    script = roomy(says('{"name": ', '"x"}', [EOS], end="stop"))
    tokenizer = tokenizer_with(THINKING)
    settings = {"reasoning_parser": parser}
    async with served(address, script, tokenizer=tokenizer, **settings) as server:
        body = {"response_format": FORMAT, "chat_template_kwargs": {"enable_thinking": False}}
        found = await said(server, stream, **body)
        params = (await message_of(server.core, AddRequest)).params
    assert found == ("", '{"name": "x"}', [], "stop")
    assert params.structured_outputs is not None and params.structured_outputs.after is None


async def test_a_truncated_prompt_still_opens_the_thinking(address: str) -> None:
    async with served(address, says("Hm.</think>Yes."), tokenizer=tokenizer_with(THINKING)) as one:
        found = await said(one, False, truncate_prompt_tokens=3)
    assert found[:2] == ("Hm.", "Yes.")


async def test_a_forced_tool_without_parameters_takes_none(address: str) -> None:
    bare = {"type": "function", "function": {"name": "now"}}
    empty = {"type": "function", "function": {"name": "now", "parameters": {}}}
    for index, tool in enumerate((bare, empty)):
        async with served(f"{address}{index}", roomy(says("{}", [EOS], end="stop"))) as server:
            found = await said(server, False, tools=[tool], tool_choice=bare)
            await said(server, False, tools=[tool], tool_choice="required")
            named = (await message_of(server.core, AddRequest)).params.structured_outputs
            either = (await message_of(server.core, AddRequest, 2)).params.structured_outputs
        assert found[2:] == ([("now", "{}")], "tool_calls")
        assert named is not None and named.choice == ["{}"]
        assert either is not None and isinstance(either.json, str)
        assert json.loads(either.json)["items"]["anyOf"][0]["required"] == ["name"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"response_format": FORMAT}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tools[0].function.parameters"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tools[0].function.parameters"),
    ],
)
async def test_what_the_core_says_of_a_grammar_names_the_field_that_was_sent(
    address: str, asked: dict[str, Any], field: str
) -> None:
    def refuse(message: ToCore) -> Any:
        if not isinstance(message, AddRequest):
            return silent(message)
        wanted = message.params.structured_outputs
        assert wanted is not None
        text = f"structured_outputs.{wanted.kind} cannot be used: no such thing"
        return [RequestFailed(message.number, text, "grammar")]

    async with served(address, roomy(refuse)) as server:
        for stream in (False, True):
            response = await server.chat(stream=stream, **asked)
            error = error_of(response)
            assert response.status_code == 400 and error["param"] == field
            assert error["message"] == f"{field} cannot be used: no such thing"
        if "tools" not in asked:
            assert error_of(await server.complete(**asked))["param"] == field


@pytest.mark.parametrize(("cause", "status"), [("engine", 500), ("request", 400), ("grammar", 400)])
async def test_a_status_says_who_is_at_fault_and_no_text_decides_it(
    address: str, cause: FailureCause, status: int
) -> None:
    def fail(message: ToCore) -> Any:
        if not isinstance(message, AddRequest):
            return silent(message)
        return [RequestFailed(message.number, "structured_outputs: no such thing", cause)]

    async with served(address, roomy(fail)) as server:
        for body in ({}, {"structured_outputs": {"regex": "a"}}):
            for ask in (server.chat, server.complete):
                for stream in (False, True):
                    assert (await ask(stream=stream, **body)).status_code == status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["length", "stop"])
async def test_what_a_parser_has_held_back_comes_at_the_end(
    address: str, stream: bool, end: str
) -> None:
    """It began as a call does, and is none."""
    script = roomy(says("well <", "tool_ca", *[[EOS]] * (end == "stop"), end=end))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        response = await server.chat(tools=[WEATHER], stream=stream)
    if stream:
        assert joined(events(response)) == "well <tool_ca"
        assert events(response)[-1]["choices"][0]["finish_reason"] == end
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == "well <tool_ca" and choice["finish_reason"] == end


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [(CALL, "stop", "tool_calls"), (CALL[:-32], "length", "length"), (CALL, "length", "length")],
)
async def test_a_call_that_its_limit_has_cut_ends_by_length(
    address: str, stream: bool, text: str, end: str, reason: str
) -> None:
    script = roomy(says(text, *[[EOS]] * (end == "stop"), end=end))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        response = await server.chat(tools=[WEATHER], stream=stream)
    choice = (events(response)[-1] if stream else response.json())["choices"][0]
    assert choice["finish_reason"] == reason


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": True}, {"tools": [WEATHER]}])
async def test_events_of_a_stream_say_each_thing_once(address: str, fields: dict[str, Any]) -> None:
    """The role and the prompt's ids first, then texts that are none of them empty, then the end."""
    script = roomy(says("ab", "cd", [EOS], end="stop"))
    async with served(address, script, tokenizer=tokenizer_with(TOOL_TEMPLATE)) as server:
        chunks = events(await server.chat(stream=True, **fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert joined(chunks) == "abcd"
    with_prompt = [chunk for chunk in chunks if chunk.get("prompt_token_ids")]
    assert with_prompt == (chunks[:1] if "return_token_ids" in fields else [])
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or []]
    assert ids == ([*b"abcd", EOS] if "return_token_ids" in fields else [])


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('ab "%b" \u20ac', {}),
        ('ab "%b" \u20ac', {"logprobs": True, "top_logprobs": 2}),
        ("<think>as %s</think>so", {"tools": [WEATHER]}),
        ('{"city": "%"}', {"tools": [WEATHER], "tool_choice": NAMED}),
        (json.dumps([{"name": "weather", "parameters": {"city": c}} for c in "ab"]), REQUIRED),
        (f"ab {CALL} {CALL} cd", {"tools": [WEATHER]}),
    ],
)
async def test_events_that_are_put_together_are_what_they_would_be_as_a_whole(
    text: str, fields: dict[str, Any]
) -> None:
    """With token ids each is encoded by itself; without, those that look alike are encoded once,
    whatever stands around their values."""
    settings, tokenizer = ServerSettings(reasoning_parser="auto"), tokenizer_with("</think>tools")
    form = ReplyFormat.of(tokenizer, settings)
    names, given = TokenNames(tokenizer, False), {"messages": [{"role": "user", "content": "hi"}]}

    async def outputs(with_logprobs: bool) -> AsyncIterator[RequestOutput]:
        pieces = [*text, ""]
        for place, piece in enumerate(pieces):
            other = Logprob(-2.5, 2 if place % 2 else 1, "%")
            alternatives = {65: Logprob(-0.1 * place, 1 if place % 2 else 2, "A"), 37: other}
            scores = [alternatives] if with_logprobs else None
            reason: Any = None if place + 1 < len(pieces) else "stop"
            one = CompletionOutput(0, piece, [65], logprobs=scores, finish_reason=reason)
            yield RequestOutput("r", None, [1], [one], reason is not None, RequestMetrics(0.0))

    async def chunks(**more: Any) -> list[Any]:
        body = msgspec.convert({**given, **fields, **more}, ChatBody)
        state = ChoiceState(0, form.make_parser(body, thinks_first=False))
        arrives = outputs(bool(body.logprobs))
        model, name = '"content":""%b', '"arguments":""'
        answer = ChatAnswer(name, model, body, arrives, [state], form, names, created=7)
        found = b"".join([one async for one in answer.events()]).split(b"\n\n")[:-1]
        made = [json.loads(one.removeprefix(b"data: ")) for one in found]
        for chunk in made:
            (choice,) = chunk["choices"]
            del chunk["choices"]
            chunk |= {key: choice[key] for key in choice if key != "token_ids"}
            chunk.pop("prompt_token_ids", None)
            for call in choice["delta"].get("tool_calls", []):
                assert call.pop("id", "").startswith("call_") or "name" not in call["function"]
        return made

    alike = await chunks()
    whole = [one for one in await chunks(return_token_ids=True) if one["delta"] or one == alike[-1]]
    assert alike == whole and len(alike) > 5


async def test_a_stream_has_no_empty_deltas_before_its_first_text_and_at_its_end(
    address: str,
) -> None:
    """Half a character has no text yet, and an end brings none."""
    first, second = "é".encode()
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with (
        listening(address, says([first], end=None)) as (url, core, _),
        httpx.AsyncClient(timeout=WAIT_S) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        lines = (line async for line in response.aiter_lines() if line.startswith("data: {"))
        number = core.wait_for(AddRequest).number
        chunks = [json.loads((await anext(lines))[6:])]
        core.push(Outputs([number], [second]))  # when the event of the one before has come
        chunks.append(json.loads((await anext(lines))[6:]))
        core.push(Outputs(finished=[Finished(number, "length", None, 0)]))
        chunks += [json.loads(line[6:]) async for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "é"}, {}]


async def test_what_is_false_beside_another_constraint_asks_for_nothing(address: str) -> None:
    async with served(address, roomy(says("a"))) as server:
        response = await server.chat(structured_outputs={"json_object": False, "regex": "a"})
        assert response.status_code == 200, response.text
        wanted = server.core.wait_for(AddRequest).params.structured_outputs
        assert wanted is not None and wanted.kind == "regex"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ messages[0].content }}{{ enable_thinking }}", "hiFalse"),
        ("{{ messages[0].content }}", "hi"),
        ("{{ messages[0].content }}{{ reasoning_effort }}{{ enable_thinking }}", "hinone"),
        ("{{ messages[0].content }}<think></think>", None),
    ],
)
async def test_without_reasoning_is_asked_of_the_template_in_its_words(
    address: str, template: str, prompt: str | None
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "none"}
    if prompt is None:
        tokenizer = tokenizer_with(template)
        async with served(address, roomy(says("x")), tokenizer=tokenizer) as server:
            response = await server.chat(**body)
            assert response.status_code == 400
            assert error_of(response)["param"] == "reasoning_effort"
    else:
        assert await sent_prompt(address, template, **body) == prompt


async def test_ids_of_tokens_whose_text_is_held_back_come_at_once(address: str) -> None:
    """What has begun as a call does is no text yet."""
    said = ["a", "<tool", "_c", "x"]
    async with served(
        address, roomy(says(*said)), tokenizer=tokenizer_with(TOOL_TEMPLATE)
    ) as server:
        chunks = events(
            await server.chat(tools=[WEATHER], stream=True, return_token_ids=True, logprobs=False)
        )
    assert joined(chunks) == "".join(said)
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or []]
    assert ids == list("".join(said).encode())


@pytest.mark.parametrize("stream", [False, True])
async def test_special_tokens_are_kept_where_they_mark_calls(address: str, stream: bool) -> None:
    """For whoever reads the calls; without tools they are no text."""
    fast = fast_tokenizer()
    fast.add_special_tokens([AddedToken("[TOOL_CALLS]")])
    marker = fast.token_to_id("[TOOL_CALLS]")
    tokenizer = Tokenizer(fast, chat_template="{{ messages[0].content }}[TOOL_CALLS]")
    script = roomy(says("a", [marker], '[{"name": "weather", "arguments": {}}]'))
    async with served(address, script, tokenizer=tokenizer) as server:
        for fields, num_calls in (({}, 0), ({"tools": [WEATHER]}, 1)):
            response = await server.chat(stream=stream, **fields)
            if stream:
                chunks = events(response)
                text = joined(chunks)
                calls = [
                    c for one in chunks for c in one["choices"][0]["delta"].get("tool_calls", [])
                ]
                found = [call for call in calls if call["function"].get("name")]
            else:
                message = response.json()["choices"][0]["message"]
                text, found = message["content"], message.get("tool_calls") or []
            assert len(found) == num_calls
            assert text == ("a" if num_calls else 'a[{"name": "weather", "arguments": {}}]')
