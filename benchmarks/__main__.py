"""`make bench`: every budget beside what was measured here, in one run.

python -m benchmarks [--quick] [--only WORD]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.budgets import ALL, FEATURES, HIDDEN, OUTPUTS, Loaded, Raw, Row, Settings, put_load
from benchmarks.processes import echo, rnnserve
from benchmarks.report import HERE, Point, draw, line, machine, write_json
from service.client.load import Load
from tests.onnx_models import build

RAMP = (1, 16, 64, 256, 1000)
BATCHES = (1, 4, 16, 64, 256)


def make_repository(root: Path) -> None:
    """Ten models: the one that is measured, and nine that a server has beside it."""
    for cell, sizes in {"lstm": (HIDDEN, 64, 256, 512), "gru": (64, HIDDEN, 256), "rnn": (64, HIDDEN, 256)}.items():
        for hidden in sizes:
            name = cell if (cell, hidden) == ("lstm", HIDDEN) else f"{cell}-{hidden}"
            build(cell, features=FEATURES, hidden=hidden, outputs=OUTPUTS).save(root, name)


def ramp(repository: Path, settings: Settings) -> list[Point]:
    """Closed loop of one-step messages over growing numbers of streams."""
    points = []
    with rnnserve(repository) as ours:
        for streams in RAMP:
            loaded = put_load(ours, Load(streams=streams), settings.seconds)
            measured = loaded.measured
            p50, p99 = measured.percentile_ms(50), measured.percentile_ms(99)
            points.append(Point(streams, measured.steps_per_s, loaded.cpu_us_per_step, p50, p99))
            print(f"{streams:>6} streams {_rate(loaded)} p50 {p50:>7.2f} ms  p99 {p99:>7.2f} ms", flush=True)
    return points


def models(repository: Path, settings: Settings) -> None:
    """One-step messages of 64 streams for every cell and size."""
    with rnnserve(repository) as ours:
        for path in sorted(repository.iterdir()):
            loaded = put_load(ours, Load(streams=64), settings.seconds, model=path.name)
            print(f"{path.name:>10} {_rate(loaded)}", flush=True)


def _rate(loaded: Loaded) -> str:
    return f"{loaded.measured.steps_per_s:>8.0f} steps/s {loaded.cpu_us_per_step:>7.0f} us CPU a step"


def main() -> None:
    """Measure, print, and write results.json and results.png beside this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it works")
    parser.add_argument("--only", default="", help="measure only budgets whose function has this word in its name")
    arguments = parser.parse_args()
    settings = Settings(rounds=3, seconds=1.5) if arguments.quick else Settings(rounds=5, seconds=4.0)
    print("measured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        make_repository(repository)
        rows: list[Row] = []
        for budget in ALL:
            if arguments.only in budget.__name__:
                for row in budget(repository, settings):
                    rows.append(row)
                    print(line(row), flush=True)
        if arguments.only:
            return
        points = ramp(repository, settings)
        models(repository, settings)
        raw = Raw(repository)
        costs = {batch: raw.step_us(batch, settings.seconds / 2) for batch in BATCHES}
        with rnnserve(repository) as ours, echo(OUTPUTS) as floor:
            echo_us = put_load(floor, Load(streams=64), settings.seconds, model_from=ours).cpu_us_per_step
    write_json(rows, points, costs, HERE / "results.json")
    draw(points, costs, echo_us, HERE / "results.png")
    print(f"wrote {HERE / 'results.json'} and {HERE / 'results.png'}")


if __name__ == "__main__":
    main()
