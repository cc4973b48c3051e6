"""Every metric's name, in one place. Lanes keep tallies and a scrape reads them: nothing is counted twice.

Labels are a model's name and version, as the repository has them, and words out of fixed sets: whatever requests say,
they make no new series. A *request* is the steps that one message brings for one session, one sequence of a Predict
call, or one sequence that Generate makes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.errors import reasons
from service.tally import CallTally, Ended, Histogram

if TYPE_CHECKING:  # they import onnxruntime, which a supervisor of workers has no use for
    from service.engine import Engine
    from service.holdings import Broken
    from service.lane import Lane

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Samples = Iterable[tuple[tuple[str, ...], float | Histogram]]
"""(label values, value), of one series each."""
VERSION = ("model", "version")
GRAPH = (*VERSION, "graph")
REASONS = reasons()

OVER_WORKERS: dict[str, Callable[[float, float], float]] = {
    "rnnserve_broken_models": max,
    "rnnserve_build_info": max,
    "rnnserve_model_exactness": max,
    "rnnserve_model_load_duration_seconds": max,
    "rnnserve_ready": min,
    "process_max_fds": max,
    "process_start_time_seconds": max,
}
"""Gauges that are not summed over the workers of a server, and what becomes of them."""


@dataclass(frozen=True, slots=True)
class LaneMetric:
    """A metric of every served model version."""

    kind: type[Family]
    name: str
    """Without what its kind adds to it."""
    text: str
    labels: tuple[str, ...]
    """After those of VERSION or GRAPH."""
    read: Callable[[Lane], Samples]
    is_of_graph: bool = False
    """Whether encoders have it too: each graph of a model runs by itself."""


def _one(read: Callable[[Lane], float | Histogram]) -> Callable[[Lane], Samples]:
    return lambda lane: [((), read(lane))]


def _counter(name: str, text: str, read: Callable[[Lane], float], *, is_of_graph: bool = False) -> LaneMetric:
    return LaneMetric(CounterMetricFamily, name, text, (), _one(read), is_of_graph)


def _gauge(name: str, text: str, read: Callable[[Lane], float], *, is_of_graph: bool = False) -> LaneMetric:
    return LaneMetric(GaugeMetricFamily, name, text, (), _one(read), is_of_graph)


def _histogram(name: str, text: str, read: Callable[[Lane], Histogram], *, is_of_graph: bool = False) -> LaneMetric:
    return LaneMetric(HistogramMetricFamily, name, text, (), _one(read), is_of_graph)


LANE_METRICS = (
    LaneMetric(
        CounterMetricFamily,
        "rnnserve_requests",
        "Requests that were answered in full, and those that were not.",
        ("outcome",),
        lambda lane: [
            (("success",), lane.tally.request_durations.count),
            (("failure",), sum(lane.tally.rejected.values())),
        ],
    ),
    LaneMetric(
        CounterMetricFamily,
        "rnnserve_rejected",
        "Requests that failed, or were refused, by reason.",
        ("reason",),
        lambda lane: [((reason,), lane.tally.rejected.get(reason, 0)) for reason in REASONS],
    ),
    _histogram(
        "rnnserve_request_duration_seconds",
        "Time from the arrival of a request until the last of its steps is computed.",
        lambda lane: lane.tally.request_durations,
        is_of_graph=True,
    ),
    _histogram(
        "rnnserve_queue_duration_seconds",
        "Time from the arrival of a request until its first run begins.",
        lambda lane: lane.tally.queue_durations,
        is_of_graph=True,
    ),
    _histogram(
        "rnnserve_run_duration_seconds",
        "Time that one run of onnxruntime takes, for all sequences of its batch at once.",
        lambda lane: lane.tally.run_durations,
        is_of_graph=True,
    ),
    _histogram("rnnserve_batch_size", "Sequences that one run advances.", lambda lane: _rows(lane), is_of_graph=True),
    _counter("rnnserve_runs", "Runs of onnxruntime.", lambda lane: lane.tally.runs, is_of_graph=True),
    _counter("rnnserve_steps", "Timesteps computed.", lambda lane: lane.tally.steps, is_of_graph=True),
    _gauge(
        "rnnserve_queued_steps",
        "Timesteps that wait for their run or are in it.",
        lambda lane: lane.num_queued_steps,
        is_of_graph=True,
    ),
    _counter(
        "rnnserve_sequences",
        "Sequences begun: sessions opened, and sequences of calls.",
        lambda lane: lane.tally.sequences,
        is_of_graph=True,
    ),
    _gauge("rnnserve_slots", "State slots.", lambda lane: lane.slab.capacity, is_of_graph=True),
    _gauge(
        "rnnserve_slots_used",
        "State slots that hold a sequence.",
        lambda lane: lane.slab.num_allocated,
        is_of_graph=True,
    ),
    _gauge("rnnserve_sessions", "Live sessions.", lambda lane: lane.num_sessions),
    _gauge("rnnserve_max_sessions", "Most live sessions (the setting).", lambda lane: lane.settings.max_sessions),
    _counter("rnnserve_sessions_opened", "Sessions opened.", lambda lane: lane.tally.sessions_opened),
    LaneMetric(
        CounterMetricFamily,
        "rnnserve_sessions_closed",
        "Sessions that ended, by cause.",
        ("cause",),
        lambda lane: [((cause.value,), count) for cause, count in lane.tally.sessions_ended.items()],
    ),
    _gauge(
        "rnnserve_sessions_resident",
        "Sessions whose state is in memory.",
        lambda lane: lane.residence.num_resident if lane.residence else lane.num_sessions,
    ),
    _gauge(
        "rnnserve_sessions_spilled",
        "Sessions whose state is in the spill store.",
        lambda lane: lane.residence.num_spilled if lane.residence else 0,
    ),
    _counter("rnnserve_spills", "States of idle sessions moved out of memory.", lambda lane: lane.tally.spills),
    _counter("rnnserve_restores", "States moved back into memory.", lambda lane: lane.tally.restores),
    _counter("rnnserve_spill_errors", "Failures of the spill store.", lambda lane: lane.tally.spill_errors),
    _counter("rnnserve_generated_outputs", "Ids or steps that Generate made.", lambda lane: lane.tally.outputs),
    _histogram(
        "rnnserve_time_to_first_output_seconds",
        "Time from a call of Generate to the first output of each of its sequences.",
        lambda lane: lane.tally.first_outputs,
    ),
    _histogram(
        "rnnserve_time_between_outputs_seconds",
        "Time from an output of Generate to the next one of its sequence; of several at once, their share of it.",
        lambda lane: lane.tally.next_outputs,
    ),
    _gauge(
        "rnnserve_model_load_duration_seconds",
        "Time that loading and probing the model took.",
        lambda lane: lane.tally.load_seconds,
    ),
    LaneMetric(
        GaugeMetricFamily,
        "rnnserve_model_exactness",
        "1 for the probe's verdict at load.",
        ("verdict",),
        lambda lane: [((lane.exactness.verdict,), 1)],
    ),
)


def registry_of(engine: Engine, broken: Sequence[Broken], *more: Collector) -> CollectorRegistry:
    """Make the registry that /metrics shows; more: what collects metrics of other parts of the server."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in (_EngineCollector(engine, broken), *more):
        registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def worker_metrics(num_workers: int, num_restarts: int, *, is_ready: bool) -> list[Metric]:
    """Make the metrics of a server's workers as a whole, and of the process that supervises them."""
    return [
        GaugeMetricFamily("rnnserve_workers", "Workers that are ready.", value=num_workers),
        CounterMetricFamily(
            "rnnserve_worker_restarts", "Workers started again after one had died.", value=num_restarts
        ),
        _ready(is_ready=is_ready),
        *ProcessCollector(registry=None).collect(),
    ]


