"""What can go wrong with an engine, apart from a caller's mistake (that is a `ValueError`).

Raised by `AsyncLLM` and `LLM`.
"""

from nanovllm.protocol.messages import FailureCause, Overloaded, RequestFailed


class EngineDeadError(RuntimeError):
    """The core process is gone, or cannot be reached; nothing pending can finish.

    The text is the root cause: what the core said it died of, or how its process ended.
    `details` is the core's own traceback, where it could still send one. `is_crash`: whether the
    core failed by itself, as opposed to being ended from outside; None if that is not known.
    """

    def __init__(self, message: str, details: str = "", *, is_crash: bool | None = None) -> None:
        super().__init__(message)
        self.details = details
        self.is_crash = is_crash

    def again(self) -> "EngineDeadError":
        """The same cause for one more who waits: one instance must not be raised twice."""
        return EngineDeadError(str(self), self.details, is_crash=self.is_crash)


class DetachedError(EngineDeadError):
    """The core lives and has forgotten this client: it must say Hello, and send all again."""


class RequestFailedError(RuntimeError):
    """The core refused or lost this one request; the engine and all other requests live on.

    `cause` says who is at fault: the engine, or the request, or its grammar (`RequestFailed`).
    """

    def __init__(self, message: str, cause: FailureCause = "engine") -> None:
        super().__init__(message)
        self.cause = cause


class QuarantinedError(RequestFailedError):
    """The core died of this request, twice: it is not sent again. All other requests live on."""


class NotAllowedError(RuntimeError):
    """The core does this for its operators only, and this client's key is not one's."""


class OverloadedError(RequestFailedError):
    """The core has too much to do, or is about to end, and took nothing of this request.

    `retry_after`: seconds after which it may fare better. `draining`: not with this core.
    """

    def __init__(self, retry_after: float, *, draining: bool = False) -> None:
        why = "the core is about to end" if draining else "the core's queue is full"
        super().__init__(f"{why}: try again in {retry_after:.1f} s")
        self.retry_after = retry_after
        self.draining = draining


def error_of(failure: RequestFailed | Overloaded) -> RequestFailedError:
    """What the caller of a request is to see of the core's answer."""
    if isinstance(failure, Overloaded):
        return OverloadedError(failure.retry_after_s, draining=failure.draining)
    return RequestFailedError(failure.message, failure.cause)
