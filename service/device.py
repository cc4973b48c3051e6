"""Runs of a model on a device that keeps the recurrent state of every live sequence of it.

Laws, beside those of `service.slots`:
    a run is one graph: rows are gathered, advanced and scattered on the device; only inputs and outputs travel
    one call to the device at a time, under one lock: a run, or a read of the slab
    allocate, free and write touch the host alone and never wait, so the loop may call them during a run, for slots that
        are not in it; they note what the device is to write, and the next run or read begins with writing it
    a run that fails before its graph begins leaves the states as they were; after that, those of its slots are lost

It is the same on every device, the CPU included: there it is slower than `service.runner`, and made to be tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, SOURCE_LENGTHS, Layout
from service.backend import Backend, run_failed
from service.devicegraph import (
    SLOTS,
    is_of_slab,
    read_graph,
    rows_name,
    slab_name,
    slots_name,
    step_graph,
    write_graph,
    written_name,
)
from service.errors import ModelBroken, RunFailed, StatesLost
from service.slots import Slots, StateSlab

Array = npt.NDArray[Any]
TOLERANCE = 1e-4
"""Largest difference from a plain run at load: kernels may round, but states that did not move are far off."""


class DeviceRunner:
    """One model, and the slab of its sequences' states on the backend's device."""

    def __init__(self, backend: Backend, capacity: int) -> None:
        """Reserve room for `capacity` slots, at least two, and see that states move.

        Raises ModelBroken for a model that can't have its states there, ConfigError where onnx is not installed,
        RunFailed and MemoryError.
        """
        session = backend.open(step_graph(backend.content, backend.graph))
        self.placement = backend.place(session)
        """Where the nodes run, those that move states included."""
        if astray := [node for node in self.placement.fallbacks if is_of_slab(node.name)]:
            raise ModelBroken(
                f"onnxruntime would copy all states to the host in every run, for {', '.join(map(str, astray))}: "
                "serve with --provider cpu"
            )
        self.slab = DeviceSlab(backend, capacity)
        self._step = Resident(session, self.slab.inputs, self.slab.written, [t.name for t in backend.graph.outputs])
        self._check(backend)

    def run(self, slots: Slots, inputs: Mapping[str, Array], lengths: Array) -> list[Array]:
        """Advance sequences, any thread.

        slots    [batch]
        inputs   per-step ones [batch, time, *row shape], others as the spec says
        lengths  [batch] int32, each in 1..time
        Returns the outputs in the spec's order. Raises RunFailed, leaving the states as they were, and StatesLost.
        """
        with self.slab.lock:
            self.slab.settle()
            self._step.bind({**inputs, LENGTHS: lengths, SLOTS: slots})
            try:
                return self._step.run()
            except RunFailed as error:
                raise StatesLost(f"{error}; the state of every sequence in the run is lost") from error

    def _check(self, backend: Backend) -> None:
        """Run one sequence beside one that rests, and compare with a plain run: no device is taken on trust.

        Were a slab's input and output not the same memory there, the states would stand still without an error.
        """
        states = backend.graph.states
        slots = self.slab.allocate(2)
        rows = [np.full((2, *s.row_shape), 0.5, dtype=s.dtype) for s in states]
        for index, both in enumerate(rows):
            self.slab.write(slots, index, both)
        stepped = (Layout.PER_STEP, Layout.PER_SOURCE_STEP)
        inputs = {
            t.name: np.zeros((1, *((1,) if t.layout in stepped else ()), *t.row_shape), dtype=t.dtype)
            for t in backend.graph.inputs
        }
        if backend.graph.reads_source:
            inputs[SOURCE_LENGTHS] = np.ones(1, dtype=np.int32)
        lengths = np.ones(1, dtype=np.int32)
        found = [*self.run(slots[:1], inputs, lengths), *self.slab.read(slots)]
        outputs, moved = backend.run(inputs, lengths, [both[:1] for both in rows])
        expected = [*outputs, *(np.concatenate([a, b[1:]]) for a, b in zip(moved, rows, strict=True))]
        self.slab.free(slots[::-1])  # the lowest is used first, as ever
        if not all(np.allclose(a, b, atol=TOLERANCE, equal_nan=True) for a, b in zip(found, expected, strict=True)):
            raise ModelBroken(f"states on {backend.device} do not move as they do elsewhere: serve with --provider cpu")


class DeviceSlab:
    """Allocates slots, and has rows written and read on a device. See the laws above."""

    def __init__(self, backend: Backend, capacity: int) -> None:
        """Reserve room for `capacity` slots. Raises MemoryError."""
        states = backend.graph.states
        self.capacity = capacity
        self.lock = Lock()
        """Held during any call to the device."""
        values = [backend.on_device(np.zeros((capacity, *s.row_shape), dtype=s.dtype)) for s in states]
        self.inputs = dict(zip(map(slab_name, states), values, strict=True))
        """onnxruntime's values by the names of a graph's inputs."""
        self.written = dict(zip(map(written_name, states), values, strict=True))
        """The same by the names of outputs."""
        self._states = states
        self._writer = Resident(backend.open(write_graph(states)), self.inputs, self.written, ())
        self._reader = Resident(backend.open(read_graph(states)), self.inputs, {}, [rows_name(s) for s in states])
        self._slots = StateSlab((), capacity)  # which of them are free; it holds no rows
        self._num_touched = 0  # slots below it have been allocated once; the others hold the zeros of the beginning
        self._notes = _Notes(len(states))
        self._noting = Lock()  # held only for as long as it takes to write into a dict

    @property
    def num_free(self) -> int:
        """Slots that can be allocated."""
        return self._slots.num_free

    @property
    def num_allocated(self) -> int:
        """Slots that hold a sequence."""
        return self._slots.num_allocated

    def allocate(self, count: int) -> Slots:
        """Take `count` slots with zero state. Raises Exhausted, changing nothing, when fewer are free."""
        slots = self._slots.allocate(count)
        with self._noting:
            self._notes.zero(slot for slot in slots.tolist() if slot < self._num_touched)
        self._num_touched = max(self._num_touched, int(slots.max(initial=-1)) + 1)
        return slots

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises ValueError for one that is not allocated: a bug of the caller."""
        self._slots.free(slots)

    def write(self, slots: Slots | int, index: int, rows: Array) -> None:
        """Copy rows into one state: [len(slots), *row shape], or one row for one slot."""
        state = self._states[index]
        numbers = np.atleast_1d(slots).tolist()
        copied = np.array(rows, dtype=state.dtype).reshape(len(numbers), *state.row_shape)
        with self._noting:
            self._notes.rows[index].update(zip(numbers, copied, strict=True))

    def read(self, slots: Slots) -> list[Array]:
        """Copy rows out: for each state [len(slots), *row shape]. It waits for a run to end. Raises RunFailed."""
        with self.lock:
            self.settle()
            self._reader.bind({SLOTS: slots})
            return self._reader.run()

    def settle(self) -> None:
        """Write what is noted; the lock is held. Raises RunFailed, and then the notes stand."""
        with self._noting:
            notes, self._notes = self._notes, _Notes(len(self._states))
        if not notes:
            return
        try:
            self._writer.bind(self._rows_of(notes))
            self._writer.run()
        except RunFailed:
            with self._noting:
                self._notes.put_behind(notes)
            raise

    def _rows_of(self, notes: _Notes) -> dict[str, Array]:
        """Inputs of the write graph."""
        inputs: dict[str, Array] = {}
        for state, rows in zip(self._states, notes.rows, strict=True):
            slots = [*(notes.zeroed - rows.keys()), *rows]
            values = np.zeros((len(slots), *state.row_shape), dtype=state.dtype)
            if rows:
                values[-len(rows) :] = list(rows.values())
            inputs[slots_name(state)] = np.array(slots, dtype=np.int64)
            inputs[rows_name(state)] = values
        return inputs


