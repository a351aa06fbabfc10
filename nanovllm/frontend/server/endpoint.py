"""What endpoints have in common: reading a body, finding the engine, counting tokens."""

import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.frontend.inputs import RequestOptions
from nanovllm.frontend.outputs import RequestOutput
from nanovllm.frontend.server.api_errors import (
    ApiError,
    from_decoding,
    from_value_error,
    is_of_unknown_field,
)
from nanovllm.frontend.server.api_keys import CALLER
from nanovllm.frontend.server.bodies import Body, ChatBody, GenerationBody
from nanovllm.frontend.server.prompts import aside_if_long
from nanovllm.frontend.server.replies import PromptTokensDetails, Usage
from nanovllm.frontend.server.responses import EventStream, Whole, until_disconnect
from nanovllm.frontend.server.sampling import Constraint
from nanovllm.frontend.server.serving import Options, Serving
from nanovllm.limits import MAX_JSON_DIGITS, MAX_JSON_LISTS, MAX_JSON_TEXTS, MAX_JSON_VALUES

OPAQUE = {"arguments", "chat_template_kwargs", "documents", "json", "parameters", "schema"}
B = TypeVar("B", bound=Body)
G = TypeVar("G", bound=GenerationBody)


class Answer(Protocol):
    """A checked request; the engine begins with it when one of these runs."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send."""

    async def whole(self) -> msgspec.Struct:
        """All at once."""


def serving_of(request: Request) -> Serving:
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


async def read(request: Request, kind: type[B]) -> B:
    """The body, checked. Raises `ApiError` 400, 413, 415.

    Pages may send text to any server without its leave, but not what is called JSON.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json" and not given.endswith("+json"):
        raise ApiError(
            415,
            f"the body must be JSON: send it as `content-type: application/json`, not {given!r}",
        )
    content = await _content(request)
    try:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError as error:
            if not is_of_unknown_field(error):
                raise
            # A field that is null asks for nothing, whatever it is called.
            pruned = msgspec.json.encode(_without_nulls(msgspec.json.decode(content)))
            return msgspec.json.decode(pruned, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise from_decoding(error, kind.__struct_fields__) from None


def _without_nulls(value: Any) -> Any:
    """Of fields of ours; null within JSON of the client's own is a value."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: inner if name in OPAQUE else _without_nulls(inner)
        for name, inner in value.items()
        if inner is not None
    }


async def _content(request: Request) -> bytes:
    """The body; not `request.body()`, which would be kept as long as its stream is answered.

    Decoding takes as long as there are values, and holds everybody up: an object of a million
    names takes a second. They are counted piece by piece as they come. What has too many is read
    to its end, or its sender would see no answer, and not kept.
    """
    pieces: list[bytes] = []
    num_bytes, num_counted, counts = 0, 0, JsonCounts()
    excess: str | None = None
    async for piece in request.stream():
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes <= min(MAX_JSON_LISTS, MAX_JSON_TEXTS, MAX_JSON_VALUES):
            continue  # each is a byte at least
        for one in filter(None, pieces[num_counted:]):
            counts.add(one)
        excess = excess or counts.excess
        if excess is not None:
            pieces.clear()
        num_counted = len(pieces)
    if excess is not None:
        raise ApiError(413, excess, code="body_too_large")
    return b"".join(pieces)


class JsonCounts:
    """How much there is to decode in a text of JSON, by its punctuation. Values and lists within
    texts are counted, too: such a text is longer than any model reads."""

    def __init__(self) -> None:
        self._values = self._lists = self._quotes = self._digits = 0
        self._last = 0  # byte

    def add(self, piece: bytes) -> None:
        """The next bytes, of which there are some."""
        content = np.frombuffer(piece, np.uint8)
        is_quote = content == ord('"')
        is_escaped = is_quote[1:] & (content[:-1] == ord("\\"))
        self._values += int(np.count_nonzero(content == ord(",")))
        self._lists += int(np.count_nonzero((content | 0x20) == ord("{")))  # "[" has not that bit
        self._digits += int(np.count_nonzero(content - np.uint8(ord("0")) < 10))
        self._quotes += int(np.count_nonzero(is_quote) - np.count_nonzero(is_escaped))
        self._quotes -= bool(is_quote[0]) and self._last == ord("\\")
        self._last = piece[-1]

    @property
    def num_texts(self) -> int:
        """At least half of those that there are: a quote behind two backslashes ends a text."""
        return self._quotes // 2

    @property
    def excess(self) -> str | None:
        """What there is too much of, if anything."""
        counts = (
            (self._values, MAX_JSON_VALUES, "values"),
            (self._lists, MAX_JSON_LISTS, "lists and objects"),
            (self.num_texts, MAX_JSON_TEXTS, "names and texts"),
            (self._digits - 8 * self._values, MAX_JSON_DIGITS, "digits beyond eight of each value"),
        )
        for count, most, what in counts:
            if count > most:
                return f"the body holds {count} {what}: at most {most} are allowed"
        return None


@contextlib.contextmanager
def blaming(body: Body) -> Iterator[None]:
    """A `ValueError` inside is the client's mistake: 400, with the field to mend."""
    try:
        yield
    except ValueError as error:
        names = {"logprobs": "top_logprobs"} if isinstance(body, ChatBody) else {}
        raise from_value_error(error, body.__struct_fields__, names) from None


async def generated(
    request: Request,
    kind: type[G],
    prepare: Callable[[Serving, G, Mapping[str, str]], Awaitable[Answer]],
) -> Response:
    """The answer to a request for text, streamed or whole as its body asks.

    prepare: of the body and the headers; finds everything that can be wrong with the request, and
    starts nothing.
    """
    serving = serving_of(request)
    body = await read(request, kind)
    serving.check_model(body.model)
    serving.callers.apply(body, request.scope["state"][CALLER])
    answer: Answer | None = None
    async with until_disconnect(request.receive):  # who leaves has nothing more made for him
        with blaming(body):
            if body.bad_words:  # encoded once for all prompts, and not while streams wait
                encode = partial(serving.llm.encode_bad_words, tuple(body.bad_words))
                await aside_if_long(encode, sum(map(len, body.bad_words)))
            answer = await prepare(serving, body, request.headers)
    if answer is None:
        return Response()  # to nobody
    if body.stream:
        return EventStream(serving, answer.events())
    return Whole(serving, answer.whole)


def most_tokens(serving: Serving, body: GenerationBody) -> int | None:
    """Of a prompt; None if it may be longer, since it will be cut."""
    if body.truncate_prompt_tokens is not None:
        return None
    return serving.llm.info.worker.max_model_len


def options_of(
    body: GenerationBody, prefix: str, headers: Mapping[str, str], constraint: Constraint | None
) -> Options:
    request_id = f"{prefix}-{body.request_id or secrets.token_hex(16)}"
    how: RequestOptions = {
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt,
        "tenant": body.user,
        "deadline_ms": body.deadline_ms,
        "ttft_deadline_ms": body.ttft_deadline_ms,
    }
    return Options(request_id, how, headers, None if constraint is None else constraint.field)


def usage_of(outputs: Iterable[RequestOutput | None]) -> Usage:
    """Of the latest outputs of all prompts of a request."""
    num_prompt = num_cached = num_generated = 0
    for output in outputs:
        if output is not None:
            num_prompt += len(output.prompt_token_ids)
            num_cached += output.num_cached_tokens or 0
            num_generated += output.metrics.num_generation_tokens
    details = PromptTokensDetails(num_cached)
    return Usage(num_prompt, num_prompt + num_generated, num_generated, details)
