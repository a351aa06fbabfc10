"""Places in regular expressions and choices: where keys are equal masks are, which are kept."""

from typing import Any

import numpy as np
import pytest

from benchmarks.structured import COLOURS, DATE, MAIL, SUM_PATTERN
from nanovllm.core import regex_place
from nanovllm.core.grammar import Matcher
from nanovllm.core.kept_masks import MAX_TEXT_BYTES, Vocabulary
from nanovllm.core.regex_place import RegexMasks, term_of
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import allowed_ids
from tests.core.places import kept_mask, place_of, unkept
from tests.core.test_json_place import encode
from tests.core.vocabulary import make_compiler

COMPILER = make_compiler()


def matcher_of(wanted: str | list[str]) -> Matcher:
    """Of an expression, or of a choice."""
    field = "regex" if isinstance(wanted, str) else "choice"
    return COMPILER.compile(StructuredOutputsParams(**{field: wanted})).matcher()


def mask_of(matcher: Matcher) -> bytes:
    (row,) = COMPILER.compute_masks([matcher])
    return row.tobytes()


def keys_after(pattern: str, *texts: str) -> list[Any]:
    """Of outputs of one grammar."""
    first, keys = matcher_of(pattern), list[Any]()
    for text in texts:
        matcher = first.copy()
        assert all(map(matcher.accept, encode(text)))
        keys.append(place_of(matcher).key)
    return keys


PATTERNS = [
    *(DATE, MAIL, SUM_PATTERN),
    r"([a-z]{1,9} ){500}",
    r"([a-z]{1,3} ){2,4}(done|[0-9]+\.[0-9]{2})",
    r"(a|ab|abc)*(b|c)?x",
    r"(yes|no|maybe)( [a-z_-]+){0,3}[.!]",
    r"\d{2,3}(?:-\w{1,4})?",
    r".{3,90}z",
    r"[^b-y\n]{2}([A-Z0-9]{4})+",
    r"(a{40}|b{40})c*",
    r"(a|b|(c|d)e{2,}){1,200}",
    COLOURS,
    ["a", "aa", "aaa", "ab" * (MAX_TEXT_BYTES + 1), "b" * MAX_TEXT_BYTES, "\n"],
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_where_keys_are_equal_masks_are(pattern: str | list[str]) -> None:
    """What is computed for outputs that keep nothing, by the keys of one that follows them."""
    rng = np.random.default_rng(0)
    first = matcher_of(pattern)
    masks: dict[Any, tuple[bool, bytes]] = {}
    ways: dict[tuple[Any, int], Any] = {}  # where a token leads from an exact place
    num_again = 0
    for _ in range(40):
        matcher = first.copy()
        place = place_of(matcher)
        unkept(matcher)
        for _ in range(60):
            mask, is_forced = mask_of(matcher), matcher.has_forced_text
            assert matcher.error is None
            if place.key is not None:
                num_again += place.key in masks
                assert masks.setdefault(place.key, (is_forced, mask))[0] == is_forced
                assert is_forced or masks[place.key][1] == mask
            token_id = int(rng.choice(allowed_ids(mask)))
            before, goes_on = place.exact, matcher.accept(token_id)
            place.take(token_id)
            if before is not None:
                way = before, token_id
                assert ways.setdefault(way, goes_on and place.exact) == (goes_on and place.exact)
            if not goes_on:
                break
    assert num_again > 40


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_that_are_followed_have_the_masks_and_ends_of_others(
    pattern: str | list[str],
) -> None:
    rng = np.random.default_rng(1)
    first = matcher_of(pattern)
    for _ in range(3):
        pairs = [(first.copy(), unkept(first.copy())) for _ in range(12)]
        for _ in range(50):
            masks = COMPILER.begin_masks([one for one, _ in pairs]).result()
            rows, forced = [row.tobytes() for row in masks.words], masks.forced
            others = COMPILER.begin_masks([other for _, other in pairs]).result()
            assert rows == [row.tobytes() for row in others.words] and forced == others.forced
            left = []
            for (one, other), row in zip(pairs, rows, strict=True):
                token_id = int(rng.choice(allowed_ids(row)))
                goes_on = one.accept(token_id)
                assert other.accept(token_id) == goes_on and one.error is other.error is None
                left += [(one, other)] if goes_on else []
            pairs = left
            if not pairs:
                break


def test_of_a_choice_all_its_text_counts_while_it_is_short() -> None:
    first = matcher_of(["red", "green", "a" * 2 * MAX_TEXT_BYTES])
    one, other = first.copy(), first.copy()
    mask = mask_of(one)
    assert kept_mask(other, COMPILER) == mask
    one.accept(encode("r")[0])
    assert kept_mask(other, COMPILER) == mask and kept_mask(one, COMPILER) is None
    for token_id in encode("a" * MAX_TEXT_BYTES):
        assert other.accept(token_id)
    assert place_of(other).key == (None, b"a" * MAX_TEXT_BYTES)
    other.accept(encode("a")[0])
    assert place_of(other).key is None


def test_what_remains_is_what_counts() -> None:
    begin, word, words = keys_after(r"([a-z]{1,9} ){500}", "", "ab ", "ab c ")
    assert begin == word == words, "no token is as long as what they differ in"
    short, other, long = keys_after(r"([a-z]{1,9} ){500}", "abcdefg", "e mnopqrs", "abcdefgh")
    assert short == other != long
    one, two = keys_after(r"([a-z]{1,9} ){3}", "ab ", "ab c ")
    assert one != two
    one, two = keys_after(r"x?(ab|cd)+", "ab", "xcd")
    assert one == two
    assert keys_after(r"[^a]{5}", "bé") == [None], "only characters of ASCII are followed"


def test_kept_masks_serve_other_outputs() -> None:
    first = matcher_of(r"([a-z]{1,9} ){50}")
    one, other = first.copy(), first.copy()
    for token_id in encode("ab cde"):
        one.accept(token_id)
    mask = mask_of(one)
    for token_id in encode("uvw"):
        other.accept(token_id)
    assert kept_mask(other, COMPILER) == mask


@pytest.mark.parametrize(
    "pattern",
    [
        *("é", "(?i)a", "(?=a)b", "^a", "a$", "a+?", "a++", "(a*)*", "(a?){3}", r"\bx", r"\p{L}"),
        *(
            r"\x41",
            "[[:alpha:]]",
            "[a-z&&b]",
            "[z-a]",
            "[]a]",
            "a{x",
            "(a",
            "a)",
            "[a",
            "a\\",
        ),
        *("a{1}{2}", "a" * 201, "|".join(f"{a}{b}" for a in "abcd" for b in "abcde"), "(" * 20),
        r"[\d-z]",
    ],
)
def test_other_expressions_are_not_followed(pattern: str) -> None:
    assert term_of(pattern) is None


def test_too_much_to_find_out_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex_place, "MAX_STEPS", 2)
    known, unknown = keys_after("abcdef", "ab", "abc")
    assert known is not None and unknown is None
    monkeypatch.setattr(regex_place, "MAX_STEPS", 99)
    monkeypatch.setattr(regex_place, "MAX_SIZE", 10)
    known, unknown = keys_after("(ab|ac){2}", "", "a")
    assert known is not None and unknown is None


