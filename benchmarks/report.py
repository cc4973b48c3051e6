"""What is left behind: lines of a table, benchmarks/results.json, and a picture.

python -m benchmarks.report draws the picture of results.json again.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil

from benchmarks.measure import PAIRED, Result

HERE = Path(__file__).parent
JSON, PICTURE = HERE / "results.json", HERE / "results.png"
PACKAGES = ("grpcio", "onnxruntime", "protobuf", "numpy", "torch", "uvloop")
BLUE, RED, GREEN, GREY = "#1f6fb4", "#d1495b", "#4a9d5b", "#8a8a8a"
Object = dict[str, Any]


def machine() -> Object:
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


# ---- table ----------------------------------------------------------------------------------------------------------


def line(result: Result) -> str:
    """One row of the table."""
    held = ""
    if result.budget is not None:
        held = f"{'>=' if result.is_at_least else '<='} {result.budget:<5} {'holds' if result.holds else 'MISSED'}"
    return f"{result.name:<76} {_short(result.measured):>7} {result.unit:<7} {held:<15} {_detail(result)}".rstrip()


def _detail(result: Result) -> str:
    detail = dict(result.detail)
    words = []
    first = next((name for name in detail if name.startswith("first_")), None)
    if result.unit == PAIRED and first is not None:
        unit = first.removeprefix("first_")
        words.append(f"{_short(detail.pop(first))} / {_short(detail.pop('second_' + unit))} {unit}")
        words.append(f"rounds {detail.pop('lowest'):.2f} to {detail.pop('highest'):.2f}")
        del detail["rounds"]
    of_load = ("load", "model", "cell", "hidden", "flags", "share", "batch")  # the name says it
    shown = {name: value for name, value in detail.items() if name not in of_load and value != result.measured}
    words += [f"{name} {_short(value)}" for name, value in shown.items()]
    return ", ".join(words)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value)


# ---- results.json ---------------------------------------------------------------------------------------------------


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write every figure, with the machine."""
    here = machine()
    path.write_text(json.dumps([_object(result, here) for result in results], indent=1) + "\n", encoding="utf-8")


def _object(result: Result, here: Object) -> Object:
    return {
        "name": result.name,
        "measured": _rounded(result.measured),
        "unit": result.unit,
        "budget": result.budget,
        "is_at_least": result.is_at_least,
        "holds": result.holds,
        "detail": {name: _rounded(value) for name, value in result.detail.items()},
        "machine": here,
    }


def _rounded(value: Any) -> Any:
    """Five digits are more than any figure is good for; JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(results: Sequence[Object], path: Path) -> None:
    """Latency against throughput, and cost of a step against batch size, with both floors drawn in.

    results  objects of results.json
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    closed = _details(results, "closed loop, ")
    rates = [each["steps_per_s"] for each in closed]
    left.plot(rates, [each["p50_ms"] for each in closed], "o-", color=BLUE, label="closed loop, p50")
    left.plot(rates, [each["p99_ms"] for each in closed], "o-", color=RED, label="closed loop, p99")
    for each in closed:
        place = (each["steps_per_s"], each["p99_ms"])
        left.annotate(str(each["load"]["streams"]), place, xytext=(4, 4), textcoords="offset points")
    paced = [each for each in _details(results, "paced, 64 streams at ") if each["p99_ms"] is not None]
    rates = [each["steps_per_s"] for each in paced]
    left.plot(rates, [each["p50_ms"] for each in paced], "s:", color=BLUE, label="64 paced streams, p50")
    left.plot(rates, [each["p99_ms"] for each in paced], "s:", color=RED, label="64 paced streams, p99")
    left.set(xlabel="steps a second", ylabel="latency, ms", yscale="log", title="one-step messages; labels: streams")

    streams = [each["load"]["streams"] for each in closed]
    right.plot(streams, [each["cpu_us_per_step"] for each in closed], "o-", color=BLUE, label="one step a message")
    frames = [each for each in _details(results, "frames of ") if "load" in each]
    sizes = [each["load"]["sessions"] for each in frames]
    right.plot(sizes, [each["cpu_us_per_step"] for each in frames], "o-", color=RED, label="frames of many sessions")
    right.plot(sizes, [each["echo_us"] for each in frames], "--", color=GREY, label="bare grpc.aio echo of the same")
    [one] = _details(results, "one-step messages, 64 streams: ")
    right.axhline(one["second_us"], color=GREY, linestyle=":", label="bare echo, one step a message")
    costs = [each for each in results if each["name"].startswith("onnxruntime alone, ")]
    batches = [each["detail"]["batch"] for each in costs]
    right.plot(batches, [each["measured"] for each in costs], "o-", color=GREEN, label="onnxruntime alone")
    right.set(
        xlabel="streams, sessions in a frame, or rows of a batch",
        ylabel="CPU time of a step, us",
        xscale="log",
        yscale="log",
        title="server's cost of a step, and its floors",
    )
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _details(results: Sequence[Object], start: str) -> list[Object]:
    """Details of the results whose name begins so."""
    return [each["detail"] for each in results if each["name"].startswith(start)]


if __name__ == "__main__":
    draw(json.loads(JSON.read_text(encoding="utf-8")), PICTURE)
