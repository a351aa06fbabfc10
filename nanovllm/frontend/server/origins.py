"""Which pages may call: a browser sends requests for whatever page is open in it.

Called by the middleware before anything is read. On a loopback address nothing else keeps a foreign
page out, so the names by which the server may be called are few: a page whose name has been bound
to this machine's address (DNS rebinding) calls it by another.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers

from nanovllm.frontend.server.api_errors import ApiError
from nanovllm.frontend.server.settings import LOOPBACK, ServerSettings

ANY = "*"


class Origins:
    """What `settings` let in."""

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
            return _refused(
                f"this server is not called {_without_port(host)!r}: allow that name with "
                "--allowed-hosts",
                "host_refused",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            return _refused(
                f"pages of {origin!r} may not call this server: allow them with --allowed-origins",
                "origin_refused",
            )
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


def _refused(message: str, code: str) -> ApiError:
    return ApiError(403, message, code=code)