@pytest.mark.parametrize(
    ("pattern", "is_read"),
    [
        ("a" * regex_place.MAX_CHARS, True),
        ("a" * (regex_place.MAX_CHARS + 1), False),
        ("\x7f", True),
        ("\x80", False),
        ("(" * 8 + "a" + ")" * 8, True),
        ("(" * 9 + "a" + ")" * 9, False),
        ("(a", False),
        ("a)", False),
        ("", True),
    ],
)
def test_how_long_and_deep_an_expression_of_the_everyday_kind_may_be(
    pattern: str, is_read: bool
) -> None:
    assert (term_of(pattern) is not None) == is_read


def test_tokens_go_the_same_way_whose_characters_are_of_the_same_classes() -> None:
    """What ends an output is spelled as well, and goes a way of its own."""
    spelling = [b"<>", b"ab", b"ba", b"a", b"a1", b"b2", b"<a", b"", b"a\xc3\xa9", b"b\xc3\xbc"]
    vocabulary = Vocabulary(spelling, np.zeros(1, np.int32), frozenset({0}))
    term = term_of("(<?[a-z>]+[0-9]){9}")
    assert term is not None
    ways = RegexMasks(vocabulary, term).ways
    found = [ways[token_id] for token_id in range(len(spelling))]
    assert found[0] is found[7] is None
    assert found[1] == found[2] and found[4] == found[5] and found[8] == found[9]
    others = [found[index] for index in (1, 3, 4, 6, 8)]
    assert len(set(others)) == 5 and all(way is not None and way < 0 for way in others)
    assert [ways[token_id] for token_id in range(len(spelling))] == found


@pytest.mark.parametrize("pattern", ["[0-9]{2}-[a-z]{3}", "([a-z]{2} ){2}[!]"])
def test_llguidance_is_not_asked_about_an_end_that_is_known(pattern: str) -> None:
    begin = matcher_of(pattern)
    texts = ("12-abc", "34-xyz") if "0-9" in pattern else ("ab cd !", "xy zz !")
    for is_new, text in zip((True, False, False), (texts[0], *texts), strict=True):
        matcher = begin.copy()
        token_ids = encode(text)
        going = [matcher.accept(token_id) for token_id in token_ids]
        assert going == [True] * (len(going) - 1) + [False] and matcher.error is None
        assert (len(matcher._owed) < len(token_ids)) == is_new
