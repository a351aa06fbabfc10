"""Suspects begin one at a time and alone, whosever they are, and nobody waits for ever."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nanovllm.config import EngineConfig
from nanovllm.core import quarantine
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
