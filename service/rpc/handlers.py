"""gRPC's handlers of a service's unary methods, from its descriptor."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor


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
