"""How a WebSocket of the page is opened."""

from __future__ import annotations

from aiohttp import web

HEARTBEAT_S = 20.0
"""Time between looks whether the client is still there."""
CLOSE_S = 2.0
"""Time for a client to agree that it is over."""


def make_socket(max_message_bytes: int) -> web.WebSocketResponse:
    """Make one, to be prepared; a larger message closes it."""
    return web.WebSocketResponse(max_msg_size=max_message_bytes, heartbeat=HEARTBEAT_S, timeout=CLOSE_S, compress=False)
