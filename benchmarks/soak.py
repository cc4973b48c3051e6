"""Ten minutes at 70% load, with sessions that come and go: memory must stay flat.

python -m benchmarks.soak [--minutes 10] [--load 0.7]

Flat means: over the second half, the straight line through the memory that the server has taken for itself (heaps and
stacks, by least squares) rises by no more than 1% of it. Mapped files don't count. Writes benchmarks/soak.json and
docs/soak.png, and fails if memory is not flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.churn import CYCLE_S, SESSIONS_PER_CYCLE
from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS, Result, put_load
from benchmarks.processes import Process, rnnserve
from benchmarks.report import BLUE, GREY, HERE, RED, line, machine, write_json
from service.client import Client
from service.client.load import Load, loading, percentile, run
from tests.onnx_models import build

JSON, PICTURE = HERE / "soak.json", HERE.parent / "docs" / "soak.png"
STEADY = Load(streams=64)
RISE = 0.01
"""Of the memory: most that the line may rise over the second half."""
KIB = 1024


@dataclass
class Samples:
    """What was seen each second."""

    seconds: list[float]
    own_kib: list[float]
    """Memory that the server has taken for itself,"""
    resident_kib: list[float]
    """and with mapped files."""
    sessions: list[float]
    """Open ones."""
    sequences: list[float]
    """Begun since the server started."""
    steps_per_s: list[float]
    p99_ms: list[float]


def slope_per_min(seconds: list[float], values: list[float]) -> float:
    """Slope of the straight line through the second half, by least squares, in units of the values a minute."""
    half = len(seconds) // 2
    return float(np.polyfit(np.array(seconds[half:]) / 60, values[half:], 1)[0])


def judge(samples: Samples, **detail: object) -> Result:
    """Make the result: the slope of the second half beside what counts as flat."""
    half = len(samples.seconds) // 2
    minutes = (samples.seconds[-1] - samples.seconds[half]) / 60
    limit = RISE * float(np.mean(samples.own_kib[half:])) / minutes
    slope = slope_per_min(samples.seconds, samples.own_kib)
    detail = {
        **detail,
        "criterion": f"over the second half, the line through the memory rises by at most {RISE:.0%} of it",
        "resident_slope_kib_per_min": slope_per_min(samples.seconds, samples.resident_kib),
        "samples": vars(samples),
    }
    return Result(
        "soak: growth of the server's own memory over the second half", slope, "KiB/min", round(limit, 1), detail=detail
    )


async def soak(ours: Process, load: Load, seconds: float) -> tuple[Samples, float]:
    """Load a server, with churn, and look at it each second. Returns what was seen, and the p99 of all, in ms."""
    with Client(ours.target) as client:
        info = client.model("lstm")
    samples = Samples([], [], [], [], [], [], [])
    latencies = []
    with _churning(ours.target) as company:
        async with loading(ours.target, info, load) as meter:
            began = time.perf_counter()
            while (now := time.perf_counter() - began) < seconds:
                measured = await meter.measure(1.0)
                if company.poll() is not None:
                    raise RuntimeError("the sessions that come and go came to an end by a fault; see above")
                latencies.append(measured.latencies_ms)
                samples.seconds.append(now)
                samples.steps_per_s.append(measured.steps_per_s)
                samples.p99_ms.append(measured.percentile_ms(99))
                await asyncio.to_thread(_look, ours, samples)
                if len(samples.seconds) % 30 == 0:
                    print(
                        f"{now:>6.0f} s  {samples.own_kib[-1] / KIB:.1f} MiB, {samples.sessions[-1]:.0f} sessions, "
                        f"{measured.steps_per_s:.0f} steps/s, p99 {samples.p99_ms[-1]:.1f} ms",
                        flush=True,
                    )
    return samples, percentile(np.concatenate(latencies), 99)


@contextlib.contextmanager
def _churning(target: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.churn", target, "lstm"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _look(ours: Process, samples: Samples) -> None:
    """Read memory and sessions, on a thread: it takes some milliseconds, in which steps are due."""
    samples.own_kib.append(ours.memory_bytes() / KIB)
    samples.resident_kib.append(ours.resident_bytes() / KIB)
    with urllib.request.urlopen(f"http://127.0.0.1:{ours.http_port}/metrics") as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    samples.sessions.append(sum(sample.value for sample in families["rnnserve_sessions"].samples))
    samples.sequences.append(sum(sample.value for sample in families["rnnserve_sequences"].samples))


def draw(result: dict[str, object], path: Path) -> None:
    """Memory with its line, open sessions, and latency, over time."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    samples = Samples(**result["detail"]["samples"])
    minutes = np.array(samples.seconds) / 60
    half = len(minutes) // 2
    figure, panels = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    memory, sessions, latency = panels
    memory.plot(minutes, np.array(samples.resident_kib) / KIB, color=GREY, label="with mapped files (RSS)")
    memory.plot(minutes, np.array(samples.own_kib) / KIB, color=BLUE, label="the server's own")
    fit = np.poly1d(np.polyfit(minutes[half:], np.array(samples.own_kib[half:]) / KIB, 1))
    memory.plot(minutes[half:], fit(minutes[half:]), "--", color=RED, label=f"{result['measured']:.0f} KiB a minute")
    memory.set(ylabel="memory, MiB", ylim=(0, None), title=f"{result['detail']['load_share']:.0%} load, with churn")
    memory.legend(frameon=False, loc="lower right")
    sessions.plot(minutes, samples.sessions, color=BLUE)
    sessions.set(ylabel="open sessions", ylim=(0, None))
    latency.plot(minutes, samples.p99_ms, color=RED)
    latency.set(ylabel="p99 of a second, ms", yscale="log", xlabel="minutes")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure capacity, load, look, judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.7, help="share of the measured capacity; churn comes on top")
    arguments = parser.parse_args()
    print("measured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory() as folder:
        build("lstm", features=FEATURES, hidden=HIDDEN, outputs=OUTPUTS).save(Path(folder), "lstm")
        with rnnserve(Path(folder)) as ours:
            put_load(ours, STEADY, 1.0)
            capacity = put_load(ours, STEADY, 5.0).measured.steps_per_s
            load = replace(STEADY, rate=arguments.load * capacity / STEADY.streams)
            print(
                f"{capacity:.0f} steps/s in a closed loop of {load.streams} streams; {load.rate:.1f} of each, paced, "
                f"for {arguments.minutes:g} minutes; {SESSIONS_PER_CYCLE / CYCLE_S:.0f} sessions a second come and go",
                flush=True,
            )
            samples, p99_ms = run(soak(ours, load, arguments.minutes * 60))
    result = judge(
        samples,
        minutes=arguments.minutes,
        load_share=arguments.load,
        capacity_steps_per_s=capacity,
        p99_ms=p99_ms,
    )
    write_json([result], JSON)
    draw(json.loads(JSON.read_text(encoding="utf-8"))[0], PICTURE)
    print(line(replace(result, detail={name: value for name, value in result.detail.items() if name != "samples"})))
    print(f"wrote {JSON} and {PICTURE}")
    sys.exit(not result.holds)


if __name__ == "__main__":
    main()
