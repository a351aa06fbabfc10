"""Typed operations on a core that runs: what a client's `Call` does. `CoreServer` is the caller."""

from collections.abc import Callable
from typing import Protocol

from nanovllm.core.engine_core import EngineCore
from nanovllm.protocol.messages import Answer, Call, CallResult, Operation, ResetPrefixCache
from nanovllm.protocol.watch import BlockContents, Observation, Observe, ShowBlock


class Viewer(Protocol):
    """Shows a core to whoever looks (`watch.observer.Observer`)."""

    def observe(self, client_id: int, *, fresh: bool) -> Observation:
        """What is new to this client; with `fresh` everything."""

    def show_block(self, block_id: int) -> BlockContents:
        """What a block of the cache holds. Raises `ValueError` if there is no such block."""


MakeViewer = Callable[[EngineCore], Viewer]


class Operations:
    """On one core. viewer: None if it is not to be looked at."""

    def __init__(self, core: EngineCore, viewer: Viewer | None) -> None:
        self._core = core
        self._viewer = viewer

    def perform(self, client_id: int, operation: Operation) -> Answer:
        """Raises `ValueError` if it cannot be done."""
        if isinstance(operation, ResetPrefixCache):
            return self._core.reset_prefix_cache()
        if self._viewer is None:
            raise ValueError("this core shows nothing of itself")
        match operation:
            case Observe(fresh):
                return self._viewer.observe(client_id, fresh=fresh)
            case ShowBlock(block_id):
                return self._viewer.show_block(block_id)


def answer_call(operations: Operations | None, client_id: int, call: Call) -> CallResult:
    """Its result, or why there is none. operations: None while the core loads."""
    if operations is None:
        return CallResult(call.call_id, error="the core is still loading")
    try:
        return CallResult(call.call_id, operations.perform(client_id, call.operation))
    except Exception as error:  # it costs its sender an error, and nobody else anything
        return CallResult(call.call_id, error=str(error) or type(error).__name__)
