"""Bodies that ask for too much: too many, too long, too deep, too odd, field by field.

`test_limits` sends them to a scripted core, `test_hostile_bodies` beside streams of a real one, and
`benchmarks/hostile.py` times what the streams notice of them. Each is answered with an error that
names the field, and begins nothing.
"""

import json
from typing import Any, NamedTuple


class Hostile(NamedTuple):
    """path and content of a POST, and what its answer must say."""

    name: str
    path: str
    content: bytes
    statuses: tuple[int, ...]
    param: str = ""


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def numbered(form: bytes, count: int) -> bytes:
    """Values or members, each with a number of its own."""
    return b",".join(form % number for number in range(count))


USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
MANY: list[tuple[str, dict[str, Any], str]] = [
    ("prompt", {"prompt": ["a"] * 2049}, "prompt"),
    ("prompts times n", {"prompt": ["a"] * 100, "n": 100}, "prompt"),
    ("a long prompt", {"prompt": "a" * (1 << 22) + "a"}, "prompt"),
    ("a prompt longer than any context", {"prompt": "a" * (1 << 22)}, "prompt"),
    ("token ids beyond the context", {"prompt": [1] * 100_000}, "prompt"),
    ("token ids beyond the vocabulary", {"prompt": [1 << 40]}, "prompt"),
    ("negative token ids", {"prompt": [-1]}, "prompt"),
    ("prompts of two kinds", {"prompt": [1, "a"]}, "prompt"),
    ("an empty prompt", {"prompt": ""}, "prompt"),
    ("no prompts", {"prompt": []}, "prompt"),
    ("n", {"n": 129}, "n"),
    ("no outputs", {"n": 0}, "n"),
    ("n beyond integers", {"n": 10**30}, "n"),
    ("max_tokens", {"max_tokens": -(10**9)}, "max_tokens"),
    ("temperature", {"temperature": -1}, "temperature"),
    ("top_p", {"top_p": 1e308}, "top_p"),
    ("top_k", {"top_k": -7}, "top_k"),
    ("logprobs", {"logprobs": 10**9}, "logprobs"),
    ("prompt_logprobs", {"prompt_logprobs": 10**9}, "prompt_logprobs"),
    ("stop", {"stop": ["a"] * 65}, "stop"),
    ("long stops", {"stop": ["a" * 4097]}, "stop"),
    ("an empty stop", {"stop": [""]}, "stop"),
    ("stop_token_ids", {"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ("allowed_token_ids", {"allowed_token_ids": [1] * 65_537}, "allowed_token_ids"),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("a bias of no token", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("bad_words", {"bad_words": ["a"] * 1025}, "bad_words"),
    ("a long bad word", {"bad_words": ["a" * 257]}, "bad_words"),
    ("bad words, one long", {"bad_words": ["\n" * 256, *map(str, range(1023))]}, "bad_words"),
    ("request_id", {"request_id": "x" * 129}, "request_id"),
    ("request_id with a newline", {"request_id": "x\n"}, "request_id"),
    ("request_id with controls", {"request_id": "x\x1b[2J"}, "request_id"),
    ("request_id beyond ASCII", {"request_id": "é"}, "request_id"),
    ("cache_salt", {"cache_salt": "x" * 257}, "cache_salt"),
    ("user", {"user": "x" * 257}, "user"),
    ("deadline_ms", {"deadline_ms": -1}, "deadline_ms"),
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
    ("no messages", {"messages": []}, "messages"),
    ("parts", {"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 1025}]}, "mess"),
    ("a part's type", {"messages": [{**USER, "content": [{"type": "x" * 300}]}]}, "messages"),
    ("long messages", {"messages": [{**USER, "content": "a" * 1_500_000}] * 3}, "messages"),
    ("names", {"messages": [{**USER, "name": "x" * 257}]}, "messages"),
    ("a role", {"messages": [{**USER, "role": "x" * 1000}]}, "messages"),
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
UNDECODED: list[tuple[str, bytes, int]] = [
    ("values", b'{"prompt": [' + b",".join([b"1"] * 1_100_000) + b"]}", 413),
    ("lists", b'{"prompt": [' + b",".join([b"[]"] * 140_000) + b"]}", 413),
    ("depth", b'{"prompt": "a", "logit_bias": ' + b'{"1":' * 140_000 + b"}" * 140_000 + b"}", 413),
    ("names", b'{"prompt": "a", "vllm_xargs": {' + numbered(b'"%07d":0', 140_000) + b"}}", 413),
    ("texts", b'{"prompt": "a", "vllm_xargs": [' + numbered(b'"%07d"', 140_000) + b"]}", 413),
    ("long numbers", b'{"prompt": "a", "vllm_xargs": [' + numbered(b"1%03999d", 1100) + b"]}", 413),
    ("exponents", b'{"prompt": "a", "vllm_xargs": [' + b",".join([b"9e304"] * 10_000) + b"]}", 413),
    ("half of an object", b'{"prompt": "a"', 400),
    ("no UTF-8", b'{"prompt": "\xff\xfe"}', 400),
    ("a lone surrogate", b'{"prompt": "\\ud800"}', 400),
    ("a number", b"1" * 100_000, 400),
    ("nothing", b"", 400),
]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def bodies() -> list[Hostile]:
    """All of them."""
    found = [
        Hostile(name, COMPLETIONS, json.dumps({"prompt": "a", **body}).encode(), (400, 404), param)
        for name, body, param in MANY
    ]
    found += [
        Hostile(name, CHAT, json.dumps({"messages": [USER], **body}).encode(), (400,), param)
        for name, body, param in CHATS
    ]
    found += [Hostile(name, COMPLETIONS, body, (status,)) for name, body, status in UNDECODED]
    long = json.dumps({"prompt": "a" * ((1 << 22) + 1)}).encode()
    found.append(Hostile("tokenizing", "/tokenize", long, (400,), "prompt"))
    ids = json.dumps({"tokens": [1] * ((1 << 18) + 1)}).encode()
    found.append(Hostile("detokenizing", "/detokenize", ids, (400,), "tokens"))
    return found
