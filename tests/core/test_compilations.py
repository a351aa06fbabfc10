"""Waiting for a grammar: within time, once for all that want it, and at nobody else's expense."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nanovllm.core import compilations as compilations_module
from nanovllm.core import grammar as grammar_module
from nanovllm.core.compilations import MAX_EXTRA_S, Compilations, Outcome, Waiting
from nanovllm.core.grammar import COPIES_PER_LEXER, Grammar, GrammarCompiler
from nanovllm.core.sequence import Sequence
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.core.vocabulary import make_compiler
from tests.waiting import WAIT_S


class GatedCompiler(GrammarCompiler):
    """Compiles a regex that begins with "slow" only when its gate, or that of all, opens."""

    def __init__(self) -> None:
        self._inner = make_compiler()
        self.gate = threading.Event()
        self.gates: dict[str, threading.Event] = {}
        self.asked: list[str] = []
        self.lexer_s: float | None = None  # what grammars say that one more takes; None: the truth

    def load(self) -> None:
        self._inner.load()

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        assert wanted.regex is not None
        self.asked.append(wanted.regex)
        if wanted.regex.startswith("slow"):
            assert self.gates.get(wanted.regex, self.gate).wait(WAIT_S)
        if wanted.regex == "panic":
            raise BaseException("a panic")
        grammar = self._inner.compile(wanted)
        if self.lexer_s is not None:
            grammar.lexer_s = self.lexer_s
        return grammar


class Bench:
    """Compilations with a wake-up to wait for."""

    def __init__(self) -> None:
        self.compiler = GatedCompiler()
        self.woken = threading.Event()
        self.compilations = Compilations(self.compiler, timeout_s=WAIT_S, wake=self.woken.set)
        self._over: list[tuple[Waiting, Outcome]] = []  # what ended while `until` waited

    def begin(self, regex: str, *sequences: Sequence) -> Outcome | None:
        wanted = StructuredOutputsParams(regex=regex)
        return self.compilations.begin(wanted, Waiting(list(sequences), 0, "t"))

    def collect(self, count: int = 1) -> list[tuple[Waiting, Outcome]]:
        """Collect until so many have come, those included that ended while `until` waited."""
        over, self._over = self._over, []
        deadline = time.monotonic() + WAIT_S
        while len(over) < count:
            assert time.monotonic() < deadline
            due = min(deadline, self.compilations.next_deadline) - time.monotonic()
            self.woken.wait(max(0.0, due))
            self.woken.clear()
            over += self.compilations.collect()
        return over

    def allow(self, timeout_s: float) -> None:
        """From here on a job may take so long, also one that has begun."""
        self.compilations._limit_s = timeout_s

    def until(self, condition: Callable[[], bool]) -> None:
        """Collect until a condition holds; `collect` returns what ended meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)
            self._over += self.compilations.collect()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.compiler.gate.set()


def sequence(number: int = 0) -> Sequence:
    return Sequence(0, number, [1], SamplingParams())


def test_what_is_compiled_once_is_known_from_then_on(bench: Bench) -> None:
    one, two = sequence(1), sequence(2)
    assert bench.begin("a+", one, two) is None
    assert bench.compilations.num_waiting == 2
    ((waiting, outcome),) = bench.collect()
    assert waiting.sequences == [one, two] and isinstance(outcome, Grammar)
    assert bench.begin("a+", sequence()) is outcome
    assert bench.compilations.num_waiting == 0 and bench.compiler.asked == ["a+"]


def test_a_refusal_is_known_as_well(bench: Bench) -> None:
    bench.begin("(a", sequence())
    ((_, outcome),) = bench.collect()
    assert isinstance(outcome, ValueError) and "structured_outputs.regex" in str(outcome)
    assert bench.begin("(a", sequence()) is outcome


def test_all_that_want_one_grammar_wait_for_one_job(bench: Bench) -> None:
    for number in range(5):
        bench.begin("slow", sequence(number))
    bench.compiler.gate.set()
    over = bench.collect(5)
    assert [waiting.sequences[0].number for waiting, _ in over] == list(range(5))
    assert bench.compiler.asked == ["slow"]


def test_a_spent_family_is_compiled_afresh(bench: Bench) -> None:
    bench.begin("a+", sequence())
    ((_, outcome),) = bench.collect()
    assert isinstance(outcome, Grammar)
    outcome.matcher().family.failed = True
    assert bench.begin("a+", sequence()) is None
    ((_, fresh),) = bench.collect()
    assert fresh is not outcome


def test_as_many_lexers_as_outputs_want_that_begin_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 3)
    bench.compiler.lexer_s = 0.01 * MAX_EXTRA_S
    bench.begin("slow b+", *map(sequence, range(COPIES_PER_LEXER)))
    bench.begin("slow b+", *map(sequence, range(COPIES_PER_LEXER)))
    bench.compiler.gate.set()
    over = bench.collect(2)
    assert [outcome.num_lexers for _, outcome in over if isinstance(outcome, Grammar)] == [3, 3]
    for regex, share, num_lexers in (("c+", 0.6, 2), ("d+", 1.5, 1)):
        bench.compiler.lexer_s = share * MAX_EXTRA_S
        bench.begin(regex, *map(sequence, range(2 * COPIES_PER_LEXER)))
        ((_, outcome),) = bench.collect()
        assert isinstance(outcome, Grammar) and outcome.num_lexers == num_lexers, "no more in time"


