"""What endpoints have in common: a body comes in, an answer goes out, whole or as events.

The first event is awaited before the status line is sent, so whatever fails before it fails with a
proper status; later failures are an event of their own. A client that leaves is served no further.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Protocol, TypeVar

import msgspec
import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.frontend.errors import RequestFailedError
from nanovllm.frontend.inputs import RequestOptions
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.server.api_errors import ApiError, from_engine
from nanovllm.frontend.server.api_keys import CALLER
from nanovllm.frontend.server.bodies import Body, GenerationBody, blaming, decoded
from nanovllm.frontend.server.prompts import aside_if_long
from nanovllm.frontend.server.replies import PromptTokensDetails, Usage
from nanovllm.frontend.server.sampling import Constraint
from nanovllm.frontend.server.serving import Options, RequestOutputs, Serving
from nanovllm.limits import MAX_JSON_EXPONENTS

LONG_BODY = 1 << 16  # bytes: up to half a millisecond to decode
MANY_LISTS = 1024  # lists and objects, which take as long as a hundred bytes each
EVENT_STREAM = "text/event-stream; charset=utf-8"
STREAM_HEADERS = (
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would hold events back
)
DONE = b"data: [DONE]\n\n"
B = TypeVar("B", bound=Body)
G = TypeVar("G", bound=GenerationBody)
encode = msgspec.json.Encoder().encode
logger = logging.getLogger(__name__)


def serving_of(request: Request) -> Serving:
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


# ---- bodies


async def read(request: Request, kind: type[B]) -> B:
    """The body, checked. Raises `ApiError` 400, 413, 415.

    Pages may send text to any server without its leave, but not what is called JSON.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not given.endswith("+json"):
        remedy = f"send it as `content-type: application/json`, not {given!r}"
        raise ApiError(415, f"the body must be JSON: {remedy}")
    content = bytearray()  # not `request.body()`, which would be kept as long as it is answered
    async for piece in request.stream():
        content += piece
    if takes_long(content):
        serving = serving_of(request)
        refusal = await serving.body_trials.refusal(content, kind, serving.body_facts)
        if refusal is not None:
            raise refusal
    return decoded(content, kind)


def takes_long(content: bytes | bytearray) -> bool:
    """Whether decoding it may hold up streams: it is long, or may hold many lists, or many numbers
    with exponents."""
    is_short = len(content) <= MANY_LISTS  # it has no room for many of anything
    return len(content) > LONG_BODY or (not is_short and _may_hold_many(content))


def _may_hold_many(content: bytes | bytearray) -> bool:
    letters = np.frombuffer(content, np.uint8)  # `bytes.count` is slow for frequent ones
    lower = letters | 0x20
    if np.count_nonzero(lower == ord("{")) > MANY_LISTS:  # "[" is that without the bit
        return True
    # Numbers that take long have a digit, the letter and three digits.
    num_exponents = np.count_nonzero(lower == ord("e"))
    num_digits = np.count_nonzero(letters - np.uint8(ord("0")) < 10)
    return bool(num_exponents > MAX_JSON_EXPONENTS and num_digits > 4 * MAX_JSON_EXPONENTS)


# ---- requests for text


class Answer(Protocol):
    """A checked request; the engine begins with it when one of these runs."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send."""

    async def whole(self) -> msgspec.Struct:
        """All at once."""


async def generated(
    request: Request,
    kind: type[G],
    prepare: Callable[[Serving, G, Mapping[str, str]], Awaitable[Answer]],
) -> Response:
    """The answer to a request for text, streamed or whole as its body asks.

    prepare: of the body and the headers; finds everything that can be wrong with the request, and
    starts nothing.
    """
    serving = serving_of(request)
    body = await read(request, kind)
    if body.model is not None:
        serving.check_model(body.model)
    if (caller := request.scope.get("state", {}).get(CALLER)) is not None:
        serving.callers.apply(body, caller)
    answer: Answer | None = None
    async with until_disconnect(request.receive):  # a client that leaves is not served further
        with blaming(body):
            if body.bad_words:  # encoded once for all prompts, and not while streams wait
                encode_words = partial(serving.llm.encode_bad_words, tuple(body.bad_words))
                await aside_if_long(encode_words, sum(map(len, body.bad_words)))
            answer = await prepare(serving, body, request.headers)
    if answer is None:
        return Response()  # the client has left
    if body.stream:
        return EventStream(serving, answer.events())
    return Whole(serving, answer.whole)


