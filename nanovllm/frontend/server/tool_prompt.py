"""Tools for models whose chat template knows none: the Hermes way, written into the messages.

Called by `prompts.py`. The text is that of Qwen2.5's template, which follows NousResearch's
Hermes-Function-Calling.
"""

import json
from typing import Any

from nanovllm.frontend.chat_template import Message

PREAMBLE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """The same conversation in system, user and assistant messages of plain text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    offer = PREAMBLE.format(tools="\n".join(json.dumps(tool) for tool in tools))
    if plain and plain[0]["role"] == "system":
        first, *rest = plain
        return [{**first, "content": f"{first['content']}\n\n{offer}"}, *rest]
    return [{"role": "system", "content": offer}, *plain]


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls")
    if not calls:
        return message
    parts = [message["content"]] if message.get("content") else []
    parts += [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join(parts)}
