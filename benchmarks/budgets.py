"""Each budget of the project, measured: a ratio of two things that took turns in one run, so that noise hits both."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS, Raw, Result, Settings, in_turns, put_load, ratio
from benchmarks.processes import echo, rnnserve
from models.layers import Recurrent
from service.client import Client
from service.client.load import Load

NUM_IDLE = 10_000
NUM_MODELS = 10
"""Models that a server is started with."""


IDLE_S = 0.0005
"""What a server waits for its one client's next frame, about: its core sleeps, and wakes slower than it fell asleep."""


def one_step_messages(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare with the bare echo: server CPU at 64 streams, and latency at one."""
    with rnnserve(repository) as ours, echo(OUTPUTS) as floor:
        load = Load(streams=64)
        pairs = in_turns(
            settings,
            lambda: put_load(ours, load, settings.seconds).cpu_us_per_step,
            lambda: put_load(floor, load, settings.seconds, model_from=ours).cpu_us_per_step,
        )
        yield ratio("one-step messages, 64 streams: server CPU per step / bare echo", pairs, "us", 1.4)
        pairs = in_turns(
            settings,
            lambda: put_load(ours, Load(), settings.seconds).measured.percentile_ms(50),
            lambda: put_load(floor, Load(), settings.seconds, model_from=ours).measured.percentile_ms(50),
        )
        yield ratio("one-step messages, 1 stream: p50 latency / bare echo", pairs, "ms", 1.6)


def frames_of_many(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare frames of 256 sessions with raw onnxruntime, and with the sum of both floors: its runs, and the echo."""
    raw = Raw(repository)
    load = Load(kind="frames", sessions=256)
    with rnnserve(repository) as ours, echo(OUTPUTS) as floor:
        rounds = in_turns(
            settings,
            lambda: put_load(ours, load, settings.seconds).cpu_us_per_step,
            lambda: raw.step_us(256, settings.seconds / 2),
            lambda: put_load(floor, load, settings.seconds, model_from=ours).cpu_us_per_step,
            lambda: raw.step_us(256, settings.seconds / 2, idle_s=IDLE_S),
        )
    echo_us = median(echo for _, _, echo, _ in rounds)
    yield ratio("frames of 256 sessions: server CPU per step / raw onnxruntime", rounds, "us", 1.5, echo_us=echo_us)
    floors = [(echo, raw) for _, raw, echo, _ in rounds]
    yield ratio("frames of 256 sessions: bare echo / raw onnxruntime", floors, "us")
    woken = [(woken, raw) for _, raw, _, woken in rounds]
    yield ratio("batches of 256: onnxruntime after 0.5 ms of idling / without", woken, "us")
    sums = [(ours, woken + echo) for ours, _, echo, woken in rounds]
    yield ratio("frames of 256 sessions: server CPU per step / onnxruntime after idling + bare echo", sums, "us")


def ragged_predict(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare a ragged call with what its real steps cost at batch 64."""
    raw = Raw(repository)
    load = Load(kind="predict", sessions=64, longest=200)
    num_steps = sum(load.lengths)
    with rnnserve(repository) as ours:
        pairs = in_turns(
            settings,
            lambda: put_load(ours, load, settings.seconds).measured.percentile_ms(50) / num_steps * 1000,
            lambda: raw.step_us(64, settings.seconds / 2),
        )
    yield ratio("Predict, 64 sequences of 1-200 steps: time / real steps at batch 64", pairs, "us", 1.25)


def many_open(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare throughput of 64 active sessions with and without 10,000 idle ones, and weigh the idle ones."""
    pairs, added = [], []
    with rnnserve(repository) as ours, Client(ours.target) as client:
        put_load(ours, Load(streams=64), settings.seconds)
        for _ in range(settings.rounds):
            alone = put_load(ours, Load(streams=64), settings.seconds).measured.steps_per_s
            before = ours.memory_bytes()
            with client.gateway("lstm") as gateway:
                for _ in range(NUM_IDLE):
                    gateway.open()
                gateway.flush()
                opened = 0
                for events in gateway.receive():
                    opened += len(events.opened)
                    if opened == NUM_IDLE:
                        break
                added.append(ours.memory_bytes() - before)
                pairs.append((put_load(ours, Load(streams=64), settings.seconds).measured.steps_per_s, alone))
    name = "10,000 open sessions, 64 active: throughput / 64 open"
    yield ratio(name, pairs, "steps_per_s", 0.95, is_at_least=True)
    # The first time counts: later ones find the memory that it left.
    yield Result(
        "memory of an idle session beyond its state",
        max(added) / NUM_IDLE / 1024,
        "KiB",
        1.5,
        detail={"sessions": NUM_IDLE, "state_bytes": 2 * HIDDEN * 4},
    )


_PLAIN_LOAD = """
import sys, onnxruntime, grpc.aio, aiohttp, prometheus_client, pydantic_settings, numpy, uvloop
for path in sys.argv[1:]: onnxruntime.InferenceSession(path)
"""


def start(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare the time until ready with ten models with importing and loading alone."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(repository.iterdir())[:NUM_MODELS]:
            shutil.copytree(path, Path(folder, path.name))
        paths = [str(path) for path in sorted(Path(folder).glob("*/1/model.onnx"))]

        def ready() -> float:
            with rnnserve(Path(folder)) as ours:
                return ours.ready_s

        def plain() -> float:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _PLAIN_LOAD, *paths], check=True)
            return time.perf_counter() - began

        pairs = in_turns(settings, ready, plain)
    yield ratio(f"ready with {NUM_MODELS} models / imports and loading", pairs, "s", 1.5)


def training(_: Path, settings: Settings) -> Iterator[Result]:
    """Compare a training step of the project's layers with torch's plain modules."""
    torch.set_num_threads(1)
    x = torch.randn(40, 32, FEATURES)
    lengths = torch.full((32,), 40, dtype=torch.int32)
    turns = Settings(rounds=4 * settings.rounds, seconds=settings.seconds / 4)
    for cell, plain in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        layer, module = Recurrent(cell, FEATURES, HIDDEN), plain(FEATURES, HIDDEN)
        pairs = in_turns(
            turns,
            partial(_training_step_ms, layer, partial(layer.outputs, x, lengths), turns.seconds),
            partial(_training_step_ms, module, partial(_first, module, x), turns.seconds),
        )
        yield ratio(f"training step, {cell} of {HIDDEN} units / torch's own", pairs, "ms", 1.05)


def _first(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[0]


def _training_step_ms(module: torch.nn.Module, forward: Callable[[], torch.Tensor], seconds: float) -> float:
    runs, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        module.zero_grad()
        forward().sum().backward()
        runs += 1
    return (time.perf_counter() - began) / runs * 1000
