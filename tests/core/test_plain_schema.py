"""Schemas that are compiled without a trial: none that can harm, and the worst of them do not."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.fuzz_grammars import POISONS, SLOW_POISONS, random_plain
from benchmarks.workloads import ASKS
from nanovllm.core import grammar_sandbox
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.plain_schema import MAX_ITEMS, MAX_LENGTH, MAX_NUMBER, is_plain
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
    "alternatives": {"anyOf": [{"anyOf": [{}, {}]}, {"anyOf": [{}, {"anyOf": [{}] * 40}]}]},
}


@pytest.fixture(scope="module")
def small() -> Iterator[GrammarSandbox]:
    """With a quarter of the stack and memory of the usual one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_sandbox, "STACK_BYTES", grammar_sandbox.STACK_BYTES // 4)
        patch.setattr(grammar_sandbox, "MEMORY_BYTES", grammar_sandbox.MEMORY_BYTES // 4)
        with GrammarSandbox(timeout_s=WAIT_S) as made:
            made.start(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
            made.warm_up()
            yield made


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_pass_with_much_to_spare(small: GrammarSandbox, name: str) -> None:
    wanted = StructuredOutputsParams(json=LARGEST[name])
    assert is_plain(wanted)
    small.try_out(wanted)


def test_random_ones_pass_with_much_to_spare(small: GrammarSandbox) -> None:
    rng = random.Random(0)
    for _ in range(100):
        small.try_out(StructuredOutputsParams(**random_plain(rng)))


@pytest.mark.parametrize("name", [*POISONS, *SLOW_POISONS])
def test_no_poison_is_plain(name: str) -> None:
    assert not is_plain(StructuredOutputsParams(**(POISONS | SLOW_POISONS)[name]))


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
        {"type": "object", "additionalProperties": {}},
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
    assert not is_plain(StructuredOutputsParams(json=schema))


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
