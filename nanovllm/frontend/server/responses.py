"""How answers reach clients: whole or as server-sent events, and aborted when the client leaves.

Endpoints return these responses. The first event is awaited before the status line is sent, so
whatever fails before it fails with a proper status; later failures are an event of their own.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.frontend.errors import RequestFailedError
from nanovllm.frontend.server.api_errors import ApiError, from_engine
from nanovllm.frontend.server.serving import Serving

encode = msgspec.json.Encoder().encode
EVENT_STREAM = "text/event-stream; charset=utf-8"
STREAM_HEADERS = (
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would hold events back
)
DONE = b"data: [DONE]\n\n"
logger = logging.getLogger(__name__)


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


class TextEvents:
    """Events that differ in one text only, which is nearly all of a stream: encoded around it once.

    content: such an event, where the text stands last and is "".
    """

    __slots__ = ("_head", "_tail")

    def __init__(self, content: msgspec.Struct, field: bytes) -> None:
        head, mark, self._tail = event(content).rpartition(b'"%b":""' % field)
        self._head = head + mark[:-2]

    def of(self, text: str) -> bytes:
        return b"%b%b%b" % (self._head, encode(text), self._tail)


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
