"""Predict calls: whole sequences that pass through the scheduler like any others, as many at once as have room."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.spec import Layout
from service.entries import queue_full
from service.errors import TooLong
from service.events import Answer, Closed, Event, Link, StepsFailed
from service.facts import current
from service.inputs import bad_rows, bad_value
from service.lane import Lane
from service.policies import Priority, Turns
from service.sessions import ANONYMOUS, Session, Terms

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Sequences:
    """Whole sequences, checked against the model's shapes."""

    inputs: list[Array]
    """Per-step inputs in the model's order, each [sum(lengths), ...]."""
    lengths: Ints
    """[n] steps, each at least 1."""
    states: list[Array | None]
    """For each state [n, directions, hidden], or None for zeros."""
    outputs: list[int]
    """Outputs to answer, by index."""
    emit_last: bool = False
    return_state: bool = False
    priority: Priority = Priority.NORMAL
    constants: list[Array] = field(default_factory=list)
    """What each sequence is given once, for each of the lane's `constants.tensors`: [n, ...]."""


@dataclass(slots=True)
class Prediction:
    """Outputs of whole sequences."""

    outputs: list[Array]
    """Per-step [sum(lengths), ...], or [n, ...] under emit_last; per-sequence [n, ...]."""
    states: list[Array]
    """Final states [n, directions, hidden]; empty unless asked for."""


class Call(Protocol):
    """Whole sequences that wait for slots."""

    link: Link
    priority: Priority
    width: int
    """Slots that a sequence takes."""
    arrived_at: float
    """When it began to wait."""

    @property
    def is_fed(self) -> bool:
        """Whether every sequence has been begun."""
        ...

    @property
    def num_held(self) -> int:
        """Slots that it holds."""
        ...

    def feed(self, room: int, now: float) -> None:
        """Begin sequences in at most `room` more slots."""
        ...

    def withdraw(self) -> None:
        """Feed no more."""
        ...


class PredictCall:
    """Feeds sequences to a lane as slots come free, and gathers what comes back."""

    def __init__(self, lane: Lane, sequences: Sequences) -> None:
        """Check the values. Raises BadValue, and Overloaded when the lane's queue has no room."""
        self.lane = lane
        self.result: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self.link = Link(
            self._take,
            sequences.outputs,
            emit_last=sequences.emit_last,
            wants_states=sequences.return_state,
            is_predicting=True,
            trace=current().trace,
        )
        self.priority = sequences.priority
        self.width = 1
        self.arrived_at = 0.0
        self._sequences = sequences
        self._starts = np.cumsum(sequences.lengths) - sequences.lengths
        self._num_fed = 0
        self._num_done = 0
        passes = lane.settings.non_finite == "pass"
        for tensor, x in zip(lane.step_inputs, sequences.inputs, strict=True):
            if (is_bad := bad_rows(tensor, x, passes_non_finite=passes)) is not None:
                row = int(np.argmax(is_bad))
                sequence = int(np.searchsorted(self._starts, row, side="right")) - 1
                error = bad_value(tensor, x[row], row - int(self._starts[sequence]))
                error.args = (f"sequence {sequence}: {error}",)
                raise error
        limit = lane.graph.fixed_steps
        if limit is not None and (longest := int(sequences.lengths.max())) > limit:
            raise TooLong(longest, limit=limit)
        num_steps, num = int(sequences.lengths.sum()), len(sequences.lengths)
        if lane.num_queued_steps + num_steps > lane.settings.max_queued_steps:
            raise queue_full(num_steps, lane.num_queued_steps, lane.settings)
        self._outputs = []
        for index in sequences.outputs:
            spec = lane.graph.outputs[index]
            is_packed = spec.layout is Layout.PER_STEP and not sequences.emit_last
            self._outputs.append(np.empty((num_steps if is_packed else num, *spec.row_shape), dtype=spec.dtype))
        self._is_packed = [
            lane.graph.outputs[index].layout is Layout.PER_STEP and not sequences.emit_last
            for index in sequences.outputs
        ]
        self._states = (
            [np.empty((num, *s.row_shape), dtype=s.dtype) for s in lane.graph.states] if sequences.return_state else []
        )
        self._num_waiting_steps = num_steps  # counted last: nothing that can fail comes between this and `withdraw`
        lane.num_waiting_steps += num_steps

    @property
    def is_fed(self) -> bool:
        """Whether every sequence has been queued."""
        return self._num_fed == len(self._starts)

    @property
    def num_held(self) -> int:
        """Sequences that hold a slot."""
        return self._num_fed - self._num_done

    def feed(self, room: int, now: float) -> None:
        """Open, queue and close at most `room` more sequences."""
        part = slice(self._num_fed, self._num_fed + room)
        sequences = self._sequences
        states = [rows if rows is None else rows[part] for rows in sequences.states]
        starts, lengths = self._starts[part].tolist(), sequences.lengths[part].tolist()
        self._num_fed += len(starts)
        self._stop_waiting(sum(lengths))
        constants = [rows[part] for rows in sequences.constants]
        submit_sequences(
            self.lane,
            self.link,
            sequences.inputs,
            starts,
            lengths,
            states,
            now,
            self.priority,
            constants,
            arrived_at=self.arrived_at,
        )

    def withdraw(self) -> None:
        """Feed no more."""
        self._stop_waiting(self._num_waiting_steps)

    def _stop_waiting(self, num_steps: int) -> None:
        self._num_waiting_steps -= num_steps
        self.lane.num_waiting_steps -= num_steps

    def _take(self, event: Event) -> None:
        if isinstance(event, Answer):
            handles = np.array(event.handles)
            lengths = np.array(event.lengths)
            first = self._starts[handles] + event.positions - (np.cumsum(lengths) - lengths)
            rows = np.repeat(first, lengths) + np.arange(lengths.sum()) if any(self._is_packed) else handles
            for out, values, is_packed in zip(self._outputs, event.outputs, self._is_packed, strict=True):
                out[rows if is_packed else handles] = values
        elif isinstance(event, Closed):
            if event.final_states is not None:
                for out, row in zip(self._states, event.final_states, strict=True):
                    out[event.handle] = row
            self._num_done += 1
            if self._num_done == len(self._starts) and not self.result.done():
                self.result.set_result(Prediction(self._outputs, self._states))
        elif isinstance(event, StepsFailed) and not self.result.done():
            self.result.set_exception(event.error)


