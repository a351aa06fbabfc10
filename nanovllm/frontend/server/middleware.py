"""What stands before every endpoint: keys, the limit on bodies, request ids, counting.

Plain ASGI: it adds nothing to the cost of a streamed token but one call. A client that is gone,
be it while its body is read or while it is answered, is `ClientDisconnect` within, and ends here.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.api_keys import ANONYMOUS, CALLER, ApiKeys
from nanovllm.frontend.server.body_budget import BodyBudget, Share
from nanovllm.frontend.server.metrics import ServerMetrics
from nanovllm.frontend.server.origins import Origins
from nanovllm.frontend.server.settings import ServerSettings

CLIENT_LEFT = 499  # as proxies count it; nobody is sent it
DISCONNECT_TIMEOUT_S = 1.0
SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
logger = logging.getLogger(__name__)


class Gate:
    """Middleware. paths: as they are counted; all others are one. open: those that need no key."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: ServerSettings,
        metrics: ServerMetrics,
        paths: Collection[str],
        open: Collection[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = ApiKeys(settings.keys())
        self._metrics = metrics
        self._paths = paths
        self._open = open
        self._origins = Origins(settings)
        self._budget = BodyBudget(settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._below_root(scope)
        scope.setdefault("state", {})[CALLER] = ANONYMOUS
        headers, share = Headers(scope=scope), Share(self._budget)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if SAFE_ID.fullmatch(given_id) else secrets.token_hex(16)
        started, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                pair = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), pair]
            try:
                await send(message)
            except (OSError, RuntimeError) as error:  # uvloop's, of a connection being closed
                raise ClientDisconnect from error

        try:
            if refusal := self._refusal(scope, headers):
                await refusal.response()(scope, receive, send_on)
            else:
                await self._app(scope, self._limited(receive, share), send_on)
        except ClientDisconnect:
            status = status or CLIENT_LEFT
            await _disconnected(receive)
        finally:
            share.release()
            self._count(scope, status, time.perf_counter() - started, request_id)

    def _below_root(self, scope: Scope) -> Scope:
        """A proxy may cut the prefix off or leave it; below, it always stands before the path."""
        root = self._settings.root_path
        if not root:
            return scope
        path: str = scope["path"]
        if path != root and not path.startswith(root + "/"):
            path = root + path
        return {**scope, "root_path": root, "path": path}

    def _route(self, scope: Scope) -> str:
        path: str = scope["path"]
        return path.removeprefix(self._settings.root_path)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if (foreign := self._origins.refusal(headers)) is not None:
            return foreign
        if self._keys and self._route(scope) not in self._open:
            owner = self._keys.owner(headers.get("authorization", ""))
            if owner is None:
                return ApiError(
                    401,
                    "no valid API key: send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            scope["state"][CALLER] = owner
            self._metrics.by_key.labels(owner).inc()
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive, share: Share) -> Receive:
        """Bodies are counted as they come. Who goes on receiving after the end of the body, to
        learn of the client's leaving, has decoded it."""
        num_bytes, is_whole = 0, False

        async def receive_some() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                share.release()
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if num_bytes > self._settings.max_body_bytes:
                    raise self._too_large()
                share.hold(num_bytes)
            return message

        return receive_some

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body exceeds {self._settings.max_body_bytes} bytes", code="body_too_large"
        )

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        path = self._route(scope)
        shown = path if path in self._paths else "other"
        self._metrics.http.labels(scope["method"], shown, str(status)).inc()
        if self._settings.access_log:
            took = f"{seconds * 1e3:.1f} ms"
            # As it was sent: decoded, it could hold line ends and forge further lines.
            raw = scope.get("raw_path", b"").decode("ascii", "replace")
            logger.info("%s %s → %s, %s, %s", scope["method"], raw, status, took, request_id)


async def _disconnected(receive: Receive) -> None:
    """Until the server knows it, too: else it would complain of an answer that is not complete."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
            while (await receive())["type"] != "http.disconnect":
                pass
