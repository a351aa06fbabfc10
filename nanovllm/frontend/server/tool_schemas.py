"""JSON schemas put into another schema, with every reference still pointing where it did.

Called by `sampling.py` for forced tool calls, whose arguments are part of an array of calls. Terms
are those of JSON Schema 2020-12 (core, §8) and RFC 6901; draft 7's `definitions` work alike.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urljoin

Schema = dict[str, Any]
# What stands under these is no schema, whatever it looks like …
DATA = {"const", "enum", "default", "examples"}
# … and the keys of what stands under these are names, of schemas.
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
NO_BASE = "http://schema/"  # the address of a schema that gives itself none


def nested(schema: Schema, pointer: str) -> Schema:
    """`schema` as it must be written to stand at `pointer` (such as "#/$defs/f") of another.

    References are resolved here: by pointer, by anchor, or by the `$id` of a part; what they name
    is written as a pointer from the new root. One that names nothing stays as it is, for the
    compiler to refuse.
    """
    places: dict[str, str] = {}
    for part, path, base in _parts(schema, "", NO_BASE):
        if base not in places:
            places[base] = path
        for anchor in (f"#{part.get('$anchor')}", part.get("$id")):
            if isinstance(anchor, str) and anchor.startswith("#"):  # as an `$id`, draft 7's way
                places[base + anchor] = path
    moved: Schema = _moved(schema, NO_BASE, places, pointer)
    return moved


def escaped(name: str) -> str:
    """A name as one step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _parts(value: Any, path: str, base: str) -> Iterator[tuple[Schema, str, str]]:
    """Every schema within `value`, which is one, with its pointer and its base address."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parts(item, f"{path}/{index}", base)
    elif isinstance(value, dict):
        base = _base(value, base)
        yield value, path, base
        for key, inner in value.items():
            here = f"{path}/{escaped(key)}"
            if key in NAMED and isinstance(inner, dict):
                for name, schema in inner.items():
                    yield from _parts(schema, f"{here}/{escaped(name)}", base)
            elif key not in DATA:
                yield from _parts(inner, here, base)


def _moved(value: Any, base: str, places: dict[str, str], pointer: str) -> Any:
    if isinstance(value, list):
        return [_moved(item, base, places, pointer) for item in value]
    if not isinstance(value, dict):
        return value
    base = _base(value, base)
    made: Schema = {}
    for key, inner in value.items():
        if key in ("$id", "$anchor", "$schema") and isinstance(inner, str):
            continue  # resolved here, once for all
        if key == "$ref" and isinstance(inner, str):
            made[key] = _target(inner, base, places, pointer)
        elif key in NAMED and isinstance(inner, dict):
            made[key] = {n: _moved(one, base, places, pointer) for n, one in inner.items()}
        else:
            made[key] = inner if key in DATA else _moved(inner, base, places, pointer)
    return made


def _target(reference: str, base: str, places: dict[str, str], pointer: str) -> str:
    address, _, fragment = _resolved(base, reference).partition("#")
    if fragment and not fragment.startswith("/"):
        address, fragment = f"{address}#{unquote(fragment)}", ""
    place = places.get(address)
    return reference if place is None else f"{pointer}{place}{fragment}"


def _base(schema: Schema, base: str) -> str:
    own = schema.get("$id")
    return _resolved(base, own).partition("#")[0] if isinstance(own, str) else base


def _resolved(base: str, reference: str) -> str:
    return base + reference if reference.startswith("#") else urljoin(base, reference)
