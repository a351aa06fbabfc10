"""JSON schemas so plain that compiling them needs no trial first; `GrammarCompiler.compile` asks.

What makes llguidance overflow its stack, or take seconds or gigabytes, is depth, references,
regular expressions, numbers of many digits, conjunctions and counts. A schema within these limits
has little of any: `benchmarks/fuzz_grammars.py --plain` compiles random ones with a quarter of the
stack and memory that a trial has, which has a sixteenth of the stack of the core's threads.
"""

import json
from typing import Any

from nanovllm.sampling_params import StructuredOutputsParams

MAX_CHARS = 4096  # of its text
MAX_DEPTH = 8
MAX_VALUES = 64  # schemas in it, and things that enums list
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
TEXTS = frozenset(("title", "description", "$schema"))


def is_plain(wanted: StructuredOutputsParams) -> bool:
    """Whether it asks for JSON by a schema, valid or not, within all limits."""
    if wanted.kind == "json_object":
        return True
    text = str(wanted.json)
    if wanted.kind != "json" or len(text) > MAX_CHARS:
        return False
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return 0 < _num_values(schema, MAX_DEPTH) <= MAX_VALUES


def _num_values(schema: Any, depth: int) -> int:
    """Schemas in this one, itself among them, and what enums list; 0 if not all of it is plain."""
    if not isinstance(schema, dict) or depth == 0:
        return 0
    if not all(_is_plain(key, value) for key, value in schema.items()):
        return 0
    alternatives = schema.get("anyOf", [])
    if alternatives and len(schema) > 1:
        return 0
    below = [*schema.get("properties", {}).values(), *alternatives]
    below += [schema["items"]] if "items" in schema else []
    counts = [_num_values(one, depth - 1) for one in below]
    return 0 if 0 in counts else 1 + sum(counts) + len(schema.get("enum", ()))


def _is_plain(key: str, value: Any) -> bool:
    """Whether a keyword is known and within its limits, but for the schemas in it."""
    if key in COUNTS:
        return type(value) is int and abs(value) <= COUNTS[key]
    match key:
        case "type":
            kinds = value if isinstance(value, list) else [value]
            return value in ("object", "array") or all(kind in SCALARS for kind in kinds)
        case "enum":
            return isinstance(value, list) and all(isinstance(one, LISTED) for one in value)
        case "const":
            return isinstance(value, LISTED)
        case "required":
            return isinstance(value, list) and all(isinstance(one, str) for one in value)
        case "additionalProperties":
            return value is False
        case "properties":
            return isinstance(value, dict)
        case "anyOf":
            return isinstance(value, list)
    return key == "items" or (key in TEXTS and isinstance(value, str))
