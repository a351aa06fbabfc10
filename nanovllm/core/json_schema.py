"""A client's JSON schema as llguidance is to read it; `grammar_source` calls `prepare`.

Objects that list properties and do not speak of others are closed, as OpenAI and xgrammar have it:
a small model would else invent keys up to its max_tokens. Formats that llguidance does not know are
annotations, as the standard says, and dropped. What a schema says otherwise stays as it is.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

KNOWN_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
# Keywords by what they hold: a schema, a list of schemas, schemas by name.
ONE = frozenset(("additionalProperties", "additionalItems", "items"))
LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
ALTERNATIVES = ("anyOf", "oneOf")
Schema = dict[str, Any]


def prepare(text: str) -> Any:
    """The schema, as JSON's values. Raises `ValueError` or `RecursionError` if it is no JSON."""
    return _Closing(json.loads(text)).closed()


@dataclass
class _Names:
    """The properties that all parts of one object name together."""

    properties: dict[str, Schema] = field(default_factory=dict)
    patterns: dict[str, Schema] = field(default_factory=dict)
    speaks_of_others: bool = False


class _Closing:
    """Closes the objects of one schema.

    Several schemas may describe one object: by `allOf`, or by `$ref`, `anyOf` and `properties` side
    by side. Each alone would then forbid what another one asks for. So these parts stay open, also
    where they are definitions that are used elsewhere, and the whole is closed by one part more,
    which knows the names of all.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._parts: set[str] = set()  # pointers of definitions that are parts of something
        self._find_parts(root, is_part=False)

    def closed(self) -> Any:
        return self._close(self._root, "#", is_part=False)

    def _close(self, schema: Any, pointer: str, *, is_part: bool) -> Any:
        if not isinstance(schema, dict):
            return schema
        is_part = is_part or pointer in self._parts
        is_whole = _num_parts(schema) > 1 and not is_part
        made: Schema = {}
        for key, value in schema.items():
            if key == "format" and isinstance(value, str) and value not in KNOWN_FORMATS:
                continue
            below = key in ("allOf", *ALTERNATIVES) and (is_part or is_whole)
            path = f"{pointer}/{key}"
            if key in MAPS and isinstance(value, dict):
                made[key] = {
                    name: self._close(one, f"{path}/{_escaped(name)}", is_part=False)
                    for name, one in value.items()
                }
            elif key in LISTS and isinstance(value, list):
                made[key] = [
                    self._close(one, f"{path}/{index}", is_part=below)
                    for index, one in enumerate(value)
                ]
            elif key in ONE:
                made[key] = self._close(value, path, is_part=False)
            else:
                made[key] = value
        if is_whole:
            self._close_whole(schema, made)
        elif not is_part and _lists_properties(schema) and "additionalProperties" not in schema:
            made["additionalProperties"] = False
        return made

    def _close_whole(self, schema: Schema, made: Schema) -> None:
        """Add the part that closes an object of several."""
        names = _Names()
        self._gather(schema, names, set())
        parts = made.get("allOf", [])
        if names.speaks_of_others or not (names.properties or names.patterns):
            return
        if isinstance(parts, list):
            last = {
                "properties": names.properties,
                "patternProperties": names.patterns,
                "additionalProperties": False,
            }
            made["allOf"] = [*parts, last]

    def _gather(self, schema: Any, names: _Names, seen: set[str]) -> None:
        if not isinstance(schema, dict):
            return
        names.speaks_of_others |= "additionalProperties" in schema
        for key, found in (
            ("properties", names.properties),
            ("patternProperties", names.patterns),
        ):
            if isinstance(schema.get(key), dict):
                found.update({name: {} for name in schema[key]})
        for branch in _branches(schema):
            self._gather(branch, names, seen)
        target = schema.get("$ref")
        if isinstance(target, str) and target not in seen:
            seen.add(target)
            self._gather(resolve(self._root, target), names, seen)

    def _find_parts(self, schema: Any, *, is_part: bool) -> None:
        if not isinstance(schema, dict):
            return
        is_part = is_part or _num_parts(schema) > 1
        target = schema.get("$ref")
        if is_part and isinstance(target, str) and unquote(target) not in self._parts:
            self._parts.add(unquote(target))
            self._find_parts(resolve(self._root, target), is_part=True)
        for branch in _branches(schema):
            self._find_parts(branch, is_part=is_part)
        for one in _others_below(schema):
            self._find_parts(one, is_part=False)


def resolve(root: Any, pointer: str) -> Any:
    """What a `$ref` within the schema `root` points to; None if nothing is there."""
    if not pointer.startswith("#"):
        return None
    found = root
    for name in unquote(pointer).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def _num_parts(schema: Schema) -> int:
    """How many schemas describe the same object here."""
    all_of = schema.get("allOf")
    return (
        _lists_properties(schema)
        + (len(all_of) if isinstance(all_of, list) else 0)
        + sum(key in schema for key in ("$ref", *ALTERNATIVES))
    )


def _lists_properties(schema: Schema) -> bool:
    return "properties" in schema or "patternProperties" in schema


def _branches(schema: Schema) -> Iterator[Any]:
    """What applies to the very value that the schema does, or may."""
    for key in ("allOf", *ALTERNATIVES):
        if isinstance(schema.get(key), list):
            yield from schema[key]


def _others_below(schema: Schema) -> Iterator[Any]:
    """The schemas of other values, and definitions."""
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            yield from value.values()
        elif key in ("prefixItems", "items") and isinstance(value, list):
            yield from value
        elif key in ONE:
            yield value


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
