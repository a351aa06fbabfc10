"""Suspects begin one at a time and alone, whosever they are, and nobody waits for ever."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.core import quarantine
from nanovllm.core.quarantine import TRIAL_LIMIT_S, Held, Quarantine
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    CoreStatus,
    DeathsExplained,
    Finished,
    Goodbye,
    Outputs,
    TrialAccepted,
    TrialOffered,
    TrialOver,
)
from nanovllm.protocol.plan import StepPlan
from nanovllm.sampling_params import SamplingParams
from tests.core.fake_executor import FakeExecutor, FakeHandle, reference
from tests.core.serving import PROMPT, RawClient, add, collect, serving, status_where
from tests.waiting import WAIT_S

NO_STOP: frozenset[int] = frozenset()
ALL = reference(PROMPT, 1, 4, NO_STOP)


class Watched(FakeExecutor):
    """Remembers how many rows began in each step that began any."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, num_blocks=200, max_model_len=512)
        self.begun: list[int] = []

    def submit(self, plan: StepPlan) -> FakeHandle:
        if plan.new_rows:
            self.begun.append(len(plan.new_rows))
        return super().submit(plan)


@pytest.fixture
def executor() -> Watched:
    return Watched(EngineConfig.from_kwargs())


@pytest.fixture
def clients(tmp_path: Path, executor: Watched) -> Iterator[list[RawClient]]:
    address = f"ipc://{tmp_path}/core.sock"
    with serving(address, executor):
        clients = [RawClient(address) for _ in range(2)]
        for one in clients:
            one.greet()
        yield clients
        for one in clients:
            one.close()


def suspect(number: int = 0, **fields: float) -> AddRequest:
    return msgspec.structs.replace(add(number), is_suspect=True, **fields)


def ends(client: RawClient) -> list[Finished]:
    """Of the next message that brings any."""
    while not (outputs := client.receive(Outputs)).finished:
        pass
    return outputs.finished


def test_suspects_begin_when_their_client_knows_and_nothing_beside_them(
    clients: list[RawClient], executor: Watched
) -> None:
    first, second = clients
    for number in range(2):
        first.send(suspect(number))
    assert first.receive(TrialOffered).number == 0
    second.send(suspect())
    second.send(add(1))
    first.send(add(2))
    second.receive(CoreStatus)
    assert executor.begun == [], "nobody has accepted"
    first.send(TrialAccepted(0))
    assert collect(first, 0)[0][0] == ALL
    second.receive(CoreStatus)
    assert executor.begun == [1], "its client has not said yet that it saw a token"
    first.send(TrialOver(0))
    assert first.receive(TrialOffered).number == 1
    assert executor.begun == [1], "suspects come first: who has come since may be a poison as well"
    first.send(TrialAccepted(1))
    first.send(TrialOver(1))
    assert second.receive(TrialOffered).number == 0
    second.send(TrialAccepted(0))
    assert collect(second, 0)[0][0] == ALL
    assert sum(executor.begun) == 3
    second.send(TrialOver(0))
    assert collect(second, 1)[0][1] == collect(first, 2)[0][2] == ALL
    second.send(add(3))
    collect(second, 3)


def test_all_outputs_of_a_suspect_begin_together(
    clients: list[RawClient], executor: Watched
) -> None:
    first, _ = clients
    first.send(msgspec.structs.replace(add(0, n=3), is_suspect=True))
    assert first.receive(TrialOffered).number == 0
    first.send(TrialAccepted(0))
    token_ids, _ = collect(first, 0, 1, 2)
    assert token_ids[2] == reference(PROMPT, 3, 4, NO_STOP)


def test_who_leaves_in_a_trial_holds_up_nobody(clients: list[RawClient]) -> None:
    first, second = clients
    first.send(suspect(0))
    first.send(suspect(1))
    first.receive(TrialOffered)
    first.send(TrialAccepted(0))
    first.receive(Outputs)
    second.send(add())
    first.send(Goodbye())
    assert collect(second, 0)[0][0] == ALL
    status_where(second, num_clients=1, num_running=0)


def test_what_waits_can_be_aborted(clients: list[RawClient]) -> None:
    first, second = clients
    for number in range(2):
        first.send(suspect(number))
    first.receive(TrialOffered)
    second.send(add(5, n=2))
    second.send(Abort([5, 6]))
    assert [(one.number, one.reason) for one in ends(second)] == [(5, "abort"), (6, "abort")]
    first.send(Abort([0, 1]))
    assert [one.reason for one in ends(first)] == ["abort", "abort"]
    first.send(TrialAccepted(0))  # it crossed the answer
    first.send(add(2))
    assert collect(first, 2)[0][2] == ALL


def test_deadlines_count_while_they_wait(clients: list[RawClient]) -> None:
    first, second = clients
    first.send(suspect(0))
    first.send(suspect(1, deadline_ms=100.0))
    first.receive(TrialOffered)
    second.send(msgspec.structs.replace(add(0), ttft_deadline_ms=100.0))
    second.send(msgspec.structs.replace(add(1), deadline_ms=60_000.0))
    started = time.monotonic()
    assert [(one.number, one.reason) for one in ends(first)] == [(1, "timeout")]
    assert [(one.number, one.reason) for one in ends(second)] == [(0, "timeout")]
    assert time.monotonic() - started < WAIT_S, "long before the one of 60 s"
    first.send(TrialAccepted(0))
    first.send(TrialOver(0))
    assert collect(second, 1)[0][1] == ALL


