"""The page's API where the HTTP port belongs to a supervisor: one worker answers, numbers are those of all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from service.errors import Unavailable
from service.rpc.peers import Peer, ask_all
from service.web.sockets import make_socket

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse
Json = dict[str, Any]
COUNTS = ("sessions", "queued_steps", "steps", "sequences", "runs", "run_rows", "run_seconds", "rejected")
"""What /api/stats tells of each model version, all of it summed over workers."""
_ENDS = frozenset({WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR})
ABNORMAL = 1006
"""Close code that stands for a connection which broke; it must not be sent."""


class Relay:
    """Passes requests on to workers, in turn."""

    def __init__(self, peers: Callable[[], Sequence[Peer]], max_message_bytes: int) -> None:
        """Begin; peers: gives the workers that are ready."""
        self._peers = peers
        self._max_message_bytes = max_message_bytes
        self._turn = count()

    def routes(self) -> list[web.RouteDef]:
        """Those of the page's API."""
        return [
            web.get("/api/stats", self._stats),
            web.get("/api/{call:stream|generate}", self._socket),
            web.get("/api/{path:models(/.*)?}", self._get),
        ]

    def _in_turn(self) -> list[Peer]:
        """The workers, the one whose turn it is first. Raises Unavailable where none is ready."""
        peers = self._peers()
        if not peers:
            raise Unavailable("no worker is ready: ask again after a while", retry_after_s=1.0)
        first = next(self._turn) % len(peers)
        return [*peers[first:], *peers[:first]]

    async def _get(self, request: web.Request) -> web.Response:
        for peer in self._in_turn():
            if (answer := await peer.fetch(request.path_qs)) is not None:
                status, content = answer
                return web.Response(status=status, body=content, content_type="application/json", charset="utf-8")
        raise Unavailable("no worker answers: ask again after a while", retry_after_s=1.0)

    async def _stats(self, _: web.Request) -> web.Response:
        answers = await ask_all(self._peers(), "/api/stats")
        return web.json_response(sum_stats(json.loads(answer) for answer in answers if answer is not None))

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        for peer in self._in_turn():
            if (worker := await peer.connect(request.path)) is not None:
                break
        else:
            raise Unavailable("no worker answers: ask again after a while", retry_after_s=1.0)
        async with worker:
            browser = make_socket(self._max_message_bytes)
            await browser.prepare(request)
            passing = [asyncio.ensure_future(_pass(*pair)) for pair in ((browser, worker), (worker, browser))]
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in passing:
                    task.cancel()
                await asyncio.gather(*passing, return_exceptions=True)
            return browser


async def _pass(source: Socket, target: Socket) -> None:
    """Pass messages on until one side ends, and let the other end as it did."""
    while True:
        message = await source.receive()
        if message.type is WSMsgType.TEXT:
            await target.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await target.send_bytes(message.data)
        elif message.type in _ENDS:
            code = source.close_code
            reason = message.extra.encode() if isinstance(message.extra, str) else b""
            if code is None or code == ABNORMAL:
                code = aiohttp.WSCloseCode.INTERNAL_ERROR
            await target.close(code=code, message=reason)
            return


def sum_stats(parts: Iterable[Json]) -> Json:
    """Add the numbers of the workers of one server up."""
    total: Json = {"time": time.monotonic(), "is_draining": False, "workers": 0, "broken": 0, "models": []}
    by_version: dict[tuple[str, int], Json] = {}
    for part in parts:
        total["is_draining"] |= part["is_draining"]
        total["workers"] += part["workers"]
        total["broken"] = max(total["broken"], part["broken"])  # the same repository is read by all
        for model in part["models"]:
            known = by_version.setdefault((model["name"], model["version"]), dict.fromkeys(COUNTS, 0))
            by_version[model["name"], model["version"]] = {
                **model,
                **{name: known[name] + model[name] for name in COUNTS},
            }
    total["models"] = [model for _, model in sorted(by_version.items())]
    return total
