"""Frameworks, unchanged, against a scripted core over a real socket: a tool with a nested model, a
structured answer, a replayed history. Those that are not installed are skipped."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from nanovllm.protocol.messages import AddRequest, ToCore
from tests.frontend.attached import says
from tests.frontend.fake_core import silent
from tests.frontend.server.served import TOOL_TEMPLATE, listening, roomy, tokenizer_with
from tests.frontend.vocabulary import EOS

# Of frameworks, which are not held to this project's warnings.
pytestmark = pytest.mark.filterwarnings("default")
WHY = "not installed: pip install 'nanovllm[clients]'"


class Item(BaseModel):
    name: str
    count: int


class Order(BaseModel):
    item: Item
    gift: bool = False


ORDER = '{"item": {"name": "tea", "count": 2}, "gift": false}'
TEA = Order(item=Item(name="tea", count=2))


def shop(message: ToCore) -> Any:
    """Orders tea by the tool that is offered, and is done once the tool has answered; where the
    output is constrained, it is the order, or the call of whatever has to be called."""
    if not isinstance(message, AddRequest):
        return silent(message)
    wanted = message.params.structured_outputs
    prompt = bytes(i for i in message.prompt_token_ids if i < 256).decode()
    if wanted is not None:
        schema = json.loads(wanted.json) if isinstance(wanted.json, str) else {}
        text = ORDER
        if schema.get("type") == "array":
            text = f"[{call_of(schema['items']['anyOf'][0]['properties']['name']['const'])}]"
    elif "tool:" in prompt or "<tool_call>" not in prompt:
        text = "Done."
    else:
        offered, _ = json.JSONDecoder().raw_decode(prompt.partition("<tool_call>")[2])
        text = f"<tool_call>{call_of(offered['function']['name'])}</tool_call>"
    return says(*text, [EOS], end="stop")(message)


def call_of(name: Any) -> str:
    arguments = ORDER if name != "place" else f'{{"order": {ORDER}}}'
    return f'{{"name": "{name}", "arguments": {arguments}}}'


async def against_the_shop(address: str, talk: Callable[[str], Any]) -> Any:
    """Run `talk`, which blocks, with the URL of a server."""
    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    async with listening(address, roomy(shop), tokenizer=tokenizer) as (url, _, _s):
        return await asyncio.to_thread(talk, f"{url}/v1")


async def test_openai(address: str) -> None:
    def talk(url: str) -> None:
        with OpenAI(base_url=url, api_key="k") as client:
            messages: list[Any] = [{"role": "user", "content": "tea"}]
            for choice in ("auto", "required"):
                answer = client.chat.completions.parse(
                    model="fake",
                    messages=messages,
                    tools=[pydantic_function_tool(Order)],
                    tool_choice=choice,  # type: ignore[arg-type]
                )
                (call,) = answer.choices[0].message.tool_calls or []
                assert call.function.parsed_arguments == TEA
                replayed = [*messages, answer.choices[0].message]
                replayed.append({"role": "tool", "tool_call_id": call.id, "content": "ok"})
                done = client.chat.completions.create(model="fake", messages=replayed)
                assert done.choices[0].message.content == "Done."
                replayed += [done.choices[0].message, messages[0]]
                parsed = client.chat.completions.parse(
                    model="fake", messages=replayed, response_format=Order
                )
                assert parsed.choices[0].message.parsed == TEA
                replayed += [parsed.choices[0].message, messages[0]]
                client.chat.completions.create(model="fake", messages=replayed)

    await against_the_shop(address, talk)


async def test_openai_agents(address: str) -> None:
    agents = pytest.importorskip("agents", reason=WHY)
    agents.set_tracing_disabled(True)
    ordered: list[Any] = []

    @agents.function_tool  # type: ignore[untyped-decorator]
    def place(order: Order) -> str:
        """Place an order."""
        ordered.append(order)
        return "ok"

    def talk(url: str) -> None:
        client = AsyncOpenAI(base_url=url, api_key="k")
        model = agents.OpenAIChatCompletionsModel(model="fake", openai_client=client)
        clerk = agents.Agent(name="clerk", model=model, tools=[place])
        result = agents.Runner.run_sync(clerk, "tea")
        assert result.final_output == "Done." and ordered == [TEA]
        again = [*result.to_input_list(), {"role": "user", "content": "And now?"}]
        assert agents.Runner.run_sync(clerk, again).final_output == "Done."
        typed = agents.Agent(name="typed", model=model, output_type=Order)
        assert agents.Runner.run_sync(typed, "tea").final_output == TEA

    await against_the_shop(address, talk)


async def test_pydantic_ai(address: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason=WHY)
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def talk(url: str) -> None:
        model = OpenAIChatModel("fake", provider=OpenAIProvider(base_url=url, api_key="k"))
        ordered: list[Any] = []
        clerk = pydantic_ai.Agent(model)

        @clerk.tool_plain  # type: ignore[untyped-decorator]
        def place(order: Order) -> str:
            """Place an order."""
            ordered.append(order)
            return "ok"

        result = clerk.run_sync("tea")
        assert result.output == "Done." and ordered == [TEA]
        again = clerk.run_sync("And now?", message_history=result.all_messages())
        assert again.output == "Done."
        assert pydantic_ai.Agent(model, output_type=Order).run_sync("tea").output == TEA
        native = pydantic_ai.NativeOutput(Order)
        assert pydantic_ai.Agent(model, output_type=native).run_sync("tea").output == TEA

    await against_the_shop(address, talk)


async def test_instructor(address: str) -> None:
    instructor = pytest.importorskip("instructor", reason=WHY)

    def talk(url: str) -> None:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
            with OpenAI(base_url=url, api_key="k") as plain:
                client = instructor.from_openai(plain, mode=mode)
                messages = [
                    {"role": "user", "content": "tea"},
                    {"role": "assistant", "content": "Done."},
                    {"role": "user", "content": "tea"},
                ]
                asked = {"model": "fake", "messages": messages, "max_retries": 0}
                found = client.chat.completions.create(response_model=Order, **asked)
                assert (found.item, found.gift) == (TEA.item, False)

    await against_the_shop(address, talk)


async def test_litellm(address: str) -> None:
    litellm = pytest.importorskip("litellm", reason=WHY)

    def talk(url: str) -> None:
        asked = {"model": "openai/fake", "api_base": url, "api_key": "k"}
        messages: list[Any] = [{"role": "user", "content": "tea"}]
        tool = pydantic_function_tool(Order)
        answer = litellm.completion(messages=messages, tools=[tool], **asked).choices[0].message
        (call,) = answer.tool_calls
        assert Order.model_validate_json(call.function.arguments) == TEA
        messages += [answer, {"role": "tool", "tool_call_id": call.id, "content": "ok"}]
        done = litellm.completion(messages=messages, **asked).choices[0].message
        assert done.content == "Done."
        messages += [done, {"role": "user", "content": "tea"}]
        typed = litellm.completion(messages=messages, response_format=Order, **asked)
        assert Order.model_validate_json(typed.choices[0].message.content) == TEA

    await against_the_shop(address, talk)


async def test_langchain(address: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    def talk(url: str) -> None:
        model = ChatOpenAI(model="fake", base_url=url, api_key="k")  # type: ignore[arg-type]
        messages: list[Any] = [HumanMessage("tea")]
        answer = model.bind_tools([Order]).invoke(messages)
        (call,) = answer.tool_calls
        assert Order.model_validate(call["args"]) == TEA
        messages += [answer, ToolMessage("ok", tool_call_id=call["id"])]
        done = model.invoke(messages)
        assert done.content == "Done."
        messages += [done, HumanMessage("tea")]
        for method in ("json_schema", "function_calling"):
            typed: Any = model.with_structured_output(Order, method=method)  # type: ignore[arg-type]
            assert typed.invoke(messages) == TEA

    await against_the_shop(address, talk)
