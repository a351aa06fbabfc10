"""Request bodies → prompt token ids: chat templates, batches, truncation.

Called by the endpoints. All but short texts are encoded in threads, where the tokenizer works
without Python's lock: other clients' streams do not stop meanwhile, and prompts that come together
are encoded together.
"""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from nanovllm.frontend.chat_template import RESERVED, Message
from nanovllm.frontend.inputs import Prompt
from nanovllm.frontend.server.api_errors import ApiError, refused
from nanovllm.frontend.server.bodies import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    ContentPart,
    MadeCall,
    TokenizeBody,
    Tool,
)
from nanovllm.frontend.server.tool_prompt import with_tools
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.limits import MAX_OUTPUTS, MAX_PROMPT_CHARS, check_count

MAX_AT_ONCE = 1 << 16  # characters; more take long, and are encoded where that can be ended
LONG_TEXT = 768  # characters; up to 0.3 ms to encode, where a thread costs 0.05
TEXT_TYPES = ("text", "input_text", "output_text")
INSTEAD = {
    "audio": "this model reads text only",
    "function_call": "is not supported: send tool_calls",
    "partial": "is not supported: send continue_final_message",
    "prefix": "is not supported: send continue_final_message",
}
# Its last blank tells whether a template strips what it is given.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "
T = TypeVar("T")


async def chat_prompt(
    tokenizer: Tokenizer, body: ChatBody | TokenizeBody, most_tokens: int | None = None
) -> Prompt:
    """Render the conversation and encode it; the template writes special tokens itself.

    most_tokens: that a model takes, if a longer prompt is of no use.
    """
    messages, variables = template_input(tokenizer, body)
    render: Callable[..., str] = Tokenizer.apply_chat_template
    if body.continue_final_message:
        render = _open_ended_prompt
    add = bool(body.add_special_tokens)

    def made() -> tuple[str, list[int] | None]:
        """The text and, unless that takes long, its token ids."""
        text = render(tokenizer, messages, **variables)
        if (refusal := refusal_of_length(text, tokenizer.most_chars, most_tokens)) is not None:
            raise refusal
        is_long = len(text) > MAX_AT_ONCE
        return text, None if is_long else tokenizer.encode(text, add_special_tokens=add)

    # In a thread: a template may take as long as it is let.
    text, token_ids = await asyncio.to_thread(made)
    if token_ids is None:
        token_ids = await encoded(tokenizer, text, add_special_tokens=add)
    return Prompt(text, token_ids)


async def text_prompts(
    tokenizer: Tokenizer | None, body: CompletionBody, most_tokens: int | None = None
) -> list[Prompt | ApiError]:
    """One per prompt of the batch, or what is wrong with it. Who leaves has no more encoded."""
    add = body.add_special_tokens is not False

    async def made(content: str | list[int]) -> Prompt | ApiError:
        if isinstance(content, list):
            return Prompt(None, content)
        if tokenizer is None:
            return refused("prompt", "text needs a tokenizer, and there is none: send token ids")
        if not content:
            return refused("prompt", "is empty: send at least one character")
        if (refusal := refusal_of_length(content, tokenizer.most_chars, most_tokens)) is not None:
            return refusal
        # Many short ones would hold up the loop as one long one does.
        size = 0 if is_short else LONG_TEXT
        ids = await encoded(tokenizer, content, size=size, add_special_tokens=add)
        return Prompt(content, ids)

    contents, size = batch_of(body)
    is_short = size < LONG_TEXT
    return [await made(content) for content in contents]


def batch_of(body: CompletionBody) -> tuple[list[Any], int]:
    """The prompts, texts or lists of ids, and the characters of all texts. Raises `ApiError` and
    `ValueError`."""
    contents = _batch(body.prompt)
    num_outputs = len(contents) * (body.n or 1)
    check_count("prompt", num_outputs, MAX_OUTPUTS, "prompts times n")
    size = sum(len(content) for content in contents if isinstance(content, str))
    check_count("prompt", size, MAX_PROMPT_CHARS, "characters")
    return contents, size


def refusal_of_length(
    text: str, most_chars: int | None, most_tokens: int | None
) -> ApiError | None:
    """What is too long for any model like this one is not encoded first. most_chars: of a token, if
    that is known."""
    if most_tokens is None or most_chars is None or len(text) <= most_chars * most_tokens:
        return None
    least = f"it has at least {-(-len(text) // most_chars)} tokens"
    message = f"prompt: {least}, but max_model_len is {most_tokens}: shorten it"
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


async def encoded(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, size: int = 0
) -> list[int]:
    """The token ids of a text, which may be empty. size: as which it counts, if it is shorter."""
    size = max(size, len(text))
    if size > MAX_AT_ONCE:
        return await tokenizer.long_texts.encode(text, add_special_tokens=add_special_tokens)
    encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return await aside_if_long(encode, size)


def truncated(prompt: Prompt, limit: int | None) -> Prompt:
    """Its last `limit` tokens."""
    if limit is None or len(prompt.token_ids) <= limit:
        return prompt
    return Prompt(None, prompt.token_ids[-limit:])


