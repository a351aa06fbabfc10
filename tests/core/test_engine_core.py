"""The engine loop: depth, seeds, aborts, and what a request may not ask."""

import math
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.core import engine_core
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.events import (
    Constrained,
    CoreListener,
    GrammarBegun,
    GrammarEvent,
    GrammarsCollected,
    MasksFilled,
    TokensForced,
)
from nanovllm.core.grammar import Masks, MasksUnderWay
from nanovllm.core.patience import FAR_BEYOND, NUM_RECENT_STEPS
from nanovllm.core.sequence import Sequence
from nanovllm.protocol.messages import AddRequest
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core.fake_executor import FakeExecutor, reference
from tests.core.vocabulary import decode, make_compiler
from tests.waiting import WAIT_S

EOS_ID = 0


def make_core(**settings: Any) -> EngineCore:
    config = EngineConfig.from_kwargs(grammar_timeout_s=WAIT_S, **settings)
    executor = FakeExecutor(config, num_blocks=50, max_model_len=128)
    return EngineCore(config, executor, executor.start(), make_compiler())


def drain(core: EngineCore, failed: list[Sequence] | None = None) -> dict[int, list[int]]:
    """Run until nothing is left; sequences that fail are added to `failed`."""
    token_ids: dict[int, list[int]] = {}
    while core.busy or core.status(epoch="", num_clients=0).num_waiting:
        outputs = core.step()
        if outputs is not None:
            for sequence, token_id in zip(outputs.sequences, outputs.token_ids, strict=True):
                token_ids.setdefault(sequence.number, []).append(token_id)
            if failed is not None:
                failed += outputs.failed
    return token_ids


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_so_many_steps_are_submitted_before_a_result_is_taken(depth: int) -> None:
    core = make_core(max_inflight_steps=depth)
    core.add(0, AddRequest(0, [5], SamplingParams(max_tokens=10, ignore_eos=True)))
    idle = 0
    while core.step() is None:
        idle += 1
    assert idle == depth - 1


def test_a_full_step_in_the_queue_does_not_wait_for_more_requests() -> None:
    core = make_core(max_num_batched_tokens=16, max_inflight_steps=2)
    waited = []
    for number in range(3):
        core.add(0, AddRequest(number, [5] * 10, SamplingParams(max_tokens=1)))
        waited.append(core.lets_device_wait)
    assert waited == [False, True, True]
    assert core.step() is None
    assert not core.lets_device_wait, "one is under way: there is time to take in the rest"
    assert len(drain(core)) == 3
    assert not core.lets_device_wait


def test_output_tokens_given_are_continued_as_if_generated_here() -> None:
    params = SamplingParams(max_tokens=10, seed=3, ignore_eos=True)
    whole = reference([5, 6], 3, 10, frozenset())
    core = make_core()
    core.add(0, AddRequest(0, [5, 6], params, output_token_ids=whole[:4]))
    assert drain(core)[0] == whole[4:]


def test_unseeded_requests_differ_and_follow_the_engine_seed() -> None:
    def outputs(seed: int) -> list[list[int]]:
        core = make_core(seed=seed)
        for number in range(2):
            core.add(0, AddRequest(number, [5], SamplingParams(max_tokens=6, ignore_eos=True)))
        token_ids = drain(core)
        return [token_ids[0], token_ids[1]]

    assert outputs(1) == outputs(1) != outputs(2)
    assert outputs(1)[0] != outputs(1)[1]


def test_a_number_in_use_is_refused_and_one_that_ended_is_free() -> None:
    core = make_core()
    request = AddRequest(0, [5], SamplingParams(max_tokens=2))
    core.add(0, request)
    with pytest.raises(ValueError, match="number 0 is in use"):
        core.add(0, request)
    core.add(1, request)
    drain(core)
    core.add(0, request)
    assert core.abort(0, [0])[0].finish_reason == "abort"
    assert not core.busy and core.abort(0, [0]) == []


def test_a_refused_request_queues_nothing() -> None:
    core = make_core()
    core.add(0, AddRequest(1, [5], SamplingParams()))
    with pytest.raises(ValueError, match="number 1 is in use"):
        core.add(0, AddRequest(0, [5], SamplingParams(n=3)))
    assert core.status(epoch="", num_clients=0).num_waiting == 1


def constrained(regex: str = "[a-z]{6}", **params: Any) -> SamplingParams:
    wanted = StructuredOutputsParams(regex=regex)
    return SamplingParams(max_tokens=20, structured_outputs=wanted, **params)


