"""Grammars: what is allowed next, where an output ends, what is refused and what is shared."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovllm.core import grammar as grammar_module
from nanovllm.core import grammar_source
from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.protocol.plan import WorkerInfo
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import VOCAB_SIZE, allowed_ids
from tests.core.vocabulary import decode, make_compiler, tokenizer_json
from tests.waiting import WAIT_S

EOS_ID = 0
COMPILER = make_compiler()


def compile_(**wanted: Any) -> Matcher:
    return COMPILER.compile(StructuredOutputsParams(**wanted)).matcher()


def encode(text: str) -> list[int]:
    return Tokenizer.from_str(tokenizer_json()).encode(text).ids


def masks_of(compiler: GrammarCompiler, matchers: list[Matcher]) -> list[bytes]:
    """Copies of `compute_masks`' rows, which its next call would write over."""
    return [row.tobytes() for row in compiler.compute_masks(matchers)]


def allowed(matcher: Matcher) -> list[int]:
    (mask,) = masks_of(COMPILER, [matcher])
    return allowed_ids(mask)


def fits(matcher: Matcher, text: str) -> bool:
    """Whether `text`, a token per byte, is a whole output."""
    for token_id in encode(text):
        if token_id not in allowed(matcher):
            return False
        if not matcher.accept(token_id):
            return matcher.error is None and token_id == encode(text)[-1]
    return EOS_ID in allowed(matcher)


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"regex": r"[0-9]{3}-[0-9]{2}"}, ["123-45"], ["12-345", "123-4", "x"]),
        ({"regex": "a+"}, ["a", "aaaa"], ["", "b"]),
        ({"choice": ["yes", "no", 'qu"o\\te', "né 😀"]}, ["yes", "né 😀", 'qu"o\\te'], ["ye", "x"]),
        ({"json_object": True}, ["{}", '{"a": [1, null]}'], ["[]", "1", '{"a"}']),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 12}}, ["5", "12"], ["4", "13"]),
        ({"json": '{"enum": ["a", 2]}'}, ['"a"', "2"], ["a", "3"]),
        ({"grammar": 'start: "a" start "b" | "c"'}, ["c", "aacbb"], ["aacb", "ab"]),
        ({"grammar": 'root ::= "x" item*\nitem ::= "," [0-9]'}, ["x", "x,1,2"], ["x,", "y"]),
    ],
)
def test_outputs_that_fit_and_that_do_not(
    wanted: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert fits(compile_(**wanted), text), text
    for text in bad:
        assert not fits(compile_(**wanted), text), text


def test_a_byte_level_decoder_behind_others_is_one() -> None:
    """As converters write it for GGUF vocabularies of Llama's architecture."""
    content = json.loads(tokenizer_json())
    wrapped = [{"type": "ByteFallback"}, {"type": "Fuse"}, content["decoder"]]
    content["decoder"] = {"type": "Sequence", "decoders": wrapped}
    plain, behind_others = (
        grammar_source.make_tokenizer(text, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS_ID])
        for text in (tokenizer_json(), json.dumps(content))
    )
    for token_id in range(1, VOCAB_SIZE):
        assert behind_others.decode_bytes([token_id]) == plain.decode_bytes([token_id])
    assert plain.decode_bytes(encode("\n")) == b"\n"


def test_json_may_be_laid_out_but_not_be_filled_with_blanks() -> None:
    value = {"a": 1, "b": [1, 2]}
    for indent in (None, 2, 4):
        assert fits(compile_(json_object=True), json.dumps(value, indent=indent))
    assert not fits(compile_(json_object=True), '{"a":   1}')
    assert not fits(compile_(json_object=True), '{\n\n"a": 1}')


def test_an_output_is_over_when_nothing_can_follow() -> None:
    matcher = compile_(regex="ab?")
    (a, b) = encode("ab")
    assert matcher.accept(a) and allowed(matcher) == [EOS_ID, b]
    assert not matcher.copy().accept(b)
    assert not matcher.accept(EOS_ID) and matcher.error is None


def test_a_random_walk_stays_inside_the_grammar_and_no_special_token_is_allowed() -> None:
    pattern = r"([a-z]{2,5} ){1,3}(done|[0-9]+\.[0-9]{2})"
    rng = np.random.default_rng(0)
    for _ in range(30):
        matcher, token_ids = compile_(regex=pattern), []
        while True:
            token_ids.append(int(rng.choice(allowed(matcher))))
            if not matcher.accept(token_ids[-1]):
                break
        assert matcher.error is None
        assert re.fullmatch(pattern, decode(tuple(token_ids)))


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"regex": "(a"}, "regex"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"json": {"type": "nonsense"}}, "json"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "json"),
        ({"json": {"properties": {"a": False}, "required": ["a"], "type": "object"}}, "json"),
        ({"json": {"$ref": "#/nowhere"}}, "json"),
        ({"grammar": "foo: bar"}, "grammar"),
        ({"grammar": 'root ::= "a" (('}, "grammar"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"structured_outputs\.{field} cannot be used: \w+"):
        compile_(**wanted)


