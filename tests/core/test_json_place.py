"""Places in JSON: masks are equal where keys are, and are kept by them."""

from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovllm.core import grammar as grammar_module
from nanovllm.core import kept_masks
from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.core.grammar_source import read
from nanovllm.core.json_place import MAX_DEPTH
from nanovllm.core.json_shape import shape_of
from nanovllm.core.kept_masks import (
    CONTEXT_SIZE,
    FREE_LINE,
    NODE_SIZE,
    STATE_SIZE,
    Kept,
    Vocabulary,
)
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import allowed_ids
from tests.core.places import kept_mask, place_of, unkept
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
    ways: dict[tuple[Any, int], Any] = {}  # where a token leads from an exact place
    num_again = 0
    for _ in range(NUM_WALKS):
        matcher = first.copy()
        place = place_of(matcher)
        unkept(matcher)
        for _ in range(MAX_TOKENS):
            mask, is_forced = mask_of(matcher), matcher.has_forced_text
            assert matcher.error is None
            if place.key is not None:
                num_again += place.key in masks
                # The mask of a token that is forced depends on the token before.
                assert masks.setdefault(place.key, (is_forced, mask))[0] == is_forced
                assert is_forced or masks[place.key][1] == mask
            token_id, before = pick(mask, rng), place.exact
            goes_on = matcher.accept(token_id)
            place.take(token_id)
            if before is not None:
                way = before, token_id
                assert ways.setdefault(way, goes_on and place.exact) == (goes_on and place.exact)
            if not goes_on:
                break
    assert num_again > NUM_WALKS


def test_kept_masks_serve_other_outputs() -> None:
    first = compile_(SCHEMAS["texts"])
    one, other = first.copy(), first.copy()
    for token_id in encode('{"a":"ab'):
        one.accept(token_id)
    assert kept_mask(one, COMPILER) is None
    mask = mask_of(one)
    for token_id in encode('{"a": "c\\n'):
        other.accept(token_id)
    assert kept_mask(other, COMPILER) == mask == mask_of(other)
    other.accept(encode("c")[0])
    assert kept_mask(other, COMPILER) is None and mask_of(other) != mask


def test_what_is_kept_where_a_text_is_forced_is_for_all_that_come_there() -> None:
    first = compile_(record(fgz={"type": "null"}))
    one, other, third = first.copy(), first.copy(), first.copy()
    vocabulary = Tokenizer.from_str(tokenizer_json())
    f, g, both = map(vocabulary.token_to_id, ("f", "g", "fg"))
    for token_id in (*encode('{"'), f, g):
        assert one.accept(token_id)
    for token_id in (*encode('{ "'), both):
        assert other.accept(token_id)
    assert third.accept(encode("{")[0])
    mask = mask_of(one)
    assert one.state is not None and one.state.kept.forced and one.has_forced_text
    assert kept_mask(other, COMPILER) == mask == mask_of(unkept(one.copy()))
    assert len(allowed_ids(mask)) == 1 and len(allowed_ids(mask_of(third))) > 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_masks_of_many_are_the_same_with_kept_ones_among_them(name: str) -> None:
    """And so are their ends. Those that are not followed ask llguidance at every step."""
    rng = np.random.default_rng(0)
    first = compile_(SCHEMAS[name])
    for _ in range(3):
        matchers = [first.copy() for _ in range(24)]
        plain = [unkept(first.copy()) for _ in matchers]
        for _ in range(40):
            masks = COMPILER.begin_masks(matchers).result()
            rows, forced = [row.tobytes() for row in masks.words], masks.forced
            unkept_masks = COMPILER.begin_masks(plain).result()
            assert rows == [row.tobytes() for row in unkept_masks.words]
            assert forced == unkept_masks.forced
            token_ids = [pick(mask, rng) for mask in rows]
            going = [one.accept(i) for one, i in zip(matchers, token_ids, strict=True)]
            assert going == [one.accept(i) for one, i in zip(plain, token_ids, strict=True)]
            matchers = [one for one, goes_on in zip(matchers, going, strict=True) if goes_on]
            plain = [one for one, goes_on in zip(plain, going, strict=True) if goes_on]
            if not matchers:
                break
            # A copy of one in the middle, of which llguidance has yet to hear, goes on as it does.
            assert mask_of(unkept(matchers[0].copy())) == mask_of(plain[0])


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


