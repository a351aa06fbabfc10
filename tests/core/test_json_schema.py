"""Which objects are closed, which stay open, and what else of a schema is read kindly."""

import json
from typing import Any

import pytest

from nanovllm.core.json_schema import prepare
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.test_grammar import compile_, fits

INTEGER = {"type": "integer"}


def listing(*names: str, **more: Any) -> dict[str, Any]:
    """An object of these optional integers."""
    return {"type": "object", "properties": {name: INTEGER for name in names}, **more}


def check(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert fits(compile_(json=schema), json.dumps(value)), f"{value} must fit {schema}"
    for value in bad:
        assert not fits(compile_(json=schema), json.dumps(value)), f"{value} must not fit {schema}"


@pytest.mark.parametrize(
    "schema",
    [
        listing("a"),
        listing("a", description="alone"),
        {"allOf": [listing("a")], "default": {}},  # pydantic's way to describe a reference
        {"$ref": "#/$defs/A", "$defs": {"A": listing("a")}},
        {"anyOf": [listing("a"), {"type": "null"}]},
        {"oneOf": [listing("a"), INTEGER]},
        {"patternProperties": {"^a$": INTEGER}, "type": "object"},
        {"properties": {"a": INTEGER}, "type": "object", "minProperties": 1},
    ],
)
def test_an_object_that_lists_properties_takes_no_others(schema: dict[str, Any]) -> None:
    check(schema, [{"a": 1}], [{"a": 1, "z": 2}, {"z": 2}])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {},
        {"type": "object", "additionalProperties": True},
        listing("a", additionalProperties=True),
        listing("a", additionalProperties=INTEGER),
        {"allOf": [listing("a"), listing("b", additionalProperties=True)]},
        {"type": "object", "additionalProperties": INTEGER},
    ],
)
def test_an_object_that_says_so_or_lists_nothing_is_open(schema: dict[str, Any]) -> None:
    check(schema, [{"z": 2}, {"z": 1, "y": 2}], [])


def test_objects_within_objects_are_closed() -> None:
    check(
        {
            "type": "object",
            "properties": {
                "one": listing("a"),
                "many": {"type": "array", "items": listing("b")},
                "pair": {"type": "array", "prefixItems": [listing("c")], "items": False},
                "rest": {"type": "object", "additionalProperties": listing("d")},
            },
        },
        [{"one": {"a": 1}, "many": [{"b": 1}], "pair": [{"c": 1}], "rest": {"x": {"d": 1}}}],
        [
            {"one": {"z": 1}},
            {"many": [{"z": 1}]},
            {"pair": [{"z": 1}]},
            {"rest": {"x": {"z": 1}}},
        ],
    )


A_AND_B: list[Any] = [{"a": 1}, {"b": 1}, {}]
NO_OTHERS: list[Any] = [{"a": 1, "b": 2, "z": 3}, {"z": 3}]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [listing("a"), listing("b")]},
        listing("a", allOf=[listing("b")]),
        {"allOf": [{"$ref": "#/$defs/A"}, listing("b")], "$defs": {"A": listing("a")}},
        listing("b", **{"$ref": "#/$defs/A", "$defs": {"A": listing("a")}}),
        {
            "allOf": [{"$ref": "#/$defs/B"}, {"$ref": "#/$defs/A"}],
            "$defs": {"A": {"allOf": [listing("a")]}, "B": listing("b")},
        },
        listing("a", anyOf=[listing("b"), {"required": ["a"]}, {}]),
    ],
)
def test_one_object_of_several_parts_is_closed_as_a_whole(schema: dict[str, Any]) -> None:
    check(schema, A_AND_B, NO_OTHERS)
    both = [fits(compile_(json=schema), text) for text in ('{"a": 1, "b": 2}', '{"b": 1, "a": 2}')]
    assert any(both), "properties come in the schema's order"


def test_what_is_required_and_excluded_by_a_part_stays_so() -> None:
    check(
        {"allOf": [listing("a", required=["a"]), listing("b", required=["b"])]},
        [{"a": 1, "b": 2}],
        [{"a": 1}, {"a": 1, "b": 2, "z": 1}],
    )


def test_an_object_that_refers_to_itself_is_closed() -> None:
    tree = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": INTEGER, "l": {"$ref": "#/$defs/tree"}},
                "required": ["v"],
            }
        },
    }
    check(tree, [{"v": 1, "l": {"v": 2}}], [{"v": 1, "z": 1}, {"v": 1, "l": {"v": 2, "z": 1}}])


def test_names_that_look_like_keywords_are_names() -> None:
    schema = listing("properties", "format", "$ref", "allOf")
    assert prepare(json.dumps(schema))["properties"] == schema["properties"]
    literal = {"const": {"properties": {"format": "x"}}}
    assert prepare(json.dumps(literal)) == literal
    check(schema, [{"properties": 1, "format": 2}], [{"z": 1}])


@pytest.mark.parametrize(
    "odd",
    [
        {"properties": 3},
        {"allOf": {"a": 1}},
        {"allOf": [3, True]},
        {"$ref": 7},
        {"$ref": "#/a/b/9", "allOf": [{"$ref": "http://x"}, {"$ref": "#/allOf/7"}]},
        {"items": [True, {"properties": None}]},
        {"format": 3},
    ],
)
def test_what_is_no_schema_passes_as_it_is(odd: dict[str, Any]) -> None:
    """llguidance says what is wrong with it."""
    assert isinstance(prepare(json.dumps(odd)), dict)


@pytest.mark.parametrize("name", ["int32", "password", "iri", "x-odd"])
def test_an_unknown_format_is_an_annotation(name: str) -> None:
    check({"type": "string", "format": name}, ["anything", ""], [3])
    check(
        listing("a") | {"properties": {"a": {"type": "string", "format": name}}}, [{"a": "b"}], []
    )


def test_a_known_format_still_counts() -> None:
    check({"type": "string", "format": "date"}, ["2024-02-28"], ["today"])


def test_alternatives_of_one_of_may_overlap() -> None:
    check({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["x"])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
        {"if": {}, "then": {}},
        {"contains": INTEGER, "type": "array"},
        {"propertyNames": {"pattern": "^a"}},
        {"dependentRequired": {"a": ["b"]}},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(schema: dict[str, Any]) -> None:
    (keyword, *_) = [key for key in schema if key not in ("type", "then")]
    with pytest.raises(ValueError, match=rf"structured_outputs\.json cannot be used: .*{keyword}"):
        compile_(json=schema)


def test_thousands_of_choices() -> None:
    texts = [f"{index * 7919 % 100_003:x}!" for index in range(5000)]
    matcher = compile_(choice=texts)
    assert all(fits(matcher.copy(), text) for text in texts[::500])
    assert not fits(matcher.copy(), "0x!") and not fits(matcher.copy(), texts[0][:-1])
    assert fits(compile_(choice=["ab", "abc", "a b"]), "ab")
    with pytest.raises(ValueError, match=r"structured_outputs\.choice holds 100001 texts"):
        StructuredOutputsParams(choice=["a"] * 100_001)