def test_a_constrained_request_waits_for_its_grammar_and_ends_with_it() -> None:
    core = make_core()
    core.add(0, AddRequest(0, [5], constrained(n=3)))
    status = core.status(epoch="", num_clients=0)
    assert (status.num_waiting, status.num_running) == (3, 0)
    texts = [decode(tuple(token_ids)) for token_ids in drain(core).values()]
    assert len(set(texts)) == 3 and all(re.fullmatch("[a-z]{6}", text) for text in texts)


def test_a_known_grammar_is_not_waited_for() -> None:
    core = make_core()
    core.add(0, AddRequest(0, [5], constrained()))
    drain(core)
    core.add(0, AddRequest(1, [5], constrained()))
    assert core.busy


def test_constrained_rows_run_every_step_like_free_ones() -> None:
    core = make_core(max_inflight_steps=2)
    core.add(0, AddRequest(0, [5], constrained("[a-z]{8,}", ignore_eos=True)))
    drain(core)
    for number, params in enumerate(
        [constrained("[a-z]{8,}"), SamplingParams(max_tokens=20, ignore_eos=True)]
    ):
        core.add(0, AddRequest(number, [5], params))
    counts: list[tuple[int, ...]] = []
    while len(counts) < 8:
        outputs = core.step()
        if outputs is not None:
            counts.append(tuple(sequence.number for sequence in outputs.sequences))
    assert counts == [(0, 1)] * 8


@dataclass
class Begun:
    """Masks that are there, or of which nothing is known before they are waited for."""

    masks: MasksUnderWay
    at_hand: bool

    def done(self) -> bool:
        return self.at_hand

    def result(self) -> Masks:
        return self.masks.result()

    def exception(self) -> BaseException | None:
        return self.masks.exception()


@pytest.mark.parametrize("at_hand", [True, False])
def test_who_delivers_outputs_keeps_the_device_waiting_only_for_long_masks(at_hand: bool) -> None:
    core = make_core(max_inflight_steps=2)
    begin = core.grammars.begin_masks
    core.grammars.begin_masks = (  # type: ignore[method-assign]
        lambda matchers: Begun(begin(matchers), at_hand)
    )
    core.add(0, AddRequest(0, [5], constrained("[a-z]{30,}", seed=1)))
    under_way, token_ids = list[tuple[int, bool]](), list[int]()
    while len(token_ids) < 8:
        if core.grammars.num_waiting and not core.grammars.has_news:
            time.sleep(1e-3)
        if (outputs := core.step()) is not None:
            token_ids += outputs.token_ids
            assert core.unsampled is not None
            under_way.append((len(core.inflight), core.unsampled.awaits_ids))
    assert set(under_way) == {(2, True) if at_hand else (1, False)}
    assert decode(tuple(token_ids + drain(core)[0])).isalpha()


def test_a_grammar_that_cannot_be_used_fails_its_sequences_alone() -> None:
    core = make_core()
    core.add(0, AddRequest(0, [5], SamplingParams(max_tokens=4, ignore_eos=True)))
    core.add(0, AddRequest(1, [5], constrained("(a", n=2)))
    failed: list[Sequence] = []
    assert drain(core, failed).keys() == {0}
    assert [sequence.number for sequence in failed] == [1, 2]
    assert all(one.failure and one.failure.cause == "grammar" for one in failed)
    assert not core.busy
    with pytest.raises(ValueError, match=r"structured_outputs\.regex"):  # known by now
        core.add(0, AddRequest(1, [5], constrained("(a")))
    assert not core.busy


def test_a_refused_grammar_takes_nobody_else_out_of_the_queue() -> None:
    """Those it fails have never been in the scheduler."""
    core = make_core()
    core.add(0, AddRequest(0, [5], SamplingParams(max_tokens=4, ignore_eos=True)))
    core.add(0, AddRequest(1, [5, 6], constrained("(a", n=2)))
    while not core.grammars.has_news:
        time.sleep(1e-3)
    outputs = core.step()
    assert outputs is not None and [one.number for one in outputs.failed] == [1, 2]
    status = core.status(epoch="", num_clients=0)
    assert (status.num_waiting, status.num_queued, status.num_queued_tokens) == (1, 1, 1)
    assert len(drain(core)[0]) == 4
    status = core.status(epoch="", num_clients=0)
    assert (status.num_queued, status.num_queued_tokens) == (0, 0)


