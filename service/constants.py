"""What a sequence is given once, beside its steps: by slot, for as long as the sequence lasts.

Of fixed shape are the per-sequence inputs of a graph: a row of an array for each slot. What a decoder reads of its
source has a row for every step of it; runs pad it to the longest source among their rows. Laws:

    gather(slots) gives what was put for each slot, bit for bit, and zeros past the end of a source
    slots may share a source: it is kept once, and until the last of them is dropped
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import SOURCE_LENGTHS, GraphSpec, Layout, TensorSpec
from service.slots import Slots

Array = npt.NDArray[Any]


class Constants:
    """Rows of every slot."""

    def __init__(self, graph: GraphSpec, num_slots: int) -> None:
        """Reserve room; pages that were never written take no memory."""
        self.tensors = self.of(graph)
        """Inputs that are given once a sequence, in the graph's order."""
        self.names = [t.name for t in self.tensors]
        self._fixed = [
            None if t.layout is Layout.PER_SOURCE_STEP else np.zeros((num_slots, *t.row_shape), dtype=t.dtype)
            for t in self.tensors
        ]
        self._sources: dict[int, list[Array]] = {}  # of the other ones [source time, *row shape], by slot

    @staticmethod
    def of(graph: GraphSpec) -> list[TensorSpec]:
        """Inputs of a graph that are given once a sequence."""
        return [t for t in graph.inputs if t.layout in (Layout.PER_SEQUENCE, Layout.PER_SOURCE_STEP)]

    def put(self, slots: Sequence[int], rows: Sequence[Sequence[Array] | Array]) -> None:
        """Keep what some sequences are given.

        rows  for each of `tensors`, one entry a slot: [*row shape], or [source time, *row shape] of a source
        """
        sources = []
        for array, given in zip(self._fixed, rows, strict=True):
            if array is None:
                sources.append(given)
            else:
                array[slots] = given
        if sources:
            for index, slot in enumerate(slots):
                self._sources[slot] = [given[index] for given in sources]

    def read(self, slot: int) -> list[Array]:
        """Copy what a slot was given: for each of `tensors`, as `put` takes it for one sequence."""
        sources = iter(self._sources.get(slot, ()))
        return [next(sources) if array is None else array[slot].copy() for array in self._fixed]

    def drop(self, slots: Iterable[int]) -> None:
        """Let go of what is kept for some slots."""
        for slot in slots:
            self._sources.pop(slot, None)

    def gather(self, slots: Slots, inputs: dict[str, Array]) -> None:
        """Add inputs by name: [rows, *row shape]; of sources [rows, longest, *row shape], and SOURCE_LENGTHS."""
        sources = [self._sources[slot] for slot in slots.tolist()] if self._sources else []
        at = 0
        for tensor, array in zip(self.tensors, self._fixed, strict=True):
            if array is not None:
                inputs[tensor.name] = array.take(slots, axis=0)
                continue
            if not at:
                lengths = np.array([len(source[0]) for source in sources], dtype=np.int32)
                inputs[SOURCE_LENGTHS] = lengths
            padded = np.zeros((len(slots), lengths.max(), *tensor.row_shape), dtype=tensor.dtype)
            for row, source in zip(padded, sources, strict=True):
                row[: len(source[at])] = source[at]
            inputs[tensor.name] = padded
            at += 1
