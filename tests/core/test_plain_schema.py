"""Schemas that are compiled without a trial: none that can harm, and the worst of them do not."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.fuzz_grammars import POISONS, SLOW_POISONS, chain, random_plain
from benchmarks.workloads import ASKS
from nanovllm.core import grammar_sandbox
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.plain_schema import (
    COUNTS,
    MAX_CHARS,
    MAX_ITEMS,
    MAX_LENGTH,
    MAX_NUMBER,
    MAX_VALUES,
    plain_source,
)
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import VOCAB_SIZE
from tests.core.vocabulary import make_compiler, tokenizer_json
from tests.waiting import WAIT_S

TEXT = {"type": "string", "minLength": MAX_LENGTH, "maxLength": MAX_LENGTH}
WHOLE = {"type": "integer", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER - 1}
REAL = {**WHOLE, "type": "number"}
MANY = {"type": "array", "minItems": MAX_ITEMS, "maxItems": MAX_ITEMS}


def nested(innermost: dict[str, Any], depth: int) -> dict[str, Any]:
    return {**MANY, "items": nested(innermost, depth - 1)} if depth else innermost


def members(value: Any, count: int = 60) -> dict[str, Any]:
    return {f"p{index}": value for index in range(count)}


LARGEST: dict[str, dict[str, Any]] = {
    "arrays in arrays": nested({**MANY, "maxItems": MAX_ITEMS - 1, "minItems": 1}, 7),
    "ranges in arrays": nested(REAL, 7),
    "optional members": {"type": "object", "properties": members({})},
    "long texts": {"properties": members({"type": "string", "maxLength": MAX_LENGTH}, 40)},
    "least lengths": {"properties": members(TEXT, 40), "required": [*members(0, 40)]},
    "whole numbers": {"anyOf": [WHOLE, *({**WHOLE, "maximum": 5 - i} for i in range(60))]},
    "numbers": {"anyOf": [REAL, *({**REAL, "maximum": 77 * i} for i in range(60))]},
    "values": {"enum": ["a" * (index % 7) + chr(0x1F600 + index) * 9 for index in range(60)]},
    "texts that overlap": {"anyOf": [{"type": "string", "maxLength": i * 60} for i in range(63)]},
    "references": {
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5)} | {"d5": REAL},
        "properties": members({"$ref": "#/$defs/d0"}, 8),
    },
    "references to alternatives": {
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}] * 4}, "b": {"anyOf": [TEXT, WHOLE]}},
        "anyOf": [{"$ref": "#/$defs/a"}] * 3,
    },
    "definitions that nothing refers to": {
        "$defs": chain("allOf", 60)["json"]["$defs"],
        "default": {"allOf": [{"not": {}}] * 40},
    },
    "maps": {"additionalProperties": {"additionalProperties": {"additionalProperties": REAL}}},
    "alternatives": {"anyOf": [{"anyOf": [{}, {}]}, {"anyOf": [{}, {"anyOf": [{}] * 40}]}]},
}


@pytest.fixture(scope="module")
def small() -> Iterator[GrammarSandbox]:
    """With a quarter of the stack and memory of the usual one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_sandbox, "STACK_BYTES", grammar_sandbox.STACK_BYTES // 4)
        patch.setattr(grammar_sandbox, "MEMORY_BYTES", grammar_sandbox.MEMORY_BYTES // 4)
        with GrammarSandbox(timeout_s=WAIT_S) as made:
            made.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
            yield made


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_pass_with_much_to_spare(small: GrammarSandbox, name: str) -> None:
    wanted = StructuredOutputsParams(json=LARGEST[name])
    assert plain_source(wanted) is not None
    small.try_out(wanted)


@pytest.mark.parametrize(
    "texts",
    [
        ["a" * (index + 1) for index in range(MAX_VALUES)],
        ["a" * 1000 + letter + "b" * 20 for letter in "cdef"],
        [chr(0x1F600 + index) * 30 + '"\\\n' for index in range(MAX_VALUES)],
    ],
    ids=["one in another", "long", "odd"],
)
def test_the_largest_choices_pass_with_much_to_spare(
    small: GrammarSandbox, texts: list[str]
) -> None:
    assert plain_source(StructuredOutputsParams(choice=texts)) is not None
    small.try_out(StructuredOutputsParams(choice=texts))
    for too_much in (["a" * 5000], list(map(str, range(MAX_VALUES + 1)))):
        assert plain_source(StructuredOutputsParams(choice=too_much)) is None


def test_random_ones_pass_with_much_to_spare(small: GrammarSandbox) -> None:
    rng = random.Random(0)
    for _ in range(100):
        small.try_out(StructuredOutputsParams(**random_plain(rng)))


@pytest.mark.parametrize("name", [*POISONS, *SLOW_POISONS])
def test_no_poison_is_plain(name: str) -> None:
    assert not plain_source(StructuredOutputsParams(**(POISONS | SLOW_POISONS)[name]))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "string", "pattern": "a"},
        {"type": "string", "format": "uri"},
        {"type": "integer", "multipleOf": 3},
        {"type": "number", "minimum": 0.1},
        {"type": "integer", "maximum": MAX_NUMBER + 1},
        {"type": "integer", "maximum": True},
        {"type": "string", "maxLength": MAX_LENGTH + 1},
        {"type": "array", "maxItems": MAX_ITEMS + 1},
        {"type": ["object", "array"]},
        {"type": "object", "properties": [{}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
        {"$ref": "#/$defs/a"},
        {"$ref": "https://example.org/schema"},
        {"$ref": 3},
        {"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}},
        {"properties": members({"$ref": "#/$defs/a"}, 22), "$defs": {"a": {"items": {}}}},
        {"type": "object", "patternProperties": {"a": {}}},
        {"type": "object", "properties": {"a": {"properties": {"b": {"pattern": "a"}}}}},
        {"type": "object", "properties": members({}, 64)},
        {"allOf": [{}]},
        {"anyOf": [{}], "type": "string"},
        {"anyOf": [[]]},
        {"enum": [1.5]},
        {"const": []},
        {"x-guidance": {}},
        nested({}, 8),
        {"title": "t" * 4096},
    ],
)
def test_what_may_need_more_is_not_plain(schema: dict[str, Any]) -> None:
    assert not plain_source(StructuredOutputsParams(json=schema))


def titled(num_chars: int) -> dict[str, Any]:
    """A schema whose text has so many."""
    schema = {"title": ""}
    schema["title"] = "t" * (num_chars - len(str(StructuredOutputsParams(json=schema).json)))
    return schema


@pytest.mark.parametrize(
    ("largest", "larger"),
    [
        ({"json": titled(MAX_CHARS)}, {"json": titled(MAX_CHARS + 1)}),
        ({"json": nested({}, 7)}, {"json": nested({}, 8)}),
        (
            {"json": {"type": "object", "properties": members({}, MAX_VALUES - 1)}},
            {"json": {"type": "object", "properties": members({}, MAX_VALUES)}},
        ),
        (
            {"json": {"enum": list(range(MAX_VALUES - 1))}},
            {"json": {"enum": list(range(MAX_VALUES))}},
        ),
        ({"choice": ["a" * MAX_CHARS]}, {"choice": ["a" * MAX_CHARS + "b"]}),
        (
            {"choice": [*map(str, range(MAX_VALUES))]},
            {"choice": [*map(str, range(MAX_VALUES + 1))]},
        ),
        *(
            ({"json": {keyword: most}}, {"json": {keyword: most + 1}})
            for keyword, most in COUNTS.items()
        ),
        ({"json": {"minimum": -MAX_NUMBER}}, {"json": {"minimum": -MAX_NUMBER - 1}}),
    ],
)
def test_a_limit_is_the_last_that_is_plain(largest: dict[str, Any], larger: dict[str, Any]) -> None:
    assert plain_source(StructuredOutputsParams(**largest)) is not None
    assert plain_source(StructuredOutputsParams(**larger)) is None


def test_who_needs_no_trial_is_compiled_at_once(
    small: GrammarSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(small, "try_out", lambda wanted: tried.append(wanted.kind))
    compiler = make_compiler(small)
    asked = StructuredOutputsParams(**ASKS["schema"])
    for wanted in (asked, StructuredOutputsParams(json_object=True)):
        compiler.compile(wanted)
    assert not tried
    with pytest.raises(ValueError, match=r"structured_outputs\.json cannot be used"):
        compiler.compile(StructuredOutputsParams(json={"type": "string", "minLength": -3}))
    # Alternatives that only their content tells apart may be many at once.
    two = {"anyOf": [{"properties": members({}, 2)}, {"properties": members({}, 3)}]}
    compiler.compile(StructuredOutputsParams(json=two))
    compiler.compile(StructuredOutputsParams(regex="a+"))
    assert tried == ["json", "regex"]
