"""Connections that are slow, many, endless or deaf: each ends in time, and nobody else notices."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.server import connections, run
from nanovllm.frontend.server.connections import MAX_WAITING, ConnectionLimits
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.protocol.messages import Abort, AddRequest, Outputs, Started, ToCore
from tests.frontend.fake_core import begin, echo, silent
from tests.frontend.server import served
from tests.frontend.server.served import listening, message_of, roomy
from tests.waiting import WAIT_S

TIMEOUT_S = WAIT_S
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits in less time, for what is to be ended by them."""
    limit_to(0.5, monkeypatch)
    monkeypatch.setattr(connections, "SWEEP_INTERVAL_S", 0.1)


def limit_to(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More for what is to end before them, also on a busy machine."""

    def limits(max_connections: int) -> ConnectionLimits:
        return ConnectionLimits(max_connections, seconds, seconds, 2 * seconds)

    monkeypatch.setattr(run, "ConnectionLimits", limits)


Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(url: str) -> Connected:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def answer_to(url: str, *pieces: bytes, pause_s: float = 0.0) -> tuple[int, dict[str, Any]]:
    """The status and the error of whoever sends this and waits; the connection ends in time."""
    reader, writer = await connect(url)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        text = await asyncio.wait_for(reader.read(), TIMEOUT_S)
    finally:
        writer.close()
    if not text:
        return 0, {}
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("num_requests", "are_all_answered"), [(MAX_WAITING, True), (20 * MAX_WAITING, False)]
)
async def test_requests_sent_before_their_answers_are_bounded(
    address: str, num_requests: int, are_all_answered: bool
) -> None:
    """A read brings thousands of them, and each would take memory and its turn."""
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    async with listening(address) as (url, _, _):
        reader, writer = await connect(url)
        writer.write((request + b"\r\n") * num_requests + request + b"connection: close\r\n\r\n")
        async with asyncio.timeout(TIMEOUT_S):
            text = b""
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(1 << 16):
                    text += piece
        writer.close()
        num_answered = text.count(b"HTTP/1.1 200 OK")
        assert (num_answered == num_requests + 1) == are_all_answered
        assert num_answered <= MAX_WAITING + 1
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            assert (await client.get(f"{url}/health")).status_code == 200


async def test_headers_that_do_not_come(address: str) -> None:
    async with listening(address) as (url, _, _):
        status, error = await answer_to(url, HEAD)
        assert status == 408 and "header" in error["message"]
        dripping = [bytes([byte]) for byte in b"GET / HTTP"]
        assert (await answer_to(url, *dripping, pause_s=0.1))[0] == 408
        assert await answer_to(url) == (0, {})  # without a word, if not one was said


async def test_a_body_that_does_not_come(address: str) -> None:
    async with listening(address) as (url, core, _):
        status, error = await answer_to(url, HEAD + b"content-length: 100000\r\n\r\n{")
        assert status == 408 and "too slowly" in error["message"]
        dripping = HEAD + b"content-length: 100000\r\n\r\n", *[b"{"] * 15
        assert (await answer_to(url, *dripping, pause_s=0.1))[0] == 408
        assert not core.all_of(AddRequest)


async def test_a_body_that_comes_in_pieces_but_in_time_is_taken(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_to(4.0, monkeypatch)
    async with listening(address, roomy(echo)) as (url, _, _):
        body = b" " * 300_000 + json.dumps({"prompt": "hi"}).encode()
        head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        reader, writer = await connect(url)
        writer.write(head)
        for at in range(0, len(body), 30_000):
            writer.write(body[at : at + 30_000])
            await writer.drain()
            await asyncio.sleep(0.4)  # it takes longer than the limit
        assert b" 200 " in (await asyncio.wait_for(reader.read(), TIMEOUT_S))[:20]
        writer.close()


@pytest.mark.parametrize(
    ("start", "endless", "status"),
    [
        (b"GET /", b"x" * 65_536, 414),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ", b"x" * 65_536, 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n", b"x: y\r\n" * 10_000, 431),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 10_000, 431),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 65_536, 431),
    ],
    ids=["url", "a header", "headers", "trailers", "a chunk's extension"],
)
async def test_headers_without_end(address: str, start: bytes, endless: bytes, status: int) -> None:
    """Also before the key is checked; what was sent is not kept."""
    async with listening(address, api_key=["secret"]) as (url, _, _):
        before = psutil.Process().memory_info().rss
        _, writer = await connect(url)
        writer.write(start)
        with pytest.raises(ConnectionError):
            for _ in range(1600):  # 100 MB
                writer.write(endless)
                await writer.drain()
            raise AssertionError("all of it was taken")
        assert psutil.Process().memory_info().rss - before < 30e6
        writer.close()
        assert (await answer_to(url, start + endless * 2))[0] == status


async def test_more_connections_than_allowed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(WAIT_S, monkeypatch)
    async with listening(address, max_connections=5) as (url, _, _):
        opened = [await connect(url) for _ in range(5)]
        assert (await answer_to(url))[0] == 503
        for _, writer in opened:
            writer.close()
        async with httpx.AsyncClient(timeout=WAIT_S) as client, asyncio.timeout(TIMEOUT_S):
            while (await client.get(f"{url}/version")).status_code != 200:
                await asyncio.sleep(0.02)  # until the server has seen that they are gone


def flood(message: ToCore) -> Any:
    """More than sockets hold."""
    if not isinstance(message, AddRequest):
        yield from silent(message)
        return
    yield Outputs(started=[Started(message.number, 0, 1.0)])
    for _ in range(1000):
        yield Outputs(numbers=[message.number] * 2000, token_ids=[97] * 2000)


async def test_a_reader_that_stops_reading_is_dropped(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind_small(*args: Any, **kwargs: Any) -> socket.socket:
        listener = run.bind(*args, **kwargs)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        return listener

    monkeypatch.setattr(served, "bind", bind_small)
    async with listening(address, roomy(flood)) as (url, core, serving):
        body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 4000}).encode()
        _, writer = await connect(url)
        writer.transport.pause_reading()
        writer.write(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await message_of(core, AddRequest)
        await asyncio.wait_for(asyncio.to_thread(core.wait_for, Abort), TIMEOUT_S)
        await until(lambda: serving.num_requests == 0)
        writer.close()


async def test_hundreds_of_idle_and_slow_ones_beside_a_stream(address: str) -> None:
    async with listening(address, roomy(echo)) as (url, _, _):
        before = num_descriptors()
        lines = [b"", b"G", HEAD, HEAD + b"content-length: 9\r\n\r\n{"]
        opened = []
        for number in range(400):
            reader, writer = await connect(url)
            writer.write(lines[number % len(lines)])
            opened.append((reader, writer))
        async with httpx.AsyncClient(timeout=WAIT_S) as client:
            response = await client.post(f"{url}/v1/completions", json={"prompt": "hi"})
            assert response.status_code == 200
        for reader, writer in opened:
            await asyncio.wait_for(reader.read(), TIMEOUT_S)
            writer.close()
        await until(lambda: num_descriptors() <= before + 5)


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_half_sent_bodies_have_a_budget(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes beyond it is refused for now, but for small bodies; it is given back."""
    limit_to(5.0, monkeypatch)
    async with listening(address, roomy(echo), max_body_bytes=100_000) as (url, _, _):
        opened = []
        for _ in range(12):
            reader, writer = await connect(url)
            writer.write(HEAD + b"content-length: 95000\r\n\r\n" + b" " * 90_000)
            await writer.drain()
            opened.append((reader, writer))
        refused = 0
        for reader, writer in opened:
            head = await asyncio.wait_for(reader.read(), TIMEOUT_S)
            assert head[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 503")
            refused += head[:12] == b"HTTP/1.1 503"
            writer.close()
        assert refused == 4
        async with httpx.AsyncClient(timeout=WAIT_S) as client:
            padded = {"prompt": "hi", "user": "x", "stop": None, "suffix": ""}
            content = json.dumps(padded).encode() + b" " * 90_000
            kind = {"content-type": "application/json"}
            for _ in range(12):
                found = await client.post(f"{url}/v1/completions", content=content, headers=kind)
                assert found.status_code == 200, found.text


async def test_many_are_closed_in_turns() -> None:
    """And others have theirs in between."""
    swept: list[int] = []

    class Connection:
        def __init__(self, number: int) -> None:
            self.number = number

        def sweep(self, now: float) -> None:
            swept.append(self.number)

    many = [Connection(number) for number in range(10 * connections.SWEPT_AT_ONCE)]
    sweeping = asyncio.create_task(connections.sweep(many))
    most, seen = 0, 0
    async with asyncio.timeout(TIMEOUT_S):
        while len(swept) < len(many):
            await asyncio.sleep(0)
            most, seen = max(most, len(swept) - seen), len(swept)
    sweeping.cancel()
    assert most <= connections.SWEPT_AT_ONCE and swept[: len(many)] == list(range(len(many)))


async def test_what_is_no_http_is_answered_and_not_logged(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(address, roomy(echo)) as (url, _, _):
        status, error = await answer_to(url, b"\0\0\0\r\n\r\n")
    assert status == 400 and "no HTTP" in error["message"] and not caplog.records


async def test_a_port_takes_connections_before_the_engine_is_open() -> None:
    """So whoever is told that the server is ready can connect, however soon the engine was."""
    settings = ServerSettings(port=0)
    listener = run.bind(settings, shared=False)

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.close()
        raise ValueError("connected")

    async with asyncio.timeout(WAIT_S):
        assert await run.serve(settings, open_llm, listener, lambda _: None) == run.USAGE_ERROR


async def test_who_sends_on_after_a_refusal_is_cut_off(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 10 * WAIT_S)
    async with listening(address) as (url, _, _):
        reader, writer = await connect(url)
        writer.write(b"GET /" + b"a" * (2 * connections.MAX_HEADER_BYTES))
        assert b" 414 " in await asyncio.wait_for(reader.read(), WAIT_S)
        num_sent = 0
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(WAIT_S):
                while True:
                    writer.write(b"a" * 2**16)
                    await writer.drain()
                    num_sent += 2**16
        assert num_sent >= connections.MAX_IGNORED_BYTES - connections.MAX_HEADER_BYTES
        writer.close()


async def test_who_has_his_answer_gets_no_second_one_for_a_body_that_stops(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 10 * WAIT_S)
    async with listening(address) as (url, _, _):
        reader, writer = await connect(url)
        writer.write(
            HEAD.replace(b"/v1/completions", b"/nowhere") + b"content-length: 99\r\n\r\nab"
        )
        got = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WAIT_S):
                while piece := await reader.read(1000):
                    got += piece
        assert got.count(b"HTTP/1.1 ") == 1 and b" 404 " in got
        writer.close()


async def test_what_is_no_http_ends_an_answer_that_is_under_way(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second head may stand within its text, and the request need not go on."""
    limit_to(10 * WAIT_S, monkeypatch)
    monkeypatch.setattr(connections, "LINGER_S", 10 * WAIT_S)
    async with listening(address, roomy(begin)) as (url, core, serving):
        reader, writer = await connect(url)
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        writer.write(HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        got = await asyncio.wait_for(reader.readuntil(b"data: "), WAIT_S)
        writer.write(b"\0\0\0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            got += await asyncio.wait_for(reader.read(), WAIT_S)
        assert got.count(b"HTTP/1.1 ") == 1
        await message_of(core, Abort)
        await until(lambda: serving.num_requests == 0)
        writer.close()


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "asked", "most"),
    [
        (1000, 4000, 1000, 1256, 1000),
        (1000, 1100, 1000, 1100, 844),
        (1000, -1, 1000, 1256, 1000),
        (1256, 4000, 1000, None, 1000),
        (1255, 1255, 1000, 1255, 999),
        (-1, -1, 1000, None, 1000),
        (100, 100, 1000, 100, 1),
    ],
)
def test_connections_are_as_many_as_descriptors_allow(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, asked: int, most: int
) -> None:
    """Some are kept for other files. -1: as many as one likes."""
    set_to: list[tuple[int, int]] = []
    limits = SimpleNamespace(
        RLIMIT_NOFILE=7,
        RLIM_INFINITY=-1,
        getrlimit=lambda kind: (soft, hard),
        setrlimit=lambda kind, value: set_to.append(value),
    )
    monkeypatch.setattr(connections, "resource", limits)
    assert connections.most_connections(wanted) == most
    assert set_to == ([] if asked is None else [(asked, hard)])
