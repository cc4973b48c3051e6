"""Each budget of the project, measured: a ratio of two things that took turns in one run, so that noise hits both."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.processes import Process, echo, rnnserve
from models.layers import Recurrent
from service.client import Client
from service.client.load import Load, Measured, drive

FEATURES, HIDDEN, OUTPUTS = 32, 128, 16


@dataclass(frozen=True)
class Settings:
    """How thorough to be."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One budget beside what was measured."""

    name: str
    measured: float
    budget: float
    unit: str
    is_at_least: bool = False
    """Whether the budget is a floor, not a ceiling."""
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.measured >= self.budget if self.is_at_least else self.measured <= self.budget


@dataclass(frozen=True)
class Loaded:
    """A load on a server, with the CPU time that the server took."""

    measured: Measured
    cpu_s: float

    @property
    def cpu_us_per_step(self) -> float:
        return self.cpu_s / self.measured.num_steps * 1e6


def put_load(
    process: Process,
    load: Load,
    seconds: float,
    *,
    model: str = "lstm",
    model_from: Process | None = None,
    beside: Load | None = None,
) -> Loaded:
    """Load a server for some seconds.

    model_from  where to ask for the model's description, for a server that knows none (the echo)
    beside      another load at the same time, that is not measured
    """
    marks: list[float] = []
    with Client((model_from or process).target) as client:
        info = client.model(model)

    async def run() -> Measured:
        company = asyncio.create_task(drive(process.target, info, beside, seconds=seconds + 2.0)) if beside else None
        measured = await drive(
            process.target,
            info,
            load,
            seconds=seconds,
            on_begin=lambda: marks.append(process.cpu_s()),
            on_end=lambda: marks.append(process.cpu_s()),
        )
        if company is not None:
            company.cancel()
            await asyncio.gather(company, return_exceptions=True)
        return measured

    measured = asyncio.run(run())
    return Loaded(measured, marks[1] - marks[0])


def in_turns(settings: Settings, *acts: Callable[[], float]) -> list[list[float]]:
    """Measure each in turn, round by round: [round][act]."""
    return [[act() for act in acts] for _ in range(settings.rounds)]


def ratio(pairs: list[list[float]]) -> float:
    """Median over rounds of the first over the second."""
    return median(a / b for a, b in pairs)