class CallLine:
    """Calls of one lane with sequences that wait for a slot.

    Calls take turns, from the highest class of priority down. None may hold more slots than it leaves free, so that
    there is room at once for a call that comes later, however many sequences those before it have; but whoever holds
    none gets room for one sequence, if there is any. One that needs more slots than are free is waited for.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._lines: tuple[deque[Call], ...] = tuple(deque() for _ in Priority)
        self._turns = Turns()

    def __bool__(self) -> bool:
        return any(self._lines)

    def append(self, call: Call) -> None:
        """Let a call wait."""
        self._lines[call.priority].append(call)

    def discard(self, call: Call) -> None:
        """Let a call wait no more, if it does."""
        if call in self._lines[call.priority]:
            self._lines[call.priority].remove(call)

    def feed(self, now: float) -> None:
        """Queue sequences of some calls, if there is room."""
        lane = self._lane
        limit = lane.settings.max_predict_sequences
        if not self or lane.num_predicting >= limit:
            return
        waiting = [rank for rank, line in enumerate(self._lines) if line]
        served = set()
        for rank in self._turns.order(waiting):
            line = self._lines[rank]
            for _ in range(len(line)):
                room = limit - lane.num_predicting
                if room < line[0].width:
                    break
                call = line.popleft()
                held = call.num_held
                if (num := max((room - held) // 2, 0 if held else call.width)) >= call.width:
                    call.feed(num, now)
                    served.add(rank)
                if not call.is_fed:
                    line.append(call)
            else:
                line.rotate(-1)  # another one is the first to choose next time
        self._turns.end(waiting, sorted(served))


def submit_sequences(
    lane: Lane,
    link: Link,
    inputs: list[Array],
    starts: list[int],
    lengths: list[int],
    states: Sequence[Array | None],
    now: float,
    priority: Priority = Priority.NORMAL,
    constants: Sequence[Sequence[Array] | Array] = (),
    *,
    arrived_at: float | None = None,
) -> None:
    """Open, queue and close whole sequences; their handles count on from link.num_opened.

    inputs      per-step inputs, packed; starts and lengths [n] say which rows
    states      for each state [n, *row shape] or None for zeros
    constants   for each of lane.constants.tensors [n, ...]
    arrived_at  when the call that they are of began to wait; None: now
    """
    sessions = open_sequences(lane, link, len(starts), states, now, priority, constants)
    for session, length in zip(sessions, lengths, strict=True):
        session.expected = length
        lane.sessions.drain(session)
    arrived = [now if arrived_at is None else arrived_at] * len(sessions)
    lane.scheduler.submit([session.slot for session in sessions], lengths, starts, inputs, arrived=arrived)


def open_sequences(
    lane: Lane,
    link: Link,
    count: int,
    states: Sequence[Array | None],
    now: float,
    priority: Priority,
    constants: Sequence[Sequence[Array] | Array],
) -> list[Session]:
    """Open anonymous sessions of a call, with nothing queued: see `submit_sequences`."""
    terms = ANONYMOUS if priority is Priority.NORMAL else Terms(priority=priority)
    slots = lane.slab.allocate(count)
    lane.begin(slots.tolist())
    for index, rows in enumerate(states):
        if rows is not None:
            lane.slab.write(slots, index, rows)
    numbers = slots.tolist()
    if lane.constants is not None:
        lane.constants.put(numbers, constants)
    sessions = []
    for slot in numbers:
        session = lane.sessions.open(slot, link, link.num_opened, terms, now)
        link.members.add(session)
        link.num_opened += 1
        sessions.append(session)
    if priority is not Priority.NORMAL:
        for slot in numbers:
            lane.scheduler.prioritize(slot, priority)
    lane.num_predicting += len(numbers)
    lane.tally.sequences += len(numbers)
    return sessions
