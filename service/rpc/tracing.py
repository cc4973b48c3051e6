"""Traces by OpenTelemetry: a span for each call, with spans of its waiting and its runs below it.

Imported only where traces are asked for. Spans are put into a bounded queue that a thread of the SDK exports from; what
finds no room is dropped. A call that lasts for days has no more spans and events than one of minutes:

    runs are told of one by one up to the MAX_RUNS-th, from then on the 2nd, 4th, 8th ... time as many; all are counted
    events (sessions opened and closed) are kept up to the SDK's limit, OTEL_SPAN_EVENT_COUNT_LIMIT, the latest ones

Names are those of the semantic conventions for RPC; what they don't have begins with `rnnserve.`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from importlib.metadata import version
from itertools import islice

import grpc
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link as SpanLink
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from service.errors import ConfigError
from service.express import Express
from service.facts import CallFacts, Trace
from service.lane import Lane
from service.scheduler import Batch

log = logging.getLogger(__name__)
MAX_RUNS = 16
MAX_LINKS = 8
"""Most other calls of its batch that the span of a run links to."""
FLUSH_S = 3.0
"""Longest that the end of the server waits for what is to be exported."""
OTHER = "_OTHER"
"""The conventions' name of a method that the server does not have."""
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that the conventions take for an error of the server; of others the caller is the cause."""
PROTOCOLS = {"grpc": "grpc", "http/protobuf": "http"}


class Tracing:
    """Traces the calls of a server, as a CallObserver and the engine's watch."""

    def __init__(self, endpoint: str, index: int | None, host: str) -> None:
        """Begin to export.

        endpoint  URL of a collector; empty leaves it to the variables of OpenTelemetry
        index     which of several workers this is; None where it is alone
        host      the server's address

        Raises ConfigError for a URL or a protocol that can't be.
        """
        self._provider = TracerProvider(resource=_resource(index), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
        self._tracer = self._provider.get_tracer("rnnserve", version("rnnserve"))
        self._known: dict[str, str | int] = {"rpc.system.name": "grpc", "server.address": host}
        self._fields = frozenset(name.lower() for name in propagate.get_global_textmap().fields)
        """Metadata that may say where the caller is in a trace."""
        self._num_recorded = 0

    def listen(self, port: int) -> None:
        """Learn the port that calls come to."""
        self._known["server.port"] = port

    # ---- as CallObserver --------------------------------------------------------------------------------------------

    def begin(self, facts: CallFacts, details: grpc.HandlerCallDetails) -> None:
        """Begin the span of a call, below the caller's."""
        carrier = {key: value for key, value in details.invocation_metadata if key in self._fields}
        is_known = facts.method == details.method.lstrip("/")
        method = facts.method if is_known else OTHER
        span = self._tracer.start_span(
            method,
            propagate.extract(carrier) if carrier else Context(),
            SpanKind.SERVER,
            {**self._known, "rpc.method": method},
        )
        context = span.get_span_context()
        if context.is_valid:
            facts.trace_ids = context.trace_id, context.span_id
        if span.is_recording():
            if not is_known:
                span.set_attribute("rpc.method_original", details.method.lstrip("/")[:256])
            facts.trace = _CallTrace(self._tracer, span)
            self._num_recorded += 1

    def end(self, facts: CallFacts) -> None:
        """End it, with all that is known by now."""
        trace = facts.trace
        if isinstance(trace, _CallTrace):
            self._num_recorded -= 1
            trace.end(facts)

    # ---- as the engine's watch --------------------------------------------------------------------------------------

    def ran(self, lane: Lane, work: Express | Batch, now: float, seconds: float) -> None:
        """Tell the calls that have a part in a run of it.

        now, seconds  when it ended by the engine's clock, and how long it took
        """
        if self._num_recorded:
            try:
                self._tell(lane, work, now, seconds)
            except Exception:  # whose answers are still to be handed out
                log.exception("a bug in tracing a run of %s", lane.name, extra=lane.about)

    def _tell(self, lane: Lane, work: Express | Batch, now: float, seconds: float) -> None:
        if isinstance(work, Express):
            found: list[_Part] = [(message.link.trace, message.arrived_at) for message in work.messages]
            num_rows = num_steps = len(work.rows)
        else:
            found, num_rows, num_steps = _found_in(lane, work), len(work.slots), sum(work.counts)
        arrived = {trace: at for trace, at in reversed(found) if isinstance(trace, _CallTrace) and trace.is_live}
        due = [trace for trace in arrived if trace.count_run()]
        if not due:
            return
        told: dict[str, str | int] = {
            "rnnserve.model.name": lane.name,
            "rnnserve.model.version": lane.version,
            "rnnserve.graph": "main" if lane.graph is lane.backend.spec.graph else "encoder",
            "rnnserve.batch.rows": num_rows,
            "rnnserve.batch.steps": num_steps,
        }
        offset = time.time_ns() - int(now * 1e9)
        ended, began = int(now * 1e9), int((now - seconds) * 1e9)
        links = [trace.link for trace in islice(arrived, MAX_LINKS + 1)]
        for trace in due:
            at = arrived[trace]
            waited = None if at is None else (min(int(at * 1e9), began) + offset, began + offset)
            trace.ran(told, waited, (began + offset, ended + offset), links)

    # ---- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Export what has been recorded, if that takes no longer than FLUSH_S."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # it took so long that the loop has ended
                return

        threading.Thread(target=flush, name="rnnserve-traces", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_S):
                await done.wait()
        except TimeoutError:
            log.warning("the last traces are lost: they could not be exported within %.0f s", FLUSH_S)


class _CallTrace:
    """The trace of one call."""

    __slots__ = ("_context", "_num_runs", "_span", "_tracer", "is_live", "link")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context: Context = set_span_in_context(span, Context())
        self._num_runs = 0
        self.link = SpanLink(span.get_span_context())
        self.is_live = True
        """Whether the call has not ended; a sequence may hold on to its trace after that."""

    def note(self, event: str, **attributes: str | int | float) -> None:
        """Take down that something happened just now."""
        self._span.add_event(event, {f"rnnserve.{name}": value for name, value in attributes.items()})

    def count_run(self) -> bool:
        """Count a run that the call has a part in. Returns whether it is to be taken down."""
        self._num_runs += 1
        return self._num_runs <= MAX_RUNS or self._num_runs.bit_count() == 1

    def ran(
        self,
        told: dict[str, str | int],
        waited: tuple[int, int] | None,
        ran: tuple[int, int],
        together: list[SpanLink],
    ) -> None:
        """Take down the run that was counted last, and how long the steps had waited, if it is the first of them.

        told         attributes of the run
        waited, ran  when each began and ended, in nanoseconds since the epoch
        together     to traced calls of the run
        """
        if waited is not None:
            self._tracer.start_span("queue", self._context, start_time=waited[0]).end(waited[1])
        others = [link for link in together if link is not self.link][:MAX_LINKS]
        attributes = {**told, "rnnserve.run.number": self._num_runs}
        span = self._tracer.start_span("run", self._context, attributes=attributes, links=others, start_time=ran[0])
        span.end(ran[1])

    def end(self, facts: CallFacts) -> None:
        """End the span."""
        self.is_live = False
        span = self._span
        span.set_attributes(
            {
                "rpc.response.status_code": facts.status,
                "rnnserve.request_id": facts.request_id,
                "rnnserve.messages.in": facts.messages_in,
                "rnnserve.messages.out": facts.messages_out,
                "rnnserve.runs": self._num_runs,
            }
        )
        address, _, port = facts.peer.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")
        if port.isdecimal():
            span.set_attributes({"network.peer.address": address.strip("[]"), "network.peer.port": int(port)})
        if facts.model:
            span.set_attributes(
                {
                    "rnnserve.model.name": facts.model,
                    "rnnserve.model.version": facts.version,
                    "rnnserve.sequences": facts.num_sequences,
                    "rnnserve.steps.in": facts.steps_in,
                    "rnnserve.steps.out": facts.steps_out,
                }
            )
        if facts.session_id:
            span.set_attribute("rnnserve.session.id", facts.session_id)
        if facts.reason:
            span.set_attribute("rnnserve.reason", facts.reason)
        if facts.status != "OK":
            span.set_attribute("error.type", facts.status)
        if facts.status in FAULTS:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


_Part = tuple[Trace | None, float | None]
"""The trace of a call, if it is recorded, and when its steps came, where a run is the first of them."""


def _found_in(lane: Lane, batch: Batch) -> list[_Part]:
    found: list[_Part] = []
    by_slot = lane.sessions.by_slot
    for slot, arrived_at, is_first in zip(batch.slots, batch.arrived, batch.is_first, strict=True):
        session = by_slot.get(slot)
        if session is not None and session.link is not None:
            found.append((session.link.trace, arrived_at if is_first and arrived_at else None))
    return found


def _resource(index: int | None) -> Resource:
    """What exports: the variables of OpenTelemetry, and of what they leave out this process."""
    given = Resource.create().attributes
    ours: dict[str, str] = {"service.version": version("rnnserve"), "service.instance.id": str(uuid.uuid4())}
    ours = {name: value for name, value in ours.items() if name not in given}
    if str(given.get("service.name", "")).startswith("unknown_service"):
        ours["service.name"] = "rnnserve"
    if index is not None and "service.instance.id" in given:  # the workers share their environment
        ours["service.instance.id"] = f"{given['service.instance.id']!s}.{index}"
    return Resource.create(ours)


def _exporter(endpoint: str) -> SpanExporter:
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    )
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: it may be {' or '.join(PROTOCOLS)}", field="otlp_endpoint"
        )
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"otlp_endpoint: {endpoint!r} is no URL: expected http://HOST:PORT, or https:// for TLS",
            field="otlp_endpoint",
        )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint or None)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None)
