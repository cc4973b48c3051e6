"""Many sessions on one stream, for threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy.typing as npt

from service.client import _codec
from service.client._columns import Events, GatewayMachine
from service.client._sync_call import Call, wait_opened
from service.client._terms import SequenceTerms
from service.client.errors import FailedPrecondition
from service.client.info import ModelInfo, Priority
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array


class Gateway:
    """Many live sessions, opened by `with client.gateway(...) as gateway`.

    Several threads may send, and one receives. Errors of sessions come in-band, as objects. Leaving the block ends the
    sessions, or detaches those that linger; an exception breaks the call. A gateway whose connection breaks does not
    come back by itself: open another one, and its sessions again by name.
    """

    def __init__(self, dial: Callable[[], Call], find_model: Callable[[int], ModelInfo], terms: SequenceTerms) -> None:
        """Prepare; `Client.gateway` does.

        dial        begins a StreamPredict call
        find_model  tells of a version of the model
        """
        self._dial = dial
        self._find_model = find_model
        self._terms = terms
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._line: tuple[Call, GatewayMachine] | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._line is not None:
            raise FailedPrecondition("a gateway is opened once")
        machine = GatewayMachine(self._find_model(self._terms.version), self._terms)
        call = self._dial()

        def take(response: pb.StreamPredictResponse) -> bool:
            machine.receive(response)
            return machine.is_open

        try:
            call.write(machine.open_request())
            wait_opened(call, self._terms.timeout_s, take)
            if machine.digest != machine.info.digest:  # the newest version has changed since it was asked for
                machine.info = self._find_model(machine.version)
        except BaseException:
            call.cancel()
            raise
        self._line = call, machine
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call, _ = self._open_line
        if kind is None:
            self.end()
            for _ in self.receive():
                pass
        call.cancel()

    def end(self) -> None:
        """Send nothing more: what was sent is answered, sessions end or are detached, then `receive` is at its end."""
        self.flush()
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

        Steps may be sent to the handle at once; the outcome comes as an event. Arguments are as for `Client.stream`.
        """
        machine = self._open_line[1]
        with self._lock:
            return machine.open(
                session_id,
                linger_s=linger,
                replay_window=replay_window,
                resume_only=resume_only,
                priority=priority,
                states=states,
                contexts=contexts,
            )

    def send(
        self, steps: Mapping[int, _codec.Steps], *, close: Iterable[int] = (), timeout: float | None = None
    ) -> None:
        """Send steps of some sessions in one frame; waits while the server does not keep up.

        A server stops to take steps from a client that leaves its answers unread: `receive` in another thread, or in
        between.

        steps    by handle: one step [*row_shape], or several [time, *row_shape]
        close    handles to close once their steps are answered
        timeout  seconds after which a step that has not begun to run is rejected
        Raises InvalidArgument; other faults come in-band, or from `receive`.
        """
        self._write(lambda machine: machine.send_each(steps, closes=close, timeout_s=timeout))

    def send_columns(
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
        self._write(lambda machine: machine.send(handles, steps, lengths, closes=close, timeout_s=timeout))

    def close(self, *handles: int) -> None:
        """Close sessions once their steps are answered."""
        self._write(lambda machine: machine.send((), {}, closes=handles))

    def flush(self) -> None:
        """Open at once what `open` noted."""
        self._write(lambda machine: machine.flush())

    def seek(self, handle: int, position: int) -> None:
        """Send a resumed session's next step to an earlier position, to have kept answers again.

        Raises FailedPrecondition while steps of the session are unanswered.
        """
        machine = self._open_line[1]
        with self._lock:
            machine.seek(handle, position)

    def receive(self) -> Iterator[Events]:
        """Yield events as they come, until the stream has ended. Raises RnnserveError when it breaks."""
        call, machine = self._open_line
        with self._lock:
            for request in machine.flush():
                call.write(request, is_urgent=True)
        while (response := call.read()) is not None:
            with self._lock:
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
        with self._lock:
            return machine.position(handle)

    def num_unanswered(self, handle: int) -> int:
        """Steps of a session that were sent and not answered."""
        machine = self._open_line[1]
        with self._lock:
            return machine.num_unanswered(handle)

    @property
    def _open_line(self) -> tuple[Call, GatewayMachine]:
        if self._line is None:
            raise FailedPrecondition("the gateway is not open: use `with client.gateway(...) as gateway`")
        return self._line

    def _write(self, make: Callable[[GatewayMachine], list[pb.StreamPredictRequest]]) -> None:
        """Write requests in the order in which they were made; `receive` goes on while they wait."""
        call, machine = self._open_line
        with self._sending:
            with self._lock:
                requests = make(machine)
            for request in requests:
                call.write(request)
