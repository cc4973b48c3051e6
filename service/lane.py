"""One served model version: its slots, sessions, scheduler and backend, put together without a clock or I/O.

A *link* is whoever holds sessions: a connected stream, or a Predict call. Steps come in through `submit` as columns,
wait in an inbox so that messages that arrive together are queued together, and leave as events to their links.
The life of a run is  next_run -> Run.execute (on any thread) -> complete,  or `fail` where execute raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout, StepMode
from service.backend import Backend, Exactness
from service.config import Settings
from service.errors import (
    DeadlineExpired,
    Exhausted,
    NotFound,
    Overloaded,
    RunFailed,
    ServiceError,
    SessionExpired,
    StepAborted,
)
from service.events import Answer, Closed, Event, Link, Steps, StepsFailed
from service.inputs import bad_rows, bad_value
from service.scheduler import Batch, BatchConfig, Bools, Dropped, Ints, Scheduler
from service.sessions import Kept, SessionState, SessionTable, Terms
from service.slots import StateSlab

Array = npt.NDArray[Any]
OVERLOAD_RETRY_S = 0.25


@dataclass(slots=True)
class Run:
    """One run of the backend, ready to execute on any thread."""

    lane: Lane
    batch: Batch
    inputs: dict[str, Array]
    lengths: Array
    states: list[Array]

    def execute(self) -> tuple[list[Array], list[Array]]:
        """Compute (outputs, next states). Raises RunFailed."""
        return self.lane.backend.run(self.inputs, self.lengths, self.states)


@dataclass(slots=True)
class Tally:
    """Counts of one lane, for the metrics."""

    steps: int = 0
    runs: int = 0
    sequences: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    run_rows: dict[int, int] = field(default_factory=dict)
    """Runs by number of rows, rounded up to a power of two."""
    run_rows_sum: int = 0
    run_seconds: float = 0.0


class Lane:
    """One served model version."""

    def __init__(self, name: str, version: int, backend: Backend, exactness: Exactness, settings: Settings) -> None:
        self.name = name
        self.version = version
        self.backend = backend
        self.exactness = exactness
        self.settings = settings
        self.graph = backend.graph
        self.step_mode, self.step_mode_reason = backend.spec.step_mode
        self.is_whole = self.step_mode is StepMode.BUFFERED
        self.step_inputs = [t for t in self.graph.inputs if t.layout is Layout.PER_STEP]
        self.tally = Tally()
        is_coupled = exactness.verdict == "coupled" and not settings.batch_coupled_models
        # Cancelled sequences hold their slot until the run that they are in completes: room for one batch of them.
        num_slots = settings.max_sessions + settings.max_predict_sequences + settings.max_batch_rows
        self.slab = StateSlab([(s.row_shape, s.dtype) for s in self.graph.states], num_slots)
        self.sessions = SessionTable(num_slots, max_inflight_steps=settings.max_inflight_steps)
        self.scheduler = Scheduler(
            num_slots,
            BatchConfig(
                max_rows=1 if is_coupled else settings.max_batch_rows,
                max_chunk_steps=settings.max_chunk_steps if exactness.is_chunkable else 1,
                whole=self.is_whole,
            ),
        )
        self.num_predicting = 0
        """Slots that sequences of Predict calls hold."""
        self.is_output_per_step = [t.layout is Layout.PER_STEP for t in self.graph.outputs]
        self._links: dict[int, Link] = {}
        self._num_links = 0
        self._inbox: list[Steps] = []
        self._detaching: set[int] = set()
        self._kept_inputs: dict[int, list[list[Array]]] = {}  # by slot, of whole-sequence models
        self._num_kept_steps = 0

    # ---- sessions ---------------------------------------------------------------------------------------------------

    @property
    def num_sessions(self) -> int:
        """Live sessions of streams."""
        return self.sessions.num_live - self.num_predicting

    def attach(self, link: Link) -> None:
        """Let a link open sessions."""
        self._num_links += 1
        link.number = self._num_links
        self._links[link.number] = link

    def open(self, link: Link, terms: Terms, now: float) -> tuple[int, int, bool]:
        """Open or resume a session. Returns (handle, position expected next, whether it was resumed).

        A handle is used up even if this raises: SessionNotFound, Exhausted.
        """
        handle = link.num_opened
        link.num_opened += 1
        slot = self.sessions.find(terms)
        if slot is None:
            if self.num_sessions >= self.settings.max_sessions:
                raise Exhausted(
                    f"{self.num_sessions} sessions are live, the limit (max_sessions) is {self.settings.max_sessions}; "
                    "close some first, or ask again later",
                    retry_after_s=1.0,
                )
            slot = int(self.slab.allocate(1)[0])
            self.sessions.open(slot, link.number, handle, terms, now)
            self.tally.sequences += 1
            was_live = False
        else:
            self.flush(now)
            self._take_over(slot)
            self.sessions.resume(slot, link.number, handle, terms, now)
            was_live = True
        link.slots[handle] = slot
        link.num_live += 1
        return handle, int(self.sessions.expected[slot]), was_live

    def set_state(self, slot: int, index: int, row: Array) -> None:
        """Give a session that has not begun an initial state."""
        self.slab.write(slot, index, row)

    def close(self, link: Link, handle: int, now: float) -> None:
        """End a session once its queued steps are answered."""
        slot = link.slots.get(handle)
        if slot is None:
            raise NotFound(f"handle {handle} is not open on this stream", field="closes")
        self.flush(now)
        del link.slots[handle]
        self.sessions.drain(slot)
        if self.is_whole:
            self._submit_whole(slot)
        if not self.scheduler.is_busy(slot):
            self._end(slot, SessionState.CLOSED)

    def finish(self, link: Link, now: float) -> None:
        """The client has sent all: close every session once it is answered, or detach it if it lingers."""
        self.flush(now)
        for handle, slot in list(link.slots.items()):
            details = self.sessions.details.get(slot)
            if details is None or not details.terms.linger_s:
                self.close(link, handle, now)
            elif self.scheduler.is_busy(slot):
                self._detaching.add(slot)
            else:
                self._detach(slot, now)

    def drop(self, link: Link, now: float) -> None:
        """The connection is gone: free every session at once, or detach it if it lingers."""
        if link.number not in self._links:
            return
        self.flush(now)
        link.sink = _ignore
        mine = np.flatnonzero(self.sessions.link == link.number).tolist() if link.num_live else []
        for slot in mine:
            if not self.sessions.detach(slot, now):
                self._end(slot, SessionState.CLOSED)
        link.slots.clear()
        link.num_live = 0
        del self._links[link.number]

    def expire(self, now: float) -> None:
        """End sessions that are past their linger or idle limit."""
        self.flush(now)
        for slot, idle_s, limit_s in self.sessions.expired(now, self.settings.session_idle_s):
            if self.scheduler.is_busy(slot):
                continue
            error = SessionExpired(self._name(slot), idle_s=idle_s, limit_s=limit_s)
            self._fail(slot, error, SessionState.EXPIRED)

    def num_unanswered(self, link: Link) -> int:
        """Steps of a link's sessions that are queued or running."""
        mine = self.sessions.link == link.number
        return int((self.sessions.expected[mine] - self.sessions.applied[mine]).sum())

    def _take_over(self, slot: int) -> None:
        old = self._links.get(int(self.sessions.link[slot]))
        self._detaching.discard(slot)
        if old is not None:
            handle = int(self.sessions.handle[slot])
            old.slots.pop(handle, None)
            old.num_live -= 1
            position = int(self.sessions.applied[slot])
            old.sink(Closed(handle, position, SessionState.CLOSED, is_taken_over=True))

    def _detach(self, slot: int, now: float) -> None:
        link = self._links.get(int(self.sessions.link[slot]))
        self._detaching.discard(slot)
        self.sessions.detach(slot, now)
        if link is not None:
            handle = int(self.sessions.handle[slot])
            link.slots.pop(handle, None)
            link.num_live -= 1
            link.sink(Closed(handle, int(self.sessions.applied[slot]), SessionState.OPEN))

    def _end(self, slot: int, state: SessionState) -> None:
        """End a session and free its slot: at once, or when the run that holds it completes."""
        link = self._links.get(int(self.sessions.link[slot]))
        closed = Closed(int(self.sessions.handle[slot]), int(self.sessions.applied[slot]), state)
        if link is not None and link.wants_states:
            closed.final_states = [row[0] for row in self.slab.gather(np.array([slot]))]
        self.sessions.end(slot, state)
        self._detaching.discard(slot)
        self._take_kept(slot)
        if not self.scheduler.cancel(slot):
            self.slab.free(np.array([slot]))
        if link is not None:
            self.num_predicting -= link.is_predicting
            link.slots.pop(closed.handle, None)
            link.num_live -= 1
            link.sink(closed)

    def _fail(self, slot: int, error: ServiceError, state: SessionState) -> None:
        """End a session through a fault or a limit of the server, and tell its link why."""
        link = self._links.get(int(self.sessions.link[slot]))
        applied, expected = int(self.sessions.applied[slot]), int(self.sessions.expected[slot])
        if link is not None:
            self.count_rejected(error)
            handle = int(self.sessions.handle[slot])
            link.sink(StepsFailed(handle, applied, expected - applied, error, applied, is_over=True))
        self._end(slot, state)

    def _name(self, slot: int) -> str:
        details = self.sessions.details.get(slot)
        if details is not None and details.terms.session_id:
            return f"session {details.terms.session_id!r}"
        return f"session with handle {int(self.sessions.handle[slot])}"

    # ---- steps in ---------------------------------------------------------------------------------------------------

    @property
    def num_queued_steps(self) -> int:
        """Steps that are queued or running, or kept until their whole sequence has come."""
        return self.scheduler.num_queued_steps + self._num_kept_steps

    @property
    def has_inbox(self) -> bool:
        """Whether steps wait to be queued."""
        return bool(self._inbox)

    def submit(self, steps: Steps) -> None:
        """Take steps; they are queued by the next `flush`, together with what else has arrived by then."""
        self._inbox.append(steps)

    def flush(self, now: float) -> None:
        """Queue what has arrived."""
        if not self._inbox:
            return
        inbox, self._inbox = self._inbox, []
        slots = np.array([slot for steps in inbox for slot in steps.slots], dtype=np.int64)
        if len(inbox) > 1 and len(np.unique(slots)) < len(slots):  # several messages for one session: in order
            for steps in inbox:
                self._queue([steps], np.array(steps.slots, dtype=np.int64), now)
        else:
            self._queue(inbox, slots, now)

    def _queue(self, messages: list[Steps], slots: Ints, now: float) -> None:
        """Admit and schedule entries, one a slot."""
        lengths = _column(messages, lambda m: m.lengths, lambda m: np.ones(len(m.slots), dtype=np.int64))
        positions = None
        if any(m.positions is not None for m in messages):
            positions = _column(messages, lambda m: m.positions, lambda m: self.sessions.sent[m.slots])
        inputs = [_joined([m.inputs[i] for m in messages]) for i in range(len(self.step_inputs))]
        starts = np.cumsum(lengths) - lengths
        faults = self._faults(inputs, lengths, starts)
        refused = None
        if faults:
            refused = np.zeros(len(slots), dtype=bool)
            refused[list(faults)] = True
        admission = self.sessions.admit(slots, lengths, positions, now, refused)
        for entry, error in [*faults.items(), *admission.refusals]:
            self._tell_refused(int(slots[entry]), int(lengths[entry]), positions, entry, error)
        for entry, start, stop in admission.replays:
            self._replay(int(slots[entry]), start, stop, is_entry_whole=stop - start == lengths[entry])
        admitted = admission.is_admitted
        deadlines = None
        if any(m.deadline != np.inf for m in messages):
            deadlines = np.repeat([m.deadline for m in messages], [len(m.slots) for m in messages])
        if not admitted.all() or admission.skips.any():
            slots = slots[admitted]
            starts = (starts + admission.skips)[admitted]
            lengths = (lengths - admission.skips)[admitted]
            deadlines = None if deadlines is None else deadlines[admitted]
        if not len(slots):
            return
        if self.is_whole:
            for slot, start, length in zip(slots.tolist(), starts.tolist(), lengths.tolist(), strict=True):
                self._kept_inputs.setdefault(slot, []).append([x[start : start + length] for x in inputs])
                self._num_kept_steps += length
        else:
            self.scheduler.submit(slots, lengths, starts, inputs, deadlines=deadlines)

    def _faults(self, inputs: list[Array], lengths: Ints, starts: Ints) -> dict[int, ServiceError]:
        """Find entries that the queue has no room for, or with values that the model must not see."""
        faults: dict[int, ServiceError] = {}
        room = self.settings.max_queued_steps - self.num_queued_steps
        if lengths.sum() > room:
            faults = {entry: self.overloaded() for entry in np.flatnonzero(np.cumsum(lengths) > room).tolist()}
        passes = self.settings.non_finite == "pass"
        for tensor, x in zip(self.step_inputs, inputs, strict=True):
            if (is_bad := bad_rows(tensor, x, passes_non_finite=passes)) is not None:
                for entry in np.flatnonzero(np.logical_or.reduceat(is_bad, starts)).tolist():
                    at = int(np.argmax(is_bad[starts[entry] :]))
                    faults.setdefault(entry, bad_value(tensor, x[starts[entry] + at], at))
        return faults

    def overloaded(self) -> ServiceError:
        """Say that the queue is full."""
        return Overloaded(
            f"{self.num_queued_steps} steps are queued for {self.name}, the limit (max_queued_steps) is "
            f"{self.settings.max_queued_steps}; send again after a while",
            retry_after_s=OVERLOAD_RETRY_S,
        )

    def _tell_refused(self, slot: int, num_steps: int, positions: Ints | None, entry: int, error: ServiceError) -> None:
        self.count_rejected(error)
        link = self._links.get(int(self.sessions.link[slot]))
        if link is None:
            return
        position = int(positions[entry]) if positions is not None else int(self.sessions.sent[slot]) - num_steps
        expected = int(self.sessions.expected[slot])
        link.sink(StepsFailed(int(self.sessions.handle[slot]), position, num_steps, error, expected))

    def _replay(self, slot: int, start: int, stop: int, *, is_entry_whole: bool) -> None:
        """Deliver kept answers of steps [start, stop) again; is_entry_whole: stop - 1 is the last step of its entry."""
        link = self._links.get(int(self.sessions.link[slot]))
        if link is None:
            return
        if link.emit_last:
            if not is_entry_whole:
                return
            start = stop - 1
        rows = self.sessions.kept_rows(slot, start, stop)
        outputs = [rows[i] if self.is_output_per_step[i] else rows[i][-1:] for i in link.outputs]
        link.sink(Answer([int(self.sessions.handle[slot])], [start], [stop - start], outputs))

    def _submit_whole(self, slot: int) -> None:
        """Queue all that a session of a whole-sequence model has sent."""
        if parts := self._take_kept(slot):
            inputs = [_joined([part[i] for part in parts]) for i in range(len(self.step_inputs))]
            length = np.array([len(inputs[0])])
            self.scheduler.submit(np.array([slot]), length, np.zeros(1, dtype=np.int64), inputs)

    def _take_kept(self, slot: int) -> list[list[Array]]:
        parts = self._kept_inputs.pop(slot, [])
        self._num_kept_steps -= sum(len(part[0]) for part in parts)
        return parts

    def submit_sequences(
        self, link: Link, inputs: list[Array], starts: Ints, lengths: Ints, states: Sequence[Array | None], now: float
    ) -> None:
        """Open, queue and close whole sequences of a Predict call; their handles count on from link.num_opened.

        inputs   per-step inputs, packed; starts and lengths [n] say which rows
        states   for each state [n, *row shape] or None for zeros
        """
        slots = self.slab.allocate(len(starts))
        for index, rows in enumerate(states):
            if rows is not None:
                self.slab.write(slots, index, rows)
        for slot in slots.tolist():
            self.sessions.open(slot, link.number, link.num_opened, _ANONYMOUS, now)
            link.num_opened += 1
        link.num_live += len(slots)
        self.num_predicting += len(slots)
        self.tally.sequences += len(slots)
        self.sessions.queue(slots, lengths)
        self.sessions.state[slots] = SessionState.DRAINING
        self.scheduler.submit(slots, lengths, starts, inputs)

    # ---- runs -------------------------------------------------------------------------------------------------------

    def next_run(self, now: float) -> Run | None:
        """Form the next run, or None if nothing is ready."""
        for dropped in self.scheduler.expire(now):
            self._tell_expired(dropped, now)
        batch = self.scheduler.next_batch()
        return self._prepare(batch) if batch is not None else None

    def _prepare(self, batch: Batch) -> Run:
        parts = _segments(batch.payloads)
        inputs = {}
        for index, tensor in enumerate(self.step_inputs):
            rows = []
            for payload, at in parts:
                if batch.steps == 1:
                    rows.append(payload[index].take(batch.starts[at], axis=0)[:, None])
                else:  # rows past an entry's end repeat its last step: padding that no output depends on
                    step = np.minimum(np.arange(batch.steps), batch.counts[at, None] - 1)
                    rows.append(payload[index].take(batch.starts[at, None] + step, axis=0))
            inputs[tensor.name] = _joined(rows)
        return Run(self, batch, inputs, batch.counts.astype(np.int32), self.slab.gather(batch.slots))

    def complete(self, run: Run, outputs: list[Array], next_states: list[Array], now: float, seconds: float) -> None:
        """Take the results of a run: move states, answer links, end what drains."""
        batch = run.batch
        slots = batch.slots
        self._count_run(batch, seconds)
        is_live = self.scheduler.complete(batch)
        self.slab.scatter(slots, next_states)
        if not is_live.all():
            self.slab.free(slots[~is_live])
        positions = self.sessions.applied[slots]
        self.sessions.advance(slots[is_live], batch.counts[is_live], now)
        self._answer(batch, outputs, positions, is_live)
        is_done = (self.sessions.state[slots] == SessionState.DRAINING) & is_live
        if is_done.any():
            for slot in slots[is_done].tolist():
                if not self.scheduler.is_busy(slot):
                    self._end(slot, SessionState.CLOSED)
        for slot in [slot for slot in self._detaching if not self.scheduler.is_busy(slot)]:
            self._detach(slot, now)

    def fail(self, run: Run, now: float) -> None:
        """A run failed: run each row alone, so that only sequences that fail by themselves are lost."""
        self.flush(now)  # what has arrived for a session must not outlive it
        for index in range(len(run.batch.slots)):
            part = self._prepare(run.batch.row(index))
            try:
                outputs, states = part.execute()
            except RunFailed as error:
                slot = int(part.batch.slots[0])
                if self.sessions.state[slot] <= SessionState.DRAINING:
                    self._fail(slot, error, SessionState.FAILED)
                self.scheduler.complete(part.batch)
                self.slab.free(part.batch.slots)
            else:
                self.complete(part, outputs, states, now, 0.0)

    def _answer(self, batch: Batch, outputs: list[Array], positions: Ints, is_live: Bools) -> None:
        """Give each link its rows of a run, in one event."""
        counts, slots = batch.counts, batch.slots
        if self.sessions.num_replaying:
            self._keep(batch, outputs, positions, is_live)
        for number, rows in _by_value(self.sessions.link[slots], is_live):
            link = self._links.get(number)
            if link is None:
                continue
            if link.emit_last or self.is_whole:
                rows = [r for r in rows if batch.is_last[r]]
                if not rows:
                    continue
            lengths = [1] * len(rows) if link.emit_last or batch.steps == 1 else counts[rows].tolist()
            first = positions[rows]
            if link.emit_last:
                first = first + counts[rows] - 1
            link.sink(
                Answer(
                    self.sessions.handle[slots[rows]].tolist(),
                    first.tolist(),
                    lengths,
                    self._rows(batch, outputs, rows, link.outputs, emit_last=link.emit_last),
                )
            )

    def _keep(self, batch: Batch, outputs: list[Array], positions: Ints, is_live: Bools) -> None:
        """Keep answers of sessions with a replay window: every output and step, whatever their link asks for."""
        for row in np.flatnonzero(is_live).tolist():
            slot = int(batch.slots[row])
            details = self.sessions.details.get(slot)
            if details is not None and details.terms.replay_window:
                count = int(batch.counts[row])
                kept = self._rows(batch, outputs, [row], range(len(outputs)), emit_last=False)
                # A per-sequence output is one row a run: it stands for each of the run's steps.
                kept = [np.broadcast_to(y, (count, *y.shape[1:])) for y in kept]
                self.sessions.keep(slot, Kept(int(positions[row]), count, kept))

    def _rows(
        self, batch: Batch, outputs: list[Array], rows: list[int], wanted: Sequence[int], *, emit_last: bool
    ) -> list[Array]:
        """Cut the rows of some sequences out of the wanted outputs of a run, packed."""
        picked = []
        for y, index in ((outputs[index], index) for index in wanted):
            if not self.is_output_per_step[index]:
                picked.append(y[rows])
            elif batch.steps == 1:
                picked.append(y[rows, 0])
            elif emit_last:
                picked.append(y[rows, batch.counts[rows] - 1])
            else:
                picked.append(y[rows][np.arange(batch.steps) < batch.counts[rows, None]])
        return picked

    def _tell_expired(self, dropped: Dropped, now: float) -> None:
        slot = dropped.slot
        self.sessions.reject(slot, dropped.num_expired + dropped.num_behind)
        expected = int(self.sessions.expected[slot])
        link = self._links.get(int(self.sessions.link[slot]))
        handle = int(self.sessions.handle[slot])
        expired = DeadlineExpired(
            f"steps {expected}..{expected + dropped.num_expired - 1} waited past their timeout and were not run; "
            f"send from {expected}"
        )
        behind = StepAborted(f"queued behind steps whose timeout passed; send from {expected}")
        position = expected
        for count, error in ((dropped.num_expired, expired), (dropped.num_behind, behind)):
            if count:
                self.count_rejected(error)
                if link is not None:
                    link.sink(StepsFailed(handle, position, count, error, expected))
            position += count
        if self.sessions.state[slot] == SessionState.DRAINING:
            self._end(slot, SessionState.CLOSED)
        elif slot in self._detaching:
            self._detach(slot, now)

    def _count_run(self, batch: Batch, seconds: float) -> None:
        rows = len(batch.slots)
        bucket = 1 << (rows - 1).bit_length()
        tally = self.tally
        tally.runs += 1
        tally.run_rows_sum += rows
        tally.run_seconds += seconds
        tally.steps += int(batch.counts.sum())
        tally.run_rows[bucket] = tally.run_rows.get(bucket, 0) + 1

    def count_rejected(self, error: ServiceError) -> None:
        """Count a refusal for the metrics."""
        self.tally.rejected[error.reason] = self.tally.rejected.get(error.reason, 0) + 1


_ANONYMOUS = Terms()


def _ignore(event: Event) -> None:
    """Take the events of a link that is gone."""


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _column(
    messages: list[Steps], given: Callable[[Steps], list[int] | None], default: Callable[[Steps], Ints]
) -> Ints:
    """Join one column of several messages."""
    parts = []
    for message in messages:
        values = given(message)
        parts.append(default(message) if values is None else np.array(values, dtype=np.int64))
    return _joined(parts)


def _segments(payloads: list[Any]) -> list[tuple[Any, slice]]:
    """Group neighbouring rows that share a payload: [(payload, rows)]."""
    segments = []
    start = 0
    for row in range(1, len(payloads) + 1):
        if row == len(payloads) or payloads[row] is not payloads[start]:
            segments.append((payloads[start], slice(start, row)))
            start = row
    return segments


def _by_value(values: Ints, is_live: Bools) -> list[tuple[int, list[int]]]:
    """Group live rows by value: [(value, rows)], rows in their order."""
    groups: dict[int, list[int]] = {}
    for row, (value, live) in enumerate(zip(values.tolist(), is_live.tolist(), strict=True)):
        if live:
            groups.setdefault(value, []).append(row)
    return list(groups.items())
