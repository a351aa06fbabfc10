"""The official client and LangChain, unchanged, against a scripted core over a real socket."""

from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from nanovllm.protocol.messages import (
    AddRequest,
    Finished,
    Outputs,
    Overloaded,
    RequestFailed,
    ToCore,
)
from nanovllm.protocol.plan import TokenLogprobs
from tests.frontend.attached import says
from tests.frontend.fake_core import silent
from tests.frontend.server.served import TOOL_TEMPLATE, listening, roomy, tokenizer_with
from tests.frontend.vocabulary import EOS

USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
CALL = 'Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def logged(message: ToCore) -> Any:
    if not isinstance(message, AddRequest):
        return silent(message)
    entry = TokenLogprobs(65, -0.5, 1, [65, 66], [-0.5, -1.0])
    end = Finished(message.number, "length", None, 0)
    return [Outputs([message.number], [65], {0: entry}, finished=[end])]


async def test_chat_streaming_and_errors(address: str) -> None:
    async with (
        listening(address, says("hel", "lo"), api_key=["k"]) as (url, _, _s),
        AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["fake"]
        answer = await client.chat.completions.create(model="fake", messages=[USER])
        assert answer.choices[0].message.content == "hello"
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        stream = await client.chat.completions.create(
            model="fake", messages=[USER], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(texts) == "hello" and chunks[-1].usage is not None
        several = await client.completions.create(model="fake", prompt=["a", "b"])
        assert [choice.text for choice in several.choices] == ["hello"] * 2
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="nope", messages=[USER])
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="fake", messages=[USER], temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="unheard_of"):
            extra = {"unheard_of": 1}
            await client.completions.create(model="fake", prompt="a", extra_body=extra)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


async def test_four_choices_and_logprobs(address: str) -> None:
    async with (
        listening(address) as (url, _, _s),
        AsyncOpenAI(base_url=url + "/v1", api_key="k") as client,
    ):
        answer = await client.chat.completions.create(model="fake", messages=[USER], n=4)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    async with (
        listening(address + "2", logged) as (url, _, _s),
        AsyncOpenAI(base_url=url + "/v1", api_key="k") as client,
    ):
        answer = await client.chat.completions.create(
            model="fake", messages=[USER], logprobs=True, top_logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [top.token for top in logprobs.content[0].top_logprobs] == ["A", "B"]


async def test_tools(address: str) -> None:
    script, tokenizer = roomy(says(*CALL, [EOS], end="stop")), tokenizer_with(TOOL_TEMPLATE)
    async with (
        listening(address, script, tokenizer=tokenizer) as (url, _, _s),
        AsyncOpenAI(base_url=url + "/v1", api_key="k") as client,
    ):
        asked: Any = {"model": "fake", "messages": [USER], "tools": [TOOL]}
        answer = await client.chat.completions.create(**asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.arguments == '{"a": 1}'
        assert answer.choices[0].finish_reason == "tool_calls"
        async with client.chat.completions.stream(**asked) as stream:  # the client's own reader
            final = await stream.get_final_completion()
        (call,) = final.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "add"
        assert call.function.arguments == '{"a": 1}'
        again = [USER, answer.choices[0].message.to_dict()]
        again.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
        assert await client.chat.completions.create(model="fake", messages=again)


async def test_the_synchronous_client(address: str) -> None:
    import asyncio

    def talk(url: str) -> str:
        with OpenAI(base_url=url + "/v1", api_key="k") as client:
            stream = client.completions.create(model="fake", prompt="x", stream=True)
            return "".join(event.choices[0].text for event in stream)

    async with listening(address, says("hel", "lo")) as (url, _, _s):
        assert await asyncio.to_thread(talk, url) == "hello"


def failing(message: ToCore) -> Any:
    """By the prompt: refused for now, failed, too late, or begun."""
    if not isinstance(message, AddRequest):
        return silent(message)
    number = message.number
    match chr(message.prompt_token_ids[0]):
        case "o":
            return [Overloaded(number, 2.5, False)]
        case "f":
            return [RequestFailed(number, "out of luck")]
        case "t":
            return [Outputs(finished=[Finished(number, "timeout", None, 0)])]
        case _:
            return [Outputs([number], [65])]


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_own_classes(address: str, stream: bool) -> None:
    async with (
        listening(address, failing, max_body_bytes=4096) as (url, _, serving),
        AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0) as client,
    ):

        async def ask(prompt: str) -> None:
            await client.completions.create(model="fake", prompt=prompt, stream=stream)

        with pytest.raises(openai.RateLimitError) as overloaded:
            await ask("o")
        assert overloaded.value.response.headers["retry-after"] == "3"
        assert overloaded.value.code == "overloaded"
        with pytest.raises(openai.InternalServerError, match="out of luck") as failed:
            await ask("f")
        assert failed.value.status_code == 500 and failed.value.code == "request_failed"
        with pytest.raises(openai.InternalServerError, match="deadline_ms") as late:
            await ask("t")
        assert late.value.status_code == 504
        with pytest.raises(openai.APIStatusError, match="exceeds") as large:
            await ask("x" * 5000)
        assert large.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="empty"):
            await ask("")
        serving.drain()
        with pytest.raises(openai.InternalServerError, match="shuts down") as draining:
            await ask("x")
        assert draining.value.status_code == 503


async def test_a_failure_within_a_stream_is_raised_by_the_client(address: str) -> None:
    async with (
        listening(address, failing) as (url, core, _s),
        AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0) as client,
    ):
        stream = await client.completions.create(model="fake", prompt="late", stream=True)
        assert (await anext(aiter(stream))).choices[0].text == "A"
        core.push(RequestFailed(core.wait_for(AddRequest).number, "out of luck"))
        with pytest.raises(openai.APIError, match="out of luck"):
            await anext(aiter(stream))


async def test_langchain(address: str) -> None:
    script, tokenizer = roomy(says(*CALL, [EOS], end="stop")), tokenizer_with(TOOL_TEMPLATE)
    async with listening(address, script, tokenizer=tokenizer) as (url, _, _s):
        model = ChatOpenAI(model="fake", base_url=url + "/v1", api_key="k")  # type: ignore[arg-type]
        with_tools = model.bind_tools([TOOL])
        answer = await with_tools.ainvoke("hi")
        assert answer.content == "Well."
        assert [(one["name"], one["args"]) for one in answer.tool_calls] == [("add", {"a": 1})]
        whole: Any = None
        async for chunk in with_tools.astream("hi"):
            whole = chunk if whole is None else whole + chunk
        assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("add", {"a": 1})]
        assert whole.usage_metadata is None or whole.usage_metadata["output_tokens"] > 0
