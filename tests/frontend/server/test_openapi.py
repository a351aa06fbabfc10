"""Requests made up from our own OpenAPI document: none may break the server or its promises."""

import asyncio
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from nanovllm.frontend.server.app import ENDPOINTS
from nanovllm.protocol.messages import Call, CallResult, FromCore, ToCore
from nanovllm.protocol.watch import BlockContents
from tests.frontend.fake_core import STATUS, echo
from tests.frontend.server.served import listening, served
from tests.waiting import WAIT_S

NUM_EXAMPLES = 10
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance,negative_data_rejection,"
    "unsupported_method,ignored_auth"
)
# 413 is right, too: a body of too much is refused before its fields are looked at.
CONFIG = Path(__file__).with_name("schemathesis.toml")


async def schemathesis(url: str, *options: str) -> tuple[int, str]:
    """Its exit code and its report."""
    run = ("--config-file", str(CONFIG), "run", f"{url}/openapi.json", "--checks", CHECKS)
    command = ["-m", "schemathesis.cli", *run]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        *(
            "--max-examples",
            str(NUM_EXAMPLES),
            "--seed",
            "1",
            "--no-color",
            "--phases",
            "coverage,fuzzing",
            "--suppress-health-check",
            "too_slow",  # as data is on a busy machine
            "--request-timeout",
            str(WAIT_S),
            *options,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_the_document_describes_every_endpoint(address: str) -> None:
    async with listening(address) as (url, _, _s), httpx.AsyncClient(timeout=WAIT_S) as client:
        document = (await client.get(f"{url}/openapi.json")).json()
    assert set(document["paths"]) == {endpoint.path for endpoint in ENDPOINTS}
    for endpoint in ENDPOINTS:
        responses = document["paths"][endpoint.path][endpoint.method.lower()]["responses"]
        kinds = {"application/json"} if endpoint.answer else set()
        kinds |= {"text/event-stream"} if endpoint.event else set()
        assert set(responses["200"]["content"]) == (kinds or {"text/plain"}), endpoint.path
        statuses = {200, endpoint.also or 200, *endpoint.errors}
        assert set(responses) == set(map(str, statuses)), endpoint.path
    chat = document["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    fields = document["components"]["schemas"][body]["properties"]
    assert {"messages", "tools", "stream_options", "min_p", "cache_salt"} <= fields.keys()


def shows_blocks(message: ToCore) -> Iterable[FromCore]:
    if isinstance(message, Call):
        yield CallResult(message.call_id, BlockContents(1, 1, "ab", "", 0, [3], [65, 66]))
    else:
        yield from echo(message)


async def test_no_request_breaks_the_server_or_its_promises(address: str) -> None:
    settings = {"api_key": ["secret"], "engine_view": "full"}
    async with listening(address, shows_blocks, **settings) as (url, core, serving):

        async def show_life() -> None:
            while True:
                core.push(STATUS)
                await asyncio.sleep(1)

        living = asyncio.create_task(show_life())
        endless = ("--exclude-path", "/v1/engine/events")
        code, report = await schemathesis(url, "-H", "Authorization: Bearer secret", *endless)
        living.cancel()
        assert serving.num_requests == 0
    assert code == 0, report


async def test_the_document_tells_of_keys_where_there_are_some(address: str) -> None:
    async def documents(**settings: object) -> dict[str, Any]:
        async with served(address, **settings) as server:
            found: dict[str, Any] = (await server.client.get("/openapi.json")).json()
            return found

    open_to_all, guarded = await documents(), await documents(api_key=["secret"])
    for document, has_keys in ((open_to_all, False), (guarded, True)):
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}} if has_keys else None
        assert document["components"].get("securitySchemes") == schemes
        chat = document["paths"]["/v1/chat/completions"]["post"]
        health = document["paths"]["/health"]["get"]
        assert chat["requestBody"]["required"] is True and "requestBody" not in health
        assert chat.get("security") == ([{"bearer": []}] if has_keys else None)
        assert ("401" in chat["responses"]) is has_keys
        assert "security" not in health and "401" not in health["responses"]
