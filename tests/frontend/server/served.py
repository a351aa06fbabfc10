"""A server in front of a scripted core: in this process, or on a real port."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette

from nanovllm.frontend.async_llm import AsyncLLM
from nanovllm.frontend.core_life import ProgressCallback
from nanovllm.frontend.server import run
from nanovllm.frontend.server.app import create_app
from nanovllm.frontend.server.run import bind
from nanovllm.frontend.server.run import serve as run_server
from nanovllm.frontend.server.serving import Serving
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import FromCore, Hello, ToCore
from tests.frontend.fake_core import INFO, WELCOME, FakeCore, M, Script, echo
from tests.frontend.vocabulary import SPECIAL_TOKENS, byte_tokenizer, fast_tokenizer
from tests.waiting import WAIT_S

ROOMY = msgspec.structs.replace(
    WELCOME, worker=msgspec.structs.replace(INFO, max_model_len=4096, vocab_size=300)
)
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<tool_call>{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}|"
)
TIMEOUT_S = WAIT_S
JSON_HEAD = "host: localhost\r\ncontent-type: application/json\r\n"


def tokenizer_with(template: str) -> Tokenizer:
    return Tokenizer(fast_tokenizer(), special_tokens=SPECIAL_TOKENS, chat_template=template)


def roomy(script: Script) -> Script:
    """The same core, of a model that takes longer prompts."""

    def answer(message: ToCore) -> Iterable[FromCore]:
        return [ROOMY] if isinstance(message, Hello) else script(message)

    return answer


@dataclass
class Served:
    app: Starlette
    core: FakeCore
    client: httpx.AsyncClient

    @property
    def serving(self) -> Serving:
        serving: Serving = self.app.state.serving
        return serving

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, text: str = "hi", **body: Any) -> httpx.Response:
        messages = body.pop("messages", [{"role": "user", "content": text}])
        return await self.post("/v1/chat/completions", messages=messages, **body)

    async def complete(self, prompt: Any = "hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", prompt=prompt, **body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which must have OpenAI's form."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def message_of(core: FakeCore, kind: type[M], count: int = 1) -> M:
    """The `count`-th message of a kind, waited for without holding the server up."""
    return await asyncio.to_thread(core.wait_for, kind, count)


def make_app(address: str, settings: ServerSettings, tokenizer: Tokenizer | None) -> Starlette:
    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        return await AsyncLLM.connect(
            address,
            tokenizer=tokenizer or byte_tokenizer(),
            on_progress=on_progress,
            on_core_death="fail",
        )

    return create_app(settings, open_llm)


@asynccontextmanager
async def served(
    address: str,
    script: Script = echo,
    *,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Without a network: httpx calls the application."""
    with FakeCore(address, script) as core:
        app = make_app(address, ServerSettings(**settings), tokenizer)
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app.state.serving.opened.wait(), TIMEOUT_S)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport,
                base_url="http://localhost",
                headers={"content-type": "application/json"},
                timeout=TIMEOUT_S,
            ) as client:
                yield Served(app, core, client)


def bind_small(settings: ServerSettings, *, shared: bool) -> socket.socket:
    """In place of `bind`: connections that hold little of what their readers do not take."""
    listener = run.bind(settings, shared=shared)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    return listener


@asynccontextmanager
async def listening(
    address: str, script: Script = echo, *, tokenizer: Tokenizer | None = None, **settings: Any
) -> AsyncIterator[tuple[str, FakeCore, Serving]]:
    """On a free port of this machine: (base URL, core, serving)."""
    ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    made = ServerSettings(port=0, **settings)

    async def open_llm(on_progress: ProgressCallback) -> AsyncLLM:
        return await AsyncLLM.connect(address, tokenizer=tokenizer or byte_tokenizer())

    with FakeCore(address, script) as core:
        listener = bind(made, shared=False)
        port = listener.getsockname()[1]
        task = asyncio.create_task(
            run_server(made, open_llm, listener, ready.set_result, lifeline=stop)
        )
        try:
            serving = await asyncio.wait_for(ready, TIMEOUT_S)
            yield f"http://127.0.0.1:{port}", core, serving
        finally:
            stop.set()
            await asyncio.wait_for(task, TIMEOUT_S)
