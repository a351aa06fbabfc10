"""Why a request failed, in words and by kind; what a client is told as `RequestFailed`.

The engine makes one wherever a sequence ends in an error, the server where it refuses a request.
"""

from typing import NamedTuple

from nanovllm.protocol.messages import FailureCause


class GrammarRefusedError(ValueError):
    """What the output must be (`structured_outputs`) cannot be compiled, or not be followed."""


class Failure(NamedTuple):
    """`message` names the field to mend, if the request is at fault."""

    message: str
    cause: FailureCause = "engine"

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Of something that went wrong while the request ran."""
        if isinstance(error, GrammarRefusedError):
            return cls(str(error), "grammar")
        return cls(f"{type(error).__name__}: {error}")

    @classmethod
    def of_refusal(cls, error: Exception) -> "Failure":
        """Of something that is wrong with the request itself, or went wrong in taking it in."""
        found = cls.of(error)
        if found.cause == "engine" and isinstance(error, ValueError):
            return cls(str(error), "request")
        return found
