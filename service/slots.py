"""The recurrent state of every live sequence of one model: one row a slot, one array a state.

Laws:
    a slot is either free or allocated; allocating more than are free raises and changes nothing
    a newly allocated slot's rows are zeros
    read(slots) after scatter(slots, values) gives values, bit for bit; other rows don't change

The arrays are made at full capacity. They come from the operating system as untouched zero pages, so a slot that was
never used costs no memory, and there is no growing, hence no pause for it. The lowest slots are used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import Exhausted

Array = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]
"""Slot numbers, one a row, each at most once."""


class StateSlab:
    """Allocates slots and moves their rows in and out in batches."""

    def __init__(self, states: Sequence[tuple[tuple[int, ...], str]], capacity: int) -> None:
        """Reserve room.

        states    (row shape, dtype name) of each state, in the model's order
        capacity  most slots allocated at once
        """
        self.capacity = capacity
        self._arrays = [np.zeros((capacity, *shape), dtype=dtype) for shape, dtype in states]
        self._returned: list[int] = []  # freed before, used first
        self._num_touched = 0  # slots below it have been allocated once
        self._is_allocated = bytearray(capacity)  # most calls are about one slot, which numpy is slow for

    @property
    def num_free(self) -> int:
        """Slots that can be allocated."""
        return self.capacity - self._num_touched + len(self._returned)

    @property
    def num_allocated(self) -> int:
        """Slots that hold a sequence."""
        return self.capacity - self.num_free

    def allocate(self, count: int) -> Slots:
        """Take `count` slots with zero state. Raises Exhausted, changing nothing, when fewer are free."""
        if count > self.num_free:
            raise Exhausted(f"{count} sequences need state, room for {self.num_free} of {self.capacity} is left")
        reused = [self._returned.pop() for _ in range(min(count, len(self._returned)))]
        fresh = range(self._num_touched, self._num_touched + count - len(reused))
        self._num_touched = fresh.stop
        for slot in (*reused, *fresh):
            self._is_allocated[slot] = True
        if reused:
            for array in self._arrays:
                array[reused] = 0  # fresh ones are zero pages
        return np.array([*reused, *fresh], dtype=np.int64)

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises ValueError for one that is not allocated: a bug of the caller."""
        numbers = slots.tolist()
        if not all(self._is_allocated[slot] for slot in numbers) or len(set(numbers)) != len(numbers):
            raise ValueError(f"slots freed that are not allocated: {numbers}")
        for slot in numbers:
            self._is_allocated[slot] = False
        self._returned.extend(numbers)

    def read(self, slots: Slots) -> list[Array]:
        """Copy rows out: for each state [len(slots), *row shape], in the order of slots."""
        return [array.take(slots, axis=0) for array in self._arrays]

    def gather(self, slots: Slots, buffers: Sequence[Array]) -> None:
        """Copy rows out, into one buffer [len(slots), *row shape] a state."""
        for array, buffer in zip(self._arrays, buffers, strict=True):
            array.take(slots, axis=0, out=buffer, mode="clip")  # any other mode fills a copy of the buffer first

    def scatter(self, slots: Slots, values: Sequence[Array]) -> None:
        """Copy rows in: the inverse of gather."""
        for array, rows in zip(self._arrays, values, strict=True):
            array[slots] = rows

    def write(self, slots: Slots | int, index: int, rows: Array) -> None:
        """Copy rows into one state: [len(slots), *row shape], or one row for one slot."""
        self._arrays[index][slots] = rows
