"""How many bytes of bodies one HTTP process holds at a time, and that the memory is given back.

One per process, made by `app.create_app` and drawn on by the middleware as bodies come in. What
comes beyond the budget is refused for now; small bodies always have room.
"""

import asyncio
import ctypes
import platform

from nanovllm.frontend.server.api_errors import ApiError

SMALL_BODY_BYTES = 1 << 16
BUDGET_BODIES = 8  # of the largest size allowed, at a time
LARGE_BODY_BYTES = 1 << 20
TRIM_AFTER_S = 1.0  # several are often sent one after the other


class BodyBudget:
    """Counts what is held; `Share` is one request's part of it."""

    def __init__(self, max_body_bytes: int) -> None:
        self._num_free = BUDGET_BODIES * max_body_bytes
        self._trim: asyncio.TimerHandle | None = None

    def take(self, num_bytes: int) -> None:
        """Raises `ApiError` 503 if they are not there."""
        if num_bytes > self._num_free:
            raise ApiError(503, "too many large bodies are being received", code="overloaded")
        self._num_free -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._num_free += num_bytes
        if num_bytes >= LARGE_BODY_BYTES and self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim_later)

    def _trim_later(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, _return_free_memory)


class Share:
    """What one request holds: nothing while its body is small."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_held = 0

    def hold(self, num_bytes: int) -> None:
        """All of its body so far. Raises `ApiError` 503."""
        if num_bytes > SMALL_BODY_BYTES:
            self._budget.take(num_bytes - self._num_held)
            self._num_held = num_bytes

    def release(self) -> None:
        """The body has been decoded, or nobody waits for it any more."""
        if self._num_held:
            self._budget.give_back(self._num_held)
            self._num_held = 0


def _return_free_memory() -> None:
    """glibc keeps what was freed between pieces still in use, here hundreds of megabytes; it walks
    its heap for a tenth of a second, without Python's lock."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
