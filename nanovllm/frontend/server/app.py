"""The HTTP application: endpoints, errors and what stands before them.

`create_app` is called by `run.py` and by tests. One row of `ENDPOINTS` per endpoint: the route and
its entry in the OpenAPI document both come from it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nanovllm.frontend.server import chat, completions, engine, info
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    PaceBody,
    TokenizeBody,
)
from nanovllm.frontend.server.middleware import Gate
from nanovllm.frontend.server.openapi import Answers, Endpoint, document
from nanovllm.frontend.server.page_files import docs_files, page_files
from nanovllm.frontend.server.replies import (
    ApiRoot,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
    Version,
)
from nanovllm.frontend.server.serving import Opener, Serving
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.watch.events import BlockDetails, EngineEvent, PaceEvent

GENERATING = (400, 403, 404, 413, 415, 429, 500, 503, 504)
READING = (400, 403, 404, 413, 415, 503)
VIEWING = (403, 429, 503)
ENDPOINTS = [
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat.chat_completions,
        body=ChatBody,
        answer=ChatCompletion,
        event=ChatCompletionChunk,
        errors=GENERATING,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions.completions,
        body=CompletionBody,
        answer=Completion,
        event=Completion,
        errors=GENERATING,
    ),
    Endpoint("GET", "/v1/models", info.list_models, answer=ModelList, errors=(503,)),
    Endpoint("GET", "/v1/models/{model}", info.show_model, answer=ModelCard, errors=(404, 503)),
    Endpoint("POST", "/tokenize", info.tokenize, body=TokenizeBody, answer=Tokens, errors=READING),
    Endpoint(
        "POST", "/detokenize", info.detokenize, body=DetokenizeBody, answer=Text, errors=READING
    ),
    Endpoint("GET", "/v1/engine/events", engine.engine_events, event=EngineEvent, errors=VIEWING),
    Endpoint(
        "GET",
        "/v1/engine/blocks/{block_id}",
        engine.show_block,
        answer=BlockDetails,
        errors=(*VIEWING, 404, 504),
    ),
    Endpoint(
        "POST",
        "/v1/engine/pace",
        engine.set_pace,
        body=PaceBody,
        answer=PaceEvent,
        errors=(400, 403, 413, 415, 503, 504),
    ),
    Endpoint("GET", "/v1", info.describe_api, answer=ApiRoot, is_open=True),
    Endpoint("GET", "/version", info.show_version, answer=Version),
    Endpoint("GET", "/health", info.health, answer=Health, also=503, is_open=True),
    Endpoint("GET", "/ready", info.ready, answer=Health, also=503, is_open=True),
    Endpoint("GET", "/metrics", info.metrics, is_open=True),
]
PAGE = page_files() + docs_files()
PAGE_PATHS = {file.path for file in PAGE}
OPEN_PATHS = {one.path for one in ENDPOINTS if one.is_open} | {"/openapi.json"}
PATHS = {one.path for one in ENDPOINTS}


def create_app(settings: ServerSettings, open_llm: Opener) -> Starlette:
    """An application whose engine is opened when it starts up, and closed when it shuts down."""
    serving = Serving(settings, open_llm)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        serving.start()
        try:
            yield
        finally:
            await serving.close()

    described = JSONResponse(document(ENDPOINTS, has_keys=settings.has_keys))

    async def describe(request: Request) -> Response:
        return described

    # A probe asks for the headers alone (HEAD), which no stream of events has an answer to.
    routes = [_route(one.route, one.run, one.method, probed=one.event is None) for one in ENDPOINTS]
    routes += [_route(file.path, file.answer) for file in PAGE]
    routes.append(_route("/openapi.json", describe))
    app = Starlette(lifespan=lifespan, routes=routes)
    app.state.serving = serving
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(
        Gate,
        settings=settings,
        metrics=serving.metrics,
        paths=PATHS | PAGE_PATHS,
        open=OPEN_PATHS | PAGE_PATHS,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _route(path: str, run: Answers, method: str = "GET", *, probed: bool = False) -> Route:
    route = Route(path, run, methods=[method])
    assert route.methods is not None
    if not probed:
        route.methods.discard("HEAD")  # the framework answers it wherever it answers GET
    return route


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """The framework's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    headers: dict[str, Any] = dict(error.headers or {})
    return ApiError(error.status_code, f"{where}: {error.detail}", headers=headers).response()


async def _on_bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the log, by the framework."""
    return ApiError(500, "internal error: the server's log says more").response()
