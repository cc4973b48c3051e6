"""Runs of a model on the states of live sequences: gather, compute, scatter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, Layout
from service.backend import Backend, Bound
from service.slots import Slots, StateSlab

Array = npt.NDArray[Any]


class Runner:
    """One model and the slab of its sequences' states.

    Runs of one step, which most are, go through buffers that are made once for the largest batch: a batch of n rows is
    the first n rows of each, bound to the model the first time that n comes.
    """

    def __init__(self, backend: Backend, capacity: int, max_rows: int) -> None:
        """Reserve room.

        capacity  most slots allocated at once
        max_rows  most rows of a run of one step
        """
        graph = backend.graph
        self.slab = StateSlab([(s.row_shape, s.dtype) for s in graph.states], capacity)
        self._backend = backend
        self._max_rows = max_rows
        self._bounds: dict[int, Bound] = {}

        def buffer(dtype: str, shape: tuple[int, ...], layout: Layout = Layout.PER_SEQUENCE) -> Array:
            return np.zeros((max_rows, *((1,) if layout is Layout.PER_STEP else ()), *shape), dtype=dtype)

        self._inputs = {t.name: buffer(t.dtype, t.row_shape, t.layout) for t in graph.inputs}
        self._outputs = {t.name: buffer(t.dtype, t.row_shape, t.layout) for t in graph.outputs}
        self._states = {s.name: buffer(s.dtype, s.row_shape) for s in graph.states}
        self._next_states = {s.next_name: buffer(s.dtype, s.row_shape) for s in graph.states}
        self._ones = np.ones(max_rows, dtype=np.int32)

    def run(self, slots: Slots, inputs: Mapping[str, Array], lengths: Array) -> list[Array]:
        """Advance sequences, any thread, one run at a time; meanwhile other slots may be used.

        slots    [batch]
        inputs   per-step ones [batch, time, *row shape]
        lengths  [batch] int32, each in 1..time
        Returns the outputs in the spec's order. Raises RunFailed, leaving the states as they were.
        """
        num_rows = len(slots)
        if num_rows <= self._max_rows and next(iter(inputs.values())).shape[1] == 1:
            return self._run_step(slots, inputs, num_rows)
        outputs, next_states = self._backend.run(inputs, lengths, self.slab.read(slots))
        self.slab.scatter(slots, next_states)
        return outputs

    def _run_step(self, slots: Slots, inputs: Mapping[str, Array], num_rows: int) -> list[Array]:
        bound = self._bounds.get(num_rows)
        if bound is None:
            bound = self._bounds[num_rows] = self._bind(num_rows)
        for name, x in inputs.items():
            self._inputs[name][:num_rows] = x
        self.slab.gather(slots, [state[:num_rows] for state in self._states.values()])
        bound.run()
        self.slab.scatter(slots, [state[:num_rows] for state in self._next_states.values()])
        return [y[:num_rows].copy() for y in self._outputs.values()]

    def _bind(self, num_rows: int) -> Bound:
        takes = {**self._inputs, **self._states, LENGTHS: self._ones}
        gives = {**self._outputs, **self._next_states}
        return self._backend.bind(
            {name: x[:num_rows] for name, x in takes.items()}, {name: y[:num_rows] for name, y in gives.items()}
        )
