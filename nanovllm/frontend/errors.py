"""What can go wrong with an engine, apart from a caller's mistake (that is a `ValueError`).

Raised by `AsyncLLM`, `LLM` and `CoreClient`.
"""


class EngineDeadError(RuntimeError):
    """The core process is gone, or cannot be reached; nothing pending can finish.

    The text is the root cause: what the core said it died of, or how its process ended.
    `details` is the core's own traceback, where it could still send one.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class RequestFailedError(RuntimeError):
    """The core refused or lost this one request; the engine and all other requests live on."""