def test_what_is_deep_has_no_key_and_what_is_kept_is_bounded() -> None:
    matcher = compile_(SCHEMAS["any"])
    for token_id in encode('{"a":' + "[" * (MAX_DEPTH + 2)):
        assert matcher.accept(token_id)
    assert place_of(matcher).key is None and place_of(matcher).exact is None
    assert mask_of(matcher) and kept_mask(matcher, COMPILER) is None
    lines = Vocabulary([], np.full(10, -1, np.int32), num_lines=18, num_spare=2)
    mine, other = deque[Kept](), deque[Kept]()
    kept = [Kept() for _ in range(20)]
    for number, one in enumerate(kept):
        lines.keep(one, np.full(10, number, np.int32), mine, in_use=[])
    assert [one.line >= 0 for one in kept] == 16 * [False] + 4 * [True], "a quarter of the lines"
    assert [lines.words[one.line, 0] for one in kept[16:]] == [16, 17, 18, 19]
    first, second = kept[16:18]
    assert not lines.keep(Kept(), lines.words[0], mine, in_use=[0, first.line]), "it is needed"
    assert lines.keep(Kept(), lines.words[0], mine, in_use=[0, first.line]) and second.line < 0
    assert first.line >= 0
    for _ in range(9):
        for _ in range(4):
            lines.keep(Kept(), np.zeros(10, np.int32), other, in_use=[])
        other.clear()
    assert all(one.line < 0 for one in kept), "others have taken the place of the oldest"
    assert (lines.words[FREE_LINE] == -1).all()


def test_what_is_known_of_a_grammar_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been forgotten is found out again, by outputs that go on as well."""
    most, at_once, sizes = 300, 400, list[int]()
    monkeypatch.setattr(kept_masks, "MAX_SIZE", most)
    rng = np.random.default_rng(0)
    for name in ("nested", "optional", "any"):
        first = compile_(SCHEMAS[name])
        known = first.family.known
        for _ in range(5):
            pairs = [(first.copy(), unkept(first.copy())) for _ in range(4)]
            for _ in range(40):
                left = []
                for one, other in pairs:
                    mask = mask_of(one)
                    assert mask == mask_of(other)
                    token_id = pick(mask, rng)
                    goes_on = one.accept(token_id)
                    assert other.accept(token_id) == goes_on
                    left += [(one, other)] if goes_on else []
                    sizes.append(known._size)
                    counted = len(known._nodes) * NODE_SIZE + len(known._contexts) * CONTEXT_SIZE
                    states = [one for some in known._states.values() for one in some.values()]
                    counted += len(states) * STATE_SIZE + sum(len(one.next) for one in states)
                    counted += sum(len(one.after) for one in known._nodes.values())
                    counted += sum(len(one.turns) for one in known._contexts.values())
                    assert counted <= known._size <= most + at_once
                pairs = left
    assert any(later < earlier for earlier, later in pairwise(sizes))


def test_what_has_been_forgotten_is_not_held_by_outputs_that_go_on() -> None:
    """Where they are is theirs; where that led is not."""
    first = compile_(SCHEMAS["nested"])
    known, matchers = first.family.known, [first.copy()]
    for token_id in encode('{"a":[{"c":"ab"},{'):
        matchers.append(matchers[-1].copy())
        assert matchers[-1].accept(token_id)
    nodes = [one.state.node for one in matchers if one.state is not None]
    contexts = [one.context for one in matchers if one.context is not None]
    states = [one.state for one in matchers if one.state is not None]
    assert len(states) == len(contexts) == len(matchers)
    assert any(one.after for one in nodes) and any(one.turns for one in contexts)
    assert any(one.next for one in states)
    known._forget()
    assert not any(one.after for one in nodes) and not any(one.turns for one in contexts)
    assert not any(one.next for one in states) and known._size == 0
    for token_id in encode('"c":""}]'):
        assert matchers[-1].accept(token_id)
    word = COMPILER.compile(StructuredOutputsParams(regex="[ab]+")).matcher()
    assert word.accept(encode("a")[0]) and word.family.known.first.next
    word.family.known._forget()
    assert not word.family.known.first.next


def test_tokens_of_which_llguidance_has_yet_to_hear_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_OWED", 4)
    first = compile_({"type": "string"})
    text = encode('"' + 12 * "a")
    for _ in range(2):
        matcher, nums = first.copy(), list[int]()
        for token_id in text:
            mask_of(matcher)
            assert matcher.accept(token_id)
            nums.append(len(matcher._owed))
    assert nums == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert mask_of(unkept(matcher.copy())) == mask_of(matcher)


def test_an_end_is_never_followed() -> None:
    """It may be in the mask, and its token may have a text."""
    first = compile_({"type": "integer"})
    for _ in range(2):
        matcher = first.copy()
        for token_id in encode("12"):
            mask_of(matcher)
            assert matcher.accept(token_id)
        assert allowed_ids(mask_of(matcher))[0] == 0 and not matcher.follow(0)
        assert not matcher.accept(0) and matcher.error is None


def test_a_copy_goes_its_own_way() -> None:
    first = compile_(SCHEMAS["nested"])
    for token_id in encode('{"a":[{"c":"a'):
        first.accept(token_id)
    second = first.copy()
    assert place_of(first).key == place_of(second).key
    for token_id in encode('"},'):
        second.accept(token_id)
    assert place_of(first).key != place_of(second).key
    for token_id in encode('"},'):
        first.accept(token_id)
    assert first.state is second.state is not None


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
    place = place_of(compile_(SCHEMAS[name]))
    for token_id in encode(known):
        place.take(token_id)
        assert place.key is not None
    for token_id in encode(unknown):
        place.take(token_id)
    assert place.key is None
    for token_id in encode('"a":'):
        place.take(token_id)
        assert place.key is None
