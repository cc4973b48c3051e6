"""Many sessions on one stream, in columns, as a state machine without I/O.

Laws, for each session:

    its n-th frame entry goes to the position after the one before, or to where the server expects it after a rejection
    a rejection of steps that were sent before the last rejection was known changes nothing
    handles count the sessions that were opened, refused ones included
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from service.client import _codec
from service.client._answers import read_columns
from service.client._status import close_reason, from_status, step_error
from service.client._terms import SequenceTerms, drain_s_of, duration, once_tensors, session_open, stream_open
from service.client.errors import (
    FailedPrecondition,
    InvalidArgument,
    ProtocolError,
    RnnserveError,
    SessionFailed,
    StepRejected,
)
from service.client.info import ModelInfo, Priority
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Opened:
    """Outcome of one open."""

    handle: int
    """Number that stands for the session."""
    session_id: str
    """Name of the session; empty if anonymous."""
    position: int
    """Position of its next step: 0 for a new one."""
    resumed: bool
    """Whether it was live already."""
    error: RnnserveError | None
    """Why it was not opened, or None."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The end of one session."""

    handle: int
    """Number that stood for it."""
    position: int
    """Steps that were applied in all."""
    reason: str
    """CLIENT, EXPIRED, TAKEN_OVER or FAILED."""


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """What came together: outputs in columns, and what happened to sessions. Iterate for (handle, first output)."""

    handles: Ints
    """[entries] sessions with outputs here."""
    positions: Ints
    """[entries] of each one's first answered step; of the last step of its entry under "last"."""
    lengths: Ints
    """[entries] rows of each one in every per-step output."""
    outputs: Mapping[str, Array]
    """By name: per-step [sum(lengths), ...], per-sequence [entries, ...]."""
    opened: tuple[Opened, ...] = ()
    """Outcomes of opens."""
    closed: tuple[Closed, ...] = ()
    """Sessions that ended."""
    errors: tuple[StepRejected | SessionFailed, ...] = ()
    """Steps that were not applied."""
    drain_s: float | None = None
    """What is open can be finished, and nothing more opened here: time left, or infinity."""
    _sections: Mapping[str, str] = field(default_factory=dict, repr=False)

    def output(self, entry: int, name: str | None = None) -> Array:
        """The rows [length, ...] of one entry of the first output, or the named one; its row [...] per sequence."""
        name = next(iter(self.outputs)) if name is None else name
        array = self.outputs[name]
        if self._sections[name] == "shared":
            return array
        if self._sections[name] == "per_sequence":
            return np.asarray(array[entry])
        start = int(self.lengths[:entry].sum())
        return array[start : start + int(self.lengths[entry])]

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        if not self.outputs:
            return
        name = next(iter(self.outputs))
        if self._sections[name] != "per_step":
            yield from ((handle, self.output(i)) for i, handle in enumerate(self.handles.tolist()))
            return
        start = 0
        for handle, length in zip(self.handles.tolist(), self.lengths.tolist(), strict=True):
            yield handle, self.outputs[name][start : start + length]
            start += length


