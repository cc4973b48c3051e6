"""What logs and traces cost a server: `python -m benchmarks.seeing [--quick] 2>/dev/null` prints the table.

Servers that log and trace more or less take turns under the same load; a collector receives the spans and forgets them.
Each figure is the median over rounds of a server's CPU time, per step, over that of one that does neither.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS, put_load
from benchmarks.processes import Process, rnnserve
from benchmarks.report import machine
from service.client.load import Load
from tests.onnx_models import build

LOADS = {
    "Predict of one step, 4 callers": Load(kind="predict", streams=4),
    "one step a message, 1 stream": Load(),
    "one step a message, 64 streams": Load(streams=64),
}
NOT_SAMPLED, SAMPLED = "parentbased_always_off", "parentbased_always_on"
SERVERS: dict[str, tuple[list[str], str]] = {
    "neither": ([], ""),
    "access log, text": (["--access-log", "calls"], ""),
    "access log, JSON": (["--access-log", "calls", "--log-format", "json"], ""),
    "traces, not sampled": (["--otlp-endpoint"], NOT_SAMPLED),
    "traces, all sampled": (["--otlp-endpoint"], SAMPLED),
}
"""Flags, and the sampler of traces."""


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts the spans that it is sent."""

    num_spans = 0

    def Export(self, request, context):  # noqa: ARG002, N802 - gRPC's names
        self.num_spans += sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Sink, str]]:
    sink, server = Sink(), grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)
    url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield sink, url
    server.stop(0).wait()


def start(stack: ExitStack, repository: Path, url: str, name: str) -> Process:
    flags, sampler = SERVERS[name]
    given = [each for flag in flags for each in ((flag, url) if flag == "--otlp-endpoint" else (flag,))]
    with mock.patch.dict(os.environ, {"OTEL_TRACES_SAMPLER": sampler} if sampler else {}):
        return stack.enter_context(rnnserve(repository, *given))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds: to see that it works")
    is_quick = parser.parse_args().quick
    rounds, seconds = (2, 0.5) if is_quick else (7, 3.0)
    print("measured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        build("lstm", features=FEATURES, hidden=HIDDEN, outputs=OUTPUTS).save(repository, "lstm")
        sink, url = stack.enter_context(collecting())
        servers = {name: start(stack, repository, url, name) for name in SERVERS}
        print("| load | " + " | ".join(servers) + " |\n|" + "---|" * (len(servers) + 1))
        for text, load in LOADS.items():
            taken = [
                [put_load(each, load, seconds).cpu_us_per_step for each in servers.values()] for _ in range(rounds)
            ]
            base, *others = zip(*taken, strict=True)
            ratios = [median(x / y for x, y in zip(other, base, strict=True)) for other in others]
            print(
                f"| {text} | {median(base):.0f} us | " + " | ".join(f"{each:.3f}" for each in ratios) + " |", flush=True
            )
        print(f"{sink.num_spans} spans were received")


if __name__ == "__main__":
    main()
