"""One live sequence for threads: SequenceMachine behind a lock, and the calls that carry it.

Whoever needs an answer reads the call, one thread at a time, and feeds the machine; the others wait for it to change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.client._base import delays, not_resumed
from service.client._ledger import Outputs
from service.client._sequence import SequenceMachine, State
from service.client._sync_call import Call, wait_opened
from service.client.errors import DeadlineExceeded, FailedPrecondition, RnnserveError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array


class Line:
    """A machine and its connection. Methods that say so want `changed` held."""

    def __init__(self, machine: SequenceMachine, dial: Callable[[], Call], resume_timeout_s: float) -> None:
        """Prepare; `connect` begins.

        dial  begins a StreamPredict call
        """
        self.machine = machine
        self.changed = threading.Condition(threading.Lock())
        """Guards the machine; notified when it has changed."""
        self._dial = dial
        self._resume_timeout_s = resume_timeout_s
        self._is_reading = False
        self._is_sending = False
        self._is_left = threading.Event()
        self._call: Call | None = None

    def send(self, chunk: dict[str, Array]) -> None:
        """Send a chunk, part by part as there is room. The lock is held."""
        machine = self.machine
        while self._is_sending:
            self.changed.wait()
        send = machine.begin(len(next(iter(chunk.values()))))
        self._is_sending = True
        try:
            for part, is_last in machine.cut(chunk):
                length = len(next(iter(part.values())))
                while not machine.is_buffered and machine.room < length:
                    self.pump()
                self.write(machine.add(send, part, is_last=is_last))
        finally:
            machine.ledger.complete(send)
            self._is_sending = False
            self.changed.notify_all()

    def write(self, requests: list[pb.StreamPredictRequest]) -> None:
        """Write requests to the connection that there is. The lock is held."""
        if self._call is not None:
            for request in requests:
                self._call.write(request)

    def wait_outcome(self) -> Outputs:
        """Read until the next outcome is here. The lock is held."""
        machine = self.machine
        while not machine.is_ready:
            machine.check_due()
            self.pump()
        return machine.take()

    # ---- reading ----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Take one response, or wait while another thread does. The lock is held, but not meanwhile."""
        if self._is_reading:
            self.changed.wait()
            return
        self._is_reading = True
        self.changed.release()
        try:
            self._read()
        finally:
            self.changed.acquire()
            self._is_reading = False
            self.changed.notify_all()

    def _read(self) -> None:
        machine, call = self.machine, self._call
        if call is None:
            return
        error = None
        try:
            response = call.read()
        except RnnserveError as failure:
            response, error = None, failure
        with self.changed:
            if response is None:
                is_lost = machine.end(error)
            else:
                is_lost = False
                try:
                    self.write(machine.receive(response))
                except RnnserveError as failure:
                    machine.fail(failure)
                    call.cancel()
        if is_lost:
            self._resume(error)

    def connect(self, timeout_s: float | None) -> None:
        """Begin a call and open the session on it, for the first time or again. Raises RnnserveError."""
        machine = self.machine
        call = self._dial()

        def take(response: pb.StreamPredictResponse) -> bool:
            with self.changed:
                self.write(machine.receive(response))
                if machine.is_ending and machine.state is not State.CONNECTING:
                    call.end()
                return machine.state is not State.CONNECTING

        try:
            with self.changed:
                self._call = call
                self.write(machine.open_requests())
            wait_opened(call, timeout_s, take)
        except BaseException:
            call.cancel()
            raise

    def leave(self, act: Callable[[], list[pb.StreamPredictRequest]]) -> None:
        """Close or detach, as `act` has the machine do, and wait until the server has ended the call."""
        machine = self.machine
        with self.changed:
            self.write(act())
            if machine.state is State.OVER:
                self._is_left.set()
            if self._call is not None:
                self._call.end()
            while machine.is_ending:
                self.pump()
            if self._call is not None:
                self._call.cancel()

    def break_off(self) -> None:
        """Give the session up without waiting for anything."""
        self._is_left.set()
        with self.changed:
            self.machine.fail(FailedPrecondition("the stream was left by an exception"))
            if self._call is not None:
                self._call.cancel()

    def _resume(self, error: RnnserveError | None) -> None:
        """Connect again until the session is taken up, or the time for it is over."""
        machine = self.machine
        give_up_at = time.monotonic() + self._resume_timeout_s
        for delay in delays():
            left_s = give_up_at - time.monotonic() - delay
            if left_s <= 0:
                break
            if self._is_left.wait(delay):
                return
            try:
                self.connect(left_s)
            except DeadlineExceeded:
                break
            except RnnserveError as failure:
                error = failure
                with self.changed:
                    if not machine.end(failure):
                        return
            else:
                return
        with self.changed:
            machine.fail(not_resumed(error, self._resume_timeout_s))
