"""Masks of a batch, forced tokens, dead ends, and what a slow grammar costs others."""

import json
import random
import time
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.structured import CASES
from nanovllm.config import EngineConfig
from nanovllm.core import grammar as grammar_module
from nanovllm.core.compilations import Compilations
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import (
    COPIES_PER_LEXER,
    LOOK_INTERVAL,
    Grammar,
    GrammarCompiler,
    MasksAtHand,
    Matcher,
    share_out,
)
from nanovllm.core.kept_masks import single
from nanovllm.core.sequence import Sequence
from nanovllm.protocol.messages import AddRequest
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core.fake_executor import VOCAB_SIZE, FakeExecutor, allowed_ids
from tests.core.places import kept_mask, unkept
from tests.core.vocabulary import decode, make_compiler, tokenizer_json
from tests.waiting import WAIT_S

COMPILER = make_compiler()
EOS_ID = 0


def grammar_of(**wanted: Any) -> Grammar:
    return COMPILER.compile(StructuredOutputsParams(**wanted))


def matcher_of(**wanted: Any) -> Matcher:
    return grammar_of(**wanted).matcher()


def encode(text: str) -> list[int]:
    return Tokenizer.from_str(tokenizer_json()).encode(text).ids


def matcher_whose_masks_are_not_kept() -> Matcher:
    """But for the first, which it is beyond."""
    matcher = matcher_of(grammar='start: "x" ("ab" | "cd")')
    assert matcher.accept(encode("x")[0])
    return matcher


def allowed(matcher: Matcher) -> list[int]:
    return allowed_ids(COMPILER.compute_masks([matcher])[0].tobytes())


# ---- masks of a batch


