"""The page at `/`: files of the package, served as they are, with a policy that lets in no others.

Called by `app.create_app`. Needs no key: there is nothing secret in them; what they ask for does.
"""

import hashlib
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
HEADERS = {
    "content-security-policy": POLICY,
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

    async def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "etag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_files() -> list[PageFile]:
    """`index.html` at `/`, all others below `/page/`."""
    found = []
    for file in sorted(DIRECTORY.iterdir()):
        content = file.read_bytes()
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found.append(PageFile(path, content, TYPES[file.suffix], etag))
    return found
