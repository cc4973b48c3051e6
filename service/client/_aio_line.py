"""One live sequence for asyncio: SequenceMachine, the calls that carry it, and the task that reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.client._aio_call import AsyncCall, Signal, wait_opened
from service.client._base import delays, not_resumed
from service.client._ledger import Outputs
from service.client._sequence import SequenceMachine, State
from service.client.errors import DeadlineExceeded, FailedPrecondition, RnnserveError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array


class AsyncLine:
    """A machine and its connection. A task that waits here may be cancelled: the session goes on."""

    def __init__(self, machine: SequenceMachine, dial: Callable[[], AsyncCall], resume_timeout_s: float) -> None:
        """Prepare; `connect` begins.

        dial  begins a StreamPredict call
        """
        self.machine = machine
        self.changed = Signal()
        """Notified when the machine has changed."""
        self._dial = dial
        self._resume_timeout_s = resume_timeout_s
        self._is_sending = False
        self._call: AsyncCall | None = None
        self._reader: asyncio.Task[None] | None = None

    async def send(self, chunk: dict[str, Array]) -> None:
        """Send a chunk, part by part as there is room."""
        machine = self.machine
        while self._is_sending:
            await self.changed.wait()
        send = machine.begin(len(next(iter(chunk.values()))))
        self._is_sending = True
        try:
            for part, is_last in machine.cut(chunk):
                length = len(next(iter(part.values())))
                while not machine.is_buffered and machine.room < length:
                    await self.changed.wait()
                self.write(machine.add(send, part, is_last=is_last))
        finally:
            machine.ledger.complete(send)
            self._is_sending = False
            self.changed.notify()

    def write(self, requests: list[pb.StreamPredictRequest]) -> None:
        """Write requests to the connection that there is."""
        if self._call is not None:
            for request in requests:
                self._call.write(request)

    async def wait_outcome(self) -> Outputs:
        """Wait until the next outcome is here."""
        machine = self.machine
        while not machine.is_ready:
            machine.check_due()
            await self.changed.wait()
        return machine.take()

    async def connect(self, timeout_s: float | None) -> None:
        """Open the session, and begin to read answers. Raises RnnserveError."""
        await self._open(timeout_s)
        self._reader = asyncio.create_task(self._read(), name="rnnserve-stream")

    async def leave(self, act: Callable[[], list[pb.StreamPredictRequest]]) -> None:
        """Close or detach, as `act` has the machine do, and wait until the server has ended the call."""
        machine = self.machine
        self.write(act())
        if self._call is not None:
            self._call.end()
        while machine.is_ending:
            await self.changed.wait()
        await self._stop()

    async def break_off(self) -> None:
        """Give the session up without waiting for the server."""
        self.machine.fail(FailedPrecondition("the stream was left by an exception"))
        await self._stop()

    async def _stop(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _open(self, timeout_s: float | None) -> None:
        machine = self.machine
        call = self._call = self._dial()

        def take(response: pb.StreamPredictResponse) -> bool:
            self.write(machine.receive(response))
            if machine.is_ending and machine.state is not State.CONNECTING:
                call.end()
            return machine.state is not State.CONNECTING

        try:
            self.write(machine.open_requests())
            async with asyncio.timeout(timeout_s):
                await wait_opened(call, take)
        except TimeoutError:
            call.cancel()
            raise DeadlineExceeded(f"the stream was not opened within {timeout_s:g} s") from None
        except BaseException:
            call.cancel()
            raise

    async def _read(self) -> None:
        """Feed the machine until the sequence is over."""
        machine = self.machine
        try:
            while machine.state is not State.OVER and self._call is not None:
                await self._read_one(self._call)
                self.changed.notify()
        finally:
            if machine.state is not State.OVER:
                machine.fail(FailedPrecondition("the stream's reader was stopped"))
            self.changed.notify()

    async def _read_one(self, call: AsyncCall) -> None:
        machine = self.machine
        error = None
        try:
            response = await call.read()
        except RnnserveError as failure:
            response, error = None, failure
        if response is None:
            if machine.end(error):
                await self._resume(error)
            return
        try:
            self.write(machine.receive(response))
        except RnnserveError as failure:
            machine.fail(failure)
            call.cancel()

    async def _resume(self, error: RnnserveError | None) -> None:
        """Connect again until the session is taken up, or the time for it is over."""
        machine = self.machine
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._resume_timeout_s
        for delay in delays():
            left_s = give_up_at - loop.time() - delay
            if left_s <= 0:
                break
            await asyncio.sleep(delay)
            if machine.state is State.OVER:
                return
            try:
                await self._open(left_s)
            except DeadlineExceeded:
                break
            except RnnserveError as failure:
                error = failure
                if not machine.end(failure):
                    return
            else:
                return
        machine.fail(not_resumed(error, self._resume_timeout_s))
