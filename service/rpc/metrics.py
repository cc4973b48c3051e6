"""One page of metrics for several workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import add

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from service.telemetry import OVER_WORKERS

Page = Sequence[Metric]
_SUM: Callable[[float, float], float] = add
NEVER_FALLS = frozenset({"counter", "histogram"})
"""Types of metrics that a worker leaves behind when it ends."""


def read_page(text: bytes) -> Page:
    """Parse what /metrics answered."""
    return list(text_string_to_metric_families(text.decode()))


def write_page(page: Page) -> bytes:
    """Make what /metrics answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(page))
    return generate_latest(registry)


def merge(pages: Iterable[Page]) -> Page:
    """Put metrics of the same name and labels together: sums, but for those that OVER_WORKERS names."""
    families: dict[str, tuple[Metric, dict[_Key, float]]] = {}
    for page in pages:
        for metric in page:
            _, values = families.setdefault(metric.name, (metric, {}))
            both = OVER_WORKERS.get(metric.name, _SUM)
            for sample in metric.samples:
                key = (sample.name, tuple(sample.labels.items()))
                values[key] = both(values[key], sample.value) if key in values else sample.value
    merged = []
    for metric, values in families.values():
        total = Metric(metric.name, metric.documentation, metric.type)
        for (name, labels), value in values.items():
            total.add_sample(name, dict(labels), value)
        merged.append(total)
    return merged


def left_behind(page: Page) -> Page:
    """What stays of a page whose worker has ended."""
    return [metric for metric in page if metric.type in NEVER_FALLS]


_Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels, in the order in which every worker writes them."""


class _Collected(Collector):
    def __init__(self, page: Page) -> None:
        self._page = page

    def collect(self) -> Iterable[Metric]:
        return self._page