def one_step_messages(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare with the bare echo: server CPU at 64 streams, and latency at one."""
    with rnnserve(repository) as ours, echo(OUTPUTS) as floor:
        load = Load(streams=64)
        pairs = in_turns(
            settings,
            lambda: put_load(ours, load, settings.seconds).cpu_us_per_step,
            lambda: put_load(floor, load, settings.seconds, model_from=ours).cpu_us_per_step,
        )
        detail = "{:.0f} us / {:.0f} us".format(*map(median, zip(*pairs, strict=True)))
        yield Row(
            "one-step messages, 64 streams: server CPU per step / bare echo", ratio(pairs), 1.4, "x", detail=detail
        )
        pairs = in_turns(
            settings,
            lambda: put_load(ours, Load(), settings.seconds).measured.percentile_ms(50),
            lambda: put_load(floor, Load(), settings.seconds, model_from=ours).measured.percentile_ms(50),
        )
        detail = "{:.2f} ms / {:.2f} ms".format(*map(median, zip(*pairs, strict=True)))
        yield Row("one-step messages, 1 stream: p50 latency / bare echo", ratio(pairs), 1.6, "x", detail=detail)


class Raw:
    """onnxruntime alone, on one thread, on the same file."""

    def __init__(self, repository: Path, model: str = "lstm") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(repository / model / "1" / "model.onnx", options)

    def step_us(self, batch: int, seconds: float) -> float:
        """CPU time of one step at a batch size."""
        rng = np.random.default_rng(0)
        feeds = {"x": rng.standard_normal((batch, 1, FEATURES)).astype(np.float32)}
        feeds["lengths"] = np.ones(batch, dtype=np.int32)
        for value in self._session.get_inputs():
            if value.name.startswith("state."):
                feeds[value.name] = np.zeros((batch, *value.shape[1:]), dtype=np.float32)
        self._session.run(None, feeds)
        runs, began, end = 0, time.process_time(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._session.run(None, feeds)
            runs += 1
        return (time.process_time() - began) / runs / batch * 1e6


def frames_of_many(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare with raw onnxruntime: server CPU per step of frames of 256 sessions."""
    raw = Raw(repository)
    with rnnserve(repository) as ours:
        pairs = in_turns(
            settings,
            lambda: put_load(ours, Load(kind="frames", sessions=256), settings.seconds).cpu_us_per_step,
            lambda: raw.step_us(256, settings.seconds / 2),
        )
    detail = "{:.2f} us / {:.2f} us".format(*map(median, zip(*pairs, strict=True)))
    yield Row("frames of 256 sessions: server CPU per step / raw onnxruntime", ratio(pairs), 1.5, "x", detail=detail)


def ragged_predict(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare a ragged call with what its real steps cost at batch 64."""
    raw = Raw(repository)
    load = Load(kind="predict", sessions=64, longest=200)
    num_steps = int(np.linspace(1, 200, 64).astype(int).sum())
    with rnnserve(repository) as ours:
        pairs = in_turns(
            settings,
            lambda: put_load(ours, load, settings.seconds).measured.percentile_ms(50) / num_steps * 1000,
            lambda: raw.step_us(64, settings.seconds / 2),
        )
    detail = "{:.2f} us / {:.2f} us a step".format(*map(median, zip(*pairs, strict=True)))
    yield Row(
        "Predict, 64 sequences of 1-200 steps: time / real steps at batch 64", ratio(pairs), 1.25, "x", detail=detail
    )


def many_open(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare throughput of 64 active sessions with and without 10,000 idle ones, and weigh the idle ones."""
    num_idle = 10_000
    with rnnserve(repository) as ours, Client(ours.target) as client:
        put_load(ours, Load(streams=64), settings.seconds)
        rates: list[list[float]] = [[], []]
        added: list[float] = []
        for _ in range(settings.rounds):
            rates[1].append(put_load(ours, Load(streams=64), settings.seconds).measured.steps_per_s)
            before = ours.memory_bytes()
            with client.gateway("lstm") as gateway:
                for _ in range(num_idle):
                    gateway.open()
                gateway.flush()
                opened = 0
                for events in gateway.receive():
                    opened += len(events.opened)
                    if opened == num_idle:
                        break
                added.append(ours.memory_bytes() - before)
                rates[0].append(put_load(ours, Load(streams=64), settings.seconds).measured.steps_per_s)
    pairs = [list(pair) for pair in zip(*rates, strict=True)]
    detail = "{:.0f} / {:.0f} steps/s".format(*map(median, rates))
    yield Row(
        "10,000 open sessions, 64 active: throughput / 64 open",
        ratio(pairs),
        0.95,
        "x",
        is_at_least=True,
        detail=detail,
    )
    state = 2 * HIDDEN * 4
    each = max(added) / num_idle  # the first time: later ones find the memory that it left
    yield Row(
        "memory of an idle session beyond its state", each / 1024, 1.5, "KiB", detail=f"its state is {state} bytes"
    )


def bulk_beside(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare the p99 of single steps with a bulk Predict running beside them, and without."""
    steps = Load(streams=16, rate=20.0)
    bulk = Load(kind="predict", sessions=64, longest=200)
    with rnnserve(repository) as ours:
        pairs = in_turns(
            settings,
            lambda: put_load(ours, steps, settings.seconds, beside=bulk).measured.percentile_ms(99),
            lambda: put_load(ours, steps, settings.seconds).measured.percentile_ms(99),
        )
    detail = "{:.1f} ms / {:.1f} ms".format(*map(median, zip(*pairs, strict=True)))
    yield Row("paced single steps: p99 beside a bulk Predict / without", ratio(pairs), 3.0, "x", detail=detail)


_PLAIN_LOAD = """
import sys, onnxruntime, grpc.aio, aiohttp, prometheus_client, pydantic_settings, numpy, uvloop
for path in sys.argv[1:]: onnxruntime.InferenceSession(path)
"""


def start(repository: Path, settings: Settings) -> Iterator[Row]:
    """Compare the time until ready with ten models with importing and loading alone."""
    paths = [str(path) for path in sorted(repository.glob("*/1/model.onnx"))]

    def ready() -> float:
        with rnnserve(repository) as ours:
            return ours.ready_s

    def plain() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", _PLAIN_LOAD, *paths], check=True)
        return time.perf_counter() - began

    pairs = in_turns(settings, ready, plain)
    detail = "{:.2f} s / {:.2f} s".format(*map(median, zip(*pairs, strict=True)))
    yield Row(f"ready with {len(paths)} models / imports and loading", ratio(pairs), 1.5, "x", detail=detail)


def training(_: Path, settings: Settings) -> Iterator[Row]:
    """Compare a training step of the project's layers with torch's plain modules."""
    torch.set_num_threads(1)
    x = torch.randn(40, 32, FEATURES)
    lengths = torch.full((32,), 40, dtype=torch.int32)
    part = settings.seconds / 4
    for cell, plain in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        layer, module = Recurrent(cell, FEATURES, HIDDEN), plain(FEATURES, HIDDEN)
        pairs = in_turns(
            Settings(rounds=4 * settings.rounds, seconds=part),
            partial(_training_step_ms, layer, partial(layer.outputs, x, lengths), part),
            partial(_training_step_ms, module, partial(_first, module, x), part),
        )
        detail = "{:.1f} ms / {:.1f} ms".format(*map(median, zip(*pairs, strict=True)))
        yield Row(f"training step, {cell} of {HIDDEN} units / torch's own", ratio(pairs), 1.05, "x", detail=detail)


def _first(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)[0]


def _training_step_ms(module: torch.nn.Module, forward: Callable[[], torch.Tensor], seconds: float) -> float:
    runs, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        module.zero_grad()
        forward().sum().backward()
        runs += 1
    return (time.perf_counter() - began) / runs * 1000


ALL = [one_step_messages, frames_of_many, ragged_predict, bulk_beside, many_open, start, training]
