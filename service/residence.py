"""The states of more sessions than memory is to hold: those that have not run for longest lie in a store.

A slot is a sequence's for its life; a row of the slab is its only while its state is in memory. Laws, beside those of
`service.slots`:

    a slot's state is in a row or in the store, and has the same bits wherever it was
    at most max_resident slots have a row, those of sequences that stay aside
    a slot that is running keeps its row; of the others, those go to the store first that last ran longest ago
    a slot that stays never goes
    what can't be written stays in its row; only a state that can't be read back is lost, and no other with it

Runs note when they used a row, all of a run at once. To find who goes, a fraction of the rows, the oldest, is put in
order; they go from the front, except for those that have run since. So nothing is paid per step, and looking at every
row is paid for by the many that go before it happens again. At most `most_moved` states move at a time: the event loop
waits for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.spec import StateSpec
from service.errors import Overloaded, RunFailed, ServiceError, SpillFailed, SpillLost
from service.slots import Slots, StateSlab
from service.spill import SpillStore
from service.tally import Tally

Array = npt.NDArray[Any]
MOVED_ROWS = 64
"""Most states moved at a time, each way."""
MOVED_BYTES = 256 * 1024
"""Most bytes of them, of more than one."""
SWEPT_ROWS = 128
"""Most rows of the store deleted at a time."""
ORDERED_FRACTION = 8
"""The oldest 1/8 of the rows are put in order at a time."""
RETRY_S = 0.25
_NO_ROW = -1


class Rows(Protocol):
    """What a residence needs of a slab: see service.slots."""

    capacity: int

    def allocate(self, count: int) -> Slots: ...  # noqa: D102
    def free(self, slots: Slots) -> None: ...  # noqa: D102
    def read(self, slots: Slots) -> list[Array]: ...  # noqa: D102
    def write(self, slots: Slots | int, index: int, rows: Array) -> None: ...  # noqa: D102


class Residence:
    """Allocates slots, keeps the states of some in a slab, and moves others to a store and back."""

    def __init__(
        self,
        slab: Rows,
        states: Sequence[StateSpec],
        capacity: int,
        max_resident: int,
        store: SpillStore,
        is_running: Callable[[int], bool],
        tally: Tally,
    ) -> None:
        """Begin with every slot free.

        slab        holds max_resident rows, and as many more as sequences stay at once
        states      of the model, in its order
        capacity    most slots allocated at once
        is_running  whether a run with a slot was made and is not completed
        """
        self.capacity = capacity
        self.max_resident = max_resident
        self.num_resident = 0
        """Slots that have a row, those that stay aside."""
        self._slab = slab
        self._store = store
        self._base = store.add_lane()
        self._is_running = is_running
        self._tally = tally
        self._slots = StateSlab((), capacity)  # which of them are free; it holds no rows
        self._row_of = np.full(capacity, _NO_ROW, dtype=np.int64)
        self._slot_of = np.zeros(slab.capacity, dtype=np.int64)
        self._may_go = np.zeros(slab.capacity, dtype=bool)
        self._used = np.zeros(slab.capacity, dtype=np.int64)  # the number of the last run of a row, by row
        self._now = 0  # counts runs
        self._oldest: deque[tuple[int, int]] = deque()  # (row, when it had run last), in that order
        self._spilled: set[int] = set()
        self._stale: set[int] = set()  # slots with a row in the store that is nobody's state any more
        self._layout = [(s.row_shape, np.dtype(s.dtype)) for s in states]
        self._row_bytes = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in self._layout)
        self.most_moved = max(1, min(MOVED_ROWS, MOVED_BYTES // max(1, self._row_bytes)))
        """Most states moved at a time, each way."""

    @property
    def num_allocated(self) -> int:
        """Slots that hold a sequence."""
        return self._slots.num_allocated

    @property
    def num_spilled(self) -> int:
        """Slots whose state is in the store."""
        return len(self._spilled)

    @property
    def num_stale(self) -> int:
        """Rows of the store that are nobody's state any more, and not yet deleted."""
        return len(self._stale)

    # ---- as service.slots -------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> Slots:
        """Take `count` slots with zero state that stay in memory. Raises Exhausted, changing nothing."""
        slots = self._slots.allocate(count)
        self._settle(slots, self._slab.allocate(count), may_go=False)
        return slots

    def admit(self) -> int:
        """Take a slot with zero state, in memory until others need the room.

        Raises Exhausted when none is free, Overloaded when too many run, and SpillFailed; none changes anything.
        """
        if self._make_room(1) < 1:
            raise Overloaded(
                f"the states of all {self.num_resident} sessions in memory are in use, the limit "
                f"(max_resident_sessions) is {self.max_resident}; ask again after a while",
                retry_after_s=RETRY_S,
            )
        slots = self._slots.allocate(1)
        self._settle(slots, self._slab.allocate(1), may_go=True)
        return int(slots[0])

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises ValueError for one that is not allocated: a bug of the caller."""
        self._slots.free(slots)
        rows = self._row_of[slots]
        self._leave(rows[rows != _NO_ROW])
        for slot in slots[rows == _NO_ROW].tolist():
            self._spilled.remove(slot)
            self._stale.add(slot)

    def read(self, slots: Slots) -> list[Array]:
        """Copy states out, from memory or the store: for each [len(slots), *row shape]. Raises SpillLost."""
        rows = self._row_of[slots]
        if (rows != _NO_ROW).all():
            return self._slab.read(rows)
        return self._unpack(
            [
                self._load(slot) if row == _NO_ROW else self._pack(self._slab.read(np.array([row])))[0]
                for slot, row in zip(slots.tolist(), rows.tolist(), strict=True)
            ]
        )

    def write(self, slots: Slots | int, index: int, rows: Array) -> None:
        """Write one state of slots that are in memory, as just allocated ones are."""
        at = self._row_of[slots]
        if np.any(at == _NO_ROW):
            raise ValueError("a state is written that is not in memory")
        self._slab.write(at, index, rows)

    # ---- runs -------------------------------------------------------------------------------------------------------

    def holds(self, slots: Slots) -> bool:
        """Whether the states of all are in memory."""
        return not self._spilled or bool((self._row_of[slots] != _NO_ROW).all())

    def rows(self, slots: Slots) -> Slots:
        """Find the slab's rows of slots that are about to run; all are in memory."""
        rows = self._row_of[slots]
        if (rows == _NO_ROW).any():
            raise ValueError("a run is made of states that are not in memory")
        self._now += 1
        self._used[rows] = self._now
        return rows

    def absent(self, slots: list[int]) -> list[int]:
        """Find those whose state is not in memory."""
        return [slot for slot in slots if slot in self._spilled] if self._spilled else []

    def bring_back(self, slots: list[int]) -> dict[int, ServiceError | None]:
        """Bring absent states back into memory, as many as may move at a time and have room.

        Returns those that have come (None), and those that can't (SpillFailed, SpillLost). Others may come later: when
        these have run, or when the runs that are under way are completed.
        """
        outcome: dict[int, ServiceError | None] = {}
        slots = slots[: self.most_moved]
        try:
            num_coming = self._make_room(len(slots))
        except SpillFailed as error:
            num_coming = self.max_resident - self.num_resident
            outcome.update(dict.fromkeys(slots[num_coming:], error))
        came, data = [], []
        for slot in slots[:num_coming]:
            try:
                data.append(self._load(slot))
            except SpillLost as error:
                outcome[slot] = error
            else:
                came.append(slot)
        if came:
            rows = self._slab.allocate(len(came))
            for index, values in enumerate(self._unpack(data)):
                self._slab.write(rows, index, values)
            self._settle(np.array(came), rows, may_go=True)
            self._spilled.difference_update(came)
            self._stale.update(came)
            self._tally.restores += len(came)
            outcome.update(dict.fromkeys(came))
        return outcome

    def sweep(self) -> None:
        """Delete from the store some of what is nobody's state any more."""
        if not self._stale:
            return
        slots = [slot for slot, _ in zip(self._stale, range(SWEPT_ROWS), strict=False)]
        try:
            self._store.delete([self._base + slot for slot in slots])
        except SpillFailed:  # the next time
            self._tally.spill_errors += 1
        else:
            self._stale.difference_update(slots)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _settle(self, slots: Slots, rows: Slots, *, may_go: bool) -> None:
        """Give slots their rows."""
        self._now += 1
        self._row_of[slots] = rows
        self._slot_of[rows] = slots
        self._used[rows] = self._now
        if may_go:
            self._may_go[rows] = True
            self.num_resident += len(rows)

    def _leave(self, rows: Slots) -> None:
        """Take rows from their slots."""
        self.num_resident -= int(np.count_nonzero(self._may_go[rows]))
        self._row_of[self._slot_of[rows]] = _NO_ROW
        self._may_go[rows] = False
        self._slab.free(rows)

    def _make_room(self, count: int) -> int:
        """Spill until `count` more states have room, and some more. Returns the room, less where too many run.

        Raises SpillFailed, changing nothing.
        """
        missing = self.num_resident + count - self.max_resident
        if missing > 0:
            some_more = min(self.most_moved, self.max_resident // ORDERED_FRACTION)
            self._spill(self._choose(max(missing, some_more)))
        return self.max_resident - self.num_resident

    def _choose(self, count: int) -> list[int]:
        """Take rows that may go out of line, those that have not run for longest: `count`, less where too many run."""
        chosen: dict[int, None] = {}
        running: list[tuple[int, int]] = []
        for num_ordered in (0, count + self.num_resident // ORDERED_FRACTION, self.num_resident):
            if num_ordered:
                self._order(num_ordered)
                running.clear()
            while self._oldest and len(chosen) < count:
                row, used = self._oldest.popleft()
                if not self._may_go[row] or self._used[row] != used or row in chosen:
                    continue
                if self._is_running(int(self._slot_of[row])):
                    running.append((row, used))
                else:
                    chosen[row] = None
            if len(chosen) == count:
                break
        self._oldest.extendleft(reversed(running))
        return list(chosen)

    def _order(self, count: int) -> None:
        """Put the oldest `count` rows that may go in order."""
        rows = np.flatnonzero(self._may_go)
        used = self._used[rows]
        if count < len(rows):
            first = np.argpartition(used, count)[:count]
            rows, used = rows[first], used[first]
        order = np.argsort(used)
        self._oldest = deque(zip(rows[order].tolist(), used[order].tolist(), strict=True))

    # ---- the store --------------------------------------------------------------------------------------------------

    def _spill(self, rows: list[int]) -> None:
        """Move rows to the store. Raises SpillFailed, changing nothing."""
        if not rows:
            return
        at = np.array(rows)
        slots = self._slot_of[at].tolist()
        try:
            data = self._pack(self._slab.read(at))
            self._store.put([(self._base + slot, row) for slot, row in zip(slots, data, strict=True)])
        except RunFailed as error:  # of a device
            self._oldest.clear()  # they are the oldest still
            raise SpillFailed(f"{error}; send again after a while", retry_after_s=RETRY_S) from error
        except SpillFailed:
            self._oldest.clear()
            self._tally.spill_errors += 1
            raise
        self._leave(at)
        self._spilled.update(slots)
        self._stale.difference_update(slots)
        self._tally.spills += len(slots)

    def _load(self, slot: int) -> bytes:
        try:
            return self._store.get(self._base + slot, self._row_bytes)
        except SpillLost:
            self._tally.spill_errors += 1
            raise

    def _pack(self, values: Sequence[Array]) -> list[bytes]:
        """Put what is one slot's together: for each row of the states, its bytes."""
        flat = [np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8) for rows in values]
        data, size = np.concatenate(flat, axis=1).tobytes(), self._row_bytes
        return [data[start : start + size] for start in range(0, len(data), size)]

    def _unpack(self, data: Sequence[bytes]) -> list[Array]:
        """The inverse of _pack."""
        matrix = np.frombuffer(b"".join(data), np.uint8).reshape(len(data), self._row_bytes)
        values, start = [], 0
        for shape, dtype in self._layout:
            stop = start + dtype.itemsize * int(np.prod(shape))
            values.append(np.ascontiguousarray(matrix[:, start:stop]).view(dtype).reshape(len(data), *shape))
            start = stop
        return values
