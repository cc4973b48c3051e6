"""Counts gRPC calls by gRPC's proposal A66: how many began, how each ended, how long it took, how much it carried.

grpcio-observability would count the same in gRPC's core, but names no method of an asyncio server, and wants one exact
version of grpcio; this needs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import isasyncgenfunction
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio

from service.tally import CallTally

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Any]
OTHER = "other"
"""Stands for every method that the server does not have: a stranger may call as many as he likes."""
LATE_S = 0.02
"""A call that its client ends when so little is left of its timeout is over its deadline."""
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Counts every call; it goes first, to see the status that others end a call with."""

    def __init__(self, tally: CallTally) -> None:
        self._tally = tally

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._tally.begin(OTHER)
            self._tally.end(OTHER, grpc.StatusCode.UNIMPLEMENTED.name, 0.0, 0, 0)
            return None
        call = _Call(self._tally, handler_call_details.method.lstrip("/"))
        read, write = call.reader(handler), call.writer(handler)
        for kind, make in _MAKERS.items():
            if behavior := getattr(handler, kind):
                if handler.response_streaming:
                    return make(call.wrap(behavior), read, write)
                return make(call.wrap(behavior, write), read)  # gRPC would write the answer after the end
        return handler


_MAKERS: dict[str, Callable[..., Handler]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


class _Call:
    """One call under way."""

    __slots__ = ("_began_at", "_method", "_received", "_sent", "_tally")

    def __init__(self, tally: CallTally, method: str) -> None:
        self._tally = tally
        self._method = method
        self._began_at = time.perf_counter()
        self._sent = self._received = 0
        tally.begin(method)

    def reader(self, handler: Handler) -> Callable[[bytes], Any]:
        """Read messages as the handler does, and count their bytes."""
        read = handler.request_deserializer

        def count(raw: bytes) -> Any:
            self._received += len(raw)
            return raw if read is None else read(raw)

        return count

    def writer(self, handler: Handler) -> Callable[[Any], bytes]:
        """Write messages as the handler does, and count their bytes."""
        write = handler.response_serializer

        def count(message: Any) -> bytes:
            raw: bytes = message if write is None else write(message)
            self._sent += len(raw)
            return raw

        return count

    def wrap(self, behavior: Behavior, write: Callable[[Any], bytes] | None = None) -> Behavior:
        """Count the end of the call.

        write  turns what a behavior with one response returns into a message
        """
        if isasyncgenfunction(behavior):

            async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
                try:
                    async for response in behavior(request, context):
                        yield response
                except BaseException as error:
                    self._end(context, error)
                    raise
                self._end(context, None)

            return generate

        async def answer(request: Any, context: Context) -> Any:
            try:
                response = await behavior(request, context)
                if write is not None:
                    response = write(response)
            except BaseException as error:
                self._end(context, error)
                raise
            self._end(context, None)
            return response

        return answer

    def _end(self, context: Context, error: BaseException | None) -> None:
        seconds = time.perf_counter() - self._began_at
        self._tally.end(self._method, _status(context, error, seconds), seconds, self._sent, self._received)


def _status(context: Context, error: BaseException | None, seconds: float) -> str:
    """The status that the server ends a call with."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left_s = context.time_remaining()
        # The client's clock began earlier, and its timeout travels rounded up by a hundredth at most.
        is_late = left_s is not None and left_s <= max(LATE_S, (seconds + left_s) / 100)
        return (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name
    code: Any = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    if error is not None and not number:
        return grpc.StatusCode.UNKNOWN.name
    return _NAMES.get(number or 0, grpc.StatusCode.UNKNOWN.name)
