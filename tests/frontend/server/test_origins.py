"""A browser is a stranger: foreign names, foreign pages and what is no JSON stay outside."""

import asyncio
import logging
import re
from itertools import count
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.server import middleware
from tests.frontend.server.served import error_of, listening, served
from tests.waiting import WAIT_S

OWN = {"host": "localhost:8000", "origin": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("headers", "settings", "status"),
    [
        ({}, {}, 200),
        ({"host": "localhost:8000"}, {}, 200),
        ({"host": "127.0.0.1:9"}, {}, 200),
        ({"host": "[::1]:9"}, {}, 200),
        ({"host": "LOCALHOST"}, {}, 200),
        ({"host": "evil.example:8000"}, {}, 403),
        ({"host": "localhost.evil.example"}, {}, 403),
        ({"host": "me.example"}, {"allowed_hosts": ["me.example"]}, 200),
        ({"host": "evil.example"}, {"allowed_hosts": ["me.example"]}, 403),
        ({"host": "anything"}, {"allowed_hosts": ["*"]}, 200),
        ({"host": "anything"}, {"host": "0.0.0.0"}, 200),
        ({"host": "anything"}, {"host": "0.0.0.0", "allowed_hosts": ["me.example"]}, 403),
        (OWN, {}, 200),
        ({**OWN, "origin": "http://localhost:8001"}, {}, 403),
        ({**OWN, "origin": "http://evil.example"}, {}, 403),
        ({**OWN, "origin": "null"}, {}, 403),
        ({**OWN, "origin": "http://evil.example"}, {"host": "0.0.0.0"}, 403),
        ({**OWN, "origin": "http://me.example"}, {"allowed_origins": ["http://me.example"]}, 200),
        ({**OWN, "origin": "http://me.example"}, {"allowed_origins": ["*"]}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, {}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, {}, 200),
        ({"x-forwarded-host": "localhost", "host": "evil.example"}, {}, 403),
        (
            {"host": "127.0.0.1", "origin": "https://me.example", "x-forwarded-host": "me.example"},
            {"trusted_proxies": ["127.0.0.1"], "allowed_hosts": ["me.example"]},
            200,
        ),
    ],
)
async def test_who_may_call(
    address: str, headers: dict[str, str], settings: dict[str, Any], status: int
) -> None:
    async with served(address, **settings) as server:
        for path in ("/version", "/", "/v1/models"):
            found = await server.client.get(path, headers=headers)
            assert (found.status_code == 403) == (status == 403), (path, found.text)
        found = await server.client.post(
            "/v1/completions", headers=headers, json={"prompt": "hi", "max_tokens": 2}
        )
        assert found.status_code == status, found.text
        if status == 403:
            assert error_of(found)["code"] in ("host_refused", "origin_refused")


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/json"],
)
async def test_only_json_is_read(address: str, kind: str) -> None:
    async with served(address) as server:
        content = b'{"prompt": "hi"}'
        found = await server.client.post(
            "/v1/completions", content=content, headers={"content-type": kind}
        )
        assert found.status_code == 415 and "application/json" in error_of(found)["message"]
        for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"):
            found = await server.client.post(
                "/v1/completions", content=content, headers={"content-type": kind}
            )
            assert found.status_code == 200


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_below_a_prefix_whether_the_proxy_cuts_it_off_or_not(
    address: str, prefix: str
) -> None:
    async with served(address, root_path="/llm", api_key=["k"]) as server:
        for path in ("/health", "/", "/page/main.js"):
            assert (await server.client.get(prefix + path)).status_code == 200
        assert (await server.client.get(prefix + "/v1/models")).status_code == 401
        key = {"authorization": "Bearer k"}
        assert (await server.client.get(prefix + "/v1/models", headers=key)).status_code == 200
        assert (await server.client.get("/lllm/v1/models", headers=key)).status_code == 404


async def test_a_path_cannot_forge_lines_of_the_log(
    address: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is more written down than what was asked for, its status and how long it took."""
    clock = SimpleNamespace(perf_counter=count(7.0, 0.25).__next__)  # read twice for each
    monkeypatch.setattr(middleware, "time", clock)
    with caplog.at_level(logging.INFO):
        async with (
            listening(address, access_log=True) as (url, _, _),
            httpx.AsyncClient(timeout=WAIT_S) as client,
        ):
            await client.get(url + "/x%0d%0aGET%20/forged%1b%5b2J")
            await client.post(url + "/v1/completions", json={"prompt": "a secret prompt"})
    assert "/x%0d%0aGET%20/forged%1b%5b2J" in caplog.text
    assert "\nGET /forged" not in caplog.text and "\x1b" not in caplog.text
    assert "a secret prompt" not in caplog.text
    assert re.findall(r"→ \d+, ([\d.]+) ms", caplog.text) == ["250.0"] * 2


async def test_several_names_of_the_server_are_refused(address: str) -> None:
    async with listening(address) as (url, _, _):
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: 127.0.0.1\r\n\r\n")
        assert b" 400 " in await asyncio.wait_for(reader.readline(), WAIT_S)
        writer.close()


async def test_a_fault_of_the_servers_own_is_told_as_one(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(AsyncLLM, "make_prompt", broken)
    monkeypatch.setattr(AsyncLLM, "prepare", broken)
    async with listening(address) as (url, _, _), httpx.AsyncClient(timeout=WAIT_S) as client:
        answer = await client.post(url + "/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500 and error_of(answer)["code"] is None
        assert "internal error" in answer.text and "secret" not in answer.text
        assert (await client.get(url + "/health")).status_code == 200
