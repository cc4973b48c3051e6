"""What live steps feel of their neighbours: a bulk Predict, thousands of opens, more load than there is room for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio

from benchmarks.measure import PAIRED, Raw, Result, Settings, in_turns, put_load, ratio
from benchmarks.processes import Process, rnnserve
from service.client import Client
from service.client.load import STREAM, Load, Measured, Meter, loading, percentile, run
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

NUM_OPENED = 10_000
FULL_BATCH = (256, 16)
"""Most rows, and most steps of each, that the server runs at once by default."""
QUIET, LOST = "nothing", "10,000 sessions lost"


def bulk_beside(repository: Path, settings: Settings) -> Iterator[Result]:
    """Compare the p99 of single steps with a bulk Predict running beside them, and without."""
    steps = Load(streams=16, rate=20.0)
    bulk = Load(kind="predict", sessions=64, longest=200)
    with rnnserve(repository) as ours:
        pairs = in_turns(
            settings,
            lambda: put_load(ours, steps, settings.seconds, beside=bulk).measured.percentile_ms(99),
            lambda: put_load(ours, steps, settings.seconds).measured.percentile_ms(99),
        )
    yield ratio("paced single steps: p99 beside a bulk Predict / without", pairs, "ms", 3.0)


# ---- pauses ---------------------------------------------------------------------------------------------------------


def pauses(repository: Path, settings: Settings) -> Iterator[Result]:
    """Watch a paced stream while 10,000 sessions come and go beside it: how much longer its longest wait is."""
    rows, steps = FULL_BATCH
    batch_ms = Raw(repository).step_us(rows, settings.seconds / 2, steps) * rows * steps / 1000
    with rnnserve(repository) as ours:
        rounds = [run(_longest_waits(ours, min(settings.seconds, 1.0))) for _ in range(settings.rounds)]
    quiet = [waits.pop(QUIET) for waits in rounds]
    for act, budget in zip(rounds[0], (1.0, None, None), strict=True):
        longest = [waits[act] for waits in rounds]
        added = [max(0.0, wait - without) / batch_ms for wait, without in zip(longest, quiet, strict=True)]
        detail = {
            "longest_ms": median(longest),
            "without_ms": median(quiet),
            "batch_ms": batch_ms,
            "lowest": min(added),
            "highest": max(added),
            "rounds": len(rounds),
        }
        name = f"pause by {act}: added to a paced stream / a full batch"
        yield Result(name, median(added), PAIRED, budget, detail=detail)


async def _longest_waits(ours: Process, seconds: float) -> dict[str, float]:
    """Longest latency, in ms, of a stream that sends every 5 ms, by what happens beside it."""
    with Client(ours.target) as client:
        info = client.model("lstm")
    waits = {}
    async with grpc.aio.insecure_channel(ours.target) as channel, loading(ours.target, info, Load(rate=200.0)) as meter:
        await meter.measure(0.5)
        waits[QUIET] = (await meter.measure(seconds)).percentile_ms(100)
        for act, size in (("10,000 opens", 256), ("10,000 opens in one message", NUM_OPENED)):
            call, waits[act] = await _while_opening(meter, channel, size, seconds)
            measuring = asyncio.create_task(meter.measure(seconds))
            await asyncio.sleep(seconds / 4)
            call.cancel()
            waits[LOST] = max(waits.get(LOST, 0.0), (await measuring).percentile_ms(100))
    return waits


async def _while_opening(meter: Meter, channel: grpc.aio.Channel, size: int, seconds: float) -> tuple[Any, float]:
    """Open sessions, `size` a message, while the clock runs. Returns the call that holds them, and the longest wait."""
    sizes = [size] * (NUM_OPENED // size) + [NUM_OPENED % size] * bool(NUM_OPENED % size)
    frames = [pb.StreamPredictRequest(frame=pb.StreamFrame(opens=[pb.SessionOpen()] * count)) for count in sizes]
    messages = [frame.SerializeToString() for frame in frames]
    call: Any = channel.stream_stream(STREAM)()
    await call.write(pb.StreamPredictRequest(open=pb.StreamOpen(model="lstm")).SerializeToString())
    await call.read()
    measuring = asyncio.create_task(meter.measure(seconds))
    await asyncio.sleep(seconds / 4)
    for message in messages:
        await call.write(message)
    opened = 0
    while opened < NUM_OPENED:
        opened += len(pb.StreamPredictResponse.FromString(await call.read()).answer.opened)
    return call, (await measuring).percentile_ms(100)


# ---- overload -------------------------------------------------------------------------------------------------------

MAX_QUEUED = 512
"""Steps that the queue of the server that is overloaded has room for: half of what the streams have in one message."""
CHUNKS = Load(streams=64, steps=16)
WIDE = "lstm-512"
"""A model whose steps cost more than their messages, so that what is short is computing."""


def overload(repository: Path, settings: Settings) -> Iterator[Result]:
    """Offer twice what a server with a short queue can do, and half of it: what comes of what it accepts."""
    with rnnserve(repository, "--max-queued-steps", str(MAX_QUEUED)) as ours:
        closed = replace(CHUNKS, streams=MAX_QUEUED // CHUNKS.steps)
        capacity = put_load(ours, closed, settings.seconds, model=WIDE).measured.messages_per_s

        def offer(share: float) -> Measured:
            load = replace(CHUNKS, rate=share * capacity / CHUNKS.streams)
            return put_load(ours, load, settings.seconds, model=WIDE).measured

        rounds = [(offer(2.0), offer(0.5)) for _ in range(settings.rounds)]
    excesses = [excess for excess, _ in rounds]
    refused = Counter[str]()
    for measured in excesses:
        refused.update(measured.refused_steps)
    pairs = [(excess.percentile_ms(99), half.percentile_ms(99)) for excess, half in rounds]
    late_ms = median(percentile(excess.late_ms, 99) for excess in excesses)
    yield ratio("overload: p99 of what is accepted at 2x capacity / at 0.5x", pairs, "ms", late_p99_ms=late_ms)
    pairs = [(excess.messages_per_s, capacity) for excess in excesses]
    yield ratio("overload: messages answered at 2x capacity / capacity", pairs, "per_s", max_queued_steps=MAX_QUEUED)
    pairs = [(percentile(excess.refusals_ms, 50), excess.percentile_ms(50)) for excess in excesses]
    yield ratio("overload: p50 until a refusal is told / until an answer", pairs, "ms")
    told, following = refused["RESOURCE_EXHAUSTED"], refused["ABORTED"]
    yield Result(
        "overload: refusals that are RESOURCE_EXHAUSTED with RetryInfo",
        told / (refused.total() - following) if told else 0.0,
        PAIRED,
        1.0,
        is_at_least=True,
        detail={"refused_steps": told, "steps_behind_them": following},
    )