def test_a_client_that_never_says_holds_up_others_for_so_long(
    clients: list[RawClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "TRIAL_LIMIT_S", 0.3)
    first, second = clients
    first.send(suspect(0))
    first.receive(TrialOffered)
    second.send(add())
    assert collect(second, 0)[0][0] == ALL


def test_what_deaths_came_of_is_told_to_everybody(clients: list[RawClient]) -> None:
    first, second = clients
    first.send(DeathsExplained(["a", "b"]))
    first.send(DeathsExplained(["b", "c"]))
    while (status := second.receive(CoreStatus)).explained_epochs != ["a", "b", "c"]:
        assert status.uptime_s < WAIT_S


# ---- without a core


def asked(number: int, *, suspect: bool = False, n: int = 1, **deadlines: float) -> AddRequest:
    message = AddRequest(number, [1], SamplingParams(n=n), is_suspect=suspect, **deadlines)
    return message


def numbers(held: list[Held]) -> list[int]:
    return [one.request.number for one in held]


def test_others_have_their_turn_when_no_suspect_waits_or_they_have_waited_long() -> None:
    waiting = Quarantine()
    assert not waiting.is_active
    waiting.hold(0, asked(0, suspect=True), 100.0)
    waiting.hold(1, asked(1), 101.0)
    waiting.hold(0, asked(2, suspect=True), 102.0)
    assert waiting.is_active and waiting.take_others(103.0) == []
    first = waiting.offer(104.0)
    assert first is not None and first.request.number == 0
    assert waiting.offer(105.0) is None and waiting.take_others(999.0) == [], "one is on trial"
    assert waiting.accept(1, 0) is None and waiting.accept(0, 2) is None
    assert waiting.accept(0, 0) is first
    waiting.end_trial(0, 2)
    assert waiting.offer(105.0) is None, "it is not over"
    waiting.end_trial(0, 0)
    assert waiting.take_others(100.0 + TRIAL_LIMIT_S) == [], "there is another suspect"
    assert numbers(waiting.take_others(100.5 + TRIAL_LIMIT_S)) == [1]
    waiting.hold(1, asked(3), 101.0 + TRIAL_LIMIT_S)
    assert waiting.take_others(102.0 + TRIAL_LIMIT_S) == [], "they have just had their turn"
    second = waiting.offer(103.0 + TRIAL_LIMIT_S)
    assert second is not None and waiting.accept(0, 2) is second
    waiting.end_trial(0, 2)
    assert numbers(waiting.take_others(104.0 + TRIAL_LIMIT_S)) == [3]
    assert not waiting.is_active and waiting.offer(999.0) is None


@pytest.mark.parametrize("is_accepted", [False, True])
def test_a_trial_without_end_is_given_up_and_repeated_if_it_never_began(is_accepted: bool) -> None:
    waiting = Quarantine()
    for number in range(2):
        waiting.hold(0, asked(number, suspect=True), 100.0)
    assert waiting.offer(100.0) is not None
    if is_accepted:
        waiting.accept(0, 0)
    assert waiting.offer(100.0 + TRIAL_LIMIT_S) is None and waiting.accept(0, 0) is not None
    if not is_accepted:
        waiting = Quarantine()
        for number in range(2):
            waiting.hold(0, asked(number, suspect=True), 100.0)
        waiting.offer(100.0)
    assert waiting.offer(100.1 + TRIAL_LIMIT_S) is None, "who waits goes before the next"
    assert waiting.accept(0, 0) is None
    offered = [waiting.offer(101.0 + TRIAL_LIMIT_S) for _ in range(2)]
    assert offered[0] is not None and offered[0].request.number == 1 and offered[1] is None
    waiting.accept(0, 1)
    waiting.end_trial(0, 1)
    assert waiting.is_active is not is_accepted, "what never began is tried again"


def test_who_has_gone_or_is_late_waits_no_more() -> None:
    waiting = Quarantine()
    waiting.hold(0, asked(0, suspect=True, n=3), 100.0)
    waiting.hold(0, asked(3, suspect=True, deadline_ms=2000.0), 100.0)
    waiting.hold(1, asked(3, ttft_deadline_ms=3000.0), 100.0)
    waiting.hold(1, asked(9), 100.0)
    assert waiting.expire(101.9) == [] and numbers(waiting.expire(102.0)) == [3]
    assert numbers(waiting.withdraw(0, {2, 9})) == [0], "by any of its outputs, and its own client"
    assert [end.number for end in Held(0, asked(5, n=2), 1.0).ends("abort")] == [5, 6]
    assert numbers(waiting.expire(103.0)) == [3] and waiting.is_active
    waiting.withdraw_client(0)
    assert waiting.is_active
    waiting.withdraw_client(1)
    assert not waiting.is_active
    for is_accepted in (False, True):
        waiting.hold(0, asked(0, suspect=True), 100.0)
        waiting.offer(100.0)
        if is_accepted:
            waiting.accept(0, 0)
        assert numbers(waiting.withdraw(0, {0})) == ([] if is_accepted else [0])
        assert waiting.is_active is is_accepted, "what has begun is the core's"
    waiting.withdraw_client(1)
    assert waiting.is_active
    waiting.withdraw_client(0)
    assert not waiting.is_active


def test_what_is_left_of_deadlines_when_it_begins() -> None:
    held = Held(0, asked(0, deadline_ms=5000.0, ttft_deadline_ms=900.0), 100.0)
    left = held.request_at(100.25)
    assert (left.deadline_ms, left.ttft_deadline_ms) == (4750.0, 650.0)
    assert (held.is_late(100.8), held.is_late(100.9)) == (False, True)
    free = Held(0, asked(0), 100.0)
    assert free.request_at(200.0).deadline_ms is None and not free.is_late(1e9)