class _Notes:
    """Rows that the device is to write: zeros for some slots, and then single states of some."""

    def __init__(self, num_states: int) -> None:
        self.zeroed: set[int] = set()
        self.rows: list[dict[int, Array]] = [{} for _ in range(num_states)]

    def __bool__(self) -> bool:
        return bool(self.zeroed) or any(self.rows)

    def zero(self, slots: Iterable[int]) -> None:
        """Note zeros for every state of some slots, in place of what was noted for them."""
        for slot in slots:
            self.zeroed.add(slot)
            for rows in self.rows:
                rows.pop(slot, None)

    def put_behind(self, older: _Notes) -> None:
        """Take back older notes, where no newer one has their place."""
        for mine, theirs in zip(self.rows, older.rows, strict=True):
            for slot in theirs.keys() - mine.keys() - self.zeroed:
                mine[slot] = theirs[slot]
        self.zeroed |= older.zeroed


class Resident:
    """Runs of a graph whose slabs stay where they are: each is an input and, at the same address, an output."""

    def __init__(
        self, session: Any, slabs: Mapping[str, Any], written: Mapping[str, Any], outputs: Sequence[str]
    ) -> None:
        """Bind the slabs.

        session  of onnxruntime, as its values are
        slabs    by the names of inputs
        written  by the names of outputs
        outputs  names of those that are answered
        """
        self._session = session
        self._binding = session.io_binding()
        self._outputs = outputs
        self._bind_outputs()  # before the slabs, since get_outputs keeps to the order in which names were first bound
        for name, value in slabs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in written.items():
            self._binding.bind_ortvalue_output(name, value)

    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Copy the other inputs to the device, if they belong there. Raises RunFailed; nothing has run then."""
        try:
            for name, x in inputs.items():
                self._binding.bind_cpu_input(name, x)
            self._binding.synchronize_inputs()  # copies may go by another stream than the run
            self._bind_outputs()
        except Exception as error:
            raise run_failed(error) from error

    def run(self) -> list[Array]:
        """Run, and copy the outputs to the host. Raises RunFailed; rows of slabs may have been written then."""
        try:
            self._session.run_with_iobinding(self._binding)
            return [value.numpy() for value in self._binding.get_outputs()[: len(self._outputs)]]
        except Exception as error:
            raise run_failed(error) from error

    def _bind_outputs(self) -> None:
        """Have memory made for the outputs: the last run's is its caller's, and may be of another shape."""
        for name in self._outputs:
            self._binding.bind_output(name)