def test_an_output_beyond_the_limits_of_its_grammar_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm.core.grammar_source.MAX_LEXER_STATES", 1500)
    core = make_core(max_inflight_steps=2)
    heavy = StructuredOutputsParams(regex="(.*a.{50}|[a-z]+@[a-z]+)*")
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    core.add(0, AddRequest(0, [5], msgspec.structs.replace(params, structured_outputs=heavy)))
    core.add(0, AddRequest(1, [5], params))
    failed: list[Sequence] = []
    assert len(drain(core, failed)[1]) == 127
    (sequence,) = failed
    assert (
        sequence.number == 0
        and sequence.failure is not None
        and sequence.failure.cause == "grammar"
    )
    assert "too many states" in sequence.failure.message
    status = core.status(epoch="", num_clients=0)
    assert status.num_free_blocks == status.num_blocks


def test_an_abort_reaches_those_whose_grammar_is_being_compiled() -> None:
    core = make_core()
    core.add(0, AddRequest(0, [5], constrained(n=3, seed=7)))
    (aborted,) = core.abort(0, [0])
    assert (aborted.number, aborted.finish_reason) == (0, "abort")
    token_ids = drain(core)
    assert token_ids.keys() == {1, 2}
    assert len(core.abort_client(0)) == 0 and not core.busy


def test_tokens_given_must_fit_the_grammar() -> None:
    core = make_core()
    params = constrained(seed=1)
    core.add(0, AddRequest(0, [5], params))
    whole = drain(core)[0]
    core.add(0, AddRequest(0, [5], params, output_token_ids=whole[:2]))
    assert drain(core)[0] == whole[2:]
    with pytest.raises(ValueError, match=r"output_token_ids\[0\] does not fit"):
        core.add(0, AddRequest(0, [5], params, output_token_ids=[1]))
    assert not core.busy


def test_a_grammar_outlives_ignore_eos_and_ends_at_its_own_eos() -> None:
    """EOS is sampled only where the output is whole, and ends it even with ignore_eos."""
    core = make_core()
    core.add(0, AddRequest(0, [5], constrained("a|ab|abc", ignore_eos=True)))
    (token_ids,) = drain(core).values()
    assert decode(tuple(token_ids)) in ("a", "ab", "abc")


