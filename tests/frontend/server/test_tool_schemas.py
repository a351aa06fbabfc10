"""Schemas that refer to themselves, put into another one: they accept what they accepted alone."""

from typing import Any

import jsonschema
import msgspec
import pytest

from nanovllm.core.grammar import GrammarCompiler
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import ChatBody
from nanovllm.frontend.server.sampling import constraint_of
from nanovllm.frontend.server.tool_schemas import nested
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.vocabulary import make_compiler

COMPILER: GrammarCompiler = make_compiler()
TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
CASES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    # schema, what it accepts, what it does not
    (
        {"$defs": {"C": {"enum": ["a", "b"]}}, "properties": {"c": {"$ref": "#/$defs/C"}}},
        [{"c": "a"}],
        [{"c": "z"}],
    ),
    (
        {"definitions": {"C": {"type": "null"}}, "properties": {"c": {"$ref": "#/definitions/C"}}},
        [{"c": None}],
        [{"c": 1}],
    ),
    ({**TREE, "additionalProperties": False}, [{"kids": [{"kids": []}]}], [{"kids": [{"x": 1}]}]),
    (
        {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}},
        [{"b": 1}],
        [{"b": "x"}],
    ),
    (  # escapes, of pointers and of URIs
        {
            "$defs": {"a/b": {"type": "null"}, "c~d": {"type": "null"}, "e f": {"type": "null"}},
            "properties": {
                "x": {"$ref": "#/$defs/a~1b"},
                "y": {"$ref": "#/$defs/c~0d"},
                "z": {"$ref": "#/$defs/e%20f"},
            },
        },
        [{"x": None, "y": None, "z": None}],
        [{"x": 1}, {"y": 1}, {"z": 1}],
    ),
    (  # names that look like keywords are names …
        {
            "properties": {
                "$ref": {"type": "string"},
                "properties": {"$ref": "#/$defs/enum"},
                "$id": {"type": "null"},
            },
            "$defs": {"enum": {"type": "integer"}},
        },
        [{"$ref": "#/x", "properties": 1, "$id": None}],
        [{"$ref": 1}, {"properties": "x"}, {"$id": "x"}],
    ),
    (  # … and data that looks like a reference is data
        {"properties": {"v": {"enum": [{"$ref": "#/a"}]}, "w": {"const": {"$ref": "#"}}}},
        [{"v": {"$ref": "#/a"}, "w": {"$ref": "#"}}],
        [{"v": {"$ref": "#/$defs/0/a"}}],
    ),
    (
        {
            "$defs": {"n": {"$anchor": "num", "type": "integer"}},
            "properties": {"a": {"$ref": "#num"}},
        },
        [{"a": 1}],
        [{"a": "x"}],
    ),
    (
        {
            "$id": "https://example.com/tool",
            "$defs": {"n": {"$id": "number", "type": "integer"}, "m": {"type": "null"}},
            "properties": {
                "a": {"$ref": "number"},
                "b": {"$ref": "https://example.com/number"},
                "c": {"$ref": "tool#/$defs/m"},
                "d": {"$ref": "#/$defs/n"},
            },
        },
        [{"a": 1, "b": 2, "c": None, "d": 3}],
        [{"a": "x"}, {"b": "x"}, {"c": 1}, {"d": "x"}],
    ),
    (  # a part with an address of its own: "#" within is that part
        {
            "$defs": {
                "list": {
                    "$id": "urn:list",
                    "type": "object",
                    "properties": {"next": {"$ref": "#"}, "v": {"$ref": "#/$defs/v"}},
                    "$defs": {"v": {"type": "integer"}},
                    "additionalProperties": False,
                }
            },
            "properties": {"head": {"$ref": "urn:list"}},
        },
        [{"head": {"next": {"v": 1}}}],
        [{"head": {"next": {"v": "x"}}}, {"head": {"head": {}}}],
    ),
    (  # where no schema is expected, but a reference leads
        {
            "components": {
                "schemas": {
                    "X": {"type": "array", "items": {"$ref": "#/components/schemas/Y"}},
                    "Y": {"type": "integer"},
                }
            },
            "properties": {"x": {"$ref": "#/components/schemas/X"}},
        },
        [{"x": [1]}],
        [{"x": ["a"]}],
    ),
]


