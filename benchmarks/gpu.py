"""Steps of live sequences whose states stay on the GPU, beside what else could be done there and on the CPU.

python -m benchmarks.gpu [--provider cuda] [--device-id 0] [--cell lstm] [--quick] [--out benchmarks/gpu.json]

One step of each of `batch` sequences, a line for each size:

    slab    service.device: one graph gathers, steps and scatters in a slab on the device
    host    the same provider through session.run, with the states copied there and back
    cpu     service.runner on the CPU, with all cores

It needs no GPU with --provider cpu; then it shows only that it works, and what the slab costs beside a plain run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort

from service.backend import Backend
from service.device import DeviceRunner
from service.errors import ConfigError
from service.runner import Runner
from service.slots import StateSlab
from tests.onnx_models import build

FEATURES, OUTPUTS = 32, 16
SLOTS = 16_384
HIDDEN = (128, 256, 512, 1024)
BATCHES = (1, 4, 16, 64, 256, 1024)
CAPACITIES = (1_000, 10_000, 100_000)
ROUNDS = 5


def machine(arguments: argparse.Namespace) -> dict[str, object]:
    """What the figures were measured on."""
    gpu = "none"
    if arguments.provider != "cpu" and shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            f"--id={arguments.device_id}",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        gpu = subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "onnxruntime": ort.__version__,
        "provider": arguments.provider,
        "cell": arguments.cell,
    }


def run_us(acts: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds of each act: the median of rounds in which they take turns, so that noise hits all."""
    rounds: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        for _ in range(3):
            act()
    for _ in range(ROUNDS):
        for name, act in acts.items():
            num, began = 0, time.perf_counter()
            while (passed := time.perf_counter() - began) < seconds / ROUNDS:
                act()
                num += 1
            rounds[name].append(passed / num * 1e6)
    return {name: median(each) for name, each in rounds.items()}


def paths(backend: Backend, host: Backend, batch: int) -> dict[str, Callable[[], object]]:
    """One run of each kind, on the same sequences."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(SLOTS)[:batch]
    inputs = {"x": rng.standard_normal((batch, 1, FEATURES)).astype(np.float32)}
    lengths = np.ones(batch, np.int32)
    device = DeviceRunner(backend, SLOTS)
    cpu = Runner(host, SLOTS, max(BATCHES), len(os.sched_getaffinity(0)))
    slab = StateSlab([(s.row_shape, s.dtype) for s in backend.graph.states], SLOTS)

    def through_the_host() -> None:
        _, states = backend.run(inputs, lengths, slab.read(slots))
        slab.scatter(slots, states)

    return {
        "slab": lambda: device.run(slots, inputs, lengths),
        "host": through_the_host,
        "cpu": lambda: cpu.run(slots, inputs, lengths),
    }


def sizes(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Every batch and width."""
    for hidden in HIDDEN[:1] if arguments.quick else HIDDEN:
        path = build(arguments.cell, features=FEATURES, hidden=hidden, outputs=OUTPUTS).save(folder, f"h{hidden}")
        backend = Backend(path, provider=arguments.provider, device_id=arguments.device_id)
        host = Backend(path)
        print(f"hidden {hidden}: {backend.placement}", flush=True)
        for batch in BATCHES[:3] if arguments.quick else BATCHES:
            us = run_us(paths(backend, host, batch), arguments.seconds)
            rates = {name: batch / each * 1e6 for name, each in us.items()}
            print(
                f"hidden {hidden:>5}  batch {batch:>5}  "
                + "  ".join(f"{name} {us[name] / batch:>8.2f} us/step {rates[name]:>10.0f} steps/s" for name in us)
                + f"  host/slab {us['host'] / us['slab']:>5.2f}  cpu/slab {us['cpu'] / us['slab']:>6.2f}",
                flush=True,
            )
            figures = {name: {"us_per_step": us[name] / batch, "steps_per_s": rates[name]} for name in us}
            yield {"name": "one step", "hidden": hidden, "batch": batch, **figures}


def capacities(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Whether a run costs more where more sequences could be live."""
    batch = 64
    path = build(arguments.cell, features=FEATURES, hidden=HIDDEN[0], outputs=OUTPUTS).save(folder, "capacity")
    backend = Backend(path, provider=arguments.provider, device_id=arguments.device_id)
    inputs = {"x": np.random.default_rng(0).standard_normal((batch, 1, FEATURES)).astype(np.float32)}
    lengths = np.ones(batch, np.int32)
    for capacity in CAPACITIES:
        runner = DeviceRunner(backend, capacity)
        slots = np.random.default_rng(1).permutation(capacity)[:batch]
        us = run_us({"slab": lambda runner=runner, slots=slots: runner.run(slots, inputs, lengths)}, arguments.seconds)
        print(
            f"hidden {HIDDEN[0]:>5}  batch {batch:>5}  of {capacity:>7} slots  slab {us['slab'] / batch:>8.2f} us/step"
        )
        yield {"name": "capacity", "slots": capacity, "batch": batch, "us_per_step": us["slab"] / batch}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--device-id", type=int, default=0)
    parser.add_argument("--cell", default="lstm", choices=("lstm", "gru", "rnn"))
    parser.add_argument("--quick", action="store_true", help="few sizes and short rounds: to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpu.json"))
    arguments = parser.parse_args()
    arguments.seconds = 0.05 if arguments.quick else 1.0
    here = machine(arguments)
    print("measured on: " + ", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = [*sizes(Path(folder), arguments), *capacities(Path(folder), arguments)]
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
    arguments.out.write_text(json.dumps([{**row, "machine": here} for row in rows], indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
