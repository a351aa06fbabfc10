"""From one life of a core to the next: delays, limits and words, by a clock of the test's own."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nanovllm.config import SupervisionConfig
from nanovllm.frontend import supervisor
from nanovllm.frontend.errors import DetachedError, EngineDeadError
from nanovllm.frontend.supervisor import FIRST_DELAY_S, RETRY_MAX_S, Supervisor, _check_same_model
from nanovllm.protocol.messages import Welcome
from tests.frontend.fake_core import WELCOME

FIRST = EngineDeadError("it fell", "a traceback")


class Line:
    """A `Supervisor` whose greetings fail, or succeed at last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, owned: bool, **config: Any) -> None:
        self.now = 1000.0
        self.done: list[Any] = []
        self.num_failing = 10**6
        self.epochs: list[str] = []
        handle: Any = None
        if owned:
            handle = SimpleNamespace(
                process=None,
                end=lambda: self.done.append("end"),
                restart=lambda: self.done.append("restart"),
            )
        requests: Any = SimpleNamespace(on_core_dead=self.done.append)
        self.line = Supervisor(requests, SupervisionConfig(**config), "ipc:///x", handle=handle)
        self.line.epoch = "first"
        monkeypatch.setattr(self.line, "_greet_again", self._greet_again)
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(supervisor.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.done.append(seconds)
        self.now += seconds

    async def _greet_again(self, **limits: float) -> None:
        if limits:
            self.done.append(limits)
        if self.num_failing == 0:
            return
        self.num_failing -= 1
        raise EngineDeadError("again", "more details")


async def test_an_owned_core_is_started_again_after_growing_delays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Line(monkeypatch, owned=True, max_core_restarts=4)
    with pytest.raises(EngineDeadError, match="died 5 times within 60 s") as final:
        await one.line._restart(FIRST, set())
    assert "max_core_restarts is 4" in str(final.value) and "at last of this: again" in str(
        final.value
    )
    assert final.value.details == "more details"
    delays = [0.0, FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert one.done == [step for delay in delays for step in ("end", delay, "restart")]


async def test_a_death_that_is_explained_costs_no_delay_and_its_next_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Line(monkeypatch, owned=True, max_core_restarts=2)
    with pytest.raises(EngineDeadError, match="died 3 times"):
        await one.line._restart(FIRST, {"first"})
    assert one.done[1::3] == [0.0, 0.0, FIRST_DELAY_S]


async def test_a_core_that_comes_back_is_not_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Line(monkeypatch, owned=True)
    one.num_failing = 1
    await one.line._restart(FIRST, set())
    assert one.done == ["end", 0.0, "restart", "end", FIRST_DELAY_S, "restart"]


async def test_another_ones_core_is_asked_for_until_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Line(monkeypatch, owned=False, core_return_timeout_s=4.0)
    with pytest.raises(EngineDeadError) as final:
        await one.line._reattach(FIRST)
    assert str(final.value) == "it fell; no core came back to ipc:///x within 4 s"
    assert final.value.details == "a traceback"
    delays = [step for step in one.done if isinstance(step, float)]
    expected, left = [], FIRST_DELAY_S
    while sum(expected) < 4.0:
        expected.append(left)
        left = min(2 * left, RETRY_MAX_S)
    assert delays == expected and max(delays) == RETRY_MAX_S
    limits = [step["timeout_s"] for step in one.done if isinstance(step, dict)]
    assert limits == pytest.approx([4.0 - sum(expected[:i]) for i in range(len(expected))])
    never = Line(monkeypatch, owned=False, core_return_timeout_s=0.0)
    with pytest.raises(EngineDeadError, match="within 0 s"):
        await never.line._reattach(FIRST)
    assert never.done == []


async def test_whoever_is_let_go_too_often_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's core may die as often as it likes."""
    one = Line(monkeypatch, owned=False, max_core_restarts=1)
    one.num_failing = 0
    for _ in range(3):
        await one.line._reattach(FIRST)
    detached = DetachedError("let go")
    await one.line._reattach(detached)
    with pytest.raises(EngineDeadError, match="died 2 times"):
        await one.line._reattach(detached)


async def test_the_first_cause_of_an_end_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Line(monkeypatch, owned=False)
    assert not one.line.is_dead
    one.line.check_alive()
    one.line._die(FIRST)
    one.line._die(EngineDeadError("later"))
    assert one.line.is_dead and one.done == [FIRST] and one.line.link is None
    with pytest.raises(EngineDeadError, match="it fell"):
        one.line.check_alive()
    assert str(await one.line.until_dead()) == "it fell"
    await one.line.close()
    assert one.done == [FIRST]


@pytest.mark.parametrize(
    ("of_welcome", "of_worker", "same"),
    [
        ({}, {}, True),
        ({"epoch": "other", "client_id": 7}, {"num_blocks": 3}, True),
        ({"model": "other"}, {}, False),
        ({}, {"architecture": "other"}, False),
        ({}, {"vocab_size": 7}, False),
        ({}, {"num_parameters": 7}, False),
        ({}, {"max_model_len": 7}, False),
    ],
)
def test_only_the_same_model_goes_on(
    of_welcome: dict[str, Any], of_worker: dict[str, Any], same: bool
) -> None:
    worker = msgspec.structs.replace(WELCOME.worker, **of_worker)
    after: Welcome = msgspec.structs.replace(WELCOME, worker=worker, **of_welcome)
    if same:
        _check_same_model(WELCOME, after)
    else:
        with pytest.raises(EngineDeadError, match="came back with another model"):
            _check_same_model(WELCOME, after)
