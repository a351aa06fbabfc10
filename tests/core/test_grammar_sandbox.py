"""Grammars that crash, exhaust or stall llguidance do so in the sandbox, and are refused."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from benchmarks.fuzz_grammars import POISONS, SLOW_POISONS, Wanted, follow, random_wanted, try_all
from nanovllm.core import grammar_sandbox, grammar_trial
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.grammar_sandbox import (
    CAUSES,
    MAX_IDLE,
    STACK_BYTES,
    START_S,
    GrammarSandbox,
    _ask,
    _stack_bytes,
    has_news,
)
from nanovllm.core.grammar_source import make_tokenizer
from nanovllm.core.grammar_trial import Trial, Verdict
from nanovllm.sampling_params import StructuredOutputsParams
from tests.core.fake_executor import VOCAB_SIZE
from tests.core.vocabulary import make_compiler, tokenizer_json
from tests.e2e.processes import alive, wait_until
from tests.waiting import WAIT_S

ROOT = Path(__file__).parent.parent.parent
EASY = StructuredOutputsParams(regex="[a-z]+")
ENDLESS = StructuredOutputsParams(**POISONS["optional groups"])  # minutes, without a limit
STACK, MEMORY, TIME = (CAUSES[one] for one in (signal.SIGSEGV, signal.SIGABRT, signal.SIGPROF))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[GrammarSandbox]:
    """Its limit of time is one of processor time, so that it is the same on a slow machine."""
    with GrammarSandbox(timeout_s=2.0) as made:
        made.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        yield made


@pytest.fixture(scope="module")
def compiler(sandbox: GrammarSandbox) -> GrammarCompiler:
    return make_compiler(sandbox)


def workers_of(sandbox: GrammarSandbox) -> list[int]:
    assert sandbox._process is not None
    return children_of(sandbox._process.pid)


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.parametrize("name", POISONS)
def test_a_poison_is_refused_in_time_with_its_cause(sandbox: GrammarSandbox, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"structured_outputs\.\w+ (cannot be used|holds|nests)"):
        sandbox.try_out(StructuredOutputsParams(**POISONS[name]))
    assert time.monotonic() - start < WAIT_S
    sandbox.try_out(EASY)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("allOf chain", STACK),
        ("anyOf chain", STACK),
        ("oneOf chain", STACK),
        ("rule chain", STACK),
        ("terminal chain", STACK),
        ("left recursion", STACK),
        ("multiples", TIME),
    ],
)
def test_the_cause_says_which_bound_was_met(sandbox: GrammarSandbox, name: str, cause: str) -> None:
    with pytest.raises(ValueError) as refusal:
        sandbox.try_out(StructuredOutputsParams(**POISONS[name]))
    assert cause in str(refusal.value)


def test_memory_is_bounded() -> None:
    with GrammarSandbox(timeout_s=60.0) as patient:
        patient.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        with pytest.raises(ValueError) as refusal:
            patient.try_out(ENDLESS)
    assert MEMORY in str(refusal.value)


@pytest.mark.parametrize("name", SLOW_POISONS)
def test_what_grows_too_dear_ends_its_output(compiler: GrammarCompiler, name: str) -> None:
    """By the sandbox, by llguidance's limits, or it stays within its means."""
    wanted = StructuredOutputsParams(**SLOW_POISONS[name])
    start = time.process_time()
    try:
        follow(compiler, wanted, random.Random(0))
    except ValueError as refusal:
        assert "cannot be used" in str(refusal)
    assert time.process_time() - start < WAIT_S


def test_a_worker_takes_one_trial_after_another(sandbox: GrammarSandbox) -> None:
    sandbox.try_out(EASY)
    before = workers_of(sandbox)
    for number in range(5):
        sandbox.try_out(StructuredOutputsParams(regex=f"a{number}"))
        with pytest.raises(ValueError, match=r"structured_outputs\.regex cannot be used"):
            sandbox.try_out(StructuredOutputsParams(regex=f"(a{number}"))
    assert workers_of(sandbox) == before


def test_a_busy_machine_refuses_nothing() -> None:
    """A trial that is held up takes no processor time."""
    with GrammarSandbox(timeout_s=0.5) as sandbox:
        sandbox.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        sandbox.try_out(EASY)
        (pid,) = workers_of(sandbox)
        os.kill(pid, signal.SIGSTOP)
        passed = threading.Thread(target=sandbox.try_out, args=[EASY])
        passed.start()
        time.sleep(1.0)
        os.kill(pid, signal.SIGCONT)
        passed.join(WAIT_S)
        assert not passed.is_alive() and workers_of(sandbox) == [pid], "it has passed"


