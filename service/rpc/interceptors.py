"""Turns errors into statuses, for every method alike."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from service.errors import ServiceError
from service.rpc.status import status_of

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

log = logging.getLogger(__name__)
DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.name: code for code in grpc.StatusCode}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised with the status of the error; a bug is INTERNAL, its text in the log alone."""

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
        if handler.unary_unary and asyncio.iscoroutinefunction(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(_guarded(handler.unary_unary), *serde)
        if handler.unary_stream and asyncio.iscoroutinefunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(_guarded(handler.unary_stream), *serde)
        if handler.stream_stream and asyncio.iscoroutinefunction(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(_guarded(handler.stream_stream), *serde)
        return handler


def _guarded(behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behavior(request, context)
        except ServiceError as error:
            fault = error
        except (asyncio.CancelledError, grpc.aio.BaseError):  # of gRPC itself: aborted, stopped, the client is gone
            raise
        except Exception:
            log.exception("a bug ended a call")
            fault = ServiceError("the server failed; its log says how")
        # gRPC keeps the error that it is aborted with for a while, and must not keep all that the call had with it.
        fault.__traceback__ = fault.__context__ = None
        return await _abort(context, fault)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> NoReturn:
    details = ((DETAILS_KEY, status_of(error).SerializeToString()),)
    await context.abort(_CODES[error.code], str(error), details)
    raise AssertionError("abort returned")
