"""StreamPredict and Generate over WebSockets, for browsers: protobuf's JSON, a message of the API a text message.

The call is the native one, with its limits, its errors and its metrics; only its context differs. A socket is one call.
What ends the call ends the socket: the last message is then {"status": a google.rpc.Status}, of code 0 where all went
well. A socket that is closed ends the call, and its sessions end as those of a broken connection do.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import grpc.aio
from aiohttp import WSCloseCode, WSMsgType, web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from service.errors import InvalidInput, ServiceError
from service.facts import CALL, CallFacts
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.status import status_of
from service.web.sockets import make_socket

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
FIRST_S = 10.0
"""Time for the first message."""


class Calls(Protocol):
    """The streaming calls of the native API."""

    async def StreamPredict(self, request: object, context: Any) -> None:  # noqa: N802  gRPC's name of the method
        """Step live sequences."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        """Make outputs."""


class _Gone(Exception):
    """The client has closed the socket, or the connection broke."""


class Sockets:
    """Answers WebSockets by the native API."""

    def __init__(self, calls: Calls, max_message_bytes: int) -> None:
        self._calls = calls
        self._max_message_bytes = max_message_bytes
        self._open: set[web.WebSocketResponse] = set()
        self._is_empty = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        """One for each call."""
        return [web.get("/api/stream", self._stream), web.get("/api/generate", self._generate)]

    async def drained(self, longest_s: float) -> None:
        """Wait until no call goes on, but not for ever."""
        self._is_empty.clear()
        if self._open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_empty.wait(), longest_s)

    async def close(self, _: web.Application) -> None:
        """End every call: the server stops."""
        message = b"the server is stopping"
        await asyncio.gather(*(each.close(code=WSCloseCode.GOING_AWAY, message=message) for each in list(self._open)))

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        async with self._accepted(request) as socket:
            await self._calls.StreamPredict(None, _Context(socket, pb.StreamPredictRequest, pb.StreamPredictResponse))
        return socket

    async def _generate(self, request: web.Request) -> web.WebSocketResponse:
        async with self._accepted(request) as socket:
            context = _Context(socket, pb.GenerateRequest, pb.GenerateResponse)
            asked = pb.GenerateRequest.FromString(await context.read())
            call = asyncio.ensure_future(self._calls.Generate(asked, context))
            watch = asyncio.ensure_future(context.read())  # nothing comes but the end
            try:
                await asyncio.wait({call, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not call.done():
                    await watch
                    raise InvalidInput("a socket makes one call: open another for the next")
                await call
            finally:
                for task in (call, watch):
                    task.cancel()
                await asyncio.gather(call, watch, return_exceptions=True)
        return socket

    @asynccontextmanager
    async def _accepted(self, request: web.Request) -> AsyncIterator[web.WebSocketResponse]:
        """Open a socket, and say how the call in the block ended."""
        socket = make_socket(self._max_message_bytes)
        await socket.prepare(request)
        self._open.add(socket)
        headers = [(name.lower(), value) for name, value in request.headers.items()]
        token = CALL.set(CallFacts(request.path, headers))
        try:
            with suppress(_Gone):
                try:
                    yield socket
                except ServiceError as error:
                    await _send(socket, {"status": MessageToDict(status_of(error))})
                except (_Gone, asyncio.CancelledError):
                    raise
                except Exception:
                    log.exception("a bug ended a call")
                    fault = ServiceError("the server failed; its log says how")
                    await _send(socket, {"status": MessageToDict(status_of(fault))})
                else:
                    await _send(socket, {"status": {"code": 0}})
            await socket.close()
        finally:
            CALL.reset(token)
            self._open.discard(socket)
            if not self._open:
                self._is_empty.set()


class _Context:
    """What a call reads and writes, in place of gRPC's context."""

    def __init__(self, socket: web.WebSocketResponse, asks: type[Message], answers: type[Message]) -> None:
        self._socket = socket
        self._asks = asks
        self._answers = answers
        self._is_first = True

    def peer(self) -> str:
        """No name: the age of connections is gRPC's alone."""
        return ""

    async def read(self) -> bytes:
        """Wait for the next request, and serialise it. Raises InvalidInput, and _Gone."""
        try:
            async with asyncio.timeout(FIRST_S if self._is_first else None):
                message = await self._socket.receive()
        except TimeoutError:
            raise InvalidInput(f"nothing came in {FIRST_S:g} s: send the first message at once") from None
        self._is_first = False
        if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
            raise _Gone
        name = self._asks.DESCRIPTOR.name
        if message.type is not WSMsgType.TEXT:
            raise InvalidInput(f"expected a text message: a {name} as JSON")
        try:
            return ParseDict(json.loads(message.data), self._asks()).SerializeToString()
        except (ParseError, ValueError, RecursionError, AttributeError, TypeError) as error:
            raise InvalidInput(f"a message is no {name} as JSON: {error}") from error

    async def write(self, message: bytes | Message) -> None:
        """Send a response. Raises InternalError, as gRPC does, where the client is gone."""
        if isinstance(message, bytes):
            message = self._answers.FromString(message)
        try:
            await _send(self._socket, MessageToDict(message, preserving_proto_field_name=True))
        except _Gone as error:
            raise grpc.aio.InternalError("the socket is closed") from error


async def _send(socket: web.WebSocketResponse, content: dict[str, Any]) -> None:
    if socket.closed:
        raise _Gone
    try:
        await socket.send_str(json.dumps(content, separators=(",", ":")))
    except (ConnectionError, RuntimeError) as error:
        raise _Gone from error