def test_trials_do_not_wait_for_a_long_one() -> None:
    """As long as those take whose workers a signal has stopped, until another says it was long."""
    refused: list[str] = []
    with GrammarSandbox(timeout_s=WAIT_S) as sandbox:
        sandbox.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        sandbox.try_out(EASY)

        def try_endless() -> None:
            try:
                sandbox.try_out(ENDLESS)
            except ValueError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=try_endless) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(workers_of(sandbox)) == 3, timeout_s=WAIT_S, what="3 workers")
        stopped = workers_of(sandbox)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        for number in range(5):
            sandbox.try_out(StructuredOutputsParams(regex=f"b{number}"))
        assert not refused, "the easy ones were first"
        for pid in stopped:
            os.kill(pid, signal.SIGPROF)
            os.kill(pid, signal.SIGCONT)
        for thread in threads:
            thread.join(WAIT_S)
    assert len(refused) == 3 and all(TIME in cause for cause in refused)


def test_few_workers_are_kept_and_none_that_has_grown() -> None:
    """One that is not kept ends."""
    with GrammarSandbox(timeout_s=WAIT_S) as sandbox:
        sandbox.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        links = [sandbox._borrow() for _ in range(MAX_IDLE + 2)]
        for link in links:
            assert isinstance(_ask(link, Trial(EASY, WAIT_S)), Verdict)
        assert len(workers_of(sandbox)) == len(links)
        sandbox._give_back(links[0], spent=True)
        for link in links[1:]:
            sandbox._give_back(link, spent=False)
        wait_until(
            lambda: len(workers_of(sandbox)) == MAX_IDLE, timeout_s=WAIT_S, what="two that are left"
        )
        kept = workers_of(sandbox)
        again = [sandbox._borrow() for _ in range(MAX_IDLE)]
        for link in again:
            assert isinstance(_ask(link, Trial(EASY, WAIT_S)), Verdict)
            link.close()
        assert {one.fileno() for one in links} == {-1} and set(kept) >= set(workers_of(sandbox))


@pytest.mark.parametrize("which", ["worker", "process"])
def test_one_killed_by_somebody_else_is_replaced(sandbox: GrammarSandbox, which: str) -> None:
    sandbox.try_out(EASY)
    assert sandbox._process is not None
    killed = workers_of(sandbox) if which == "worker" else [sandbox._process.pid]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    sandbox.try_out(EASY)


