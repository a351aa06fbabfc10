"""The OpenAPI document, derived from the very structs that bodies are decoded into."""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.frontend.server.replies import ErrorReply

REF = "#/components/schemas/{name}"
JSON, EVENTS = "application/json", "text/event-stream"
MEANINGS = {
    400: "Something in the request is wrong: `param` names it",
    401: "No valid API key",
    403: "The server does not show this (`--page`), or not to this page or under this name",
    404: "There is no such thing here",
    413: "The body is too large",
    415: "The body is not sent as JSON",
    429: "Too many requests: `Retry-After`",
    500: "The engine failed this request",
    503: "Loading, draining or down",
    504: "The deadline has passed",
}
Struct = type[msgspec.Struct]
Answers = Callable[[Request], Awaitable[Response]]


class PathParameter(NamedTuple):
    """converter: the framework's word for what may stand there."""

    converter: str
    schema: dict[str, Any]


PATH_PARAMETERS = {
    "model": PathParameter("path", {"type": "string"}),
    "block_id": PathParameter("int", {"type": "integer", "minimum": 0}),
}


class Endpoint(NamedTuple):
    """body, answer, event: what it takes, answers, and streams. also: a second status with the same
    answer. errors: the statuses that come with an `ErrorReply`. is_open: it needs no key."""

    method: Literal["GET", "POST"]
    path: str
    run: Answers
    body: Struct | None = None
    answer: Struct | None = None
    event: Struct | None = None
    errors: Sequence[int] = ()
    also: int | None = None
    is_open: bool = False

    @property
    def route(self) -> str:
        """The path as the framework wants it."""
        route = self.path
        for name, (converter, _) in PATH_PARAMETERS.items():
            route = route.replace(f"{{{name}}}", f"{{{name}:{converter}}}")
        return route


def _operation(endpoint: Endpoint, *, has_keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.answer is None and endpoint.event is None:
        content["text/plain"] = {"schema": {"type": "string"}}
    if endpoint.answer is not None:
        content |= {JSON: {"schema": _ref(endpoint.answer)}}
    if endpoint.event is not None:
        events = f"`data:` lines of {endpoint.event.__name__}, then `[DONE]`"
        content[EVENTS] = {"schema": {"type": "string", "description": events}}
    responses: dict[str, Any] = {"200": {"description": "Success", "content": content}}
    if endpoint.also is not None:
        responses[str(endpoint.also)] = {"description": MEANINGS[endpoint.also], "content": content}
    guarded = has_keys and not endpoint.is_open
    for status in (*endpoint.errors, *((401,) if guarded else ())):
        error = {JSON: {"schema": _ref(ErrorReply)}}
        responses[str(status)] = {"description": MEANINGS[status], "content": error}
    name = endpoint.run.__name__
    found: dict[str, Any] = {
        "summary": name.replace("_", " ").capitalize(),
        "description": inspect.getdoc(endpoint.run) or "",
        "operationId": name,
        "responses": responses,
    }
    if endpoint.body is not None:
        content = {JSON: {"schema": _ref(endpoint.body)}}
        found["requestBody"] = {"required": True, "content": content}
    named = {name: kind for name, kind in PATH_PARAMETERS.items() if f"{{{name}}}" in endpoint.path}
    if named:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": kind.schema}
            for name, kind in named.items()
        ]
    if guarded:
        found["security"] = [{"bearer": []}]
    return found


def document(endpoints: Sequence[Endpoint], *, has_keys: bool) -> dict[str, Any]:
    """The whole."""
    paths: dict[str, Any] = {}
    structs: list[Struct] = [ErrorReply]
    for one in endpoints:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, has_keys=has_keys)
        structs += [kind for kind in (one.body, one.answer, one.event) if kind is not None]
    _, schemas = msgspec.json.schema_components(structs, ref_template=REF)
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}  # see `endpoint.read`
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    info = {"title": "nanovllm", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _ref(struct: Struct) -> dict[str, str]:
    return {"$ref": REF.format(name=struct.__name__)}
