"""gRPC's handlers: how each kind is made, and those of a service's unary methods, from its descriptor."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor

MAKERS: dict[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}
"""What makes a handler, by the name of its attribute that holds the behavior."""


def unary_handlers(
    service: ServiceDescriptor, servicer: object, *, write_bytes: Container[str]
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Make a handler for each method with one request and one response, by its name.

    servicer     has a coroutine for each
    write_bytes  names of those that return serialised responses: they carry tensors
    """
    return {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name),
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=None
            if method.name in write_bytes
            else message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
        if not (method.client_streaming or method.server_streaming)
    }
