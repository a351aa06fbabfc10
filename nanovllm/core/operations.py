"""Typed operations on a core that runs: what a client's `Call` does. `CoreServer` is the caller."""

from nanovllm.core.engine_core import EngineCore
from nanovllm.protocol.messages import Answer, Call, CallResult, Operation, ResetPrefixCache
from nanovllm.protocol.watch import Observe, ShowBlock
from nanovllm.watch.observer import Observer


class Operations:
    """On one core."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._observer = Observer(core)

    def perform(self, client_id: int, operation: Operation) -> Answer:
        """Raises `ValueError` if it cannot be done."""
        match operation:
            case ResetPrefixCache():
                return self._core.reset_prefix_cache()
            case Observe(fresh):
                return self._observer.observe(client_id, fresh=fresh)
            case ShowBlock(block_id):
                return self._observer.show_block(block_id)


def answer_call(operations: Operations | None, client_id: int, call: Call) -> CallResult:
    """Its result, or why there is none. operations: None while the core loads."""
    if operations is None:
        return CallResult(call.call_id, error="the core is still loading")
    try:
        return CallResult(call.call_id, operations.perform(client_id, call.operation))
    except Exception as error:  # it costs its sender an error, and nobody else anything
        return CallResult(call.call_id, error=str(error) or type(error).__name__)
