"""Many sessions on one stream, for asyncio."""

# ruff: noqa: ASYNC109 - a timeout is that of steps at the server

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy.typing as npt

from service.client import _codec
from service.client._aio_call import AsyncCall, wait_opened
from service.client._columns import Events, GatewayMachine
from service.client._terms import SequenceTerms
from service.client.errors import DeadlineExceeded, FailedPrecondition
from service.client.info import ModelInfo, Priority
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array


class AsyncGateway:
    """Many live sessions, opened by `async with client.gateway(...) as gateway`.

    Several tasks may send, and one receives. Errors of sessions come in-band, as objects. Leaving the block ends the
    sessions, or detaches those that linger; an exception breaks the call. A gateway whose connection breaks does not
    come back by itself: open another one, and its sessions again by name.
    """

    def __init__(
        self, dial: Callable[[], AsyncCall], find_model: Callable[[int], Awaitable[ModelInfo]], terms: SequenceTerms
    ) -> None:
        """Prepare; `AsyncClient.gateway` does.

        dial        begins a StreamPredict call
        find_model  tells of a version of the model
        """
        self._dial = dial
        self._find_model = find_model
        self._terms = terms
        self._sending = asyncio.Lock()
        self._reading: asyncio.Task[pb.StreamPredictResponse | None] | None = None
        self._line: tuple[AsyncCall, GatewayMachine] | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._line is not None:
            raise FailedPrecondition("a gateway is opened once")
        machine = GatewayMachine(await self._find_model(self._terms.version), self._terms)
        call = self._dial()

        def take(response: pb.StreamPredictResponse) -> bool:
            machine.receive(response)
            return machine.is_open

        try:
            call.write(machine.open_request())
            async with asyncio.timeout(self._terms.timeout_s):
                await wait_opened(call, take)
            if machine.digest != machine.info.digest:  # the newest version has changed since it was asked for
                machine.info = await self._find_model(machine.version)
        except TimeoutError:
            call.cancel()
            raise DeadlineExceeded(f"the stream was not opened within {self._terms.timeout_s:g} s") from None
        except BaseException:
            call.cancel()
            raise
        self._line = call, machine
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call, _ = self._open_line
        if kind is None:
            await self.end()
            async for _ in self.receive():
                pass
        call.cancel()
        if self._reading is not None:
            await asyncio.wait([self._reading])
            self._reading.cancelled() or self._reading.exception()

    async def end(self) -> None:
        """Send nothing more: what was sent is answered, sessions end or are detached, then `receive` is at its end."""
        await self.flush()
        self._open_line[0].end()

    # ---- sessions and steps -----------------------------------------------------------------------------------------

    def open(
        self,
        session_id: str = "",
        *,
        linger: float = 0.0,
        replay_window: int = 0,
        resume_only: bool = False,
        priority: Priority = "normal",
        states: Mapping[str, npt.ArrayLike] | None = None,
        contexts: Mapping[str, npt.ArrayLike] | None = None,
    ) -> int:
        """Open a session with the next `send` or `flush`, and return its handle.

        Steps may be sent to the handle at once; the outcome comes as an event. Arguments as for `AsyncClient.stream`.
        """
        machine = self._open_line[1]
        return machine.open(
            session_id,
            linger_s=linger,
            replay_window=replay_window,
            resume_only=resume_only,
            priority=priority,
            states=states,
            contexts=contexts,
        )

    async def send(
        self, steps: Mapping[int, _codec.Steps], *, close: Iterable[int] = (), timeout: float | None = None
    ) -> None:
        """Send steps of some sessions in one frame; waits while the server does not keep up.

        A server stops to take steps from a client that leaves its answers unread: `receive` in another task, or in
        between.

        steps    by handle: one step [*row_shape], or several [time, *row_shape]
        close    handles to close once their steps are answered
        timeout  seconds after which a step that has not begun to run is rejected
        Raises InvalidArgument; other faults come in-band, or from `receive`.
        """
        await self._write(lambda machine: machine.send_each(steps, closes=close, timeout_s=timeout))

    async def send_columns(
        self,
        handles: Sequence[int] | Array,
        steps: _codec.Steps,
        lengths: Sequence[int] | Array | None = None,
        *,
        close: Iterable[int] = (),
        timeout: float | None = None,
    ) -> None:
        """Do as `send`, with columns.

        handles  [entries], each at most once
        steps    [sum(lengths), *row_shape], or by name of input
        lengths  [entries]; None is one step each
        """
        await self._write(lambda machine: machine.send(handles, steps, lengths, closes=close, timeout_s=timeout))

    async def close(self, *handles: int) -> None:
        """Close sessions once their steps are answered."""
        await self._write(lambda machine: machine.send((), {}, closes=handles))

    async def flush(self) -> None:
        """Open at once what `open` noted."""
        await self._write(lambda machine: machine.flush())

    def seek(self, handle: int, position: int) -> None:
        """Send a resumed session's next step to an earlier position, to have kept answers again.

        Raises FailedPrecondition while steps of the session are unanswered.
        """
        machine = self._open_line[1]
        machine.seek(handle, position)

    async def receive(self) -> AsyncIterator[Events]:
        """Yield events as they come, until the stream has ended. Raises RnnserveError when it breaks."""
        call, machine = self._open_line
        for request in machine.flush():
            call.write(request)
        while (response := await self._read(call)) is not None:
            events = machine.receive(response)
            if events is not None:
                yield events

    # ---- facts ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        """The model version that answers."""
        return self._open_line[1].info

    @property
    def version(self) -> int:
        """Its version."""
        return self._open_line[1].version

    @property
    def max_inflight_steps(self) -> int:
        """Most steps that one session may have unanswered; more are rejected."""
        return self._open_line[1].max_inflight_steps

    def position(self, handle: int) -> int:
        """Position of a session's next step."""
        machine = self._open_line[1]
        return machine.position(handle)

    def num_unanswered(self, handle: int) -> int:
        """Steps of a session that were sent and not answered."""
        machine = self._open_line[1]
        return machine.num_unanswered(handle)

    @property
    def _open_line(self) -> tuple[AsyncCall, GatewayMachine]:
        if self._line is None:
            raise FailedPrecondition("the gateway is not open: use `async with client.gateway(...) as gateway`")
        return self._line

    async def _read(self, call: AsyncCall) -> pb.StreamPredictResponse | None:
        """Read in a task of its own: if the one that waits is cancelled, the next gets the response."""
        if self._reading is None:
            self._reading = asyncio.create_task(call.read(), name="rnnserve-gateway")
        await asyncio.wait([self._reading])
        reading, self._reading = self._reading, None
        return reading.result()

    async def _write(self, make: Callable[[GatewayMachine], list[pb.StreamPredictRequest]]) -> None:
        """Write requests in the order in which they were made; `receive` goes on while they wait."""
        call, machine = self._open_line
        async with self._sending:
            await call.has_room()
            for request in make(machine):
                call.write(request)