def at(pointer: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that consists of a reference to `schema`, at `pointer`."""
    return {"$defs": {pointer.rpartition("/")[2]: nested(schema, pointer)}, "$ref": pointer}


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_nested_schemas_mean_what_they_meant(
    schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    before = msgspec.json.encode(schema)
    inner = at("#/$defs/inner", at("#/$defs/tool", schema))
    assert msgspec.json.encode(schema) == before
    for one in (schema, inner):
        validator = jsonschema.Draft202012Validator(one)
        assert all(validator.is_valid(value) for value in good)
        assert not any(validator.is_valid(value) for value in bad)


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_two_tools_have_namespaces_of_their_own(
    schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    other = {"$defs": {"C": {"const": 0}}, "properties": {"c": {"$ref": "#/$defs/C"}}}
    body = msgspec.convert(
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": parameters}}
                for name, parameters in (("other", other), ("tool", schema))
            ],
            "tool_choice": "required",
        },
        ChatBody,
    )
    constraint = constraint_of(body)
    assert constraint is not None and isinstance(constraint.params.json, str)
    validator = jsonschema.Draft202012Validator(msgspec.json.decode(constraint.params.json))
    for value, fits in [*((v, True) for v in good), *((v, False) for v in bad)]:
        assert validator.is_valid([{"name": "tool", "parameters": value}]) == fits
    assert validator.is_valid([{"name": "other", "parameters": {"c": 0}}])
    assert not validator.is_valid([{"name": "other", "parameters": {"c": "a"}}])
    COMPILER.compile(constraint.params)


def test_what_refers_to_nothing_is_refused_by_the_compiler() -> None:
    for reference in ("#/$defs/nix", "#nix", "https://example.com/nix"):
        schema = at("#/$defs/tool", {"properties": {"a": {"$ref": reference}}})
        with pytest.raises(ValueError, match="structured_outputs"):
            COMPILER.compile(StructuredOutputsParams(json=schema))


@pytest.mark.parametrize(
    ("parameters", "choice", "parallel", "fits", "fits_not"),
    [
        ({"properties": {"a": {"const": 1}}}, "required", None, [[{"a": 1}] * 2], [["a"], [3]]),
        ({"properties": {"a": {"const": 1}}}, "required", False, [[{"a": 1}]], [[{"a": 1}] * 2]),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}, "required", None, [[{}]], [[]]),
        ({"anyOf": [{"type": "object"}]}, "required", True, [[{}]], [["a"]]),
    ],
)
def test_what_required_tools_allow(
    parameters: dict[str, Any], choice: str, parallel: bool | None, fits: list[Any], fits_not: Any
) -> None:
    """Arguments are an object though the schema does not say so, and calls may be parallel."""
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
    }
    constraint = constraint_of(msgspec.convert(fields, ChatBody))
    assert constraint is not None and isinstance(constraint.params.json, str)
    validator = jsonschema.Draft202012Validator(msgspec.json.decode(constraint.params.json))
    for calls, is_valid in [*((one, True) for one in fits), *((one, False) for one in fits_not)]:
        made = [{"name": "f", "parameters": arguments} for arguments in calls]
        assert validator.is_valid(made) == is_valid


def test_one_thing_at_a_time_can_be_asked_of_an_output() -> None:
    """And the second one is named, whatever comes third."""
    tool = {"type": "function", "function": {"name": "f"}}
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "x"}],
        "structured_outputs": {"regex": "a"},
        "response_format": {"type": "json_object"},
        "tools": [tool],
        "tool_choice": "required",
    }
    for without, complaint in (
        ("", "response_format: cannot be combined with structured_outputs"),
        ("structured_outputs", "tool_choice: cannot be combined with response_format"),
        ("response_format", "tool_choice: cannot be combined with structured_outputs"),
    ):
        asked = {name: value for name, value in fields.items() if name != without}
        with pytest.raises(ApiError, match=complaint):
            constraint_of(msgspec.convert(asked, ChatBody))
