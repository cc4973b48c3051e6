"""A live sequence for asyncio, as callers see it."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from service.client import _codec
from service.client._aio_call import AsyncCall
from service.client._aio_line import AsyncLine
from service.client._base import whole_input
from service.client._ledger import Outputs
from service.client._sequence import SequenceMachine, State
from service.client._terms import SequenceTerms
from service.client.errors import FailedPrecondition
from service.client.info import ModelInfo
from service.tensors import Array

T = TypeVar("T")
StepSource = AsyncIterable[_codec.Steps] | Iterable[_codec.Steps] | _codec.Steps


class AsyncStream:
    """One live sequence, opened by `async with client.stream(...) as stream`.

    One task may send while another receives; a task that is cancelled while it waits leaves the session as it is.
    Leaving the block ends the session, or detaches it if it lingers; an exception breaks the call. Arrays that come
    back are read-only views.
    """

    def __init__(
        self,
        dial: Callable[[], AsyncCall],
        find_model: Callable[[int], Awaitable[ModelInfo]],
        terms: SequenceTerms,
        resume_timeout_s: float,
    ) -> None:
        """Prepare; `AsyncClient.stream` does.

        dial        begins a StreamPredict call
        find_model  tells of a version of the model
        """
        self._dial = dial
        self._find_model = find_model
        self._terms = terms
        self._resume_timeout_s = resume_timeout_s
        self._opened_line: AsyncLine | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect and open the session. Raises RnnserveError, FailedPrecondition if it was opened before."""
        if self._opened_line is not None:
            raise FailedPrecondition("a stream is opened once")
        machine = SequenceMachine(await self._find_model(self._terms.version), self._terms)
        line = AsyncLine(machine, self._dial, self._resume_timeout_s)
        await line.connect(self._terms.timeout_s)
        self._opened_line = line
        if machine.digest != machine.info.digest:  # the newest version has changed since it was asked for
            machine.info = await self._find_model(machine.version)
        return self

    async def close(self) -> None:
        """End the session for good, and wait for what is still to be answered. `receive` then gives it."""
        await self._line.leave(self._machine.close)

    async def detach(self) -> None:
        """Leave the session to linger, so that another stream can resume it."""

        def leave() -> list[Any]:
            self._machine.detach()
            return []

        await self._line.leave(leave)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            await self._line.break_off()
        elif self._terms.linger_s > 0:
            await self.detach()
        else:
            await self.close()

    # ---- facts ------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Position of the next step to send, counted from 0 at the session's beginning."""
        return self._machine.ledger.position

    @property
    def model(self) -> ModelInfo:
        """The model version that answers."""
        return self._machine.info

    @property
    def version(self) -> int:
        """Its version."""
        return self._machine.version

    @property
    def step_mode(self) -> str:
        """How the model is driven: "stepping", or "buffered" if outputs come only when the sequence has ended."""
        return self._machine.step_mode

    @property
    def max_inflight_steps(self) -> int:
        """Most steps that may be unanswered; what is more waits."""
        return self._machine.max_inflight_steps

    @property
    def resumed(self) -> bool:
        """Whether the session was live before this stream opened it."""
        return self._machine.is_resumed

    @property
    def drain_s(self) -> float | None:
        """Time that was left when the server said that it, or this version, ends; infinity for no limit, or None."""
        return self._machine.drain_s

    # ---- steps ------------------------------------------------------------------------------------------------------

    async def step(self, x: _codec.Steps) -> Array:
        """Send one step and wait for its output.

        x  [*row_shape], or by name of input
        Returns the first output's row. Raises StepRejected, SessionFailed, FailedPrecondition for a model that needs
        the whole sequence or while earlier answers were not received, or another RnnserveError.
        """
        machine = self._machine
        chunk = _codec.step_of(machine.info, x)
        machine.check_steppable()
        await self._line.send(chunk)
        outputs = await self._line.wait_outcome()
        return next(machine.rows(outputs))[machine.first_output]

    async def send(self, chunk: _codec.Steps) -> None:
        """Send steps; `receive` gives their outputs. Waits while too many steps are unanswered.

        chunk  [time, *row_shape], or by name of input
        Raises InvalidArgument, and what ended the stream.
        """
        await self._line.send(_codec.chunk_of(self._machine.info, chunk))

    async def receive(self) -> Array:
        """Wait for the first output of the next send: [time, ...], or one row [...] per sequence or under "last".

        Raises StepRejected if its steps were not applied, FailedPrecondition if no answer is due, and what ended the
        stream.
        """
        return (await self.receive_outputs())[self._machine.first_output]

    async def receive_outputs(self) -> Outputs:
        """Wait for all outputs of the next send, by name, as `receive` does."""
        return await self._line.wait_outcome()

    def run(self, steps: StepSource) -> AsyncRun[Array]:
        """Send steps as they come, and yield the first output of each, in order.

        steps  an array [time, *row_shape], or an iterable of steps, async, or plain if it never waits; up to 512 are
               under way at a time
        A buffered model is sent everything and then closed; its outputs come after the end. Raises as `step` does; what
        was under way when the loop is left is dropped.
        """
        first = self._machine.first_output
        return AsyncRun(self._line, steps, lambda outputs: outputs[first])

    def run_outputs(self, steps: StepSource) -> AsyncRun[Outputs]:
        """Do as `run`, and yield all outputs by name."""
        return AsyncRun(self._line, steps, lambda outputs: outputs)

    @property
    def _line(self) -> AsyncLine:
        if self._opened_line is None:
            raise FailedPrecondition("the stream is not open: use `async with client.stream(...) as stream`")
        return self._opened_line

    @property
    def _machine(self) -> SequenceMachine:
        return self._line.machine


