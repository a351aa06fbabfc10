"""What a client's `Call` is answered, whatever comes of it."""

from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.operations import NotAllowedError, Operations, answer_call
from nanovllm.protocol.messages import Call, Operation, ResetPrefixCache, SetPace
from nanovllm.protocol.watch import Observe, ShowBlock
from tests.core.fake_executor import FakeExecutor


class Shown:
    """A viewer that says what it was asked, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def observe(self, client_id: int, *, fresh: bool) -> Any:
        return self._told("observe", client_id, fresh)

    def show_block(self, block_id: int, *, of_client: int | None = None) -> Any:
        return self._told("block", block_id, of_client)

    def _told(self, *asked: object) -> Any:
        if self._error is not None:
            raise self._error
        return asked


def core(**settings: Any) -> EngineCore:
    config = EngineConfig.from_kwargs(**settings)
    executor = FakeExecutor(config, num_blocks=20, max_model_len=64)
    return EngineCore(config, executor, executor.start())


@pytest.mark.parametrize(
    ("operation", "is_operator", "result"),
    [
        (ResetPrefixCache(), True, True),
        (Observe(fresh=True), True, ("observe", 7, True)),
        (Observe(fresh=False), True, ("observe", 7, False)),
        (ShowBlock(3), True, ("block", 3, None)),
        (ShowBlock(3), False, ("block", 3, 7)),  # as far as it is his own
    ],
)
def test_it_is_done_and_its_result_told(
    operation: Operation, is_operator: bool, result: object
) -> None:
    operations = Operations(core(), Shown())
    answer = answer_call(operations, 7, Call(5, operation), is_operator=is_operator)
    assert (answer.call_id, answer.result, answer.error) == (5, result, None)
    assert not answer.is_refused


@pytest.mark.parametrize("operation", [ResetPrefixCache(), Observe(fresh=True), SetPace(0)])
def test_what_is_for_operators_is_refused_to_others(operation: Operation) -> None:
    answer = answer_call(Operations(core(), Shown()), 7, Call(5, operation), is_operator=False)
    assert answer.is_refused and answer.call_id == 5
    assert answer.error == str(NotAllowedError(operation))
    assert type(operation).__name__ in str(answer.error)


def test_a_pace_that_the_core_does_not_allow_is_refused() -> None:
    answer = answer_call(Operations(core(), None), 7, Call(5, SetPace(0)), is_operator=True)
    assert answer.is_refused and answer.result is None and answer.error


@pytest.mark.parametrize(
    ("viewer", "error"),
    [
        (None, "this core shows nothing of itself"),
        (Shown(ValueError("no such block")), "no such block"),
        (Shown(ZeroDivisionError()), "ZeroDivisionError"),  # it has no words of its own
    ],
)
def test_what_goes_wrong_is_told_its_sender(viewer: Shown | None, error: str) -> None:
    answer = answer_call(Operations(core(), viewer), 7, Call(5, ShowBlock(1)), is_operator=True)
    assert (answer.call_id, answer.error, answer.is_refused) == (5, error, False)


def test_while_it_loads_a_core_answers_so() -> None:
    answer = answer_call(None, 7, Call(5, ResetPrefixCache()), is_operator=True)
    assert (answer.call_id, answer.error) == (5, "the core is still loading")
    assert not answer.is_refused
