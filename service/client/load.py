"""Load for a server: streams of steps, frames of many sessions, whole sequences; closed loop, or paced like a clock.

Requests are serialised before the clock starts, and of answers only the columns are read, so that the client takes as
little as it can of a machine that it shares with the server. Paced load is the honest kind: a message is sent when it
is due, whether or not the last one was answered, and its latency counts from that moment, however late it was sent.

What the server refuses for want of room is counted, not raised: paced load goes on, a closed loop waits as long as the
server says.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from service.client._aio_call import WRITE_FAILED
from service.client._base import translate
from service.client._inflight import REFUSED, InFlight
from service.client._pace import Pacer
from service.client._status import from_rpc
from service.client.errors import FailedPrecondition, RnnserveError, Unavailable
from service.client.info import ModelInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

T = TypeVar("T")
Kind = Literal["steps", "frames", "predict"]
STREAM = "/rnnserve.v1.SequenceService/StreamPredict"
PREDICT = "/rnnserve.v1.SequenceService/Predict"
ENDED = "the server ended the stream"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    kind: Kind = "steps"
    """One session a stream; many sessions in each message; or whole sequences in Predict calls."""
    streams: int = 1
    """Concurrent streams, or concurrent callers of Predict."""
    steps: int = 1
    """Steps of a session in each message."""
    sessions: int = 1
    """Sessions in each frame, or sequences in each Predict call."""
    longest: int = 0
    """Predict: sequences have lengths spread evenly over 1..longest; 0 gives every one `steps` steps."""
    rate: float = 0.0
    """Messages a second of each stream or caller, paced; 0 sends the next one when the last is answered."""
    connections: int = 4
    """Most connections that streams are spread over."""

    @property
    def lengths(self) -> list[int]:
        """Steps of each session or sequence in a message."""
        if self.kind == "predict" and self.longest:
            return [int(length) for length in np.linspace(1, self.longest, self.sessions)]
        return [self.steps] * (1 if self.kind == "steps" else self.sessions)


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of it."""

    num_steps: int
    """Steps answered while the clock ran."""
    seconds: float
    latencies_ms: Floats
    """Of each message that was answered in full, sorted."""
    refusals_ms: Floats = field(default_factory=lambda: np.empty(0))
    """Time to the outcome of each message of which steps were refused, sorted."""
    refused_steps: Mapping[str, int] = field(default_factory=dict)
    """Refused steps by code of their status; ABORTED are those behind a refused one."""
    late_ms: Floats = field(default_factory=lambda: np.empty(0))
    """Paced load: how long after it was due each message was sent, sorted. It is part of the latency."""

    @property
    def steps_per_s(self) -> float:
        """Rate of answered steps."""
        return self.num_steps / self.seconds

    @property
    def messages_per_s(self) -> float:
        """Rate of messages that were answered in full."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Latency that `percent` of the answered messages stay within."""
        return percentile(self.latencies_ms, percent)


