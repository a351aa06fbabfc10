"""GET /v1/engine/events and /v1/engine/blocks/{block_id}: the engine, for looking at.

Behind the API key like the rest. `--page` says how much may be seen: the contents of blocks are
users' prompts. POST /v1/engine/pace holds the engine and goes step by step (`--allow-debug`).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.frontend.errors import NotAllowedError
from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.bodies import PaceBody
from nanovllm.frontend.server.endpoint import EventStream, JsonAnswer, event, read, serving_of
from nanovllm.frontend.server.serving import Serving
from nanovllm.watch.events import BlockDetails, PaceEvent

LOADING_INTERVAL_S = 0.25
STILL_HERE = b": nothing new\n\n"  # a comment, by which proxies and we notice who has left


async def engine_events(request: Request) -> Response:
    """What the engine does, as events: a snapshot, then what changes, a few times a second."""
    serving = serving_of(request)
    _check_visible(serving)
    return EventStream(serving, _events(serving))


async def show_block(request: Request) -> Response:
    """Tokens, text and hash of a block of KV cache."""
    serving = serving_of(request)
    if serving.engine_view != "full":
        raise _refusal("the contents of blocks")
    block_id: int = request.path_params["block_id"]
    llm = serving.llm
    if not 1 <= block_id < llm.info.worker.num_blocks:
        raise ApiError(404, f"block_id: {block_id} does not exist", param="block_id")
    found = await llm.show_block(block_id)
    tokenizer = llm.tokenizer
    texts = [] if tokenizer is None else [tokenizer.token_text(i) for i in found.token_ids]
    return JsonAnswer(
        BlockDetails(
            found.block_id,
            found.ref_count,
            found.key,
            found.parent_key,
            found.index,
            found.holders,
            found.token_ids,
            texts,
        )
    )


async def set_pace(request: Request) -> Response:
    """Hold the engine, let it take some steps, or slow it down; what is asked ends after `for_s`
    seconds, unless it is asked for again."""
    serving = serving_of(request)
    _check_visible(serving)
    body = await read(request, PaceBody)
    try:
        await serving.llm.set_pace(
            num_steps=body.num_steps, interval_ms=body.interval_ms, for_s=body.for_s
        )
    except NotAllowedError as error:
        raise ApiError(403, str(error), code="debug_refused") from None
    return JsonAnswer(PaceEvent(True, body.num_steps == 0, body.interval_ms))


async def _events(serving: Serving) -> AsyncGenerator[bytes, None]:
    """Until the server drains, which these streams must not hold up. Whoever comes while the model
    loads is told so, in comments, and has not come in vain."""
    while serving.state == "loading":
        yield f": loading, {serving.phase} {serving.progress:.0%}\n\n".encode()
        await asyncio.sleep(LOADING_INTERVAL_S)
    async with contextlib.aclosing(serving.feed.events()) as events:
        async for one in events:
            if serving.state != "ready":
                return
            yield STILL_HERE if one is None else event(one)


def _check_visible(serving: Serving) -> None:
    if serving.engine_view is None:
        raise _refusal("the engine")


def _refusal(what: str) -> ApiError:
    return ApiError(403, f"this server does not show {what} (--page)", code="engine_view_refused")