def test_one_whose_end_is_not_known_yet_is_replaced(
    sandbox: GrammarSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process closes its sockets before its owner can learn of its end."""
    sandbox.try_out(EASY)
    process = sandbox._process
    assert process is not None and sandbox._idle
    with monkeypatch.context() as patch:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        patch.setattr(process, "poll", lambda: None)
        for link in sandbox._idle:
            wait_until(lambda link=link: has_news(link), timeout_s=WAIT_S, what="a worker's end")
        sandbox.try_out(EASY)
    assert sandbox._process is not process


def test_it_has_less_stack_than_any_thread_of_the_core() -> None:
    """A Rust thread has 2 MiB, a thread that compiles 16, and the main thread what is set."""
    assert STACK_BYTES <= 1 << 20
    program = (
        "import resource\nfrom nanovllm.core.grammar_sandbox import _stack_bytes\n"
        "print(_stack_bytes(), resource.getrlimit(resource.RLIMIT_STACK)[0])"
    )
    said = subprocess.run(
        ["bash", "-c", f"ulimit -s 1024; exec {sys.executable} -c '{program}'"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    mine, main_thread = map(int, said.split())
    assert main_thread == 1 << 20 and mine == main_thread // 2
    assert _stack_bytes() <= STACK_BYTES


OWNER = """
import sys, threading
from nanovllm.core.grammar_sandbox import GrammarSandbox
from tests.core.test_grammar_sandbox import EASY, ENDLESS, VOCAB_SIZE, tokenizer_json
sandbox = GrammarSandbox(timeout_s=120.0)
sandbox.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
sandbox.try_out(EASY)
threading.Thread(target=sandbox.try_out, args=(ENDLESS,), daemon=True).start()
print(sandbox._process.pid, flush=True)
threading.Event().wait()
"""


def test_it_dies_with_its_owner_even_amid_a_trial() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid = int(owner.stdout.readline())
    wait_until(lambda: children_of(pid), timeout_s=WAIT_S, what="a worker")
    workers = children_of(pid)
    owner.kill()
    owner.wait()
    for one in [pid, *workers]:
        wait_until(lambda one=one: not alive(one), timeout_s=WAIT_S, what=f"the end of {one}")


def test_random_grammars_are_all_answered(compiler: GrammarCompiler) -> None:
    tally = try_all(compiler, count=400, seed=1)
    assert tally.outcomes.total() == 400
    assert tally.outcomes["whole"] > 20 and tally.outcomes["goes on"] > 20
    assert max(seconds for seconds, _ in tally.slowest) < WAIT_S


def test_the_generator_makes_every_kind() -> None:
    rng = random.Random(0)
    made: list[Wanted] = [random_wanted(rng) for _ in range(50)]
    assert {kind for one in made for kind in one} == {"json", "regex", "grammar"}


def test_the_trial_follows_tokens_that_the_grammar_allows() -> None:
    rng = random.Random(1)
    for _ in range(300):
        allowed = {rng.randrange(200) for _ in range(rng.randrange(1, 9))}
        mask = bytearray(25)
        for token_id in allowed:
            mask[token_id // 8] |= 1 << token_id % 8
        assert grammar_trial._pick(bytes(mask), rng) in allowed


def test_a_grammar_that_ends_its_process_twice_without_a_word_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first time somebody else may have killed it."""
    asked: list[socket.socket] = []
    monkeypatch.setattr(GrammarSandbox, "_borrow", lambda self: socket.socket())
    monkeypatch.setattr(grammar_sandbox, "_ask", lambda link, trial: asked.append(link))
    sandbox = GrammarSandbox(timeout_s=WAIT_S)
    with pytest.raises(ValueError, match=r"structured_outputs\.regex .*it may need too much"):
        sandbox.try_out(EASY)
    assert [link.fileno() for link in asked] == [-1, -1], "each is closed"


def test_what_a_worker_measures_of_itself() -> None:
    memory = psutil.Process().memory_info()
    assert abs(grammar_trial._address_space_bytes() - memory.vms) < 64 << 20
    assert grammar_trial._peak_bytes() >= memory.rss - (64 << 20)


def test_frames_come_whole_or_not_at_all() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # so it comes in pieces
        trial = Trial(StructuredOutputsParams(regex="a" * 16_000), 1.0)
        sender = threading.Thread(target=grammar_trial.send_frame, args=(ours, trial))
        sender.start()
        frame = grammar_trial.receive_frame(theirs)
        sender.join(WAIT_S)
        assert frame is not None and msgspec.msgpack.decode(frame, type=Trial) == trial
        ours.sendall(grammar_trial.LENGTH.pack(9) + b"abc")
        ours.close()
        assert grammar_trial.receive_frame(theirs) is None


def test_a_grammar_whose_steps_are_dear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By processor time, of one step and not of all of them."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step_s
        return now

    tokenizer = make_tokenizer(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
    monkeypatch.setattr(grammar_trial, "time", SimpleNamespace(process_time=clock))
    step_s = 0.9 * grammar_trial.MAX_STEP_CPU_S
    grammar_trial.try_out(tokenizer, EASY)
    step_s = 1.2 * grammar_trial.MAX_STEP_CPU_S
    with pytest.raises(ValueError, match="a single token of its output takes 120 ms"):
        grammar_trial.try_out(tokenizer, EASY)


def test_a_sandbox_that_is_closed_leaves_nothing_open() -> None:
    """Nor does one that starts again, for another tokenizer."""

    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, children = num_open(), children_of(os.getpid())
    sandbox = GrammarSandbox(timeout_s=WAIT_S)
    for _ in range(2):
        sandbox.set_up(tokenizer_json(), vocab_size=VOCAB_SIZE, eos_token_ids=[0])
        link = sandbox._borrow()
        assert link.gettimeout() == WAIT_S + START_S
        sandbox._give_back(link, spent=False)
    assert num_open() == before + 3, "the tokenizer's text, the process's line and a worker's"
    sandbox.close()
    assert num_open() == before and children_of(os.getpid()) == children
    sandbox.close()
