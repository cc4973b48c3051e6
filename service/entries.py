"""Steps of several messages, joined into columns: what is queued together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import TensorSpec
from service.config import Settings
from service.errors import Exhausted, Overloaded, ServiceError, TooLong
from service.events import NEVER, Steps
from service.inputs import bad_entries
from service.sessions import Session

Array = npt.NDArray[Any]
OVERLOAD_RETRY_S = 0.25
RowType = tuple[np.dtype[Any], tuple[int, ...]]
"""(dtype, (-1, *row shape)) of one per-step input."""


@dataclass(slots=True)
class Entries:
    """One or more steps of each of some sessions; entry i is sessions[i], lengths[i] and so on."""

    sessions: list[Session]
    lengths: list[int]
    starts: list[int]
    """First row of each entry in every input."""
    positions: list[int | None] | None
    """Of first steps; None counts on from what was sent."""
    deadlines: list[float] | None
    """None: no entry has one."""
    inputs: list[Array]
    """Per-step inputs in the model's order, each [sum(lengths), ...]."""
    arrived: list[float] = field(default_factory=list)
    """When each entry came."""

    def skip(self, skips: dict[int, int]) -> None:
        """Leave out leading steps of some entries, and entries of which nothing is left."""
        left = [index for index, length in enumerate(self.lengths) if skips.get(index, 0) < length]
        self.sessions = [self.sessions[index] for index in left]
        self.starts = [self.starts[index] + skips.get(index, 0) for index in left]
        self.lengths = [self.lengths[index] - skips.get(index, 0) for index in left]
        if self.positions is not None:
            self.positions = [self.positions[index] for index in left]
        if self.deadlines is not None:
            self.deadlines = [self.deadlines[index] for index in left]
        self.arrived = [self.arrived[index] for index in left]

    def faults(self, tensors: Sequence[TensorSpec], settings: Settings, num_queued: int) -> dict[int, ServiceError]:
        """Find entries that the queue has no room for, or with values that the model must not see."""
        faults: dict[int, ServiceError] = {}
        room = settings.max_queued_steps - num_queued
        if len(self.inputs[0]) > room:
            sums = enumerate(accumulate(self.lengths))
            faults = {i: queue_full(self.lengths[i], num_queued, settings) for i, sum_ in sums if sum_ > room}
        passes = settings.non_finite == "pass"
        return bad_entries(tensors, self.inputs, self.starts, passes_non_finite=passes) | faults

    def too_long(self, limit: int) -> dict[int, ServiceError]:
        """Find entries that make a sequence longer than a model's fixed steps."""
        given = self.positions or [None] * len(self.sessions)
        starts = [session.sent if at is None else at for session, at in zip(self.sessions, given, strict=True)]
        ends = [start + length for start, length in zip(starts, self.lengths, strict=True)]
        return {index: TooLong(end, limit=limit) for index, end in enumerate(ends) if end > limit}


def queue_full(num_steps: int, num_queued: int, settings: Settings) -> Exhausted:
    """Say that the queue of a model has no room for so many steps, now or ever."""
    limit = settings.max_queued_steps
    if num_steps > limit:
        return Exhausted(f"{num_steps} steps at once, the limit (max_queued_steps) is {limit}; send fewer at once")
    return Overloaded(
        f"{num_queued} steps are queued for this model, the limit (max_queued_steps) is {limit}; send again later",
        retry_after_s=OVERLOAD_RETRY_S,
    )


def join(messages: list[Steps], sessions: list[Session], row_types: Sequence[RowType]) -> Entries:
    """Join messages; sessions are theirs, end to end, each once."""
    if all(message.lengths is None for message in messages):
        lengths, starts = [1] * len(sessions), list(range(len(sessions)))
    else:
        lengths = [n for message in messages for n in message.lengths or [1] * len(message.sessions)]
        starts = [0, *accumulate(lengths)][:-1]
    positions: list[int | None] | None = None
    if any(message.positions is not None for message in messages):
        positions = []
        for message in messages:
            positions.extend(message.positions or [None] * len(message.sessions))
    deadlines = None
    if any(message.deadline != NEVER for message in messages):
        deadlines = [message.deadline for message in messages for _ in message.sessions]
    inputs = []
    for index, (dtype, shape) in enumerate(row_types):
        data = messages[0].inputs[index] if len(messages) == 1 else b"".join([m.inputs[index] for m in messages])
        inputs.append(np.frombuffer(data, dtype).reshape(shape))
    arrived = [message.arrived_at for message in messages for _ in message.sessions]
    return Entries(sessions, lengths, starts, positions, deadlines, inputs, arrived)


class Gathered:
    """Steps of sequences that a model needs as a whole, until all of each has come."""

    def __init__(self) -> None:
        self.num_steps = 0
        """Steps of all sequences."""
        self._parts: dict[Session, list[list[Array]]] = {}

    def add(self, entries: Entries) -> None:
        """Put more steps behind those of their sessions."""
        for session, start, length in zip(entries.sessions, entries.starts, entries.lengths, strict=True):
            self._parts.setdefault(session, []).append([x[start : start + length] for x in entries.inputs])
            self.num_steps += length

    def take(self, session: Session) -> list[Array]:
        """Take all steps of a session out: each input [steps, ...]; nothing if there are none."""
        parts = self._parts.pop(session, [])
        inputs = [np.concatenate(column) for column in zip(*parts, strict=True)]
        self.num_steps -= len(inputs[0]) if inputs else 0
        return inputs
