"""Draw what the dashboard's queries give under a changing load: docs/monitoring.png.

python -m benchmarks.monitoring: serves models with two workers, has Prometheus watch them (`make test-compat` installs
it), and puts load on them, for a minute and a half. It is a picture of the numbers, not of Grafana.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.generation import MODEL, make_generator
from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS
from benchmarks.processes import Process, rnnserve
from benchmarks.prometheus import PROGRAM, ROOT, Watcher, filled_in, finite, panels, watching
from service.client import AsyncClient, Client, InvalidArgument
from service.client.load import Load, drive
from tests.onnx_models import build

PICTURE = ROOT / "docs" / "monitoring.png"
PHASES = (
    ("8 streams", [Load(streams=8)]),
    ("64 streams", [Load(streams=64)]),
    ("frames of 64 sessions", [Load(kind="frames", sessions=64)]),
    ("16 streams, Generate", [Load(streams=16)]),
)
PHASE_S = 20.0
INTERVAL, STEP_S = "4s", 0.5
COLUMN_IN, ROW_IN = 0.62, 0.3
"""Inches of a unit of Grafana's grid."""
UNITS = {"s": (1e3, "ms"), "bytes": (2**-20, "MiB"), "Bps": (1e-3, "kB/s"), "percentunit": (1e2, "%")}
"""What values are multiplied by, and what they are then."""


def main() -> None:
    """Serve, watch, load, draw."""
    if not PROGRAM.exists():
        sys.exit(f"{PROGRAM} is missing: `make .venv-compat/.installed` puts it there")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build("lstm", features=FEATURES, hidden=HIDDEN, outputs=OUTPUTS).save(root / "models", "lstm")
        build("gru", features=FEATURES, hidden=HIDDEN, outputs=OUTPUTS).save(root / "models", "gru")
        make_generator(root / "models")
        with rnnserve(root / "models", "--workers", "2") as server, watching(server.http_port, root) as watcher:
            began_at = time.time()
            asyncio.run(put_load(server))
            draw(watcher, began_at, time.time())
    print(f"wrote {PICTURE}")


async def put_load(server: Process) -> None:
    """Go through the phases; something is refused, and something whole is predicted, in each."""
    with Client(server.target) as client:
        infos = {name: client.model(name) for name in ("lstm", "gru")}
    for name, loads in PHASES:
        print(name, flush=True)
        acts: list[Coroutine[Any, Any, Any]] = [
            drive(server.target, info, load, seconds=PHASE_S) for info in infos.values() for load in loads
        ]
        acts.append(others(server.target, generates="Generate" in name))
        await asyncio.gather(*acts)


async def others(target: str, *, generates: bool) -> None:
    """Do what is not streaming, for as long as a phase takes."""
    end = time.monotonic() + PHASE_S
    rng = np.random.default_rng(1)
    async with AsyncClient(target) as client:
        while time.monotonic() < end:
            xs = [rng.standard_normal((n, FEATURES)).astype(np.float32) for n in (20, 50)]
            await client.predict("lstm", xs)
            with contextlib.suppress(InvalidArgument):
                await client.predict("lstm", [np.full((3, FEATURES), np.nan, np.float32)])
            if generates:
                await client.generate(MODEL, num_sequences=4)
            await asyncio.sleep(0.2)


def draw(watcher: Watcher, start: float, stop: float) -> None:
    """Draw every panel in its place."""
    placed = panels()
    width, height = 24, max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in placed)
    figure = Figure(figsize=(width * COLUMN_IN, height * ROW_IN))
    for panel in placed:
        at = panel["gridPos"]
        top = 1 - at["y"] / height
        if panel["type"] == "row":
            figure.text(0.01, top - 0.9 / height, panel["title"], fontsize=15, weight="bold", va="bottom")
            continue
        left, bottom = (at["x"] + 1.1) / width, top - (at["h"] - 1.2) / height
        axes = figure.add_axes((left, bottom, (at["w"] - 1.5) / width, (at["h"] - 2.4) / height))
        axes.set_title(panel["title"], fontsize=10, loc="left")
        if panel["type"] == "heatmap":
            draw_heatmap(axes, watcher, panel, start, stop)
        elif panel["type"] == "timeseries":
            draw_lines(axes, watcher, panel, start, stop)
        else:
            write_values(axes, watcher, panel, stop)
    figure.savefig(PICTURE, dpi=80)


def draw_lines(axes: Axes, watcher: Watcher, panel: dict[str, Any], start: float, stop: float) -> None:
    """Draw series over seconds since the start."""
    scale, unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
    for target in panel["targets"]:
        for labels, times, values in watcher.over(filled_in(target["expr"], INTERVAL), start, stop, STEP_S):
            legend = target["legendFormat"]
            for name, value in labels.items():
                legend = legend.replace(f"{{{{{name}}}}}", value.removeprefix("rnnserve.v1."))
            if finite(values):
                axes.plot(np.array(times) - start, np.array(values) * scale, linewidth=1.2, label=legend)
    axes.set_xlim(0, stop - start)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit, fontsize=8)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    if axes.lines:
        axes.legend(fontsize=6, loc="upper left", ncols=1 + len(axes.lines) // 5)


def draw_heatmap(axes: Axes, watcher: Watcher, panel: dict[str, Any], start: float, stop: float) -> None:
    """Draw how many values fell into each bucket."""
    [target] = panel["targets"]
    found = watcher.over(filled_in(target["expr"], INTERVAL), start, stop, STEP_S)
    series = sorted((float(labels["le"]), times, values) for labels, times, values in found)
    bounds = [f"{bound:g}" for bound, _, _ in series]
    times = series[0][1]
    counts = np.diff(np.array([values[-len(times) :] for _, _, values in series]), axis=0, prepend=0)
    counts = np.where(counts > 0, counts, np.nan)
    axes.pcolormesh(np.array(times) - start, np.arange(len(bounds)), counts, cmap="Oranges", shading="nearest")
    axes.set_yticks(range(len(bounds)), bounds)
    axes.tick_params(labelsize=7)
    axes.set_xlim(0, stop - start)


def write_values(axes: Axes, watcher: Watcher, panel: dict[str, Any], when: float) -> None:
    """Write what there is at the end."""
    axes.axis("off")
    lines = []
    for target in panel["targets"]:
        for labels, value in watcher.at(filled_in(target["expr"], INTERVAL), when):
            words = [word for name, word in sorted(labels.items()) if not name.startswith("__")]
            lines.append("  ".join([*words, f"{value:.3g}"]))
    axes.text(0, 0.95, "\n".join(lines), fontsize=8, va="top", family="monospace", transform=axes.transAxes)


if __name__ == "__main__":
    main()
