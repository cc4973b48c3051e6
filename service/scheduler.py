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

Columns are plain lists, by slot and by row: most batches are small, and below some dozens of rows a loop over Python
ints costs less than the calls into numpy that would replace it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

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


Entry = tuple[int, int, Any, float]
"""(length, first row in the payload, payload, deadline) of steps that were submitted together: a plain tuple, since one
is made for every step of every session."""


@dataclass(slots=True)
class Batch:
    """Rows to run together; row i belongs to slots[i]."""

    slots: list[int]
    counts: list[int]
    """Steps that each row advances."""
    starts: list[int]
    """First row of those steps in the entry's payload."""
    steps: int
    """Largest of counts: rows with fewer are padded to it."""
    is_last: list[bool]
    """Whether the batch ends the row's entry."""
    payloads: list[Any]
    """What was submitted with each row's entry."""

    def row(self, index: int) -> Batch:
        """Cut one row out, to be run and completed alone."""
        return Batch(
            slots=[self.slots[index]],
            counts=[self.counts[index]],
            starts=[self.starts[index]],
            steps=self.counts[index],
            is_last=[self.is_last[index]],
            payloads=[self.payloads[index]],
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """Queued steps of one slot that will not run."""

    slot: int
    num_expired: int
    """Steps whose deadline passed."""
    num_behind: int
    """Steps that were queued behind them."""


class Scheduler:
    """Queues entries and forms batches."""

    def __init__(self, num_slots: int, config: BatchConfig) -> None:
        self.config = config
        self.num_queued_steps = 0
        """Steps submitted, not yet completed or dropped."""
        self._num_entries = 0
        self._num_deadlines = 0
        self._ready: deque[int] = deque()
        self._first: list[Entry | None] = [None] * num_slots
        self._done = [0] * num_slots  # steps of the first entry that were run
        self._behind: dict[int, deque[Entry]] = {}
        self._running: set[int] = set()
        self._doomed: set[int] = set()  # cancelled while running

    def submit(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        starts: Sequence[int],
        payload: object,
        *,
        deadlines: Sequence[float] | None = None,
    ) -> None:
        """Queue one entry for each slot.

        slots      [n], each once
        lengths    [n] steps, at least 1
        starts     [n] first row of each entry in the payload
        payload    whatever the caller needs to find the rows again
        deadlines  [n] entries that have not begun by then are dropped by `expire`; infinity and None never expire
        """
        first, ready = self._first, self._ready
        for index, slot in enumerate(slots):
            deadline = _NEVER if deadlines is None else deadlines[index]
            entry = (lengths[index], starts[index], payload, deadline)
            if first[slot] is None:
                first[slot] = entry
                ready.append(slot)
            else:
                self._behind.setdefault(slot, deque()).append(entry)
            if deadline != _NEVER:
                self._num_deadlines += 1
        self._num_entries += len(slots)
        self.num_queued_steps += sum(lengths)

    def next_batch(self) -> Batch | None:
        """Take the next rows to run, or None if nothing is ready. Every batch must be completed."""
        ready = self._ready
        if not ready:
            return None
        if self.num_queued_steps == self._num_entries and not self.config.whole:  # one step is left of every entry
            num_rows = min(len(ready), self.config.max_rows)
            slots = [ready.popleft() for _ in range(num_rows)]
            steps, counts, is_last = 1, [1] * num_rows, [True] * num_rows
        else:
            slots, limit = self._choose()
            left = [self._remaining(slot) for slot in slots]
            counts = [min(count, limit) for count in left]
            is_last = [count <= limit for count in left]
            steps = max(counts)
        entries: list[Entry] = [self._first[slot] for slot in slots]  # type: ignore[misc]  # ready ones have an entry
        done = self._done
        self._running.update(slots)
        return Batch(
            slots=slots,
            counts=counts,
            starts=[start + done[slot] for (_, start, _, _), slot in zip(entries, slots, strict=True)],
            steps=steps,
            is_last=is_last,
            payloads=[payload for _, _, payload, _ in entries],
        )

    def complete(self, batch: Batch) -> set[int]:
        """Account for a batch that was run. Returns the slots that were cancelled meanwhile: mostly none."""
        slots = batch.slots
        self._running.difference_update(slots)
        cancelled = self._doomed.intersection(slots) if self._doomed else set()
        self._doomed -= cancelled
        self.num_queued_steps -= sum(batch.counts)
        ready, first, done = self._ready, self._first, self._done
        if not (cancelled or self._behind or self._num_deadlines or False in batch.is_last):  # nothing follows any row
            for slot in slots:
                first[slot] = None
                done[slot] = 0
            self._num_entries -= len(slots)
            return cancelled
        for slot, count, is_last in zip(slots, batch.counts, batch.is_last, strict=True):
            if is_last:
                done[slot] = 0
                self._advance(slot)
            else:
                done[slot] += count
                if slot in cancelled:
                    self.num_queued_steps -= self._remaining(slot)
                    done[slot] = 0
                    self._advance(slot)
                else:
                    ready.append(slot)
        return cancelled

    def cancel(self, slot: int) -> bool:
        """Drop all that is queued for a slot. Returns whether a batch with it is running.

        The slot of a running batch is reported by `complete`; until then it must not be reused.
        """
        if self._first[slot] is None:
            return False
        for entry in self._behind.pop(slot, ()):
            self._forget(entry, entry[0])
        if slot in self._running:
            self._doomed.add(slot)
            return True
        self._ready.remove(slot)
        self.num_queued_steps -= self._remaining(slot)
        self._done[slot] = 0
        self._advance(slot)
        return False

    def expire(self, now: float) -> Sequence[Dropped]:
        """Drop entries whose deadline has passed before they began, and what is queued behind them."""
        if not self._num_deadlines:
            return ()
        dropped = []
        for slot in list(self._ready):
            entry = self._first[slot]
            if entry is not None and entry[3] <= now and not self._done[slot]:
                before = self.num_queued_steps
                self.cancel(slot)
                num_behind = before - self.num_queued_steps - entry[0]
                dropped.append(Dropped(slot, entry[0], num_behind))
        return dropped

    @property
    def num_ready(self) -> int:
        """Slots that the next batch could take."""
        return len(self._ready)

    def is_in_flight(self, batch: Batch) -> bool:
        """Whether a batch has not been completed."""
        return not self._running.isdisjoint(batch.slots)

    def is_busy(self, slot: int) -> bool:
        """Whether steps of a slot are queued or running."""
        return self._first[slot] is not None

    def _remaining(self, slot: int) -> int:
        entry = self._first[slot]
        return 0 if entry is None else entry[0] - self._done[slot]

    def _advance(self, slot: int) -> None:
        """Leave a slot's first entry behind; what comes next is ready."""
        entry = self._first[slot]
        if entry is not None:
            self._forget(entry, 0)
        following = self._behind.get(slot)
        if following:
            self._first[slot] = following.popleft()
            self._ready.append(slot)
            if not following:
                del self._behind[slot]
        else:
            self._first[slot] = None

    def _forget(self, entry: Entry, num_steps: int) -> None:
        self._num_entries -= 1
        self._num_deadlines -= entry[3] != _NEVER
        self.num_queued_steps -= num_steps

    def _choose(self) -> tuple[list[int], int]:
        """Take slots that run well together with the first one in line, which always runs.

        Returns (slots, most steps to advance). Longer entries always join, for as many steps as the first one wants;
        shorter ones join if more than half of those steps are theirs, so padding stays below half of any row.
        """
        config = self.config
        window = list(islice(self._ready, 4 * config.max_rows))  # more than fit, to choose companions from
        lengths = [self._remaining(slot) for slot in window]
        if config.whole:
            fits, limit = self._fit_whole(lengths), max(lengths)
        else:
            limit = min(1 << (lengths[0] - 1).bit_length(), config.max_chunk_steps)
            fits = [2 * length > limit for length in lengths]  # the first one always does
        chosen: list[int] = []
        kept: list[int] = []
        for slot, is_in in zip(window, fits, strict=True):
            (chosen if is_in and len(chosen) < config.max_rows else kept).append(slot)
        for _ in window:
            self._ready.popleft()
        self._ready.extendleft(reversed(kept))
        return chosen, limit

    def _fit_whole(self, lengths: list[int]) -> list[bool]:
        """Mark entries whose lengths are close, as many as a run may hold."""
        shortest = longest = lengths[0]
        total = 0
        fits: list[bool] = []
        for length in lengths:
            low, high = min(shortest, length), max(longest, length)
            is_in = not fits or (high <= low * WHOLE_SPREAD and total + length <= self.config.max_whole_steps)
            if is_in:
                shortest, longest = low, high
                total += length
            fits.append(is_in)
        return fits


_NEVER = float("inf")
