"""Every metric's name, in one place. Lanes keep tallies and a scrape reads them: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # they import onnxruntime, which a supervisor of workers has no use for
    from service.engine import Engine
    from service.lane import Lane
    from service.repository import Broken

LABELS = ("model", "version")
FACTS = frozenset({"rnnserve_model_exactness", "rnnserve_broken_models"})
"""Gauges that say the same of every worker of a server; all others are summed over workers."""


def registry_of(engine: Engine, broken: Sequence[Broken]) -> CollectorRegistry:
    """Make the registry that /metrics shows."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(engine, broken))
    return registry


def worker_metrics(num_workers: int, num_restarts: int) -> list[CounterMetricFamily | GaugeMetricFamily]:
    """Make the metrics of a server's workers as a whole."""
    return [
        GaugeMetricFamily("rnnserve_workers", "Workers that are ready.", value=num_workers),
        CounterMetricFamily(
            "rnnserve_worker_restarts", "Workers started again after one had died.", value=num_restarts
        ),
    ]


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, broken: Sequence[Broken]) -> None:
        self._engine = engine
        self._broken = broken

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        counters = {
            name: CounterMetricFamily(f"rnnserve_{name}", text, labels=LABELS)
            for name, text in {
                "steps": "Timesteps computed.",
                "sequences": "Sequences begun: sessions opened, and sequences of Predict calls.",
                "runs": "Runs of onnxruntime.",
                "run_seconds": "Seconds spent in onnxruntime.",
                "spills": "States of idle sessions moved out of memory.",
                "restores": "States moved back into memory.",
                "spill_errors": "Failures of the spill store.",
            }.items()
        }
        rejected = CounterMetricFamily("rnnserve_rejected", "Entries refused, by reason.", labels=(*LABELS, "reason"))
        gauges = {
            name: GaugeMetricFamily(f"rnnserve_{name}", text, labels=LABELS)
            for name, text in {
                "sessions": "Live sessions of streams.",
                "sessions_resident": "Sessions whose state is in memory.",
                "sessions_spilled": "Sessions whose state is in the spill store.",
                "slots_used": "State slots that hold a sequence.",
                "slots": "State slots.",
                "queued_steps": "Timesteps that wait for their run or are in it.",
            }.items()
        }
        exactness = GaugeMetricFamily(
            "rnnserve_model_exactness", "1 for the probe's verdict at load.", labels=(*LABELS, "verdict")
        )
        rows = HistogramMetricFamily("rnnserve_run_rows", "Sequences advanced by one run.", labels=LABELS)
        for lane in self._engine.lanes:
            labels = (lane.name, str(lane.version))
            tally = lane.tally
            residence = lane.residence
            for name, value in {
                "steps": tally.steps,
                "sequences": tally.sequences,
                "runs": tally.runs,
                "run_seconds": tally.run_seconds,
                "spills": tally.spills,
                "restores": tally.restores,
                "spill_errors": tally.spill_errors,
            }.items():
                counters[name].add_metric(labels, value)
            for name, value in {
                "sessions": lane.num_sessions,
                "sessions_resident": residence.num_resident if residence else lane.num_sessions,
                "sessions_spilled": residence.num_spilled if residence else 0,
                "slots_used": lane.slab.num_allocated,
                "slots": lane.slab.capacity,
                "queued_steps": lane.num_queued_steps,
            }.items():
                gauges[name].add_metric(labels, value)
            for reason, count in tally.rejected.items():
                rejected.add_metric((*labels, reason), count)
            exactness.add_metric((*labels, lane.exactness.verdict), 1)
            rows.add_metric(labels, _buckets(lane), tally.run_rows_sum)
        broken = GaugeMetricFamily("rnnserve_broken_models", "Model versions on disk that could not be loaded.")
        broken.add_metric((), len(self._broken))
        return [*counters.values(), rejected, *gauges.values(), exactness, rows, broken]


def _buckets(lane: Lane) -> list[tuple[str, float]]:
    """Cumulative counts at powers of two, up to the largest batch."""
    buckets: list[tuple[str, float]] = []
    total = 0.0
    bound = 1
    while bound < 2 * lane.settings.max_batch_rows:
        total += lane.tally.run_rows.get(bound, 0)
        buckets.append((str(float(bound)), total))
        bound *= 2
    buckets.append(("+Inf", total))
    return buckets
