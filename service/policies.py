"""Who goes first: classes of priority within a model, and time shared between models. No clock and no I/O.

Laws:

    the highest class that waits goes first, unless another one is due; members of a class keep their order
    a class is due once PATIENCE - 1 turns in a row have passed it over, so no more than PATIENCE ever do
    models that have work all the while get equal time, within one run of each
    time that nobody asked for is lost: a model that was idle comes back with no more credit than those that were not
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from itertools import chain, islice
from operator import attrgetter
from typing import Protocol, TypeVar


class Priority(IntEnum):
    """Classes of work for one model, from the first to the last."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


PATIENCE = 8
"""Most turns in a row that pass over a class that waits."""


class Turns:
    """Says in which order the classes that wait are served."""

    def __init__(self) -> None:
        self._num_passed = [0, 0, 0]

    def order(self, waiting: Sequence[int]) -> Sequence[int]:
        """Put classes that wait, at least one and from high to low, into the order in which this turn serves them."""
        due = max(waiting, key=self._num_passed.__getitem__)
        if self._num_passed[due] < PATIENCE - 1:
            return waiting
        return [due, *(rank for rank in waiting if rank != due)]

    def end(self, waiting: Sequence[int], served: Sequence[int]) -> None:
        """Count a turn: the classes that waited when it began, and those of them that it served."""
        for rank, num in enumerate(self._num_passed):
            self._num_passed[rank] = num + 1 if rank in waiting and rank not in served else 0

    def clear(self) -> None:
        """Count a turn that passed nobody over."""
        self._num_passed = [0, 0, 0]


class Line:
    """Slots that wait to run, first come first served within their class."""

    def __init__(self) -> None:
        self.normal: deque[int] = deque()
        """Those of NORMAL: all there are, unless it `is_mixed`."""
        self.append: Callable[[int], None] = self.normal.append
        """Puts a slot at the end of its class; while every slot is NORMAL, that is the deque's own method."""
        self._high: deque[int] = deque()
        self._low: deque[int] = deque()
        self._lines = self._high, self.normal, self._low
        self._ranks: dict[int, Priority] = {}
        self._turns = Turns()

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    def __iter__(self) -> Iterator[int]:
        return chain(*self._lines)

    @property
    def is_mixed(self) -> bool:
        """Whether a slot waits that is not NORMAL."""
        return bool(self._high or self._low)

    def remove(self, slot: int) -> None:
        """Take out a slot that waits."""
        self._lines[self.rank_of(slot)].remove(slot)

    @property
    def has_ranks(self) -> bool:
        """Whether some slot is in another class than NORMAL, waiting or not."""
        return bool(self._ranks)

    def rank_of(self, slot: int) -> Priority:
        """Class of a slot; every one begins in NORMAL."""
        return self._ranks.get(slot, Priority.NORMAL)

    def rank(self, slot: int, priority: Priority) -> None:
        """Put a slot that does not wait into a class."""
        if priority is Priority.NORMAL:
            self._ranks.pop(slot, None)
        else:
            self._ranks[slot] = priority
        self.append = self._append if self._ranks else self.normal.append

    def _append(self, slot: int) -> None:
        self._lines[self.rank_of(slot)].append(slot)

    def candidates(self, count: int) -> tuple[list[int], int]:
        """Look at some `count` slots that could go next, in the order in which a turn takes them.

        Returns (slots, leaders): so many of the first ones decide how long a run may be. Two do where a class is due
        that is not the highest: its first slot, and that of the highest, which must not wait for a long run.
        """
        if not self.is_mixed:
            return list(islice(self.normal, count)), 1
        lines = self._lines
        waiting = [rank for rank, line in enumerate(lines) if line]
        order = self._turns.order(waiting)
        leaders = [lines[rank][0] for rank in dict.fromkeys((order[0], waiting[0]))]
        slots = dict.fromkeys(islice(chain(leaders, *(lines[rank] for rank in order)), len(leaders) + count))
        return list(slots), len(leaders)

    def take(self, slots: Sequence[int]) -> None:
        """Take some candidates out: one turn."""
        if not self.is_mixed:
            self._turns.clear()
            _take(self.normal, slots)
            return
        by_rank: tuple[list[int], ...] = ([], [], [])
        for slot in slots:
            by_rank[self.rank_of(slot)].append(slot)
        waiting = [rank for rank, line in enumerate(self._lines) if line]
        self._turns.end(waiting, [rank for rank in waiting if by_rank[rank]])
        for line, taken in zip(self._lines, by_rank, strict=True):
            _take(line, taken)

    def take_normal(self, count: int) -> list[int]:
        """Take the first slots out: a turn, while it is not mixed."""
        self._turns.clear()
        take = self.normal.popleft
        return [take() for _ in range(count)]


def _take(line: deque[int], slots: Sequence[int]) -> None:
    """Take slots out of a line that are near its front, given in its order."""
    passed = []
    for taken in slots:
        while (slot := line.popleft()) != taken:
            passed.append(slot)
    line.extendleft(reversed(passed))


class Served(Protocol):
    """What gets a share of the time."""

    attained_s: float
    """Time that it has had, and what it was not there to ask for. Who serves it adds to it."""


S = TypeVar("S", bound=Served)


class LeastServed:
    """Shares time: next is whoever has had the least of it among those that have work.

    Source: start-time fair queueing (Goyal, Vin and Cheng, 1996), with equal weights and charged after the run.
    """

    def __init__(self) -> None:
        self._level_s = 0.0  # what the one that was served last had attained when it began

    def pick(self, busy: Sequence[S]) -> S:
        """Pick the next of those that have work, at least one."""
        picked = min(busy, key=_attained)
        self._level_s = picked.attained_s = max(picked.attained_s, self._level_s)
        return picked


_attained = attrgetter("attained_s")
