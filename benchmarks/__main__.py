"""`make bench`: every budget beside what was measured here, and loads of every shape, in one run.

python -m benchmarks [--quick] [--only WORD] [--peer TARGET,PID,MODEL]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import budgets, generation, perf_analyzer, pressure, ramps
from benchmarks.measure import FEATURES, MODELS, OUTPUTS, Result, Settings, model_name
from benchmarks.report import JSON, PICTURE, draw, line, machine, write_json
from tests.onnx_models import build

FULL, QUICK = Settings(rounds=5, seconds=3.0), Settings(rounds=3, seconds=1.0)
SECTIONS: dict[str, list[Callable[[Path, Settings], Iterator[Result]]]] = {
    "Budgets, each beside what it is measured against": [
        budgets.one_step_messages,
        budgets.frames_of_many,
        budgets.ragged_predict,
        budgets.many_open,
        budgets.start,
        budgets.training,
    ],
    "What live steps feel of their neighbours": [pressure.bulk_beside, pressure.pauses, pressure.overload],
    "Ramps of one-step messages": [ramps.closed_ramp, ramps.open_ramp],
    "Messages of every shape, beside onnxruntime alone and a bare echo": [ramps.shapes, ramps.raw_costs],
    "Every cell and size": [ramps.models],
    "Outputs that a model makes by itself": [generation.generate],
    "What more threads and workers give": [ramps.cores],
    "The Open Inference Protocol, under Triton's load tester": [perf_analyzer.perf_analyzer],
}


def make_repository(root: Path) -> None:
    """All models that are measured."""
    for cell, hidden in MODELS:
        build(cell, features=FEATURES, hidden=hidden, outputs=OUTPUTS).save(root, model_name(cell, hidden))


def main() -> None:
    """Measure, print, and write results.json and results.png beside this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds: to see that it works")
    parser.add_argument(
        "--only", default="", help="measure, and write nothing, where the function has this in its name"
    )
    parser.add_argument("--peer", default="", help="a server of the Open Inference Protocol: TARGET,PID,MODEL")
    arguments = parser.parse_args()
    settings = replace(QUICK if arguments.quick else FULL, peer=arguments.peer)
    began = time.perf_counter()
    print("measured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{settings.rounds} rounds of {settings.seconds:g} s; what is compared takes turns")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        make_repository(Path(folder))
        for title, section in SECTIONS.items():
            chosen = [measure for measure in section if arguments.only in measure.__name__]
            if chosen:
                print(f"\n{title}", flush=True)
            for measure in chosen:
                for result in measure(Path(folder), settings):
                    results.append(result)
                    print(line(result), flush=True)
    if not results:
        names = [measure.__name__ for section in SECTIONS.values() for measure in section]
        parser.error(f"--only {arguments.only}: expected a part of one of {', '.join(names)}")
    print(f"\ntook {(time.perf_counter() - began) / 60:.1f} minutes")
    if not arguments.only:
        write_json(results, JSON)
        draw(json.loads(JSON.read_text(encoding="utf-8")), PICTURE)
        print(f"wrote {JSON} and {PICTURE}")


if __name__ == "__main__":
    main()
