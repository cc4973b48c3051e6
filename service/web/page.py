"""The page at /, its files, and whoever answers its API, behind the guard. Loads no model."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from service.config import Settings
from service.errors import NotFound
from service.web.guard import Guard

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Of the page's files, by suffix."""


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    zipped: bytes
    etag: str
    kind: str


def add_page(app: web.Application, settings: Settings, api: Iterable[web.RouteDef]) -> None:
    """Serve the page from an app, with the routes of its API."""
    guard = Guard([host for host in settings.page_hosts.split(",") if host])
    files = {path.name: _read(path) for path in STATIC.iterdir() if path.suffix in TYPES}

    async def index(request: web.Request) -> web.Response:
        return _answer(request, files["index.html"])

    async def static(request: web.Request) -> web.Response:
        file = files.get(request.match_info["name"])
        if file is None:
            raise NotFound(f"no file {request.match_info['name'][:100]!r}")
        return _answer(request, file)

    routes = [web.get("/", index), web.get("/static/{name}", static), *api]
    app.add_routes([web.get(route.path, guard(route.handler)) for route in routes])


def _read(path: Path) -> _File:
    content = path.read_bytes()
    etag = hashlib.sha256(content).hexdigest()[:32]
    return _File(content, gzip.compress(content, mtime=0), etag, TYPES[path.suffix])


def _answer(request: web.Request, file: _File) -> web.Response:
    """Send a file, or say that the browser's copy is still good."""
    headers = {"Cache-Control": "no-cache", "ETag": f'"{file.etag}"', "Vary": "Accept-Encoding"}
    if any(etag.value == file.etag for etag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    is_zipped = "gzip" in request.headers.get("Accept-Encoding", "")
    if is_zipped:
        headers["Content-Encoding"] = "gzip"
    body = file.zipped if is_zipped else file.content
    return web.Response(body=body, headers=headers, content_type=file.kind, charset="utf-8")
