"""One run of a model: what a batch of rows puts in, and what each row gets out."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import GraphSpec, Layout
from service.backend import Backend
from service.constants import Constants
from service.device import DeviceRunner, DeviceSlab
from service.events import Answer, Link
from service.residence import Residence
from service.runner import Runner
from service.scheduler import Batch
from service.sessions import Kept, Session, SessionState
from service.slots import Slots, StateSlab

Array = npt.NDArray[Any]
AnyRunner = Runner | DeviceRunner
"""Keeps the states of live sequences, on the host or on a device, and moves them on."""
AnySlab = StateSlab | DeviceSlab


def make_runner(backend: Backend, capacity: int, max_rows: int, threads: int) -> AnyRunner:
    """Reserve room for the states where the backend wants them. Takes and raises what Runner and DeviceRunner do."""
    return DeviceRunner(backend, capacity) if backend.keeps_states else Runner(backend, capacity, max_rows, threads)


@dataclass(slots=True)
class Run:
    """One run of a model, ready to execute on any thread."""

    runner: AnyRunner
    batch: Batch
    rows: Slots
    """Of the runner's slab."""
    inputs: dict[str, Array]
    lengths: Array

    def execute(self) -> list[Array]:
        """Move the states on and return the outputs. Raises RunFailed; unless it is StatesLost, they did not move."""
        return self.runner.run(self.rows, self.inputs, self.lengths)


