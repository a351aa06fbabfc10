"""What clients send by habit, and replay: accepted where it asks for nothing, else named."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nanovllm.frontend.server.serving import read_template
from nanovllm.protocol.messages import AddRequest
from tests.frontend.attached import says
from tests.frontend.server.served import (
    TOOL_TEMPLATE,
    error_of,
    message_of,
    roomy,
    served,
    tokenizer_with,
)

NOTHING: dict[str, Any] = {
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "auto"},
    "safety_identifier": "u",
    "moderation": {"model": "m"},
    "metadata": {"a": "b", "n": 1},
    "service_tier": "flex",
    "vllm_xargs": {},
    "logits_processors": [],
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "suffix": "",
    "best_of": 1,
    "echo": False,
    "nobody_knows_this": None,
}
NOTHING_OF_A_CHAT: dict[str, Any] = {
    "store": False,
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "audio": None,
    "documents": [],
    "modalities": ["text"],
    "functions": [],
    "function_call": "none",
    "web_search_options": None,
    "chat_template": None,
    "mm_processor_kwargs": {},
    "tools": [],
    "tool_choice": "auto",
    "reasoning_effort": "none",
    "response_format": {"type": "text", "json_schema": None, "unheard_of": None},
    "stream_options": None,
}


async def test_what_asks_for_nothing_is_accepted_alone_and_together(address: str) -> None:
    both = NOTHING | NOTHING_OF_A_CHAT
    async with served(address) as server:
        plain = (await server.chat()).json()["choices"]
        for name, value in both.items():
            response = await server.chat(**{name: value})
            assert response.status_code == 200, response.text
            assert response.json()["choices"] == plain, name
            assert (await server.chat(**{name: None})).status_code == 200, name
        assert (await server.chat(**both)).json()["choices"] == plain
        for name, value in NOTHING.items():
            assert (await server.complete(**{name: value})).status_code == 200, name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nobody_knows_this", 0),
        ("audio", {"voice": "x", "format": "wav"}),
        ("best_of", 3),
        ("chat_template", "{{ messages }}"),
        ("documents", [{"title": "t", "text": "x"}]),
        ("echo", True),
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("logits_processors", ["x"]),
        ("mm_processor_kwargs", {"a": 1}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "low"),
        ("suffix", "end"),
        ("vllm_xargs", {"a": 1}),
        ("web_search_options", {}),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(
    address: str, field: str, value: Any
) -> None:
    async with served(address) as server:
        response = await server.chat(**{field: value})
        assert response.status_code == 400 and error_of(response)["param"] == field
        assert not server.core.all_of(AddRequest)


async def test_null_within_a_schema_is_a_value(address: str) -> None:
    schema = {"type": "object", "properties": {"a": {"const": None, "default": None}}}
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    async with served(address, says("{}")) as server:
        await server.chat(response_format=form, nobody_knows_this=None)
        sent = (await message_of(server.core, AddRequest)).params.structured_outputs
    assert sent is not None and sent.json is not None and '"const":null' in str(sent.json)


CALL = {
    "id": "1",
    "type": "function",
    "index": 0,
    "function": {"name": "f", "arguments": '{"a":1}', "parsed_arguments": {"a": 1}},
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "{{ m.reasoning_content or '' }}]{% endfor %}{# tools #}"
)


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
            "[user:x]",
        ),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, "[user:a\nb]"),
        (
            {
                "role": "assistant",
                "content": "yes",
                "refusal": None,
                "audio": None,
                "function_call": None,
                "annotations": [],
                "parsed": {"a": 1},
                "provider_specific_fields": {"x": [1]},
                "thinking_blocks": None,
                "prefix": False,
                "id": "msg",
            },
            "[assistant:yes]",
        ),
        ({"role": "assistant", "content": "a", "reasoning": "hm"}, "[assistant:ahm]"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "[assistant:no]"),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            "[assistant:no]",
        ),
        ({"role": "assistant", "content": "", "tool_calls": []}, "[assistant:]"),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            '[assistant:None<f {"a": 1}>]',
        ),
        *(
            (
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                },
                f"[assistant:<f {shown}>]",
            )
            for arguments, shown in [
                (None, "{}"),
                ("", "{}"),
                ("null", "{}"),
                ({"a": 1}, '{"a": 1}'),
                ("no JSON", '"no JSON"'),
            ]
        ),
        (
            {"role": "tool", "tool_call_id": "1", "content": "y", "name": "f", "status": "ok"},
            "[tool:y]",
        ),
    ],
)
async def test_history_is_taken_as_clients_replay_it(
    address: str, message: dict[str, Any], rendered: str
) -> None:
    async with served(address, roomy(says("ok")), tokenizer=tokenizer_with(TEMPLATE)) as server:
        response = await server.chat(messages=[message])
        assert response.status_code == 200, response.text
        sent = bytes((await message_of(server.core, AddRequest)).prompt_token_ids).decode()
    assert sent == rendered


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
            },
            "reads text only",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "text only"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "text only"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, "tool_calls"),
        ({"role": "assistant", "content": "x", "prefix": True}, "continue_final_message"),
        ({"role": "user"}, "missing"),
    ],
)  # fmt: skip
async def test_messages_that_this_model_cannot_read(
    address: str, message: dict[str, Any], words: str
) -> None:
    async with served(address) as server:
        response = await server.chat(messages=[message])
    assert response.status_code == 400 and words in error_of(response)["message"]


async def test_an_answer_can_be_appended_to_the_conversation(address: str) -> None:
    text = 'Well.<tool_call>{"name": "now"}</tool_call>'
    tool = {"type": "function", "function": {"name": "now"}}
    tokenizer = tokenizer_with(TOOL_TEMPLATE)
    async with served(address, roomy(says(text)), tokenizer=tokenizer) as server:
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        for _ in range(2):
            answer = await server.chat(messages=messages, tools=[tool])
            assert answer.status_code == 200, answer.text
            messages.append(answer.json()["choices"][0]["message"])
            (call,) = messages[-1]["tool_calls"]
            assert call["function"] == {"name": "now", "arguments": "{}"}
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "12:00"})


CONTINUED = {
    "keeps": "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}",
    "strips": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>\n{% endfor %}",
}


@pytest.mark.parametrize("template", CONTINUED.values(), ids=CONTINUED.keys())
@pytest.mark.parametrize(
    "words", ["1, 2, 3, ", "|", "<|end|>", "x", "Count.", " a\n\n", "end", "  b", "é \t"]
)
async def test_a_final_message_goes_on_as_in_transformers(
    address: str, template: str, words: str
) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": words}]
    (expected,), _ = render_jinja_template(
        conversations=[messages], chat_template=template, continue_final_message=True
    )
    async with served(address, roomy(says("ok")), tokenizer=tokenizer_with(template)) as server:
        for generate in (False, None):
            await server.chat(
                messages=messages, continue_final_message=True, add_generation_prompt=generate
            )
        sent = [bytes(m.prompt_token_ids).decode() for m in server.core.all_of(AddRequest)]
    assert sent == [expected] * 2


async def test_a_final_message_without_text_cannot_go_on(address: str) -> None:
    hidden = tokenizer_with("{% for m in messages %}{{ m.role }}{% endfor %}")
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    async with served(address) as server:
        error = error_of(await server.chat(messages=empty, continue_final_message=True))
        assert error["param"] == "continue_final_message"
    async with served(address + "2", tokenizer=hidden) as server:
        error = error_of(await server.chat("a", continue_final_message=True))
        assert error["param"] == "continue_final_message"


async def test_a_chat_template_of_ones_own(address: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("<{{ messages[0].content }}>{# [TOOL_CALLS] tools #}")
    async with served(address, roomy(says("ok")), chat_template=str(file)) as server:
        await server.chat("hi")
        sent = (await message_of(server.core, AddRequest)).prompt_token_ids
        assert bytes(sent) == b"<hi>"
        assert server.serving.reply_format.template_knows_tools
    with pytest.raises(ValueError, match=r"chat_template: .* cannot be read"):
        read_template(str(tmp_path / "none.jinja"))