def percentile(values: Floats, percent: float) -> float:
    """Value that `percent` of the values stay within; NaN where there are none."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


class Meter:
    """A load that runs, and the clock beside it."""

    def __init__(self, driver: _Driver, tasks: list[asyncio.Task[None]]) -> None:
        self._driver = driver
        self._tasks = tasks

    async def measure(
        self, seconds: float, on_begin: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None
    ) -> Measured:
        """Measure for a while. Raises RnnserveError when the load fails meanwhile."""
        self._driver.begin()
        on_begin()
        began = time.perf_counter()
        try:
            done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from None
        took = time.perf_counter() - began
        on_end()
        return self._driver.measured(took)


@asynccontextmanager
async def loading(target: str, model: ModelInfo, load: Load) -> AsyncIterator[Meter]:
    """Load a server until the block ends.

    target  host:port
    Raises FailedPrecondition for a model that can't be loaded so.
    """
    if load.kind != "predict" and model.step_mode != "stepping":
        raise FailedPrecondition(
            f"{model.name} answers no single steps ({model.step_mode_reason}): load it by kind predict"
        )
    pacer = Pacer()
    driver = _Driver(model, load, pacer)
    num_channels = min(load.connections, load.streams)
    channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(num_channels)]
    tasks = [asyncio.create_task(driver.send(channels[i % len(channels)], i)) for i in range(load.streams)]
    try:
        yield Meter(driver, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()
        pacer.close()


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
    Raises RnnserveError when a call fails.
    """
    async with loading(target, model, load) as meter:
        await meter.measure(warmup_s)
        return await meter.measure(seconds, on_begin, on_end)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run on an event loop of its own: uvloop's, where there is one, takes less of the machine."""
    try:
        import uvloop
    except ModuleNotFoundError:  # it is not made for Windows
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class _Driver:
    def __init__(self, model: ModelInfo, load: Load, pacer: Pacer) -> None:
        self._load = load
        self._pacer = pacer
        self.begin()
        lengths = load.lengths
        tensors = _tensors(model, np.random.default_rng(0), sum(lengths), lengths if load.kind == "predict" else [])
        self._num_sessions = len(lengths)
        self._num_steps_each = sum(lengths)
        if load.kind == "predict":
            request = pb.PredictRequest(model=model.name, version=model.version, inputs=tensors)
            self._message = request.SerializeToString()
            return
        sessions = [pb.SessionOpen()] * self._num_sessions
        opening = pb.StreamOpen(model=model.name, version=model.version, sessions=sessions)
        self._opening = pb.StreamPredictRequest(open=opening).SerializeToString()
        frame = pb.StreamFrame(tensors=tensors)
        if self._num_sessions > 1:
            frame.handles.extend(range(self._num_sessions))
        if load.steps > 1:
            frame.lengths.extend(lengths)
        self._message = pb.StreamPredictRequest(frame=frame).SerializeToString()

    # ---- the clock --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what was counted."""
        self._num_steps = 0
        self._latencies = array("d")
        self._refusals = array("d")
        self._late = array("d")
        self._refused_steps: Counter[str] = Counter()

    def measured(self, seconds: float) -> Measured:
        """What was counted since."""
        return Measured(
            self._num_steps,
            seconds,
            _sorted_ms(self._latencies),
            _sorted_ms(self._refusals),
            dict(self._refused_steps),
            _sorted_ms(self._late),
        )

    # ---- load -------------------------------------------------------------------------------------------------------

    async def send(self, channel: grpc.aio.Channel, number: int) -> None:
        """Send for ever: one stream, or one caller of Predict."""
        if self._load.kind == "predict":
            await (self._paced_calls if self._load.rate else self._closed_calls)(channel.unary_unary(PREDICT), number)
            return
        call: Any = channel.stream_stream(STREAM)()
        await call.write(self._opening)
        if await call.read() is grpc.aio.EOF:
            raise Unavailable(ENDED)
        await (self._paced if self._load.rate else self._closed)(call, number)

    async def _closed(self, call: Any, _: int) -> None:
        """Send the next message when the last is over."""
        in_flight = InFlight(self._num_sessions, self._load.steps)
        while True:
            await self._write(call, in_flight, time.perf_counter())
            while not in_flight.is_empty:
                self._take(await call.read(), in_flight)
            if in_flight.retry_after_s:
                await asyncio.sleep(in_flight.retry_after_s)
                in_flight.retry_after_s = 0.0

    async def _paced(self, call: Any, number: int) -> None:
        """Send a message whenever one is due."""
        in_flight = InFlight(self._num_sessions, self._load.steps)
        has_news = asyncio.Event()

        async def read() -> None:
            try:
                while True:
                    self._take(await call.read(), in_flight)
                    has_news.set()
            finally:
                has_news.set()

        reader = asyncio.create_task(read())
        try:
            async for due in self._moments(number):
                while in_flight.must_wait and not reader.done():
                    has_news.clear()
                    await has_news.wait()
                if reader.done():
                    reader.result()
                self._late.append(time.perf_counter() - due)
                await self._write(call, in_flight, due)
        finally:
            reader.cancel()

    async def _write(self, call: Any, in_flight: InFlight, since: float) -> None:
        positions = in_flight.send(since)
        message = self._message
        if positions:  # a message that is sent in two pieces is read as one
            frame = pb.StreamFrame(positions=positions)
            message += pb.StreamPredictRequest(frame=frame).SerializeToString()
        try:
            await call.write(message)
        except asyncio.InvalidStateError:  # the call has ended
            if (code := await call.code()) is grpc.StatusCode.OK:
                raise Unavailable(ENDED) from None
            raise from_rpc(code.name, await call.details(), await call.trailing_metadata()) from None

    def _take(self, response: Any, in_flight: InFlight) -> None:
        if response is grpc.aio.EOF:
            raise Unavailable(ENDED)
        num_steps, outcomes = in_flight.take(pb.StreamPredictResponse.FromString(response).answer)
        self._num_steps += num_steps
        if in_flight.refused_steps:
            self._refused_steps.update(in_flight.refused_steps)
            in_flight.refused_steps.clear()
        now = time.perf_counter()
        for since, is_refused in outcomes:
            (self._refusals if is_refused else self._latencies).append(now - since)

    async def _closed_calls(self, call: Any, _: int) -> None:
        """Call Predict again and again."""
        while True:
            error = await self._predict(call, time.perf_counter())
            if error is not None:
                await asyncio.sleep(error.retry_after_s or 0.0)

    async def _paced_calls(self, call: Any, number: int) -> None:
        """Call Predict whenever it is due."""
        try:
            async with asyncio.TaskGroup() as calls:
                async for due in self._moments(number):
                    self._late.append(time.perf_counter() - due)
                    calls.create_task(self._predict(call, due))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _predict(self, call: Any, since: float) -> RnnserveError | None:
        """Call once. Returns the error of a call that was refused for want of room."""
        try:
            await call(self._message)
        except grpc.aio.AioRpcError as failure:
            error = _error_of(failure)
            if error.code != REFUSED or error.retry_after_s is None:
                raise error from None
            self._refused_steps[REFUSED] += self._num_steps_each
            self._refusals.append(time.perf_counter() - since)
            return error
        self._latencies.append(time.perf_counter() - since)
        self._num_steps += self._num_steps_each
        return None

    async def _moments(self, number: int) -> AsyncIterator[float]:
        """Yield when each message of a stream is due, as it is; streams take turns."""
        interval = 1 / self._load.rate
        due = time.perf_counter() + interval * (number + 1) / self._load.streams
        while True:
            await self._pacer.until(due)
            yield due
            due += interval


def _error_of(failure: grpc.aio.AioRpcError) -> RnnserveError:
    if failure.details() == WRITE_FAILED:
        return Unavailable("the call broke while a request was being written")
    return translate(failure)


def _sorted_ms(seconds: array[float]) -> Floats:
    return np.sort(np.frombuffer(seconds, dtype=np.float64)) * 1000 if seconds else np.empty(0)


def _tensors(model: ModelInfo, rng: np.random.Generator, num_rows: int, lengths: list[int]) -> list[pb.Tensor]:
    tensors = []
    for tensor in model.inputs:
        shape = (num_rows, *tensor.row_shape)
        is_float = tensor.dtype.startswith("float")
        rows = rng.standard_normal(shape) if is_float else rng.integers(0, max(2, len(model.vocabulary)), shape)
        data = rows.astype(tensor.dtype).tobytes()
        tensors.append(pb.Tensor(name=tensor.name if len(model.inputs) > 1 else "", lengths=lengths, data=data))
    return tensors
