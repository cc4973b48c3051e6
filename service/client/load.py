"""Load for a server: streams of steps, frames of many sessions, whole sequences; closed loop, or paced like a clock.

Requests are serialised before the clock starts and one-step answers are counted, not parsed, so that the client takes
as little as it can of a machine that it shares with the server. Paced load is the honest kind: a step is sent when it
is due, whether or not the last one was answered, and its latency counts from that moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import grpc.aio
import numpy as np
import numpy.typing as npt

from service.client.info import ModelInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

STREAM = "/rnnserve.v1.SequenceService/StreamPredict"
PREDICT = "/rnnserve.v1.SequenceService/Predict"
CHANNELS = 4
"""Connections that streams are spread over."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    kind: Literal["steps", "frames", "predict"] = "steps"
    """One session a stream; many sessions in each message; or whole sequences in Predict calls."""
    streams: int = 1
    """Concurrent streams, or concurrent Predict calls."""
    steps: int = 1
    """Steps of a session in each message."""
    sessions: int = 1
    """Sessions in each frame, or sequences in each Predict call."""
    longest: int = 0
    """Predict: sequences have lengths spread evenly over 1..longest; 0 gives every one `steps` steps."""
    rate: float = 0.0
    """Messages a second of each stream, paced; 0 sends the next one when the last is answered."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of it."""

    num_steps: int
    """Steps answered while the clock ran."""
    seconds: float
    latencies_ms: Floats
    """Of each message, sorted."""

    @property
    def steps_per_s(self) -> float:
        """Rate of answered steps."""
        return self.num_steps / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Latency that `percent` of the messages stay within."""
        return float(np.percentile(self.latencies_ms, percent)) if len(self.latencies_ms) else float("nan")


async def drive(
    target: str,
    model: ModelInfo,
    load: Load,
    *,
    seconds: float,
    warmup_s: float = 0.5,
    on_begin: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> Measured:
    """Load a server, and measure after a warm-up.

    target    host:port
    on_begin  called when the clock starts; on_end when it stops, while the load still runs
    Raises grpc.aio.AioRpcError when a call fails.
    """
    driver = _Driver(model, load)
    channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(min(CHANNELS, load.streams))]
    send = driver.predict if load.kind == "predict" else driver.paced if load.rate else driver.closed
    tasks = [asyncio.create_task(send(channels[i % len(channels)], i)) for i in range(load.streams)]
    try:
        await _while_running(tasks, warmup_s)
        driver.begin()
        on_begin()
        began = time.perf_counter()
        await _while_running(tasks, seconds)
        took = time.perf_counter() - began
        on_end()
        return driver.measured(took)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()


_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


async def _while_running(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Wait; a task that fails meanwhile raises here."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


class _Driver:
    def __init__(self, model: ModelInfo, load: Load) -> None:
        self._load = load
        self._latencies: list[float] = []
        self._num_steps = 0
        rng = np.random.default_rng(0)
        sessions = load.sessions if load.kind == "frames" else 1
        self._open = pb.StreamPredictRequest(
            open=pb.StreamOpen(model=model.name, version=model.version, sessions=[pb.SessionOpen()] * sessions)
        ).SerializeToString()
        if load.kind == "predict":
            lengths = [load.steps] * load.sessions
            if load.longest:
                lengths = np.linspace(1, load.longest, load.sessions).astype(int).tolist()
            tensors = _tensors(model, rng, sum(lengths), lengths)
            request = pb.PredictRequest(model=model.name, version=model.version, inputs=tensors)
            self._message, self._steps_each = request.SerializeToString(), sum(lengths)
        else:
            frame = pb.StreamFrame(tensors=_tensors(model, rng, sessions * load.steps, []))
            if sessions > 1:
                frame.handles.extend(range(sessions))
            if load.steps > 1:
                frame.lengths.extend([load.steps] * sessions)
            self._message = pb.StreamPredictRequest(frame=frame).SerializeToString()
            self._steps_each = sessions * load.steps

    def begin(self) -> None:
        self._latencies = []
        self._num_steps = 0

    def measured(self, seconds: float) -> Measured:
        return Measured(self._num_steps, seconds, np.sort(np.array(self._latencies)) * 1000)

    def _count(self, since: float) -> None:
        self._latencies.append(time.perf_counter() - since)
        self._num_steps += self._steps_each

    async def _begin_stream(self, channel: grpc.aio.Channel) -> Any:
        call: Any = channel.stream_stream(STREAM)()
        await call.write(self._open)
        await call.read()
        return call

    async def closed(self, channel: grpc.aio.Channel, _: int) -> None:
        """Send the next message when the last is answered in full."""
        call = await self._begin_stream(channel)
        is_single = self._steps_each == 1
        while True:
            since = time.perf_counter()
            await call.write(self._message)
            if is_single:
                _check(await call.read())
            else:
                left = self._steps_each
                while left > 0:
                    left -= _num_answered(await call.read())
            self._count(since)

    async def paced(self, channel: grpc.aio.Channel, number: int) -> None:
        """Send a message whenever one is due."""
        call = await self._begin_stream(channel)
        interval = 1 / self._load.rate
        due: list[float] = []
        reader = asyncio.create_task(self._read_paced(call, due))
        next_due = time.perf_counter() + interval * (number + 1) / self._load.streams
        try:
            while not reader.done():
                await asyncio.sleep(max(0.0, next_due - time.perf_counter()))
                due.append(next_due)
                await call.write(self._message)
                next_due += interval
            reader.result()
        finally:
            reader.cancel()

    async def _read_paced(self, call: Any, due: list[float]) -> None:
        answered = 0
        for number in range(2**62):
            while answered < self._steps_each:
                answered += _num_answered(await call.read())
            answered -= self._steps_each
            self._count(due[number])

    async def predict(self, channel: grpc.aio.Channel, _: int) -> None:
        """Call Predict again and again."""
        call: Any = channel.unary_unary(PREDICT)
        while True:
            since = time.perf_counter()
            await call(self._message)
            self._count(since)


def _tensors(model: ModelInfo, rng: np.random.Generator, num_rows: int, lengths: list[int]) -> list[pb.Tensor]:
    tensors = []
    for tensor in model.inputs:
        shape = (num_rows, *tensor.row_shape)
        is_float = tensor.dtype.startswith("float")
        rows = rng.standard_normal(shape) if is_float else rng.integers(0, max(2, len(model.vocabulary)), shape)
        data = rows.astype(tensor.dtype).tobytes()
        tensors.append(pb.Tensor(name=tensor.name if len(model.inputs) > 1 else "", lengths=lengths, data=data))
    return tensors


def _num_answered(response: Any) -> int:
    _check(response)
    answer = pb.StreamPredictResponse.FromString(response).answer
    if answer.errors:
        raise RuntimeError(f"the server refused steps: {answer.errors[0].status.message}")
    return sum(answer.lengths)


def _check(response: Any) -> None:
    if response is grpc.aio.EOF:
        raise RuntimeError("the server ended the stream")
