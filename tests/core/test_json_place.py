"""Places in JSON: masks are equal where keys are, and are kept by them."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovllm.core import kept_masks
from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.core.grammar_source import read
from nanovllm.core.json_place import MAX_DEPTH
from nanovllm.core.json_shape import shape_of
from nanovllm.core.kept_masks import KeptMasks
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import allowed_ids
from tests.core.vocabulary import make_compiler, tokenizer_json

COMPILER = make_compiler()
NUM_WALKS = 30
MAX_TOKENS = 80


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


SHORT = {"type": "string", "maxLength": 4}
SCHEMAS: dict[str, dict[str, Any]] = {
    "texts": record(a=SHORT, b={"type": "string", "minLength": 2, "maxLength": 3}),
    "long text": record(a={"type": "string", "maxLength": 200}, b={"type": "string"}),
    "spelled": record(a={"enum": ["a", "ab", 3, None]}, b={"type": "string", "pattern": "^a?b+$"}),
    "numbers": record(a={"type": "integer", "minimum": 3, "maximum": 120}, b={"type": "number"}),
    "optional": {"type": "object", "properties": {"a": SHORT, "ab": SHORT, "é": SHORT}},
    "array": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "long array": {"type": "array", "items": {"const": 1}, "minItems": 90},
    "tuple": {"type": "array", "prefixItems": [SHORT, {"type": "null"}], "items": False},
    "nested": record(a={"type": "array", "items": record(c=SHORT)}, b=record(c={"type": "null"})),
    "one part": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": record(a=SHORT)}},
    "any": {"type": "object"},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "kinds": {"anyOf": [SHORT, {"type": "null"}, record(a=SHORT), {"type": "array"}]},
    "two texts": {"anyOf": [SHORT, {"const": "abcdefg"}, {"type": "integer"}]},
    "recursive": {
        "$defs": {
            "node": record(v={"type": "integer"}, n={"anyOf": [{"$ref": "#/$defs/node"}, {}]})
        }
        | {"tree": record(n={"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]})},
        "$ref": "#/$defs/tree",
    },
}


def compile_(schema: dict[str, Any], compiler: GrammarCompiler = COMPILER) -> Matcher:
    """With masks that nobody else keeps."""
    return compiler.compile(StructuredOutputsParams(json=schema)).matcher()


def has_shape(schema: dict[str, Any]) -> bool:
    return shape_of(read(StructuredOutputsParams(json=schema))) is not None


def mask_of(matcher: Matcher) -> bytes:
    (row,) = COMPILER.compute_masks([matcher])
    return row.tobytes()


def encode(text: str) -> list[int]:
    return Tokenizer.from_str(tokenizer_json()).encode(text).ids


def pick(mask: bytes, rng: np.random.Generator) -> int:
    """Of what is allowed; often the end of a string or a value, so that outputs get somewhere."""
    ids = allowed_ids(mask)
    ends = [token_id for token_id in encode('",]}\\') if token_id in ids]
    return int(rng.choice(ends if ends and rng.random() < 0.4 else ids))


@pytest.mark.parametrize("name", SCHEMAS)
def test_where_keys_are_equal_masks_are(name: str) -> None:
    """What is computed for outputs that keep nothing, by the keys of one that follows them."""
    rng = np.random.default_rng(0)
    assert has_shape(SCHEMAS[name])
    first = compile_(SCHEMAS[name])
    masks: dict[Any, tuple[bool, bytes]] = {}
    num_again = 0
    for _ in range(NUM_WALKS):
        matcher = first.copy()
        place, matcher.place = matcher.place, None
        assert place is not None
        for _ in range(MAX_TOKENS):
            mask, is_forced = mask_of(matcher), matcher.has_forced_text
            assert matcher.error is None
            if place.key is not None:
                num_again += place.key in masks
                # The mask of a token that is forced depends on the token before.
                assert masks.setdefault(place.key, (is_forced, mask))[0] == is_forced
                assert is_forced or masks[place.key][1] == mask
            token_id = pick(mask, rng)
            if not matcher.accept(token_id):
                break
            place.take(token_id)
    assert num_again > NUM_WALKS


def test_kept_masks_serve_other_outputs() -> None:
    first = compile_(SCHEMAS["texts"])
    one, other = first.copy(), first.copy()
    for token_id in encode('{"a":"ab'):
        one.accept(token_id)
    assert one.kept_mask is None
    mask = mask_of(one)
    for token_id in encode('{"a": "c\\n'):
        other.accept(token_id)
    assert other.kept_mask is not None and other.kept_mask.tobytes() == mask
    assert mask_of(other) == mask
    other.accept(encode("c")[0])
    assert other.kept_mask is None and mask_of(other) != mask


def test_nothing_is_kept_where_a_token_is_forced() -> None:
    matcher = compile_(record(name={"type": "null"}))
    for token_id in encode('{"'):
        matcher.accept(token_id)
    mask_of(matcher)
    assert matcher.kept_mask is None and matcher.has_forced_text


def test_masks_of_many_are_the_same_with_kept_ones_among_them() -> None:
    rng = np.random.default_rng(0)
    first = compile_(SCHEMAS["nested"])
    matchers = [first.copy() for _ in range(24)]
    plain = [first.copy() for _ in matchers]
    for one in plain:
        one.place = None
    for _ in range(40):
        masks = COMPILER.begin_masks(matchers).result()
        rows = [row.tobytes() for row in masks.words]
        unkept = COMPILER.begin_masks(plain).result()
        assert rows == [row.tobytes() for row in unkept.words] and masks.forced == unkept.forced
        token_ids = [pick(mask, rng) for mask in rows]
        going = [
            one.accept(token_id) and other.accept(token_id)
            for one, other, token_id in zip(matchers, plain, token_ids, strict=True)
        ]
        matchers = [one for one, goes_on in zip(matchers, going, strict=True) if goes_on]
        plain = [one for one, goes_on in zip(plain, going, strict=True) if goes_on]


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [record(a=SHORT)], "properties": {"b": SHORT}},
        {"allOf": [record(a=SHORT), {"required": ["a"]}]},
        {"anyOf": [record(a=SHORT), record(b=SHORT)]},
        {"anyOf": [{"$ref": "#/$defs/x"}, record(b=SHORT)], "$defs": {"x": record(a=SHORT)}},
        {"type": "object", "patternProperties": {"^a": SHORT}},
        {"type": "object", "properties": {"a": SHORT}, "additionalProperties": True},
        {"type": "object", "required": ["a"]},
        {"enum": [[1], {"a": 1}]},
        {"type": "string", "maxLength": 3, "x-guidance": {"lenient": True}},
    ],
)
def test_other_schemas_have_no_shape(schema: dict[str, Any]) -> None:
    assert not has_shape(schema)


def test_definitions_that_lead_back_to_themselves_are_read() -> None:
    loop = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}
    assert has_shape({**loop, "$ref": "#/$defs/a"})
    assert has_shape({"type": "array", "items": {"$ref": "#"}})


def test_what_is_deep_has_no_key_and_what_is_kept_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher = compile_(SCHEMAS["any"])
    for token_id in encode('{"a":' + "[" * (MAX_DEPTH + 2)):
        assert matcher.accept(token_id)
    assert matcher.place is not None and matcher.place.key is None
    assert mask_of(matcher) and matcher.kept_mask is None
    monkeypatch.setattr(kept_masks, "MAX_BYTES", 100)
    kept = KeptMasks([], 1)
    for key in range(20):
        kept.keep(key, np.zeros(10, np.int32))
    assert [key for key in range(20) if kept.get(key) is not None] == [17, 18, 19]


def test_a_copy_goes_its_own_way() -> None:
    first = compile_(SCHEMAS["nested"])
    for token_id in encode('{"a":[{"c":"a'):
        first.accept(token_id)
    second = first.copy()
    assert first.place is not None and second.place is not None
    assert first.place.key == second.place.key
    for token_id in encode('"},'):
        second.accept(token_id)
    assert first.place.key != second.place.key
    for token_id in encode('"},'):
        first.accept(token_id)
    assert first.place.key == second.place.key


@pytest.mark.parametrize(
    ("name", "known", "unknown"),
    [
        ("texts", '{"a"', "x"),  # in place of a colon
        ("texts", '{"a":"ab"', "x"),  # of a comma
        ("texts", '{"a":"ab', '"]}'),  # of which the second has nothing to close
        ("texts", "", "["),
        ("texts", "", '"'),
        ("array", "", "{"),
        ("texts", '{"', 'x"'),  # no name of a member
        ("nested", '{"a":[{"c":"a"}]', '"'),
    ],
)
def test_what_is_not_expected_has_no_key_from_there_on(name: str, known: str, unknown: str) -> None:
    place = compile_(SCHEMAS[name]).place
    assert place is not None
    for token_id in encode(known):
        place.take(token_id)
        assert place.key is not None
    for token_id in encode(unknown):
        place.take(token_id)
    assert place.key is None
    for token_id in encode('"a":'):
        place.take(token_id)
        assert place.key is None
