"""Runs of a model on the states of live sequences: gather, compute, scatter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, Layout
from service.backend import Backend, Bound
from service.slots import Slots, StateSlab
from service.splitting import Splitter, spans

Array = npt.NDArray[Any]


class Runner:
    """One model and the slab of its sequences' states.

    Runs of one step, which most are, go through buffers that are made once for the largest batch: rows [i, j) of each
    are bound to the model the first time that they are needed.
    """

    def __init__(self, backend: Backend, capacity: int, max_rows: int, threads: int = 1) -> None:
        """Reserve room.

        capacity  most slots allocated at once
        max_rows  most rows of a run of one step
        threads   most threads that a batch may be split over
        """
        graph = backend.graph
        self.slab = StateSlab([(s.row_shape, s.dtype) for s in graph.states], capacity)
        self._backend = backend
        self._step_input = next((t.name for t in graph.inputs if t.layout is Layout.PER_STEP), None)
        self._has_buffers = not graph.reads_source and graph.fixed_steps is None  # else shapes differ
        self._max_rows = max_rows
        self._splitter = Splitter(threads) if threads > 1 else None
        self._helpers = ThreadPoolExecutor(threads - 1, "rnnserve-part") if threads > 1 else None
        self._bounds: dict[tuple[int, int], Bound] = {}

        def buffer(dtype: str, shape: tuple[int, ...], layout: Layout = Layout.PER_SEQUENCE) -> Array:
            return np.zeros((max_rows, *((1,) if layout is Layout.PER_STEP else ()), *shape), dtype=dtype)

        self._inputs = {t.name: buffer(t.dtype, t.row_shape, t.layout) for t in graph.inputs}
        self._outputs = {t.name: buffer(t.dtype, t.row_shape, t.layout) for t in graph.outputs}
        self._states = {s.name: buffer(s.dtype, s.row_shape) for s in graph.states}
        self._next_states = {s.next_name: buffer(s.dtype, s.row_shape) for s in graph.states}
        self._ones = np.ones(max_rows, dtype=np.int32)

    def run(self, slots: Slots, inputs: Mapping[str, Array], lengths: Array) -> list[Array]:
        """Advance sequences, on any thread, one run at a time; meanwhile other slots may be used.

        slots    [batch]
        inputs   per-step ones [batch, time, *row shape], others as the spec says
        lengths  [batch] int32, each in 1..time
        Returns the outputs in the spec's order. Raises RunFailed, leaving the states as they were.
        """
        num_rows = len(slots)
        num_steps = int(lengths.max()) if self._step_input is None else inputs[self._step_input].shape[1]
        if num_steps == 1 and num_rows <= self._max_rows and self._has_buffers:
            return self._run_step(slots, inputs, num_rows)
        states = self.slab.read(slots)

        def compute(start: int, stop: int) -> tuple[list[Array], list[Array]]:
            rows = {name: x[start:stop] for name, x in inputs.items()}
            return self._backend.run(rows, lengths[start:stop], [state[start:stop] for state in states])

        parts = self._split(num_rows, num_steps, compute)
        outputs, next_states = (_joined([part[side] for part in parts]) for side in (0, 1))
        self.slab.scatter(slots, next_states)
        return outputs

    def _run_step(self, slots: Slots, inputs: Mapping[str, Array], num_rows: int) -> list[Array]:
        for name, x in inputs.items():
            self._inputs[name][:num_rows] = x
        self.slab.gather(slots, [state[:num_rows] for state in self._states.values()])
        self._split(num_rows, 1, lambda start, stop: self._bound(start, stop).run())
        self.slab.scatter(slots, [state[:num_rows] for state in self._next_states.values()])
        return [y[:num_rows].copy() for y in self._outputs.values()]

    def _split(self, num_rows: int, num_steps: int, compute: Callable[[int, int], Any]) -> list[Any]:
        """Compute rows [0, num_rows) in as many parts as pays, each on a thread. Returns what each part gave."""
        if self._splitter is None or self._helpers is None:
            return [compute(0, num_rows)]
        parts = self._splitter.choose(num_rows, num_steps)
        began = time.perf_counter()
        first, *others = spans(num_rows, parts)
        helped = [self._helpers.submit(compute, *span) for span in others]
        try:
            results = [compute(*first)]
        finally:
            errors = [future.exception() for future in helped]  # none may still run when this returns
        for error in errors:
            if error is not None:
                raise error
        results += [future.result() for future in helped]
        self._splitter.learn(num_rows, num_steps, parts, time.perf_counter() - began)
        return results

    def _bound(self, start: int, stop: int) -> Bound:
        bound = self._bounds.get((start, stop))
        if bound is None:
            takes = {**self._inputs, **self._states, LENGTHS: self._ones}
            gives = {**self._outputs, **self._next_states}
            bound = self._bounds[start, stop] = self._backend.bind(
                {name: x[start:stop] for name, x in takes.items()}, {name: y[start:stop] for name, y in gives.items()}
            )
        return bound


def _joined(parts: list[list[Array]]) -> list[Array]:
    """Join arrays of each part [rows of the part, ...] into arrays of all rows."""
    return parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
