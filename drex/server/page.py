"""The page at `/`: the files of the folder `static`, read once and sent from memory, with what a browser may do there.

There are few and small ones, and the first byte is to come at once, whatever the engine does to the disk and the cores.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from drex.server.errors import ApiError

STATIC = Path(__file__).with_name("static")
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Scripts, styles, images and requests: this server's own files, and nothing else at all.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A browser asks each time, and is told in a few bytes that nothing has changed.
    "cache-control": "no-cache",
}


class StaticFile(NamedTuple):
    """A file, and the tag that changes with it."""

    content: bytes
    media_type: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """Files of the page, by name."""
    found = {}
    for path in sorted(path for path in STATIC.iterdir() if path.suffix in TYPES):
        content = path.read_bytes()
        found[path.name] = StaticFile(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


def routes() -> APIRouter:
    """The page and its files."""
    router = APIRouter(include_in_schema=False)
    files = read_files()

    @router.api_route("/", methods=["GET", "HEAD"])
    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str = INDEX) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name}: GET / is the page")
        content, media_type, etag = files[name]
        headers = {**HEADERS, "etag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return router
