"""Decides which sequences advance together: continuous batching, as a state machine with no clock and no I/O.

An *entry* is one or more steps of one sequence, submitted together; a sequence is known by its slot. A slot's entries
run in the order of submission, never two at once. `next_batch` takes whatever is ready at that moment, at most
`max_rows` slots, in the order in which they became ready; a slot advances at most `max_chunk_steps` per batch and then
goes to the end of the line, so a long entry can't starve a short one. Laws:

    every submitted step is run once, or dropped by cancel or expire: never both, never twice
    a batch holds a slot at most once, and no slot that is in a batch not yet completed
    next_batch returns None only if every queued slot is running (work-conserving)
    the slot that has waited longest is in the batch; one that ran goes to the end of the line, so none waits for ever
    where there is room, a slot is passed over only for being short, at most once for each power of two of steps

Everything is kept in columns, by slot or by entry, so that a batch of 256 costs a few numpy calls, not 256 objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NONE = -1
"""No entry."""
WHOLE_SPREAD = 1.25
"""Whole sequences share a batch if the longest is at most this many times the shortest: padding is computed in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How batches are formed."""

    max_rows: int = 256
    """Most slots in one batch."""
    max_chunk_steps: int = 16
    """Most steps that a slot advances in one batch."""
    whole: bool = False
    """Never cut an entry (a model that needs the whole sequence); batches are grouped by length."""
    max_whole_steps: int = 8_192
    """Most steps of a batch of whole entries, over all rows and beyond the first, so that no run takes long."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to run together; row i belongs to slots[i]."""

    entries: Ints
    slots: Ints
    counts: Ints
    """Steps that each row advances."""
    starts: Ints
    """First row of those steps in the entry's payload."""
    steps: int
    """Largest of counts: rows with fewer are padded to it."""
    is_last: Bools
    """Whether the batch ends the row's entry."""
    payloads: list[Any]
    """What was submitted with each row's entry."""

    def row(self, index: int) -> Batch:
        """Cut one row out, to be run and completed alone."""
        at = slice(index, index + 1)
        return Batch(
            entries=self.entries[at],
            slots=self.slots[at],
            counts=self.counts[at],
            starts=self.starts[at],
            steps=int(self.counts[index]),
            is_last=self.is_last[at],
            payloads=self.payloads[at],
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """Queued steps of one slot that will not run."""

    slot: int
    num_expired: int
    """Steps whose deadline passed."""
    num_behind: int
    """Steps that were queued behind them."""


_ENTRY = np.dtype(
    [("length", "i8"), ("done", "i8"), ("start", "i8"), ("next", "i8"), ("deadline", "f8"), ("payload", "O")]
)


class Scheduler:
    """Queues entries and forms batches."""

    def __init__(self, num_slots: int, config: BatchConfig) -> None:
        self.config = config
        self.num_queued_steps = 0
        """Steps submitted, not yet completed or dropped."""
        self._ready = _Line(num_slots)
        self._first = np.full(num_slots, NONE, dtype=np.int64)
        self._last = np.full(num_slots, NONE, dtype=np.int64)
        self._is_running = np.zeros(num_slots, dtype=bool)
        self._is_doomed = np.zeros(num_slots, dtype=bool)  # cancelled while running
        self._num_deadlines = 0
        self._table = np.zeros(0, dtype=_ENTRY)
        self._free = np.zeros(0, dtype=np.int64)  # a stack of unused rows of the table
        self._num_free = 0

    def submit(
        self,
        slots: Ints,
        lengths: Ints,
        starts: Ints,
        payload: object,
        *,
        deadlines: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Queue one entry for each slot.

        slots      [n], each once
        lengths    [n] steps, at least 1
        starts     [n] first row of each entry in the payload
        payload    whatever the caller needs to find the rows again
        deadlines  [n] entries that have not begun by then are dropped by `expire`; infinity and None never expire
        """
        entries = self._acquire(len(slots))
        self._table["length"][entries] = lengths
        self._table["done"][entries] = 0
        self._table["start"][entries] = starts
        self._table["next"][entries] = NONE
        self._table["payload"][entries] = [payload] * len(slots)
        if deadlines is None:
            self._table["deadline"][entries] = np.inf
        else:
            self._table["deadline"][entries] = deadlines
            self._num_deadlines += int(np.isfinite(deadlines).sum())
        self.num_queued_steps += int(lengths.sum())

        last = self._last[slots]
        is_idle = last == NONE
        self._last[slots] = entries
        if is_idle.all():
            self._first[slots] = entries
            self._ready.push(slots)
        else:
            self._table["next"][last[~is_idle]] = entries[~is_idle]
            self._first[slots[is_idle]] = entries[is_idle]
            self._ready.push(slots[is_idle])

    def next_batch(self) -> Batch | None:
        """Take the next rows to run, or None if nothing is ready. Every batch must be completed."""
        window = self._ready.peek(self.config.max_rows)
        if not len(window):
            return None
        lengths = self._remaining(window)
        if lengths.max() > 1 or self.config.whole:
            window = self._ready.peek(4 * self.config.max_rows)  # more to choose companions from
            chosen, steps = self._choose(self._remaining(window))
        else:
            chosen, steps = None, 1
        slots = self._ready.take(len(window), chosen)
        entries = self._first[slots]
        done = self._table["done"][entries]
        left = self._table["length"][entries] - done
        counts = np.minimum(left, steps)
        self._is_running[slots] = True
        return Batch(
            entries=entries,
            slots=slots,
            counts=counts,
            starts=self._table["start"][entries] + done,
            steps=int(counts.max()),
            is_last=left <= steps,
            payloads=self._table["payload"][entries].tolist(),
        )

    def complete(self, batch: Batch) -> Bools:
        """Account for a batch that was run. Returns [rows]: False for slots that were cancelled meanwhile."""
        entries, slots = batch.entries, batch.slots
        self._is_running[slots] = False
        self._table["done"][entries] += batch.counts
        self.num_queued_steps -= int(batch.counts.sum())
        is_live = ~self._is_doomed[slots]
        ended = batch.is_last
        if not is_live.all():
            self._is_doomed[slots] = False
            cut = entries[~is_live]
            self.num_queued_steps -= int((self._table["length"][cut] - self._table["done"][cut]).sum())
            ended = ended | ~is_live
        over = entries[ended]
        if len(over):
            following = self._table["next"][over]
            self._first[slots[ended]] = following
            self._last[slots[ended][following == NONE]] = NONE
            self._release(over)
            slots = slots[self._first[slots] != NONE]
        self._ready.push(slots)
        return is_live

    def cancel(self, slot: int) -> bool:
        """Drop all that is queued for a slot. Returns whether a batch with it is running.

        The row of a running batch is reported by `complete` as not live; until then the slot must not be reused.
        """
        entry = int(self._first[slot])
        if entry == NONE:
            return False
        is_running = bool(self._is_running[slot])
        if is_running:
            self._is_doomed[slot] = True
            self._drop_from(int(self._table["next"][entry]))
            self._table["next"][entry] = NONE
            self._last[slot] = entry
        else:
            self._ready.remove(slot)
            self._drop_from(entry)
            self._first[slot] = self._last[slot] = NONE
        return is_running

    def expire(self, now: float) -> Sequence[Dropped]:
        """Drop entries whose deadline has passed before they began, and what is queued behind them."""
        if not self._num_deadlines:
            return ()
        ready = self._ready.peek(None)
        entries = self._first[ready]
        late = ready[(self._table["deadline"][entries] <= now) & (self._table["done"][entries] == 0)]
        dropped = []
        for slot in late.tolist():
            num_expired = int(self._table["length"][self._first[slot]])
            before = self.num_queued_steps
            self.cancel(slot)
            dropped.append(Dropped(slot, num_expired, before - self.num_queued_steps - num_expired))
        return dropped

    @property
    def num_ready(self) -> int:
        """Slots that the next batch could take."""
        return len(self._ready)

    def is_busy(self, slot: int) -> bool:
        """Whether steps of a slot are queued or running."""
        return bool(self._first[slot] != NONE)

    def _remaining(self, slots: Ints) -> Ints:
        entries = self._first[slots]
        remaining: Ints = self._table["length"][entries] - self._table["done"][entries]
        return remaining

    def _choose(self, lengths: Ints) -> tuple[Bools, int]:
        """Pick rows that run well together with the first one, which always runs.

        lengths  [window] steps left in each ready slot's entry
        Returns (which rows, steps to advance). Longer entries always join, for as many steps as the first one wants;
        shorter ones join if more than half of those steps are theirs, so padding stays below half of any row.
        """
        first = int(lengths[0])
        if self.config.whole:
            fits = (lengths <= first * WHOLE_SPREAD) & (lengths * WHOLE_SPREAD >= first)
            fits &= lengths * WHOLE_SPREAD >= lengths[fits].max()
            fits &= np.cumsum(lengths * fits) <= self.config.max_whole_steps
            fits[0] = True
            steps = int(lengths[fits].max())
        else:
            steps = min(1 << (first - 1).bit_length(), self.config.max_chunk_steps)
            fits = lengths * 2 > steps
            fits[0] = True
        fits &= np.cumsum(fits) <= self.config.max_rows
        return fits, steps

    def _drop_from(self, entry: int) -> None:
        while entry != NONE:
            following = int(self._table["next"][entry])
            self.num_queued_steps -= int(self._table["length"][entry] - self._table["done"][entry])
            self._release(np.array([entry]))
            entry = following

    def _acquire(self, count: int) -> Ints:
        if count > self._num_free:
            old = len(self._table)
            table = np.zeros(max(256, 2 * old, old + count), dtype=_ENTRY)
            table[:old] = self._table
            unused = self._free[: self._num_free]
            self._num_free += len(table) - old
            self._free = np.zeros(len(table), dtype=np.int64)
            self._free[: self._num_free] = np.concatenate([unused, np.arange(old, len(table))])
            self._table = table
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _release(self, entries: Ints) -> None:
        self._table["payload"][entries] = None
        if self._num_deadlines:
            self._num_deadlines -= int(np.isfinite(self._table["deadline"][entries]).sum())
        self._free[self._num_free : self._num_free + len(entries)] = entries
        self._num_free += len(entries)


class _Line:
    """First-in, first-out line of slots in one array; a slot stands in it at most once."""

    def __init__(self, num_slots: int) -> None:
        self._buffer = np.empty(2 * num_slots, dtype=np.int64)
        self._head = 0
        self._tail = 0

    def __len__(self) -> int:
        return self._tail - self._head

    def push(self, slots: Ints) -> None:
        if self._tail + len(slots) > len(self._buffer):
            kept = self._buffer[self._head : self._tail].copy()
            self._head, self._tail = 0, len(kept)
            self._buffer[: self._tail] = kept
        self._buffer[self._tail : self._tail + len(slots)] = slots
        self._tail += len(slots)

    def peek(self, count: int | None) -> Ints:
        end = self._tail if count is None else min(self._tail, self._head + count)
        return self._buffer[self._head : end]

    def take(self, count: int, chosen: Bools | None) -> Ints:
        """Take the chosen ones (all if None) of the first `count`; the others keep their order."""
        window = self._buffer[self._head : self._head + count]
        if chosen is None:
            self._head += count
            return window.copy()
        taken = window[chosen]
        kept = window[~chosen]
        self._head += len(taken)
        self._buffer[self._head : self._head + len(kept)] = kept
        return taken

    def remove(self, slot: int) -> None:
        line = self._buffer[self._head : self._tail]
        kept = line[line != slot]
        self._tail = self._head + len(kept)
        self._buffer[self._head : self._tail] = kept
