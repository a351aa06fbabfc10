"""Typed operations on a core that runs: what a client's `Call` does. `CoreServer` is the caller.

Who is no operator sees what is in the blocks of his own sequences, and changes nothing for others.
"""

import time
from collections.abc import Callable
from typing import Protocol

from nanovllm.core.engine_core import EngineCore
from nanovllm.core.pace import PaceRefusedError
from nanovllm.protocol.messages import (
    Answer,
    Call,
    CallResult,
    Operation,
    ResetPrefixCache,
    SetPace,
)
from nanovllm.protocol.watch import BlockContents, Observation, Observe, ShowBlock


class Viewer(Protocol):
    """Shows a core to whoever looks (`watch.observer.Observer`)."""

    def observe(self, client_id: int, *, fresh: bool) -> Observation:
        """What is new to this client; with `fresh` everything."""

    def show_block(self, block_id: int, *, of_client: int | None = None) -> BlockContents:
        """What a block of the cache holds; of_client: as far as it is a part of his sequences.

        Raises `ValueError` if there is no such block.
        """


class NotAllowedError(ValueError):
    """The client's key does not allow what it asks for."""

    def __init__(self, operation: Operation) -> None:
        name = type(operation).__name__
        super().__init__(
            f"{name} is for operators of this core: put a second line `operator` into "
            "clients/NAME.pub of its directory of keys"
        )


MakeViewer = Callable[[EngineCore], Viewer]


class Operations:
    """On one core. viewer: None if it is not to be looked at."""

    def __init__(self, core: EngineCore, viewer: Viewer | None) -> None:
        self._core = core
        self._viewer = viewer

    def perform(self, client_id: int, operation: Operation, *, is_operator: bool) -> Answer:
        """Raises `ValueError` if it cannot be done, or not for this client."""
        if not is_operator and not isinstance(operation, ShowBlock):
            raise NotAllowedError(operation)
        if isinstance(operation, ResetPrefixCache):
            return self._core.reset_prefix_cache()
        if isinstance(operation, SetPace):
            self._core.pace.set(client_id, operation, time.monotonic())
            return True
        if self._viewer is None:
            raise ValueError("this core shows nothing of itself")
        match operation:
            case Observe(fresh):
                return self._viewer.observe(client_id, fresh=fresh)
            case ShowBlock(block_id):
                of_client = None if is_operator else client_id
                return self._viewer.show_block(block_id, of_client=of_client)


def answer_call(
    operations: Operations | None, client_id: int, call: Call, *, is_operator: bool
) -> CallResult:
    """Its result, or why there is none. operations: None while the core loads."""
    if operations is None:
        return CallResult(call.call_id, error="the core is still loading")
    try:
        answer = operations.perform(client_id, call.operation, is_operator=is_operator)
        return CallResult(call.call_id, answer)
    except (NotAllowedError, PaceRefusedError) as error:
        return CallResult(call.call_id, error=str(error), is_refused=True)
    except Exception as error:  # its sender alone gets an error
        return CallResult(call.call_id, error=str(error) or type(error).__name__)