@pytest.mark.parametrize("depth", [1, 2])
def test_what_has_nothing_left_to_sample_ends_as_an_error(depth: int) -> None:
    core = make_core(max_inflight_steps=depth)
    core.add(0, AddRequest(0, [1], SamplingParams(max_tokens=2, seed=1)))
    first, second = drain(core)[0]
    limited = SamplingParams(allowed_token_ids=[5, 6], max_tokens=2, seed=1)
    core.add(0, AddRequest(0, [1], limited, bad_words_token_ids=[[first, 5], [first, 6]]))
    core.add(0, AddRequest(1, [1], limited, bad_words_token_ids=[[first, 5], [second, 6]]))
    early = SamplingParams(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
    core.add(0, AddRequest(2, [1], early))
    failed: list[Sequence] = []
    drain(core, failed)
    assert [one.number for one in failed] == [2, 0]
    assert {one.failure and one.failure.cause for one in failed} == {"request"}


def test_seeds_of_outputs_wrap_where_numbers_end() -> None:
    core = make_core()
    params = SamplingParams(n=3, seed=2**63 - 1, max_tokens=2)
    core.add(0, AddRequest(0, [1, 2], params))
    assert [core.sequences[0, n].seed for n in range(3)] == [2**63 - 1, 0, 1]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_last_token_is_text_unless_it_is_the_eos(ignore_eos: bool) -> None:
    """A grammar that may go on ends by an EOS, which is no text; one that cannot ends before."""
    core = make_core(max_inflight_steps=1)
    core.add(0, AddRequest(0, [1], constrained("[a-z]{6}")))
    for number in range(1, 9):
        params = constrained("[a-z]{2}(bbb)?", ignore_eos=ignore_eos)
        core.add(0, AddRequest(number, [number], params))
    ended: dict[int, Sequence] = {}
    while core.busy or core.status(epoch="", num_clients=0).num_waiting:
        outputs = core.step()
        ended |= {} if outputs is None else {one.number: one for one in outputs.finished}
    assert ended[0].last_is_text
    for one in ended.values():
        assert one.finish_reason == "stop"
        assert one.last_is_text == (one.token_ids[-1] != EOS_ID)
    assert {one.last_is_text for one in ended.values()} == {False, True}


def test_a_core_whose_steps_take_long_asks_for_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many times its second longest of the recent ones: one alone may have been a stall."""
    now = 100.0
    monkeypatch.setattr(engine_core, "time", SimpleNamespace(monotonic=lambda: now))
    core = make_core()
    core.add(0, AddRequest(0, [1, 2], SamplingParams(max_tokens=60, ignore_eos=True)))
    asked: list[float] = []
    taken_s = [0.5, 9.0, 2.0, 1.0, *[0.25] * NUM_RECENT_STEPS]
    for num_steps, seconds in enumerate(taken_s, 1):
        now += seconds
        while core.status(epoch="", num_clients=1).step < num_steps:
            core.step()
        asked.append(core.status(epoch="", num_clients=1).patience_s)
    assert asked[:4] == [0.0, FAR_BEYOND * 0.5, FAR_BEYOND * 2.0, FAR_BEYOND * 2.0]
    assert asked[-1] == FAR_BEYOND * 0.25


def test_a_pause_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(engine_core, "time", SimpleNamespace(monotonic=lambda: now))
    core = make_core()
    core.add(0, AddRequest(0, [1, 2], SamplingParams(max_tokens=5)))
    core.step()
    core.pause(0)
    while core.busy:  # what was under way
        core.step()
    now += 60.0
    assert core.stalled_s == 0.0
    core.resume(0)
    assert core.busy and core.stalled_s == 0.0
    now += 2.0
    assert core.stalled_s == 2.0


def test_the_first_of_several_outputs_reports_the_prompt_for_all() -> None:
    core = make_core()
    core.add(0, AddRequest(0, [1, 2, 3], SamplingParams(n=3, prompt_logprobs=1)))
    asked = [core.sequences[0, number].params.prompt_logprobs for number in range(3)]
    assert asked == [1, None, None]


def test_a_core_counts_from_nothing() -> None:
    status = make_core().status(epoch="", num_clients=2)
    counts = {
        name: getattr(status, name)
        for name in status.__struct_fields__
        if name.startswith(("num_", "prefix_cache_"))
    }
    assert counts.pop("num_blocks") == counts.pop("num_free_blocks") == 49, "0 is nobody's"
    assert counts.pop("num_clients") == 2
    assert set(counts.values()) == {0}
    assert status.step == 0 and status.stalled_s == status.patience_s == 0.0


@pytest.mark.parametrize(
    ("regex", "num_others", "logprobs", "num_forced"),
    [
        ("[01]2345[01]", 0, None, 4),
        ("[01]2345[01]", 0, 0, 0),
        ("[01]2345[01]", 11, None, 4),
        ("[01]2345[01]", 12, None, 0),
        ("[01]2[01]", 0, None, 0),
    ],
)
def test_tokens_without_a_choice_are_forced_where_that_spares_more_than_it_costs(
    regex: str, num_others: int, logprobs: int | None, num_forced: int
) -> None:
    """A chunk makes the step of all rows longer; and who wants log-probabilities is sampled for."""
    core = make_core()
    core.add(0, AddRequest(0, [5], constrained(regex, logprobs=0)))
    drain(core)  # its grammar is known from here on
    for number in range(1, 1 + num_others):
        core.add(0, AddRequest(number, [5], SamplingParams(max_tokens=20, ignore_eos=True)))
    core.add(0, AddRequest(0, [5], constrained(regex, logprobs=logprobs)))
    assert re.fullmatch(regex, decode(tuple(drain(core)[0])))
    assert core.status(epoch="", num_clients=0).num_forced_tokens == num_forced


def test_a_client_that_leaves_while_it_is_paused_leaves_nothing_behind() -> None:
    core = make_core(max_num_seqs=1)
    for number in range(3):
        core.add(7, AddRequest(number, [5], SamplingParams(max_tokens=50)))
    core.step()
    core.pause(7)
    assert core.status(epoch="", num_clients=0).num_paused == 3
    assert [one.number for one in core.abort_client(7)] == [0, 1, 2]
    assert not core.paused_clients and not core.scheduler.waiting.parked
    core.add(7, AddRequest(3, [5], SamplingParams(max_tokens=2, ignore_eos=True)))
    assert len(drain(core)[3]) == 2


def test_a_step_that_fails_takes_along_whoever_was_admitted_on_its_prefix() -> None:
    """In a later step that is under way; others of that step go on, and nothing is kept of it."""
    config = EngineConfig.from_kwargs(block_size=4, max_inflight_steps=2)
    executor = FakeExecutor(
        config,
        num_blocks=50,
        max_model_len=128,
        fails=lambda plan: "result" if plan.step == 0 else "",
    )
    core = EngineCore(config, executor, executor.start(), make_compiler())
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    prefix = [1, 2, 3, 4]
    core.add(0, AddRequest(0, [*prefix, 5], params))
    assert core.step() is None
    core.add(0, AddRequest(1, [*prefix, 6], params))
    core.add(0, AddRequest(2, [7, 8], params))
    failed: list[Sequence] = []
    while not failed:
        outputs = core.step()
        failed += [] if outputs is None else outputs.failed
    assert sorted(one.number for one in failed) == [0, 1]
    core.add(0, AddRequest(3, [*prefix, 9], params))
    token_ids = drain(core)
    assert token_ids == {
        2: reference([7, 8], 1, 3, frozenset()),
        3: reference([*prefix, 9], 1, 3, frozenset()),
    }
    assert core.status(epoch="", num_clients=0).num_running == 0


def test_tokens_that_a_grammar_forces_are_the_first_ones_of_an_output() -> None:
    core = make_core(max_inflight_steps=1)
    before = time.monotonic()
    core.add(0, AddRequest(0, [5], constrained("abcdefgh[0-9]", seed=1)))
    while (outputs := core.step()) is None or not outputs.token_ids:
        if not core.busy:
            time.sleep(1e-3)
    (sequence,) = outputs.started
    assert len(outputs.token_ids) > 1 and before <= sequence.first_token_at <= time.monotonic()


def test_an_output_that_is_forced_to_its_end_leaves_nothing_behind() -> None:
    """It ends without a result of a step: its number is free, and its deadline is forgotten."""
    core = make_core(max_inflight_steps=1)
    ended: list[Sequence] = []
    for _ in range(3):
        core.add(0, AddRequest(0, [5], constrained("abcdefghij"), deadline_ms=1e6))
        while not ended or core.busy:
            outputs = core.step()
            ended += [] if outputs is None else outputs.finished
            if not core.busy:
                time.sleep(1e-3)
        assert [decode(tuple(one.token_ids[1:])) for one in ended] == ["abcdefghij"]
        assert core.sequences == {} and core.next_deadline == math.inf
        assert core.expire(time.monotonic() + 2e3) == []
        ended.clear()
    status = core.status(epoch="", num_clients=0)
    assert status.num_forced_tokens > 0 and status.num_running == 0
    assert status.num_free_blocks == status.num_blocks


def test_a_listener_is_told_what_becomes_of_every_grammar() -> None:
    """Known, waited for or refused; what is forced; until it listens no more."""
    told: list[Any] = []

    class Listener(CoreListener):
        def on_grammar(self, event: GrammarEvent) -> None:
            told.append(event)

    core, listener = make_core(max_inflight_steps=1), Listener()
    core.listen(listener)
    core.add(0, AddRequest(0, [5], constrained("abcdefgh[0-9]", seed=1)))
    assert told == [GrammarBegun(False)]
    drain(core)
    (collected,) = (one for one in told if isinstance(one, GrammarsCollected) and one.requests)
    assert [[one.number for one in group] for group in collected.requests] == [[0]]
    assert told.count(Constrained()) == 1 and MasksFilled() in told
    (forced,) = (one for one in told if isinstance(one, TokensForced))
    assert [sequence.number for sequence, _ in forced.runs] == [0] and not forced.ended
    told.clear()
    core.add(0, AddRequest(0, [5], constrained("abcdefgh[0-9]", seed=1)))
    assert told == [GrammarBegun(True), Constrained()]
    drain(core)
    core.add(0, AddRequest(1, [5], constrained("(a")))
    drain(core, [])
    told.clear()
    with pytest.raises(ValueError, match="regex") as refusal:
        core.add(0, AddRequest(1, [5], constrained("(a")))
    assert told == [GrammarBegun(True), Constrained(str(refusal.value))]
    told.clear()
    core.forget(listener)
    core.add(0, AddRequest(0, [5], constrained("abcdefgh[0-9]", seed=1)))
    drain(core)
    assert told == []
    executor = FakeExecutor(EngineConfig(), num_blocks=50, max_model_len=128)
    without = EngineCore(EngineConfig(), executor, executor.start(), None)
    without.listen(listener)
    with pytest.raises(ValueError, match="structured_outputs") as refusal:
        without.add(0, AddRequest(0, [5], constrained()))
    assert told == [GrammarBegun(False, str(refusal.value))]
