"""A scrape of /metrics, and the laws that its histograms keep."""

from __future__ import annotations

import math
import urllib.request
from collections import defaultdict

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Served

Series = tuple[str, frozenset[tuple[str, str]]]


class Page:
    """One scrape."""

    def __init__(self, served: Served | str) -> None:
        """Ask a server, or take what one has answered."""
        if isinstance(served, Served):
            with urllib.request.urlopen(f"http://127.0.0.1:{served.server.http_port}/metrics") as response:
                served = response.read().decode()
        self.text = served
        self.families = list(text_string_to_metric_families(self.text))
        self.series: dict[Series, float] = {}
        for family in self.families:
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.series, f"{key} is there twice"
                self.series[key] = sample.value

    def of(self, name: str, **labels: str) -> float:
        """Sum of all series of that name with those labels."""
        found = [v for (known, have), v in self.series.items() if known == name and labels.items() <= set(have)]
        assert found, f"no series {name} {labels}"
        return math.fsum(found)


def check_histograms(page: Page) -> int:
    """Hold every histogram to its laws. Returns how many there are."""
    buckets: dict[Series, list[tuple[float, float]]] = defaultdict(list)
    for (name, labels), value in page.series.items():
        if name.endswith("_bucket"):
            rest = frozenset(each for each in labels if each[0] != "le")
            buckets[name.removesuffix("_bucket"), rest].append((float(dict(labels)["le"]), value))
    for (name, labels), pairs in buckets.items():
        bounds, counts = zip(*pairs, strict=True)
        assert list(bounds) == sorted(set(bounds)), name
        assert bounds[-1] == math.inf, name
        assert list(counts) == sorted(counts), name
        assert page.series[f"{name}_count", labels] == counts[-1], name
        sum_ = page.series[f"{name}_sum", labels]
        numbers = np.diff([0.0, *counts])
        least = float(np.dot(numbers, [0.0, *bounds[:-1]]))
        assert least <= sum_ or math.isclose(least, sum_), name
        if not numbers[-1]:
            most = float(np.dot(numbers[:-1], bounds[:-1]))
            assert sum_ <= most or math.isclose(most, sum_), name
    return len(buckets)
