"""Errors as OpenAI's API gives them: a status, and what to mend, in one JSON shape.

Endpoints raise `ApiError`; `from_engine` says what an engine's own errors mean over HTTP.
"""

import math
import re
from collections.abc import Collection, Mapping

import msgspec
from starlette.responses import Response

from nanovllm.frontend.errors import (
    EngineDeadError,
    NotAllowedError,
    OverloadedError,
    QuarantinedError,
    RequestFailedError,
)
from nanovllm.frontend.server.replies import ErrorDetails, ErrorReply

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
RETRY_AFTER_S = 1
MAX_QUOTED = 1000  # characters of an error's text
# Names that `SamplingParams` and `AsyncLLM` use for what a request calls otherwise.
REQUEST_NAMES = {"prompt_token_ids": "prompt", "sampling_params": "", "structured_outputs": ""}
CONSTRAINT = re.compile(r"structured_outputs(?:\.\w+)?")
PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")


class ApiError(Exception):
    """`param` is the field to mend; `code` is OpenAI's word for the case, where it has one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message, param = _shortened(message), _shortened(param or "")
        super().__init__(message)
        self.status = status
        self.details = ErrorDetails(message, TYPES.get(status, "server_error"), param or None, code)
        self.headers = headers or {}
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_S))

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorReply(self.details))

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def _shortened(text: str) -> str:
    """What a client sent is quoted, but not all of it."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def refused(field: str, reason: str) -> ApiError:
    """A field that cannot be honoured."""
    return ApiError(400, f"{field}: {reason}", param=field, code="unsupported_field")


def from_constraint(message: str, field: str) -> ApiError:
    """What is wrong with a schema, grammar or choice. field: the one that the client sent, where
    the engine says `structured_outputs`."""
    return ApiError(400, CONSTRAINT.sub(lambda _: field, message, count=1), param=field)


def from_value_error(
    error: ValueError, fields: Collection[str], names: Mapping[str, str]
) -> ApiError:
    """A caller's mistake. Such texts begin with the name of the field, if it is about one.

    names: of `SamplingParams`, and what the request calls them.
    """
    message = str(error)
    name = re.match(r"\w*", message)
    param = name[0] if name else ""
    param = names.get(param) or REQUEST_NAMES.get(param, param)
    too_long = "max_model_len" in message
    code = "context_length_exceeded" if too_long else None
    return ApiError(400, message, param=param if param in fields else None, code=code)


def is_of_unknown_field(error: msgspec.ValidationError) -> bool:
    return UNKNOWN_FIELD.search(str(error)) is not None


def from_decoding(error: Exception, fields: Collection[str]) -> ApiError:
    """The body is no JSON, or not of the shape that the endpoint takes. fields: of the body."""
    message = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return ApiError(400, f"the body is not valid JSON: {message}", code="invalid_json")
    where, unknown = PATH.search(message), UNKNOWN_FIELD.search(message)
    path = where[1] if where else ""
    if unknown:
        path = f"{path}.{unknown[1]}".lstrip(".")
        return ApiError(
            400, f"{path}: this server knows no such field", param=path, code="unknown_field"
        )
    text = PATH.sub("", message)
    if not path:  # of the body as a whole, or what it checks itself
        name = text.partition(" ")[0]
        return ApiError(400, text, param=name if name in fields else None)
    return ApiError(400, f"{path}: {text}", param=path)


def from_engine(error: Exception) -> ApiError:
    """What an engine's error means to an HTTP client."""
    match error:
        case ApiError():
            return error
        case EngineDeadError():
            return ApiError(503, f"the engine is down: {error}", code="engine_dead")
        case OverloadedError():
            status, code = (503, "draining") if error.draining else (429, "overloaded")
            headers = {"retry-after": str(math.ceil(error.retry_after))}
            return ApiError(status, str(error), code=code, headers=headers)
        case QuarantinedError():  # and not 500, which clients try again by themselves
            return ApiError(422, str(error), code="request_quarantined")
        case NotAllowedError():
            return ApiError(403, str(error), code="not_allowed")
        case RequestFailedError(cause="request" | "grammar"):  # found out by the core
            return ApiError(400, str(error), code="invalid_request")
        case RequestFailedError():
            return ApiError(500, f"the engine failed this request: {error}", code="request_failed")
        case TimeoutError():
            return ApiError(504, str(error) or "the engine did not answer in time")
        case _:
            return ApiError(500, "internal error: the server's log says more")


def from_finish(reason: str) -> ApiError:
    """A request that ended in a way no client asked for."""
    if reason == "timeout":
        return ApiError(
            504, "deadline_ms has passed", param="deadline_ms", code="deadline_exceeded"
        )
    if reason == "abort":
        return ApiError(503, "the request was aborted: the server shuts down", code="aborted")
    return ApiError(500, "the engine failed this request", code="request_failed")