class RunMaker:
    """Makes the runs of one model version, and the answers from their outputs."""

    def __init__(
        self,
        backend: Backend,
        runner: AnyRunner,
        max_rows: int,
        residence: Residence | None = None,
        constants: Constants | None = None,
    ) -> None:
        """Make runs of at most `max_rows`.

        residence  knows the slab's rows of slots, which else are the same
        constants  has the inputs that are given once a sequence; None where there are none
        """
        graph: GraphSpec = backend.graph
        self._runner = runner
        self._residence = residence
        self._constants = constants
        self._names = [t.name for t in graph.inputs if t.layout is Layout.PER_STEP]
        self._is_per_step = [t.layout is Layout.PER_STEP for t in graph.outputs]
        self._is_whole = backend.is_whole
        self.ones = np.ones(max_rows, dtype=np.int32)
        """Lengths of a run of one step."""

    def make(self, batch: Batch) -> Run:
        """Gather rows. A batch's payloads are lists of arrays: each per-step input [rows, ...]."""
        num_rows = len(batch.slots)
        slots = np.array(batch.slots, dtype=np.int64)
        lengths = self.ones[:num_rows] if batch.steps == 1 else np.array(batch.counts, dtype=np.int32)
        payloads = batch.payloads
        is_one = len(set(map(id, payloads))) == 1  # payloads are lists of arrays, which == can't compare
        segments = [(payloads[0], slice(0, num_rows))] if is_one else _segments(payloads)
        inputs = {}
        for index, name in enumerate(self._names):
            parts = [self._rows(payload[index], batch, at) for payload, at in segments]
            inputs[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._constants is not None:
            self._constants.gather(slots, inputs)
        if self._residence is not None:
            slots = self._residence.rows(slots)
        return Run(self._runner, batch, slots, inputs, lengths)

    @staticmethod
    def _rows(x: Array, batch: Batch, at: slice) -> Array:
        """Rows of one payload as [rows, steps, ...]; past an entry's end its last step is repeated, as padding."""
        starts, num_rows = batch.starts[at], at.stop - at.start
        if batch.steps == 1:
            if len(x) == num_rows and starts[0] == 0 and starts == list(range(num_rows)):
                return x[:, None]
            return x.take(starts, axis=0)[:, None]
        step = np.minimum(np.arange(batch.steps), np.array(batch.counts[at])[:, None] - 1)
        rows: Array = x.take(np.array(starts)[:, None] + step, axis=0)
        return rows

    def answer(
        self,
        link: Link,
        batch: Batch,
        outputs: Sequence[Array],
        rows: list[int],
        positions: Sequence[int],
        by_slot: Mapping[int, Session],
    ) -> Answer | None:
        """Put a link's rows of a run into one answer; None if the link wants none of them.

        rows       indices of the link's rows in the batch
        positions  [batch] of each row's first step
        by_slot    sessions of the rows
        """
        if link.emit_last or self._is_whole:
            rows = [row for row in rows if batch.is_last[row]]
            if not rows:
                return None
        slots, counts = batch.slots, batch.counts
        if link.emit_last:
            first = [positions[row] + counts[row] - 1 for row in rows]
            lengths = [1] * len(rows)
        else:
            first = [positions[row] for row in rows]
            lengths = [counts[row] for row in rows]
        handles = [by_slot[slots[row]].handle for row in rows]
        cut = self._cut(batch, outputs, rows, link.outputs, emit_last=link.emit_last)
        return Answer(handles, first, lengths, cut, goes_on=not any(batch.is_last[row] for row in rows))

    def keep(
        self,
        batch: Batch,
        outputs: Sequence[Array],
        rows: list[int],
        positions: Sequence[int],
        by_slot: Mapping[int, Session],
    ) -> None:
        """Keep answers of sessions with a replay window: every output and step, whatever their link asks for."""
        for row in rows:
            session = by_slot[batch.slots[row]]
            if session.kept is not None:
                count = batch.counts[row]
                kept = self._cut(batch, outputs, [row], range(len(outputs)), emit_last=False)
                # A per-sequence output is one row a run: it stands for each of the run's steps. They are copied, for a
                # view would keep the whole run's outputs alive.
                kept = [np.broadcast_to(y, (count, *y.shape[1:])).copy() for y in kept]
                session.keep(Kept(positions[row], count, kept))

    def replay(self, session: Session, start: int, stop: int, *, is_entry_whole: bool) -> None:
        """Deliver kept answers of steps [start, stop) again; is_entry_whole: stop - 1 is the last step of its entry."""
        link: Link | None = session.link
        if link is None or (link.emit_last and not is_entry_whole):
            return
        if link.emit_last:
            start = stop - 1
        rows = session.kept_rows(start, stop)
        outputs = [rows[i] if self._is_per_step[i] else rows[i][-1:] for i in link.outputs]
        link.sink(Answer([session.handle], [start], [stop - start], outputs))

    def flatten(self, batch: Batch, outputs: Sequence[Array]) -> list[Array]:
        """Take the axis of time out of per-step outputs of a run of one step: [rows, ...]."""
        if batch.steps > 1:
            return list(outputs)
        return [y[:, 0] if is_per_step else y for y, is_per_step in zip(outputs, self._is_per_step, strict=True)]

    def _cut(
        self, batch: Batch, outputs: Sequence[Array], rows: list[int], wanted: Sequence[int], *, emit_last: bool
    ) -> list[Array]:
        """Cut the rows of some sequences out of the wanted flattened outputs of a run: per-step ones packed."""
        if len(rows) == len(batch.slots):  # rows are in order, each once
            picked = [outputs[index] for index in wanted]
        elif len(rows) == 1:
            picked = [outputs[index][rows[0] : rows[0] + 1] for index in wanted]
        else:
            picked = [outputs[index][rows] for index in wanted]
        if batch.steps == 1:
            return picked
        counts = np.array(batch.counts)[rows]
        if emit_last:
            at = np.arange(len(rows)), counts - 1
            return [y[at] if self._is_per_step[index] else y for y, index in zip(picked, wanted, strict=True)]
        is_real = np.arange(batch.steps) < counts[:, None]
        return [y[is_real] if self._is_per_step[index] else y for y, index in zip(picked, wanted, strict=True)]


def _segments(payloads: list[Any]) -> list[tuple[Any, slice]]:
    """Group neighbouring rows that share a payload: [(payload, rows)]."""
    segments = []
    start = 0
    for row in range(1, len(payloads) + 1):
        if row == len(payloads) or payloads[row] is not payloads[start]:
            segments.append((payloads[start], slice(start, row)))
            start = row
    return segments


def advance(
    batch: Batch, cancelled: Container[int], by_slot: Mapping[int, Session], now: float
) -> tuple[list[int], dict[Link | None, list[int]], list[Session]]:
    """Count the steps of a run that is completed.

    Returns (position of each row's first step, rows of each link, sessions that end when nothing is queued for them).
    """
    positions: list[int] = []
    rows_of: dict[Link | None, list[int]] = {}
    ending = []
    for row, (slot, count) in enumerate(zip(batch.slots, batch.counts, strict=True)):
        if slot in cancelled:
            positions.append(0)
            continue
        session = by_slot[slot]
        position = session.applied
        positions.append(position)
        session.applied = position + count
        session.used_at = now
        link = session.link
        if link in rows_of:
            rows_of[link].append(row)
        else:
            rows_of[link] = [row]
        if session.state is SessionState.DRAINING:
            ending.append(session)
    return positions, rows_of, ending
