"""What stands before every endpoint: origins, keys, limits on bodies, request ids, counting.

Plain ASGI: it adds nothing to the cost of a streamed token but one call. A client that is gone,
be it while its body is read or while it is answered, is `ClientDisconnect` within, and ends here.
"""

import asyncio
import contextlib
import ctypes
import logging
import platform
import re
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.api_keys import CALLER, ApiKeys
from nanovllm.frontend.server.metrics import ServerMetrics
from nanovllm.frontend.server.settings import LOOPBACK, ServerSettings

CLIENT_LEFT = 499  # as proxies count it; nobody is sent it
DISCONNECT_TIMEOUT_S = 1.0
SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
ANY = "*"  # every origin, or every name of this server
SMALL_BODY_BYTES = 1 << 16
BUDGET_BODIES = 8  # of the largest size allowed, at a time
LARGE_BODY_BYTES = 1 << 20
TRIM_AFTER_S = 1.0  # several are often sent one after the other
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
        self._keys = ApiKeys(settings.keys()) if settings.keys() else None
        self._metrics = metrics
        self._paths = paths
        self._open = open
        self._origins = Origins(settings)
        self._budget = BodyBudget(settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._settings.root_path:
            scope = self._below_root(scope)
        headers, incoming = Headers(scope=scope), Incoming(receive, self._budget)
        route: str = scope["path"].removeprefix(self._settings.root_path)
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
            if refusal := self._refusal(scope, route, headers):
                await refusal.response()(scope, receive, send_on)
            else:
                await self._app(scope, incoming.receive, send_on)
        except ClientDisconnect:
            status = status or CLIENT_LEFT
            await _disconnected(receive)
        finally:
            incoming.release()
            shown = route if route in self._paths else "other"
            self._metrics.http(scope["method"], shown, str(status)).inc()
            if self._settings.access_log:
                _log(scope, status, time.perf_counter() - started, request_id)

    def _below_root(self, scope: Scope) -> Scope:
        """A proxy may cut the prefix off or leave it; below, it always stands before the path."""
        root = self._settings.root_path
        path: str = scope["path"]
        if path != root and not path.startswith(root + "/"):
            path = root + path
        return {**scope, "root_path": root, "path": path}

    def _refusal(self, scope: Scope, route: str, headers: Headers) -> ApiError | None:
        if (foreign := self._origins.refusal(headers)) is not None:
            return foreign
        if self._keys is not None and route not in self._open:
            owner = self._keys.owner(headers.get("authorization", ""))
            if owner is None:
                return _without_key()
            scope.setdefault("state", {})[CALLER] = owner
            self._metrics.by_key(owner).inc()
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._budget.max_body_bytes:
            return self._budget.too_large()
        return None


def _log(scope: Scope, status: int, seconds: float, request_id: str) -> None:
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


class Origins:
    """Which pages may call: a browser sends requests for whatever page is open in it.

    On a loopback address nothing else keeps a foreign page out, so the names by which the server
    may be called are few: a page whose name has been bound to this machine's address (DNS
    rebinding) calls it by another.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._allowed_origins = {origin.rstrip("/").lower() for origin in settings.allowed_origins}
        named = {name.lower() for name in settings.allowed_hosts}
        checked = bool(named) or settings.host in LOOPBACK
        local = {"localhost", "127.0.0.1", "[::1]", settings.host.lower()}
        self._hosts = named | local if checked and ANY not in named else None
        self._trusts_proxies = bool(settings.trusted_proxies)

    def refusal(self, headers: Headers) -> ApiError | None:
        """Why a request is not taken, if so."""
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            return ApiError(400, "there are several Host headers")
        host = hosts[0].lower() if hosts else ""
        if self._trusts_proxies:
            host = headers.get("x-forwarded-host", host).lower()
        if hosts and self._hosts is not None and _without_port(host) not in self._hosts:
            return _unknown_name(_without_port(host))
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            return _foreign_page(origin)
        if origin is None and _is_embedded(headers):
            return _refused("this may not be embedded in a page of another site", "origin_refused")
        return None

    def _is_allowed(self, origin: str, host: str) -> bool:
        """The server's own page, or one of those that CORS lets in."""
        origin = origin.lower()
        if ANY in self._allowed_origins or origin in self._allowed_origins:
            return True
        return bool(host) and urlsplit(origin).netloc == host


def _is_embedded(headers: Headers) -> bool:
    """An image or a script of another page, as browsers say; a link to here is none."""
    foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    return foreign and headers.get("sec-fetch-mode") == "no-cors"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _without_key() -> ApiError:
    return ApiError(
        401,
        "no valid API key: send it as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _unknown_name(name: str) -> ApiError:
    message = f"this server is not called {name!r}: allow that name with --allowed-hosts"
    return _refused(message, "host_refused")


def _foreign_page(origin: str) -> ApiError:
    message = f"pages of {origin!r} may not call this server: allow them with --allowed-origins"
    return _refused(message, "origin_refused")


def _refused(message: str, code: str) -> ApiError:
    return ApiError(403, message, code=code)


class BodyBudget:
    """How many bytes of bodies this process holds; `Incoming` is one request's part of it. What
    comes beyond the budget is refused for now; small bodies always have room."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._num_free = BUDGET_BODIES * max_body_bytes
        self._trim: asyncio.TimerHandle | None = None

    def too_large(self) -> ApiError:
        """What is said of a body that is larger than one may be."""
        return ApiError(413, f"the body exceeds {self.max_body_bytes} bytes", code="body_too_large")

    def take(self, num_bytes: int) -> None:
        """Raises `ApiError` 503 if they are not there."""
        if num_bytes > self._num_free:
            raise ApiError(503, "too many large bodies are being received", code="overloaded")
        self._num_free -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._num_free += num_bytes
        if num_bytes >= LARGE_BODY_BYTES and self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim_later)

    def _trim_later(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, _return_free_memory)


class Incoming:
    """One request's body as it comes in. It holds none of the budget while it is small."""

    def __init__(self, receive: Receive, budget: BodyBudget) -> None:
        self._receive = receive
        self._budget = budget
        self._num_bytes = self._num_held = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """The server's next message. Who goes on receiving after the end of the body, to learn of
        the client's leaving, has decoded it. Raises `ApiError` 413, 503."""
        if self._is_whole:
            self.release()
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num_bytes > self._budget.max_body_bytes:
                raise self._budget.too_large()
            if self._num_bytes > SMALL_BODY_BYTES:
                self._budget.take(self._num_bytes - self._num_held)
                self._num_held = self._num_bytes
        return message

    def release(self) -> None:
        """The body has been decoded, or nobody waits for it any more."""
        if self._num_held:
            self._budget.give_back(self._num_held)
            self._num_held = 0


def _return_free_memory() -> None:
    """glibc keeps what was freed between pieces still in use, here hundreds of megabytes; it walks
    its heap for a tenth of a second, without Python's lock."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