def most_tokens(serving: Serving, body: GenerationBody) -> int | None:
    """Of a prompt; None if it may be longer, since it will be cut."""
    if body.truncate_prompt_tokens is not None:
        return None
    return serving.llm.info.worker.max_model_len


def options_of(
    body: GenerationBody, prefix: str, headers: Mapping[str, str], constraint: Constraint | None
) -> Options:
    request_id = f"{prefix}-{body.request_id or secrets.token_hex(16)}"
    how: RequestOptions = {
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt,
        "tenant": body.user,
        "deadline_ms": body.deadline_ms,
        "ttft_deadline_ms": body.ttft_deadline_ms,
    }
    return Options(request_id, how, headers, None if constraint is None else constraint.field)


async def last_of(outputs: RequestOutputs) -> RequestOutput:
    """Of a request that is run to its end."""
    last: RequestOutput | None = None
    async for output in outputs:
        last = output
    assert last is not None
    return last


def usage_of(outputs: Iterable[RequestOutput | None]) -> Usage:
    """Of the latest outputs of all prompts of a request."""
    num_prompt = num_cached = num_generated = 0
    for output in outputs:
        if output is not None:
            num_prompt += len(output.prompt_token_ids)
            num_cached += output.num_cached_tokens or 0
            num_generated += output.metrics.num_generation_tokens
    details = PromptTokensDetails(num_cached)
    return Usage(num_prompt, num_prompt + num_generated, num_generated, details)


# ---- answers


class JsonAnswer(Response):
    """A struct as JSON."""

    media_type = "application/json"

    def __init__(self, content: msgspec.Struct, status_code: int = 200) -> None:
        super().__init__(encode(content), status_code)


class Whole(Response):
    """The answer of `work`, once it is there."""

    def __init__(self, serving: Serving, work: Callable[[], Awaitable[msgspec.Struct]]) -> None:
        super().__init__()
        self._serving = serving
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None = None
        async with until_disconnect(receive):
            try:
                with self._serving.admission():
                    response = JsonAnswer(await self._work())
            except Exception as error:
                response = as_api_error(error).response()
        if response is not None:
            await response(scope, receive, send)


class EventStream(Response):
    """Server-sent events. An item of `events` is one or more events, ready to send."""

    def __init__(self, serving: Serving, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._serving = serving
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive), contextlib.aclosing(self._events) as events:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self._serving.admission())
                    first = await anext(events)
                except Exception as error:
                    await as_api_error(error).response()(scope, receive, send)
                    return
                await self._send_all(first, events, send)

    async def _send_all(self, first: bytes, rest: AsyncIterator[bytes], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS]})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for events in rest:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            last = DONE
        except ClientDisconnect:
            raise
        except Exception as error:
            last = b"data: " + as_api_error(error).body() + b"\n\n" + DONE
        await send({"type": "http.response.body", "body": last})


def event(content: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % encode(content)


class AlikeEvents:
    """Events that differ in a value or two, which is nearly all of a stream: encoded around these
    once.

    content: such an event with empty values. empty: these with their names, as they stand in its
    JSON, such as `"text":""` and `"content":[]`, in order; nothing like them comes after them.
    """

    __slots__ = ("_around",)

    def __init__(self, content: msgspec.Struct, *empty: bytes) -> None:
        rest, around = event(content).replace(b"%", b"%%"), b""
        for one in reversed(empty):
            rest, name, behind = rest.rpartition(one)
            around = name[:-2] + b"%b" + behind + around
        self._around = rest + around

    def of(self, *values: bytes) -> bytes:
        """The event with these values, which are JSON."""
        return self._around % values


def as_api_error(error: Exception) -> ApiError:
    """What the client is told; what nobody expected goes to the log."""
    found = from_engine(error)
    if found.status == 500 and not isinstance(error, ApiError | RequestFailedError):
        logger.error("a request failed unexpectedly", exc_info=error)
    return found


@contextlib.asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs inside when the client leaves; that ends here, without an error."""
    task = asyncio.current_task()
    assert task is not None
    client_left = False

    async def watch() -> None:
        nonlocal client_left
        while (await receive())["type"] != "http.disconnect":
            pass
        client_left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not client_left:
            raise
        task.uncancel()
    finally:
        watcher.cancel()
