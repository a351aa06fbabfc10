"""Connections within bounds: how many, how long a header, how slow a body or a reader may be.

`run.serve` makes one `ConnectionLimits` and a sweep that looks at all connections each second; the
protocol is uvicorn's, which bounds none of this. Who is too slow is told so and disconnected.
"""

import asyncio
import logging
import resource
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from nanovllm.frontend.server.api_errors import ApiError

MAX_HEADER_BYTES = 1 << 16  # of the URL and all headers, or of what follows a body
HEADERS_TIMEOUT_S = 10.0
BODY_WINDOW_S, MIN_BODY_BYTES = 10.0, 1 << 16  # a body grows by so much in each window, or ends
READER_TIMEOUT_S = 30.0  # without the socket taking anything of an answer
# What a refused client still sends is read for so long, or it would see no answer.
LINGER_S, MAX_IGNORED_BYTES = 2.0, 1 << 20
SWEEP_INTERVAL_S = 1.0
SWEPT_AT_ONCE = 16
MAX_PIPELINED = 4  # requests that a connection may have waiting while its end is watched for
MAX_WAITING = 128  # requests that it may have waiting at all: a read can bring thousands of them
SPARE_DESCRIPTORS = 256
REASONS = {408: b"Request Timeout", 414: b"URI Too Long", 431: b"Request Header Fields Too Large"}
REASONS |= {400: b"Bad Request", 503: b"Service Unavailable"}


# uvicorn warns of each connection that speaks no HTTP: it is answered, and there may be thousands.
CLIENT_FAULTS = logging.getLogger(f"{__name__}.faults")
CLIENT_FAULTS.setLevel(logging.ERROR)


class ConnectionLimits(NamedTuple):
    """Of one HTTP process."""

    max_connections: int
    headers_timeout_s: float = HEADERS_TIMEOUT_S
    body_window_s: float = BODY_WINDOW_S
    reader_timeout_s: float = READER_TIMEOUT_S


class HttpProtocol(HttpToolsProtocol):
    """One connection. It also tells every request of a lost connection, if the client has sent the
    next one before it had the answer: uvicorn would stop reading then, and tell only the last."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = CLIENT_FAULTS
        self._limits = limits
        self._overtaken: list[RequestResponseCycle] = []
        self._refused_at = 0.0
        self._num_ignored_bytes = 0  # since then
        self._headers_since = 0.0  # 0: none are awaited; a kept connection may idle
        self._num_header_bytes = 0  # or of what came since the last piece of a body
        self._body_since = 0.0  # the start of a window
        self._num_body_bytes = 0  # in this window
        self._stuck_since = 0.0  # the socket takes nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers_since = time.monotonic()
        if len(self.connections) > self._limits.max_connections:
            self._refuse(503, f"there are {self._limits.max_connections} connections already")
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._refused_at or self.transport.is_closing():
            return self._ignore(data)
        if not self._headers_since and not self._body_since:
            self._headers_since = time.monotonic()
        view = memoryview(data)
        while len(view) and not self._refused_at:
            room = MAX_HEADER_BYTES - self._num_header_bytes
            piece, view = bytes(view[:room]), view[room:]
            self._num_header_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._num_header_bytes >= MAX_HEADER_BYTES:
                self._refuse_headers()

    def _ignore(self, data: bytes) -> None:
        self._num_ignored_bytes += len(data)
        if self._num_ignored_bytes > MAX_IGNORED_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers_since = self._headers_since or time.monotonic()

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_WAITING:
            self.transport.abort()  # an answer would come between those that are under way
            return
        before: RequestResponseCycle | None = self.cycle
        self._headers_since = 0.0
        self._num_body_bytes = 0
        self._body_since = time.monotonic()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = _sends_until_close(self.cycle)  # type: ignore[method-assign, assignment]
        self._overtaken = [one for one in self._overtaken if not one.response_complete]
        if before is not None and before is not self.cycle and not before.response_complete:
            self._overtaken.append(before)
            if len(self.pipeline) <= MAX_PIPELINED:
                self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_header_bytes = 0
        self._body_since = 0.0

    def pause_writing(self) -> None:
        self._stuck_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck_since = 0.0
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in self._overtaken:
            cycle.disconnected = True
            cycle.message_event.set()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP that the server understands")

    def sweep(self, now: float) -> None:
        """Close the connection if it has been too slow."""
        limits = self._limits
        if self.transport.is_closing():  # what is left to send is not read, perhaps
            self._stuck_since = self._stuck_since or now
        if self._stuck_since and now - self._stuck_since > limits.reader_timeout_s:
            self.transport.abort()
        elif self._refused_at:
            if now - self._refused_at > LINGER_S:
                self.transport.abort()
        elif self._headers_since and now - self._headers_since > limits.headers_timeout_s:
            if self.cycle is None and self._num_header_bytes == 0:  # there is nobody to tell
                self.transport.close()
            elif self.cycle is None or self.cycle.response_complete:
                self._refuse(408, f"no whole header within {limits.headers_timeout_s:g} s")
        elif self._body_since and now - self._body_since > limits.body_window_s:
            if self.flow.read_paused or self._num_body_bytes >= MIN_BODY_BYTES:
                self._body_since, self._num_body_bytes = now, 0
            else:
                least = f"{MIN_BODY_BYTES} bytes in {limits.body_window_s:g} s"
                self._refuse(408, f"the body comes too slowly: less than {least}")

    def _refuse_headers(self) -> None:
        status = 431 if self.headers or self._body_since else 414
        self._refuse(status, f"the URL and the headers exceed {MAX_HEADER_BYTES} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and take nothing more from this client."""
        in_body = self._body_since > 0
        self._refused_at = time.monotonic()
        self._headers_since = self._body_since = 0.0
        self._unset_keepalive_if_required()
        cycle = self.cycle
        if in_body and cycle is not None and cycle.response_complete:  # he has his answer
            self.transport.abort()
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # as if he had left: whoever waits for his body learns of it
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        body = ApiError(status, message).body()
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\n" % (status, REASONS[status])
        self.transport.write(
            head + b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        self.transport.write_eof()


def _sends_until_close(cycle: RequestResponseCycle) -> Callable[[Any], Awaitable[None]]:
    """`cycle.send` for HTTP/1.0, which knows no chunks: an answer without a length ends with its
    connection. uvicorn counts what is left of a length, so it is told what comes."""
    send, is_endless = cycle.send, False

    async def unframed(message: Any) -> None:
        nonlocal is_endless
        if message["type"] == "http.response.start":
            is_endless = all(name.lower() != b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = False if is_endless else None
        elif is_endless:
            more = message.get("more_body", False)
            cycle.expected_content_length = len(message.get("body", b"")) + more
        await send(message)

    return unframed


async def sweep(connections: Iterable[Any]) -> None:
    """For ever. connections: of the server, as they are at each moment. Thousands may have to be
    closed at once, which takes some milliseconds: others have their turn after every few."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        now = time.monotonic()
        for index, connection in enumerate(list(connections), 1):
            connection.sweep(now)
            if index % SWEPT_AT_ONCE == 0:
                await asyncio.sleep(0)


def most_connections(wanted: int) -> int:
    """As many as this process may have descriptors for; asks the system for as many as it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    available = needed if soft == resource.RLIM_INFINITY else soft
    return max(1, min(wanted, available - SPARE_DESCRIPTORS))
