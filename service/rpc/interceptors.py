"""What is done for every method alike: errors become statuses, answers are compressed where that is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.rpc import error_details_pb2

from service.errors import Exhausted, InvalidInput, ServiceError
from service.facts import REQUEST_ID_KEY, current
from service.rpc.handlers import MAKERS
from service.rpc.status import status_of

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

Behavior: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Tells the retry policies of clients when to try again, or by a negative number that it is in vain."""
COMPRESSION_KEY = "rnnserve-compression"
"""Metadata by which a call asks for compressed answers."""
_CODES = {code.name: code for code in grpc.StatusCode}
_COMPRESSIONS = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}


class _Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the behavior of every call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        serde = (handler.request_deserializer, handler.response_serializer)
        for kind, make in MAKERS.items():
            behavior = getattr(handler, kind)
            if behavior and asyncio.iscoroutinefunction(behavior):
                return make(self._wrap(behavior, handler_call_details), *serde)
        return handler

    def _wrap(self, behavior: Behavior, call: grpc.HandlerCallDetails) -> Behavior:
        raise NotImplementedError


class ErrorInterceptor(_Interceptor):
    """Ends a call whose handler raised with the status of the error; a bug is INTERNAL, its text in the log alone."""

    def __init__(self, max_response_bytes: int) -> None:
        self._max_response_bytes = max_response_bytes

    def _wrap(self, behavior: Behavior, call: grpc.HandlerCallDetails) -> Behavior:
        compression = None
        for key, value in call.invocation_metadata:
            if key == COMPRESSION_KEY:
                compression = value

        async def guarded(request: Any, context: Context) -> Any:
            try:
                if compression is not None:
                    _compress(context, compression)
                answer = await behavior(request, context)
                if type(answer) is bytes and len(answer) > self._max_response_bytes:
                    raise _too_large(len(answer), self._max_response_bytes)
                if compression is not None and answer is not None:
                    # Or it would be forgotten; and no earlier, or the client's retry policy would end with it.
                    await context.send_initial_metadata(())
            except ServiceError as error:
                fault = error
            except (asyncio.CancelledError, grpc.aio.BaseError):  # of gRPC itself: aborted, stopped, the client is gone
                raise
            except Exception:
                log.exception("a bug ended a call")
                fault = ServiceError("the server failed; its log says how")
            else:
                return answer
            # gRPC keeps the error that it is aborted with for a while, and must not keep all that the call had with it.
            fault.__traceback__ = fault.__context__ = None
            return await _abort(context, fault)

        return guarded


class SeeingInterceptor(_Interceptor):
    """Tells of the peer of every call."""

    def __init__(self, see: Callable[[str], object]) -> None:
        self._see = see

    def _wrap(self, behavior: Behavior, call: grpc.HandlerCallDetails) -> Behavior:  # noqa: ARG002
        async def seen(request: Any, context: Context) -> Any:
            self._see(context.peer())
            return await behavior(request, context)

        return seen


def _compress(context: Context, asked: str | bytes) -> None:
    compression = _COMPRESSIONS.get(str(asked))
    if compression is None:
        raise InvalidInput(f"metadata {COMPRESSION_KEY} is {asked!r}: it may be {' or '.join(_COMPRESSIONS)}")
    context.set_compression(compression)


def _too_large(num_bytes: int, limit: int) -> Exhausted:
    return Exhausted(
        f"the answer has {num_bytes} bytes, the limit (max_response_bytes) is {limit}: send fewer sequences at once, "
        "ask for fewer outputs, or for the last step alone (EMIT_LAST)"
    )


async def _abort(context: Context, error: ServiceError) -> NoReturn:
    facts = current()
    facts.reason, request_id = error.reason, facts.request_id
    status = status_of(error)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id)]
    if error.retry_after_s is not None:
        trailers.append((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))))
    elif error.code == Exhausted.code:
        trailers.append((PUSHBACK_KEY, "-1"))
    await context.abort(_CODES[error.code], str(error), tuple(trailers))
    raise AssertionError("abort returned")
