"""One StreamPredict call of the asyncio kind.

gRPC breaks a call when a task that writes to it or reads from it is cancelled, so neither is left to callers' tasks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from service.client._base import translate
from service.client.errors import Unavailable
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

WRITE_FAILED = "Internal error from Core"
"""What grpc.aio says in place of a call's status when a write meets its end (grpc/grpc issue 36066)."""


class AsyncCall:
    """Requests that wait to be written by gRPC's task, and responses as they come."""

    def __init__(self, method: Callable[..., Any], metadata: tuple[tuple[str, str], ...], *, limit: int = 0) -> None:
        """Begin a call.

        limit  most requests that `has_room` lets wait; 0 lets any number
        """
        self._limit = limit
        self._requests: deque[pb.StreamPredictRequest] = deque()
        self._changed = Signal()
        self._is_ending = False
        self._is_over = False
        self._call = method(self._outgoing(), metadata=metadata)
        self._call.add_done_callback(self._on_end)

    def write(self, request: pb.StreamPredictRequest) -> None:
        """Have a request written. What is written to a dead call is dropped."""
        self._requests.append(request)
        self._changed.notify()

    async def has_room(self) -> None:
        """Wait while too many requests wait to be written."""
        while self._limit and len(self._requests) >= self._limit and not self._is_over:
            await self._changed.wait()

    def end(self) -> None:
        """Nothing more will be written."""
        self._is_ending = True
        self._changed.notify()

    async def read(self) -> pb.StreamPredictResponse | None:
        """Wait for the next response; None is the end of a call that went well. Raises RnnserveError."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INTERNAL and error.details() == WRITE_FAILED:
                raise Unavailable("the call broke while a request was being written") from None
            raise translate(error) from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _is_cancelling():
                raise Unavailable("the call was cancelled", code="CANCELLED") from None
            raise
        return None if response is grpc.aio.EOF else response

    def cancel(self) -> None:
        """Break the call."""
        self._call.cancel()

    def _on_end(self, call: Any) -> None:  # noqa: ARG002 - gRPC passes it
        self._is_over = True
        self._changed.notify()

    async def _outgoing(self) -> AsyncIterator[pb.StreamPredictRequest]:
        while not self._is_over:
            if self._requests:
                yield self._requests.popleft()
                self._changed.notify()
            elif self._is_ending:
                return
            else:
                await self._changed.wait()


class Signal:
    """Wakes whoever waits, as a condition does; without a lock, since tasks change only where they await."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def notify(self) -> None:
        """Wake everyone."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


async def wait_opened(call: AsyncCall, take: Callable[[pb.StreamPredictResponse], bool]) -> None:
    """Read until `take` is content. Raises RnnserveError, Unavailable too where the server ends the call instead."""
    while (response := await call.read()) is not None:
        if take(response):
            return
    raise Unavailable("the server ended the stream before it opened it")


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
