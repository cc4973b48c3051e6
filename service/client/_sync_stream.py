"""A live sequence for threads, as callers see it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from service.client import _codec
from service.client._base import whole_input
from service.client._ledger import Outputs
from service.client._sequence import SequenceMachine, State
from service.client._sync_call import Call
from service.client._sync_line import Line
from service.client._terms import SequenceTerms
from service.client.errors import FailedPrecondition
from service.client.info import ModelInfo
from service.tensors import Array


class Stream:
    """One live sequence, opened by `with client.stream(...) as stream`.

    One thread may send while another receives. Leaving the block ends the session, or detaches it if it lingers; an
    exception breaks the call. Arrays that come back are read-only views.
    """

    def __init__(
        self,
        dial: Callable[[], Call],
        find_model: Callable[[int], ModelInfo],
        terms: SequenceTerms,
        resume_timeout_s: float,
    ) -> None:
        """Prepare; `Client.stream` does.

        dial        begins a StreamPredict call
        find_model  tells of a version of the model
        """
        self._dial = dial
        self._find_model = find_model
        self._terms = terms
        self._resume_timeout_s = resume_timeout_s
        self._opened_line: Line | None = None

    # ---- life -------------------------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Connect and open the session. Raises RnnserveError, FailedPrecondition if it was opened before."""
        if self._opened_line is not None:
            raise FailedPrecondition("a stream is opened once")
        machine = SequenceMachine(self._find_model(self._terms.version), self._terms)
        line = Line(machine, self._dial, self._resume_timeout_s)
        line.connect(self._terms.timeout_s)
        if machine.digest != machine.info.digest:  # the newest version has changed since it was asked for
            machine.info = self._find_model(machine.version)
        self._opened_line = line
        return self

    def close(self) -> None:
        """End the session for good, and wait for what is still to be answered. `receive` then gives it."""
        self._line.leave(self._machine.close)

    def detach(self) -> None:
        """Leave the session to linger, so that another stream can resume it."""

        def leave() -> list[Any]:
            self._machine.detach()
            return []

        self._line.leave(leave)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._line.break_off()
        elif self._terms.linger_s > 0:
            self.detach()
        else:
            self.close()

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

    def step(self, x: _codec.Steps) -> Array:
        """Send one step and wait for its output.

        x  [*row_shape], or by name of input
        Returns the first output's row. Raises StepRejected, SessionFailed, FailedPrecondition for a model that needs
        the whole sequence or while earlier answers were not received, or another RnnserveError.
        """
        machine = self._machine
        chunk = _codec.step_of(machine.info, x)
        machine.check_steppable()
        with self._line.changed:
            self._line.send(chunk)
            outputs = self._line.wait_outcome()
        return next(machine.rows(outputs))[machine.first_output]

    def send(self, chunk: _codec.Steps) -> None:
        """Send steps; `receive` gives their outputs. Waits while too many steps are unanswered.

        chunk  [time, *row_shape], or by name of input
        Raises InvalidArgument, and what ended the stream.
        """
        steps = _codec.chunk_of(self._machine.info, chunk)
        with self._line.changed:
            self._line.send(steps)

    def receive(self) -> Array:
        """Wait for the first output of the next send: [time, ...], or one row [...] per sequence or under "last".

        Raises StepRejected if its steps were not applied, FailedPrecondition if no answer is due, and what ended the
        stream.
        """
        return self.receive_outputs()[self._machine.first_output]

    def receive_outputs(self) -> Outputs:
        """Wait for all outputs of the next send, by name, as `receive` does."""
        with self._line.changed:
            return self._line.wait_outcome()

    def run(self, steps: Iterable[_codec.Steps] | _codec.Steps) -> Iterator[Array]:
        """Send steps as they come, and yield the first output of each, in order.

        steps  an array [time, *row_shape], or an iterable of steps, which a thread reads so that an output is yielded
               as soon as it is there; up to 512 steps are under way at a time
        A buffered model is sent everything and then closed; its outputs come after the end. Raises as `step` does; what
        was under way when the loop is left is dropped.
        """
        first = self._machine.first_output
        for outputs in self.run_outputs(steps):
            yield outputs[first]

    def run_outputs(self, steps: Iterable[_codec.Steps] | _codec.Steps) -> Iterator[Outputs]:
        """Do as `run`, and yield all outputs by name."""
        machine = self._machine
        chunk = whole_input(machine.info, steps)
        outcomes = self._run_iterable(steps) if chunk is None else self._run_chunk(chunk)
        for outputs in outcomes:
            yield from machine.rows(outputs)

    # ---- within -----------------------------------------------------------------------------------------------------

    @property
    def _line(self) -> Line:
        if self._opened_line is None:
            raise FailedPrecondition("the stream is not open: use `with client.stream(...) as stream`")
        return self._opened_line

    @property
    def _machine(self) -> SequenceMachine:
        return self._line.machine

    def _run_chunk(self, chunk: dict[str, Array]) -> Iterator[Outputs]:
        machine, ledger = self._machine, self._machine.ledger
        size = machine.run_chunk
        num_steps = len(next(iter(chunk.values())))
        starts = [0] if machine.is_buffered else range(0, num_steps, size)
        try:
            for start in starts:
                part = {name: array[start : start + size] for name, array in chunk.items()}
                with self._line.changed:
                    if machine.is_buffered:
                        self._line.send(chunk)
                        break
                    while machine.run_room < min(size, num_steps - start):
                        self._line.pump()
                    if ledger.is_rewound or machine.state is State.OVER:
                        break
                    self._line.send(part)
                yield from self._ready()
            yield from self._rest()
        finally:
            with self._line.changed:
                ledger.discard()

    def _run_iterable(self, steps: Any) -> Iterator[Outputs]:
        machine = self._machine
        feed = _Feed()
        work = contextvars.copy_context().run
        threading.Thread(target=work, args=(self._feed, steps, feed), name="rnnserve-steps", daemon=True).start()
        try:
            while True:
                with self._line.changed:
                    while not machine.is_ready and not feed.is_done:
                        if machine.ledger.is_awaiting and not machine.is_buffered:
                            self._line.pump()
                        else:
                            self._line.changed.wait()
                    if not machine.is_ready:
                        break
                    outputs = machine.take()
                yield outputs
            if feed.failure is None or not machine.is_buffered:
                yield from self._rest()
            if feed.failure is not None:
                raise feed.failure
        finally:
            with self._line.changed:
                feed.is_stopped = True
                machine.ledger.discard()
                self._line.changed.notify_all()

    def _feed(self, steps: Any, feed: _Feed) -> None:
        """Read steps and send them; a buffered model's all in one send, so that they have one outcome."""
        machine = self._machine
        try:
            whole = None
            for step in steps:
                chunk = _codec.step_of(machine.info, step)
                with self._line.changed:
                    while not machine.is_buffered and machine.run_room < 1 and not feed.is_stopped:
                        self._line.changed.wait()
                    if feed.is_stopped or machine.state is State.OVER or machine.ledger.is_rewound:
                        return
                    if machine.is_buffered:
                        whole = whole or machine.begin()
                        self._line.write(machine.add(whole, chunk, is_last=False))
                    else:
                        self._line.send(chunk)
                    self._line.changed.notify_all()
            if whole is not None:
                with self._line.changed:
                    machine.ledger.complete(whole)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that runs the loop gets it
            feed.failure = error
        finally:
            with self._line.changed:
                feed.is_done = True
                self._line.changed.notify_all()

    def _ready(self) -> Iterator[Outputs]:
        """Outcomes that are here."""
        while True:
            with self._line.changed:
                if not self._machine.ledger.has_outcome:
                    return
                outputs = self._machine.take()
            yield outputs

    def _rest(self) -> Iterator[Outputs]:
        """Outcomes of all that was sent, the end of the sequence included if the model needs it."""
        machine = self._machine
        if machine.is_buffered and machine.ledger.is_awaiting:
            self.close()
        while True:
            with self._line.changed:
                while machine.ledger.is_awaiting and not machine.is_ready:
                    self._line.pump()
                if not machine.is_ready:
                    return
                outputs = machine.take()
            yield outputs


class _Feed:
    """What the thread that reads steps tells the one that yields outputs, and the other way round."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.is_done = False
        self.failure: BaseException | None = None
