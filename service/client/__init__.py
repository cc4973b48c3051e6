"""The client: `Client` for threads, `AsyncClient` for asyncio. numpy in, numpy out.

    from service.client import Client

    with Client("localhost:8001") as client:
        for y in client.predict("vowels", [utterance, another]):
            ...
        with client.stream("vowels") as stream:
            for y in stream.run(frames):
                ...

Everything that can go wrong is an RnnserveError. Importing this package is cheap: what needs gRPC is imported when it
is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.client.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ProtocolError,
    ResourceExhausted,
    RnnserveError,
    ServerError,
    SessionEnded,
    SessionFailed,
    StepRejected,
    Unavailable,
)

if TYPE_CHECKING:
    from service.client._aio import AsyncClient
    from service.client._aio_gateway import AsyncGateway
    from service.client._aio_stream import AsyncStream
    from service.client._columns import Closed, Events, Opened
    from service.client._sync import Client
    from service.client._sync_gateway import Gateway
    from service.client._sync_stream import Stream
    from service.client.generated import Generated, Piece
    from service.client.info import (
        BrokenModelInfo,
        GenerationInfo,
        ModelInfo,
        ModelList,
        Prediction,
        StateInfo,
        TensorInfo,
    )

__all__ = [
    "AsyncClient",
    "AsyncGateway",
    "AsyncStream",
    "BrokenModelInfo",
    "Client",
    "Closed",
    "DeadlineExceeded",
    "Events",
    "FailedPrecondition",
    "FieldViolation",
    "Gateway",
    "Generated",
    "GenerationInfo",
    "InvalidArgument",
    "ModelInfo",
    "ModelList",
    "NotFound",
    "Opened",
    "PermissionDenied",
    "Piece",
    "Prediction",
    "ProtocolError",
    "ResourceExhausted",
    "RnnserveError",
    "ServerError",
    "SessionEnded",
    "SessionFailed",
    "StateInfo",
    "StepRejected",
    "Stream",
    "TensorInfo",
    "Unavailable",
]

_HOMES = {
    "AsyncClient": "_aio",
    "AsyncGateway": "_aio_gateway",
    "AsyncStream": "_aio_stream",
    "BrokenModelInfo": "info",
    "Client": "_sync",
    "Closed": "_columns",
    "Events": "_columns",
    "Gateway": "_sync_gateway",
    "Generated": "generated",
    "GenerationInfo": "info",
    "ModelInfo": "info",
    "ModelList": "info",
    "Opened": "_columns",
    "Piece": "generated",
    "Prediction": "info",
    "StateInfo": "info",
    "Stream": "_sync_stream",
    "TensorInfo": "info",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that has it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
