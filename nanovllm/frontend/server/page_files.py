"""The page at `/`: files of the package, served as they are, with a policy that lets in no others.

Called by `app.create_app`. Needs no key: there is nothing secret in them; what they ask for does.
"""

import hashlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

DIRECTORY = Path(__file__).parents[2] / "watch" / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text ever becomes markup
    )
)
# Swagger UI writes markup and styles itself, and draws its icons from `data:`.
DOCS_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
DOCS_HTML = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nanovllm API</title>
<link rel="icon" href="page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="docs/swagger-ui.css">
<div id="docs"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
"""
DOCS_SCRIPT = b'SwaggerUIBundle({ url: "openapi.json", dom_id: "#docs", deepLinking: true });\n'
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time whether it is the same: `etag`
}


class PageFile(NamedTuple):
    """One file at one path."""

    path: str
    content: bytes
    media_type: str
    etag: str
    policy: str = POLICY

    async def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "content-security-policy": self.policy, "etag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_files() -> list[PageFile]:
    """`index.html` at `/`, all others below `/page/`."""
    found = []
    for file in sorted(DIRECTORY.iterdir()):
        content = file.read_bytes()
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        found.append(PageFile(path, content, TYPES[file.suffix], _etag(content)))
    return found


def docs_files() -> list[PageFile]:
    """Swagger UI at `/docs`, with its files from a package: nothing is fetched from elsewhere."""
    vendored = resources.files("fastapi_offline") / "static"
    contents = {
        "/docs": (DOCS_HTML, ".html"),
        "/docs/start.js": (DOCS_SCRIPT, ".js"),
        "/docs/swagger-ui.css": ((vendored / "swagger-ui.css").read_bytes(), ".css"),
        "/docs/swagger-ui-bundle.js": ((vendored / "swagger-ui-bundle.js").read_bytes(), ".js"),
    }
    return [
        PageFile(path, content, TYPES[suffix], _etag(content), DOCS_POLICY)
        for path, (content, suffix) in contents.items()
    ]


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'
