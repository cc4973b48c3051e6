"""Decides which sequences advance together: continuous batching, as a state machine with no clock and no I/O.

An *entry* is one or more steps of one sequence, submitted together; a sequence is known by its slot. A slot's entries
run in the order of submission, never two at once. `next_batch` takes whatever is ready at that moment, at most
`max_rows` slots, from the highest class of priority down, each in the order in which they became ready; a slot advances
at most `max_chunk_steps` per batch and then goes to the end of the line, so a long entry can't starve a short one.
Laws:

    every submitted step is run once, or dropped by cancel or expire: never both, never twice
    a batch holds a slot at most once, and no slot that is in a batch not yet completed
    next_batch returns None only if every queued slot is running (work-conserving)
    the highest class leads, unless another one is due: no class is passed over by more than policies.PATIENCE batches
    the first slot of the class that leads is in the batch; what ran goes to the end of its line, so none waits for ever
    where there is room, a slot is passed over only for being short; while its class leads, at most once for each power
        of two of steps
    rows that are padded by half or more are so by no more steps, together, than another run would cost
    where a lower class leads, the first slot of the highest is in the batch too if it has two rows, and the batch is as
        short as suits both: only a batch of one row, or of whole entries, makes it wait for more than what runs already

Columns are plain lists, by slot and by row: most batches are small, and below some dozens of rows a loop over Python
ints costs less than the calls into numpy that would replace it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.policies import Line, Priority

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
    padding_steps: int = 48
    """Padding, in steps of one row, that costs no more than another run would."""
    padding_share: float = 0.125
    """Padding, as a share of the steps of a run, that is worth less than a fuller batch."""
    max_whole_steps: int = 8_192
    """Most steps of a batch of whole entries, over all rows and beyond the first, so that no run takes long."""


Entry = tuple[int, int, Any, float, float]
"""(length, first row in the payload, payload, deadline, arrival) of steps that were submitted together: a plain tuple,
since one is made for every step of every session."""


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
    arrived: list[float]
    """When each row's entry came, as its submitter says."""
    is_first: list[bool]
    """Whether the batch begins the row's entry."""

    def row(self, index: int) -> Batch:
        """Cut one row out, to be run and completed alone."""
        return self.part([index])

    def part(self, rows: Sequence[int]) -> Batch:
        """Cut some rows out, to be run and completed apart from the others."""
        counts = [self.counts[row] for row in rows]
        return Batch(
            slots=[self.slots[row] for row in rows],
            counts=counts,
            starts=[self.starts[row] for row in rows],
            steps=max(counts),
            is_last=[self.is_last[row] for row in rows],
            payloads=[self.payloads[row] for row in rows],
            arrived=[self.arrived[row] for row in rows],
            is_first=[self.is_first[row] for row in rows],
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
        self._earliest = _NEVER  # no entry that is ready and has not begun has an earlier deadline
        self._line = Line()
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
        arrived: Sequence[float] | None = None,
    ) -> None:
        """Queue one entry for each slot.

        slots      [n], each once
        lengths    [n] steps, at least 1
        starts     [n] first row of each entry in the payload
        payload    whatever the caller needs to find the rows again
        deadlines  [n] entries that have not begun by then are dropped by `expire`; infinity and None never expire
        arrived    [n] when each came, for whoever counts how long it took; None where nobody does
        """
        first, make_ready = self._first, self._line.append
        for index, slot in enumerate(slots):
            deadline = _NEVER if deadlines is None else deadlines[index]
            entry = (lengths[index], starts[index], payload, deadline, 0.0 if arrived is None else arrived[index])
            if first[slot] is None:
                first[slot] = entry
                make_ready(slot)
                if deadline < self._earliest:
                    self._earliest = deadline
            else:
                self._behind.setdefault(slot, deque()).append(entry)
        self._num_entries += len(slots)
        self.num_queued_steps += sum(lengths)

    def next_batch(self) -> Batch | None:
        """Take the next rows to run, or None if nothing is ready. Every batch must be completed."""
        line = self._line
        is_mixed = line.is_mixed
        if not (line.normal or is_mixed):
            return None
        is_single = self.num_queued_steps == self._num_entries and not self.config.whole  # one step is left of each
        if is_single and not is_mixed:
            num_rows = min(len(line.normal), self.config.max_rows)
            slots = line.take_normal(num_rows)
            steps, counts, is_last = 1, [1] * num_rows, [True] * num_rows
        else:
            slots, limit = self._choose()
            line.take(slots)
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
            starts=[start + done[slot] for (_, start, _, _, _), slot in zip(entries, slots, strict=True)],
            steps=steps,
            is_last=is_last,
            payloads=[payload for _, _, payload, _, _ in entries],
            arrived=[at for _, _, _, _, at in entries],
            is_first=[not done[slot] for slot in slots],
        )

    def complete(self, batch: Batch) -> set[int]:
        """Account for a batch that was run. Returns the slots that were cancelled meanwhile: mostly none."""
        slots = batch.slots
        self._running.difference_update(slots)
        cancelled = self._doomed.intersection(slots) if self._doomed else set()
        self._doomed -= cancelled
        self.num_queued_steps -= sum(batch.counts)
        first, done, make_ready = self._first, self._done, self._line.append
        if not (cancelled or self._behind or False in batch.is_last):  # nothing follows any row
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
                    make_ready(slot)
        return cancelled

    def cancel(self, slot: int) -> bool:
        """Drop all that is queued for a slot. Returns whether a batch with it is running.

        The slot of a running batch is reported by `complete`; until then it must not be reused.
        """
        if self._first[slot] is None:
            return False
        for entry in self._behind.pop(slot, ()):
            self._num_entries -= 1
            self.num_queued_steps -= entry[0]
        if slot in self._running:
            self._doomed.add(slot)
            return True
        self._line.remove(slot)
        self.num_queued_steps -= self._remaining(slot)
        self._done[slot] = 0
        self._advance(slot)
        return False

    def expire(self, now: float) -> list[Dropped]:
        """Drop entries whose deadline has passed before they began, and what is queued behind them."""
        if now < self._earliest:
            return []
        dropped = []
        self._earliest = _NEVER
        for slot in list(self._line):
            entry = self._first[slot]
            if entry is None or self._done[slot]:
                continue
            if entry[3] <= now:
                before = self.num_queued_steps
                self.cancel(slot)
                num_behind = before - self.num_queued_steps - entry[0]
                dropped.append(Dropped(slot, entry[0], num_behind))
            elif entry[3] < self._earliest:
                self._earliest = entry[3]
        return dropped

    def prioritize(self, slot: int, priority: Priority = Priority.NORMAL) -> None:
        """Put a slot into a class, at whose end it waits if it has steps queued; every slot begins in NORMAL."""
        if self._line.rank_of(slot) is priority:
            return
        is_waiting = self._first[slot] is not None and slot not in self._running
        if is_waiting:
            self._line.remove(slot)
        self._line.rank(slot, priority)
        if is_waiting:
            self._line.append(slot)

    @property
    def has_classes(self) -> bool:
        """Whether some slot is in another class than NORMAL, queued or not."""
        return self._line.has_ranks

    @property
    def num_ready(self) -> int:
        """Slots that the next batch could take."""
        return len(self._line)

    def is_in_flight(self, batch: Batch) -> bool:
        """Whether a batch has not been completed."""
        return not self._running.isdisjoint(batch.slots)

    def is_running(self, slot: int) -> bool:
        """Whether a slot is in a batch that has not been completed."""
        return slot in self._running

    def is_busy(self, slot: int) -> bool:
        """Whether steps of a slot are queued or running."""
        return self._first[slot] is not None

    def _remaining(self, slot: int) -> int:
        entry = self._first[slot]
        return 0 if entry is None else entry[0] - self._done[slot]

    def _advance(self, slot: int) -> None:
        """Leave a slot's first entry behind; what comes next is ready."""
        self._num_entries -= 1
        following = self._behind.get(slot)
        if following:
            self._first[slot] = entry = following.popleft()
            self._earliest = min(self._earliest, entry[3])
            self._line.append(slot)
            if not following:
                del self._behind[slot]
        else:
            self._first[slot] = None

    def _choose(self) -> tuple[list[int], int]:
        """Choose slots that run well together with the first one in line, which always runs.

        Returns (slots, most steps to advance). Longer entries always join, for as many steps as the first one wants;
        shorter ones join if more than half of those steps are theirs, and others as far as there is room for padding.
        """
        config = self.config
        window, num_leaders = self._line.candidates(4 * config.max_rows)  # more than fit, to choose companions from
        lengths = [self._remaining(slot) for slot in window]
        if config.whole:
            fits, limit = self._fit_whole(lengths), max(lengths)
        else:
            limit = min(1 << (min(lengths[:num_leaders]) - 1).bit_length(), config.max_chunk_steps)
            if not self._line.is_mixed:
                limit = self._stretch(window[: config.max_rows], lengths[: config.max_rows], limit)
            fits = self._fit(lengths, limit)  # the first one always does
        chosen = [slot for slot, is_in in zip(window, fits, strict=True) if is_in]
        return chosen[: config.max_rows], limit

    def _stretch(self, slots: list[int], lengths: list[int], limit: int) -> int:
        """Let the first slots advance by more than the first one wants, where all can and the padding is little.

        What has not begun is not held up so: the ends of longer entries are what is padded.
        """
        longest = min(1 << (max(lengths) - 1).bit_length(), self.config.max_chunk_steps)
        while longest > limit:
            short = [(slot, length) for slot, length in zip(slots, lengths, strict=True) if length < longest]
            real = sum([length for _, length in short])
            room = self._room(longest * (len(slots) - len(short)) + real)
            if longest * len(short) - real <= room and all(2 * n > longest or self._done[slot] for slot, n in short):
                return longest
            longest = 1 << (longest - 1).bit_length() - 1
        return limit

    def _fit(self, lengths: list[int], limit: int) -> list[bool]:
        """Mark entries that join a run of that many steps."""
        fits = [2 * length > limit for length in lengths]
        if all(fits):
            return fits
        steps = [min(length, limit) for length, is_in in zip(lengths, fits, strict=True) if is_in]
        room = self._room(sum(steps[: self.config.max_rows]))
        for index, length in enumerate(lengths):
            if not fits[index] and limit - length <= room:
                fits[index] = True
                room -= limit - length
        return fits

    def _room(self, num_steps: int) -> float:
        """Padding that a run of so many steps, over all rows, may have."""
        return max(self.config.padding_steps, self.config.padding_share * num_steps)

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
