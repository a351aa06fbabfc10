"""What is so plain that compiling it needs no trial first; `GrammarCompiler.compile` asks.

What makes llguidance overflow its stack, or take seconds or gigabytes, is depth, many references,
regular expressions, numbers of many digits, conjunctions and counts. A schema within these limits
has little of any: `benchmarks/fuzz_grammars.py --plain` compiles random ones with a quarter of the
stack and memory that a trial has, which has a sixteenth of the stack of the core's threads.
"""

from typing import Any

from nanovllm.core.grammar_source import Source, read
from nanovllm.core.json_schema import resolve
from nanovllm.core.json_shape import ASIDE
from nanovllm.sampling_params import StructuredOutputsParams

MAX_CHARS = 4096  # of its text
MAX_DEPTH = 8  # of schemas in schemas, a reference counting as one
MAX_VALUES = 64  # schemas in it, as often as they are referred to, and things that enums list
MAX_ITEMS = 32  # of an array, where that is bounded
MAX_LENGTH = 4096  # of a string, where that is bounded
MAX_NUMBER = 10**9  # whole ones, in which numbers are bounded
SCALARS = ("string", "integer", "number", "boolean", "null")
COUNTS = {
    "minLength": MAX_LENGTH,
    "maxLength": MAX_LENGTH,
    "minItems": MAX_ITEMS,
    "maxItems": MAX_ITEMS,
    "minimum": MAX_NUMBER,
    "maximum": MAX_NUMBER,
}
LISTED = (str, int, type(None))
ALONE = frozenset(("$ref", "anyOf"))  # with anything beside it, each is a conjunction


def plain_source(wanted: StructuredOutputsParams) -> Source | None:
    """Of JSON, or of some texts, within all limits; None of whatever else is asked for."""
    if wanted.choice is not None:
        is_small = len(wanted.choice) <= MAX_VALUES and sum(map(len, wanted.choice)) <= MAX_CHARS
        return read(wanted) if is_small else None
    if wanted.kind not in ("json", "json_object") or len(str(wanted.json)) > MAX_CHARS:
        return None
    try:
        source = read(wanted)
    except (ValueError, RecursionError):
        return None  # whatever is wrong with it, a trial tells
    return source if _Counter(source.schema).is_plain(source.schema, MAX_DEPTH) else None


class _Counter:
    """Of one schema. It stops at what is too much, so it takes no longer than a plain one does."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_left = MAX_VALUES

    def is_plain(self, schema: Any, depth: int) -> bool:
        """Whether all of it is, together with what has been counted before."""
        self._num_left -= 1
        if self._num_left < 0 or depth == 0 or not isinstance(schema, dict):
            return False
        said = schema.keys() - ASIDE
        if len(said) > 1 and not said.isdisjoint(ALONE):
            return False
        return all(self._has_plain(key, schema[key], depth - 1) for key in said)

    def _has_plain(self, key: str, value: Any, depth: int) -> bool:
        """A keyword, and the schemas in it."""
        if key in COUNTS:
            return type(value) is int and abs(value) <= COUNTS[key]
        match key:
            case "type":
                kinds = value if isinstance(value, list) else [value]
                return value in ("object", "array") or all(kind in SCALARS for kind in kinds)
            case "enum":
                return isinstance(value, list) and all(map(self._is_listed, value))
            case "const":
                return self._is_listed(value)
            case "required":
                return isinstance(value, list) and all(isinstance(one, str) for one in value)
            case "properties":
                is_map = isinstance(value, dict)
                return is_map and all(self.is_plain(one, depth) for one in value.values())
            case "anyOf":
                is_list = isinstance(value, list)
                return is_list and all(self.is_plain(one, depth) for one in value)
            case "$ref":
                is_near = isinstance(value, str) and value.startswith("#/")
                return is_near and self.is_plain(resolve(self._root, value), depth)
            case "additionalProperties" if isinstance(value, bool):
                return True
        return key in ("items", "additionalProperties") and self.is_plain(value, depth)

    def _is_listed(self, value: Any) -> bool:
        self._num_left -= 1
        return self._num_left >= 0 and isinstance(value, LISTED)