def test_a_thread_that_is_done_before_begin_returns_has_seen_the_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LEXERS", 3)
    bench.compiler.lexer_s = 0.01 * MAX_EXTRA_S
    monkeypatch.setattr(bench.compilations, "_start_thread", lambda target: target())
    assert bench.begin("a+", *map(sequence, range(COPIES_PER_LEXER))) is None
    ((_, outcome),) = bench.collect()
    assert isinstance(outcome, Grammar) and outcome.num_lexers == 2


def test_only_so_many_are_remembered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations_module, "MAX_REMEMBERED", 2)
    for regex in ("a", "b", "c"):
        bench.begin(regex, sequence())
        bench.collect()
    assert bench.begin("a", sequence()) is None
    assert bench.begin("c", sequence()) is not None


def test_those_asked_for_last_are_remembered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations_module, "MAX_REMEMBERED", 2)
    for regex in ("a", "b"):
        bench.begin(regex, sequence())
        bench.collect()
    assert bench.begin("a", sequence()) is not None
    bench.begin("c", sequence())
    bench.collect()
    assert bench.begin("a", sequence()) is not None, "it was asked for after b"
    assert bench.begin("b", sequence()) is None


def test_a_sequence_that_is_withdrawn_does_not_come(bench: Bench) -> None:
    gone, stays, alone = sequence(1), sequence(2), sequence(3)
    bench.begin("slow 1", gone, stays)
    bench.begin("slow 2", alone)
    for one in (gone, alone, gone):
        bench.compilations.withdraw(one)
    assert bench.compilations.num_waiting == 1
    bench.compiler.gate.set()
    ((waiting, _),) = bench.collect()
    assert waiting.sequences == [stays]


def test_a_panic_costs_one_request(bench: Bench) -> None:
    bench.begin("panic", sequence())
    bench.begin("a", sequence())
    outcomes = {type(outcome) for _, outcome in bench.collect(2)}
    assert outcomes == {ValueError, Grammar}


def test_what_takes_too_long_is_refused_in_time_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilations_module, "MAX_THREADS", 2)
    bench = Bench()
    for number in range(2):  # they fill the threads
        bench.begin(f"slow {number}", sequence(number))
    bench.until(lambda: len(bench.compiler.asked) == 2)
    bench.allow(0.15)
    over = bench.collect(2)
    assert len(over) == 2
    assert all("not compiled within 0.15 s" in str(outcome) for _, outcome in over)
    assert bench.compilations.next_deadline == float("inf")
    assert isinstance(bench.begin("slow 0", sequence()), ValueError), "it is known to be slow"
    bench.allow(WAIT_S)
    bench.begin("a", sequence(3))
    ((waiting, outcome),) = bench.collect()
    assert waiting.sequences[0].number == 3 and isinstance(outcome, Grammar)
    bench.compiler.gate.set()  # late, but then it is there
    bench.until(lambda: isinstance(bench.begin("slow 0", sequence()), Grammar))


def test_one_that_never_got_a_thread_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations_module, "MAX_THREADS", 1)
    monkeypatch.setattr(compilations_module, "MAX_LATE", 0)
    bench = Bench()
    bench.begin("slow", sequence(1))
    bench.until(lambda: bench.compiler.asked == ["slow"])
    bench.begin("a", sequence(2))
    bench.allow(0.15)
    over = bench.collect(2)
    assert all(isinstance(outcome, ValueError) for _, outcome in over)
    assert bench.compiler.asked == ["slow"]
    bench.allow(WAIT_S)
    bench.compiler.gate.set()
    bench.until(lambda: isinstance(bench.begin("b", sequence(3)), Grammar))


def test_a_thread_that_comes_back_late_ends_while_another_has_taken_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilations_module, "MAX_THREADS", 1)
    bench = Bench()
    gates = bench.compiler.gates
    for regex in ("slow 1", "slow 2", "slow 3"):
        gates[regex] = threading.Event()
    bench.allow(0.0)
    bench.begin("slow 1", sequence(1))
    bench.until(lambda: bench.compiler.asked == ["slow 1"])
    bench.collect(1)
    bench.allow(WAIT_S)
    bench.begin("slow 2", sequence(2))
    bench.begin("slow 3", sequence(3))
    bench.until(lambda: bench.compiler.asked == ["slow 1", "slow 2"])
    gates["slow 1"].set()
    bench.until(lambda: bench.compilations._num_threads == 1)
    assert bench.compiler.asked == ["slow 1", "slow 2"], "there is one thread, which is busy"
    gates["slow 2"].set()
    gates["slow 3"].set()
    assert [waiting.sequences[0].number for waiting, _ in bench.collect(2)] == [2, 3]


def test_without_a_compiler_it_is_refused() -> None:
    compilations = Compilations(None, timeout_s=1, wake=lambda: None)
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        compilations.begin(StructuredOutputsParams(regex="a"), Waiting([sequence()], 0, "t"))
    assert not compilations.has_news and compilations.num_waiting == 0


def test_threads_go_on_with_what_is_queued_while_the_loop_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is collected, so nothing but the threads themselves can start the later ones."""
    monkeypatch.setattr(compilations_module, "MAX_THREADS", 1)
    bench = Bench()
    for number in range(5):
        bench.begin("a" * (number + 1), sequence(number))
    deadline = time.monotonic() + WAIT_S
    while len(bench.compiler.asked) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert [waiting.sequences[0].number for waiting, _ in bench.collect(5)] == list(range(5))
