"""What models write, in all formats, cut into pieces in all ways."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from nanovllm.frontend.server.bodies import ChatBody
from nanovllm.frontend.server.reasoning import ThinkSplitter
from nanovllm.frontend.server.reply_format import ReplyFormat
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.server.tool_parsers.forced import NamedParser, RequiredParser
from nanovllm.frontend.server.tool_parsers.hermes import HermesParser
from nanovllm.frontend.server.tool_parsers.llama3 import Llama3Parser
from nanovllm.frontend.server.tool_parsers.mistral import MistralParser
from nanovllm.frontend.server.tool_parsers.pieces import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
    ToolParser,
)
from tests.frontend.server.served import tokenizer_with

NAMES = {"f", "get_weather"}
F = ("f", '{"x": 1}')
TRICKY = ("f", r'{"s": "}]</tool_call>\"{", "l": [1, {"a": []}]}')


def call(pair: tuple[str, str], key: str = "arguments") -> str:
    return f'{{"name": "{pair[0]}", "{key}": {pair[1]}}}'


WITHOUT_ARGUMENTS = [
    '{"name": "f"}',
    '{"name": "f", "arguments": null}',
    '{"parameters": null, "name": "f"}',
    '{"name": "f", "arguments": ""}',
    '{"name": "f", "arguments": "null"}',
    '{"name": "f", "arguments": {}}',
]
NOTHING = [("f", "{}")] * len(WITHOUT_ARGUMENTS)
BOTH = ("", [F, TRICKY])
Expected = tuple[str, list[tuple[str, str]]]
CASES: list[tuple[Callable[[], ToolParser], str, Expected]] = [
    (lambda: HermesParser(NAMES), text, expected)
    for text, expected in [
        *(
            (f"<tool_call>{bare}</tool_call><tool_call>{bare}", ("", [("f", "{}")] * 2))
            for bare in WITHOUT_ARGUMENTS
        ),
        (f"<tool_call>[{', '.join(WITHOUT_ARGUMENTS)}]</tool_call>", ("", NOTHING)),
        ('<tool_call>{"name": "f", oops</tool_call>', ("", [("f", "{}")])),
        ('<tool_call>{"name": "f"', ("", [("f", "{}")])),
        ('<tool_call>{"name": "f", "arguments": 7}', ("", [("f", "7")])),
        ("plain words", ("plain words", [])),
        (" plain words \n", (" plain words \n", [])),
        ("a < b and <tool> it", ("a < b and <tool> it", [])),
        (f"<tool_call>\n{call(F)}\n</tool_call>", ("", [F])),
        (f"So:\n\n<tool_call>{call(F)}</tool_call>\n", ("So:", [F])),
        (f"<tool_call>{call(F)}</tool_call>\n<tool_call>{call(TRICKY)}</tool_call>", BOTH),
        (f"<tool_call>{call(F)}</tool_call> Done.", ("Done.", [F])),
        (f"<tool_call>[{call(F)}, {call(TRICKY)}]</tool_call>", ("", [F, TRICKY])),
        (f"<tool_call>{call(F)}", ("", [F])),
        (f"<tool_call>{call(F)}<tool_call>{call(F)}</tool_call>", ("", [F, F])),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', ("", [F])),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', ("", [F])),
        ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
        ('<tool_call>{"name": "new", "arguments": {}}</tool_call>', ("", [("new", "{}")])),
        ("<tool_call>not JSON</tool_call>", ("<tool_call>not JSON</tool_call>", [])),
        ('<tool_call>{"x": 1}</tool_call>', ('<tool_call>{"x": 1}</tool_call>', [])),
        ('<tool_call>{"name": 1}', ('<tool_call>{"name": 1}', [])),
        ("<tool_call>", ("<tool_call>", [])),
        ("<tool_call>[{x}]</tool_call>", ("<tool_call>[{x}]</tool_call>", [])),
        ('<tool_call>{"na', ('<tool_call>{"na', [])),
        ('<tool_call>{"name": "f", "arguments": {"x"', ("", [("f", '{"x"')])),
    ]
]  # fmt: skip
CASES += [
    (lambda: Llama3Parser(NAMES), text, expected)
    for text, expected in [
        ("plain words", ("plain words", [])),
        (call(F, "parameters"), ("", [F])),
        ("\n\n" + call(F, "parameters"), ("", [F])),
        ("<|python_tag|>" + call(F, "parameters"), ("", [F])),
        (call(F, "parameters") + "; " + call(TRICKY, "parameters"), ("", [F, TRICKY])),
        ("; ".join(WITHOUT_ARGUMENTS), ("", NOTHING)),
        ('{"name": "f"', ("", [("f", "{}")])),
        (call(("nobody", "{}")), (call(("nobody", "{}")), [])),
        ('{"answer": 42}', ('{"answer": 42}', [])),
        ("{not JSON}", ("{not JSON}", [])),
        ("<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
        ("<|pyth", ("<|pyth", [])),
        ('{"name": "f", "para', ("", [("f", "")])),
        ("Use {braces}", ("Use {braces}", [])),
        ('{"na', ('{"na', [])),
    ]
]
CASES += [
    (lambda: MistralParser(NAMES), text, expected)
    for text, expected in [
        ("plain [TOOL] words", ("plain [TOOL] words", [])),
        (" plain words \n", (" plain words \n", [])),
        (f"[TOOL_CALLS] [{call(F)}]", ("", [F])),
        (f"[TOOL_CALLS][{call(F)}, {call(TRICKY)}]", ("", [F, TRICKY])),
        (f"Well. [TOOL_CALLS][{call(F)}]", ("Well.", [F])),
        ('[TOOL_CALLS]f[ARGS]{"x": 1}', ("", [F])),
        ('[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g{"y": 2}', ("", [F, ("g", '{"y": 2}')])),
        ('[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"x": 1}', ("", [F])),
        (f"[TOOL_CALLS][{', '.join(WITHOUT_ARGUMENTS)}]", ("", NOTHING)),
        ("[TOOL_CALLS]f", ("", NOTHING[:1])),
        ("[TOOL_CALLS][{x}] y", ("[TOOL_CALLS][{x}] y", [])),
        ("[TOOL_CALLS]f[ARGS]null[TOOL_CALLS]f[ARGS]{}", ("", NOTHING[:2])),
        ("Well. [TOOL_CALLS] f [TOOL_CALLS]f[CALL_ID]abc123def[ARGS]", ("Well.", NOTHING[:2])),
        ("[TOOL_CALLS]stranger", ("[TOOL_CALLS]stranger", [])),
        ("[TOOL_CALLS] nothing of the kind", ("[TOOL_CALLS] nothing of the kind", [])),
        ("[TOOL_CALLS][1, 2]", ("[TOOL_CALLS][1, 2]", [])),
        ("[TOOL_CALLS][{x: 1}] y", ("[TOOL_CALLS][{x: 1}] y", [])),
    ]
]  # fmt: skip
CASES += [
    (lambda: NamedParser("f"), '{"x": 1}', ("", [F])),
    (lambda: RequiredParser(NAMES), f"[{call(F, 'parameters')}, {call(F)}]", ("", [F, F])),
    (lambda: RequiredParser(NAMES), "no", ("", [])),
    (lambda: RequiredParser(NAMES), f"[{', '.join(WITHOUT_ARGUMENTS)}]", ("", NOTHING)),
]


def collected(pieces: list[Piece]) -> Expected:
    content, calls = "", []
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case CallBegin(name):
                calls.append((name, ""))
            case CallArguments(text):
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + text)
    return content, calls


def cuts(text: str, seed: int) -> list[str]:
    """Whole, character by character, or at random places."""
    if seed < 2:
        return [text] if seed == 0 else list(text)
    rng = random.Random(seed)
    places = sorted(rng.sample(range(1, len(text)), k=min(len(text) - 1, rng.randint(1, 6))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("make", "text", "expected"), CASES, ids=[case[1] for case in CASES])
def test_formats(make: Callable[[], ToolParser], text: str, expected: Expected) -> None:
    for seed in range(12):
        parser, pieces = make(), []
        for part in cuts(text, seed):
            pieces += parser.feed(part)
        pieces += parser.finish()
        assert collected(pieces) == expected, cuts(text, seed)
        assert all(isinstance(piece, CallBegin) or piece.text for piece in pieces), "an empty delta"


def random_json(rng: random.Random, depth: int = 3) -> Any:
    """With what could be taken for the end of something."""
    text = "".join(
        rng.choice(['"', "\\", "{", "}", "[", "]", ",", ":", " ", "a", "é"]) for _ in "abc"
    )
    kinds = [rng.randrange(-99, 99), 1.5e-7, True, False, None, text, ""]
    if depth and rng.random() < 0.5:
        values = [random_json(rng, depth - 1) for _ in range(rng.randrange(3))]
        return values if rng.random() < 0.5 else {f"{text}{i}": v for i, v in enumerate(values)}
    return rng.choice(kinds)


def spelled(rng: random.Random, value: Any) -> str:
    """As JSON, with blank space wherever it may stand."""

    def blank() -> str:
        return rng.choice(["", "", " ", "\n", "\t ", "\r\n  "])

    if isinstance(value, dict):
        pairs = [
            f"{blank()}{json.dumps(key)}{blank()}:{blank()}{spelled(rng, one)}{blank()}"
            for key, one in value.items()
        ]
        return "{" + (",".join(pairs) or blank()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(blank() + spelled(rng, one) + blank() for one in value)) + "]"
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def random_call(rng: random.Random) -> tuple[str, tuple[str, str]]:
    """A call with whatever else beside it and in any order, and what it comes to."""
    name = rng.choice(sorted(NAMES))
    arguments = {f"k{i}": random_json(rng) for i in range(rng.randrange(3))}
    raw = spelled(rng, arguments)
    kind = rng.randrange(4)
    given = {0: raw, 1: json.dumps(rng.choice(["", " "]) + raw), 2: "null", 3: ""}[kind]
    pairs = [('"name"', json.dumps(name))]
    pairs += [(rng.choice(['"arguments"', '"parameters"']), given)] if given else []
    for index in range(rng.randrange(3)):
        pairs.append((json.dumps(f"other{index}"), spelled(rng, random_json(rng))))
    rng.shuffle(pairs)
    text = "{" + ",".join(f" {key} : {value} " for key, value in pairs) + "}"
    return text, (name, raw if kind < 2 else "{}")


WRITTEN: list[tuple[Callable[[], ToolParser], str, str, str]] = [
    (lambda: HermesParser(NAMES), "<tool_call>", "</tool_call>\n<tool_call>", "</tool_call>"),
    (lambda: HermesParser(NAMES), "<tool_call>\n", "<tool_call>\n", ""),
    (lambda: HermesParser(NAMES), "<tool_call>[", " , ", "]</tool_call>"),
    (lambda: Llama3Parser(NAMES), "", ";", ""),
    (lambda: Llama3Parser(NAMES), "<|python_tag|>", " ; ", ""),
    (lambda: MistralParser(NAMES), "[TOOL_CALLS] [", ",\n", "]"),
    (lambda: RequiredParser(NAMES), "[", ",", "]"),
]


@pytest.mark.parametrize(("make", "start", "between", "end"), WRITTEN)
def test_calls_are_read_whatever_stands_beside_and_in_them(
    make: Callable[[], ToolParser], start: str, between: str, end: str
) -> None:
    rng = random.Random(f"{start}{between}")
    for number in range(60):
        calls = [random_call(rng) for _ in range(rng.randrange(1, 4))]
        text = start + between.join(one for one, _ in calls) + end
        parser, pieces = make(), []
        for part in cuts(text, number):
            pieces += parser.feed(part)
        content, found = collected(pieces + parser.finish())
        assert (content, found) == ("", [expected for _, expected in calls]), text


@pytest.mark.parametrize(("make", "start", "between", "end"), WRITTEN)
def test_what_is_damaged_comes_to_the_same_however_it_is_cut(
    make: Callable[[], ToolParser], start: str, between: str, end: str
) -> None:
    rng = random.Random(f"{start}{between}")
    for number in range(60):
        text = start + between.join(random_call(rng)[0] for _ in range(2)) + end + " words"
        at = rng.randrange(len(text))
        damaged = text[:at] + rng.choice(["", "x", '"', "}", "]", ",", " "]) + text[at + 1 :]
        found = []
        for seed in (0, 1, number + 2):
            parser = make()
            pieces = [piece for part in cuts(damaged, seed) for piece in parser.feed(part)]
            found.append(collected(pieces + parser.finish()))
        assert found[0] == found[1] == found[2], damaged


def test_arguments_come_while_they_are_written() -> None:
    parser = HermesParser(NAMES)
    assert parser.feed('<tool_call>{"name": "f"') == [CallBegin("f")]
    assert parser.feed(', "arguments": {"ci') == [CallArguments('{"ci')]
    assert parser.feed('ty": "U') == [CallArguments('ty": "U')]


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("<think>\nHm.\nWell.\n</think>\n\nYes. ", False, "Hm.\nWell.", "Yes. "),
        ("\n<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("Just words </think>", False, "", "Just words </think>"),
        ("<thin", False, "", "<thin"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        (" leading blank", False, "", " leading blank"),
    ],
)
def test_reasoning(text: str, inside: bool, reasoning: str, content: str) -> None:
    for seed in range(12):
        splitter = ThinkSplitter(inside=inside)
        pieces = [piece for part in cuts(text, seed) for piece in splitter.feed(part)]
        pieces += splitter.finish()
        assert "".join(p.text for p in pieces if isinstance(p, Reasoning)) == reasoning
        assert "".join(p.text for p in pieces if isinstance(p, Content)) == content


@pytest.mark.parametrize(
    ("template", "settings", "tools", "reasons"),
    [
        ("{{ tools }} <tool_call> <think></think>", {}, "hermes", True),
        ("{{ tools }} [TOOL_CALLS]", {}, "mistral", False),
        ("{{ tools }} <|python_tag|>", {}, "llama3", False),
        ("{{ tools }} in some other way", {}, None, False),
        ("no word of it", {}, "hermes", False),
        ("{{ tools }} <tool_call></think>", {"tool_call_parser": "none"}, None, True),
        ("", {"tool_call_parser": "mistral", "reasoning_parser": "think"}, "mistral", True),
        ("</think>", {"reasoning_parser": "none"}, "hermes", False),
    ],
)
def test_the_template_tells_the_format(
    template: str, settings: dict[str, Any], tools: str | None, reasons: bool
) -> None:
    form = ReplyFormat.of(tokenizer_with(template), ServerSettings(**settings))
    module = None if form.tools is None else form.tools.make_parser(NAMES).__class__.__module__
    assert (module or "").endswith(tools or "") and (module is None) == (tools is None)
    assert form.has_reasoning == reasons
    assert len(form.new_call_id()) == (9 if tools == "mistral" else 29)


@pytest.mark.parametrize(
    ("parser", "prompt", "thinks"),
    [
        ("deepseek_r1", "hi", True),
        ("deepseek_r1", "hi</think>\n", False),
        ("think", "hi", False),
        ("think", "hi<think>\n", True),
        ("none", "hi<think>", False),
    ],
)
def test_whether_an_answer_begins_with_thoughts(parser: str, prompt: str, thinks: bool) -> None:
    form = ReplyFormat.of(None, ServerSettings(reasoning_parser=parser))  # type: ignore[arg-type]
    assert form.thinks_first(prompt) is thinks


FORCED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("reasons", "tool_choice", "thinks_first", "has_reasoning", "has_calls"),
    [
        (False, None, False, False, False),
        (True, None, False, True, False),
        (False, "auto", False, False, True),
        (True, "auto", False, True, True),
        (True, "none", False, True, False),
        (False, FORCED, False, False, True),
        (True, FORCED, False, False, True),  # it is JSON from its first character on
        (True, FORCED, True, True, True),
    ],
)
def test_what_an_answer_is_parsed_for(
    reasons: bool, tool_choice: Any, thinks_first: bool, has_reasoning: bool, has_calls: bool
) -> None:
    mode = "deepseek_r1" if reasons else "none"
    form = ReplyFormat.of(None, ServerSettings(reasoning_parser=mode, tool_call_parser="hermes"))
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if tool_choice else {}
    messages = [{"role": "user", "content": "x"}]
    body = msgspec.convert({"messages": messages, "tool_choice": tool_choice, **tools}, ChatBody)
    parser = form.make_parser(body, thinks_first=thinks_first)
    assert (parser is None) == (not has_reasoning and not has_calls)
    if parser is not None:
        assert (parser._splitter is not None, parser._tools is not None) == (
            has_reasoning,
            has_calls,
        )