def template_input(
    tokenizer: Tokenizer, body: ChatBody | TokenizeBody
) -> tuple[list[Message], dict[str, Any]]:
    """What the chat template is given: messages as plain dicts, and variables."""
    source = (tokenizer.tool_template if body.tools else tokenizer.chat_template) or ""
    has_developer = "developer" in source
    messages = [
        _template_message(message, has_developer=has_developer) for message in body.messages or []
    ]
    if body.continue_final_message and body.add_generation_prompt:
        raise refused("add_generation_prompt", "excludes continue_final_message")
    generate = body.add_generation_prompt is not False and not body.continue_final_message
    variables: dict[str, Any] = {**(body.chat_template_kwargs or {})}
    if reserved := variables.keys() & RESERVED:
        raise refused("chat_template_kwargs", f"must not hold {', '.join(sorted(reserved))}")
    if isinstance(body, ChatBody) and (body.reasoning_effort is not None or body.documents):
        variables |= _template_fields(body, source)
    offered = not isinstance(body, ChatBody) or body.tool_choice != "none"
    tools = [_template_tool(tool) for tool in body.tools or []] if offered else []
    if "tools" not in source:
        if tools or any(one["role"] == "tool" or "tool_calls" in one for one in messages):
            messages = with_tools(messages, tools)
    elif tools:
        variables["tools"] = tools
    return messages, {**variables, "add_generation_prompt": generate}


def _batch(prompt: str | list[Any]) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refused("prompt", "is empty: send at least one token or text")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if int in kinds:
        raise refused("prompt", "mixes token ids with texts or lists")
    return prompt


async def aside_if_long(make: Callable[[], T], num_characters: int) -> T:
    """In a thread unless it is short."""
    if num_characters < LONG_TEXT:
        return make()
    return await asyncio.to_thread(make)


def _template_fields(body: ChatBody, source: str) -> dict[str, Any]:
    """The fields that are for the chat template. Without reasoning is how a model answers that has
    none."""
    found: dict[str, Any] = {}
    if body.reasoning_effort == "none" and "reasoning_effort" not in source:
        if "enable_thinking" in source:
            found["enable_thinking"] = False
        elif "</think>" in source:
            raise refused("reasoning_effort", "this model cannot do without reasoning")
    elif body.reasoning_effort is not None:
        found["reasoning_effort"] = body.reasoning_effort
    if body.documents:
        found["documents"] = body.documents
    for name in found:
        if name not in source:
            raise refused(name, "the model's chat template does not know it")
    return found


def _template_message(message: ChatMessage, *, has_developer: bool) -> Message:
    role = message.role
    made: Message = {"role": "system" if role == "developer" and not has_developer else role}
    for name, instead in INSTEAD.items():
        if getattr(message, name):
            raise refused(f"messages.{name}", instead)
    content = message.content if message.content is not None else message.refusal
    made["content"] = _joined(content) if isinstance(content, list) else content
    if content is None and role != "assistant":
        raise refused("messages", f"content of a {role} message is missing")
    if content is None and not message.tool_calls:
        made["content"] = ""
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if isinstance(message.reasoning, str):
        made.setdefault("reasoning_content", message.reasoning)
    if message.tool_calls:
        made["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return made


def _template_call(call: MadeCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"type": "function", "id": call.id, "function": function}


def _joined(parts: list[str | ContentPart]) -> str:
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif part.type in TEXT_TYPES and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        else:
            raise refused("messages", f"content of type {part.type!r}: this model reads text only")
    return "\n".join(texts)


def _arguments(given: str | dict[str, Any] | None) -> Any:
    """Templates want the object; what is no JSON stays the text that the model wrote."""
    if isinstance(given, dict):
        return given
    try:
        return json.loads(given or "{}") or {}
    except (ValueError, RecursionError):
        return given


def _template_tool(tool: Tool) -> dict[str, Any]:
    """Templates print it as JSON, so what was not given is left out."""
    function = tool.function
    known = {"name": function.name, "description": function.description}
    known["parameters"] = function.parameters  # type: ignore[assignment]
    return {"type": "function", "function": {k: v for k, v in known.items() if v is not None}}


def _open_ended_prompt(tokenizer: Tokenizer, messages: list[Message], /, **variables: Any) -> str:
    """The prompt up to the end of the last message's words, for the model to go on from."""
    *others, last = messages
    return _open_ended(tokenizer.apply_chat_template([*others, _marked(last)], **variables), last)


def _marked(message: Message) -> Message:
    """A final message with `MARK` behind its words, so that they are found again in the prompt."""
    words = message["content"]
    if not words:
        raise refused("continue_final_message", "the final message has no text to continue")
    return {**message, "content": words + MARK}


def _open_ended(text: str, message: Message) -> str:
    """What of a prompt stands before `MARK`, as transformers' `apply_chat_template` does it. A
    template that strips what it is given strips the words, too."""
    where = text.rfind(MARK.strip())
    if where < 0 or message["content"].strip() not in text:
        raise refused("continue_final_message", "the final message has no text in the prompt")
    kept = text[:where]
    return kept if text.startswith(MARK, where) else kept.rstrip()
