r"""One live sequence over one or more connections, as a state machine without I/O.

A shell writes the requests it is given, feeds it the responses that come, and hands its outcomes to the caller:

    CONNECTING --opened--> OPEN --close, detach--> ENDING --closed or end of the call--> OVER
         ^                  |                                                             ^
         \-- resume -- LOST <-- connection lost, session lingers (ENDING: and answers due) |
                        any state -- refused, failed, expired, taken over, lost ----------/

Laws:

    the output of every applied step reaches the caller once, in the order of steps, whatever connections did
    a send has one outcome: its outputs, or the outputs of its first steps (if any were applied) and a rejection
    no more steps are unanswered than the server allows, nor, if the session resumes, than it keeps answers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum, auto

from service.client import _codec
from service.client._answers import read_entries
from service.client._ledger import Ledger, Outputs, Send, Span
from service.client._status import close_reason, from_status, is_connection_loss, step_error
from service.client._terms import SequenceTerms, drain_s_of, duration
from service.client.errors import (
    FailedPrecondition,
    ProtocolError,
    ResourceExhausted,
    RnnserveError,
    SessionEnded,
    SessionFailed,
    error_for,
)
from service.client.info import ModelInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array

HANDLE = 0
"""Number of the only session on its stream."""
MAX_FRAME_STEPS = 1024
"""Most steps that one frame carries: long input is cut, so that its first outputs come early."""
MAX_FRAME_BYTES = 1 << 20
"""Most bytes of input that one frame carries, if it has more than one step."""
RUN_CHUNK_STEPS = 32
"""Most steps that `run` puts into one frame when it has them all at hand."""
RUN_WINDOW_STEPS = 512
"""Most steps that `run` leaves unanswered."""

_CLOSE = pb.StreamPredictRequest(frame=pb.StreamFrame(closes=[HANDLE]))


class State(Enum):
    """Where the sequence stands."""

    CONNECTING = auto()
    OPEN = auto()
    ENDING = auto()
    LOST = auto()
    OVER = auto()


class SequenceMachine:
    """One live sequence. Not safe for threads: a shell lets one at a time in."""

    def __init__(self, info: ModelInfo, terms: SequenceTerms) -> None:
        self.info = info
        self.terms = terms
        self.state = State.CONNECTING
        self.version = info.version
        self.digest = info.digest
        self.step_mode = info.step_mode
        self.max_inflight_steps = info.max_inflight_steps
        self.is_resumed = False
        """Whether the session was live before this stream opened it."""
        self.drain_s: float | None = None
        """Time left once the server has said that it ends what is open; infinity where it sets none."""
        self.ledger = Ledger()
        self._was_open = False
        self._is_leaving = False
        self._is_closing = False
        self._fault: RnnserveError | None = None

    # ---- facts ------------------------------------------------------------------------------------------------------

    @property
    def is_buffered(self) -> bool:
        """Whether outputs come only when the sequence has ended."""
        return self.step_mode == "buffered"

    @property
    def is_owed(self) -> bool:
        """Whether answers are due. Those of a buffered model are only once it is closed."""
        return self.ledger.num_unanswered > 0 and (self._is_closing or not self.is_buffered)

    @property
    def is_ending(self) -> bool:
        """Whether it was closed or detached, and the server has yet to end the call."""
        return self._is_leaving and self.state is not State.OVER

    @property
    def is_ready(self) -> bool:
        """Whether `take` gives or raises something now."""
        return self.ledger.has_outcome or self._fault is not None

    @property
    def first_output(self) -> str:
        """Name of the output that stands for all where one is wanted."""
        return self.terms.outputs[0] if self.terms.outputs else self.info.outputs[0].name

    @property
    def window(self) -> int:
        """Most steps that may be unanswered."""
        if self.terms.is_resumable and self.terms.replay_window and not self.is_buffered:
            return min(self.max_inflight_steps, self.terms.replay_window)
        return self.max_inflight_steps

    @property
    def room(self) -> int:
        """Steps that may be sent now."""
        return self.window - self.ledger.num_unanswered

    @property
    def run_room(self) -> int:
        """Steps that `run` may send now."""
        return self.room if self.is_buffered else min(self.window, RUN_WINDOW_STEPS) - self.ledger.num_unanswered

    @property
    def run_chunk(self) -> int:
        """Steps that one send of `run` may hold, so that every step has its output."""
        has_rows = self.is_buffered or self.is_per_step(self.first_output)
        return max(1, min(RUN_CHUNK_STEPS, self.window // 2)) if has_rows else 1

    def is_per_step(self, name: str) -> bool:
        """Whether an output has a row for every step of a send."""
        info = self.info.output(name)
        return self.terms.emit == "all" and (info is None or info.layout == "per_step")

    def rows(self, outputs: Outputs) -> Iterator[Outputs]:
        """Cut an outcome into its timesteps; it is one row where the first output has one row for all of it."""
        if not self.is_per_step(self.first_output):
            yield outputs
            return
        per_step = {name for name in outputs if self.is_per_step(name)}
        for i in range(len(outputs[self.first_output])):
            yield {name: array[i] if name in per_step else array for name, array in outputs.items()}

    def check_steppable(self) -> None:
        """Raise FailedPrecondition where one step can't have one answer now."""
        if self.is_buffered:
            raise FailedPrecondition(
                f"model {self.info.name} can't be stepped: {self.info.step_mode_reason}; use run(), or send(), close() "
                "and receive()",
                reason="NOT_STEPPABLE",
            )
        if self.ledger.num_pending:
            raise FailedPrecondition(f"{self.ledger.num_pending} sends have answers to receive first")

    def check_due(self) -> None:
        """Raise FailedPrecondition where waiting for an answer is in vain."""
        if not self.ledger.is_awaiting:
            raise FailedPrecondition("no answer is due: send steps first")
        if self.is_buffered and not self._is_leaving:
            raise FailedPrecondition(f"the outputs of model {self.info.name} come when the sequence has ended: close()")

    # ---- requests ---------------------------------------------------------------------------------------------------

    def open_requests(self) -> list[pb.StreamPredictRequest]:
        """Begin on a new connection: the first, or the next after one was lost."""
        self.state = State.CONNECTING
        return self.terms.open_requests(self.info, resume_version=self.version if self._was_open else 0)

    def begin(self, num_steps: int = 0) -> Send:
        """Begin a send of so many steps, 0 if that is not known; `add` its parts.

        Raises what ended the stream, FailedPrecondition once it is closed, ResourceExhausted for more steps than a
        server keeps for a buffered model.
        """
        if self._fault is not None:
            raise self._fault
        if self._is_leaving or self.state is State.OVER:
            raise FailedPrecondition("the stream is closed: open another one", reason="STREAM_CLOSED")
        self._check_buffer(num_steps)
        return self.ledger.begin()

    def cut(self, chunk: Mapping[str, Array]) -> Iterator[tuple[dict[str, Array], bool]]:
        """Cut a chunk into what frames may carry: (part, whether it is the last)."""
        num_steps = len(next(iter(chunk.values())))
        if num_steps == 1:
            yield dict(chunk), True
            return
        step_bytes = sum(array.nbytes for array in chunk.values()) // num_steps
        size = max(1, min(MAX_FRAME_STEPS, self.window, MAX_FRAME_BYTES // max(1, step_bytes)))
        for start in range(0, num_steps, size):
            yield {name: array[start : start + size] for name, array in chunk.items()}, start + size >= num_steps

    def add(self, send: Send, part: Mapping[str, Array], *, is_last: bool) -> list[pb.StreamPredictRequest]:
        """Send part of a send; the caller has waited for room. Nothing is sent once a part was rejected.

        Raises ResourceExhausted as `begin` does.
        """
        length = len(next(iter(part.values())))
        self._check_buffer(length)
        if send.is_rejected or self._fault is not None:
            if is_last:
                self.ledger.complete(send)
            return []
        send.is_complete = is_last
        if self.ledger.is_rewound:
            self.ledger.abort(send, length)
            self.ledger.settle()
            return []
        inputs = [_codec.tensor(name, array, "per_step") for name, array in part.items()]
        span = self.ledger.add(send, length, inputs)
        return [self._frame(span, 0)] if self.state is State.OPEN else []

    def _check_buffer(self, num_steps: int) -> None:
        sent, limit = self.ledger.position, self.max_inflight_steps
        if self.is_buffered and sent + num_steps > limit:
            raise ResourceExhausted(
                f"the model needs the whole sequence, and the server keeps at most {limit} steps; {sent} were sent, "
                f"{num_steps} more do not fit: close the stream to have the answers to those that were",
                reason="LIMIT",
            )

    def close(self) -> list[pb.StreamPredictRequest]:
        """End the session: its steps are answered, then its state is freed. The shell ends its side of the call."""
        self._is_closing = True
        return [_CLOSE] if self._leave() else []

    def detach(self) -> None:
        """Leave the session, to linger if its terms say so. The shell ends its side of the call."""
        self._leave()

    def _leave(self) -> bool:
        """Begin the end; without a connection only if steps wait for one. Returns whether there is one."""
        self._is_leaving = True
        if self.state is State.OPEN:
            self.state = State.ENDING
            return True
        if self.state is not State.ENDING and not (self._was_open and self.is_owed):
            self.state = State.OVER
        return False

    def _frame(self, span: Span, skip: int) -> pb.StreamPredictRequest:
        """Make the frame of a span without its first `skip` steps."""
        inputs = span.inputs
        if skip:
            inputs = [_codec.tensor(m.name, _codec.array_of(m, None)[skip:], "per_step") for m in inputs]
        frame = pb.StreamFrame(handles=[HANDLE], positions=[span.position + skip], tensors=inputs)
        if self.terms.replay_window:
            frame.acked_positions.append(self.ledger.acknowledged)
        if self.terms.timeout_s is not None:
            frame.timeout.CopyFrom(duration(self.terms.timeout_s))
        if not self.terms.is_resumable:
            span.inputs = []
        return pb.StreamPredictRequest(frame=frame)

    # ---- responses --------------------------------------------------------------------------------------------------

    def receive(self, response: pb.StreamPredictResponse) -> list[pb.StreamPredictRequest]:
        """Take a response; returns what is to be sent because of it.

        Raises what kept the session from opening, and ProtocolError. All else comes out of `take`.
        """
        kind = response.WhichOneof("message")
        if kind == "opened":
            opened = response.opened
            self.version, self.digest = opened.version, opened.digest
            self.step_mode = _codec.STEP_MODE_BY_ENUM.get(opened.step_mode, self.step_mode)
            self.max_inflight_steps = opened.max_inflight_steps or self.max_inflight_steps
            return self._begin(opened.sessions[0]) if opened.sessions else []
        if kind == "drain":
            self.drain_s = drain_s_of(response.drain)
            return []
        answer = response.answer
        requests = self._begin(answer.opened[0]) if answer.opened else []
        for entry in read_entries(self.info, answer):
            is_awaited = (
                self.ledger.answer_last(entry, is_whole=self.is_buffered)
                if self.terms.emit == "last"
                else self.ledger.answer_steps(entry)
            )
            if not is_awaited and not self.terms.is_resumable:
                self.fail(ProtocolError(f"the server answered position {entry.position}, which awaits no answer"))
        for message in answer.errors:
            error = step_error(message)
            if isinstance(error, SessionFailed):
                self.ledger.settle()
                self.fail(error)
            else:
                self.ledger.reject(error)
        self.ledger.settle()
        for closed in answer.closed:
            self._take_closed(closed)
        return requests

    def end(self, error: RnnserveError | None) -> bool:
        """Take the end of the call, with its error if it failed. Returns whether the session is to be resumed."""
        if self.state is State.OVER or (self._is_leaving and (error is None or not self.is_owed)):
            self._finish()
            return False
        error = error or error_for("UNAVAILABLE", "the server ended the stream")
        if self.terms.is_resumable and self._was_open and is_connection_loss(error):
            self.state = State.LOST
            self.ledger.abort_stale()
            self.ledger.settle()
            return True
        self.fail(error)
        return False

    def fail(self, error: RnnserveError) -> None:
        """End the sequence for good; `take` raises the error after the outcomes that are here."""
        self.state = State.OVER
        self._fault = self._fault or error
        self.ledger.clear()

    def take(self) -> Outputs:
        """Give the caller the next outcome, if `is_ready`. Raises StepRejected, or what ended it all."""
        if not self.ledger.has_outcome and self._fault is not None:
            raise self._fault
        return self.ledger.take()

    def _begin(self, opened: pb.SessionOpened) -> list[pb.StreamPredictRequest]:
        """The session is open, on the first connection or on another one: send what is not answered."""
        if opened.status.code:
            cause = from_status(opened.status)
            if not self._was_open:
                raise cause
            message = f"the connection was lost, and the session can't be resumed: {cause.message}"
            at = self.ledger.acknowledged
            self.fail(SessionFailed(message, handle=HANDLE, position=at, expected_position=0, cause=cause))
            return []
        self.state = State.ENDING if self._is_leaving else State.OPEN
        if not self._was_open:
            self._was_open = True
            self.is_resumed = opened.resumed
            if self.is_buffered and opened.position:
                self.ledger.adopt(opened.position)
            self.ledger.position = opened.position
        is_last = self.terms.emit == "last"
        resends = self.ledger.resends(opened.position, is_partial=self.is_buffered, is_last=is_last)
        frames = [self._frame(span, skip) for span, skip in resends]
        return [*frames, _CLOSE] if self._is_closing else frames

    def _take_closed(self, closed: pb.SessionClosed) -> None:
        if self.state is State.ENDING and closed.reason == pb.CLOSE_REASON_CLIENT:
            self._finish()
            return
        reason = close_reason(closed)
        at = closed.position
        message = f"the session ended at position {at}: {reason.lower().replace('_', ' ')}"
        cause = error_for("FAILED_PRECONDITION", message, reason=reason)
        self.fail(SessionEnded(message, handle=HANDLE, position=at, expected_position=at, cause=cause))

    def _finish(self) -> None:
        """The end, as agreed. Answers that are still due will not come."""
        self.state = State.OVER
        if self.is_owed:
            self.fail(ProtocolError(f"the stream ended before {self.ledger.num_unanswered} steps were answered"))
