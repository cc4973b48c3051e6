"""Loads of every shape: ramps, closed and paced; messages of many steps and sessions; every cell and size; flags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.measure import MODELS, OUTPUTS, Loaded, Raw, Result, Settings, model_name, put_load
from benchmarks.processes import echo, flags_of_serve, rnnserve
from service.client.load import Load

STREAMS = (1, 16, 64, 256, 1000)
PACE = 20.0
"""Messages a second of a stream in the paced ramp."""
SHARES = (0.3, 0.5, 0.7, 0.9)
"""Of the measured capacity."""
BATCHES = (1, 4, 16, 64, 256)
MAX_BATCH = 256
"""Most rows that the server runs at once by default, """
MAX_CHUNK = 16
"""and most steps of each."""
CPU = "server CPU per step"


def closed_ramp(repository: Path, settings: Settings) -> Iterator[Result]:
    """One-step messages over growing numbers of streams, each sent when the last one is answered."""
    with rnnserve(repository) as ours:
        for streams in STREAMS:
            loaded = put_load(ours, Load(streams=streams), settings.seconds)
            yield _cpu(f"closed loop, {_streams(streams)}: {CPU}", loaded)


def open_ramp(repository: Path, settings: Settings) -> Iterator[Result]:
    """One-step messages at fixed rates, and at shares of what a closed loop of 64 streams gets through."""
    with rnnserve(repository) as ours:
        for streams in STREAMS[:-1]:
            loaded = put_load(ours, Load(streams=streams, rate=PACE), settings.seconds)
            yield _p99(f"paced, {_streams(streams)} of {PACE:g} messages/s: p99 from the intended send", loaded)
        capacity = put_load(ours, Load(streams=64), settings.seconds).measured.messages_per_s
        for share in SHARES:
            loaded = put_load(ours, Load(streams=64, rate=share * capacity / 64), settings.seconds)
            name = f"paced, 64 streams at {share:.0%} of capacity: p99 from the intended send"
            yield _p99(name, loaded, share=share, capacity_steps_per_s=capacity)


def shapes(repository: Path, settings: Settings) -> Iterator[Result]:
    """Messages of many steps or sessions, beside what onnxruntime alone and a bare echo take for them."""
    raw = Raw(repository)
    loads = {f"chunks of {steps} steps, 64 streams": Load(streams=64, steps=steps) for steps in (16, 50)}
    for sessions in (16, 64, 256, 1000):
        loads[f"frames of {sessions} sessions"] = Load(kind="frames", sessions=sessions)
    for sessions in (8, 64):
        loads[f"Predict, {sessions} sequences of 1-200 steps"] = Load(kind="predict", sessions=sessions, longest=200)
    with rnnserve(repository) as ours, echo(OUTPUTS) as floor:
        for name, load in loads.items():
            loaded = put_load(ours, load, settings.seconds)
            batch, steps = min(MAX_BATCH, load.streams * load.sessions), min(MAX_CHUNK, max(load.lengths))
            raw_us = raw.step_us(batch, settings.seconds / 4, steps)
            floors: dict[str, float] = {"raw_batch": batch, "raw_steps": steps, "raw_us": raw_us}
            if load.kind != "predict":  # the echo knows streams only
                echoed = put_load(floor, load, settings.seconds / 2, model_from=ours)
                floors["echo_us"] = echoed.cpu_us_per_step
            yield _cpu(f"{name}: {CPU}", loaded, **floors)


def models(repository: Path, settings: Settings) -> Iterator[Result]:
    """One-step messages of 64 streams for every cell and size, beside onnxruntime alone at batch 64."""
    with rnnserve(repository) as ours:
        for cell, hidden in MODELS:
            model = model_name(cell, hidden)
            loaded = put_load(ours, Load(streams=64), settings.seconds, model=model)
            raw_us = Raw(repository, model).step_us(64, settings.seconds / 4)
            more = {"cell": cell, "hidden": hidden, "raw_batch": 64, "raw_us": raw_us}
            yield _cpu(f"{cell} of {hidden} units, 64 streams: {CPU}", loaded, **more)


def raw_costs(repository: Path, settings: Settings) -> Iterator[Result]:
    """Onnxruntime alone, by batch size."""
    raw = Raw(repository)
    for batch in BATCHES:
        cost = raw.step_us(batch, settings.seconds / 2)
        yield Result(f"onnxruntime alone, batch {batch}: CPU per step", cost, "us", detail={"batch": batch})


def cores(repository: Path, settings: Settings) -> Iterator[Result]:
    """What threads within a run, and several workers, give on this machine; flags that the server lacks are skipped."""
    flags = [(), ("--compute-threads", "2"), ("--workers", "2")]
    flags = [each for each in flags if not each or each[0] in flags_of_serve()]
    # As many connections as there are, so that chance spreads them about evenly over workers.
    bulk = Load(kind="predict", streams=8, sessions=8, longest=200, connections=8)
    loads = [
        ("64 streams", "lstm", Load(streams=64, connections=64)),
        *((f"bulk Predict, {m}", m, bulk) for m in ("lstm", "lstm-512")),
    ]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(rnnserve(repository, *each)) for each in flags]
        for name, model, load in loads:
            rounds = [
                [put_load(server, load, settings.seconds, model=model) for server in servers]
                for _ in range(min(2, settings.rounds))
            ]
            for each, column in zip(flags, zip(*rounds, strict=True), strict=True):
                rates = [loaded.measured.steps_per_s for loaded in column]
                ratios = [rate / turn[0].measured.steps_per_s for rate, turn in zip(rates, rounds, strict=True)]
                yield Result(
                    f"{name}, {' '.join(each) or 'no flags'}: steps a second",
                    median(rates),
                    "steps/s",
                    detail=column[-1].figures
                    | {
                        "model": model,
                        "flags": " ".join(each),
                        "steps_per_s": median(rates),
                        "cpu_us_per_step": median(loaded.cpu_us_per_step for loaded in column),
                        "over_no_flags": median(ratios),
                        "rounds": len(rounds),
                    },
                )


def _streams(number: int) -> str:
    return f"{number} stream{'s' if number > 1 else ''}"


def _cpu(name: str, loaded: Loaded, **more: object) -> Result:
    return Result(name, loaded.cpu_us_per_step, "us", detail=loaded.figures | more)


def _p99(name: str, loaded: Loaded, **more: object) -> Result:
    return Result(name, loaded.measured.percentile_ms(99), "ms", detail=loaded.figures | more)