class AsyncRun(AsyncIterator[T], Generic[T]):
    """Outputs of `run`, one a timestep.

    No async generator: one that a loop has left lives on, and its steps with it, until the event loop finds it.
    """

    def __init__(self, line: AsyncLine, steps: StepSource, pick: Callable[[Outputs], T]) -> None:
        self._line = line
        self._steps: StepSource | None = steps
        self._pick = pick
        self._rows: deque[Outputs] = deque()
        self._feeder: asyncio.Task[None] | None = None
        self._abandon: Callable[[], object] = lambda: None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._rows:
            try:
                outcome = await self._next_outcome()
            except Exception:  # its traceback may keep this object alive
                self._abandon()
                raise
            self._rows.extend(self._line.machine.rows(outcome))
        return self._pick(self._rows.popleft())

    async def aclose(self) -> None:
        """Leave the run: what is under way is dropped."""
        self._abandon()

    async def _next_outcome(self) -> Outputs:
        line, machine = self._line, self._line.machine
        if self._feeder is None:
            self._feeder = asyncio.create_task(_feed(line, self._steps), name="rnnserve-steps")
            self._feeder.add_done_callback(lambda _: line.changed.notify())
            self._steps = None
            finalizer = weakref.finalize(self, _abandon, line, self._feeder)
            finalizer.atexit = False
            self._abandon = finalizer
        while not machine.is_ready and not self._feeder.done():
            await line.changed.wait()
        if machine.is_ready:
            return machine.take()
        if machine.is_buffered and machine.ledger.is_awaiting and not self._feeder.exception():
            await line.leave(machine.close)
        while machine.ledger.is_awaiting and not machine.is_ready and (machine.is_ending or not machine.is_buffered):
            await line.changed.wait()
        if machine.is_ready:
            return machine.take()
        self._feeder.result()  # raises what the steps raised
        raise StopAsyncIteration


def _abandon(line: AsyncLine, feeder: asyncio.Task[None]) -> None:
    """The loop was left: send nothing more, and drop what comes."""
    if not feeder.done() and not feeder.get_loop().is_closed():
        feeder.cancel()
    elif not feeder.cancelled():
        feeder.exception()  # seen: asyncio need not complain
    line.machine.ledger.discard()


async def _feed(line: AsyncLine, steps: Any) -> None:
    """Read steps and send them; a buffered model's all in one send, so that they have one outcome."""
    machine = line.machine
    whole = machine.begin() if machine.is_buffered else None
    try:
        async for chunk in _chunks(machine, steps):
            length = len(next(iter(chunk.values())))
            while not machine.is_buffered and machine.run_room < length:
                await line.changed.wait()
            if machine.state is State.OVER or machine.ledger.is_rewound:
                return
            if whole is None:
                await line.send(chunk)
            else:
                line.write(machine.add(whole, chunk, is_last=False))
    finally:
        if whole is not None:
            machine.ledger.complete(whole)


async def _chunks(machine: SequenceMachine, steps: Any) -> AsyncIterator[dict[str, Array]]:
    """Cut what is at hand into chunks; read what comes step by step."""
    chunk = whole_input(machine.info, steps)
    if chunk is not None:
        size = machine.run_chunk
        for start in range(0, len(next(iter(chunk.values()))), size):
            yield {name: array[start : start + size] for name, array in chunk.items()}
    elif isinstance(steps, AsyncIterable):
        async for step in steps:
            yield _codec.step_of(machine.info, step)
    else:
        for step in steps:
            yield _codec.step_of(machine.info, step)
