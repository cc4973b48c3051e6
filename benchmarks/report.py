"""What `make bench` leaves behind: a table, benchmarks/results.json, and a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import psutil

from benchmarks.budgets import Row

HERE = Path(__file__).parent
PACKAGES = ("grpcio", "onnxruntime", "protobuf", "numpy", "torch", "uvloop")


@dataclass(frozen=True)
class Point:
    """One number of streams of the ramp."""

    streams: int
    steps_per_s: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def line(row: Row) -> str:
    """One row of the table."""
    sign = ">=" if row.is_at_least else "<="
    held = "holds" if row.holds else "MISSED"
    return f"{row.name:<72} {row.measured:>7.2f} {sign} {row.budget:<5} {row.unit:<4} {held:<7} {row.detail}"


def write_json(rows: Sequence[Row], points: Sequence[Point], costs: dict[int, float], path: Path) -> None:
    """Write every figure, with the machine."""
    here = machine()
    results = [
        {
            "name": row.name,
            "measured": round(row.measured, 4),
            "budget": row.budget,
            "is_at_least": row.is_at_least,
            "holds": row.holds,
            "unit": row.unit,
            "detail": row.detail,
            "machine": here,
        }
        for row in rows
    ]
    results += [{"name": "ramp of one-step streams", **asdict(point), "machine": here} for point in points]
    results += [
        {"name": "raw onnxruntime, CPU us per step", "batch": batch, "measured": round(cost, 3), "machine": here}
        for batch, cost in costs.items()
    ]
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def draw(points: Sequence[Point], costs: dict[int, float], echo_us: float, path: Path) -> None:
    """Latency against throughput, and cost per step against the number of streams, with both floors drawn in."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rates = [point.steps_per_s for point in points]
    left.plot(rates, [point.p50_ms for point in points], "o-", color="#1f6fb4", label="p50")
    left.plot(rates, [point.p99_ms for point in points], "o-", color="#d1495b", label="p99")
    for point in points:
        left.annotate(str(point.streams), (point.steps_per_s, point.p99_ms), xytext=(4, 4), textcoords="offset points")
    left.set(
        xlabel="steps a second", ylabel="latency, ms", yscale="log", title="closed loop; labels: number of streams"
    )
    left.legend(frameon=False)
    right.plot(
        [point.streams for point in points],
        [point.cpu_us for point in points],
        "o-",
        color="#1f6fb4",
        label="rnnserve, one step a message, by streams",
    )
    right.axhline(echo_us, color="#8a8a8a", linestyle="--", label="bare grpc.aio echo, 64 streams")
    right.plot(list(costs), list(costs.values()), "o-", color="#4a9d5b", label="raw onnxruntime, by batch size")
    right.set(
        xlabel="streams, or batch size", ylabel="CPU time of a step, us", xscale="log", yscale="log", title="cost"
    )
    right.legend(frameon=False)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