class GatewayMachine:
    """Many sessions. Not safe for threads: a shell lets one at a time in."""

    def __init__(self, info: ModelInfo, terms: SequenceTerms) -> None:
        self.info = info
        self.terms = terms
        self.version = info.version
        self.digest = info.digest
        self.step_mode = info.step_mode
        self.max_inflight_steps = info.max_inflight_steps
        self.is_open = False
        self.num_opened = 0
        """Sessions that were opened, refused ones included: the next handle."""
        self._opens: list[tuple[pb.SessionOpen, Mapping[str, npt.ArrayLike]]] = []
        self._next = np.zeros(64, dtype=np.int64)
        self._answered = np.zeros(64, dtype=np.int64)
        self._floor = np.zeros(64, dtype=np.int64)  # where the server expected the next step at the last rejection
        self._num_stale = np.zeros(64, dtype=np.int64)  # steps sent before that rejection was known
        self._is_placed = np.zeros(64, dtype=bool)  # whether its positions are known, not only counted
        self._keeps = np.zeros(64, dtype=bool)  # whether the server keeps answers until they are acknowledged

    def open_request(self) -> pb.StreamPredictRequest:
        """Make the first request."""
        terms = self.terms
        return stream_open(self.info, terms.version, terms.outputs, terms.emit, terms.step_mode)

    def position(self, handle: int) -> int:
        """Position of a session's next step."""
        return int(self._next[self._check(handle)])

    def num_unanswered(self, handle: int) -> int:
        """Steps of a session that were sent and not answered."""
        return int(self._next[self._check(handle)] - self._answered[handle])

    def open(
        self,
        session_id: str,
        *,
        linger_s: float,
        replay_window: int,
        resume_only: bool,
        priority: Priority,
        states: Mapping[str, npt.ArrayLike] | None,
        contexts: Mapping[str, npt.ArrayLike] | None,
    ) -> int:
        """Note a session to open; `flush` makes the request. Returns its handle."""
        handle = self.num_opened
        opening = session_open(
            session_id=session_id,
            linger_s=linger_s,
            replay_window=replay_window,
            resume_only=resume_only,
            priority=priority,
        )
        self._opens.append((opening, {**(states or {}), **(contexts or {})}))
        self.num_opened += 1
        if handle == len(self._next):
            for name in ("_next", "_answered", "_floor", "_num_stale", "_is_placed", "_keeps"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._is_placed[handle] = not session_id
        self._keeps[handle] = replay_window > 0
        return handle

    def seek(self, handle: int, position: int) -> None:
        """Send a session's next step to another position, to have steps answered again whose answers are kept."""
        if self.num_unanswered(handle):
            raise FailedPrecondition(f"handle {handle} has unanswered steps: receive their answers first")
        if not self._is_placed[handle]:
            raise FailedPrecondition(f"handle {handle} is not open yet: receive its outcome first")
        self._next[handle] = self._answered[handle] = position

    def flush(self) -> list[pb.StreamPredictRequest]:
        """Make the requests for what was opened."""
        requests = []
        opens, self._opens = self._opens, []
        start = 0
        for i in range(1, len(opens) + 1):
            if i == len(opens) or sorted(opens[i][1]) != sorted(opens[start][1]):
                group = opens[start:i]
                frame = pb.StreamFrame(opens=[opening for opening, _ in group])
                if group[0][1]:
                    frame.tensors.extend(once_tensors(self.info, [given for _, given in group]))
                requests.append(pb.StreamPredictRequest(frame=frame))
                start = i
        return requests

    def send(
        self,
        handles: Sequence[int] | Array,
        steps: _codec.Steps,
        lengths: Sequence[int] | Array | None = None,
        *,
        closes: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[pb.StreamPredictRequest]:
        """Make the requests for steps of some sessions, in columns.

        handles  [entries], each at most once
        steps    [sum(lengths), *row_shape] of the only per-step input, or by name
        lengths  [entries], at least 1; None is one step each
        closes   sessions to close once their steps are answered
        Raises InvalidArgument.
        """
        requests = self.flush()
        ends = [self._check(handle) for handle in closes]
        entries = np.asarray(handles, dtype=np.int64)
        if not len(entries):
            return [*requests, *([self._close_request(ends)] if ends else [])]
        counts = np.ones_like(entries) if lengths is None else np.asarray(lengths, dtype=np.int64)
        chunk = _codec.chunk_of(self.info, steps)
        num_rows = len(next(iter(chunk.values())))
        if entries.ndim != 1 or entries.shape != counts.shape or counts.min() < 1 or counts.sum() != num_rows:
            raise InvalidArgument(f"expected {len(entries)} lengths of at least 1 that sum to {num_rows} steps")
        if entries.min() < 0 or entries.max() >= self.num_opened:
            raise InvalidArgument(f"handles: expected some of the {self.num_opened} that were opened")
        if len(np.unique(entries)) < len(entries):
            raise InvalidArgument("handles: a session may have one entry in a frame: give it more steps there")
        placed = self._is_placed[entries]
        for group in (placed, ~placed):
            if group.any():
                rows = slice(None) if group.all() else np.repeat(group, counts)
                part = {name: array[rows] for name, array in chunk.items()}
                requests.append(self._frame(entries[group], counts[group], part, bool(placed[group][0]), timeout_s))
        if ends:
            requests[-1].frame.closes.extend(ends)
        return requests

    def send_each(
        self, steps: Mapping[int, _codec.Steps], *, closes: Iterable[int] = (), timeout_s: float | None = None
    ) -> list[pb.StreamPredictRequest]:
        """Make the requests for steps by session: one step [*row_shape], or several [time, *row_shape]."""
        chunks = [_codec.step_or_chunk_of(self.info, step) for step in steps.values()]
        lengths = [len(next(iter(chunk.values()))) for chunk in chunks]
        names = chunks[0] if chunks else ()
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
        return self.send(list(steps), columns, lengths, closes=closes, timeout_s=timeout_s)

    def receive(self, response: pb.StreamPredictResponse) -> Events | None:
        """Take a response; None is the answer to the open. Raises ProtocolError."""
        kind = response.WhichOneof("message")
        if kind == "opened":
            opened = response.opened
            self.version, self.digest, self.is_open = opened.version, opened.digest, True
            self.step_mode = _codec.STEP_MODE_BY_ENUM.get(opened.step_mode, self.step_mode)
            self.max_inflight_steps = opened.max_inflight_steps or self.max_inflight_steps
            return None
        none = np.zeros(0, dtype=np.int64)
        if kind == "drain":
            return Events(none, none, none, {}, drain_s=drain_s_of(response.drain))
        answer = response.answer
        columns = read_columns(self.info, answer)
        handles, positions, lengths = (
            np.array(column, dtype=np.int64) for column in (answer.handles, answer.positions, answer.lengths)
        )
        if len(handles) and handles.max() >= self.num_opened:
            raise ProtocolError(f"the server answered handle {handles.max()}, which was not opened")
        opened_now = tuple(self._take_opened(message) for message in answer.opened)
        errors = tuple(self._take_error(message) for message in answer.errors)
        self._take_answered(handles, positions, lengths)
        closed = tuple(Closed(c.handle, c.position, close_reason(c)) for c in answer.closed)
        is_packed = self.terms.emit == "all"
        sections = dict.fromkeys(columns.per_step, "per_step" if is_packed else "per_sequence")
        sections |= dict.fromkeys(columns.per_sequence, "per_sequence") | dict.fromkeys(columns.shared, "shared")
        outputs = columns.per_step | columns.per_sequence | columns.shared
        ordered = {t.name: outputs[t.name] for t in answer.tensors}
        return Events(handles, positions, lengths, ordered, opened_now, closed, errors, None, sections)

    def _frame(
        self, handles: Ints, lengths: Ints, chunk: Mapping[str, Array], is_placed: bool, timeout_s: float | None
    ) -> pb.StreamPredictRequest:
        frame = pb.StreamFrame(
            handles=handles.tolist(),
            lengths=lengths.tolist(),
            tensors=[_codec.tensor(name, array, "per_step") for name, array in chunk.items()],
        )
        if is_placed:
            frame.positions.extend(self._next[handles].tolist())
            if self._keeps[handles].any():
                frame.acked_positions.extend(self._answered[handles].tolist())
        timeout_s = self.terms.timeout_s if timeout_s is None else timeout_s
        if timeout_s is not None:
            frame.timeout.CopyFrom(duration(timeout_s))
        self._next[handles] += lengths
        return pb.StreamPredictRequest(frame=frame)

    @staticmethod
    def _close_request(handles: list[int]) -> pb.StreamPredictRequest:
        return pb.StreamPredictRequest(frame=pb.StreamFrame(closes=handles))

    def _check(self, handle: int) -> int:
        if not 0 <= handle < self.num_opened:
            raise InvalidArgument(f"handle {handle}: expected one of the {self.num_opened} that were opened")
        return handle

    def _take_opened(self, message: pb.SessionOpened) -> Opened:
        handle = message.handle
        error = from_status(message.status) if message.status.code else None
        if error is None and handle < self.num_opened and not self._is_placed[handle]:
            self._is_placed[handle] = True
            self._next[handle] += message.position
            self._answered[handle] = self._floor[handle] = message.position
        return Opened(handle, message.session_id, message.position, message.resumed, error)

    def _take_error(self, message: pb.StepError) -> StepRejected | SessionFailed:
        error = step_error(message)
        handle = error.handle
        if isinstance(error, StepRejected) and handle < self.num_opened:
            end = error.position + error.length
            if self._num_stale[handle] > 0 and error.position > self._floor[handle]:
                self._num_stale[handle] -= error.length
            else:
                self._num_stale[handle] += max(0, int(self._next[handle]) - end)
                self._floor[handle] = self._next[handle] = error.expected_position
        return error

    def _take_answered(self, handles: Ints, positions: Ints, lengths: Ints) -> None:
        ends = positions + (1 if self.terms.emit == "last" else lengths)
        self._answered[handles] = np.maximum(self._answered[handles], ends)
        # An answer past the last rejection: the server has seen all that was sent before it.
        self._num_stale[handles[ends > self._floor[handles]]] = 0
