"""A collector of OpenTelemetry's spans: gRPC's server of its own protocol, with what came from a server under test."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.workers import wait_until

Span = trace_pb2.Span


class Collector(collector_grpc.TraceServiceServicer):
    """Receives what is exported."""

    def __init__(self) -> None:
        self.requests: list[collector_pb.ExportTraceServiceRequest] = []
        self.port = 0

    def Export(self, request, context):  # noqa: N802
        self.requests.append(request)
        return collector_pb.ExportTraceServiceResponse()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in list(self.requests)
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    @property
    def resources(self) -> list[dict[str, object]]:
        return [attributes(each.resource) for request in list(self.requests) for each in request.resource_spans]

    def wait_for(self, name: str) -> Span:
        """Wait for the one span of a name."""
        wait_until(lambda: any(span.name == name for span in self.spans))
        [span] = [span for span in self.spans if span.name == name]
        return span

    def children(self, parent: Span) -> list[Span]:
        return sorted(
            (span for span in self.spans if span.parent_span_id == parent.span_id),
            key=lambda span: (span.start_time_unix_nano, span.name),
        )


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    collector_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def attributes(of: object) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}
