"""JSON schemas of which few things count: what `json_place` must know of them to follow an output.

These are the path to a value, how many items or characters there have been, and how what has just
begun is spelled. `shape_of` reads a schema that `json_schema` has prepared. One that says more has
no shape: `allOf`, properties by pattern, objects or arrays that only their content tells apart.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanovllm.core.grammar_source import Source
from nanovllm.core.json_schema import resolve

# Not said of outputs, or only where something refers to it.
ASIDE = frozenset(
    ("title", "description", "default", "examples", "$schema", "$comment", "$defs", "definitions")
)
# All that is understood here. Of numbers, formats and patterns nothing need be: spelling counts.
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
STRINGS = ("minLength", "maxLength", "pattern", "format")
CONTAINERS = ("properties", "required", "additionalProperties", "items", "prefixItems")
KNOWN = frozenset(
    ("type", "enum", "const", "minItems", "maxItems", *NUMBERS, *STRINGS, *CONTAINERS)
)
MAX_CHARS = 16_384  # of its grammar: what it refers to often is looked through as often
Bounds = tuple[int, int | None]  # least and most of something
FREE: Bounds = (0, None)
BY_SPELLING: Bounds = (-1, None)  # of a string: more counts than its length


class _NoShapeError(Exception):
    """The schema says something that is not understood here."""


@dataclass(slots=True, eq=False)
class Members:
    """Of an object. names: as spelled → which; None: any are allowed, all with the one value."""

    names: dict[bytes, int] | None
    values: "list[Value]"

    def value(self, index: int) -> "Value":
        return self.values[index]


@dataclass(slots=True, eq=False)
class Items:
    """Of an array: those at its begin, all others (None: there are none), and how many."""

    first: "list[Value]"
    others: "Value | None"
    bounds: Bounds

    def value(self, index: int) -> "Value | None":
        return self.first[index] if index < len(self.first) else self.others

    def far(self, index: int) -> int:
        """The same, or one behind which all are alike."""
        least, most = self.bounds
        return index if most is not None else min(index, max(least, len(self.first)))


@dataclass(slots=True, eq=False)
class Value:
    """What may stand in one place; of numbers, true, false and null nothing is said here."""

    members: Members | None = None
    items: Items | None = None
    string: Bounds | None = None  # of its characters; None: it is no string
    choices: "list[Value]" = field(default_factory=list)  # it is one of these


def shape_of(source: Source) -> Value | None:
    """What a schema allows that llguidance has compiled; None if it has no shape."""
    if len(source.grammar) > MAX_CHARS:
        return None
    reader = _Reader(source.schema)
    try:
        root = reader.at("#")
        for value in reader.unions:
            _settle(value)
    except (_NoShapeError, RecursionError, ValueError, TypeError, AttributeError):
        return None  # some are no schemas where nothing refers to them
    return root


class _Reader:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[str, Value] = {}  # by `$ref`
        self.unions: list[Value] = []

    def at(self, pointer: str) -> Value:
        if pointer not in self._known:
            value = self._known[pointer] = Value()  # first, since it may refer to itself
            self._read(resolve(self._root, pointer), value)
        return self._known[pointer]

    def _new(self, schema: Any) -> Value:
        value = Value()
        self._read(schema, value)
        return value

    def _read(self, schema: Any, value: Value) -> None:
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise _NoShapeError
        said = {key: schema[key] for key in schema.keys() - ASIDE}
        if len(said) == 1 and said.keys() <= {"$ref", "anyOf", "oneOf", "allOf"}:
            ((key, target),) = said.items()
            if key == "allOf" and len(target) > 1:
                raise _NoShapeError
            value.choices = [self.at(target)] if key == "$ref" else [*map(self._new, target)]
            self.unions.append(value)
            return
        if not said.keys() <= KNOWN:
            raise _NoShapeError
        if "enum" in said or "const" in said:
            given = [*said.get("enum", ()), said.get("const")]
            if any(isinstance(one, list | dict) for one in given):
                raise _NoShapeError
            value.string = BY_SPELLING
            return
        kinds = said.get("type", ("object", "array", "string"))
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        value.members = self._members(said) if "object" in kinds else None
        value.items = self._items(said) if "array" in kinds else None
        if "string" in kinds:
            by_length = not said.keys() & {"pattern", "format"}
            value.string = _bounds(said, "Length") if by_length else BY_SPELLING

    def _members(self, said: dict[str, Any]) -> Members:
        properties, others = said.get("properties", {}), said.get("additionalProperties", True)
        if not set(said.get("required", ())) <= properties.keys():
            raise _NoShapeError
        if others is not False and not properties:
            return Members(None, [self._new(others)] if others is not True else [self.at_all()])
        if others is not False:
            raise _NoShapeError  # which names are free depends on how they are spelled
        spelled = (json.dumps(name, ensure_ascii=False)[1:-1].encode() for name in properties)
        names = {name: index for index, name in enumerate(spelled)}
        return Members(names, [*map(self._new, properties.values())])

    def _items(self, said: dict[str, Any]) -> Items:
        first = [*map(self._new, said.get("prefixItems", ()))]
        others = said.get("items", True)
        rest = None if others is False else self.at_all() if others is True else self._new(others)
        return Items(first, rest, _bounds(said, "Items"))

    def at_all(self) -> Value:
        """What may be anything, and so may all in it."""
        if "" not in self._known:
            value = self._known[""] = Value(string=FREE)
            value.members, value.items = Members(None, [value]), Items([], value, FREE)
        return self._known[""]


def _bounds(said: dict[str, Any], of: str) -> Bounds:
    least, most = said.get(f"min{of}", 0), said.get(f"max{of}")
    if type(least) is not int or (most is not None and type(most) is not int):
        raise _NoShapeError
    return least, most


def _settle(value: Value) -> None:
    """Join its choices: the first byte must tell apart which of them is an object or array."""
    leaves = list(_leaves(value, set()))
    for name in ("members", "items"):
        found = [getattr(leaf, name) for leaf in leaves if getattr(leaf, name) is not None]
        if len(found) > 1:
            raise _NoShapeError
        setattr(value, name, found[0] if found else None)
    strings = [leaf.string for leaf in leaves if leaf.string is not None]
    value.string = strings[0] if len(strings) == 1 else BY_SPELLING if strings else None


def _leaves(value: Value, seen: set[int]) -> Iterator[Value]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if not value.choices:
        yield value
    for choice in value.choices:
        yield from _leaves(choice, seen)
