"""How things are measured: results, loads with the server's CPU time, pairs that take turns, onnxruntime alone."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.processes import Process
from service.client import Client
from service.client.load import Load, Measured, drive, percentile, run

FEATURES, HIDDEN, OUTPUTS = 32, 128, 16
"""Of the model that is measured unless another is named, `lstm`."""
MODELS = [(cell, hidden) for cell in ("lstm", "gru", "rnn") for hidden in (64, 128, 256, 512)]
"""Cells and units of all models that are measured."""
PAIRED = "x"
"""Unit of a ratio."""


def model_name(cell: str, hidden: int) -> str:
    return "lstm" if (cell, hidden) == ("lstm", HIDDEN) else f"{cell}-{hidden}"


@dataclass(frozen=True)
class Settings:
    """How thorough to be."""

    rounds: int
    seconds: float
    """Of one measurement."""
    peer: str = ""
    """Another server to compare with: see perf_analyzer.py."""


@dataclass(frozen=True)
class Result:
    """One figure, beside its budget if it has one."""

    name: str
    measured: float
    unit: str
    budget: float | None = None
    is_at_least: bool = False
    """Whether the budget is a floor, not a ceiling."""
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, and other figures of the same measurement; units are the names' suffixes."""

    @property
    def holds(self) -> bool | None:
        if self.budget is None:
            return None
        return self.measured >= self.budget if self.is_at_least else self.measured <= self.budget


@dataclass(frozen=True)
class Loaded:
    """A load on a server, with the CPU time that the server took."""

    load: Load
    measured: Measured
    cpu_s: float

    @property
    def cpu_us_per_step(self) -> float:
        return self.cpu_s / self.measured.num_steps * 1e6 if self.measured.num_steps else math.nan

    @property
    def figures(self) -> dict[str, Any]:
        """For the detail of a result: the load, and all that was measured."""
        measured = self.measured
        figures: dict[str, Any] = {
            "load": asdict(self.load),
            "steps_per_s": measured.steps_per_s,
            "cpu_us_per_step": self.cpu_us_per_step,
            "p50_ms": measured.percentile_ms(50),
            "p99_ms": measured.percentile_ms(99),
        }
        if self.load.rate:  # the client's own part of the latency
            figures["late_p50_ms"] = percentile(measured.late_ms, 50)
            figures["late_p99_ms"] = percentile(measured.late_ms, 99)
        return figures


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

    def mark() -> None:
        marks.append(process.cpu_s())

    async def act() -> Measured:
        company = asyncio.create_task(drive(process.target, info, beside, seconds=seconds + 2.0)) if beside else None
        measured = await drive(process.target, info, load, seconds=seconds, on_begin=mark, on_end=mark)
        if company is not None:
            company.cancel()
            await asyncio.gather(company, return_exceptions=True)
        return measured

    measured = run(act())
    return Loaded(load, measured, marks[1] - marks[0])


def in_turns(settings: Settings, *acts: Callable[[], float]) -> list[list[float]]:
    """Measure each in turn, round by round: [round][act]."""
    return [[act() for act in acts] for _ in range(settings.rounds)]


def ratio(
    name: str,
    pairs: Sequence[Sequence[float]],
    unit: str,
    budget: float | None = None,
    *,
    is_at_least: bool = False,
    **detail: Any,
) -> Result:
    """Make the result of a comparison: the median over rounds of the first over the second.

    pairs  [round][2] in `unit`; figures after the second are of the same rounds, and go to the detail as they are
    """
    ratios = [first / second for first, second, *_ in pairs]
    medians = [median(column) for column in zip(*pairs, strict=True)]
    detail = {
        f"first_{unit}": medians[0],
        f"second_{unit}": medians[1],
        "lowest": min(ratios),
        "highest": max(ratios),
        "rounds": len(pairs),
        **detail,
    }
    return Result(name, median(ratios), PAIRED, budget, is_at_least, detail)


class Raw:
    """onnxruntime alone, on one thread, on the same file."""

    def __init__(self, repository: Path, model: str = "lstm") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(repository / model / "1" / "model.onnx", options)

    def step_us(self, batch: int, seconds: float, steps: int = 1, idle_s: float = 0.0) -> float:
        """CPU time of one step, in runs of a batch of so many sequences and steps of each.

        idle_s  time that the process sleeps between runs, as a server does that waits for its client
        """
        rng = np.random.default_rng(0)
        feeds = {"x": rng.standard_normal((batch, steps, FEATURES)).astype(np.float32)}
        feeds["lengths"] = np.full(batch, steps, dtype=np.int32)
        for value in self._session.get_inputs():
            if value.name.startswith("state."):
                feeds[value.name] = np.zeros((batch, *value.shape[1:]), dtype=np.float32)
        self._session.run(None, feeds)
        runs, spent, end = 0, 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            if idle_s:
                time.sleep(idle_s)
            began = time.process_time()
            self._session.run(None, feeds)
            spent += time.process_time() - began
            runs += 1
        return spent / runs / batch / steps * 1e6