def test_masks_of_many_are_those_of_each_alone() -> None:
    matchers = [compile_(regex=f"[a-{end}]+") for end in "cegikmo"]
    together = masks_of(COMPILER, matchers)
    assert len(set(together)) == len(matchers)
    assert together == [masks_of(COMPILER, [matcher])[0] for matcher in matchers]
    assert {len(mask) for mask in together} == {-(-VOCAB_SIZE // 32) * 4}


def test_copies_go_their_own_ways() -> None:
    first = compile_(regex="ab|cd")
    second = first.copy()
    a, b, c, d = encode("abcd")
    assert first.accept(a) and second.accept(c)
    assert (allowed(first), allowed(second)) == ([b], [d])


def test_a_token_against_the_grammar_is_an_error_and_spends_the_family() -> None:
    first = compile_(regex="ab")
    assert not first.copy().family.is_spent
    second = first.copy()
    assert not second.accept(encode("x")[0])
    assert second.error and "\n" not in second.error
    assert first.family.is_spent and first.error is None


def test_many_copies_spend_the_family() -> None:
    matcher = compile_(regex="ab")
    for _ in range(grammar_module.MAX_COPIES - 1):  # it is one itself
        assert not matcher.family.is_spent
        matcher.copy()
    assert matcher.family.is_spent


def test_a_lexer_whose_first_mask_is_beyond_its_limit_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not when outputs have begun."""
    monkeypatch.setattr(grammar_source, "MAX_LEXER_STATES", 3)
    with pytest.raises(ValueError, match=r"structured_outputs\.regex cannot be used: .*states"):
        compile_(regex="(a|b|c)*(abc|bcd|cde)[a-z]{3,50}")


def test_a_lexer_beyond_its_limit_ends_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_source, "MAX_LEXER_STATES", 2000)
    matcher = compile_(regex="(.*a.{50}|[a-z]+@[a-z]+)*")
    rng = np.random.default_rng(0)
    for _ in range(500):
        ids = allowed(matcher)
        if matcher.error or not matcher.accept(int(rng.choice(ids[1:]))):
            break
    assert matcher.error is not None and "too many states" in matcher.error


def test_tokens_generated_before_are_replayed() -> None:
    matcher = compile_(regex="abcd")
    a, b, c, d = encode("abcd")
    matcher.replay([a, b])
    assert allowed(matcher) == [c]
    with pytest.raises(ValueError, match=r"output_token_ids\[1\] does not fit the grammar"):
        compile_(regex="abcd").replay([a, a])
    with pytest.raises(ValueError, match=r"output_token_ids\[3\] .* complete already"):
        compile_(regex="abcd").replay([a, b, c, d])


def info(**changes: Any) -> WorkerInfo:
    facts = {"vocab_size": VOCAB_SIZE, "eos_token_ids": [EOS_ID], **changes}
    return WorkerInfo(
        device="fake",
        dtype="none",
        attention_backend="none",
        architecture="Fake",
        num_blocks=2,
        max_model_len=2,
        **facts,
    )


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 40, VOCAB_SIZE, VOCAB_SIZE + 77])
def test_masks_are_as_wide_as_the_model(vocab_size: int) -> None:
    compiler = GrammarCompiler(tokenizer_json, info(vocab_size=vocab_size))
    matcher = compiler.compile(StructuredOutputsParams(regex="[a-z]+")).matcher()
    (mask,) = masks_of(compiler, [matcher])
    assert len(mask) == -(-vocab_size // 32) * 4
    assert max(allowed_ids(mask)) < VOCAB_SIZE


def test_every_eos_of_the_model_may_end_an_output() -> None:
    compiler = GrammarCompiler(tokenizer_json, info(eos_token_ids=[EOS_ID, 999]))
    matcher = compiler.compile(StructuredOutputsParams(regex="a*")).matcher()
    (mask,) = masks_of(compiler, [matcher])
    assert {EOS_ID, 999} <= set(allowed_ids(mask))


def test_the_tokenizer_is_loaded_once_with_the_first_grammar() -> None:
    calls: list[str] = []

    def load() -> str:
        calls.append(threading.current_thread().name)
        return tokenizer_json()

    compiler = GrammarCompiler(load, info())
    assert not calls
    threads = [threading.Thread(target=compiler.load) for _ in range(4)]
    run_all(threads)
    assert len(calls) == 1


def run_all(threads: list[threading.Thread]) -> None:
    start: Callable[[threading.Thread], None] = threading.Thread.start
    for thread in threads:
        start(thread)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("before", "text"),
    [
        ("", "ab"),
        ("hm, </thin or <b></think", "ab"),
        ("</</th</think</think</think", "ab"),
    ],
)
def test_a_grammar_may_begin_after_a_text(before: str, text: str) -> None:
    matcher = compile_(regex="ab|c", after="</think>")
    for token_id in encode(before + ("" if before else "</think") + ">"):
        assert matcher.free_text is not None
        assert allowed(matcher) == [i for i in range(VOCAB_SIZE) if i != EOS_ID]
        assert matcher.accept(token_id)
    assert matcher.free_text is None and fits(matcher, text)


def test_a_copy_waits_for_its_own_text_and_generated_tokens_are_replayed() -> None:
    first = compile_(regex="ab", after="ed")
    first.replay(encode("we"))
    second = first.copy()
    second.replay(encode("d"))
    assert (first.free_text is None, second.free_text is None) == (False, True)
    masks = masks_of(COMPILER, [first, second] * 3)
    assert masks[::2] == masks[:1] * 3 and masks[1::2] == masks[1:2] * 3
    assert allowed_ids(masks[1]) == allowed(compile_(regex="ab"))
    first.replay(encode("dab")[:-1])
    assert allowed(first) == encode("b")


def test_what_stands_behind_the_text_in_one_token_is_of_the_grammar() -> None:
    (token_id,) = [i for i in range(VOCAB_SIZE) if decode((i,)) == "abc"]
    matcher = compile_(regex="cde", after="ab")
    assert matcher.accept(token_id) and matcher.error is None
    assert fits(matcher, "de")
    matcher = compile_(regex="x", after="ab")
    assert not matcher.accept(token_id) and matcher.error is not None
