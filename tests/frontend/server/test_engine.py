"""The engine's events and blocks over HTTP, who may see them, and the page's files."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import Any

import httpx
import msgspec
import pytest

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.server.page_files import DIRECTORY, docs_files, page_files
from nanovllm.frontend.server.run import bind
from nanovllm.frontend.server.run import serve as run_server
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.watch.events import EngineEvent
from tests.core.serving import serving as core_serving
from tests.frontend.server.served import error_of, served
from tests.frontend.vocabulary import byte_tokenizer
from tests.waiting import WAIT_S

TIMEOUT_S = WAIT_S


@asynccontextmanager
async def opening(
    address: str, may_open: asyncio.Event, *, allow_debug: bool = False, **settings: Any
) -> AsyncIterator[tuple[str, "asyncio.Future[Serving]"]]:
    """A server on a port, with a core that really runs (on a fake device) once it `may_open`."""
    ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    made = ServerSettings(port=0, **settings)

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        on_progress("weights", 0.4)
        await may_open.wait()
        return await AsyncLLM.connect(address, tokenizer=byte_tokenizer(), on_core_death="fail")

    with core_serving(address, block_size=4, allow_debug=allow_debug):
        listener = bind(made, shared=False)
        port = listener.getsockname()[1]
        task = asyncio.create_task(
            run_server(made, open_llm, listener, ready.set_result, lifeline=stop)
        )
        try:
            yield f"http://127.0.0.1:{port}", ready
        finally:
            stop.set()
            await asyncio.wait_for(task, TIMEOUT_S)


@asynccontextmanager
async def engine(address: str, **settings: Any) -> AsyncIterator[tuple[str, Serving]]:
    """Such a server, ready."""
    may_open = asyncio.Event()
    may_open.set()
    async with opening(address, may_open, **settings) as (url, ready):
        yield url, await asyncio.wait_for(ready, TIMEOUT_S)


async def events_of(response: httpx.Response) -> AsyncIterator[EngineEvent]:
    async with asyncio.timeout(TIMEOUT_S):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield msgspec.json.decode(line.removeprefix("data: "), type=EngineEvent)


async def complete(client: httpx.AsyncClient, url: str, **fields: Any) -> dict[str, Any]:
    # Ids below 256 are texts here; the fake device samples up to 999.
    body = {"prompt": "abcdefghijk", "max_tokens": 12, "ignore_eos": True, "seed": 1}
    body |= {"allowed_token_ids": list(range(65, 91)), **fields}
    answer = await client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_request_is_seen_from_its_prompt_to_its_end(address: str) -> None:
    async with engine(address) as (url, _), httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = events_of(response)
            first = await anext(events)
            assert first.kind == "snapshot" and first.layout is not msgspec.UNSET
            assert first.layout.model and first.layout.view == "full"
            await complete(client, url)
            chunks, decodes = [], 0
            async for one in events:
                chunks += [tuple(msgspec.structs.astuple(c)) for s in one.steps for c in s.chunks]
                decodes += sum(step.num_decodes for step in one.steps)
                if one.ended:
                    break
        (end,) = one.ended
        assert (end.reason, end.num_prompt_tokens, end.num_tokens) == ("length", 11, 23)
        assert chunks == [(0, 0, 11)] and decodes == 11
        assert one.counters.num_generation_tokens == 12


async def test_what_is_in_a_block_can_be_asked(address: str) -> None:
    async with engine(address) as (url, _), httpx.AsyncClient(timeout=WAIT_S) as client:
        await complete(client, url)
        block = (await client.get(f"{url}/v1/engine/blocks/2")).json()
        assert block["token_ids"] == list(b"efgh") and block["texts"] == list("efgh")
        assert block["ref_count"] == 0 and block["holders"] == []
        first = (await client.get(f"{url}/v1/engine/blocks/1")).json()
        assert block["parent_key"] == first["key"] and len(first["key"]) == 32
        for unknown in ("0", "200", "10000000000000000000000"):
            answer = await client.get(f"{url}/v1/engine/blocks/{unknown}")
            assert answer.status_code == 404 and error_of(answer)["param"] == "block_id"
        assert (await client.get(f"{url}/v1/engine/blocks/two")).status_code == 404


@pytest.mark.parametrize(
    ("settings", "view"),
    [
        ({}, "full"),
        ({"host": "0.0.0.0"}, "counts"),
        ({"api_key": ["k"]}, "counts"),
        ({"api_key": ["k"], "engine_view": "full"}, "counts"),
        ({"api_key": ["k"], "page": "all"}, "counts"),
        ({"host": "0.0.0.0", "page": "all"}, "counts"),
        ({"page": "all"}, "full"),
        ({"page": "off"}, None),
        ({"page": "counts", "engine_view": "full"}, "counts"),
        ({"engine_view": "counts"}, "counts"),
        ({"engine_view": "off"}, None),
    ],
)
def test_how_much_is_shown_by_default(settings: dict[str, Any], view: str | None) -> None:
    assert ServerSettings(**settings).shown_view == view


async def test_what_a_server_does_not_show_is_refused(address: str) -> None:
    async with served(address, engine_view="off") as server:
        for path in ("/v1/engine/events", "/v1/engine/blocks/1"):
            answer = await server.client.get(path)
            assert answer.status_code == 403 and error_of(answer)["code"] == "engine_view_refused"
        assert (await server.complete("hi")).status_code == 200


async def test_counts_alone_leave_prompts_out(address: str) -> None:
    async with (
        engine(address, engine_view="counts") as (url, _),
        httpx.AsyncClient(timeout=WAIT_S) as client,
    ):
        answer = await client.get(f"{url}/v1/engine/blocks/1")
        assert answer.status_code == 403 and "contents of blocks" in error_of(answer)["message"]
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            first = await anext(events_of(response))
            assert first.layout is not msgspec.UNSET and first.layout.view == "counts"


async def test_the_engine_is_behind_the_key_and_the_page_is_not(address: str) -> None:
    async with served(address, api_key=["secret"], engine_view="full") as server:
        for path in ("/v1/engine/events", "/v1/engine/blocks/1"):
            assert (await server.client.get(path)).status_code == 401
        for path in ("/", "/page/main.js", "/page/style.css"):
            assert (await server.client.get(path)).status_code == 200


async def test_viewers_do_not_hold_up_a_drain(address: str) -> None:
    async with engine(address) as (url, state), httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            lines: list[str] = []
            async with asyncio.timeout(WAIT_S):
                async for line in response.aiter_lines():
                    if not lines:
                        assert state.feed.num_viewers == 1
                        state.drain()
                    lines.append(line)
        assert lines[0].startswith("data: {") and lines[-2:] == ["data: [DONE]", ""]
        await gone(state)


async def test_who_comes_while_the_model_loads_is_told_so_and_then_sees_it(address: str) -> None:
    may_open = asyncio.Event()
    async with opening(address, may_open) as (url, _), httpx.AsyncClient(timeout=WAIT_S) as client:
        await until_listening(client, url)
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            assert response.status_code == 200
            async with asyncio.timeout(TIMEOUT_S):
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        break
                    assert line in (": loading, weights 40%", "")
                    may_open.set()
        assert '"kind":"snapshot"' in line


async def until_listening(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            with contextlib.suppress(httpx.ConnectError):
                await client.get(f"{url}/version")
                return
            await asyncio.sleep(0.01)


async def gone(state: Serving) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while state.feed.num_viewers or state.num_requests:
            await asyncio.sleep(0.01)


async def test_a_viewer_that_leaves_is_forgotten(address: str) -> None:
    async with engine(address) as (url, state), httpx.AsyncClient(timeout=WAIT_S) as client:
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            await anext(events_of(response))
        await gone(state)


# ---- the page


async def test_the_page_comes_with_a_strict_policy(address: str) -> None:
    async with served(address) as server:
        answer = await server.client.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        for rule in ("default-src 'none'", "script-src 'self'", "require-trusted-types-for"):
            assert rule in policy
        assert "unsafe" not in policy and "http" not in policy
        etag = {"if-none-match": answer.headers["etag"]}
        again = await server.client.get("/", headers=etag)
        assert (again.status_code, again.content) == (304, b"")
        assert (await server.client.get("/page/nothing.js")).status_code == 404
        assert (await server.client.get("/page/../settings.py")).status_code == 404
        assert "/page/main.js" not in (await server.client.get("/openapi.json")).text


def test_every_file_of_the_page_has_an_address_and_a_kind() -> None:
    found = {one.path: one for one in page_files()}
    names = {
        "/" if one.name == "index.html" else f"/page/{one.name}" for one in DIRECTORY.iterdir()
    }
    assert found.keys() == names and len(page_files()) == len(names)
    assert found["/"].content == (DIRECTORY / "index.html").read_bytes()
    assert found["/"].media_type.startswith("text/html")
    assert found["/page/main.js"].media_type.startswith("text/javascript")
    docs = {one.path: one for one in docs_files()}
    assert {"/docs", "/docs/start.js", "/docs/swagger-ui.css"} < docs.keys()
    for one in docs.values():
        assert len(one.content) > 50 and one.policy != found["/"].policy
    tags = [one.etag for one in (*found.values(), *docs.values())]
    assert len(set(tags)) == len(tags) and all(re.fullmatch('"[0-9a-f]{16}"', tag) for tag in tags)


class Page(HTMLParser):
    """What `index.html` names."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.inline: list[str] = []
        self.feed((DIRECTORY / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.links |= {given[name] for name in ("src", "href") if name in given}
        self.inline += [name for name in given if name == "style" or name.startswith("on")]


def test_the_page_is_whole_and_asks_nobody_else() -> None:
    page, files = Page(), {file.name: file.read_text() for file in DIRECTORY.iterdir()}
    assert len(page.ids) == len(set(page.ids))
    assert page.inline == [], "the policy lets in no inline styles or handlers"
    local = {link.removeprefix("page/") for link in page.links if not link.startswith("#")}
    assert local <= files.keys()
    scripts = {name: text for name, text in files.items() if name.endswith(".js")}
    for name, text in scripts.items():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= files.keys(), name
        named = {one for one in re.findall(r'byId\("([\w-]+)"\)', text)}
        assert named <= set(page.ids), name
        for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert banned not in text, f"{name}: text must never become markup"
        assert text.count("\n") <= 400
    own = "".join(text for name, text in files.items() if name != "marked.js")
    assert set(re.findall(r"https?://[^\s\"')]+", own)) <= {"http://www.w3.org/2000/svg"}
    # The vendored parser names its home in its header and in an error; it loads nothing.
    vendored = re.findall(r"https?://[\w./-]+", files["marked.js"])
    assert {one.rstrip(".") for one in vendored} == {"https://github.com/markedjs/marked"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", files["marked.js"])


def test_the_page_knows_every_cause_of_waiting() -> None:
    schema = json.dumps(msgspec.json.schema(EngineEvent))
    causes = re.search(r'"cause": \{"enum": \[([^\]]*)\]', schema)
    assert causes is not None
    text = (DIRECTORY / "plan.js").read_text()
    table = text[text.index("export const CAUSES") : text.index("};")]
    for cause in json.loads(f"[{causes[1]}]"):
        assert re.search(rf'^  (""|{cause}): "', table, re.M), cause


async def test_the_engine_is_held_and_goes_on(address: str) -> None:
    async with (
        engine(address, allow_debug=True) as (url, _),
        httpx.AsyncClient(timeout=WAIT_S) as client,
    ):
        hold = await client.post(f"{url}/v1/engine/pace", json={"num_steps": 0})
        assert hold.json() == {"is_allowed": True, "is_held": True, "interval_ms": 0.0}
        answer = asyncio.create_task(complete(client, url))
        async with client.stream("GET", f"{url}/v1/engine/events") as response:
            async for seen in events_of(response):
                if seen.counters.num_waiting:
                    break
        assert seen.pace.is_held and seen.counters.num_steps == 0
        await client.post(f"{url}/v1/engine/pace", json={})
        assert (await answer)["choices"][0]["finish_reason"] == "length"


async def test_the_engine_is_not_held_unless_it_was_allowed(address: str) -> None:
    async with engine(address) as (url, _), httpx.AsyncClient(timeout=WAIT_S) as client:
        refused = await client.post(f"{url}/v1/engine/pace", json={"num_steps": 0})
        assert refused.status_code == 403 and error_of(refused)["code"] == "debug_refused"
        assert "--allow-debug" in error_of(refused)["message"]
        wrong = await client.post(f"{url}/v1/engine/pace", json={"for_s": 61})
        assert wrong.status_code == 400 and "for_s" in error_of(wrong)["message"]
