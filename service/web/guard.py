"""Who may ask for the page and its API, and what its answers say to a browser.

The port has no passwords, as gRPC's has none: whoever reaches it may use it. But a browser that reaches it also runs
pages of strangers, so requests that such a page could make are refused: those with another page's Origin, and those
for a host name that is not this server's, since a stranger can let a name of their own point here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from functools import wraps
from urllib.parse import urlsplit

from aiohttp import web

from service.errors import ServiceError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer; `fetch` and WebSockets to this server are 'self' too."""
_STATUSES = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400, "UNAVAILABLE": 503}


class Guard:
    """Wraps the handlers of the page."""

    def __init__(self, hosts: Collection[str]) -> None:
        """Begin; hosts: names that the server may be asked by, beside addresses and local names."""
        self._hosts = frozenset(host.lower() for host in hosts)

    def __call__(self, handler: Handler) -> Handler:
        """Refuse strangers, turn errors into JSON, and add the headers."""

        @wraps(handler)
        async def guarded(request: web.Request) -> web.StreamResponse:
            refusal = self.refusal(request)
            if refusal is not None:
                return _error(403, "PERMISSION_DENIED", refusal)
            try:
                response = await handler(request)
            except ServiceError as error:
                return _error(_STATUSES.get(error.code, 500), error.code, str(error))
            if not response.prepared:
                response.headers.update(HEADERS)
                response.headers.setdefault("Cache-Control", "no-store")
            return response

        return guarded

    def refusal(self, request: web.Request) -> str | None:
        """Why a request is refused, if it is."""
        host = (request.headers.get("Host") or "").lower()
        name = _name_of(host)
        if not (_is_local(name) or name in self._hosts):
            return (
                f"this server is not known as {name[:100]!r}: ask for it by its address, or start it with "
                f"--page-hosts NAME"
            )
        origin = request.headers.get("Origin")
        if origin is not None:
            whose = urlsplit(origin).netloc.lower()
            if whose != host and _name_of(whose) not in self._hosts:
                return (
                    f"a page of {origin[:100]!r} may not use this server; a proxy in front of it has to pass the Host "
                    "header on, or be named with --page-hosts"
                )
        elif request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and (
            request.headers.get("Sec-Fetch-Mode") != "navigate"
        ):
            return "a page of another site may not use this server"
        return None


def _name_of(host: str) -> str:
    """A host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_local(name: str) -> bool:
    """Whether nobody else can let a name point to an address of their choice: addresses, and names without a dot."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(".localhost"))
    return True


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=HEADERS)