def _add(family: Any, key: tuple[str, ...], samples: Samples) -> None:
    for labels, value in samples:
        if isinstance(value, Histogram):
            _add_histogram(family, (*key, *labels), value)
        else:
            family.add_metric((*key, *labels), value)


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Put a histogram into a family."""
    buckets, total = [], 0
    for bound, count in zip((*map(float, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((str(bound), float(total)))
    family.add_metric(labels, buckets, histogram.sum)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, broken: Sequence[Broken]) -> None:
        self._engine = engine
        self._broken = broken

    def collect(self) -> Iterator[Metric]:
        lanes = self._engine.live_lanes
        for metric in LANE_METRICS:
            labels = (*(GRAPH if metric.is_of_graph else VERSION), *metric.labels)
            family = metric.kind(metric.name, metric.text, labels=labels)
            for lane in lanes:
                key = (lane.name, str(lane.version))
                if not metric.is_of_graph:
                    _add(family, key, metric.read(lane))
                    continue
                _add(family, (*key, "main"), metric.read(lane))
                if lane.encoder is not None:
                    _add(family, (*key, "encoder"), metric.read(lane.encoder))
            yield family
        yield GaugeMetricFamily(
            "rnnserve_broken_models", "Model versions on disk that could not be loaded.", value=len(self._broken)
        )
        yield _ready(is_ready=not self._engine.is_draining)
        yield _build_info(self._engine.settings.provider)


class CallCollector(Collector):
    """Metrics of gRPC calls, named by gRPC's proposal A66, written as by OpenTelemetry's exporter for Prometheus."""

    def __init__(self, calls: CallTally) -> None:
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        """Make what is to be shown now."""
        started = CounterMetricFamily("grpc_server_call_started", "Calls that began.", labels=("grpc_method",))
        for method, count in self._calls.started.items():
            started.add_metric((method,), count)
        yield started
        for name, text, read in CALL_HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=("grpc_method", "grpc_status"))
            for labels, ended in self._calls.ended.items():
                _add(family, labels, [((), read(ended))])
            yield family


CALL_HISTOGRAMS: tuple[tuple[str, str, Callable[[Ended], Histogram]], ...] = (
    (
        "grpc_server_call_duration_seconds",
        "Time from a call's beginning until its status is handed to gRPC; a stream is one call, however long it lives.",
        lambda ended: ended.durations,
    ),
    (
        "grpc_server_call_sent_total_compressed_message_size_bytes",
        "Bytes of all messages sent in a call, without framing; counted before they are compressed.",
        lambda ended: ended.sent,
    ),
    (
        "grpc_server_call_rcvd_total_compressed_message_size_bytes",
        "Bytes of all messages received in a call, without framing; counted after they were decompressed.",
        lambda ended: ended.received,
    ),
)


def _rows(lane: Lane) -> Histogram:
    """Runs by rows: up to each power of two, up to the largest batch."""
    bounds = [1]
    while bounds[-1] < lane.settings.max_batch_rows:
        bounds.append(2 * bounds[-1])
    histogram = Histogram(bounds)
    histogram.counts = [*(lane.tally.run_rows.get(bound, 0) for bound in bounds), 0]
    histogram.sum = lane.tally.run_rows_sum
    return histogram


def _ready(*, is_ready: bool) -> GaugeMetricFamily:
    return GaugeMetricFamily("rnnserve_ready", "1 while new work is taken, as /readyz says.", value=is_ready)


@cache
def _versions() -> tuple[str, str, str]:
    """Of this package, of onnxruntime, whichever build of it is installed, and of Python."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            return version("rnnserve"), version(name), platform.python_version()
    return version("rnnserve"), "", platform.python_version()


def _build_info(provider: str) -> GaugeMetricFamily:
    labels = ("version", "onnxruntime", "python", "provider")
    family = GaugeMetricFamily("rnnserve_build_info", "1, about the software that serves.", labels=labels)
    family.add_metric((*_versions(), provider), 1)
    return family
