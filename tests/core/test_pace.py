"""A core that is held, taken step by step and slowed down: for a while, and for one client."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.pace import MAX_INTERVAL_MS, MAX_STEPS, Pace, PaceRefusedError
from nanovllm.core.server import CoreServer
from nanovllm.protocol.messages import (
    MAX_PACE_S,
    Abort,
    Call,
    CallResult,
    CoreStatus,
    Goodbye,
    Outputs,
    SetPace,
)
from nanovllm.protocol.watch import Observation, Observe
from tests.core.fake_executor import reference
from tests.core.serving import PROMPT, RawClient, add, collect, serving, status_where

HELD = SetPace(num_steps=0, for_s=60)
WHOLE = reference(PROMPT, 1, 4, frozenset())


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/core.sock"


@pytest.fixture
def server(address: str) -> Iterator[CoreServer]:
    with serving(address, allow_debug=True) as server:
        yield server


@pytest.fixture
def client(address: str, server: CoreServer) -> Iterator[RawClient]:
    client = RawClient(address)
    client.greet()
    yield client
    client.close()


def set_pace(client: RawClient, asked: SetPace) -> None:
    client.send(Call(1, asked))
    assert client.receive(CallResult) == CallResult(1, True)


def look(client: RawClient) -> Observation:
    client.send(Call(2, Observe()))
    seen = client.receive(CallResult).result
    assert isinstance(seen, Observation)
    return seen


def see_waiting(client: RawClient) -> Observation:
    """Until the core has taken a request in, and does nothing about it."""
    while not (seen := look(client)).counters.num_waiting:
        pass
    return seen


def test_a_held_core_takes_requests_in_and_goes_step_by_step(client: RawClient) -> None:
    set_pace(client, HELD)
    client.send(add())
    seen = see_waiting(client)
    assert seen.pace.is_held and seen.counters.num_steps == 0
    tokens = []
    for count in range(1, 4):
        set_pace(client, SetPace(num_steps=1))
        tokens += client.receive(Outputs).token_ids
        seen = look(client)
        assert seen.counters.num_steps == count == len(tokens) and seen.pace.is_held
    set_pace(client, SetPace())
    assert tokens + client.receive(Outputs).token_ids == WHOLE


def test_steps_that_are_asked_for_add_up(client: RawClient) -> None:
    set_pace(client, HELD)
    set_pace(client, SetPace(num_steps=2))
    set_pace(client, HELD)  # asks for more time, and takes no step away
    set_pace(client, SetPace(num_steps=1))
    client.send(add())
    outputs = [client.receive(Outputs) for _ in range(3)]
    assert [id for one in outputs for id in one.token_ids] == WHOLE[:3]
    assert status_where(client, is_held=True).step == 3


def test_a_held_core_is_not_stalled_and_answers(client: RawClient) -> None:
    set_pace(client, HELD)
    client.send(add())
    see_waiting(client)
    assert status_where(client, is_held=True, num_waiting=1).stalled_s == 0
    assert client.receive(CoreStatus).stalled_s == 0
    client.send(Abort([0]))
    assert client.receive(Outputs).finished[0].reason == "abort"
    client.send(add(1, n=2))
    see_waiting(client)
    set_pace(client, SetPace())
    collect(client, 1, 2)


def test_it_ends_with_the_client_that_asked(address: str, client: RawClient) -> None:
    holder = RawClient(address)
    holder.greet()
    set_pace(holder, HELD)
    client.send(add())
    see_waiting(client)
    holder.send(Goodbye())
    assert collect(client, 0)[0][0] == WHOLE
    holder.close()


def test_it_ends_when_its_time_is_over(client: RawClient) -> None:
    set_pace(client, SetPace(num_steps=0, for_s=0.3))
    client.send(add())
    assert collect(client, 0)[0][0] == WHOLE


def test_a_drain_ends_it(address: str, server: CoreServer, client: RawClient) -> None:
    set_pace(client, HELD)
    client.send(add())
    see_waiting(client)
    server.drain()
    assert collect(client, 0)[0][0] == WHOLE


def test_a_core_that_was_not_meant_for_it_refuses(address: str) -> None:
    with serving(address):
        client = RawClient(address)
        client.greet()
        client.send(Call(1, HELD))
        answer = client.receive(CallResult)
        assert answer.is_refused and "--allow-debug" in str(answer.error)
        client.close()
    with pytest.raises(PaceRefusedError):
        Pace(is_allowed=False).set(0, HELD, 0.0)


@pytest.mark.parametrize(
    "asked", [SetPace(num_steps=-1), SetPace(interval_ms=math.nan), SetPace(for_s=0)]
)
def test_what_makes_no_sense_changes_nothing(asked: SetPace) -> None:
    pace = Pace(is_allowed=True)
    with pytest.raises(ValueError, match=r"num_steps|interval_ms|for_s"):
        pace.set(0, asked, 0.0)
    assert pace.next_step_at == -math.inf


def test_slow_steps_come_in_their_time() -> None:
    pace = Pace(is_allowed=True)
    pace.set(0, SetPace(interval_ms=250, for_s=10), 100.0)
    assert pace.next_step_at == 100.0 and pace.interval_ms(100.0) == 250
    pace.note_step(101.0)
    assert pace.next_step_at == 101.25 and not pace.is_held(101.0)
    pace.note_step(109.9)
    assert pace.next_step_at == 110.0, "its time is over then"
    pace.note_step(111.0)
    assert pace.next_step_at == 110.0 and pace.interval_ms(111.0) == 0


def test_steps_are_not_counted_from_an_older_pace() -> None:
    pace = Pace(is_allowed=True)
    pace.set(0, SetPace(num_steps=5, for_s=1), 0.0)
    pace.set(0, SetPace(num_steps=1, for_s=1), 2.0)
    pace.note_step(2.1)
    assert pace.is_held(2.1)
    pace.forget(1, 2.2)
    assert pace.is_held(2.2), "somebody else has gone"
    pace.forget(0, 2.3)
    assert not pace.is_held(2.3) and pace.next_step_at == 2.3


def test_a_core_that_may_be_held_runs_one_step_at_a_time() -> None:
    held = EngineConfig.from_kwargs(allow_debug=True)
    assert held.scheduler.limits("cuda:0").max_inflight_steps == 1
    with pytest.raises(ValueError, match="max_inflight_steps"):
        EngineConfig.from_kwargs(allow_debug=True, max_inflight_steps=2)


def paced(**asked: Any) -> Pace:
    pace = Pace(is_allowed=True)
    pace.set(1, SetPace(**{"for_s": 10.0, **asked}), 100.0)
    return pace


def test_steps_are_let_through_one_by_one_until_none_is_left() -> None:
    pace = paced(num_steps=2, interval_ms=100.0)
    assert (pace.next_step_at, pace.until, pace.is_held(100.0)) == (100.0, 110.0, False)
    pace.note_step(101.0)
    assert pace.next_step_at == pytest.approx(101.1) and not pace.is_held(101.0)
    pace.note_step(102.0)
    assert pace.next_step_at == pace.until and pace.is_held(109.9) and not pace.is_held(110.0)
    assert (pace.interval_ms(109.9), pace.interval_ms(110.0)) == (100.0, 0.0)
    late = paced(interval_ms=5000.0)
    late.note_step(108.0)
    assert late.next_step_at == late.until, "then the core goes at full speed again"


@pytest.mark.parametrize(
    ("first", "taken", "now", "second", "left"),
    [
        (3, 1, 105.0, 2, 4),
        (0, 0, 105.0, 2, 2),
        (3, 0, 110.0, 2, 2),
        (None, 1, 105.0, 2, 2),
        (MAX_STEPS, 0, 105.0, 1, MAX_STEPS),
        (3, 0, 105.0, 0, 3),
    ],
)
def test_only_steps_still_to_be_taken_add_up(
    first: int | None, taken: int, now: float, second: int, left: int
) -> None:
    pace = paced(num_steps=first)
    for _ in range(taken):
        pace.note_step(101.0)
    pace.set(1, SetPace(num_steps=second, for_s=10.0), now)
    for _ in range(left):
        assert not pace.is_held(now)
        pace.note_step(now)
    assert pace.is_held(now) and pace.until == now + 10.0


def test_a_pace_ends_with_whoever_asked_for_it_and_never_later_than_it_was_to() -> None:
    pace = paced(num_steps=0)
    assert pace.next_step_at == 110.0
    pace.forget(2, 101.0)
    assert pace.is_held(101.0)
    pace.forget(1, 102.0)
    assert not pace.is_held(102.0) and (pace.until, pace.next_step_at) == (102.0, 102.0)
    pace.release(200.0)
    assert (pace.until, pace.next_step_at) == (102.0, 102.0)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_steps": 0},
        {"num_steps": MAX_STEPS},
        {"interval_ms": 0.0},
        {"interval_ms": MAX_INTERVAL_MS},
        {"for_s": MAX_PACE_S},
        {"for_s": 0.001},
    ],
)
def test_bounds_of_a_pace_may_be_asked_for(asked: dict[str, Any]) -> None:
    assert paced(**asked).until == 100.0 + asked.get("for_s", 10.0)
