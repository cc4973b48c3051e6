"""A server of gRPC before another one: it fails the first attempts of calls, and passes the others on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

import grpc

SERVICE = "/rnnserve.v1.SequenceService/"
STREAMS = {"Generate", "StreamPredict"}
Fault = Callable[[grpc.ServicerContext], None]
"""Aborts a call."""


def fault(code: grpc.StatusCode, pushback_ms: int | None = None) -> Fault:
    """Make one of a status, with the server's word on when to try again."""
    trailers = () if pushback_ms is None else (("grpc-retry-pushback-ms", str(pushback_ms)),)

    def abort(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(trailers)
        context.abort(code, "a flaky server")

    return abort


class Front(grpc.GenericRpcHandler):
    """Attempts by method, and what is to go wrong with the next ones."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.attempts: dict[str, list[int]] = defaultdict(list)
        """For each attempt, how many gRPC says that it has made of the same call before."""
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.breaks_after: list[int] = []
        """Answers after which the next streams are broken."""
        self.address = ""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.rpartition("/")[2]

        def begin(context: grpc.ServicerContext) -> None:
            self.attempts[name].append(int(dict(details.invocation_metadata).get("grpc-previous-rpc-attempts", 0)))
            if self.faults[name]:
                self.faults[name].pop(0)(context)

        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            begin(context)
            try:
                return self._channel.unary_unary(details.method)(request, timeout=10)
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata())
                context.abort(error.code(), error.details())

        def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            begin(context)
            call = self._channel.stream_stream(details.method)(requests, timeout=30)
            context.add_callback(call.cancel)
            if self.breaks_after:
                yield from islice(call, self.breaks_after.pop(0))
                call.cancel()
                context.abort(grpc.StatusCode.UNAVAILABLE, "a flaky server")
            yield from call

        if name in STREAMS:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@contextmanager
def fronted(target: str) -> Iterator[Front]:
    """Run one until the block ends."""
    with grpc.insecure_channel(target) as channel:
        front = Front(channel)
        server = grpc.server(ThreadPoolExecutor(8), handlers=[front])
        front.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield front
        finally:
            server.stop(0).wait()
