"""One StreamPredict call of the blocking kind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from service.client._base import translate
from service.client.errors import DeadlineExceeded, RnnserveError, Unavailable
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb


class Call:
    """Requests that wait to be written by gRPC's thread, and responses as they come."""

    def __init__(self, method: Callable[..., Any], metadata: tuple[tuple[str, str], ...], *, limit: int = 0) -> None:
        """Begin a call.

        limit  most requests that may wait; 0 lets any number
        """
        self._limit = limit
        self._requests: deque[pb.StreamPredictRequest] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._is_ending = False
        self._is_over = False
        self._call = method(self._outgoing(), metadata=metadata)
        if not self._call.add_callback(self._on_end):
            self._on_end()

    def write(self, request: pb.StreamPredictRequest, *, is_urgent: bool = False) -> None:
        """Have a request written. Waits while too many do, unless it is urgent. A dead call drops it."""
        with self._changed:
            while self._limit and not is_urgent and len(self._requests) >= self._limit and not self._is_over:
                self._changed.wait()
            self._requests.append(request)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will be written."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()

    def read(self) -> pb.StreamPredictResponse | None:
        """Wait for the next response; None is the end of a call that went well. Raises RnnserveError."""
        try:
            response: pb.StreamPredictResponse | None = next(self._call, None)
        except grpc.RpcError as error:
            raise translate(error) from None
        return response

    def cancel(self) -> None:
        """Break the call."""
        self._call.cancel()

    def _on_end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _outgoing(self) -> Iterator[pb.StreamPredictRequest]:
        while True:
            with self._changed:
                while not self._requests and not self._is_ending and not self._is_over:
                    self._changed.wait()
                if self._is_over or not self._requests:
                    return
                request = self._requests.popleft()
                self._changed.notify_all()
            yield request


def wait_opened(call: Call, timeout_s: float | None, take: Callable[[pb.StreamPredictResponse], bool]) -> None:
    """Read until `take` is content; the call is cancelled when that takes longer than allowed.

    Raises RnnserveError: DeadlineExceeded, Unavailable where the server ends the call instead, and what `take` raises.
    """
    timer = threading.Timer(timeout_s, call.cancel) if timeout_s is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        while (response := call.read()) is not None:
            if take(response):
                return
        raise Unavailable("the server ended the stream before it opened it")
    except RnnserveError as error:
        if timer is not None and error.code == "CANCELLED":
            raise DeadlineExceeded(f"the stream was not opened within {timeout_s:g} s") from None
        raise
    finally:
        if timer is not None:
            timer.cancel()
