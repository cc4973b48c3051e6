"""The table of metrics in docs/monitoring.md, from what the server would show.

python -m tests.metrics_table: write it into the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.metrics_core import Metric

from service.config import load_settings
from service.engine import Engine
from service.tally import CallTally
from service.telemetry import CallCollector, registry_of, worker_metrics

FILE = Path(__file__).resolve().parent.parent / "docs" / "monitoring.md"
HEAD = ("| Metric | Type | Labels | Meaning |", "|---|---|---|---|")


def families() -> Iterable[Metric]:
    """Every metric that is ours, of a server and of the supervisor of several workers."""
    engine = Engine(load_settings({"repository": "."}))
    found = {each.name: each for each in worker_metrics(2, 0, is_ready=True)}
    found |= {each.name: each for each in registry_of(engine, [], CallCollector(CallTally())).collect()}
    engine.stop()
    return [each for name, each in found.items() if not name.startswith("process_")]


def table() -> list[str]:
    """Lines of the table."""
    rows = []
    for each in families():
        name = f"{each.name}_total" if each.type == "counter" else each.name
        labels = [f"`{label}`" for label in each._labelnames]
        rows.append(f"| `{name}` | {each.type} | {', '.join(labels)} | {each.documentation} |")
    return [*HEAD, *sorted(rows)]


def written() -> list[str]:
    """Lines of the first table that the file has."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD[0])
    stop = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return lines[start:stop]


if __name__ == "__main__":
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(text.replace("\n".join(written()), "\n".join(table())), encoding="utf-8")
