"""Each bound of a connection to the byte and the second, by a clock and a wire of a test."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from nanovllm.frontend.server import connections
from nanovllm.frontend.server.connections import (
    LINGER_S,
    MAX_HEADER_BYTES,
    MAX_IGNORED_BYTES,
    MAX_PIPELINED,
    MIN_BODY_BYTES,
    ConnectionLimits,
    HttpProtocol,
)
from tests.waiting import WAIT_S

LIMITS = ConnectionLimits(2, headers_timeout_s=10, body_window_s=20, reader_timeout_s=30)
HEAD = b"POST /%b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"


class Wire(asyncio.Transport):
    """What was written to it, and how it was ended."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.ended = b"", ""
        self.reads = True

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def write_eof(self) -> None:
        self.ended = self.ended or "half"

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def is_closing(self) -> bool:
        return self.ended in ("closed", "aborted")

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    @property
    def statuses(self) -> list[int]:
        return [int(piece[:3]) for piece in self.written.split(b"HTTP/1.1 ")[1:]]


class Port:
    """Makes connections to an application that does what each path says."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self.clock = clock
        self.state = ServerState()
        self.left: list[str] = []  # the requests whose clients left, by their paths
        self.bodies: dict[str, int] = {}
        self.may_answer = asyncio.Event()
        self._config = Config(self._app, interface="asgi3", lifespan="off", log_config=None)

    def connect(self) -> tuple[HttpProtocol, Wire]:
        one, wire = HttpProtocol(self._config, self.state, {}, limits=LIMITS), Wire()
        one.connection_made(wire)
        return one, wire

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        path: str = scope["path"][1:]
        if path.startswith("read"):
            self.bodies[path] = 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.left.append(path)
                    return
                self.bodies[path] += len(message["body"])
                if not message["more_body"]:
                    break
        if path.startswith("wait"):
            await self.may_answer.wait()
        length = [] if path.startswith("endless") else [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        if path.startswith("hold"):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.append(path)
            return
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await send({"type": "http.response.body", "body": b"k"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Port:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return Port(clock)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def settled() -> None:
    """What could run has run."""
    for _ in range(20):
        await asyncio.sleep(0)


def pass_time(port: Port, one: HttpProtocol, seconds: float) -> None:
    port.clock.now += seconds
    one.sweep(port.clock.now)


async def test_as_many_connections_as_are_allowed(port: Port) -> None:
    (_, first), (one, second), (_, third) = port.connect(), port.connect(), port.connect()
    assert (first.ended, second.ended, third.ended) == ("", "", "closed")
    assert third.statuses == [503] and b"there are 2 connections already" in third.written
    one.data_received(HEAD % (b"", 0))
    await until(lambda: second.statuses == [200])


async def test_who_says_nothing_is_left_without_a_word(port: Port) -> None:
    one, wire = port.connect()
    pass_time(port, one, 10)
    assert not wire.ended
    pass_time(port, one, 0.1)
    assert (wire.ended, wire.written) == ("closed", b"")


async def test_a_header_has_its_time_once(port: Port) -> None:
    """However many pieces it comes in."""
    one, wire = port.connect()
    for byte in b"GET /":
        pass_time(port, one, 2)
        one.data_received(bytes([byte]))
    assert not wire.ended
    pass_time(port, one, 0.1)
    assert wire.statuses == [408] and b"no whole header within 10 s" in wire.written
    assert wire.ended == "half", "until its answer has been read"
    pass_time(port, one, LINGER_S)
    assert wire.ended == "half"
    pass_time(port, one, 0.1)
    assert wire.ended == "aborted"


async def test_a_connection_that_is_kept_may_idle_and_its_next_header_may_not(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"", 0))
    await until(lambda: wire.written.endswith(b"ok"))
    pass_time(port, one, 100)
    assert not wire.ended
    one.data_received(b"GET")
    pass_time(port, one, 10.1)
    assert wire.statuses == [200, 408]


async def test_a_header_that_comes_with_the_request_before_has_its_time_too(port: Port) -> None:
    """It begins amid a packet; while the answer before it is under way nobody can be told."""
    one, wire = port.connect()
    one.data_received(HEAD % (b"wait", 0) + b"GET /")
    await settled()
    pass_time(port, one, 100)
    assert (wire.ended, wire.written) == ("", b"")
    port.may_answer.set()
    await until(lambda: wire.written.endswith(b"ok"))
    pass_time(port, one, 0)
    assert wire.statuses == [200, 408]


async def test_a_body_grows_by_so_much_in_each_window(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"read", 10**6) + b" " * MIN_BODY_BYTES)
    await settled()
    pass_time(port, one, 20)
    pass_time(port, one, 0.1)
    await settled()
    assert not wire.ended and wire.reads
    one.data_received(b" " * (MIN_BODY_BYTES - 1))
    await settled()
    pass_time(port, one, 20)
    assert not wire.ended, "the second window began when the first was over"
    pass_time(port, one, 0.1)
    assert wire.statuses == [408]
    assert b"the body comes too slowly: less than 65536 bytes in 20 s" in wire.written
    await until(lambda: port.left == ["read"])


async def test_a_body_that_is_not_taken_is_not_slow(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"wait", 10**6) + b" ")
    one.flow.pause_reading()
    for _ in range(3):
        pass_time(port, one, 20.1)
    assert not wire.ended
    one.flow.resume_reading()
    pass_time(port, one, 20.1)
    assert wire.statuses == [408]


async def test_a_whole_body_may_be_answered_in_any_time(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"wait", 1) + b" ")
    await settled()
    pass_time(port, one, 1000)
    assert not wire.ended
    port.may_answer.set()
    await until(lambda: wire.written.endswith(b"ok"))
    one.data_received(HEAD % (b"read2", 10**6) + b" " * MIN_BODY_BYTES)
    await settled()
    for _ in range(2):
        pass_time(port, one, 20.1)
    assert wire.statuses == [200, 408], "what the body before it had does not count for it"


async def test_whoever_does_not_read_an_answer_is_dropped(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"hold", 0))
    await settled()
    one.pause_writing()
    pass_time(port, one, 29)
    one.resume_writing()
    pass_time(port, one, 29)
    assert not wire.ended and not one.flow.write_paused
    one.pause_writing()
    assert one.flow.write_paused
    pass_time(port, one, 30)
    assert not wire.ended
    pass_time(port, one, 0.1)
    assert wire.ended == "aborted"


async def test_what_a_closed_connection_has_left_to_send_is_read_in_time(port: Port) -> None:
    one, wire = port.connect()
    wire.close()
    for seconds, ended in ((100, "closed"), (30, "closed"), (0.1, "aborted")):
        pass_time(port, one, seconds)
        assert wire.ended == ended


@pytest.mark.parametrize(
    ("start", "status"),
    [(b"GET /", 414), (b"GET / HTTP/1.1\r\nhost: a\r\nx: ", 431)],
    ids=["url", "header"],
)
async def test_headers_have_a_size(port: Port, start: bytes, status: int) -> None:
    one, wire = port.connect()
    one.data_received(start)
    one.data_received(b"x" * (MAX_HEADER_BYTES - len(start) - 1))
    assert not wire.ended
    one.data_received(b"x")
    assert wire.statuses == [status]
    assert b"the URL and the headers exceed 65536 bytes" in wire.written


async def test_each_request_of_a_connection_has_all_of_the_size(port: Port) -> None:
    """And what follows a piece of a body, too."""
    one, wire = port.connect()
    padding = b"x: " + b"x" * (MAX_HEADER_BYTES // 2)
    head = b"POST /read HTTP/1.1\r\ntransfer-encoding: chunked\r\n" + padding + b"\r\n\r\n"
    for number in range(1, 4):
        one.data_received(head)
        for _ in range(3):
            one.data_received(b"1;" + b"x" * (MAX_HEADER_BYTES // 3) + b"\r\n \r\n")
        one.data_received(b"0\r\n\r\n")
        await until(lambda number=number: wire.statuses == [200] * number)
        await settled()
        assert port.bodies["read"] == 3
    one.data_received(head + b"1;" + b"x" * MAX_HEADER_BYTES)
    assert wire.statuses == [200, 200, 200, 431] and wire.ended == "half"


async def test_what_a_refused_client_sends_is_ignored_up_to_a_limit(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(b"\0\r\n\r\n")
    assert wire.statuses == [400]
    one.data_received(HEAD % (b"", 0))
    one.data_received(b" " * (MAX_IGNORED_BYTES - len(HEAD % (b"", 0))))
    await settled()
    assert wire.statuses == [400] and wire.ended == "half"
    one.data_received(b" ")
    assert wire.ended == "aborted"


async def test_requests_that_overtake_an_answer_wait_and_learn_of_the_end(port: Port) -> None:
    """As many as may wait while the connection is watched; of all of them."""
    one, wire = port.connect()
    one.data_received(HEAD % (b"", 0))
    await until(lambda: wire.statuses == [200])
    one.data_received(HEAD % (b"hold", 0))
    await until(lambda: wire.statuses == [200, 200])
    for number in range(MAX_PIPELINED + 1):
        assert wire.reads
        one.data_received(HEAD % (b"read%d" % number, 0))
    assert not wire.reads
    one.connection_lost(None)
    await until(lambda: "hold" in port.left)
    assert all(cycle.disconnected for cycle in one._overtaken)


async def test_answers_come_in_the_order_of_requests(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"wait", 0) + HEAD % (b"read", 3) + b"abc" + HEAD % (b"", 0))
    await settled()
    assert wire.written == b""
    port.may_answer.set()
    await until(lambda: wire.statuses == [200, 200, 200])
    assert port.bodies == {"read": 3} and len(one._overtaken) <= 2
    one.data_received(HEAD % (b"", 0))
    await until(lambda: wire.statuses == [200] * 4)
    assert one._overtaken == [] and not wire.ended


async def test_a_refusal_amid_an_answer_cuts_it_off(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"hold", 0))
    await until(lambda: wire.statuses == [200])
    one.data_received(b"\0\r\n\r\n")
    assert wire.statuses == [200] and wire.ended == "aborted"
    await until(lambda: port.left == ["hold"])


async def test_a_body_that_stops_after_its_answer_is_cut_off(port: Port) -> None:
    one, wire = port.connect()
    one.data_received(HEAD % (b"", 10**6))
    await until(lambda: wire.written.endswith(b"ok"))
    pass_time(port, one, 20.1)
    assert wire.statuses == [200] and wire.ended == "aborted"


@pytest.mark.parametrize("path", [b"", b"endless"])
async def test_http_1_0_knows_no_chunks(port: Port, path: bytes) -> None:
    """An answer without a length is ended by its connection."""
    one, wire = port.connect()
    one.data_received(b"GET /%b HTTP/1.0\r\n\r\n" % path)
    await until(lambda: wire.ended == "closed")
    head, _, body = wire.written.partition(b"\r\n\r\n")
    assert body == b"ok" and b"chunked" not in head and b"connection: close" in head
    assert (b"content-length: 2" in head) == (path == b"")
    other, wire = port.connect()
    other.data_received(b"GET /%b HTTP/1.1\r\n\r\n" % path)
    await until(lambda: wire.written.endswith(b"0\r\n\r\n" if path else b"ok"))
    assert not wire.ended
