"""Clients that leave, lag or come in crowds, over real sockets."""

import asyncio
import contextlib
import os
import random
import re
import socket

import httpx
import pytest

from nanovllm.frontend.server import run
from nanovllm.frontend.server.endpoint import until_disconnect
from nanovllm.frontend.server.serving import Serving
from nanovllm.protocol.messages import Abort, AddRequest, Finished, Outputs
from tests.frontend.attached import settled
from tests.frontend.fake_core import begin, echo, silent
from tests.frontend.server import served
from tests.frontend.server.served import JSON_HEAD, TIMEOUT_S, bind_small, listening, message_of
from tests.waiting import WAIT_S

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def wait_until_idle(serving: Serving) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while serving.num_requests:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("script", [begin, silent], ids=["after the first token", "before it"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_that_leaves_aborts_its_request(
    address: str, script: object, stream: bool, path: str
) -> None:
    prompt = CHAT if "chat" in path else {"prompt": ["a", "b"]}
    async with listening(address, script) as (url, core, serving):  # type: ignore[arg-type]
        async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
            task = asyncio.create_task(client.post(path, json={**prompt, "stream": stream}))
            number = (await message_of(core, AddRequest)).number
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert number in (await message_of(core, Abort)).numbers
        await wait_until_idle(serving)


async def test_a_reader_that_lags_gets_tokens_merged(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "bind", bind_small)
    async with listening(address, silent) as (url, core, serving):
        mine = socket.socket()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        mine.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=mine)
        writer.transport.pause_reading()
        body = b'{"messages":[{"role":"user","content":"x"}],"stream":true}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{JSON_HEAD}content-length: {len(body)}\r\n"
        writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
        number = (await message_of(core, AddRequest)).number
        # 600,000 characters, far more than these sockets hold, while nobody reads.
        core.push(*[Outputs([number] * 1000, [65] * 1000) for _ in range(600)])
        core.push(Outputs(finished=[Finished(number, "length", None, 0)]))
        await settled(serving.llm, core)
        writer.transport.resume_reading()
        everything = await asyncio.wait_for(reader.read(), TIMEOUT_S)
        writer.close()
        await wait_until_idle(serving)
    assert everything.count(b"A") >= 600_000
    assert everything.count(b"data: ") < 600


async def test_a_crowd_that_vanishes_leaves_nothing_behind(address: str) -> None:
    rng = random.Random(0)

    async def visit(host: str, port: str) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        text = '{{"prompt":"x","stream":{}}}'.format(rng.choice(["true", "false"]))
        request = f"POST /v1/completions HTTP/1.1\r\n{JSON_HEAD}content-length: {len(text)}\r\n\r\n"
        whole = (request + text).encode()
        writer.write(whole[: rng.choice([0, 20, len(request), len(whole), len(whole)])])
        await asyncio.sleep(rng.random() * 0.05)
        if rng.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async with listening(address, begin) as (url, core, serving):
        host, port = url.removeprefix("http://").split(":")
        await visit(host, port)
        await wait_until_idle(serving)
        num_tasks, num_files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        crowds = 0
        while crowds < 20 or len(core.all_of(AddRequest)) <= 20:  # some leave before they are read
            crowds += 1
            await asyncio.gather(*[visit(host, port) for _ in range(50)])
        await wait_until_idle(serving)
        async with asyncio.timeout(TIMEOUT_S):  # connections without a request end as well
            while len(asyncio.all_tasks()) > num_tasks:
                await asyncio.sleep(0.01)
            while len(os.listdir("/proc/self/fd")) > num_files:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                asked = {message.number for message in core.all_of(AddRequest)}
                ended = {number for message in core.all_of(Abort) for number in message.numbers}
                if asked == ended:
                    break
                await asyncio.sleep(0.01)


async def test_a_drain_lets_requests_finish(address: str) -> None:
    async with (
        listening(address, begin) as (url, core, serving),
        httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client,
    ):
        task = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        number = (await message_of(core, AddRequest)).number
        serving.drain()
        refusal = await client.post("/v1/chat/completions", json=CHAT)
        assert refusal.status_code == 503 and "shuts down" in refusal.text
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        core.push(Outputs(finished=[Finished(number, "length", None, 0)]))
        assert (await task).status_code == 200


async def test_a_drain_does_not_wait_for_ever(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ABORT_GRACE_S", WAIT_S)
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        async with listening(address, begin, shutdown_timeout=0.1) as (url, core, serving):
            chat = url + "/v1/chat/completions"
            task = asyncio.create_task(client.post(chat, json={**CHAT, "stream": True}))
            number = (await message_of(core, AddRequest)).number
            await settled(serving.llm, core)  # its stream has begun

            async def obey() -> None:
                assert (await message_of(core, Abort)).numbers == [number]
                core.push(Outputs(finished=[Finished(number, "abort", None, 0)]))

            obeying = asyncio.create_task(obey())
        text = (await task).text
        await obeying
    assert '"code":"aborted"' in text and text.endswith("data: [DONE]\n\n")


async def test_request_ids_come_back(address: str) -> None:
    async with (
        listening(address) as (url, _, _serving),
        httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client,
    ):
        response = await client.get("/version", headers={"x-request-id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        odd = await client.get("/version", headers={"x-request-id": 'a"b'})
        assert len(odd.headers["x-request-id"]) == 32
        answer = await client.post("/v1/chat/completions", json={**CHAT, "request_id": "mine"})
        assert answer.json()["id"] == "chatcmpl-mine"


async def test_leaving_ends_a_request_that_another_was_sent_behind(address: str) -> None:
    async with listening(address, silent) as (url, core, serving):
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        body = b'{"prompt":"x"}'
        head = f"POST /v1/completions HTTP/1.1\r\n{JSON_HEAD}content-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        number = (await message_of(core, AddRequest)).number
        writer.write(head.encode() + body)
        await asyncio.sleep(0.05)
        writer.close()
        assert number in (await message_of(core, Abort)).numbers
        await wait_until_idle(serving)


async def test_a_client_that_leaves_in_its_body_is_no_error(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(address, silent) as (url, _, serving):
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\n{JSON_HEAD}content-length: 100\r\n\r\n{{".encode()
        )
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(TIMEOUT_S):
            while b'status="499"' not in serving.metrics.exposition():
                await asyncio.sleep(0.01)
    assert not caplog.records


async def test_writing_to_a_connection_being_closed_ends_the_request(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client has said that it sends no more, which uvloop takes for the end of both ways."""
    async with listening(address, begin) as (url, _, serving):
        for _ in range(20):
            _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            body = b'{"prompt":"x","stream":true}'
            head = (
                f"POST /v1/completions HTTP/1.1\r\n{JSON_HEAD}content-length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            writer.write_eof()
            await asyncio.sleep(0)
            writer.close()
        await wait_until_idle(serving)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_stream_over_http_1_0_comes_as_it_is_made_and_without_chunks(address: str) -> None:
    body = b'{"prompt": "hey", "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    async with listening(address, begin) as (url, core, _s):
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        headers = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
        first = await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
        number = (await message_of(core, AddRequest)).number
        core.push(Outputs(finished=[Finished(number, "length", None, 0)]))
        rest = await asyncio.wait_for(reader.read(), TIMEOUT_S)  # up to the connection's end
        writer.close()
    assert headers.split(b"\r\n")[0].endswith(b"200 OK")
    assert b"chunked" not in headers.lower() and b"text/event-stream" in headers
    assert b"connection: close" in headers.lower() and b"content-length" not in headers.lower()
    assert first.startswith(b"data: {") and b'"finish_reason":null' in first
    assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")


async def test_whole_answers_over_http_1_0_say_how_long_they_are(address: str) -> None:
    async with listening(address, echo) as (url, _, _s):
        port = int(url.rpartition(":")[2])
        for method, path in (("GET", "/v1/models"), ("HEAD", "/health"), ("GET", "/nowhere")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
            writer.close()
            headers, _, content = answer.partition(b"\r\n\r\n")
            (length,) = re.findall(rb"content-length: (\d+)", headers.lower())
            assert len(content) == (0 if method == "HEAD" else int(length))


@pytest.mark.parametrize("leaves", [True, False])
async def test_who_leaves_ends_his_answer_and_who_is_cancelled_hears_of_it(leaves: bool) -> None:
    after: list[str] = []

    async def receive() -> dict[str, str]:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def answer() -> None:
        async with until_disconnect(receive):
            await asyncio.Event().wait()
        after.append("goes on")

    task = asyncio.create_task(answer())
    await asyncio.sleep(0)  # it waits for its answer now
    if leaves:
        await asyncio.wait_for(task, WAIT_S)
    else:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert (after == ["goes on"]) == leaves and task.cancelled() != leaves