def test_masks_of_many_are_an_array() -> None:
    matchers = [matcher_of(regex=f"[a-{end}]+") for end in "cegikmo"]
    words = COMPILER.compute_masks(matchers)
    assert words.shape == (7, -(-VOCAB_SIZE // 32)) and words.dtype == np.int32
    alone = [COMPILER.compute_masks([one])[0].copy() for one in matchers]
    assert np.array_equal(words, alone)
    assert np.array_equal(COMPILER.compute_masks(matchers), alone)
    many = COMPILER.compute_masks(matchers * 1 + [one.copy() for one in matchers * 5])
    assert np.array_equal(many, alone * 6)


def test_outputs_that_have_not_begun_share_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind of grammar it is; but not once they have begun."""
    made: list[Matcher] = []
    compute = GrammarCompiler._compute_one_by_one

    def note(
        self: GrammarCompiler, matchers: list[Matcher], begun: list[int], lines: list[int]
    ) -> None:
        made.extend(matchers[index] for index in begun)
        compute(self, matchers, begun, lines)

    monkeypatch.setattr(GrammarCompiler, "_compute_one_by_one", note)
    for wanted, is_forced in (
        ({"grammar": "start: /[a-z]+/ start?"}, False),
        ({"json": {"type": ["integer", "string"]}}, False),
        ({"regex": "(fine|good)[!]"}, False),
        ({"regex": "fine"}, True),
    ):
        grammar = grammar_of(**wanted)
        made.clear()
        one, begun = grammar.matcher(), grammar.matcher()
        first = allowed(one)
        assert made == [], "it is known, or a token is forced"
        assert bool(one.forced_tokens(1)) == is_forced and is_forced == (len(first) == 1)
        first_kept = one.family.known.first.kept
        first_kept.line, first_kept.given, first_kept.forced = -1, None, None
        assert allowed(one) == first and made == ([] if is_forced else [one])
        assert kept_mask(begun, COMPILER) == COMPILER.compute_masks([one])[0].tobytes()
        assert begun.accept(first[-1]) or begun.error is None
        assert kept_mask(begun, COMPILER) is None


def test_a_slow_one_is_searched_for_after_a_batch_that_took_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search times each mask, which are computed one by one. One that finds nobody is not
    repeated soon: many masks take long together."""
    compiler = make_compiler()
    compiler.load()
    matchers = [matcher_whose_masks_are_not_kept() for _ in range(4)]

    def is_searched(batch_s: float, mask_s: float = 0.0) -> bool:
        """Compute a batch that takes so long, and each mask of it, if it is timed, so long."""
        num_timed = count()
        of_batch, of_mask = (
            iter([2.0, 2.0 + batch_s]),
            (at for _ in num_timed for at in (2.0, 2.0 + mask_s)),
        )
        clock = SimpleNamespace(perf_counter=lambda: next(of_batch))
        monkeypatch.setattr(grammar_module, "time", clock)
        monkeypatch.setattr(Matcher, "clock", property(lambda self: lambda: next(of_mask)))
        compiler.compute_masks(matchers)
        return next(num_timed) > 0

    edge_s, slow_s, interval = 2**-7, 2**-6, LOOK_INTERVAL
    monkeypatch.setattr(grammar_module, "SLOW_S", edge_s)  # about as it is, and exact in sums
    assert not is_searched(edge_s)
    assert not is_searched(slow_s), "the batch before was quick enough"
    assert is_searched(slow_s, edge_s) and is_searched(slow_s, slow_s), "until none is slow"
    assert is_searched(edge_s, slow_s) and not is_searched(slow_s)
    found = [is_searched(slow_s) for _ in range(2 * interval + 1)]
    assert [index for index, one in enumerate(found) if one] == [0, interval, 2 * interval]


def test_anything_but_an_end_may_come_before_a_grammar_begins() -> None:
    """In a batch with one that has failed, whose row nobody looks at."""
    free, begun = matcher_of(regex="ab", after="x"), matcher_of(regex="ab")
    for token_id in encode("cd"):
        assert free.accept(token_id)
    words = COMPILER.compute_masks([begun, free])
    assert allowed_ids(words[1].tobytes()) == [i for i in range(VOCAB_SIZE) if i != EOS_ID]
    assert allowed_ids(words[0].tobytes()) == allowed(begun) != []
    assert free.accept(encode("x")[0]) and allowed(free) == allowed(begun)


def test_a_row_that_has_failed_leaves_the_others_theirs() -> None:
    good, bad = [matcher_of(regex="15?") for _ in range(5)], matcher_of(regex="15?")
    assert not bad.accept(encode("x")[0]) and bad.error
    words = COMPILER.compute_masks([*good[:3], bad, *good[3:]])
    assert [allowed_ids(words[index].tobytes()) for index in (0, 1, 2, 4, 5)] == [encode("1")] * 5


@pytest.mark.parametrize("worth", [0.0, 1e9])
@pytest.mark.parametrize("look_first", [0, 99])
def test_masks_are_begun_beside_the_loop_or_at_once(
    worth: float, look_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they force is looked for before them or behind them."""
    monkeypatch.setattr(grammar_module, "WORTH_A_THREAD_S", worth)
    monkeypatch.setattr(grammar_module, "LOOK_FIRST", look_first)
    matchers = [matcher_of(regex="the end"), *(matcher_of(regex=f"[a-{x}]+") for x in "cegik")]
    COMPILER.compute_masks(list(map(unkept, matchers)))
    begun = COMPILER.begin_masks(matchers)
    assert isinstance(begun, MasksAtHand) == bool(worth)
    forced = begun.result().forced
    assert forced == {0: matchers[0].forced_tokens(99)} and len(forced[0]) > 1
    expected = [allowed(one) for one in matchers]
    words = COMPILER.begin_masks(matchers).result().words
    assert [allowed_ids(row.tobytes()) for row in words] == expected


@pytest.mark.parametrize("token_id", [0, 31, 32, 63, VOCAB_SIZE - 1])
def test_the_mask_of_a_forced_token_is_its_bit(token_id: int) -> None:
    assert allowed_ids(single(token_id, -(-VOCAB_SIZE // 32)).tobytes()) == [token_id]


def test_a_token_that_must_come_next_needs_no_mask() -> None:
    matchers = [matcher_of(regex="[ab]c"), matcher_of(regex="a")]
    other, (a,) = allowed(matchers[0]), encode("a")
    for _ in range(2):
        words = COMPILER.compute_masks(matchers)
        assert [allowed_ids(row.tobytes()) for row in words] == [other, [a]]


def test_one_long_mask_among_short_ones_wakes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = make_compiler()
    compiler.load()
    matcher = matcher_whose_masks_are_not_kept()
    batch_s = [0.0, 0.1, 0.0, 0.1, 0.1, 0.0]
    readings = (at for end in batch_s for at in (0.0, 0.0, 0.0, end))  # of a batch, and of a mask
    clock = SimpleNamespace(perf_counter=lambda: next(readings))
    monkeypatch.setattr(grammar_module, "time", clock)
    compiler.compute_masks([matcher])
    at_once = []
    for _ in range(5):
        begun = compiler.begin_masks([matcher])
        at_once.append(isinstance(begun, MasksAtHand))
        begun.result()
    assert at_once == [True, True, True, True, False]


def test_what_goes_wrong_beside_the_loop_is_told_where_masks_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no masks today")

    matcher = matcher_whose_masks_are_not_kept()
    monkeypatch.setattr(COMPILER, "_compute", fail)
    for worth in (0.0, 1e9):
        monkeypatch.setattr(grammar_module, "WORTH_A_THREAD_S", worth)
        with pytest.raises(RuntimeError, match="no masks today"):
            COMPILER.begin_masks([matcher]).result()


# ---- several lexers


def test_a_grammar_that_many_use_gets_more_lexers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 3)
    grammar = grammar_of(regex="[a-z]{3}")
    assert not grammar.wants_lexer(), "nobody uses it yet"
    first = [grammar.matcher() for _ in range(COPIES_PER_LEXER)]
    assert len({id(one.family) for one in first}) == 1
    assert grammar.wants_lexer() and not grammar.wants_lexer(), "asked for once"
    grammar.add_lexer()
    second = [grammar.matcher() for _ in range(COPIES_PER_LEXER)]
    assert first[0].family not in [one.family for one in second], "the newer has fewer"
    assert grammar.wants_lexer()
    grammar.add_lexer()
    more = [grammar.matcher() for _ in range(10 * COPIES_PER_LEXER)]
    assert len({id(one.family) for one in more}) == 3 and not grammar.wants_lexer()
    masks = COMPILER.compute_masks(list(map(unkept, (first[0], second[0], more[0]))))
    assert len({row.tobytes() for row in masks}) == 1
    for one in more:
        one.family.failed = one.family is not first[0].family
    assert grammar.matcher().family is first[0].family and not grammar.is_spent
    first[0].family.failed = True
    assert grammar.is_spent and not grammar.renewed().is_spent


def test_old_lexers_are_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_COPIES", 3)
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 2)
    grammar = grammar_of(regex="[a-z]{5}")
    grammar.add_lexer()
    old = [grammar.matcher() for _ in range(6)]
    assert all(one.family.is_spent for one in old) and not grammar.is_spent, "they serve still"
    assert grammar.wants_lexer() and not grammar.wants_lexer()
    grammar.add_lexer()
    fresh = grammar.matcher().family
    assert grammar.num_lexers == 2 and fresh not in [one.family for one in old]
    assert grammar.wants_lexer(), "the other is old as well"
    grammar.add_lexer()
    assert not grammar.wants_lexer()


def test_masks_of_several_lexers_are_what_one_thread_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 3)
    compiler = make_compiler()
    grammars = [
        compiler.compile(StructuredOutputsParams(regex=regex)) for regex in ("[a-c]{9}", "[ab]+")
    ]
    grammars[0].add_lexer()
    grammars += [compiler.compile(StructuredOutputsParams(regex=f"c{{{n}}}a")) for n in (1, 2, 3)]
    matchers = [unkept(grammars[index % 5].matcher()) for index in range(20)]
    assert len({one.family for one in matchers}) == 6, "more than there are threads"
    for step in range(3):
        together = compiler.compute_masks(matchers).copy()
        alone = [compiler.compute_masks([one]).copy()[0] for one in matchers]
        assert np.array_equal(together, np.stack(alone))
        for index, one in enumerate(matchers):
            allowed = np.flatnonzero(
                np.unpackbits(together[index].view(np.uint8), bitorder="little")
            )
            one.accept(int(allowed[(step + index) % len(allowed)]))


def test_a_family_is_in_one_part() -> None:
    grammars = [grammar_of(regex=regex) for regex in ("a", "b", "c")]
    matchers = [grammars[index].matcher() for index in (0, 1, 2, 0, 1, 0)]
    assert sorted(map(sorted, share_out([0, 1, 2, 3, 4, 5], matchers, 2))) == [[0, 3, 5], [1, 2, 4]]
    assert share_out([1, 4], matchers, 2) == [[1, 4]]
    assert share_out([0, 3, 2], matchers, 1) == [[0, 3, 2]]


def test_outputs_are_spread_by_those_that_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 2)
    grammar = grammar_of(regex="[a-z]{6}")
    first = [grammar.matcher() for _ in range(4)]
    grammar.add_lexer()
    second = [grammar.matcher() for _ in range(4)]
    assert {one.family for one in second}.isdisjoint(one.family for one in first)
    family = first[0].family
    first.clear()
    more = [grammar.matcher() for _ in range(4)]
    assert all(one.family is family for one in more), "its outputs have ended"


def test_compilations_add_lexers_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 2)
    grammar = grammar_of(regex="[a-z]{4}")
    compilations = Compilations(COMPILER, timeout_s=10, wake=lambda: None)
    sequences = [Sequence(0, number, [1], SamplingParams()) for number in range(COPIES_PER_LEXER)]
    compilations.constrain(sequences, grammar)
    deadline = time.monotonic() + WAIT_S
    while len(grammar._firsts) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    compilations.constrain(sequences[:1], grammar)
    assert sequences[0].matcher and sequences[1].matcher
    assert sequences[0].matcher.family is not sequences[1].matcher.family


# ---- forced tokens


@pytest.mark.parametrize("name", CASES)
def test_forced_tokens_are_what_masks_would_have_left(name: str) -> None:
    rng = random.Random(0)
    matcher = COMPILER.compile(CASES[name][0]).matcher()
    expected: list[int] = []
    for _ in range(150):
        forced = matcher.forced_tokens(100)
        assert matcher.has_forced_text or not forced
        assert forced[: len(expected)] == expected[: len(forced)]
        ids = allowed(matcher)
        if forced:
            assert ids == forced[:1]
        expected = forced[1:]
        assert matcher.forced_tokens(1) == forced[:1]
        if not matcher.accept(rng.choice(ids)):
            break
    assert matcher.error is None


def test_a_text_that_must_follow_is_forced_whole_and_may_be_taken_in_at_once() -> None:
    matcher = matcher_of(regex="12(3456789)?;")
    one, two, three = encode("123")
    assert matcher.forced_tokens(9) == [one, two]
    assert matcher.forced_tokens(1) == [one] and matcher.forced_tokens(0) == []
    assert matcher.accept(one) and matcher.accept(two)
    assert matcher.forced_tokens(9) == [], "there is a choice"
    assert matcher.accept(three)
    forced = matcher.forced_tokens(9)
    assert decode(tuple(forced)) == "456789;"
    assert [matcher.accept(token_id) for token_id in forced] == [True] * 6 + [False]
    assert matcher.error is None and matcher.forced_tokens(9) == []


def test_nothing_is_forced_before_a_grammar_begins_or_after_it_failed() -> None:
    matcher = matcher_of(regex="123", after="x")
    assert matcher.forced_tokens(9) == []
    assert matcher.accept(encode("x")[0]) and len(matcher.forced_tokens(9)) == 3
    assert not matcher.accept(encode("9")[0]) and matcher.error
    assert matcher.forced_tokens(9) == []


# ---- dead ends


def without(*letters: str) -> str:
    """The vocabulary's tokenizer.json, but for tokens with these letters."""
    tokenizer = json.loads(tokenizer_json())
    vocab = tokenizer["model"]["vocab"]
    for token in list(vocab):
        if set(token) & set(letters) and token != "<eos>":
            del vocab[token]
    return json.dumps(tokenizer)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_dead_end_is_an_error_of_its_request_and_no_whole_output(ignore_eos: bool) -> None:
    """After "a" only "z" may follow, which no token can write: EOS would be an invalid text."""
    config = EngineConfig.from_kwargs(max_inflight_steps=2, grammar_timeout_s=WAIT_S)
    executor = FakeExecutor(config, num_blocks=50, max_model_len=128)
    info = executor.start()
    core = EngineCore(config, executor, info, GrammarCompiler(lambda: without("z"), info))
    wanted = StructuredOutputsParams(grammar='start: /[a-d]/ "z"')
    params = SamplingParams(max_tokens=20, ignore_eos=ignore_eos, structured_outputs=wanted)
    core.add(0, AddRequest(0, [5], params))
    core.add(0, AddRequest(1, [5], SamplingParams(max_tokens=20, ignore_eos=True)))
    failed: list[Sequence] = []
    finished: list[Sequence] = []
    while core.busy or core.status(epoch="", num_clients=0).num_waiting:
        outputs = core.step()
        if outputs is not None:
            failed += outputs.failed
            finished += outputs.finished
    assert [(one.number, one.finish_reason) for one in failed] == [(0, "error")]
    assert failed[0].failure is not None and failed[0].failure.cause == "grammar"
    assert [(one.number, one.finish_reason) for one in finished] == [(1, "length")]


# ---- what takes long


def test_an_output_whose_steps_take_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_SLOW_S", 0.2)
    slow = matcher_of(grammar='start: x\nx: x x | x x x | "a" | ""')
    others = [matcher_of(regex="[a-z]*") for _ in range(6)]
    (a,) = encode("a")
    for _ in range(400):
        COMPILER.compute_masks([*others[:3], slow, *others[3:]])
        if not slow.accept(a):
            break
        assert all(one.accept(a) for one in others)
    assert slow.error is not None and slow.has_failed and "held others up" in slow.error
    assert not slow.accept(a) and slow.family.is_spent
    assert all(one.error is None for one in others)


def test_what_stands_still_beside_others_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the wall's clock every call takes 3 s, by the processor's hardly any time."""
    clock = SimpleNamespace(perf_counter=count(0.0, 3.0).__next__, thread_time=time.thread_time)
    monkeypatch.setattr(grammar_module, "time", clock)
    matchers = [matcher_of(regex="[a-z]*") for _ in range(3)]
    (a,) = encode("a")
    for _ in range(20):
        COMPILER.compute_masks(matchers)
        assert all(one.accept(a) and one.forced_tokens(9) == [] for one in matchers)
    assert all(one.error is None for one in matchers)


def test_slow_calls_are_held_against_an_output_by_its_own_processor_time() -> None:
    """The first by the wall's clock is none: anybody may have been slow, beside others."""
    first = matcher_of(regex="[a-z]+")
    other = first.copy()
    first.note_time(0.99 * grammar_module.SLOW_S)
    assert first.clock is time.perf_counter
    first.note_time(100 * grammar_module.MAX_SLOW_S)
    assert first.clock is time.thread_time and other.clock is time.perf_counter
    first.note_time(0.99 * grammar_module.SLOW_S)
    first.note_time(grammar_module.MAX_SLOW_S)
    assert first.error is None and not first.family.failed
    first.note_time(grammar_module.SLOW_S)
    assert first.error is not None and "has held others up for 1.0 s: simplify it" in first.error
    assert first.family.failed and other.error is None
    why = first.error
    first.note_time(grammar_module.MAX_SLOW_S)
    assert first.error == why and not first.accept(encode("a")[0])


def test_no_text_is_forced_where_an_output_is_free_or_has_failed() -> None:
    matcher = matcher_of(regex="abc")
    assert matcher.has_forced_text
    matcher.note_time(1.0)
    matcher.note_time(2.0)
    assert matcher.error is not None and not matcher.has_forced_text
    assert matcher.forced_tokens(9) == []
