"""Request bodies → prompt token ids: chat templates, batches, truncation.

Called by the endpoints. All but short texts are encoded in threads, where the tokenizer works
without Python's lock: other clients' streams do not stop meanwhile, and prompts that come together
are encoded together.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from nanovllm.frontend.chat_template import RESERVED, Message
from nanovllm.frontend.server.api_errors import refused
from nanovllm.frontend.server.bodies import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    ContentPart,
    TokenizeBody,
    Tool,
)
from nanovllm.frontend.server.tool_prompt import with_tools
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.limits import MAX_OUTPUTS, MAX_PROMPT_CHARS, MAX_PROMPTS, check_count

MAX_AT_ONCE = 1 << 18  # characters of a text that is encoded beside others; longer ones queue
LONG_TEXT = 768  # characters; up to 0.3 ms to encode, where a thread costs 0.05
LONG_TEXTS = ThreadPoolExecutor(1, "long texts")
T = TypeVar("T")


class ServedPrompt(NamedTuple):
    """text: as the template rendered it, or None if the client sent token ids."""

    text: str | None
    token_ids: list[int]


async def chat_prompt(tokenizer: Tokenizer, body: ChatBody | TokenizeBody) -> ServedPrompt:
    """Render the conversation and encode it; the template writes special tokens itself."""
    messages, variables = template_input(tokenizer, body)

    def make() -> ServedPrompt:
        text = tokenizer.apply_chat_template(messages, **variables)
        if body.continue_final_message:
            text = _open_ended(text, messages[-1])
        add = bool(body.add_special_tokens)
        return ServedPrompt(text, tokenizer.encode(text, add_special_tokens=add))

    size = sum(len(str(message.get("content", ""))) for message in messages)
    check_count("messages", size, MAX_PROMPT_CHARS, "characters")
    # Always aside: a template may take as long as it is let.
    return await aside_if_long(make, max(size, LONG_TEXT))


async def text_prompts(tokenizer: Tokenizer | None, body: CompletionBody) -> list[ServedPrompt]:
    """One per prompt of the batch."""
    add = body.add_special_tokens is not False

    def make(content: str | list[int]) -> ServedPrompt:
        if isinstance(content, list):
            return ServedPrompt(None, content)
        if tokenizer is None:
            raise refused("prompt", "text needs a tokenizer, and there is none: send token ids")
        if not content:
            raise refused("prompt", "is empty: send at least one character")
        return ServedPrompt(content, tokenizer.encode(content, add_special_tokens=add))

    contents = _batch(body.prompt)
    num_outputs = len(contents) * (body.n or 1)
    check_count("prompt", num_outputs, MAX_OUTPUTS, "prompts times n")
    size = sum(len(content) for content in contents if isinstance(content, str))
    check_count("prompt", size, MAX_PROMPT_CHARS, "characters")
    return await aside_if_long(lambda: [make(content) for content in contents], size)


async def plain_prompt(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a text, which may be empty."""

    def make() -> list[int]:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    return await aside_if_long(make, len(text))


def truncated(prompt: ServedPrompt, limit: int | None) -> ServedPrompt:
    """Its last `limit` tokens."""
    if limit is None or len(prompt.token_ids) <= limit:
        return prompt
    return ServedPrompt(None, prompt.token_ids[-limit:])


def template_input(
    tokenizer: Tokenizer, body: ChatBody | TokenizeBody
) -> tuple[list[Message], dict[str, Any]]:
    """What the chat template is given: messages as plain dicts, and variables."""
    source = (tokenizer.tool_template if body.tools else tokenizer.chat_template) or ""
    has_developer = "developer" in source
    messages = [
        _template_message(message, has_developer=has_developer) for message in body.messages or []
    ]
    generate = body.add_generation_prompt is not False
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise refused("add_generation_prompt", "excludes continue_final_message")
        generate = False
    variables: dict[str, Any] = {**(body.chat_template_kwargs or {})}
    if reserved := variables.keys() & RESERVED:
        raise refused("chat_template_kwargs", f"must not hold {', '.join(sorted(reserved))}")
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        if "reasoning_effort" not in source:
            raise refused("reasoning_effort", "the model's chat template does not know it")
        variables["reasoning_effort"] = body.reasoning_effort
    offered = not isinstance(body, ChatBody) or body.tool_choice != "none"
    tools = [_template_tool(tool) for tool in body.tools or []] if offered else []
    if "tools" not in source:
        messages = with_tools(messages, tools)
    elif tools:
        variables["tools"] = tools
    return messages, {**variables, "add_generation_prompt": generate}


def _batch(prompt: str | list[Any]) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refused("prompt", "is empty: send at least one token or text")
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]
    if int in kinds:
        raise refused("prompt", "mixes token ids with texts or lists")
    check_count("prompt", len(prompt), MAX_PROMPTS, "prompts")
    return prompt


async def aside_if_long(make: Callable[[], T], num_characters: int) -> T:
    """In a thread unless it is short. The longest, which take seconds and much memory, one by one:
    then they take neither all threads nor all memory."""
    if num_characters < LONG_TEXT:
        return make()
    pool = LONG_TEXTS if num_characters > MAX_AT_ONCE else None
    return await asyncio.get_running_loop().run_in_executor(pool, make)


def _template_message(message: ChatMessage, *, has_developer: bool) -> Message:
    role = message.role
    made: Message = {"role": "system" if role == "developer" and not has_developer else role}
    content = message.content
    made["content"] = _joined(content) if isinstance(content, list) else content
    if content is None and role != "assistant":
        raise refused("messages", f"content of a {role} message is missing")
    if content is None and not message.tool_calls:
        made["content"] = ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return made


def _joined(parts: list[ContentPart]) -> str:
    for part in parts:
        if part.type != "text" or part.text is None:
            raise refused("messages", f"content of type {part.type!r}: this model reads text only")
    return "\n".join(part.text or "" for part in parts)


def _arguments(text: str) -> Any:
    """Templates want the object; what is no JSON stays the text that the model wrote."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _template_tool(tool: Tool) -> dict[str, Any]:
    """Templates print it as JSON, so what was not given is left out."""
    function = tool.function
    known = {"name": function.name, "description": function.description}
    known["parameters"] = function.parameters  # type: ignore[assignment]
    return {"type": "function", "function": {k: v for k, v in known.items() if v is not None}}


def _open_ended(text: str, message: Message) -> str:
    """The prompt up to the end of its last message's words, for the model to go on from."""
    words = str(message["content"] or "").strip()
    end = text.rfind(words)
    if not words or end < 0:
        raise refused("continue_final_message", "the final message has no text in the prompt")
    return text[: end + len(words)]
